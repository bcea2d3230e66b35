"""The edits of an audit, each computed once and kept: joint, per memory, and random controls of equal size."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dori.audit.plan import Plan
from dori.edit import WeightMask, no_edit, union
from dori.mitigate.nemo import NeMoCalibration
from dori.mitigate.random_mask import random_neurons, random_weights
from dori.mitigate.wanda import Wanda, mask_from_norms
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run, tensors_sha256
from dori.sampling import named_seed


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """All edits of an audit.

    Args:
        joint: one edit for all memories, "none" first.
        asked_only: joint edits that are asked by prompt and not attacked (Wanda's sweep, random edits in quick).
        own: method name to memory id to the edit of that memory alone.
    """

    joint: tuple[WeightMask, ...]
    asked_only: tuple[WeightMask, ...]
    own: dict[str, dict[str, WeightMask]]


def fingerprint(edit: WeightMask) -> str:
    """SHA-256 over the masks."""
    return tensors_sha256({key: mask.to(torch.uint8) for key, mask in edit.masks.items()})


def _stored(run: Run, key: str, inputs: dict[str, object], make: Callable[[], WeightMask]) -> WeightMask:
    """An edit as a cell: masks as tensors, name and details as one JSON text in bytes."""

    def compute() -> dict[str, Tensor]:
        edit = make()
        text = json.dumps({"name": edit.name, "details": edit.details}, sort_keys=True, allow_nan=False)
        header = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return {f"mask.{name}": mask.to(torch.uint8) for name, mask in edit.masks.items()} | {"header": header}

    tensors = run.once_tensors(key, inputs, compute)
    header = json.loads(bytes(tensors["header"].tolist()).decode())
    masks = {name[5:]: mask.bool() for name, mask in tensors.items() if name.startswith("mask.")}
    return WeightMask(header["name"], masks, header["details"])


def wanda_name(wanda: Wanda) -> str:
    """How tables name a Wanda setting, such as "Wanda 10 %"."""
    blocks = "" if set(wanda.places) == {"down", "mid"} else f" ({'+'.join(wanda.places)})"
    return f"Wanda {100 * wanda.sparsity:g} %{blocks}"


def _nemo(model: StableDiffusion, plan: Plan, run: Run, base: dict[str, object], embeddings: dict[str, Tensor],
          ordinary: Tensor) -> dict[str, WeightMask]:
    """NeMo's edit of each memory."""
    nemo = plan.nemo
    assert nemo is not None
    seed = named_seed("nemo", plan.seed)
    inputs = base | {"nemo": nemo, "seed": seed, "ordinary": tensors_sha256({"o": ordinary})}
    details: dict[str, object] = {}

    def calibrate() -> dict[str, Tensor]:
        found = nemo.calibrate(model, ordinary, seed=seed)
        details.update(found.details)
        text = json.dumps(found.details, sort_keys=True).encode()
        return found.tensors() | {"details": torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    stored = run.once_tensors("nemo.calibration", inputs, calibrate)
    text = bytes(stored.pop("details").tolist()).decode()
    calibration = NeMoCalibration.from_tensors(stored, json.loads(text))
    return {
        memory: _stored(run, f"nemo.{memory}", inputs | {"embedding": tensors_sha256({"y": y})},
                        lambda y=y: nemo(model, y[None], calibration, seed=seed))  # type: ignore[misc]
        for memory, y in embeddings.items()}


def _wanda_own(model: StableDiffusion, plan: Plan, run: Run, base: dict[str, object],
               embeddings: dict[str, Tensor]) -> dict[str, WeightMask]:
    """The first Wanda setting, for each memory alone."""
    seed = named_seed("wanda", plan.seed)
    wanda = plan.wandas[0]
    return {
        memory: _stored(run, f"wanda-own.{memory}",
                        base | {"wanda": wanda, "seed": seed, "embedding": tensors_sha256({"y": y})},
                        lambda y=y: replace(wanda(model, y[None], seed=seed), name=wanda_name(wanda)))  # type: ignore[misc]
        for memory, y in embeddings.items()}


def _wandas(model: StableDiffusion, plan: Plan, run: Run, base: dict[str, object],
            embeddings: Tensor) -> list[WeightMask]:
    """All Wanda settings, jointly for all memories; settings that differ in sparsity alone share a trajectory."""
    seed = named_seed("wanda", plan.seed)
    found = []
    for wanda in (*plan.wandas, *plan.wanda_sweep):
        path = replace(wanda, sparsity=1.0, at_least_one=True)
        inputs = base | {"wanda": path, "seed": seed, "embeddings": tensors_sha256({"y": embeddings})}
        key = f"wanda.{hashlib.sha256(repr(path).encode()).hexdigest()[:8]}"
        target = run.once_tensors(f"{key}.target", inputs,
                                  lambda w=path: w.column_norms(model, embeddings, seed=seed))  # type: ignore[misc]
        empty = model.encode([""]).expand(len(embeddings), -1, -1)
        empty_norms = run.once_tensors(f"{key}.empty", inputs,
                                       lambda w=path: w.column_norms(model, empty, seed=seed))  # type: ignore[misc]
        compared = empty_norms if wanda.selection == "top_and_above_base" else None
        found.append(mask_from_norms(model, target, compared, sparsity=wanda.sparsity, name=wanda_name(wanda),
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
    joint, asked, own = [no_edit()], [], {}
    by_id = dict(zip(ids, embeddings, strict=True))
    randoms = []
    if plan.nemo is not None and by_id:
        own["NeMo"] = _nemo(model, plan, run, base, by_id, ordinary)
        sets = {memory: {k: v for k, v in edit.details.items() if k not in ("score", "seed")}
                for memory, edit in own["NeMo"].items()}
        first = next(iter(own["NeMo"].values()))
        joint.append(union("NeMo", list(own["NeMo"].values()), {"score": first.details["score"], "memories": sets}))
        randoms.append(random_neurons(model, joint[-1], seed=named_seed("random neurons", plan.seed)))
    if plan.wandas and by_id:
        wandas = _wandas(model, plan, run, base, embeddings)
        joint += wandas[: len(plan.wandas)]
        asked += wandas[len(plan.wandas) :]
        randoms.append(random_weights(model, wandas[0], seed=named_seed("random weights", plan.seed)))
        if plan.attack_own:
            own[wanda_name(plan.wandas[0])] = _wanda_own(model, plan, run, base, by_id)
    if plan.attack_random:
        joint += randoms
    else:
        asked += randoms
    return Edits(tuple(joint), tuple(asked), own)
