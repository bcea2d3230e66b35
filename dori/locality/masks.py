"""Masks of many embeddings, each computed once: NeMo's neurons and Wanda's weights as boolean tensors by parameter.

NeMo's masks are whole rows of a weight, so a row stands for all of it. Cells hold eight weights a byte.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dori.audit.edits import wanda_name
from dori.edit import WeightMask
from dori.locality.bench import Bench, Source
from dori.locality.costs import Rows, chunks, masking
from dori.locality.plan import Plan
from dori.mitigate.nemo import NeMoCalibration
from dori.mitigate.wanda import Wanda, mask_from_norms
from dori.model.stable_diffusion import StableDiffusion
from dori.run import cell_key
from dori.sampling import named_seed

NEMO = "NeMo"
FACTS = ("neurons", "flagged", "localized", "suppressed", "converged")


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Masks of n embeddings by one method.

    Args:
        method: how tables name it.
        by_layer: parameter name to booleans (n, rows) for NeMo, (n, d, w) for Wanda.
        facts: how NeMo's searches went, shape (n, len(FACTS)); empty for Wanda.
    """

    method: str
    by_layer: dict[str, Tensor]
    facts: Tensor

    def __len__(self) -> int:
        return len(next(iter(self.by_layer.values())))

    def whole(self) -> Tensor:
        """All layers beside each other, booleans (n, all)."""
        return torch.cat([mask.flatten(1) for mask in self.by_layer.values()], 1)

    def take(self, rows: Sequence[int]) -> "Masks":
        """Some of the masks."""
        index = torch.tensor(list(rows), dtype=torch.long)
        return Masks(
            self.method,
            {name: mask[index] for name, mask in self.by_layer.items()},
            self.facts[index] if len(self.facts) else self.facts,
        )

    def edit(self, model: StableDiffusion, row: int) -> WeightMask:
        """One mask as an edit of the model."""
        shapes = dict(model.unet.named_parameters())
        masks = {
            name: (mask[row] if mask.ndim == 3 else mask[row][:, None]).expand(shapes[name].shape).clone()
            for name, mask in self.by_layer.items()
        }
        return WeightMask(self.method, masks)


def concatenated(parts: Sequence[Masks]) -> Masks:
    """Several masks of one method, one after another."""
    names = parts[0].by_layer
    return Masks(
        parts[0].method,
        {name: torch.cat([part.by_layer[name] for part in parts]) for name in names},
        torch.cat([part.facts for part in parts]),
    )


def method_names(plan: Plan) -> tuple[str, ...]:
    """The plan's methods: NeMo first, then the Wanda settings in their order."""
    return (NEMO, *map(wanda_name, plan.wandas))


def calibrate(bench: Bench, ordinary: Source) -> NeMoCalibration:
    """NeMo's statistics and threshold, from ordinary prompts of this model."""
    nemo, seed = bench.plan.nemo, _seed(bench, NEMO, 0)
    inputs: dict[str, object] = {"nemo": nemo, "seed": seed, "ordinary": ordinary.sha256}

    def compute() -> dict[str, Tensor]:
        found = nemo.calibrate(bench.model, ordinary.y, seed=seed)
        return found.tensors() | {"details": torch.tensor(list(json.dumps(found.details).encode()), dtype=torch.uint8)}

    stored = bench.tensors("calibration", inputs, Rows(forward=len(ordinary) * nemo.noises), compute)
    details = json.loads(bytes(stored.pop("details").tolist()))
    return NeMoCalibration.from_tensors(stored, details)


def _seed(bench: Bench, method: str, noise: int) -> int:
    return named_seed("locality masks", method.split(" ")[0], bench.plan.seed, noise)


@dataclass(frozen=True, slots=True, eq=False)
class Maskers:
    """Computes masks by the methods of a plan; NeMo's statistics come from ordinary prompts of this model."""

    bench: Bench
    calibration: NeMoCalibration
    ordinary: Source

    def of(self, owner: str, method: str, embeddings: Source) -> Masks:
        """Masks of embeddings of one owner (a memory or a reference set), chunk by chunk."""
        parts = [
            self._cell(cell_key("masks", owner, method, str(chunk.start), "0"), method, embeddings.take(chunk), 0)
            for chunk in chunks(len(embeddings), self.bench.plan.chunk)
        ]
        return concatenated(parts)

    def again(self, owner: str, method: str, embeddings: Source, noise: int) -> Masks:
        """Masks of the same embeddings under another noise seed."""
        return self._cell(cell_key("masks", owner, method, "ceiling", str(noise)), method, embeddings, noise)

    def _cell(self, key: str, method: str, embeddings: Source, noise: int) -> Masks:
        bench, seed = self.bench, _seed(self.bench, method, noise)
        rows = masking(bench.plan, method, len(embeddings))
        inputs: dict[str, object] = {"seed": seed, "source": embeddings.sha256}
        if method == NEMO:
            inputs |= {"nemo": bench.plan.nemo, "calibration": [self.ordinary.sha256, self.calibration.details["seed"]]}
            found = bench.tensors(key, inputs, rows, lambda: self._nemo(embeddings.y, seed))
        else:
            wanda = bench.plan.wandas[method_names(bench.plan).index(method) - 1]
            found = bench.tensors(key, inputs | {"wanda": wanda}, rows, lambda: self._wanda(embeddings.y, wanda, seed))
        facts = found.pop("facts", torch.zeros(0, len(FACTS)))
        return Masks(method, {name: self._unpacked(method, name, part) for name, part in found.items()}, facts)

    def _unpacked(self, method: str, name: str, packed: Tensor) -> Tensor:
        return unpacked(packed, mask_shape(method, self.bench.model.unet.get_parameter(name)))

    def _nemo(self, embeddings: Tensor, seed: int) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {}
        facts = []
        for y in embeddings:
            edit = self.bench.plan.nemo(self.bench.model, y[None], self.calibration, seed=seed)
            for name, mask in edit.masks.items():
                rows.setdefault(name, []).append(mask.flatten(1).any(1))
            neurons = sum(int(mask.flatten(1).any(1).sum()) for mask in edit.masks.values())
            facts.append([float(neurons), *(float(edit.details[fact]) for fact in FACTS[1:])])
        return {name: _packed(torch.stack(parts)) for name, parts in rows.items()} | {"facts": torch.tensor(facts)}

    def _wanda(self, embeddings: Tensor, wanda: Wanda, seed: int) -> dict[str, Tensor]:
        """Each embedding alone; all meet one noise, and one run of the empty prompt with it."""
        model = self.bench.model
        base = None
        if wanda.selection == "top_and_above_base":
            base = wanda.column_norms(model, model.encode([""]), seed=seed)
        masks = [
            mask_from_norms(
                model,
                wanda.column_norms(model, y[None].to(model.device), seed=seed),
                base,
                sparsity=wanda.sparsity,
                name="",
                at_least_one=wanda.at_least_one,
            ).masks
            for y in embeddings
        ]
        return {name: _packed(torch.stack([mask[name] for mask in masks])) for name in masks[0]}


def mask_shape(method: str, weight: Tensor) -> torch.Size:
    """Of one mask of a weight: NeMo's masks are whole rows."""
    return weight.shape[:1] if method == NEMO else weight.shape


def unpacked(packed: Tensor, shape: torch.Size) -> Tensor:
    """Booleans (n, *shape) of rows of bytes, eight to each."""
    bits = np.unpackbits(packed.numpy(), axis=1, count=shape.numel())
    return torch.from_numpy(bits).bool().unflatten(1, shape)


def _packed(masks: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(masks.flatten(1).cpu().numpy(), axis=1))
