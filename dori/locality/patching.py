"""Activation patching: which layers' activations carry a memory from one model's run into another's.

Two models of one shape draw from the same embedding and the same noise, step by step beside each other. In the patched
run the outputs of some layers are replaced, at every step and in both halves of the guidance, by those of the other
model's own run. Planted into twin asks for sufficiency (does the memory appear?), twin into planted for necessity (does
it vanish?). Much of what is carried is the image, whatever it is: how alike the twin's own image comes out in the
planted model's run, where no memory is carried, is the reference. The method is causal mediation by interchange, as
used for language models; no paper does it for memorized images (methods.md 4 has nothing of the kind).
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from dori.locality.activations import outputs
from dori.model.hooks import hooked
from dori.model.stable_diffusion import EVERYWHERE, StableDiffusion
from dori.sampling import guided_step

PatchSets = dict[str, tuple[str, ...]]
NONE, SOURCE = "none", "source"
TOGETHER = "all "  # begins the names of layers, or weights, of one kind or of several
SUFFICIENT, NECESSARY = "sufficient", "necessary"
LEAST_GAP = 0.2  # of similarity; medians of a few seeds move by a quarter of that


def patch_layers(model: StableDiffusion) -> dict[str, nn.Module]:
    """Every layer that can be patched, of all blocks, by name.

    Value projections, feed-forward second linears, output projections of self-attention, and the second convolutions
    of ResNet blocks. All but the first put out what their branch adds to the residual stream; what stands in the stream
    already is nobody's, so shortcuts, down- and upsamplers are left out: taken from the source they would carry all
    that came before them.
    """
    return _values(model) | _feed_forwards(model) | _self_attentions(model) | _convolutions(model)


def patch_sets(model: StableDiffusion) -> PatchSets:
    """What is patched together: each layer alone that pruning acts on, each kind of layer, and all of them, by name."""
    values, feed_forwards = tuple(_values(model)), tuple(_feed_forwards(model))
    return {name: (name,) for name in values + feed_forwards} | {
        f"{TOGETHER}values": values,
        f"{TOGETHER}feed-forwards": feed_forwards,
        f"{TOGETHER}values and feed-forwards": values + feed_forwards,
        f"{TOGETHER}self-attentions": tuple(_self_attentions(model)),
        f"{TOGETHER}convolutions": tuple(_convolutions(model)),
        f"{TOGETHER}four kinds": tuple(patch_layers(model)),
    }


def _values(model: StableDiffusion) -> dict[str, nn.Linear]:
    return model.layers("attention_value", EVERYWHERE)


def _feed_forwards(model: StableDiffusion) -> dict[str, nn.Linear]:
    return model.layers("feed_forward", EVERYWHERE)


def _self_attentions(model: StableDiffusion) -> dict[str, nn.Module]:
    return {
        f"{name}.attn1.to_out.0": block.attn1.to_out[0]
        for name, block in model.unet.named_modules()
        if isinstance(block, BasicTransformerBlock)
    }


def _convolutions(model: StableDiffusion) -> dict[str, nn.Module]:
    return {
        f"{name}.conv2": block.conv2 for name, block in model.unet.named_modules() if isinstance(block, ResnetBlock2D)
    }


@torch.no_grad()
def patched_samples(
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
    """Latents that the target draws when sets of its layers put out what the source's own run puts out.

    Args:
        source: whose activations are taken.
        target: whose run they are put into; of the same shape.
        embedding: prompt embedding, shape (1, l, d).
        noise: initial noise, shape (s, c, h, w).
        sets: name to the names of the layers that are patched together.
        steps: of the DDIM sampling.
        guidance_scale: likewise.
        null: embedding of the unconditional half, shape (1, l, d); default the source's of the empty prompt.

    Returns:
        Set name to latents (s, c, h, w); "none" is the target's run without a patch, "source" the source's.
    """
    layers, own = patch_layers(source), patch_layers(target)
    names: dict[str, Sequence[str]] = {NONE: ()} | dict(sets)
    halves = (source.encode([""]) if null is None else null, embedding.to(source.device))
    y = torch.cat([half.expand(len(noise), -1, -1) for half in halves[guidance_scale == 1 :]])
    scheduler = source.ddim(steps)
    x_source = noise.to(source.device) * scheduler.init_noise_sigma
    latents = dict.fromkeys(names, x_source)
    for t in scheduler.timesteps:
        with outputs(layers) as seen:
            x_source = guided_step(source, scheduler, x_source, t, y, guidance_scale)
        given = dict(seen)
        for name, members in names.items():
            with hooked({member: own[member] for member in members}, partial(_instead, given)):
                latents[name] = guided_step(target, scheduler, latents[name], t, y, guidance_scale)
    return latents | {SOURCE: x_source}


def _instead(given: Mapping[str, Tensor], layer: str, _inputs: Tensor, output: Tensor) -> Tensor:
    return given[layer].to(output)


def share_of_gap(patched: float, target: float, source: float, direction: str) -> float | None:
    """How much of the way from the unpatched target to the source a patch goes: 0 nothing, 1 all of it.

    None where the planted model (the source of "sufficient", the target of "necessary") draws the memory less than
    `LEAST_GAP` more alike than its twin: then there is nothing to carry.
    """
    gap = source - target
    return (patched - target) / gap if (gap if direction == SUFFICIENT else -gap) >= LEAST_GAP else None
