"""A run folder that remembers: every finished cell is stored once, and an interrupted command goes on where it was.

    run = Run(Path("runs/a"), say=print, modules=("dori.audit.loop",))
    with run.locked():
        run.plan("audit", {"none.memory-01": 400, "none.memory-02": 400})
        record = run.once_record("none.memory-01", {"attack": Dori(), "model": fingerprint}, compute)

A cell is stored with the hash of its inputs and of what made it (the code, the libraries' versions, the kind of
device): the same give the stored cell back, others compute it again, so that no run mixes cells of different code.
Files are written beside their place and renamed into it, so a cell that was cut off does not exist, and they
hold neither times nor process ids, so an interrupted run ends with the same bytes as an undisturbed one.
Source: architecture.md 7.3 (`Run`) and 8, rule 16; anchors.md B (kill -9, disk full, torn write).
"""

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import dori
from dori.errors import DoriError
from dori.lock import locked
from dori.makers import code_sha256, makers, others
from dori.progress import Progress

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}")
LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "numpy")
PARTIAL = ".partial"
Reader = Callable[[Path], tuple[dict[str, Any], dict[str, Any]]]  # header and content of a cell's file
NO_SPACE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def cell_key(*parts: str) -> str:
    """A cell's name made of any texts: unsafe letters become dashes, and a short hash keeps altered names apart."""
    plain = ".".join(parts)
    if KEY.fullmatch(plain):
        return plain
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).lstrip("._-")[:120] or "cell"
    return f"{safe}-{_sha256(json.dumps(parts).encode())[:10]}"


def _silent(line: str) -> None:
    """Say nothing."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(slots=True)
class Run:
    """A folder of finished cells, `cells/<key>.json` and `cells/<key>.safetensors`.

    Args:
        folder: made when the first thing is written.
        say: receives one line at a time: progress, and why a cell is computed again.
        device: kind of device that computes ("cpu", "cuda"): another rounds otherwise.
        modules: those that compute; cells depend on their code and on that of all that they import.
    """

    folder: Path
    say: Callable[[str], None] = _silent
    device: str = "cpu"
    modules: tuple[str, ...] = field(kw_only=True)
    progress: Progress | None = field(default=None, init=False)
    started: str = field(default_factory=_now, init=False)
    _told: set[str] = field(default_factory=set, init=False)

    def once_record(
        self, key: str, inputs: Mapping[str, object], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The stored record of these inputs, computed and stored if there is none.

        Args:
            key: name of the cell, a file name without folders.
            inputs: all that the record depends on: JSON values, dataclasses (methods), paths.
            compute: returns a JSON-able dictionary; called at most once.

        Returns:
            The record as a later call reads it (tuples have become lists).

        Raises:
            DoriError: bad key, a number that is not finite, or no space left.
        """

        def packed(header: dict[str, Any]) -> bytes:
            record = compute()
            _refuse_nan(record, f"cell {key!r}")
            return _canonical(header | {"sha256": canonical_sha256(record), "record": record}) + b"\n"

        return self._once(key, ".json", inputs, _read_record, packed)

    def once_tensors(
        self, key: str, inputs: Mapping[str, object], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The stored tensors of these inputs, computed and stored if there are none; as `once_record`, on the CPU."""

        def packed(header: dict[str, Any]) -> bytes:
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in compute().items()}
            whole = header | {"sha256": tensors_sha256(tensors)}
            # One metadata entry: safetensors writes several in an order that changes from run to run.
            return save(tensors, metadata={"dori": _canonical(whole).decode()})

        return self._once(key, ".safetensors", inputs, _read_tensors, packed)

    def _once(
        self,
        key: str,
        suffix: str,
        inputs: Mapping[str, object],
        read: Reader,
        packed: Callable[[dict[str, Any]], bytes],
    ) -> dict[str, Any]:
        """What the cell's file holds, made by `packed` from its header if there is none of these inputs."""
        path, wanted = self._path(key, suffix), self._header(inputs)
        before, result = _version(path), self._reusable(key, path, read, wanted)
        stored = result is not None
        if result is None:
            data = packed(wanted)
            # Another process may have made it meanwhile and gone on from its own, which therefore stays.
            result = self._reusable(key, path, read, wanted) if _version(path) != before else None
            if result is None:
                write_bytes(path, data)
                result = read(path)[1]
        self._count(key, stored=stored)
        return result

    def holds(self, key: str, inputs: Mapping[str, object]) -> bool:
        """Whether `once_tensors` would find this cell stored."""
        path = self._path(key, ".safetensors")
        return self._reusable(key, path, _read_tensors, self._header(inputs)) is not None

    def plan(self, title: str, costs: Mapping[str, int]) -> None:
        """Announce the cells to come, key to cost in U-Net rows; from now on each finished one is said."""
        self.progress = Progress(title, dict(costs), self.say)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the folder to this process inside the block; what a killed process left half written is removed.

        Raises:
            DoriError: another process works in the folder.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "lock", say=self.say):
            for partial in list(self.folder.rglob(f".*{PARTIAL}")):
                if partial.is_dir():  # a model that was being written
                    shutil.rmtree(partial, ignore_errors=True)
                else:
                    partial.unlink(missing_ok=True)
            yield

    @property
    def made_by(self) -> dict[str, str]:
        """Beside its inputs, everything that a cell depends on: code, libraries and kind of device."""
        return makers(self.modules, self.device)

    def provenance(self) -> dict[str, Any]:
        """What made this run: code, versions and machine, and, apart from them, what differs from run to run: times."""
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        return {
            "versions": {"dori": dori.__version__, "python": platform.python_version(), **versions},
            "code": code_sha256(self.modules),
            "machine": {
                "platform": platform.platform(),
                "processor": platform.machine(),
                "threads": torch.get_num_threads(),
                "device": self.device,
            },
            "times": {"started": self.started, "finished": _now()},
        }

    def _header(self, inputs: Mapping[str, object]) -> dict[str, Any]:
        _refuse_nan(inputs, "the inputs of a cell")
        described = {"made_by": self.made_by, "inputs": as_read_again(dict(inputs))}
        return described | {"inputs_sha256": canonical_sha256(described)}

    def _path(self, key: str, suffix: str) -> Path:
        if not KEY.fullmatch(key):
            raise DoriError(
                f"{key[:60]!r} cannot name a cell; use at most 150 letters, digits, dots, dashes and "
                "underscores, beginning with a letter or digit"
            )
        return self.folder / "cells" / f"{key}{suffix}"

    def _reusable(self, key: str, path: Path, read: Reader, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """The stored cell if it is whole and made from these inputs; else None, and the reason is said."""
        if not path.is_file():
            return None
        try:
            header, stored = read(path)
            if header["inputs_sha256"] == wanted["inputs_sha256"]:
                return stored
            strangers = others(header.get("made_by", {}), wanted["made_by"])
            if strangers:
                self._tell_once(f"{self.folder}: made by {strangers}; results are computed anew")
                return None
            reason = f"{', '.join(_changed(header, wanted))} changed"
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):
            reason = "the stored cell is damaged"
        self.say(f"{key}: {reason}, computed again")
        return None

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self.say(line)

    def _count(self, key: str, *, stored: bool) -> None:
        if self.progress is not None:
            self.progress.done(key, stored=stored)


