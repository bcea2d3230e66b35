"""Weights of one kind from one model in another: which of them an image of the memory hangs on.

Where planting changed the weights most (`dori.locality.truth`) need not be where the memory is: a large change may do
something else, and a small one may be what all the rest needs. Nor do patched activations tell where something is
stored, since a layer passes on what others computed. So the weights themselves change places: those of one kind from
the planted model into its twin (is the memory drawn?), and from the twin into the planted model (is it still drawn?).
Kinds were trained with one another, and another model's may lose any image; the same exchange between two twins, which
hold no memory, tells how much of that there is. Twins judge here; no method sees them. No paper does this for memorized
images.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dori.locality.patching import NONE, SOURCE, TOGETHER
from dori.locality.truth import group_of
from dori.model.stable_diffusion import StableDiffusion
from dori.model.weights import weights_kept
from dori.sampling import sample

CONTROL = "between twins"  # the direction of the control
MERGED = {"cross-attention values": "cross-attention", "cross-attention, other": "cross-attention"} | dict.fromkeys(
    ("feed-forward first linear", "feed-forward second linear"), "feed-forward"
)


def part_of(group: str) -> str:
    """What changes places with a group of `dori.locality.truth.group_of`: all of an attention or of a feed-forward.

    Both linears of a feed-forward were trained on one another, and so were queries, keys, values and output.
    """
    kind, _, place = group.rpartition(", ")
    return f"{MERGED.get(kind, kind)}, {place}"


def weight_sets(model: StableDiffusion) -> dict[str, tuple[str, ...]]:
    """U-Net parameters that change places together, by name: each kind of each place, and each kind of all places.

    "convolutions and rest" are the ResNet blocks and all else: norms, samplers, projections into and out of the
    transformer blocks, the time's embedding and both ends. What all other kinds bring together is 1 less what that kind
    takes: a complement is the same model.
    """
    parts: dict[str, list[str]] = {}
    kinds: dict[str, list[str]] = {}
    for name, _ in model.unet.named_parameters():
        part = part_of(group_of(name))
        parts.setdefault(part, []).append(name)
        kinds.setdefault(f"{TOGETHER}{part.rpartition(', ')[0]}", []).append(name)
    return {name: tuple(members) for name, members in (parts | kinds).items()}


@contextmanager
def transplanted(source: StableDiffusion, target: StableDiffusion, names: Sequence[str]) -> Iterator[None]:
    """Inside the block the target has the source's values in these U-Net parameters; afterwards its own, bit for bit.

    Args:
        source: of the target's shape.
        target: whose weights change.
        names: as in `unet.named_parameters()`.
    """
    with weights_kept(target, names):
        with torch.no_grad():
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
