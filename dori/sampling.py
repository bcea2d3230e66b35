"""Draw images: the unrolled DDIM loop with classifier-free guidance, one random generator per sample."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from dori.model.stable_diffusion import StableDiffusion

GUIDANCE_SCALE = 3.0  # of the presets: the testbed's copies are closest at 2 to 3, its objects clearer above


@dataclass(frozen=True, slots=True)
class Sampling:
    """How images are drawn: DDIM steps, and the scale of classifier-free guidance (1: none)."""

    steps: int
    guidance_scale: float


PUBLISHED = Sampling(50, 7.0)  # of evaluations on Stable Diffusion (methods.md 1)


def sampling_of(preset: Sampling, *, testbed: bool, steps: int | None, guidance_scale: float | None) -> Sampling:
    """What was asked for; else the preset's, which is the testbed's, or for another model the published one."""
    default = preset if testbed else PUBLISHED
    return Sampling(steps or default.steps, default.guidance_scale if guidance_scale is None else guidance_scale)


def named_seed(*parts: object) -> int:
    """A seed in [0, 2^62) that belongs to what the parts name, such as ("attack", "memory-01").

    Streams of different names do not overlap, so an attack never sees the noise with which it is judged.
    """
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def initial_noise(model: StableDiffusion, seeds: Sequence[int]) -> Tensor:
    """One standard normal latent per seed, shape (len(seeds), c, h, w).

    Drawn on the CPU, so that devices agree; row i depends on seeds[i] alone.
    """
    rows = [torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(model.device)


@torch.no_grad()
def sample(
    model: StableDiffusion,
    embedding: Tensor,
    noise: Tensor,
    *,
    steps: int = 50,
    guidance_scale: float = 7.0,
    null: Tensor | None = None,
    rows_per_call: int = 128,
) -> Tensor:
    """Denoise with deterministic DDIM and classifier-free guidance.

    eps = eps(null) + guidance_scale (eps(prompt) - eps(null)). Both halves go through the network in one call.

    Args:
        model: the model.
        embedding: prompt embeddings, shape (b, l, d).
        noise: initial latents z_T, shape (b, c, h, w).
        steps: number of DDIM steps, 1 to T.
        guidance_scale: 1 leaves the unconditional half out.
        null: embedding of the unconditional half, shape (1, l, d); default the empty prompt's.
        rows_per_call: upper bound on the rows of one U-Net call.

    Returns:
        Latents z_0, shape (b, c, h, w).
    """
    if null is None:
        null = model.encode([""])
    guided = guidance_scale != 1
    scheduler = model.ddim(steps)
    parts = []
    per_part = max(1, rows_per_call // (2 if guided else 1))
    for part, context in zip(noise.split(per_part), embedding.split(per_part), strict=True):
        x = part * scheduler.init_noise_sigma
        if guided:
            context = torch.cat([null.expand(len(context), -1, -1), context])
        for t in scheduler.timesteps:
            x = guided_step(model, scheduler, x, t, context, guidance_scale)
        parts.append(x)
    return torch.cat(parts)


def guided_step(
    model: StableDiffusion, scheduler: DDIMScheduler, x: Tensor, t: Tensor, context: Tensor, guidance_scale: float
) -> Tensor:
    """One DDIM step from x_t, shape (b, c, h, w), differentiable in it.

    Args:
        model: the model.
        scheduler: with its timesteps set.
        x: latents x_t.
        t: the scheduler's timestep.
        context: (2b, l, d), the unconditional embeddings before those of the prompts, and both halves go through the
            network in one call; or (b, l, d), the prompts' alone, and nothing is guided.
        guidance_scale: of the guidance.
    """
    guided = len(context) == 2 * len(x)
    rows = torch.cat([x, x]) if guided else x
    eps = model.predict_noise(rows, t.to(x.device).expand(len(rows)), context)
    if guided:
        unconditional, conditional = eps.chunk(2)
        eps = unconditional + guidance_scale * (conditional - unconditional)
    return scheduler.step(eps, t, x).prev_sample
