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
    """Surrogates of one memory.

    Args:
        latents: shape (k, c, h, w); k = 0 where all that was drawn is too like a memory.
        images: in [0, 1], shape (k, 3, H, W).
        sources: in words, where each comes from.
        nearest: the least similarity to the memory of a candidate; infinite where all diverged.
    """

    latents: Tensor
    images: Tensor
    sources: tuple[str, ...]
    nearest: float


def shortened(text: str | None) -> tuple[str, ...]:
    """The prompt without its last words, three quarters, half, a quarter of them, and nothing; longest first."""
    words = (text or "").split()
    lengths = sorted({len(words) * share // 4 for share in (3, 2, 1)} | {0}, reverse=True)
    return tuple(" ".join(words[:length]) for length in lengths if length < len(words) or not words)


def anchor_prompts(text: str | None) -> tuple[str, ...]:
    """The forms of a prompt that keep at most half of its words; longest first, the empty one last."""
    half = len((text or "").split()) / 2
    return tuple(form for form in shortened(text) if len(form.split()) <= half)


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
        case: Case,
        mitigations: Sequence[Edit],
        descriptor: Descriptor,
        *,
        others: Tensor,
        seed: int,
    ) -> Surrogates:
        """Surrogates of a memory, as far as they can be made.

        Args:
            model: the model to erase from, without an edit.
            case: the memory.
            mitigations: edits that hide it, in the order in which they are tried.
            descriptor: whose cosine filters.
            others: descriptors of the other memories, shape (m, d).
            seed: of the noises, which are the same for all memories.
        """
        side, sources, nearest = model.image_side_px, list[str](), math.inf
        images, found = torch.zeros(0, 3, side, side), others[:0]
        for name, edit, prompt in self._ways(case.memory.text, mitigations):
            if len(images) == self.wanted:
                break
            with edit.applied(model):
                candidates = self._drawn(model, prompt, named_seed("surrogates", seed, name))
            if len(candidates) == 0:
                continue
            described, own = descriptor(candidates).cpu(), deciding(descriptor, [case], candidates[None])[0]
            nearest = min(nearest, float(own.min()))
            unlike = (cosine(described[:, None], others) < descriptor.threshold).all(1)
            keep = filtered(
                unlike & (own < self.below_target * limit(descriptor, case)),
                described,
                found,
                below_each_other=self.below_each_other * descriptor.threshold,
                wanted=self.wanted,
            )
            images, found = torch.cat([images, candidates[keep]]), torch.cat([found, described[keep]])
            sources += [f"{name}: {prompt}"] * len(keep)
        latents = model.to_latents(images).cpu() if len(images) else torch.zeros(0, *model.latent_shape)
        return Surrogates(latents, images, tuple(sources), nearest)

    def rows(self, memories: int, mitigations: int) -> Rows:
        """At most so many U-Net rows: every memory asked in every way."""
        asked = self.tries * memories * (mitigations * self.mitigated + SHORTER)
        return drawn(asked, sampling_steps=self.sampling_steps, guidance_scale=self.guidance_scale)

    def _ways(self, text: str | None, mitigations: Sequence[Edit]) -> list[tuple[str, Edit, str]]:
        """Name, edit and prompt, in the order of trying."""
        ways: list[tuple[str, Edit, str]] = []
        if self.mitigated and text is not None:
            ways += [(edit.name, edit, text) for edit in mitigations]
        shorter = enumerate(shortened(text), 1)
        return ways + [(f"shortened prompt {level}", no_edit(), prompt) for level, prompt in shorter]

    def _drawn(self, model: StableDiffusion, prompt: str, seed: int) -> Tensor:
        """At most `tries` images of the prompt: those that did not diverge."""
        noise = initial_noise(model, [named_seed("surrogate", seed, k) for k in range(self.tries)])
        latents = sample(
            model,
            model.encode([prompt]).repeat_interleave(self.tries, 0),
            noise,
            steps=self.sampling_steps,
            guidance_scale=self.guidance_scale,
        )
        images, finite = finite_images(model.to_images(latents).cpu())
        return images[finite]
