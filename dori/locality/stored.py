"""What a locality run keeps in its folder, for a notebook: the attacks on a memory with their starts, and their masks.

Cells hold where attacks ended and how that was judged. Where they began is made again from seeds and texts, and the
hashes in the cells tell whether it is the same. Only JSON and safetensors are read, whatever code wrote them.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dori.audit.schedule import Subjects
from dori.errors import DoriError
from dori.locality.bench import Source, encoded
from dori.locality.costs import chunks
from dori.locality.masks import FACTS, NEMO, Masks, concatenated, mask_shape, unpacked
from dori.locality.records import FILE, Locality, read_locality
from dori.locality.triggers import Found, numbered_starts, replicating
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.run import canonical_sha256, cell_key, tensors_sha256
from dori.tensor_file import read_tensors

MEND = "give the folder of a run that finished this memory"
SUBJECTS = "give the model, memories and ordinary prompts of that run"
MODEL = f"this model; {SUBJECTS}"
STARTS = f"these starts; {SUBJECTS}"
ENDS = "these attacks; give those of its own memory, or let a run that is being made again finish first"


@dataclass(frozen=True, slots=True, eq=False)
class _Cell:
    """A cell's file, what it was made from, and its tensors."""

    path: Path
    inputs: dict[str, Any]
    tensors: dict[str, Tensor]

    def check(self, name: str, wanted: str, what: str) -> None:
        """Refuse a cell that was made from something else than `what`, which says what to give, too."""
        if self.inputs.get(name) != wanted:
            raise DoriError(f"{self.path} was not made from {what}")

    def tensor(self, name: str, *shape: int) -> Tensor:
        """One tensor, which must have this shape."""
        found = self.tensors.get(name)
        if found is None or found.shape != shape:
            raise DoriError(f"{self.path} holds no {name!r} of shape {shape}; {MEND}")
        return found


def _cell(folder: Path, *parts: str) -> _Cell:
    path = folder / "cells" / f"{cell_key(*parts)}.safetensors"
    texts, tensors = read_tensors(path, what="a cell of a locality run", mend=MEND)
    try:
        header = json.loads(texts["dori"])
        if tensors_sha256(tensors) != header["sha256"]:
            raise ValueError("the tensors do not have their own hash")
        return _Cell(path, dict(header["inputs"]), tensors)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DoriError(f"{path} is no whole cell ({error}); {MEND}") from None


def _number(run: Locality, name: str, *, least: int = 0) -> int:
    value = run.settings.get(name)
    if not isinstance(value, int) or value < least:
        raise DoriError(f"the run's settings have no whole number {name!r} from {least}; make the run again")
    return value


# ----------------------------------------------------------------------------------------------------------- attacks


