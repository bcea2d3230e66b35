"""Evidence during an erasure: does the image come back, from embeddings and noises that nothing was trained on?

The held-out attack draws its noises, starts and generation seeds from streams of its own (`sampling.named_seed`), so
an erasure that only learned its own triggers does not stop early. It judges by the rule of the proof (`decide`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dori.attack.dori import Dori
from dori.audit.judge import Case
from dori.audit.plan import Start
from dori.cost import Rows, drawn
from dori.erase.decide import deciding, limit
from dori.erase.pairs import Forget
from dori.erase.starts import starting_points
from dori.metrics.similarity import Descriptor
from dori.model.stable_diffusion import StableDiffusion
from dori.sampling import GUIDANCE_SCALE, initial_noise, named_seed, sample


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """The judge of an erasure in progress.

    Args:
        descriptor: whose cosine decides.
        cases: the memories.
        sampling_steps: DDIM steps of each image.
        guidance_scale: classifier-free guidance of each image.
        seeds: images drawn for each memory.
        attack: the held-out attack.
        starts: of the held-out attack.
    """

    descriptor: Descriptor
    cases: tuple[Case, ...]
    sampling_steps: int = 25
    guidance_scale: float = GUIDANCE_SCALE
    seeds: int = 2
    attack: Dori = field(default_factory=Dori)
    starts: tuple[Start, ...] = ("prompt", "gaussian")

    @property
    def limits(self) -> Tensor:
        """Of each memory the similarity above which it came back, shape (n,)."""
        return torch.tensor([limit(self.descriptor, case) for case in self.cases])

    def similarities(self, model: StableDiffusion, embeddings: Tensor, which: Sequence[int], *, seed: int) -> Tensor:
        """Median similarity to its memory of what each embedding draws, shape (len(which),).

        Args:
            model: with the weights as they are.
            embeddings: one for each of `which`, shape (len(which), l, d).
            which: indices of memories.
            seed: of the generations.
        """
        if not len(which):
            return torch.zeros(0)
        noise = initial_noise(model, [named_seed("watch", seed, k) for k in range(self.seeds)])
        latents = sample(
            model,
            embeddings.to(model.device).repeat_interleave(self.seeds, 0),
            noise.repeat(len(which), 1, 1, 1),
            steps=self.sampling_steps,
            guidance_scale=self.guidance_scale,
        )
        images = model.to_images(latents).cpu().unflatten(0, (len(which), self.seeds))
        return deciding(self.descriptor, [self.cases[i] for i in which], images).quantile(0.5, dim=1)

    def held_out(self, model: StableDiffusion, memories: Forget, *, seed: int) -> Tensor:
        """The largest similarity that the prompt and the held-out attacks reach for each memory, shape (n,)."""
        which = list(range(len(memories)))
        found = [self.similarities(model, memories.embeddings.float(), which, seed=named_seed("held out", seed))]
        for start in self.starts:
            seeds = [named_seed("held out", seed, start, one) for one in memories.ids]
            points = starting_points(model, start, texts=memories.texts, ordinary=memories.ordinary, seeds=seeds)
            triggers = self.attack(model, memories.latents.float(), points, seeds=seeds)
            found.append(
                self.similarities(
                    model, triggers.at(self.attack.steps), which, seed=named_seed("held out", seed, start)
                )
            )
        return torch.stack(found).amax(0)

    def look_rows(self, looks: int) -> Rows:
        """Cost of `similarities` for so many embeddings."""
        return drawn(looks * self.seeds, sampling_steps=self.sampling_steps, guidance_scale=self.guidance_scale)

    def held_out_rows(self, memories: int) -> Rows:
        """Cost of `held_out`."""
        attacks = memories * len(self.starts)
        searched = Rows(attacked=attacks * self.attack.steps * self.attack.batch)
        return self.look_rows(memories + attacks) + searched
