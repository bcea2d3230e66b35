"""Random controls: as many neurons or weights of the same layers as another edit zeroes, drawn at random.

What a mitigation does must be compared with what any pruning of the same size does: NeMo's paper compares with random
neurons (methods.md 2.7), the Wanda code with a random mask (methods.md 3.2).
"""

import torch
from torch import Tensor

from dori.edit import WeightMask
from dori.errors import DoriError
from dori.model.stable_diffusion import StableDiffusion


def _check_fits(model: StableDiffusion, like: WeightMask) -> None:
    shapes = {key: weight.shape for key, weight in model.unet.named_parameters()}
    for key, mask in like.masks.items():
        if shapes.get(key) != mask.shape:
            raise DoriError(
                f"edit {like.name!r} does not fit {model.name}: parameter {key} of shape "
                f"{tuple(mask.shape)} is missing there; compute the edit on this model"
            )


def _drawn(size: int, count: int, generator: torch.Generator) -> Tensor:
    """A uniformly random subset of `count` among `size`, as booleans."""
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[torch.randperm(size, generator=generator)[:count]] = True
    return chosen


def random_neurons(model: StableDiffusion, like: WeightMask, *, seed: int) -> WeightMask:
    """As many whole rows of each parameter as `like` zeroes there.

    Raises:
        DoriError: `like` does not fit the model, or zeroes parts of rows.
    """
    _check_fits(model, like)
    generator, masks = torch.Generator().manual_seed(seed), {}
    for key, mask in sorted(like.masks.items()):  # a loaded edit may list them in another order
        rows = mask.flatten(1)
        if not torch.equal(rows.any(1), rows.all(1)):
            raise DoriError(f"edit {like.name!r} zeroes parts of rows of {key}, not neurons; use random_weights")
        chosen = _drawn(len(rows), int(rows.all(1).sum()), generator)
        masks[key] = chosen[:, None].expand_as(rows).reshape(mask.shape).clone()
    return WeightMask("random neurons", masks, {"like": like.name, "seed": seed})


def random_weights(model: StableDiffusion, like: WeightMask, *, seed: int) -> WeightMask:
    """As many single entries of each parameter as `like` zeroes there.

    Raises:
        DoriError: `like` does not fit the model.
    """
    _check_fits(model, like)
    generator = torch.Generator().manual_seed(seed)
    masks = {
        key: _drawn(mask.numel(), int(mask.sum()), generator).view(mask.shape)
        for key, mask in sorted(like.masks.items())
    }
    return WeightMask("random weights", masks, {"like": like.name, "seed": seed})
