"""The judge of an audit: draws images from embeddings with fresh noise and compares them with the training images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerBase

from dori.audit.plan import Plan
from dori.findings import Group
from dori.memory import Memory
from dori.metrics.alignment import OPENAI_MEAN, OPENAI_STD, Colour, alignment, image_features
from dori.metrics.similarity import Descriptor, cosine, masked_similarity
from dori.model.load import plain_config
from dori.model.stable_diffusion import StableDiffusion
from dori.run import canonical_sha256, tensors_sha256
from dori.sampling import Sampling, initial_noise, sample


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One image to ask for: its record, group, pixels (3, H, W) in [0, 1] and scaled latent (c, h, w)."""

    memory: Memory
    group: Group
    image: Tensor
    latent: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """Descriptor of copies and, where there is one, a CLIP for alignment and image features.

    Args:
        descriptor: whose cosine decides.
        clip, tokenizer: both or neither.
        mean, std: the CLIP's colour normalisation.
    """

    descriptor: Descriptor
    clip: CLIPModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    mean: Colour = OPENAI_MEAN
    std: Colour = OPENAI_STD

    def record(self) -> dict[str, object]:
        """What every judgement depends on: the descriptor, and the CLIP with its weights' hash."""
        found: dict[str, object] = {
            "descriptor": [self.descriptor.name, self.descriptor.preprocessing, self.descriptor.fingerprint],
            "clip": None,
        }
        if self.clip is not None and self.tokenizer is not None:
            found["clip"] = {
                "weights": tensors_sha256(self.clip.state_dict()),
                "config": plain_config(self.clip.config),
                "vocabulary": canonical_sha256(self.tokenizer.get_vocab()),
                "colour": [self.mean, self.std],
            }
        return found

    def align(self, images: Tensor, prompts: Sequence[str]) -> Tensor | None:
        """Alignment of images and prompts, shape (n,), or None without a CLIP."""
        if self.clip is None or self.tokenizer is None:
            return None
        return alignment(self.clip, self.tokenizer, images, prompts, mean=self.mean, std=self.std)

    @property
    def features_name(self) -> str:
        """Which network gives the image features, and from which preprocessing."""
        if self.clip is None:
            return f"{self.descriptor.name} ({self.descriptor.preprocessing})"
        side = self.clip.config.vision_config.image_size
        return f"the CLIP's image tower ({side} x {side}, bicubic with antialiasing, its own colour normalisation)"

    def features(self, images: Tensor) -> Tensor:
        """Image features for the quality distances: the CLIP's where there is one, else the descriptor's."""
        if self.clip is None:
            return self.descriptor(images).cpu()
        return image_features(self.clip, images, mean=self.mean, std=self.std).cpu()


def draw(model: StableDiffusion, plan: Plan, embeddings: Tensor, seeds: Sequence[int]) -> Tensor:
    """Images in [0, 1] of every embedding under every seed, as the plan samples, shape (n, s, 3, H, W)."""
    return drawn(model, embeddings, seeds, Sampling(plan.sampling_steps, plan.guidance_scale))


def drawn(model: StableDiffusion, embeddings: Tensor, seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """Images in [0, 1] of every embedding (n, l, d) under every seed, shape (n, s, 3, H, W)."""
    n, s = len(embeddings), len(seeds)
    noise = initial_noise(model, seeds).repeat(n, 1, 1, 1)
    latents = sample(
        model,
        embeddings.repeat_interleave(s, 0).to(model.device),
        noise,
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
    )
    return model.to_images(latents).cpu().unflatten(0, (n, s))


def likeness(descriptor: Descriptor, image: Tensor, images: Tensor) -> Tensor:
    """Similarity to one image (3, H, W) of images (n, s, 3, H, W), shape (n, s); one that diverged is like nothing."""
    flat, finite = finite_images(images.flatten(0, 1))
    descriptors = descriptor(flat).cpu() * finite[:, None]
    return cosine(descriptors, descriptor(image[None]).cpu()).unflatten(0, images.shape[:2])


def pixels_sha256(images: Tensor) -> str:
    """SHA-256 of images in [0, 1] as the bytes of their pixels: rounding does not enter."""
    return tensors_sha256({"pixels": (images * 255).round().to(torch.uint8)})


def cases_sha256(cases: Sequence[Case]) -> str:
    """SHA-256 over ids, texts and pixels of images in their order."""
    return canonical_sha256([[case.memory.id, case.memory.text, pixels_sha256(case.image)] for case in cases])


def finite_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images fit to be judged and seen, shape (n, 3, H, W), and which of them were finite, booleans (n,).

    A diverged generation is no copy of anything: it becomes grey as a whole, whatever parts of it came out.
    """
    finite = torch.isfinite(images).flatten(1).all(1)
    return torch.where(finite[:, None, None, None], images, torch.full_like(images, 0.5)), finite


def judged(judge: Judge, cases: Sequence[Case], images: Tensor) -> dict[str, Tensor]:
    """Everything that the audit keeps of generated images.

    Args:
        judge: the judge.
        cases: n images that were asked for.
        images: their generations, shape (n, s, 3, H, W).

    Returns:
        similarity (n, s); masked (n, s), zero where the case has no varying box; descriptors (n, s, d); alignment
        (n, s) if there is a CLIP, zero where the case has no text; shown (n, H, W, 3) bytes of the first seed;
        finite (n, s), false where the generation diverged: its similarities are zero.
    """
    n, s = images.shape[:2]
    flat, finite = finite_images(images.flatten(0, 1))
    images, finite = flat.unflatten(0, (n, s)), finite.unflatten(0, (n, s))
    # Zero vectors are like nothing, not even like a grey training image.
    descriptors = judge.descriptor(flat).cpu().unflatten(0, (n, s)) * finite[..., None]
    references = judge.descriptor(torch.stack([case.image for case in cases])).cpu()
    masked = torch.zeros(n, s)
    for row, case in enumerate(cases):
        if case.memory.varying_box is not None:
            masked[row] = (
                finite[row]
                * masked_similarity(judge.descriptor, images[row], case.image, case.memory.varying_box).cpu()
            )
    found = {
        "similarity": cosine(descriptors, references[:, None]),
        "masked": masked,
        "descriptors": descriptors,
        "finite": finite,
        "shown": (images[:, 0].permute(0, 2, 3, 1) * 255).round().to(torch.uint8),
    }
    texts = [case.memory.text or "" for case in cases for _ in range(s)]
    aligned = judge.align(flat, texts)
    if aligned is not None:
        found["alignment"] = aligned.cpu().unflatten(0, (n, s))
    return found
