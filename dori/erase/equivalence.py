"""Equivalence: is the difference between two groups smaller than a margin, in both directions?

A removal is not shown by a test that finds no difference, which small samples always grant, but by one that rejects
"the difference is at least the margin": two one-sided tests (Schuirmann 1987), here with Welch's t, since the groups
differ in spread. Two-sided, because a memory that is *harder* to reach than an unseen image betrays that it was there.
The margin is fixed before anything is measured. Several quantities and states are tested, and the claim needs all of
them (an intersection-union test), so that no level has to be divided.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dori.errors import DoriError


@dataclass(frozen=True, slots=True)
class Equivalence:
    """The outcome of two one-sided tests.

    Args:
        quantity: what was compared, in words.
        difference: mean of the first group less mean of the second.
        low, high: its 1 - 2 level confidence interval; equivalence is shown if it lies within the margin.
        margin: fixed beforehand, in the quantity's unit.
        p: the larger of the two one-sided p-values.
        level: of each one-sided test.
        counts: images in each group.
        spread: false if no image differed from another of its group: the interval then has no width, and nothing is
            shown.
    """

    quantity: str
    difference: float
    low: float
    high: float
    margin: float
    p: float
    level: float
    counts: tuple[int, int]
    spread: bool

    @property
    def shown(self) -> bool:
        """Whether the difference is shown to be smaller than the margin."""
        return self.spread and self.p < self.level

    @property
    def excluded(self) -> bool:
        """Whether the difference is shown to be larger than the margin."""
        return self.low > self.margin or self.high < -self.margin


def equivalence(
    quantity: str,
    first: ArrayLike,
    second: ArrayLike,
    *,
    margin: float,
    level: float = 0.05,
    least_variance: float = 0.0,
) -> Equivalence:
    """Test whether the means of two independent groups differ by less than the margin.

    Args:
        quantity: what is compared, in words.
        first: one value an image, shape (n,), n >= 2: memories.
        second: shape (m,), m >= 2: controls.
        margin: > 0.
        level: of each one-sided test, in (0, 0.5).
        least_variance: of a group; where values lie on a grid, images that fall on one point still differ by what the
            grid rounds away.

    Raises:
        DoriError: a group has fewer than two values, a value is not finite, or the margin is not positive.
    """
    a, b = (np.asarray(values, np.float64) for values in (first, second))
    if min(a.size, b.size) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()) or not margin > 0:
        raise DoriError(
            f"{quantity}: equivalence needs at least two memories and two controls with finite values and "
            "a positive margin; give more images"
        )
    difference, counts = float(a.mean() - b.mean()), (a.size, b.size)
    error, freedom = _welch(a, b, least_variance)
    if error == 0:
        return Equivalence(
            quantity, difference, difference, difference, margin, p=1.0, level=level, counts=counts, spread=False
        )
    half = float(stats.t.ppf(1 - level, freedom)) * error
    above = float(stats.t.sf((difference + margin) / error, freedom))
    below = float(stats.t.cdf((difference - margin) / error, freedom))
    return Equivalence(
        quantity,
        difference,
        difference - half,
        difference + half,
        margin,
        p=max(above, below),
        level=level,
        counts=counts,
        spread=True,
    )


def _welch(a: NDArray[np.float64], b: NDArray[np.float64], least_variance: float) -> tuple[float, float]:
    """Standard error of the difference of means, and its degrees of freedom."""
    u, v = (max(float(group.var(ddof=1)), least_variance) / group.size for group in (a, b))
    if u + v == 0:
        return 0.0, math.inf
    return math.sqrt(u + v), float((u + v) ** 2 / (u**2 / (a.size - 1) + v**2 / (b.size - 1)))
