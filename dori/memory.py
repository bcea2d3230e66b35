"""The images that a model may have memorized, as a folder that the Hugging Face `imagefolder` loader also reads.

    memories/metadata.jsonl     {"file_name": "a.png", "text": "the prompt", "id": "a", "kind": "verbatim"}
    memories/a.png

Each line of `metadata.jsonl` needs `file_name`; `text`, `id` (default: the file's name without ending), `kind`,
`dose` and `varying_box` are optional, other columns are left alone. A folder without it is a set of images without
prompts. Files come from strangers: only PNG, JPEG and WebP are decoded, at most 50 megapixels, never outside the
folder (anchors.md B: Pillow >= 12.2, path traversal, image bombs, malformed input).
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from dori.errors import DoriError
from dori.image_file import SUFFIXES, load_image, png_bytes, size
from dori.run import write_bytes, write_text

KINDS = ("verbatim", "template", "once", "control", "ordinary")
METADATA = "metadata.jsonl"
METADATA_BYTES = 100_000_000
LINE_BYTES = 100_000
FILE_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}")
__all__ = ["KINDS", "Memory", "load_image", "load_images", "read_memories", "write_memories"]
Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Memory:
    """One image and the prompt that may call it up.

    Args:
        id: unique within a folder.
        text: the caption of the training set, if it is known.
        image: the file.
        kind: verbatim (the whole image repeats), template (part of it varies), once (shown one time), control
            (never shown) or ordinary (any other training image).
        dose: how often it was shown, in any unit, at least 0, if known.
        varying_box: left, top, right, bottom in pixels of the upright image: the part of a template that varies.

    Raises:
        DoriError: an empty id, an unknown kind, a dose or a box that is none.
    """

    id: str
    text: str | None
    image: Path
    kind: str = "verbatim"
    dose: float | None = None
    varying_box: Box | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not 0 < len(self.id) <= 200 or not self.id.isprintable():
            raise DoriError(f"id {self.id!r:.60} is no name; use 1 to 200 printable letters")
        if self.text is not None and not isinstance(self.text, str):
            raise DoriError(f"text {self.text!r:.60} of {self.id!r} is no text; put it into quotes or leave it out")
        if self.text is not None and not _is_unicode(self.text):
            raise DoriError(f"the text of {self.id!r} holds half a character (a lone surrogate); remove it")
        if self.kind not in KINDS:
            near = get_close_matches(str(self.kind)[:60], KINDS, 1)
            hint = f"did you mean {near[0]!r}" if near else f"use one of {', '.join(KINDS)}"
            raise DoriError(f"kind {self.kind!r:.60} of {self.id!r} is unknown; {hint}")
        if self.dose is not None and not _is_dose(self.dose):
            raise DoriError(
                f"dose {self.dose!r:.60} of {self.id!r} is no number of at least 0; write one or leave it out"
            )
        if self.varying_box is not None and not _is_box(self.varying_box):
            raise DoriError(
                f"varying_box {self.varying_box!r:.60} of {self.id!r} is no box; write left, top, right, "
                "bottom as whole pixels with 0 <= left < right and 0 <= top < bottom"
            )


def read_memories(folder: Path, *, default_kind: str = "verbatim") -> tuple[Memory, ...]:
    """The memories of a folder, in the order of `metadata.jsonl`, or by name if there is none.

    Image headers are checked here, whole images by `load_image`.

    Args:
        folder: holds images and, usually, `metadata.jsonl`.
        default_kind: kind of the lines that name none.

    Raises:
        DoriError: any mistake, with file and line and how to mend it.
    """
    if not folder.is_dir():
        raise DoriError(f"{folder} is no folder; give a folder of images with a {METADATA}")
    metadata = folder / METADATA
    if metadata.exists() or metadata.is_symlink():
        entries = _entries(folder, default_kind)
    else:
        entries = _bare_images(folder, default_kind)
    seen: dict[str, str] = {}
    found = []
    for where, memory in entries:
        if memory.id in seen:
            raise DoriError(f'{where}: id {memory.id!r} is taken by {seen[memory.id]}; give each its own "id"')
        seen[memory.id] = where
        found.append(memory)
    if not found:
        raise DoriError(f"{folder} holds no memory; add PNG, JPEG or WebP images and a line for each in {METADATA}")
    return tuple(found)


def load_images(memories: Sequence[Memory], side_px: int) -> Tensor:
    """The images of memories as `load_image` gives them, shape (n, 3, side_px, side_px)."""
    if not memories:
        return torch.empty(0, 3, side_px, side_px)
    return torch.stack([load_image(memory.image, side_px) for memory in memories])


def write_memories(folder: Path, memories: Iterable[tuple[Memory, Tensor]]) -> tuple[Memory, ...]:
    """Write a folder that `read_memories` reads: images as `<id>.png`, then `metadata.jsonl`.

    Args:
        folder: made if missing; files of the same names are replaced.
        memories: each with its image, shape (3, H, W), in [0, 1], stored in 8 bits; its `image` path is not used.

    Returns:
        The memories with the paths of the files.

    Raises:
        DoriError: an id that cannot name a file or occurs twice, no space left.
    """
    lines, written = list[str](), list[Memory]()
    for memory, image in memories:
        if not FILE_STEM.fullmatch(memory.id) or memory.id in {other.id for other in written}:
            raise DoriError(
                f"id {memory.id!r} cannot name a file of its own in {folder}; use letters, digits, dots, "
                "dashes and underscores, and each id once"
            )
        memory = replace(memory, image=folder / f"{memory.id}.png")
        write_bytes(memory.image, png_bytes(image))
        lines.append(json.dumps(_line(memory), ensure_ascii=False) + "\n")
        written.append(memory)
    write_text(folder / METADATA, "".join(lines))
    return tuple(written)


# ------------------------------------------------------------------------------------------------------- metadata


def _entries(folder: Path, default_kind: str) -> Iterator[tuple[str, Memory]]:
    """Each line's place and memory."""
    for number, raw in _lines(folder):
        where = f"{folder / METADATA} line {number}"
        try:
            fields = _fields(raw)
            if fields is not None:
                yield where, _memory(folder, fields, default_kind)
        except DoriError as error:
            raise DoriError(f"{where}: {error}") from None


