"""A model as others will run it: its U-Net rounded to half precision, or to 8-bit integers.

A removal that rounding undoes was only a small push against weights that still hold the image, so the proof is
repeated on rounded weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dori.model.stable_diffusion import StableDiffusion
from dori.model.weights import weights_kept


def half(weight: Tensor) -> Tensor:
    """The nearest half-precision numbers, in the weight's own type."""
    return weight.half().to(weight.dtype)


def int8(weight: Tensor) -> Tensor:
    """Symmetric 8-bit rounding with one scale for each output channel: w -> s round(w / s), s = max |w| / 127.

    Vectors (biases, norms) stay as they are, as usual in weight-only quantisation.
    """
    if weight.ndim < 2:
        return weight
    scale = weight.flatten(1).abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1).view(-1, *[1] * (weight.ndim - 1))  # a channel of zeros stays one
    return (weight / scale).round().clamp(-127, 127) * scale


ROUNDINGS = {"half": half, "int8": int8}


@contextmanager
def rounded(model: StableDiffusion, to: str) -> Iterator[None]:
    """Round every U-Net weight inside the block; restore them afterwards bit for bit, also after an exception.

    Args:
        model: the model, edits put on.
        to: a name in `ROUNDINGS`.
    """
    with weights_kept(model):
        with torch.no_grad():
            for parameter in model.unet.parameters():
                parameter.copy_(ROUNDINGS[to](parameter))
        yield
