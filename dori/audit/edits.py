"""The edits of an audit, each computed once and kept: joint, per memory, and random controls of equal size."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from dori.audit.plan import Plan
from dori.edit import Edit, WeightMask, no_edit, union
from dori.findings import EditInfo
from dori.mitigate.nemo import Nemo, NeMoCalibration
from dori.mitigate.random_mask import random_neurons, random_weights
from dori.mitigate.wanda import Wanda, mask_from_norms
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run, cell_key
from dori.sampling import named_seed


@dataclass(frozen=True, slots=True)
class Names:
    """Names of an audit's edits, known before any is computed.

    Args:
        joint: one edit for all memories, "none" first; attacked.
        asked_only: joint edits that are asked by prompt alone.
        own: methods that give each memory an edit of its own.
    """

    joint: tuple[str, ...]
    asked_only: tuple[str, ...]
    own: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """All edits of an audit; their names are those of `edit_names`.

    Args:
        joint: one edit for all memories, attacked or not, by name, "none" first.
        own: method name to memory id to the edit of that memory alone.
        rows: U-Net rows that all of them cost, whenever they were computed.
    """

    joint: dict[str, Edit]
    own: dict[str, dict[str, WeightMask]]
    rows: int

    def infos(self) -> tuple[EditInfo, ...]:
        """One record a joint edit, then one for all own edits of a method."""
        joint = [
            EditInfo(name, "" if name == "none" else "joint", edit.size, edit.details)
            for name, edit in self.joint.items()
        ]
        own = []
        for name, table in self.own.items():
            sizes = {memory: edit.size for memory, edit in table.items()}
            own.append(EditInfo(name, "own", median_low(sizes.values()), {"sizes": sizes}))
        return (*joint, *own)

    def save(self, folder: Path, *, but: Collection[str]) -> None:
        """Write every edit as `<name>.safetensors` or `<name>.<memory>.safetensors`, except those named in `but`.

        Raises:
            DoriError: no space left, or the place cannot be written.
        """
        for name, edit in self.joint.items():
            if name not in but:
                edit.save(folder / f"{cell_key(name)}.safetensors")
        for name, table in self.own.items():
            for memory, own in table.items():
                own.save(folder / f"{cell_key(name, memory)}.safetensors")


@dataclass(frozen=True, slots=True)
class _Cells:
    """The cells of the edits of one model, and the U-Net rows that each cost when it was computed.

    The rows lie in the cells, so that a resumed audit tells the same cost as an undisturbed one.
    """

    run: Run
    model: StableDiffusion
    base: Mapping[str, object]
    rows: dict[str, int] = field(default_factory=dict)

    def tensors(
        self, key: str, inputs: Mapping[str, object], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """As `Run.once_tensors`, counted."""

        def counted() -> dict[str, Tensor]:
            before = self.model.rows
            tensors = compute()
            return tensors | {"rows": torch.tensor(self.model.rows - before)}

        tensors = self.run.once_tensors(key, {**self.base, **inputs}, counted)
        self.rows[key] = int(tensors.pop("rows"))
        return tensors

    def edit(self, key: str, inputs: Mapping[str, object], make: Callable[[], WeightMask]) -> WeightMask:
        """An edit as a cell: masks as tensors, name and details as one JSON text in bytes."""

        def compute() -> dict[str, Tensor]:
            edit = make()
            masks = {f"mask.{name}": mask.to(torch.uint8) for name, mask in edit.masks.items()}
            return masks | {"header": _as_bytes({"name": edit.name, "details": edit.details})}

        tensors = self.tensors(key, inputs, compute)
        header = _from_bytes(tensors.pop("header"))
        return WeightMask(
            header["name"],
            {name.removeprefix("mask."): mask.bool() for name, mask in tensors.items()},
            header["details"],
        )


def _as_bytes(data: Mapping[str, object]) -> Tensor:
    text = json.dumps(data, sort_keys=True, allow_nan=False)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> dict[str, Any]:
    return json.loads(bytes(data.tolist()))


def wanda_name(wanda: Wanda) -> str:
    """How tables name a Wanda setting, such as "Wanda 10 %" or "Wanda 50 % (plain)"."""
    differs = [
        *(["plain"] if wanda.selection == "top" else []),
        *(["values"] if wanda.site == "attention_value" else []),
        *(["+".join(wanda.places)] if set(wanda.places) != {"down", "mid"} else []),
    ]
    return _with(f"Wanda {100 * wanda.sparsity:g} %", differs)


def nemo_name(nemo: Nemo) -> str:
    """How tables name a NeMo setting, such as "NeMo (tau -2 std, unrefined)"."""
    differs = [
        *(["as released"] if nemo.variant == "as_released" else []),
        *([f"tau {nemo.tau_stds:+g} std"] if nemo.tau_stds != 1 else []),
        *(["unrefined"] if nemo.max_refinement_passes == 0 else []),
    ]
    return _with("NeMo", differs)


def _with(name: str, differs: Sequence[str]) -> str:
    return f"{name} ({', '.join(differs)})" if differs else name


def edit_names(plan: Plan, *, prompted: int, given: Sequence[str] = ()) -> Names:
    """The names of all edits that `make_edits` will return for so many memories with a prompt."""
    nemo = [nemo_name(plan.nemo)] if plan.nemo is not None and prompted else []
    wandas = [wanda_name(wanda) for wanda in plan.wandas] if prompted else []
    randoms = ["random neurons"] * len(nemo) + ["random weights"] * bool(wandas)
    joint, asked = ["none", *nemo, *wandas, *given], [wanda_name(wanda) for wanda in plan.wanda_sweep if wandas]
    (joint if plan.attack_random else asked).extend(randoms)
    return Names(tuple(joint), tuple(asked), (*nemo, *(wandas[:1] if plan.starts.own else [])))


def edit_cells(model: StableDiffusion, plan: Plan, ids: Sequence[str], calibration: int) -> dict[str, int]:
    """Every cell that `make_edits` will need, with its U-Net rows: exact but for NeMo's searches.

    A search judges up to `max_refinement_passes` sets, and rarely more than there are neurons; what a lost bet of its
    batches throws away is not counted.
    """
    costs: dict[str, int] = {}
    if ids and plan.nemo is not None:
        noises = plan.nemo.noises * (1 if plan.nemo.similarity == "paper" else 2)
        neurons = sum(layer.out_features for layer in model.layers("attention_value", plan.nemo.places).values())
        costs["nemo-calibration"] = calibration * noises
        costs |= {_nemo_key(one): noises * (2 + min(plan.nemo.max_refinement_passes, neurons)) for one in ids}
    if ids and plan.wandas:
        for wanda in (*plan.wandas, *plan.wanda_sweep):
            costs |= dict.fromkeys(_wanda_keys(wanda), 2 * len(ids) * wanda.counted_steps)
        if plan.starts.own:
            first = plan.wandas[0]
            costs |= {_wanda_own_key(one): 2 * len(_wanda_keys(first)) * first.counted_steps for one in ids}
    return costs


def _nemo_key(memory: str) -> str:
    return cell_key("nemo", memory)


def _wanda_own_key(memory: str) -> str:
    return cell_key("wanda-own", memory)


def _trajectory(wanda: Wanda) -> Wanda:
    """The settings that decide about the column norms: others share the cells."""
    return replace(wanda, sparsity=1.0, at_least_one=True, selection="top")


def _wanda_keys(wanda: Wanda) -> list[str]:
    """The cells of the column norms: of the prompts, and of empty prompts where those are compared."""
    key = f"wanda.{hashlib.sha256(repr(_trajectory(wanda)).encode()).hexdigest()[:8]}"
    return [f"{key}.target", *([f"{key}.empty"] if wanda.selection == "top_and_above_base" else [])]


def _nemo(
    cells: _Cells, plan: Plan, nemo: Nemo, prompts: Mapping[str, str], ordinary: Sequence[str]
) -> dict[str, WeightMask]:
    """NeMo's edit of each memory."""
    model, seed, name = cells.model, named_seed("nemo", plan.seed), nemo_name(nemo)
    inputs: dict[str, object] = {"nemo": nemo, "seed": seed, "ordinary": list(ordinary)}

    def calibrate() -> dict[str, Tensor]:
        found = nemo.calibrate(model, model.encode(ordinary), seed=seed)
        return found.tensors() | {"details": _as_bytes(found.details)}

    stored = cells.tensors("nemo-calibration", inputs, calibrate)
    details = _from_bytes(stored.pop("details"))
    calibration = NeMoCalibration.from_tensors(stored, details)

    def make(text: str) -> WeightMask:
        return replace(nemo(model, model.encode([text]), calibration, seed=seed), name=name)

    return {
        memory: cells.edit(_nemo_key(memory), inputs | {"text": text}, partial(make, text))
        for memory, text in prompts.items()
    }