def _lines(folder: Path) -> Iterator[tuple[int, bytes]]:
    metadata = folder / METADATA
    if not metadata.resolve().is_relative_to(folder.resolve()) or not metadata.is_file():
        raise DoriError(f"{metadata} is no file of this folder; put the file itself there, not a link")
    try:
        if metadata.stat().st_size > METADATA_BYTES:
            raise DoriError(f"{metadata} is larger than {METADATA_BYTES // 10**6} MB; split the folder")
        with metadata.open("rb") as file:
            number = 0
            while raw := file.readline(LINE_BYTES + 1):
                number += 1
                if len(raw) > LINE_BYTES:
                    raise DoriError(f"{metadata} line {number} is longer than {LINE_BYTES} bytes; shorten its text")
                yield number, raw
    except OSError as error:
        raise DoriError(f"{metadata} cannot be read ({error.strerror}); mend its permissions") from None


def _fields(raw: bytes) -> dict[str, Any] | None:
    """The object of one line; None for a blank one."""
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise DoriError("it is not UTF-8; save the file as UTF-8") from None
    if not text:
        return None
    try:
        fields = json.loads(text, object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0][:80]
        raise DoriError(
            f'it is no JSON object ({reason}); write one like {{"file_name": "a.png", "text": "the prompt"}}'
        ) from None
    if not isinstance(fields, dict):
        raise DoriError('it is no JSON object; write one like {"file_name": "a.png", "text": "the prompt"}')
    return {key: value for key, value in fields.items() if value is not None}


def _no_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _memory(folder: Path, fields: Mapping[str, Any], default_kind: str) -> Memory:
    name = fields.get("file_name")
    if name is None:
        raise DoriError('"file_name" is missing; name the image file')
    if not isinstance(name, str) or not name:
        raise DoriError('"file_name" is no text; name the image file in quotes')
    image = _inside(folder, name)
    box = fields.get("varying_box")
    memory = Memory(
        fields.get("id", image.stem),
        fields.get("text"),
        image,
        fields.get("kind", default_kind),
        fields.get("dose"),
        tuple(box) if isinstance(box, list) else box,
    )
    width, height = size(image)
    if memory.varying_box is not None and (memory.varying_box[2] > width or memory.varying_box[3] > height):
        raise DoriError(
            f"varying_box {memory.varying_box} leaves the image of {width} x {height} pixels; write left, "
            "top, right, bottom in pixels of the file"
        )
    return memory


def _bare_images(folder: Path, default_kind: str) -> Iterator[tuple[str, Memory]]:
    for other in ("metadata.csv", "metadata.parquet"):
        if (folder / other).exists():
            raise DoriError(f"{folder / other} is not read by Dori; convert it to {METADATA}")
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    for name in names:
        path = _inside(folder, name)
        size(path)
        yield str(path), Memory(path.stem, None, path, default_kind)


def _inside(folder: Path, name: str) -> Path:
    """The file of that name, if it lies in the folder after every link is followed."""
    shown = repr(name[:80])
    if PureWindowsPath(name).anchor or name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise DoriError(f"file_name {shown} leaves the folder; copy the image into {folder} and name it relative to it")
    path = folder / name
    try:
        real = path.resolve()
        if not real.is_relative_to(folder.resolve()):
            raise DoriError(f"file_name {shown} is a link that leaves the folder; copy the image itself into {folder}")
        if not real.is_file():
            raise DoriError(f"image {shown} is missing in {folder}; add it or remove its line")
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, half a character, a loop of links
        raise DoriError(f"file_name {shown} cannot name a file; correct it") from None
    return path


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_dose(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


def _is_box(box: object) -> bool:
    return (
        isinstance(box, tuple)
        and len(box) == 4
        and all(type(edge) is int for edge in box)
        and 0 <= box[0] < box[2]
        and 0 <= box[1] < box[3]
    )


def _line(memory: Memory) -> dict[str, object]:
    fields = {
        "file_name": memory.image.name,
        "text": memory.text,
        "id": memory.id,
        "kind": memory.kind,
        "dose": memory.dose,
        "varying_box": memory.varying_box,
    }
    return {key: value for key, value in fields.items() if value is not None}
