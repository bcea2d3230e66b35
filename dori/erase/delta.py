"""What an eraser leaves behind: a change of weights, put on and taken off a model bit for bit.

The second kind of edit beside `dori.edit.WeightMask`, with the same methods (the protocol `Edit`).
`dori.edit.load_edit` reads both.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dori.errors import DoriError
from dori.model.stable_diffusion import StableDiffusion
from dori.model.weights import fitting_parameters, weights_kept
from dori.run import tensors_sha256, write_bytes

KIND = "weight_delta"
SLOWER = "take a smaller learning rate (--rate-scale)"  # how a diverged training is mended


class CannotErase(DoriError):
    """An eraser cannot do what is asked of it: its training diverged, or it lacks a text or a surrogate.

    Told apart from a full disk and the like, so that a table goes on with its other erasers.
    """


@dataclass(frozen=True, slots=True, eq=False)
class WeightDelta:
    """A difference to add to U-Net weights.

    Args:
        name: how tables name the edit.
        deltas: parameter name (as in `unet.named_parameters()`) to a float32 tensor of its shape.
        details: JSON-able settings, log and cost of the method that made it, stored beside the tensors.
    """

    name: str
    deltas: Mapping[str, Tensor]
    details: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(self, model: StableDiffusion) -> Iterator[None]:
        """Add the difference inside the block; restore the weights afterwards, also after an exception.

        The sum is taken in float32 (float64 for a float64 model) and rounded to the model's type once.

        Raises:
            DoriError: the model has no such parameter, or one of another shape.
        """
        parameters = fitting_parameters(model, self.name, self.deltas, mend="erase on this model")
        with weights_kept(model, self.deltas) as kept:
            with torch.no_grad():
                for key, delta in self.deltas.items():
                    precise = torch.promote_types(torch.float32, kept[key].dtype)
                    parameters[key].copy_(kept[key].to(precise) + delta.to(kept[key].device, precise))
            yield

    @property
    def size(self) -> int:
        """Number of changed weights."""
        return sum(int(torch.count_nonzero(delta)) for delta in self.deltas.values())

    @property
    def norm(self) -> float:
        """l2 norm of the whole change."""
        return float(sum(delta.double().square().sum() for delta in self.deltas.values())) ** 0.5

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the tensors."""
        return tensors_sha256(dict(self.deltas))

    def save(self, path: Path) -> None:
        """Write differences and details as safetensors, atomically."""
        tensors = {key: delta.contiguous().cpu() for key, delta in self.deltas.items()}
        # One metadata entry: safetensors writes several in an order that changes from run to run.
        header = json.dumps({"kind": KIND, "name": self.name, "details": self.details}, sort_keys=True)
        write_bytes(path, save(tensors, metadata={"edit": header}))


def difference(
    name: str,
    model: StableDiffusion,
    base: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
    details: Mapping[str, Any],
) -> WeightDelta:
    """The edit that leads from some weights to others; weights that did not move are left out.

    Args:
        name: of the edit.
        model: whose names the weights bear; only named in errors.
        base: weights by name.
        changed: the same names, or fewer.
        details: stored with the edit.

    Raises:
        CannotErase: a weight is not finite: the training diverged.
    """
    deltas = {}
    for key, value in changed.items():
        delta = (value.detach().double() - base[key].double()).float().cpu()
        if not torch.isfinite(delta).all():
            raise CannotErase(f"{name} on {model.name} diverged ({key} is not finite); {SLOWER}")
        if delta.any():
            deltas[key] = delta
    return WeightDelta(name, deltas, details)


def making(method: object, *, seed: int, rows: int, updates: int, log: object = ()) -> dict[str, Any]:
    """What an edit remembers of its making, JSON-able.

    Args:
        method: the eraser, a dataclass.
        seed: of the erasure.
        rows: latent rows sent through the U-Net.
        updates: steps of the optimizer.
        log: losses or other figures by step or round.
    """
    settings = json.loads(json.dumps(asdict(method)))  # type: ignore[call-overload]
    made = {"method": type(method).__name__, "settings": settings, "seed": seed}
    return made | {"rows": rows, "updates": updates, "log": log}
