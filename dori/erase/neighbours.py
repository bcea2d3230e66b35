"""Neighbours of the erased captions, one word exchanged: damage hides there, and an erasure may hold them in place.

A neighbour may bring the memory back as the caption itself does. So it is taught only if none of what the model draws
from it, under several seeds, is like a memory.
"""

from collections.abc import Sequence

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
    model: StableDiffusion, texts: Sequence[str], ordinary: Sequence[str], *, each: int, seed: int
) -> tuple[str, ...]:
    """Captions with one word exchanged for a word of an ordinary prompt, `each` for every text, none twice.

    Args:
        model: what does not fit into its prompts is left out.
        texts: the erased captions.
        ordinary: prompts that lend words.
        each: number wanted for each text.
        seed: of the draws.
    """
    words = sorted({word for prompt in ordinary for word in prompt.split()})
    generator = torch.Generator().manual_seed(named_seed("neighbours", seed))
    found: dict[str, None] = {}
    for text in texts:
        parts = text.split()
        for _ in range(each if parts and words else 0):
            place, word = (int(torch.randint(n, (), generator=generator)) for n in (len(parts), len(words)))
            found.setdefault(" ".join([*parts[:place], words[word], *parts[place + 1 :]]))
    fits = (text for text in found if len(model.tokenizer(text).input_ids) <= model.context_length)
    return tuple(text for text in fits if text not in texts)


def drawn_neighbours(
    model: StableDiffusion,
    texts: Sequence[str],
    cases: Sequence[Case],
    descriptor: Descriptor,
    *,
    below: float,
    sampling: Sampling,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """`SEEDS` images of each text as the model draws it, with the text's embedding, if none of them shows a memory.

    Args:
        model: as it was.
        texts: neighbours.
        cases: all memories.
        descriptor: whose deciding similarity filters.
        below: similarity to any memory that may not be reached, as a share of the threshold that decides.
        sampling: of the images.
        seed: of the noises.

    Returns:
        Latents (k, c, h, w) and embeddings (k, l, d) on the CPU; k = 0 where every text shows one.
    """
    latents, embeddings = torch.zeros(0, *model.latent_shape), torch.zeros(0, *model.embedding_shape)
    limits = torch.tensor([limit(descriptor, case) for case in cases])
    for first in range(0, len(texts), PER_CALL):
        part = list(texts[first : first + PER_CALL])
        y = model.encode(part).repeat_interleave(SEEDS, 0)
        noise = initial_noise(model, [named_seed("neighbour", seed, text, k) for text in part for k in range(SEEDS)])
        z = sample(model, y, noise, steps=sampling.steps, guidance_scale=sampling.guidance_scale)
        images, finite = finite_images(model.to_images(z).cpu())
        unlike = (deciding_pairs(descriptor, cases, images) < below * limits).all(1) & finite
        kept = unlike.view(-1, SEEDS).all(1).repeat_interleave(SEEDS)
        latents, embeddings = torch.cat([latents, z.cpu()[kept]]), torch.cat([embeddings, y.cpu()[kept]])
    return latents, embeddings
