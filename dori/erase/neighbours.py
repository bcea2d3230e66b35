"""Neighbours of the erased captions, one word exchanged: damage hides there, and an erasure may hold them in place.

A neighbour may bring the memory back as the caption itself does. So it is taught, and damage is judged by it, only if
none of what the model draws from it, under several seeds, is like a memory: otherwise removal itself would be damage.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dori.audit.judge import Case, finite_images
from dori.erase.decide import deciding_pairs, limit
from dori.metrics.similarity import Descriptor
from dori.model.stable_diffusion import StableDiffusion
from dori.sampling import Sampling, initial_noise, named_seed, sample

SEEDS = 3  # images of each neighbour
PER_CALL = 16  # neighbours drawn at once


def neighbours(
    model: StableDiffusion,
    texts: Sequence[str],
    ordinary: Sequence[str],
    *,
    each: int,
    seed: int,
    apart_from: Sequence[str] = (),
) -> tuple[str, ...]:
    """Captions with one word exchanged for a word of an ordinary prompt, `each` for every text, none twice, no caption.

    Two are the same if the model reads them so: to a tokenizer that lowers letters "Red fox" is "red fox".

    Args:
        model: what does not fit into its prompts is left out.
        texts: the erased captions.
        ordinary: prompts that lend words.
        each: number wanted for each text.
        seed: of the draws.
        apart_from: further texts that are left out.
    """

    def read(text: str) -> tuple[int, ...]:
        return tuple(model.tokenizer(text).input_ids)

    words = sorted({word for prompt in ordinary for word in prompt.split()})
    generator = torch.Generator().manual_seed(named_seed("neighbours", seed))
    found: dict[tuple[int, ...], str] = {}
    for text in texts:
        parts = text.split()
        for _ in range(each if parts and words else 0):
            place, word = (int(torch.randint(n, (), generator=generator)) for n in (len(parts), len(words)))
            near = " ".join([*parts[:place], words[word], *parts[place + 1 :]])
            found.setdefault(read(near), near)
    out = {read(text) for text in (*texts, *apart_from)}
    return tuple(text for ids, text in found.items() if len(ids) <= model.context_length and ids not in out)


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What a model draws from neighbours, and from which of them it shows no memory.

    Args:
        latents, embeddings: `SEEDS` of each, shapes (n SEEDS, c, h, w) and (n SEEDS, l, d), on the CPU.
        unlike: whether none of a neighbour's images is like a memory, shape (n,).
    """

    latents: Tensor
    embeddings: Tensor
    unlike: Tensor

    def kept(self) -> tuple[Tensor, Tensor]:
        """Latents and embeddings of the neighbours that show no memory."""
        rows = self.unlike.repeat_interleave(SEEDS)
        return self.latents[rows], self.embeddings[rows]


def drawn_neighbours(
    model: StableDiffusion,
    texts: Sequence[str],
    cases: Sequence[Case],
    descriptor: Descriptor,
    *,
    below: float,
    sampling: Sampling,
    seed: int,
) -> Drawn:
    """`SEEDS` images of each text as the model draws it, and whether any of them shows a memory.

    Args:
        model: as it was.
        texts: neighbours.
        cases: all memories.
        descriptor: whose deciding similarity filters.
        below: similarity to any memory that may not be reached, as a share of the threshold that decides.
        sampling: of the images.
        seed: of the noises.
    """
    latents, embeddings = [torch.zeros(0, *model.latent_shape)], [torch.zeros(0, *model.embedding_shape)]
    kept = [torch.zeros(0, dtype=torch.bool)]
    limits = torch.tensor([limit(descriptor, case) for case in cases])
    for first in range(0, len(texts), PER_CALL):
        part = list(texts[first : first + PER_CALL])
        y = model.encode(part).repeat_interleave(SEEDS, 0)
        noise = initial_noise(model, [named_seed("neighbour", seed, text, k) for text in part for k in range(SEEDS)])
        z = sample(model, y, noise, steps=sampling.steps, guidance_scale=sampling.guidance_scale)
        images, finite = finite_images(model.to_images(z).cpu())
        unlike = (deciding_pairs(descriptor, cases, images) < below * limits).all(1) & finite
        latents.append(z.cpu())
        embeddings.append(y.cpu())
        kept.append(unlike.view(-1, SEEDS).all(1))
    return Drawn(torch.cat(latents), torch.cat(embeddings), torch.cat(kept))
