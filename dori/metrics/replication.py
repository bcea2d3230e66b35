"""MR, the memorization rate, defined once.

A memory counts as replicated when the median of its similarities over seeds exceeds the threshold: the median is
the quantity that published tables print, and the printed pairs (0.76 +- 0.05, MR 0.72) fit the same aggregation
(methods.md 6.2, an inference: the papers do not say). The stricter reading, the best seed, and the share of single
images stand beside it, because they answer other questions and are often confused with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dori.errors import DoriError
from dori.stats import Estimate, bootstrap, wilson

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Replication:
    """Counts of replicated memories and images.

    Args:
        memories: number of memories judged.
        by_median: memories whose median over seeds exceeds the threshold.
        by_maximum: memories whose best seed exceeds it.
        images: number of generations judged.
        images_replicated: generations that exceed it.
        shares: share of each memory's generations that exceed it.
    """

    memories: int
    by_median: int
    by_maximum: int
    images: int
    images_replicated: int
    shares: tuple[float, ...]

    @property
    def rate(self) -> Estimate:
        """MR with its Wilson interval over memories."""
        return wilson(self.by_median, self.memories)

    @property
    def rate_by_maximum(self) -> Estimate:
        """Share of memories that some seed replicates, with its Wilson interval; grows with the number of seeds."""
        return wilson(self.by_maximum, self.memories)

    @property
    def image_rate(self) -> Estimate:
        """Share of generations that replicate, averaged over memories, with a bootstrap interval over memories.

        Seeds of one memory are not independent, so memories are resampled and n counts them. Where all memories have
        the same share there is nothing to resample, and the interval is Wilson's, as if each memory were one trial.
        """
        if len(set(self.shares)) > 1:
            return bootstrap(self.shares, np.mean, seed=0, resamples=RESAMPLES)
        alike = self.shares[0] if self.shares else 0.0
        return wilson(alike * self.memories, self.memories)


def replication(similarities: Mapping[str, Sequence[float]], threshold: float | Mapping[str, float]) -> Replication:
    """Count replications.

    Args:
        similarities: memory id to its similarities, one a seed; the median of an even count is the mid-point
            (`torch.median` would take the lower middle).
        threshold: in [-1, 1], one for all or one for each memory; a similarity equal to it does not count.

    Raises:
        DoriError: no threshold, a memory without similarities, or one that is not a number.
    """
    limits = threshold if isinstance(threshold, Mapping) else dict.fromkeys(similarities, threshold)
    if not np.isfinite([*limits.values(), 0.0 if isinstance(threshold, Mapping) else threshold]).all():
        raise DoriError("the descriptor has no threshold yet; calibrate it, or give one that was measured")
    for memory, values in similarities.items():
        if len(values) == 0 or not np.isfinite(values).all():
            raise DoriError(
                f"memory {memory!r} has no similarities or one that is not a number; judge its generations again"
            )
    judged = [(np.asarray(values, np.float64), limits[memory]) for memory, values in similarities.items()]
    return Replication(
        memories=len(judged),
        by_median=sum(bool(np.median(values) > limit) for values, limit in judged),
        by_maximum=sum(bool(values.max() > limit) for values, limit in judged),
        images=sum(len(values) for values, _ in judged),
        images_replicated=sum(int((values > limit).sum()) for values, limit in judged),
        shares=tuple(float((values > limit).mean()) for values, limit in judged),
    )
