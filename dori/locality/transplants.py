"""Weights of one kind from one model in another: which kinds hold a memory, whatever they changed by.

Where planting changed the weights most (`dori.locality.truth`) need not be where the memory is: a large change may do
something else, and a small one may be what all the rest needs. Nor do patched activations tell where something is
stored, since a layer passes on what others computed. So the weights themselves change places: those of one kind from
the planted model into its twin (sufficient?), and from the twin into the planted model (necessary?). Twins judge here;
no method sees them. No paper does this for memorized images.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dori.locality.patching import NONE, SOURCE, TOGETHER
from dori.locality.truth import REST, group_of
from dori.model.stable_diffusion import StableDiffusion
from dori.model.weights import weights_kept
from dori.sampling import sample

BLOCKS = f"{TOGETHER}transformer blocks"


def weight_sets(model: StableDiffusion) -> dict[str, tuple[str, ...]]:
    """U-Net parameters that change places together, by name: each kind of each place, kinds over all places, blocks.

    Kinds and places are those of `dori.locality.truth.group_of`; transformer blocks are all but "convolutions and
    rest", that is, but ResNet blocks, samplers, projections into and out of the blocks, and the time's embedding.
    """
    parts: dict[str, list[str]] = {}
    kinds: dict[str, list[str]] = {}
    for name, _ in model.unet.named_parameters():
        group = group_of(name)
        kind = group.rpartition(", ")[0]
        parts.setdefault(group, []).append(name)
        kinds.setdefault(f"{TOGETHER}{kind}", []).append(name)
        if kind != REST:
            kinds.setdefault(BLOCKS, []).append(name)
    return {name: tuple(members) for name, members in (parts | kinds).items()}


@contextmanager
def transplanted(source: StableDiffusion, target: StableDiffusion, names: Sequence[str]) -> Iterator[None]:
    """Inside the block the target has the source's values in these U-Net parameters; afterwards its own, bit for bit.

    Args:
        source: of the target's shape.
        target: whose weights change.
        names: as in `unet.named_parameters()`.
    """
    with weights_kept(target, names), torch.no_grad():
        for name in names:
            target.unet.get_parameter(name).copy_(source.unet.get_parameter(name))
        yield


def transplanted_samples(
    source: StableDiffusion,
    target: StableDiffusion,
    embedding: Tensor,
    noise: Tensor,
    sets: Mapping[str, Sequence[str]],
    *,
    steps: int,
    guidance_scale: float,
    null: Tensor | None = None,
) -> dict[str, Tensor]:
    """Latents that the target draws with sets of the source's weights; arguments as of `patching.patched_samples`.

    Returns:
        Set name to latents (s, c, h, w); "none" is the target as it is, "source" the source.
    """
    empty, y, x = (one.to(target.device) for one in (source.encode([""]) if null is None else null, embedding, noise))
    y = y.expand(len(noise), -1, -1)

    def drawn(model: StableDiffusion) -> Tensor:
        return sample(model, y, x, steps=steps, guidance_scale=guidance_scale, null=empty)

    latents = {NONE: drawn(target), SOURCE: drawn(source)}
    for name, members in sets.items():
        with transplanted(source, target, members):
            latents[name] = drawn(target)
    return latents
