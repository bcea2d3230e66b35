"""Neighbours of the erased captions, one word exchanged: damage hides there, and an erasure may hold them in place.

A neighbour may bring the memory back as the caption itself does. So what the model draws from it is taught only where
the judge takes it for no copy, and is unlike every memory as surrogates are.
"""

from collections.abc import Sequence

import torch

from dori.audit.judge import Case, finite_images
from dori.erase.decide import deciding_pairs, limit
from dori.erase.pairs import Pairs
from dori.metrics.similarity import Descriptor
from dori.model.stable_diffusion import StableDiffusion
from dori.run import tensors_sha256
from dori.sampling import Sampling, initial_noise, named_seed, sample

PER_CALL = 32  # images drawn at once


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
) -> Pairs:
    """One image of each text as the model draws it, with the text's embedding, without those that show a memory.

    Args:
        model: as it was.
        texts: neighbours.
        cases: all memories.
        descriptor: whose deciding similarity filters.
        below: similarity to any memory that may not be reached, as a share of the threshold that decides.
        sampling: of the images.
        seed: of the noises.
    """
    latents, embeddings = torch.zeros(0, *model.latent_shape), torch.zeros(0, *model.embedding_shape)
    limits = torch.tensor([limit(descriptor, case) for case in cases])
    for first in range(0, len(texts), PER_CALL):
        part = list(texts[first : first + PER_CALL])
        y, noise = model.encode(part), initial_noise(model, [named_seed("neighbour", seed, text) for text in part])
        z = sample(model, y, noise, steps=sampling.steps, guidance_scale=sampling.guidance_scale)
        images, finite = finite_images(model.to_images(z).cpu())
        unlike = (deciding_pairs(descriptor, cases, images) < below * limits).all(1) & finite
        latents, embeddings = torch.cat([latents, z.cpu()[unlike]]), torch.cat([embeddings, y.cpu()[unlike]])
    return Pairs(latents, embeddings, tensors_sha256({"latents": latents, "embeddings": embeddings}))
