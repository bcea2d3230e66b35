"""Where attacks begin, during an erasure and in its proof alike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dori.attack.starts import foreign, gaussian
from dori.audit.plan import Start
from dori.model.stable_diffusion import StableDiffusion


def starting_points(
    model: StableDiffusion, start: Start, *, texts: Sequence[str | None], ordinary: Sequence[str], seeds: Sequence[int]
) -> Tensor:
    """Initial embeddings on the CPU, shape (n, l, d).

    Args:
        model: encodes the prompts.
        start: kind of start.
        texts: prompt of each image; an image without one starts from noise instead of its prompt.
        ordinary: prompts of no memory, from which foreign starts are drawn.
        seeds: one for each image.
    """
    if start == "foreign":
        return torch.cat([foreign(model, ordinary, 1, seed=seed) for seed in seeds]).cpu()
    noise = gaussian(model, seeds)
    if start == "gaussian":
        return noise
    known = torch.tensor([text is not None for text in texts])[:, None, None]
    return torch.where(known, model.encode([text or "" for text in texts]).cpu(), noise)
