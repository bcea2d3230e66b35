"""D_SSCD: how alike the generations of one prompt are (methods.md 6.2; lower = more diverse)."""

import torch
from torch import Tensor

from dori.errors import DoriError
from dori.metrics.similarity import cosine


def pairwise_similarity(descriptors: Tensor) -> float:
    """Median cosine over the n (n - 1) / 2 pairs of one prompt's generations.

    The median is the mid-point of the two middle pairs. Differs from NeMo's scripts: `torch.median` takes the lower
    of the two. Their 10 images have 45 pairs, an odd number, so there the two agree; for other counts the mid-point
    favours neither side.

    Args:
        descriptors: shape (n, d), n >= 2.

    Raises:
        DoriError: fewer than two generations.
    """
    if len(descriptors) < 2:
        raise DoriError("diversity compares the generations of one prompt, and there are fewer than two; draw more")
    row, column = torch.triu_indices(len(descriptors), len(descriptors), offset=1)
    return float(cosine(descriptors[row], descriptors[column]).double().quantile(0.5))