# ---------------------------------------------------------------------------------------------------- cell files


def _plain(value: object) -> object:
    """What JSON has no form for: a dataclass becomes its class name and fields, a path its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"a {type(value).__name__} cannot be stored as JSON")


def _canonical(data: object) -> bytes:
    """One byte string for one value: sorted keys, no blanks, ASCII, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain).encode("ascii")


def as_read_again(data: object) -> Any:
    """JSON-able data (dataclasses and paths as `Run.once_record` takes them) as a file gives it back: no tuples."""
    return json.loads(_canonical(data))


def canonical_sha256(data: object) -> str:
    """SHA-256 of JSON-able data (dataclasses and paths as `Run.once_record` takes them), whatever the key order."""
    return _sha256(_canonical(data))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _version(path: Path) -> int | None:
    """When a cell's file was written; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _read_record(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    header = json.loads(path.read_bytes())
    record = header.pop("record")
    if canonical_sha256(record) != header["sha256"]:
        raise ValueError("the record does not have its own hash")
    return header, record


def _read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        header = json.loads((file.metadata() or {})["dori"])
        # Cloned: the reader maps the file, and a caller may keep tensors after it is replaced.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    if tensors_sha256(tensors) != header["sha256"]:
        raise ValueError("the tensors do not have their own hash")
    return header, tensors


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Dotted names and values of the leaves of nested data."""
    value = _plain(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{index}]")
    else:
        yield name, value


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the inputs that differ, at most five."""
    before, after = (dict(_leaves(header["inputs"], "")) for header in (old, new))
    missing = object()
    names = [name for name in sorted({*before, *after}) if before.get(name, missing) != after.get(name, missing)]
    return names[:5] + ["more"] * (len(names) > 5) or ["the stored hash"]


def _refuse_nan(data: object, what: str) -> None:
    for name, value in _leaves(data, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise DoriError(
                f"{what} holds {value} at {name!r}, which is no result and cannot be stored; "
                "look for a diverged computation or leave the value out"
            )


# --------------------------------------------------------------------------------------------------- writing files


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically: whenever the process dies, `path` holds the old text or the new one.

    Raises:
        DoriError: no space left, or the place cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: object) -> None:
    """Write readable JSON atomically, keys sorted; dataclasses and paths as `Run.once_record` takes them.

    Raises:
        DoriError: a number that is not finite, no space left, or the place cannot be written.
    """
    _refuse_nan(data, path.name)
    text = json.dumps(data, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False, default=_plain)
    write_text(path, text + "\n")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make what goes wrong with the disk inside the block one sentence about `path`.

    Raises:
        DoriError: no space left, or the place cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise DoriError(
                f"no space left to write {path} ({error.strerror}); everything finished is kept, so free "
                "some space and give the same command again to resume"
            ) from None
        raise DoriError(
            f"{path} cannot be written ({error.strerror}); everything finished is kept, so choose a folder "
            "that you may write, or mend its permissions, and give the same command again"
        ) from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside `path`, force to disk, rename: a half-written file never bears the name.

    Raises:
        DoriError: no space left, or the place cannot be written.
    """
    # Several processes, of several machines perhaps, may write one folder.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            with suppress(OSError):  # after the renaming there is none
                partial.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Force the rename itself to disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
