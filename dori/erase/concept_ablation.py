"""Concept Ablation, memorization mode: the prompt learns to draw what an anchor draws.

Source: Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models" (ICCV 2023), field.md 6.3:

    L = |eps(x_t, anchor) - eps_theta(x_t, target)|^2 + prior weight L_DM(retain)     (`model`)
    L = |eps - eps_theta(x_t, target)|^2 + ...                                        (`noise`)

x_t noised anchor images, eps(., .) the frozen model. Full weights, 400 steps of batch 2, prior weight 1; 5e-7 is a base
rate, which the published scripts multiply by the rows of a batch. The paper's anchors are paraphrases by a language
model, filtered by similarity; here they need none: the anchor images are the model's own samples that do not replicate
(the surrogates), the anchor prompt is the longest of half the prompt, a quarter and nothing from which the model draws
no memory.

Trap: with the frozen model's prediction under the *memorized* prompt as target nothing would change, since that
prediction is the memory; the anchor prompt must not replicate either.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from dori.cost import Rows
from dori.erase.course import Course, origin
from dori.erase.delta import WeightDelta, making
from dori.erase.ordinary import beside_ordinary
from dori.erase.pairs import Forget, Pairs, Work, even_rows, noised, prediction_losses, step_generator, surrogate_pairs
from dori.erase.tuning import Tuner, tuning
from dori.model.stable_diffusion import StableDiffusion


@dataclass(frozen=True, slots=True)
class ConceptAblation:
    """Concept Ablation for memorized images.

    Args:
        steps: updates.
        batch: anchor rows in each, and as many ordinary ones.
        prior_weight: of L_DM on ordinary pairs.
        target: the frozen model's prediction under the anchor prompt (`model`), or the noise itself (`noise`).
        tuner: how weights move.
    """

    needs_surrogates: ClassVar[bool] = True
    steps: int = 400
    batch: int = 2
    prior_weight: float = 1.0
    target: Literal["model", "noise"] = "model"
    tuner: Tuner = field(default_factory=lambda: Tuner(learning_rate=1e-6))

    def rows(self, memories: int) -> Rows:
        """So many U-Net rows."""
        rows = self.steps * self.batch
        return Rows(rows * (self.target == "model"), trained=rows * (1 + (self.prior_weight != 0)))

    def __call__(
        self, model: StableDiffusion, memories: Forget, retain: Pairs, *, seed: int, work: Work | None = None
    ) -> WeightDelta:
        """The edit.

        Raises:
            CannotErase: a memory has no text, no surrogate or, with `model` as the target, no anchor.
        """
        memories.need_texts("concept ablation")
        memories.need_surrogates("concept ablation")
        anchors = memories.need_anchors("concept ablation") if self.target == "model" else []
        work, before = work or Work(), model.rows
        rows, generator = self.steps * self.batch, step_generator("concept ablation", seed, 0)
        which = even_rows(len(memories), rows, generator)
        batch = noised(model, *surrogate_pairs(memories, memories.embeddings, which, generator), generator)
        noisy, targets = model.add_noise(batch.latents, batch.noise, batch.timestep), batch.noise
        if self.target == "model":  # drawn beforehand, so that no second model is kept
            asked = model.encode(anchors).cpu()[which].to(batch.embeddings)
            with torch.no_grad():
                targets = torch.cat(
                    [
                        model.predict_noise(noisy[part], batch.timestep[part], asked[part])
                        for part in torch.arange(rows).split(self.tuner.rows_per_call)
                    ]
                )
        drawn, parts = model.rows - before, torch.arange(rows, device=model.device).split(self.batch)
        with tuning(model, self.tuner, seed=seed, processes=work.processes) as tuned:
            course = Course(tuned, self.steps, work, origin(self, memories, retain, seed))
            for step in course:
                part = parts[step]
                errors = prediction_losses(
                    model, noisy[part], batch.timestep[part], batch.embeddings[part], targets[part]
                )
                gradient, loss = tuned.gradient(errors, len(part))
                tuned.update(
                    beside_ordinary(
                        tuned,
                        gradient,
                        retain,
                        rows=self.batch,
                        weight=self.prior_weight,
                        generator=step_generator("prior", seed, step),
                    )
                )
                course.log.append(loss)
            made = making(self, seed=seed, rows=drawn + course.rows, updates=tuned.steps, log=course.log)
            return tuned.edit("concept ablation", made)
