"""MR, the memorization rate, defined once.

A memory counts as replicated when the median of its similarities over seeds exceeds the threshold: the median is
the quantity that published tables print, and the printed pairs (0.76 +- 0.05, MR 0.72) fit the same aggregation
(methods.md 6.2, an inference: the papers do not say). The stricter reading, the best seed, and the share of single
images stand beside it, because they answer other questions and are often confused with it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dori.errors import DoriError
from dori.stats import Estimate, wilson


@dataclass(frozen=True, slots=True)
class Replication:
    """Counts of replicated memories and images.

    Args:
        threshold: similarity that must be exceeded.
        memories: number of memories judged.
        by_median: memories whose median over seeds exceeds the threshold.
        by_maximum: memories whose best seed exceeds it.
        images: number of generations judged.
        images_replicated: generations that exceed it.
    """

    threshold: float
    memories: int
    by_median: int
    by_maximum: int
    images: int
    images_replicated: int

    @property
    def rate(self) -> Estimate:
        """MR with its Wilson interval over memories."""
        return wilson(self.by_median, self.memories)

    @property
    def rate_by_maximum(self) -> Estimate:
        """Share of memories that some seed replicates; grows with the number of seeds."""
        return wilson(self.by_maximum, self.memories)

    @property
    def image_rate(self) -> float:
        """Share of generations that replicate; no interval, since seeds of one memory are not independent."""
        return self.images_replicated / self.images if self.images else math.nan


def replication(similarities: Mapping[str, Sequence[float]], threshold: float) -> Replication:
    """Count replications.

    Args:
        similarities: memory id to its similarities, one a seed; the median of an even count is the mid-point
            (`torch.median` would take the lower middle).
        threshold: in [-1, 1]; a similarity equal to it does not count.

    Raises:
        DoriError: no threshold, a memory without similarities, or one that is not a number.
    """
    if not math.isfinite(threshold):
        raise DoriError("the descriptor has no threshold yet; calibrate it, or give one that was measured")
    for memory, values in similarities.items():
        if len(values) == 0 or not np.isfinite(values).all():
            raise DoriError(f"memory {memory!r} has no similarities or one that is not a number; "
                            "judge its generations again")
    arrays = [np.asarray(values, np.float64) for values in similarities.values()]
    return Replication(
        threshold=threshold, memories=len(arrays),
        by_median=sum(bool(np.median(values) > threshold) for values in arrays),
        by_maximum=sum(bool(values.max() > threshold) for values in arrays),
        images=sum(map(len, arrays)), images_replicated=sum(int((values > threshold).sum()) for values in arrays))
