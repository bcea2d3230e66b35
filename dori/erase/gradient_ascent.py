"""NegGrad: climb the denoising loss of the memories.

Source: the variant of that name in the code of SISS (field.md 6.1): minimise -E |eps - eps_theta(z_t, t, y)|^2 over the
forget set. Trap: the loss has no upper bound, so the model is destroyed before it is told to stop; the loss of a model
that predicts nothing is about 1 (unit noise), which is where `stop_above` ends the climb.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from dori.cost import Rows
from dori.erase.course import Course, origin
from dori.erase.delta import WeightDelta, making
from dori.erase.ordinary import beside_ordinary
from dori.erase.pairs import Forget, Pairs, Work, denoising_losses, memory_batch, step_generator
from dori.erase.tuning import Tuner, tuning
from dori.model.stable_diffusion import StableDiffusion


@dataclass(frozen=True, slots=True)
class GradientAscent:
    """Gradient ascent on the memories with their prompts.

    Args:
        steps: updates at most.
        batch: rows in each.
        retain_weight: of L_DM on ordinary pairs beside it; 0 as published.
        stop_above: the climb ends when the memories' loss exceeds this; None never.
        tuner: how weights move.
    """

    needs_surrogates: ClassVar[bool] = False
    steps: int = 35
    batch: int = 16
    retain_weight: float = 0.0
    stop_above: float | None = 1.0
    tuner: Tuner = field(default_factory=Tuner)

    def rows(self, memories: int) -> Rows:
        """At most so many U-Net rows."""
        return Rows(trained=self.steps * self.batch * (1 + (self.retain_weight != 0)))

    def __call__(
        self, model: StableDiffusion, memories: Forget, retain: Pairs, *, seed: int, work: Work | None = None
    ) -> WeightDelta:
        """The edit."""
        work = work or Work()
        with tuning(model, self.tuner, seed=seed, processes=work.processes) as tuned:
            course = Course(tuned, self.steps, work, origin(self, memories, retain, seed))
            for step in course:
                generator = step_generator("gradient ascent", seed, step)
                batch = memory_batch(model, memories, self.batch, generator)
                gradient, loss = tuned.gradient(denoising_losses(model, batch), len(batch))
                course.log.append(loss)
                if self.stop_above is not None and loss > self.stop_above:
                    break
                gradient = [-g for g in gradient]
                tuned.update(
                    beside_ordinary(
                        tuned, gradient, retain, rows=self.batch, weight=self.retain_weight, generator=generator
                    )
                )
            made = making(self, seed=seed, rows=course.rows, updates=tuned.steps, log=course.log)
            return tuned.edit("gradient ascent", made)
