"""Edits: what a mitigation leaves behind. Data, put on and taken off a model bit for bit.

`WeightMask` zeroes weights (NeMo, Wanda, their random controls); `dori.erase.delta.WeightDelta` adds to them. Whatever
later methods leave behind is another class with the same two methods (the protocol `Edit`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from dori.erase.delta import KIND as WEIGHT_DELTA
from dori.erase.delta import WeightDelta
from dori.errors import DoriError
from dori.model.stable_diffusion import StableDiffusion
from dori.model.weights import fitting_parameters, weights_kept
from dori.run import tensors_sha256, write_bytes
from dori.tensor_file import read_tensors

WEIGHT_MASK = "weight_mask"


class Edit(Protocol):
    """A reversible change of a model.

    `name` is how tables name it, `details` are JSON-able settings and scores of the method that made it, `size` is the
    number of weights that it changes, `fingerprint` a SHA-256 over what it does.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def details(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    def applied(self, model: StableDiffusion) -> AbstractContextManager[None]:
        """Put the edit on inside a `with` block; the model is restored bit for bit when the block ends or raises."""

    def save(self, path: Path) -> None:
        """Write the edit as safetensors, atomically."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightMask:
    """A set of U-Net weights to zero.

    Args:
        name: how tables name the edit.
        masks: parameter name (as in `unet.named_parameters()`) to a boolean tensor of its shape; True = zeroed.
        details: JSON-able settings, thresholds and scores of the method that made it, stored beside the masks.
    """

    name: str
    masks: Mapping[str, Tensor]
    details: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(self, model: StableDiffusion) -> Iterator[None]:
        """Zero the masked weights inside the block; restore them afterwards, also after an exception.

        Raises:
            DoriError: the model has no such parameter, or one of another shape.
        """
        parameters = fitting_parameters(model, self.name, self.masks, mend="compute the edit on this model")
        with weights_kept(model, self.masks):
            with torch.no_grad():
                for key, mask in self.masks.items():
                    parameters[key].masked_fill_(mask.to(parameters[key].device), 0)
            yield

    @property
    def size(self) -> int:
        """Number of zeroed weights."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the masks."""
        return tensors_sha256(self._bytes())

    def _bytes(self) -> dict[str, Tensor]:
        return {key: mask.to(torch.uint8).contiguous().cpu() for key, mask in self.masks.items()}

    def save(self, path: Path) -> None:
        """Write masks (one byte a weight) and details as safetensors, atomically.

        Raises:
            DoriError: no space left, or the place cannot be written.
        """
        # One metadata entry: safetensors writes several in an order that changes from run to run.
        header = json.dumps({"kind": WEIGHT_MASK, "name": self.name, "details": self.details}, sort_keys=True)
        write_bytes(path, save(self._bytes(), metadata={"edit": header}))


def load_edit(path: Path) -> WeightMask | WeightDelta:
    """Read an edit that `save` wrote, of either kind.

    Raises:
        DoriError: no such file, or not an edit.
    """
    mend = "give a file that Dori wrote"
    texts, tensors = read_tensors(path, what="an edit", mend=mend)
    try:
        header = json.loads(texts.get("edit", "{}"))
        kind, name, details = header["kind"], str(header["name"]), dict(header["details"])
        if kind not in (WEIGHT_MASK, WEIGHT_DELTA):
            raise ValueError(f"kind {kind!r:.40}")
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ValueError("a number that is not finite")
    except (ValueError, LookupError, TypeError, RuntimeError) as error:  # types without arithmetic, and recursion, too
        raise DoriError(f"{path} cannot be read as an edit ({error}); {mend}") from None
    if kind == WEIGHT_DELTA:
        return WeightDelta(name, tensors, details)
    return WeightMask(name, {key: mask.bool() for key, mask in tensors.items()}, details)


def no_edit() -> WeightMask:
    """The edit that changes nothing."""
    return WeightMask("none", {})


def union(name: str, edits: Sequence[WeightMask], details: Mapping[str, Any] | None = None) -> WeightMask:
    """The joint edit: every weight that any of the edits zeroes."""
    masks: dict[str, Tensor] = {}
    for edit in edits:
        for key, mask in edit.masks.items():
            masks[key] = masks[key] | mask if key in masks else mask.clone()
    return WeightMask(name, masks, details or {})