def _wanda_own(cells: _Cells, plan: Plan, prompts: Mapping[str, str]) -> dict[str, WeightMask]:
    """The first Wanda setting, for each memory alone."""
    model, seed, wanda = cells.model, named_seed("wanda", plan.seed), plan.wandas[0]

    def make(text: str) -> WeightMask:
        return replace(wanda(model, model.encode([text]), seed=seed), name=wanda_name(wanda))

    return {
        memory: cells.edit(_wanda_own_key(memory), {"wanda": wanda, "seed": seed, "text": text}, partial(make, text))
        for memory, text in prompts.items()
    }


def _wandas(cells: _Cells, plan: Plan, texts: Sequence[str]) -> list[WeightMask]:
    """All Wanda settings, jointly for all memories; settings that differ in sparsity alone share a trajectory."""
    model, seed, found = cells.model, named_seed("wanda", plan.seed), []

    def norms(path: Wanda, prompts: Sequence[str]) -> dict[str, Tensor]:
        return path.column_norms(model, model.encode(prompts), seed=seed)

    for wanda in (*plan.wandas, *plan.wanda_sweep):
        path = _trajectory(wanda)
        inputs: dict[str, object] = {"wanda": path, "seed": seed, "texts": list(texts)}
        both = [
            cells.tensors(key, inputs, partial(norms, path, prompts))
            for key, prompts in zip(_wanda_keys(wanda), (texts, [""] * len(texts)), strict=False)
        ]
        found.append(
            mask_from_norms(
                model,
                both[0],
                both[1] if len(both) > 1 else None,
                sparsity=wanda.sparsity,
                name=wanda_name(wanda),
                at_least_one=wanda.at_least_one,
            )
        )
    return found


