"""Ordinary training: the first baseline of every eraser, and the scale of "no damage".

L_DM on ordinary pairs alone (methods.md 5.1, the first term). What a memory loses here it loses to forgetting, without
any eraser; what quality changes here is what any fine-tuning on these pairs costs. Trap: with a small learning rate and
few steps nothing moves, so compare at the eraser's own steps, batch and rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dori.cost import Rows
from dori.erase.course import Course, origin
from dori.erase.delta import WeightDelta, making
from dori.erase.pairs import Forget, Pairs, Work, denoising_losses, ordinary_batch, step_generator
from dori.erase.tuning import Tuned, Tuner, tuning
from dori.model.stable_diffusion import StableDiffusion


def beside_ordinary(
    tuned: Tuned, gradient: Sequence[Tensor], retain: Pairs, *, rows: int, weight: float, generator: torch.Generator
) -> list[Tensor]:
    """An eraser's gradient plus `weight` times that of L_DM on `rows` ordinary pairs; drawn only if it weighs."""
    if not weight:
        return list(gradient)
    batch = ordinary_batch(tuned.model, retain, rows, generator)
    ordinary, _ = tuned.gradient(denoising_losses(tuned.model, batch), len(batch))
    return [g + weight * o for g, o in zip(gradient, ordinary, strict=True)]


@dataclass(frozen=True, slots=True)
class OrdinaryTraining:
    """Go on training on ordinary pairs.

    Args:
        steps: updates.
        batch: pairs in each.
        tuner: how weights move.
    """

    needs_surrogates: ClassVar[bool] = False
    steps: int = 100
    batch: int = 16
    tuner: Tuner = field(default_factory=Tuner)

    def rows(self, memories: int) -> Rows:
        """So many U-Net rows."""
        return Rows(trained=self.steps * self.batch)

    def __call__(
        self, model: StableDiffusion, memories: Forget, retain: Pairs, *, seed: int, work: Work | None = None
    ) -> WeightDelta:
        """The edit; `memories` are not looked at."""
        work = work or Work()
        with tuning(model, self.tuner, seed=seed, processes=work.processes) as tuned:
            course = Course(tuned, self.steps, work, origin(self, memories, retain, seed))
            for step in course:
                batch = ordinary_batch(model, retain, self.batch, step_generator("ordinary", seed, step))
                gradient, loss = tuned.gradient(denoising_losses(model, batch), len(batch))
                tuned.update(gradient)
                course.log.append(loss)
            made = making(self, seed=seed, rows=course.rows, updates=tuned.steps, log=course.log)
            return tuned.edit("ordinary training", made)
