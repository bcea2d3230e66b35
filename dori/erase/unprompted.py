"""What a model knows of an image without a prompt: its denoising error under the empty one.

L_Unc (`dori.erase.adversarial`) teaches that under a trigger the noised memory looks as it did without a prompt. That
takes the memory away as far as the model does not know it without one, which is measured here before it is taught.
"""

import torch
from torch import Tensor

from dori.erase.pairs import Forget, Pairs, denoising_errors, noised, step_generator
from dori.model.stable_diffusion import StableDiffusion

NOISES = 8  # of each image


def unprompted_errors(model: StableDiffusion, latents: Tensor, *, seed: int, rows_per_call: int = 64) -> Tensor:
    """Denoising error under the empty prompt, mean over `NOISES` noises and timesteps, shape (n,).

    Args:
        model: the model.
        latents: scaled latents, shape (n, c, h, w).
        seed: of noises and timesteps, which depend on it and on the image's place alone.
        rows_per_call: upper bound on the rows of one U-Net call.
    """
    rows = latents.float().repeat(NOISES, 1, 1, 1)
    null = model.encode([""]).cpu().expand(len(rows), -1, -1)
    batch = noised(model, rows, null, step_generator("without prompt", seed, 1))
    return (
        denoising_errors(model, batch, rows_per_call=rows_per_call).unflatten(0, (NOISES, len(latents))).mean(0).cpu()
    )


def without_prompt(
    model: StableDiffusion, memories: Forget, retain: Pairs, *, seed: int, rows_per_call: int = 64
) -> dict[str, float]:
    """Mean error under the empty prompt of the memories, and of as many ordinary images: what an eraser can know.

    Args:
        model: the model as it was.
        memories: n images.
        retain: ordinary pairs, of which n are drawn.
        seed: of noises and timesteps, the same for both.
        rows_per_call: upper bound on the rows of one U-Net call.
    """
    picked = torch.randint(len(retain), (len(memories),), generator=step_generator("without prompt", seed, 0))
    groups = {"memories": memories.latents, "ordinary": retain.latents[picked]}
    means = {
        name: unprompted_errors(model, latents, seed=seed, rows_per_call=rows_per_call).mean()
        for name, latents in groups.items()
    }
    return {name: round(float(mean), 6) for name, mean in means.items()}
