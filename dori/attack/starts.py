"""Where an attack begins: the memory's own prompt, Gaussian noise, or somebody else's prompt (methods.md 1.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dori.model.stable_diffusion import StableDiffusion


def gaussian(model: StableDiffusion, seeds: Sequence[int]) -> Tensor:
    """Standard normal embeddings, shape (len(seeds), l, d); row i depends on seeds[i] alone."""
    return torch.stack(
        [torch.randn(model.embedding_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def foreign(model: StableDiffusion, prompts: Sequence[str], count: int, *, seed: int) -> Tensor:
    """Embeddings of `count` prompts drawn from `prompts` (not those of the memories), shape (count, l, d)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(prompts), (count,), generator=generator)
    return model.encode([prompts[row] for row in rows.tolist()])
