"""Nested settings and details as tidy tables, whatever a method chose to store.

Scalars become lines; lists of records, records under names (one a memory) and parallel lists become tables; long
lists are counted rather than printed (57 neurons), since the saved edit holds them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

SHOWN = 6


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of texts with a title and a header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """What some nested data shows: lines of name and value, and tables."""

    lines: tuple[tuple[str, str], ...]
    grids: tuple[Grid, ...]


def sheet(data: Mapping[str, Any]) -> Sheet:
    """The tidy form of nested JSON data, keys sorted as `audit.json` sorts them; of records, `id` comes first."""
    data = json.loads(json.dumps(data, sort_keys=True))
    lines: list[tuple[str, str]] = []
    grids: list[Grid] = []
    parallel: dict[int, dict[str, Sequence[Any]]] = {}
    for name, value in _opened(data):
        if _is_named_records(value):
            grids.append(_records(name, [({"": key}, record) for key, record in value.items()]))
        elif isinstance(value, Mapping) and value:
            grids.append(Grid(spoken(name), ("", "value"), tuple((str(k), text(v)) for k, v in value.items())))
        elif _is_records(value):
            grids.append(_records(name, [({}, record) for record in value]))
        elif _is_list(value) and len(value) > 1:
            parallel.setdefault(len(value), {})[name] = value
        else:
            lines.append((spoken(name), text(value)))
    for columns in parallel.values():
        if len(columns) > 1:
            rows = tuple(tuple(text(cell) for cell in row) for row in zip(*columns.values(), strict=True))
            grids.append(Grid("", tuple(map(spoken, columns)), rows))
        else:
            lines += [(spoken(name), text(value)) for name, value in columns.items()]
    return Sheet(tuple(lines), tuple(grids))


def _opened(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings opened into dotted names; what `sheet` shows as a table is left whole."""
    found = []
    for key, value in data.items():
        flat = (
            isinstance(value, Mapping)
            and len(value) > SHOWN
            and not any(isinstance(inner, Mapping) for inner in value.values())
        )
        if isinstance(value, Mapping) and value and not flat and not _is_named_records(value):
            found += _opened(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_records(value: object) -> bool:
    """A list of records; one whose fields are all lists (each memory's neurons by layer) is a column instead."""
    return _is_list(value) and len(value) > 0 and all(isinstance(v, Mapping) and not _is_layers(v) for v in value)


def _is_layers(value: object) -> TypeGuard[Mapping[str, Sequence[Any]]]:
    return isinstance(value, Mapping) and len(value) > 0 and all(map(_is_list, value.values()))


def _is_named_records(value: object) -> bool:
    """Two or more records of which each shares a field with the first."""
    if not isinstance(value, Mapping) or len(value) < 2 or not all(isinstance(v, Mapping) for v in value.values()):
        return False
    first, *others = value.values()
    return all(set(first) & set(other) for other in others)


def _records(title: str, records: Sequence[tuple[dict[str, Any], Mapping[str, Any]]]) -> Grid:
    columns = list(dict.fromkeys(key for label, record in records for key in (*label, *record)))
    columns.sort(key=lambda column: column not in ("", "id"))  # stable
    rows = tuple(tuple(text((label | dict(record)).get(column)) for column in columns) for label, record in records)
    return Grid(spoken(title), tuple(map(spoken, columns)), rows)


def spoken(name: str) -> str:
    """A field's name as words."""
    return name.replace("_", " ")


def text(value: object) -> str:
    """A value in a table's cell."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u2009") if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return _decimal(value)
    if _is_layers(value):
        lengths = [len(inner) for inner in value.values()]
        return f"{sum(lengths)} in {sum(map(bool, lengths))} of {len(lengths)} layers"
    if isinstance(value, Mapping):
        return "; ".join(f"{spoken(str(k))}: {text(v)}" for k, v in value.items() if v not in ([], ())) or "none"
    if _is_list(value):
        if len(value) > SHOWN:
            return f"{len(value)} entries"
        return ", ".join(map(text, value)) or "none"
    return str(value)


def _decimal(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.2f}" if 0.095 <= abs(value) < 1e6 else f"{value:.3g}"
