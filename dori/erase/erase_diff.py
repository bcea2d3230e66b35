"""EraseDiff: keep the ordinary loss low while the memories' prompts learn to predict uniform noise.

Source: Wu, Le, Hayat and Harandi, "EraseDiff: Erasing Data Influence in Diffusion Models" (2024), solved by the
first-order bilevel rule of BOME: with g_r the gradient on ordinary data and g_f that of
f = E |u - eps_theta(z_t, t, y)|^2 on the memories, u uniform in [0, 1),

    g = g_r + lambda g_f,   lambda = max(0, eta - <g_r, g_f> / |g_f|^2)     (`bome`: then <g, g_f> >= eta |g_f|^2)
                            lambda = max(0, eta - cos(g_r, g_f))            (`released`, the published code)

Traps: the published code also takes K inner steps on f and goes back; the value that they reach enters as a constant,
so they change no gradient (only Adam's state), and are left out here. Its pixel-space script also noises the images
with the uniform noise itself; here as in the paper the images are noised normally and only the target is uniform.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dori.cost import Rows
from dori.erase.course import Course, origin
from dori.erase.delta import WeightDelta, making
from dori.erase.pairs import (
    Forget,
    Pairs,
    Work,
    denoising_losses,
    memory_batch,
    ordinary_batch,
    prediction_losses,
    step_generator,
)
from dori.erase.tuning import Tuner, tuning
from dori.model.stable_diffusion import StableDiffusion

Rule = Literal["bome", "released"]


def balance(retain: Sequence[Tensor], forget: Sequence[Tensor], *, eta: float, rule: Rule) -> float:
    """Lambda of the module's formula, for gradients given as lists of tensors of equal shapes."""
    inner, r, f = (
        sum(float((a.double() * b.double()).sum()) for a, b in zip(x, y, strict=True))
        for x, y in ((retain, forget), (retain, retain), (forget, forget))
    )
    if f == 0:
        return 0.0
    return max(0.0, eta - (inner / f if rule == "bome" else inner / (r * f) ** 0.5 if r else 0.0))


@dataclass(frozen=True, slots=True)
class EraseDiff:
    """EraseDiff.

    Args:
        steps: updates.
        batch: ordinary rows in each, and as many rows of memories.
        eta: how much the memories' loss must fall at least.
        rule: how lambda is found.
        tuner: how weights move.
    """

    needs_surrogates: ClassVar[bool] = False
    steps: int = 35
    batch: int = 16
    eta: float = 0.1
    rule: Rule = "bome"
    tuner: Tuner = field(default_factory=Tuner)

    def rows(self, memories: int) -> Rows:
        """So many U-Net rows."""
        return Rows(trained=2 * self.steps * self.batch)

    def __call__(
        self, model: StableDiffusion, memories: Forget, retain: Pairs, *, seed: int, work: Work | None = None
    ) -> WeightDelta:
        """The edit."""
        work = work or Work()
        with tuning(model, self.tuner, seed=seed, processes=work.processes) as tuned:
            course = Course(tuned, self.steps, work, origin(self, memories, retain, seed))
            for step in course:
                generator = step_generator("erase diff", seed, step)
                ordinary = ordinary_batch(model, retain, self.batch, generator)
                keep, loss = tuned.gradient(denoising_losses(model, ordinary), len(ordinary))
                batch = memory_batch(model, memories, self.batch, generator)
                uniform = torch.rand(batch.noise.shape, generator=generator).to(batch.noise)
                noisy = model.add_noise(batch.latents, batch.noise, batch.timestep)
                forget, forgotten = tuned.gradient(
                    prediction_losses(model, noisy, batch.timestep, batch.embeddings, uniform), len(batch)
                )
                weight = balance(keep, forget, eta=self.eta, rule=self.rule)
                tuned.update([k + weight * f for k, f in zip(keep, forget, strict=True)])
                course.log.append({"retain": loss, "forget": forgotten, "lambda": weight})
            made = making(self, seed=seed, rows=course.rows, updates=tuned.steps, log=course.log)
            return tuned.edit("EraseDiff", made)
