"""Edits: what a mitigation leaves behind. Data, put on and taken off a model bit for bit.

`WeightMask` zeroes weights (NeMo, Wanda, their random controls). Whatever later methods leave behind, a weight
delta or a defence of the prompt, is another class with the same two methods (the protocol `Edit`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dori.errors import DoriError
from dori.model.stable_diffusion import StableDiffusion


class Edit(Protocol):
    """A reversible change of a model."""

    name: str

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
        parameters = dict(model.unet.named_parameters())
        for key, mask in self.masks.items():
            if key not in parameters or parameters[key].shape != mask.shape:
                raise DoriError(f"edit {self.name!r} does not fit {model.name}: parameter {key} of shape "
                                f"{tuple(mask.shape)} is missing there; compute the edit on this model")
        kept = {key: parameters[key].detach().clone() for key in self.masks}
        try:
            with torch.no_grad():
                for key, mask in self.masks.items():
                    parameters[key].masked_fill_(mask.to(parameters[key].device), 0)
            yield
        finally:
            with torch.no_grad():
                for key, value in kept.items():
                    parameters[key].copy_(value)

    @property
    def size(self) -> int:
        """Number of zeroed weights."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    def save(self, path: Path) -> None:
        """Write masks (one byte a weight) and details as safetensors, atomically."""
        header = {"name": self.name, "details": json.dumps(self.details, sort_keys=True), "kind": "weight_mask"}
        partial = path.with_name(path.name + ".partial")
        save_file({key: mask.to(torch.uint8).contiguous().cpu() for key, mask in self.masks.items()}, partial,
                  metadata=header)
        partial.replace(path)


def load_edit(path: Path) -> WeightMask:
    """Read an edit that `save` wrote.

    Raises:
        DoriError: no such file, or not an edit.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("kind") != "weight_mask":
                raise DoriError(f"{path} is no saved edit; give a file that Dori wrote")
            masks = {key: file.get_tensor(key).bool() for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise DoriError(f"{path} cannot be read as an edit ({error}); give a file that Dori wrote") from None
    return WeightMask(header["name"], masks, json.loads(header["details"]))


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