def stored_attacks(folder: Path, memory: str, subjects: Subjects) -> Found:
    """All attacks on a memory as the run left them: start, end, kind and number of the start, similarities.

    `names` and `index` say where each began, `replicates` which bring the image back, and `rows()` where those lie.

    Args:
        folder: of the run, with `locality.json` and `cells`.
        memory: its id.
        subjects: the analysed model and texts, as `testbed_subjects` or `folder_subjects` gives them; the texts of
            other prompts, where attacks began, are not stored.

    Raises:
        DoriError: no finished run, no attacks on this memory, a damaged cell, or subjects of another run.
    """
    run = read_locality(folder / FILE)
    asked = [one.start for one in run.triggers if one.memory == memory]
    if not asked:
        finished = ", ".join(one.id for one in run.subjects) or "none"
        raise DoriError(f"{folder} has no attacks on a memory {memory!r}; give one that it finished ({finished})")
    size, fingerprint = _number(run, "chunk", least=1), model_fingerprint(subjects.model)
    names, index, parts = list[str](), list[int](), []
    for start in dict.fromkeys(asked):
        begun = _starts(folder, run, memory, start, asked.count(start), subjects)
        for chunk in chunks(len(begun), size):
            end, judged = (_cell(folder, kind, memory, start, str(chunk.start)) for kind in ("triggers", "judged"))
            parts.append(_attacks(run, end, judged, begun.take(chunk), fingerprint))
            names += [start] * len(chunk)
            index += chunk
    starts, y, similar = (torch.cat([getattr(part, name) for part in parts]) for name in ("starts", "ends", "similar"))
    replicates = replicating(similar, y, run.threshold)
    return Found(starts, y, tuple(names), tuple(index), similar, replicates, {"parts": [part.made for part in parts]})


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A chunk of attacks, with the hash by which further cells name it."""

    starts: Tensor
    ends: Tensor
    similar: Tensor
    made: str


def _attacks(run: Locality, end: _Cell, judged: _Cell, begun: Source, fingerprint: str) -> _Part:
    """What two cells hold, if they belong together and to these starts."""
    made = canonical_sha256({name: value for name, value in end.inputs.items() if name != "model"})
    for cell in (end, judged):
        cell.check("model", fingerprint, MODEL)
    end.check("starts", begun.sha256, STARTS)
    judged.check("source", made, ENDS)
    ends, similar = end.tensor("end", *begun.y.shape), judged.tensor("similarity", len(begun), _number(run, "seeds"))
    return _Part(begun.y, ends, similar, made)


def _starts(folder: Path, run: Locality, memory: str, start: str, count: int, subjects: Subjects) -> Source:
    """Where the attacks from one kind of start began."""
    model = subjects.model
    if start == "prompt":
        return encoded(model, [str(one.text) for one in run.subjects if one.id == memory])
    if start == "gaussian":
        return numbered_starts(model, _number(run, "seed"), range(count))
    cell, size = _cell(folder, "triggers", memory, start, "0"), min(count, _number(run, "chunk", least=1))
    taken = {case.memory.text for case in subjects.memories}
    texts = [text for text in dict.fromkeys(subjects.ordinary) if text not in taken]
    for first in range(len(texts) - count + 1):  # consecutive ones; which, their hash tells
        chosen = texts[first : first + count]
        if Source(torch.zeros(count, 0), {"texts": chosen}).take(range(size)).sha256 == cell.inputs.get("starts"):
            return encoded(model, chosen)
    raise DoriError(f"no {count} ordinary prompts of these subjects are those where {cell.path} began; {SUBJECTS}")


# ------------------------------------------------------------------------------------------------------------- masks


def stored_masks(
    folder: Path, memory: str, attacks: Found, method: str, model: StableDiffusion, *, noise: int = 0
) -> Masks:
    """Masks of a memory's triggers by one method: of `attacks.spread(set_size)`, in that order.

    `set_size` stands in the settings of `locality.json`.

    Args:
        folder: of the run, with `locality.json` and `cells`.
        memory: its id.
        attacks: its `stored_attacks`.
        method: as the page names it, "NeMo" or "Wanda 10 %".
        model: the analysed model.
        noise: 0 for the noise that all masks of the run met; 1, 2, ... for those under which the first `ceiling`
            triggers' masks were made again.

    Raises:
        DoriError: no finished run, no masks by this method or under this noise, a damaged cell, another run's model
            or attacks.
    """
    run = read_locality(folder / FILE)
    methods = list(dict.fromkeys(one.method for one in run.overlaps if one.memory == memory))
    rows, repeated = attacks.spread(_number(run, "set_size")), _number(run, "ceiling_seeds")
    if method not in methods or not 0 <= noise < max(1, repeated):
        raise DoriError(
            f"{folder} has no masks of {memory!r} by {method!r} under noise {noise}; it has them by "
            f"{', '.join(methods) or 'no method'} under noises 0 to {max(0, repeated - 1)}"
        )
    fingerprint, whole, parts = model_fingerprint(model), attacks.take(rows), []
    cells = [(chunk, str(chunk.start), "0") for chunk in chunks(len(rows), _number(run, "chunk", least=1))]
    if noise:
        whole = attacks.take(rows[: _number(run, "ceiling")])
        cells = [(range(len(whole)), "ceiling", str(noise))]
    for chunk, *place in cells:
        cell = _cell(folder, "masks", memory, method, *place)
        cell.check("model", fingerprint, MODEL)
        cell.check("source", (whole if noise else whole.take(chunk)).sha256, ENDS)
        parts.append(_masks(cell, method, len(chunk), model))
    return concatenated(parts)


def _masks(cell: _Cell, method: str, count: int, model: StableDiffusion) -> Masks:
    """What one cell holds, a bit a weight, or of NeMo a bit a row."""
    weights, found = dict(model.unet.named_parameters()), {}
    for name in (name for name in cell.tensors if name in weights):
        shape = mask_shape(method, weights[name])
        found[name] = unpacked(cell.tensor(name, count, math.ceil(shape.numel() / 8)).to(torch.uint8), shape)
    facts = cell.tensor("facts", count, len(FACTS)) if method == NEMO else torch.zeros(0, len(FACTS))
    return Masks(method, found, facts)