def _nemo_union(own: Mapping[str, WeightMask], name: str) -> WeightMask:
    """The joint edit: every neuron that any memory's edit zeroes."""
    sets = {
        memory: {k: v for k, v in edit.details.items() if k not in ("score", "seed")} for memory, edit in own.items()
    }
    first = next(iter(own.values()))
    return union(name, list(own.values()), {"score": first.details["score"], "memories": sets})


def make_edits(
    model: StableDiffusion,
    plan: Plan,
    run: Run,
    *,
    base: Mapping[str, object],
    prompts: Mapping[str, str],
    ordinary: Sequence[str],
    given: Sequence[Edit] = (),
) -> Edits:
    """Compute, or read back, every edit of the plan.

    Args:
        model: the audited model without an edit.
        plan: the plan.
        run: the folder that remembers.
        base: inputs that all cells share (the model's fingerprint).
        prompts: id of each memory that has a prompt, to that prompt.
        ordinary: ordinary prompts for NeMo's calibration.
        given: further joint edits.
    """
    cells, own = _Cells(run, model, base), dict[str, dict[str, WeightMask]]()
    found: dict[str, Edit] = {"none": no_edit()} | {edit.name: edit for edit in given}
    if plan.nemo is not None and prompts:
        name = nemo_name(plan.nemo)
        own[name] = _nemo(cells, plan, plan.nemo, prompts, ordinary)
        joint = _nemo_union(own[name], name)
        found |= {
            name: joint,
            "random neurons": random_neurons(model, joint, seed=named_seed("random neurons", plan.seed)),
        }
    if plan.wandas and prompts:
        wandas = _wandas(cells, plan, list(prompts.values()))
        found |= {edit.name: edit for edit in wandas}
        found["random weights"] = random_weights(model, wandas[0], seed=named_seed("random weights", plan.seed))
        if plan.starts.own:
            own[wanda_name(plan.wandas[0])] = _wanda_own(cells, plan, prompts)
    names = edit_names(plan, prompted=len(prompts), given=[edit.name for edit in given])
    return Edits({name: found[name] for name in (*names.joint, *names.asked_only)}, own, sum(cells.rows.values()))
