"""Naive deletion: train on everything but the memories, here ordinary pairs and the prompts' surrogate images.

Source: baseline of Alberti et al. (SISS, ICLR 2025), field.md 6.1: the loss on all but the forget set. Trap: their
scripts take images of the *same prompt* for that (`retain_weight=0` here): nothing then holds other prompts in place.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from dori.cost import Rows
from dori.erase.course import Course, origin
from dori.erase.delta import WeightDelta, making
from dori.erase.ordinary import beside_ordinary
from dori.erase.pairs import Forget, Pairs, Work, denoising_losses, even_rows, noised, step_generator, surrogate_pairs
from dori.erase.tuning import Tuner, tuning
from dori.model.stable_diffusion import StableDiffusion


@dataclass(frozen=True, slots=True)
class NaiveDeletion:
    """Train the prompts on their surrogates and ordinary prompts on ordinary images.

    Args:
        steps: updates.
        batch: surrogate rows in each, and as many ordinary ones.
        retain_weight: of the loss on ordinary pairs.
        tuner: how weights move.
    """

    needs_surrogates: ClassVar[bool] = True
    steps: int = 35
    batch: int = 16
    retain_weight: float = 1.0
    tuner: Tuner = field(default_factory=Tuner)

    def rows(self, memories: int) -> Rows:
        """So many U-Net rows."""
        return Rows(trained=self.steps * self.batch * (1 + (self.retain_weight != 0)))

    def __call__(
        self, model: StableDiffusion, memories: Forget, retain: Pairs, *, seed: int, work: Work | None = None
    ) -> WeightDelta:
        """The edit.

        Raises:
            CannotErase: a memory has no surrogate.
        """
        memories.need_surrogates("naive deletion")
        work = work or Work()
        with tuning(model, self.tuner, seed=seed, processes=work.processes) as tuned:
            course = Course(tuned, self.steps, work, origin(self, memories, retain, seed))
            for step in course:
                generator = step_generator("naive deletion", seed, step)
                which = even_rows(len(memories), self.batch, generator)
                kept = noised(model, *surrogate_pairs(memories, memories.embeddings, which, generator), generator)
                gradient, loss = tuned.gradient(denoising_losses(model, kept), len(kept))
                tuned.update(
                    beside_ordinary(
                        tuned, gradient, retain, rows=self.batch, weight=self.retain_weight, generator=generator
                    )
                )
                course.log.append(loss)
            made = making(self, seed=seed, rows=course.rows, updates=tuned.steps, log=course.log)
            return tuned.edit("naive deletion", made)
