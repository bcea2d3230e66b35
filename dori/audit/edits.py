"""The edits of an audit, each computed once and kept: joint, per memory, and random controls of equal size."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dori.audit.plan import Plan
from dori.edit import WeightMask, no_edit, union
from dori.mitigate.nemo import Nemo, NeMoCalibration
from dori.mitigate.random_mask import random_neurons, random_weights
from dori.mitigate.wanda import Wanda, mask_from_norms
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run, cell_key, tensors_sha256
from dori.sampling import named_seed


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """All edits of an audit.

    Args:
        joint: one edit for all memories, "none" first.
        asked_only: joint edits that are asked by prompt and not attacked (Wanda's sweep, random edits in quick).
        own: method name to memory id to the edit of that memory alone.
        rows: U-Net rows that all of them cost, whenever they were computed.
    """

    joint: tuple[WeightMask, ...]
    asked_only: tuple[WeightMask, ...]
    own: dict[str, dict[str, WeightMask]]
    rows: int


def fingerprint(edit: WeightMask) -> str:
    """SHA-256 over the masks."""
    return tensors_sha256({key: mask.to(torch.uint8) for key, mask in edit.masks.items()})


@dataclass(frozen=True, slots=True)
class _Cells:
    """The cells of the edits of one model, and the U-Net rows that each cost when it was computed.

    The rows lie in the cells, so that a resumed audit tells the same cost as an undisturbed one.
    """

    run: Run
    model: StableDiffusion
    base: dict[str, object]
    rows: dict[str, int] = field(default_factory=dict)

    def tensors(self, key: str, inputs: dict[str, object],
                compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """As `Run.once_tensors`, counted."""

        def counted() -> dict[str, Tensor]:
            before = self.model.rows
            tensors = compute()
            return tensors | {"rows": torch.tensor(self.model.rows - before)}

        tensors = self.run.once_tensors(key, self.base | inputs, counted)
        self.rows[key] = int(tensors.pop("rows"))
        return tensors

    def edit(self, key: str, inputs: dict[str, object], make: Callable[[], WeightMask]) -> WeightMask:
        """An edit as a cell: masks as tensors, name and details as one JSON text in bytes."""

        def compute() -> dict[str, Tensor]:
            edit = make()
            masks = {f"mask.{name}": mask.to(torch.uint8) for name, mask in edit.masks.items()}
            return masks | {"header": _as_bytes({"name": edit.name, "details": edit.details})}

        tensors = self.tensors(key, inputs, compute)
        header = _from_bytes(tensors.pop("header"))
        return WeightMask(header["name"], {name.removeprefix("mask."): mask.bool() for name, mask in tensors.items()},
                          header["details"])


def _as_bytes(data: Mapping[str, object]) -> Tensor:
    text = json.dumps(data, sort_keys=True, allow_nan=False)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> dict[str, Any]:
    return json.loads(bytes(data.tolist()))


def wanda_name(wanda: Wanda) -> str:
    """How tables name a Wanda setting, such as "Wanda 10 %"."""
    blocks = "" if set(wanda.places) == {"down", "mid"} else f" ({'+'.join(wanda.places)})"
    return f"Wanda {100 * wanda.sparsity:g} %{blocks}"


def _nemo(cells: _Cells, plan: Plan, nemo: Nemo, embeddings: dict[str, Tensor],
          ordinary: Tensor) -> dict[str, WeightMask]:
    """NeMo's edit of each memory."""
    model, seed = cells.model, named_seed("nemo", plan.seed)
    inputs: dict[str, object] = {"nemo": nemo, "seed": seed, "ordinary": tensors_sha256({"o": ordinary})}

    def calibrate() -> dict[str, Tensor]:
        found = nemo.calibrate(model, ordinary, seed=seed)
        return found.tensors() | {"details": _as_bytes(found.details)}

    stored = cells.tensors("nemo-calibration", inputs, calibrate)
    details = _from_bytes(stored.pop("details"))
    calibration = NeMoCalibration.from_tensors(stored, details)
    return {memory: cells.edit(cell_key("nemo", memory), inputs | {"embedding": tensors_sha256({"y": y})},
                               partial(nemo, model, y[None], calibration, seed=seed))
            for memory, y in embeddings.items()}


def _wanda_own(cells: _Cells, plan: Plan, embeddings: dict[str, Tensor]) -> dict[str, WeightMask]:
    """The first Wanda setting, for each memory alone."""
    seed, wanda = named_seed("wanda", plan.seed), plan.wandas[0]

    def make(y: Tensor) -> WeightMask:
        return replace(wanda(cells.model, y[None], seed=seed), name=wanda_name(wanda))

    return {memory: cells.edit(cell_key("wanda-own", memory),
                               {"wanda": wanda, "seed": seed, "embedding": tensors_sha256({"y": y})}, partial(make, y))
            for memory, y in embeddings.items()}


def _wandas(cells: _Cells, plan: Plan, embeddings: Tensor) -> list[WeightMask]:
    """All Wanda settings, jointly for all memories; settings that differ in sparsity alone share a trajectory."""
    model, seed = cells.model, named_seed("wanda", plan.seed)
    empty = model.encode([""]).expand(len(embeddings), -1, -1)
    found = []
    for wanda in (*plan.wandas, *plan.wanda_sweep):
        path = replace(wanda, sparsity=1.0, at_least_one=True, selection="top")
        inputs: dict[str, object] = {"wanda": path, "seed": seed, "embeddings": tensors_sha256({"y": embeddings})}
        key = f"wanda.{hashlib.sha256(repr(path).encode()).hexdigest()[:8]}"
        target = cells.tensors(f"{key}.target", inputs, partial(path.column_norms, model, embeddings, seed=seed))
        base = None
        if wanda.selection == "top_and_above_base":
            base = cells.tensors(f"{key}.empty", inputs, partial(path.column_norms, model, empty, seed=seed))
        found.append(mask_from_norms(model, target, base, sparsity=wanda.sparsity, name=wanda_name(wanda),
                                     at_least_one=wanda.at_least_one))
    return found


def make_edits(model: StableDiffusion, plan: Plan, run: Run, base: dict[str, object], ids: Sequence[str],
               embeddings: Tensor, ordinary: Tensor) -> Edits:
    """Compute, or read back, every edit of the plan.

    Args:
        model: the audited model without an edit.
        plan: the plan.
        run: the folder that remembers.
        base: inputs that all cells share (the model's fingerprint).
        ids: ids of the memories that have a prompt.
        embeddings: their prompt embeddings, shape (n, l, d).
        ordinary: embeddings of ordinary prompts, shape (m, l, d).
    """
    joint, asked, randoms = [no_edit()], list[WeightMask](), list[WeightMask]()
    own: dict[str, dict[str, WeightMask]] = {}
    by_id = dict(zip(ids, embeddings, strict=True))
    cells = _Cells(run, model, base)
    if plan.nemo is not None and by_id:
        own["NeMo"] = _nemo(cells, plan, plan.nemo, by_id, ordinary)
        sets = {memory: {k: v for k, v in edit.details.items() if k not in ("score", "seed")}
                for memory, edit in own["NeMo"].items()}
        first = next(iter(own["NeMo"].values()))
        joint.append(union("NeMo", list(own["NeMo"].values()), {"score": first.details["score"], "memories": sets}))
        randoms.append(random_neurons(model, joint[-1], seed=named_seed("random neurons", plan.seed)))
    if plan.wandas and by_id:
        wandas = _wandas(cells, plan, embeddings)
        joint += wandas[: len(plan.wandas)]
        asked += wandas[len(plan.wandas) :]
        randoms.append(random_weights(model, wandas[0], seed=named_seed("random weights", plan.seed)))
        if plan.attack_own:
            own[wanda_name(plan.wandas[0])] = _wanda_own(cells, plan, by_id)
    if plan.attack_random:
        joint += randoms
    else:
        asked += randoms
    return Edits(tuple(joint), tuple(asked), own, sum(cells.rows.values()))
