"""SISS: subtract the memory's loss from that of images to keep, by importance sampling from one mixture.

Source: Alberti et al., "Data Unlearning in Diffusion Models" (ICLR 2025), field.md 6.1 and 12.1. With a the memory, x
an image of the same prompt to keep, m drawn from (1 - lambda) q(.|x) + lambda q(.|a) and eps_.(m) the noise that would
explain m,

    L = E w_x |eps_x(m) - eps_theta(m)|^2 - kappa E w_a |eps_a(m) - eps_theta(m)|^2,
    w_x = q(m|x) / ((1 - lambda) q(m|x) + lambda q(m|a)),   w_a likewise,

where kappa is set by the norms of the two gradients. Settings on SD 1.4: lambda .5, forget gradient of norm 750
(`forget_norm`) or a tenth of the keep gradient's, AdamW 1e-5, decay .01, clip 1, batch 16, 35 steps. A fixed norm
belongs to one network's size and to a loss that is summed over a latent's numbers, as theirs is; losses here are means,
which `forget_norm` allows for. The share is the default.

Traps: the released scripts for Stable Diffusion and CelebA draw t = T - 1 alone (`as_released`); in latent space the
weights are one-hot at nearly all other timesteps (the log says how often), so importance sampling becomes a coin flip
between keeping and forgetting; weights computed without logarithms overflow.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dori.cost import Rows
from dori.erase.course import Course, origin
from dori.erase.delta import WeightDelta, making
from dori.erase.pairs import (
    Batch,
    Forget,
    Pairs,
    Work,
    even_rows,
    noised,
    prediction_losses,
    step_generator,
    surrogate_pairs,
)
from dori.erase.tuning import Tuned, Tuner, tuning
from dori.model.stable_diffusion import StableDiffusion

SATURATED = 1e-3  # a weight this near to 0 or to its largest value


def importance_weights(
    noisy: Tensor, keep: Tensor, forget: Tensor, abar: Tensor, *, mixing: float
) -> tuple[Tensor, Tensor]:
    """w_x and w_a, shape (b,), in float64 and by logarithms.

    Args:
        noisy: m, shape (b, c, h, w).
        keep: x, same shape.
        forget: a, same shape.
        abar: shape (b,).
        mixing: lambda in (0, 1).
    """
    m, x, a = noisy.double(), keep.double(), forget.double()
    signal, spread = abar.double().sqrt()[:, None, None, None], 2 * (1 - abar.double())
    log_x = -(m - signal * x).square().flatten(1).sum(1) / spread
    log_a = -(m - signal * a).square().flatten(1).sum(1) / spread
    ratio = log_a - log_x
    stay, leave = ratio.new_tensor([1 - mixing, mixing]).log()
    w_x = torch.exp(-torch.logaddexp(stay.expand_as(ratio), leave + ratio))
    w_a = torch.exp(-torch.logaddexp(stay - ratio, leave.expand_as(ratio)))
    return w_x, w_a


@dataclass(frozen=True, slots=True)
class Siss:
    """SISS with all timesteps.

    Args:
        steps: updates.
        batch: rows in each.
        mixing: lambda, the share of rows drawn from the memory.
        forget_share: norm of the forget gradient as a share of the keep gradient's.
        forget_norm: a fixed norm instead, of the gradient of the loss summed over a latent; None takes the share.
        timesteps: first and one past the last; None takes all.
        tuner: how weights move.
    """

    needs_surrogates: ClassVar[bool] = True
    steps: int = 35
    batch: int = 16
    mixing: float = 0.5
    forget_share: float = 0.1
    forget_norm: float | None = None
    timesteps: tuple[int, int] | None = None
    tuner: Tuner = field(default_factory=Tuner)

    def rows(self, memories: int) -> Rows:
        """So many U-Net rows."""
        return Rows(trained=2 * self.steps * self.batch)

    def __call__(
        self, model: StableDiffusion, memories: Forget, retain: Pairs, *, seed: int, work: Work | None = None
    ) -> WeightDelta:
        """The edit; the images to keep are the memories' surrogates, and `retain` is not looked at, as published.

        Raises:
            CannotErase: a memory has no surrogate.
        """
        memories.need_surrogates("SISS")
        work = work or Work()
        with tuning(model, self.tuner, seed=seed, processes=work.processes) as tuned:
            course = Course(tuned, self.steps, work, origin(self, memories, retain, seed))
            for step in course:
                course.log.append(self._step(tuned, memories, step_generator("siss", seed, step)))
            name = "SISS" if self.timesteps is None else f"SISS, t from {self.timesteps[0]}"
            made = making(self, seed=seed, rows=course.rows, updates=tuned.steps, log=course.log)
            return tuned.edit(name, made)

    def _step(self, tuned: Tuned, memories: Forget, generator: torch.Generator) -> dict[str, Any]:
        model = tuned.model
        which = even_rows(len(memories), self.batch, generator)
        keep, embeddings = surrogate_pairs(memories, memories.embeddings, which, generator)
        forget = memories.latents[which].float()
        from_memory = torch.rand(len(which), generator=generator) < self.mixing
        source = torch.where(from_memory[:, None, None, None], forget, keep)
        batch = noised(model, source, embeddings, generator, timesteps=self.timesteps)
        keep, forget = keep.to(batch.latents), forget.to(batch.latents)
        noisy = model.add_noise(batch.latents, batch.noise, batch.timestep)
        abar = model.alphas_cumprod[batch.timestep]
        w_x, w_a = importance_weights(noisy, keep, forget, abar, mixing=self.mixing)
        grad_x, loss_x = self._gradient(tuned, batch, noisy, keep, w_x)
        grad_a, loss_a = self._gradient(tuned, batch, noisy, forget, w_a)
        norm_x, norm_a = (sum(float(g.double().square().sum()) for g in grads) ** 0.5 for grads in (grad_x, grad_a))
        fixed = self.forget_norm
        wanted = self.forget_share * norm_x if fixed is None else fixed / keep[0].numel()
        scale = wanted / norm_a if norm_a else 0.0
        tuned.update([x - scale * a for x, a in zip(grad_x, grad_a, strict=True)])
        saturated = (w_a < SATURATED) | (w_x < SATURATED)
        return {"keep": loss_x, "forget": loss_a, "scale": scale, "saturated": float(saturated.float().mean())}

    def _gradient(
        self, tuned: Tuned, batch: Batch, noisy: Tensor, image: Tensor, weight: Tensor
    ) -> tuple[list[Tensor], float]:
        """The gradient of E w |eps_image(m) - eps_theta(m)|^2."""
        abar = tuned.model.alphas_cumprod[batch.timestep].to(noisy.dtype)[:, None, None, None]
        explains = (noisy - abar.sqrt() * image) / (1 - abar).sqrt()
        errors = prediction_losses(tuned.model, noisy, batch.timestep, batch.embeddings, explains)
        weights = weight.to(noisy)
        return tuned.gradient(lambda rows: weights[rows.to(weights.device)] * errors(rows), len(noisy))


def as_released(timesteps: int) -> Siss:
    """SISS as its scripts for Stable Diffusion run: the last of `timesteps` training timesteps alone."""
    return Siss(timesteps=(timesteps - 1, timesteps))
