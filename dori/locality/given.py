"""What a notebook gives to the functions of locality: taken as it is if it fits, refused in one sentence if not."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dori.errors import DoriError
from dori.model.stable_diffusion import StableDiffusion

Array = Tensor | NDArray[Any]


def rows(values: Array, name: str, *, least: int = 0, finite: bool = False) -> Tensor:
    """A tensor of shape (n, ...), or a NumPy array as one.

    Args:
        values: what was given.
        name: of the argument, for messages.
        least: smallest n.
        finite: whether every number must be.

    Raises:
        DoriError: something else, too few rows, or a number that is not finite.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf" and values.dtype.itemsize <= 8:
        # Copied only where torch could not take the array itself.
        values = torch.from_numpy(np.require(values, values.dtype.newbyteorder("="), ["C", "W"]))
    if not isinstance(values, Tensor) or values.ndim < 2:
        what = type(values).__name__
        what += f" of shape {tuple(values.shape)}" if isinstance(values, Tensor | np.ndarray) else ""
        raise DoriError(f"{name} is a {what}; give one tensor of shape (n, ...), such as torch.stack makes of a list")
    if len(values) < least:
        raise DoriError(f"{name} holds {len(values)}; give at least {least}")
    if finite and not torch.isfinite(values).all():
        raise DoriError(f"{name} holds a number that is not finite; leave out the rows that diverged")
    return values


def embeddings_of(model: StableDiffusion, values: Array, name: str) -> Tensor:
    """Embeddings that the model reads, shape (n, l, d), n >= 1.

    Raises:
        DoriError: none, or of another shape.
    """
    found, (tokens, width) = rows(values, name, least=1), model.embedding_shape
    if tuple(found.shape[1:]) != (tokens, width):
        raise DoriError(
            f"{name} have shape {tuple(found.shape)} and {model.name} reads (n, {tokens}, {width}); "
            "encode or attack with this model"
        )
    return found


def booleans(values: Array, name: str) -> Tensor:
    """Booleans of shape (n, ...), a tensor or a NumPy array.

    Raises:
        DoriError: something else.
    """
    found = rows(values, name)
    if found.dtype != torch.bool:
        raise DoriError(f"{name} holds {found.dtype}, not booleans; give `weights != 0` or the like")
    return found


def alike(first: Tensor, second: Tensor, names: str) -> None:
    """Refuse two tensors that are not row by row of one shape.

    Raises:
        DoriError: their shapes differ.
    """
    if first.shape != second.shape:
        raise DoriError(
            f"{names} have shapes {tuple(first.shape)} and {tuple(second.shape)}; give as many of each, row by row"
        )


def pairs_of(pairs: Array, first: int, second: int) -> Tensor:
    """Which pairs count, booleans (first, second).

    Raises:
        DoriError: no booleans, or of another shape.
    """
    found = booleans(pairs, "pairs")
    if found.shape != (first, second):
        raise DoriError(f"pairs has shape {tuple(found.shape)}; give booleans of shape {first, second}")
    return found


def ascending(steps: Sequence[int]) -> None:
    """Refuse what are not positions on a grid of steps, one after another.

    Raises:
        DoriError: none, or numbers that are not whole, not ascending or below 0.
    """
    whole = all(isinstance(step, Integral) for step in steps)
    if not len(steps) or not whole or list(steps) != sorted(set(steps)) or steps[0] < 0:
        raise DoriError(f"steps is {tuple(steps)}; give whole numbers that ascend from 0 or more, such as (0, 5)")
