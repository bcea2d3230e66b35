"""U-Net weights changed for a while: what an edit does to them, put back bit for bit."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dori.errors import DoriError
from dori.model.stable_diffusion import StableDiffusion


@contextmanager
def weights_kept(model: StableDiffusion, names: Iterable[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """Copies of U-Net weights, put back bit for bit when the block ends or raises.

    Args:
        model: whose U-Net.
        names: of the parameters; None keeps all.

    Returns:
        Through `as`: the copies by name, not to be changed.
    """
    parameters = dict(model.unet.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in (parameters if names is None else names)}
    try:
        yield kept
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


def fitting_parameters(
    model: StableDiffusion, edit: str, tensors: Mapping[str, Tensor], *, mend: str
) -> dict[str, nn.Parameter]:
    """The U-Net's parameters by name, once it is known that all tensors of an edit fit.

    Args:
        model: whose U-Net.
        edit: name of the edit, for the error.
        tensors: parameter name to a tensor of its shape.
        mend: what to do where they do not fit.

    Raises:
        DoriError: the model has no such parameter, or one of another shape.
    """
    parameters = dict(model.unet.named_parameters())
    for key, tensor in tensors.items():
        if key not in parameters or parameters[key].shape != tensor.shape:
            raise DoriError(
                f"edit {edit!r} does not fit {model.name}: parameter {key} of shape {tuple(tensor.shape)} "
                f"is missing there; {mend}"
            )
    return parameters
