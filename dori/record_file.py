"""Records of a run as JSON files: dataclasses of numbers, texts, tuples and further dataclasses, and back again.

A file may come from a stranger: every field is held against its declared type, so that what is drawn from records need
not ask again.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from dori.errors import DoriError

T = TypeVar("T")


def record_json(record: Any) -> str:
    """Canonical JSON of a dataclass: sorted keys, no NaN."""
    return json.dumps(dataclasses.asdict(record), indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_record(path: Path, kind: type[T], *, schema: int, what: str) -> T:
    """Read the record that `record_json` wrote.

    Args:
        path: the file.
        kind: its dataclass.
        schema: the version that this code understands, the file's field "schema".
        what: whose record it is, for messages: "audit", "locality run", "table".

    Raises:
        DoriError: no such file, another schema, or fields that do not fit; the message names the first one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refused)
    except (OSError, ValueError, RecursionError) as error:
        raise DoriError(f"{path} cannot be read ({error}); give the record of a finished {what}") from None
    if not isinstance(data, dict) or data.get("schema") != schema:
        raise DoriError(f"{path} has another schema than {schema}; make the {what} again with this version of Dori")
    try:
        return _built(kind, data, "")
    except ValueError as error:
        raise DoriError(f"{path} does not fit the schema ({error}); make the {what} again") from None


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _built(kind: Any, value: Any, place: str) -> Any:
    """The value as the declared type; a ValueError names the place where it is something else."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _record(kind, _is(dict, value, place, kind), place)
    if origin is tuple:
        items = _is(list, value, place, kind)
        kinds = arguments[:1] * len(items) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(items):
            raise ValueError(f"{place} has {len(items)} entries, not {len(kinds)}")
        return tuple(_built(one, item, f"{place}[{k}]") for k, (one, item) in enumerate(zip(kinds, items, strict=True)))
    if origin is Mapping:
        entries = _is(dict, value, place, kind)
        return {key: _built(arguments[1], item, f"{place}.{key}") for key, item in entries.items()}
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{place} is {value!r:.40}, none of {', '.join(map(repr, arguments))}")
        return value
    if NoneType in arguments:
        return None if value is None else _built(arguments[0], value, place)
    return _is((int, float) if kind is float else kind, value, place, kind)


def _record(kind: Any, value: dict[str, Any], place: str) -> Any:
    hints = _hints(kind)
    wrong = next((name for name in value if name not in hints), None)
    if wrong is not None:
        raise ValueError(f"{place}.{wrong} is not known".removeprefix("."))
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in value
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{place}.{missing[0]} is missing".removeprefix("."))
    places = {name: f"{place}.{name}".removeprefix(".") for name in value}
    return kind(**{name: _built(hints[name], item, places[name]) for name, item in value.items()})


def _is(wanted: Any, value: Any, place: str, kind: Any) -> Any:
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{place} is {value!r:.40}, which is no {getattr(kind, '__name__', kind)}")
    return value
