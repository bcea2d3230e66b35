"""Surrogates: images with a memory's meaning that are no copies of it, made by the model itself.

Source: methods.md 5.1 (a mitigated model, asked with the original prompt) and 5.3 (several, filtered by similarity to
the target and to each other). Where a mitigated model draws none, the unedited model is asked with the prompt shortened
word by word, down to the empty prompt. A copy of any *other* memory is no surrogate either: it would be taught. No twin
is asked: twins only judge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dori.audit.judge import Case, finite_images
from dori.cost import Rows, drawn
from dori.edit import Edit, no_edit
from dori.erase.decide import deciding, limit
from dori.metrics.similarity import Descriptor, cosine
from dori.model.stable_diffusion import StableDiffusion
from dori.sampling import initial_noise, named_seed, sample

SHORTER = 4  # forms of a prompt that `shortened` gives, at most


@dataclass(frozen=True, slots=True, eq=False)
class Surrogates:
    """Surrogates of n memories.

    Args:
        latents: for each memory, shape (k, c, h, w); k = 0 where all that was drawn is too like a memory.
        images: for each memory, in [0, 1], shape (k, 3, H, W).
        sources: for each memory, in words, where each of its surrogates comes from.
        nearest: for each memory, the least similarity to it of a candidate; infinite where all diverged.
    """

    latents: tuple[Tensor, ...]
    images: tuple[Tensor, ...]
    sources: tuple[tuple[str, ...], ...]
    nearest: tuple[float, ...]


def shortened(text: str | None) -> tuple[str, ...]:
    """The prompt without its last words, three quarters, half, a quarter of them, and nothing; longest first."""
    words = (text or "").split()
    lengths = sorted({len(words) * share // 4 for share in (3, 2, 1)} | {0}, reverse=True)
    return tuple(" ".join(words[:length]) for length in lengths if length < len(words) or not words)


def anchor_prompt(text: str | None) -> str:
    """The first half of a prompt's words."""
    words = (text or "").split()
    return " ".join(words[: len(words) // 2])


def filtered(allowed: Tensor, descriptors: Tensor, kept: Tensor, *, below_each_other: float, wanted: int) -> list[int]:
    """Indices of candidates to keep, greedily in their order.

    Args:
        allowed: which candidates are unlike all memories, booleans (m,).
        descriptors: of the candidates, shape (m, d).
        kept: descriptors of the surrogates that are kept already, shape (k, d).
        below_each_other: similarity between two surrogates that may not be reached.
        wanted: number of surrogates wanted in all.
    """
    chosen: list[int] = []
    for index in range(len(descriptors)):
        if len(kept) == wanted:
            break
        alike = cosine(descriptors[index], kept).max() if len(kept) else torch.tensor(-1.0)
        if allowed[index] and alike < below_each_other:
            chosen.append(index)
            kept = torch.cat([kept, descriptors[index][None]])
    return chosen


@dataclass(frozen=True, slots=True)
class SurrogateSearch:
    """How surrogates are looked for.

    Args:
        wanted: surrogates of each memory at most.
        tries: images drawn from each source and memory.
        below_target: similarity to the memory that may not be reached, as a share of the threshold that decides (5/7:
            the .5 of methods.md 5.3 beside SSCD's .7); to the other memories it may not reach the threshold.
        below_each_other: similarity that two surrogates of one memory may not reach, as a share of the threshold.
        mitigated: ask the mitigated models first; False asks with shortened prompts only.
        sampling_steps: DDIM steps of each image.
        guidance_scale: classifier-free guidance of each image.
    """

    wanted: int = 4
    tries: int = 8
    below_target: float = 5 / 7
    below_each_other: float = 1.0
    mitigated: bool = True
    sampling_steps: int = 50
    guidance_scale: float = 7.0

    def __call__(
        self,
        model: StableDiffusion,
        cases: Sequence[Case],
        mitigations: Sequence[Edit],
        descriptor: Descriptor,
        *,
        seed: int,
    ) -> Surrogates:
        """Surrogates of every memory, as far as they can be made.

        Args:
            model: the model to erase from, without an edit.
            cases: the memories.
            mitigations: edits that hide them, in the order in which they are tried.
            descriptor: whose cosine filters.
            seed: of the noises.
        """
        references = descriptor(torch.stack([case.image for case in cases])).cpu()
        images: list[list[Tensor]] = [[] for _ in cases]
        found = [references.new_zeros(0, references.shape[1]) for _ in cases]
        sources: list[list[str]] = [[] for _ in cases]
        nearest = [math.inf] * len(cases)
        for name, edit, prompts in self._ways(cases, mitigations):
            wanting = [i for i, kept in enumerate(images) if len(kept) < self.wanted and prompts[i] is not None]
            if not wanting:
                continue
            with edit.applied(model):
                candidates_of = self._drawn(
                    model, [prompts[i] or "" for i in wanting], named_seed("surrogates", seed, name)
                )
            for i, candidates in zip(wanting, candidates_of, strict=True):
                if len(candidates) == 0:
                    continue
                described = descriptor(candidates).cpu()
                own = deciding(descriptor, [cases[i]], candidates[None])[0]
                nearest[i] = min(nearest[i], float(own.min()))
                others = cosine(described[:, None], torch.cat([references[:i], references[i + 1 :]]))
                unlike = (own < self.below_target * limit(descriptor, cases[i])) & (others < descriptor.threshold).all(
                    1
                )
                keep = filtered(
                    unlike,
                    described,
                    found[i],
                    below_each_other=self.below_each_other * descriptor.threshold,
                    wanted=self.wanted,
                )
                images[i] += [candidates[k] for k in keep]
                found[i] = torch.cat([found[i], described[keep]])
                sources[i] += [f"{name}: {prompts[i]}" for _ in keep]
        side = model.image_side_px
        stacked = tuple(torch.stack(kept) if kept else torch.zeros(0, 3, side, side) for kept in images)
        return Surrogates(
            tuple(
                model.to_latents(kept).cpu() if len(kept) else torch.zeros(0, *model.latent_shape) for kept in stacked
            ),
            stacked,
            tuple(tuple(source) for source in sources),
            tuple(nearest),
        )

    def rows(self, memories: int, mitigations: int) -> Rows:
        """At most so many U-Net rows: every memory asked in every way."""
        asked = self.tries * memories * (mitigations * self.mitigated + SHORTER)
        return drawn(asked, sampling_steps=self.sampling_steps, guidance_scale=self.guidance_scale)

    def _ways(self, cases: Sequence[Case], mitigations: Sequence[Edit]) -> list[tuple[str, Edit, list[str | None]]]:
        """Name, edit and each memory's prompt (None: not asked this way), in the order of trying."""
        texts = [case.memory.text for case in cases]
        ways: list[tuple[str, Edit, list[str | None]]] = []
        if self.mitigated:
            ways += [(edit.name, edit, list(texts)) for edit in mitigations]
        shorter = [shortened(text) for text in texts]
        for level in range(max(len(prompts) for prompts in shorter)):
            prompts = [options[level] if level < len(options) else None for options in shorter]
            ways.append((f"shortened prompt {level + 1}", no_edit(), prompts))
        return ways

    def _drawn(self, model: StableDiffusion, prompts: Sequence[str], seed: int) -> list[Tensor]:
        """At most `tries` images of each prompt: those that did not diverge."""
        noise = initial_noise(model, [named_seed("surrogate", seed, k) for k in range(self.tries)])
        embeddings = model.encode(list(prompts)).repeat_interleave(self.tries, 0)
        latents = sample(
            model,
            embeddings,
            noise.repeat(len(prompts), 1, 1, 1),
            steps=self.sampling_steps,
            guidance_scale=self.guidance_scale,
        )
        images, finite = finite_images(model.to_images(latents).cpu())
        return [part[whole] for part, whole in zip(images.split(self.tries), finite.split(self.tries), strict=True)]
