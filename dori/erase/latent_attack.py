"""The attack on the initial latent: the prompt stays, the noise from which sampling starts is searched.

Source: field.md 8 and 12.2 (Memories of Forgotten Concepts, CVPR 2025; IVO, 2602.00175). Any image can be reached from
*some* latent, so what counts is how likely that latent is under N(0, I). Its log-density depends on the squared norm
alone, which is chi-square with as many degrees of freedom as the latent has numbers: a position near 0 or 1 says that
no sampler would ever start there. Source of the objective: [PROP] |z_0(x_T) - z|^2 through an unrolled DDIM sampler.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from dori.cost import Rows
from dori.model.stable_diffusion import StableDiffusion
from dori.sampling import guided_step, initial_noise


@dataclass(frozen=True, slots=True, eq=False)
class FoundLatents:
    """What the attack found.

    Args:
        latents: initial latents, shape (n, c, h, w).
        losses: mean squared error of z_0 at each step, shape (n, steps).
        positions: of each latent's squared norm in its chi-square distribution, in [0, 1], shape (n,).
    """

    latents: Tensor
    losses: Tensor
    positions: Tensor


def norm_positions(latents: Tensor) -> Tensor:
    """P(|x|^2 <= |found|^2) for x ~ N(0, I), shape (n,): 0.5 is typical, near 0 or 1 is impossible to draw.

    A latent that diverged is as far out as can be: 1.
    """
    squares = latents.detach().cpu().double().flatten(1).square().sum(1)
    return torch.from_numpy(stats.chi2.cdf(squares.nan_to_num(torch.inf).numpy(), latents[0].numel()))


@dataclass(frozen=True, slots=True)
class LatentAttack:
    """Adam on x_T, started from noise, through a short deterministic sampler.

    Args:
        steps: Adam updates.
        learning_rate: Adam's.
        sampling_steps: DDIM steps that are unrolled.
        guidance_scale: classifier-free guidance of these steps; 1 leaves the unconditional half out.
        on_sphere: keep the norm at its typical value sqrt(numbers), so that only likely latents are searched.
        rows_per_call: images attacked at once.
    """

    steps: int = 30
    learning_rate: float = 0.05
    sampling_steps: int = 6
    guidance_scale: float = 1.0
    on_sphere: bool = False
    rows_per_call: int = 16

    def rows(self, *, guided: bool) -> Rows:
        """U-Net rows for one image."""
        return Rows(attacked=self.steps * self.sampling_steps * (1 + guided))

    def __call__(
        self, model: StableDiffusion, targets: Tensor, embeddings: Tensor, *, seeds: Sequence[int]
    ) -> FoundLatents:
        """Search an initial latent for each image.

        Args:
            model: the model under attack, edits put on.
            targets: scaled latents of the known images, shape (n, c, h, w).
            embeddings: their prompts, shape (n, l, d).
            seeds: of the starting noises, n; one image's result depends on its own seed, target and prompt alone.
        """
        parts = [
            self._attack(model, z.to(model.device, model.unet.dtype), y.to(model.device), part)
            for z, y, part in zip(
                targets.split(self.rows_per_call),
                embeddings.split(self.rows_per_call),
                [seeds[i : i + self.rows_per_call] for i in range(0, len(seeds), self.rows_per_call)],
                strict=True,
            )
        ]
        latents = torch.cat([latent for latent, _ in parts])
        return FoundLatents(latents, torch.cat([losses for _, losses in parts]), norm_positions(latents))

    def _attack(
        self, model: StableDiffusion, targets: Tensor, embeddings: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        x = initial_noise(model, seeds).to(targets.dtype).requires_grad_()
        adam, losses = torch.optim.Adam([x], lr=self.learning_rate), []
        for _ in range(self.steps):
            loss = (self._sampled(model, x, embeddings) - targets).square().flatten(1).mean(1)
            (x.grad,) = torch.autograd.grad(loss.sum(), x)
            adam.step()
            losses.append(loss.detach().cpu())
            if self.on_sphere:
                with torch.no_grad():
                    norms = x.flatten(1).norm(dim=1)[:, None, None, None]
                    x.mul_(x[0].numel() ** 0.5 / norms)
        return x.detach().cpu(), torch.stack(losses, 1)

    def _sampled(self, model: StableDiffusion, x: Tensor, embeddings: Tensor) -> Tensor:
        """z_0 of the deterministic sampler, differentiable in x_T."""
        scheduler = model.ddim(self.sampling_steps)
        z = x * scheduler.init_noise_sigma
        if self.guidance_scale != 1:
            embeddings = torch.cat([model.encode([""]).to(embeddings).expand(len(z), -1, -1), embeddings])
        for t in scheduler.timesteps:
            z = guided_step(model, scheduler, z, t, embeddings, self.guidance_scale)
        return z
