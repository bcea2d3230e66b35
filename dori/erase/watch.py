"""Evidence during an erasure: does the image come back, from embeddings and noises that nothing was trained on?

The held-out attack draws its noises, starts and generation seeds from streams of its own (`sampling.named_seed`), so
an erasure that only learned its own triggers does not stop early.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dori.attack.dori import Dori
from dori.attack.starts import gaussian
from dori.audit.judge import finite_images
from dori.audit.plan import Start
from dori.erase.pairs import Forget
from dori.metrics.similarity import Descriptor, cosine
from dori.model.stable_diffusion import StableDiffusion
from dori.sampling import initial_noise, named_seed, sample


def starting_points(
    model: StableDiffusion, memories: Forget, which: Sequence[int], start: Start, *, seeds: Sequence[int]
) -> Tensor:
    """Where attacks on some memories begin, shape (len(which), l, d).

    Args:
        model: only its embeddings' shape is used.
        memories: their prompts, and ordinary prompts for foreign starts.
        which: indices of memories.
        start: kind of start; a memory without a text starts from noise instead of its prompt.
        seeds: one for each of `which`.
    """
    noise = gaussian(model, seeds)
    if start == "gaussian":
        return noise
    if start == "foreign":
        rows = [
            int(torch.randint(len(memories.ordinary), (), generator=torch.Generator().manual_seed(seed)))
            for seed in seeds
        ]
        return memories.ordinary[rows].float()
    has_text = torch.tensor([memories.texts[i] is not None for i in which])[:, None, None]
    return torch.where(has_text, memories.embeddings[list(which)].float(), noise)


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """The judge of an erasure in progress.

    Args:
        descriptor: whose cosine decides.
        images: the memories in [0, 1], shape (n, 3, H, W).
        sampling_steps: DDIM steps of each image.
        guidance_scale: classifier-free guidance of each image.
        seeds: images drawn for each memory.
        attack: the held-out attack.
        starts: of the held-out attack.
    """

    descriptor: Descriptor
    images: Tensor
    sampling_steps: int = 25
    guidance_scale: float = 4.0
    seeds: int = 2
    attack: Dori = field(default_factory=Dori)
    starts: tuple[Start, ...] = ("prompt", "gaussian")

    def similarities(self, model: StableDiffusion, embeddings: Tensor, which: Sequence[int], *, seed: int) -> Tensor:
        """Median similarity to its memory of what each embedding draws, shape (len(which),)."""
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
        images, finite = finite_images(model.to_images(latents).cpu())
        described = self.descriptor(images).cpu() * finite[:, None]
        references = self.descriptor(self.images[list(which)]).cpu().repeat_interleave(self.seeds, 0)
        return cosine(described, references).view(len(which), self.seeds).quantile(0.5, dim=1)

    def held_out(self, model: StableDiffusion, memories: Forget, *, seed: int) -> Tensor:
        """The largest similarity that the prompt and the held-out attacks reach for each memory, shape (n,)."""
        which = list(range(len(memories)))
        found = [self.similarities(model, memories.embeddings.float(), which, seed=named_seed("held out", seed))]
        for start in self.starts:
            seeds = [named_seed("held out", seed, start, one) for one in memories.ids]
            points = starting_points(model, memories, which, start, seeds=seeds)
            triggers = self.attack(model, memories.latents.float(), points, seeds=seeds)
            found.append(
                self.similarities(
                    model, triggers.at(self.attack.steps), which, seed=named_seed("held out", seed, start)
                )
            )
        return torch.stack(found).amax(0)
