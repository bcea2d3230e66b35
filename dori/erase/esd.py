"""ESD: teach the prompt the opposite of what it says.

Source: Gandikota et al., "Erasing Concepts from Diffusion Models" (ICCV 2023), field.md 6.2:

    L = |eps_theta'(x_t, c) - [eps(x_t, c) - eta (eps(x_t, c) - eps(x_t, null))]|^2,

x_t partial samples, eps the frozen model. Now eta 2 (paper 1), rate 5e-5 (old 1e-5), 200 iterations (old 1000), samples
of guidance 3; esd-x moves cross-attention, esd-u the rest. For one image, c is its prompt.

Traps: the README's name for the cross-attention variant selects no parameter at all (here a part that matches nothing
is refused); the partial samples here come from the frozen model, all drawn beforehand, so that no second model is kept.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dori.cost import Rows
from dori.erase.course import Course, origin
from dori.erase.delta import WeightDelta, making
from dori.erase.pairs import Forget, Pairs, Work, even_rows, noised, prediction_losses, step_generator
from dori.erase.tuning import Tuner, tuning
from dori.model.stable_diffusion import StableDiffusion
from dori.sampling import guided_step


@torch.no_grad()
def partial_samples(
    model: StableDiffusion,
    embeddings: Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    guidance_scale: float,
    rows_per_call: int,
) -> tuple[Tensor, Tensor]:
    """Guided DDIM samples, each stopped before a step drawn at random: x_t (b, c, h, w) and t (b,)."""
    stops = torch.randint(steps, (len(embeddings),), generator=generator)
    noise = torch.randn((len(embeddings), *model.latent_shape), generator=generator).to(model.device)
    null, found, times = model.encode([""]), [], []
    per_call = max(1, rows_per_call // 2)
    for x, y, stop in zip(noise.split(per_call), embeddings.split(per_call), stops.split(per_call), strict=True):
        scheduler = model.ddim(steps)
        context = torch.cat([null.expand(len(y), -1, -1), y.to(null)])
        x, kept = x * scheduler.init_noise_sigma, torch.zeros_like(x)
        for index, t in enumerate(scheduler.timesteps):
            kept = torch.where((stop == index).to(x.device)[:, None, None, None], x, kept)
            if index == int(stop.max()):
                break
            x = guided_step(model, scheduler, x, t, context, guidance_scale)
        found.append(kept)
        times.append(scheduler.timesteps.cpu()[stop])
    return torch.cat(found), torch.cat(times).to(model.device)


@torch.no_grad()
def negative_targets(
    model: StableDiffusion, noisy: Tensor, timestep: Tensor, embeddings: Tensor, *, eta: float, rows_per_call: int
) -> Tensor:
    """eps(c) - eta (eps(c) - eps(null)) of the model as it is, shape (b, c, h, w)."""
    null, targets = model.encode([""]), []
    per_call = max(1, rows_per_call // 2)
    for x, t, y in zip(noisy.split(per_call), timestep.split(per_call), embeddings.split(per_call), strict=True):
        eps = model.predict_noise(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([null.expand(len(y), -1, -1), y.to(null)])
        )
        unconditional, conditional = eps.chunk(2)
        targets.append(conditional - eta * (conditional - unconditional))
    return torch.cat(targets)


@dataclass(frozen=True, slots=True)
class Esd:
    """ESD for the prompts of memories.

    Args:
        steps: updates.
        batch: rows in each, 1 in the published code.
        eta: strength of the negative guidance.
        source: x_t from partial `samples` of the model, or from the noised `memory` itself.
        sampling_steps: of the partial samples.
        guidance_scale: of the partial samples.
        tuner: how weights move; `part="cross_attention"` is esd-x, `"not_cross_attention"` esd-u.
    """

    needs_surrogates: ClassVar[bool] = False
    steps: int = 200
    batch: int = 1
    eta: float = 2.0
    source: Literal["samples", "memory"] = "samples"
    sampling_steps: int = 50
    guidance_scale: float = 3.0
    tuner: Tuner = field(default_factory=lambda: Tuner(learning_rate=5e-5, part="cross_attention"))

    def rows(self, memories: int) -> Rows:
        """At most so many U-Net rows."""
        rows, sampled = self.steps * self.batch, self.sampling_steps - 1 if self.source == "samples" else 0
        return Rows(2 * rows * (1 + sampled), trained=rows)

    def __call__(
        self, model: StableDiffusion, memories: Forget, retain: Pairs, *, seed: int, work: Work | None = None
    ) -> WeightDelta:
        """The edit; `retain` is not looked at, as published.

        Raises:
            CannotErase: a memory has no text.
        """
        memories.need_texts("ESD")
        work, before, generator = work or Work(), model.rows, step_generator("esd", seed, 0)
        which = even_rows(len(memories), self.steps * self.batch, generator)
        embeddings = memories.embeddings[which].float().to(model.device)
        if self.source == "memory":
            batch = noised(model, memories.latents[which].float(), embeddings, generator)
            noisy, t = model.add_noise(batch.latents, batch.noise, batch.timestep), batch.timestep
        else:
            noisy, t = partial_samples(
                model,
                embeddings,
                generator,
                steps=self.sampling_steps,
                guidance_scale=self.guidance_scale,
                rows_per_call=self.tuner.rows_per_call,
            )
        targets = negative_targets(model, noisy, t, embeddings, eta=self.eta, rows_per_call=self.tuner.rows_per_call)
        drawn, parts = model.rows - before, torch.arange(len(which), device=model.device).split(self.batch)
        with tuning(model, self.tuner, seed=seed, processes=work.processes) as tuned:
            course = Course(tuned, self.steps, work, origin(self, memories, retain, seed))
            for step in course:
                rows = parts[step]
                errors = prediction_losses(model, noisy[rows], t[rows], embeddings[rows], targets[rows])
                gradient, loss = tuned.gradient(errors, len(rows))
                tuned.update(gradient)
                course.log.append(loss)
            made = making(self, seed=seed, rows=drawn + course.rows, updates=tuned.steps, log=course.log)
            return tuned.edit("ESD", made)
