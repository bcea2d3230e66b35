"""Statistics of small samples: intervals for rates and medians, AUROC and TPR at a fixed FPR.

Published tables print a median with its median absolute deviation (methods.md 6.2). About 100 memories are few, so
every rate of a report also carries an interval: Wilson for a share, Newcombe's likewise for an AUROC, bootstrap over
memories for anything else.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from dori.errors import DoriError

Statistic = Callable[..., Any]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval.

    Args:
        value: the figure itself; NaN where there was nothing to measure.
        low, high: ends of the confidence interval; NaN where n is too small for one.
        n: number of observations behind the figure.
    """

    value: float
    low: float
    high: float
    n: int


def _finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise DoriError(f"{name} must be one list of finite numbers; leave out what could not be measured")
    return array


def wilson(successes: float, n: int, *, confidence: float = 0.95) -> Estimate:
    """A share with its Wilson score interval.

    Args:
        successes: 0 to n; a fraction where trials that hang together were counted as one.
        n: number of trials; 0 gives the share NaN and the interval [0, 1].
        confidence: in (0, 1).
    """
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    z, share = float(stats.norm.ppf((1 + confidence) / 2)), successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # Exactly 0 and 1 where the formula says so but rounding does not.
    return Estimate(
        share, max(0.0, centre - half) if successes else 0.0, min(1.0, centre + half) if successes < n else 1.0, n
    )


def bootstrap(
    values: ArrayLike, statistic: Statistic = np.median, *, seed: int, resamples: int = 2000, confidence: float = 0.95
) -> Estimate:
    """A statistic with its bootstrap interval over the values (one value a memory).

    Bias-corrected and accelerated; where that is undefined (a resample distribution with all its mass on one side,
    as medians of few values have), the percentile interval. Values that are all equal give an interval of width
    zero, fewer than two values none (NaN).

    Args:
        values: shape (n,), finite.
        statistic: maps an array to a number; called with `axis=-1` if it takes `axis`.
        seed: of the resampling.
        resamples: number of resamples.
        confidence: in (0, 1).
    """
    array = _finite(values, "the values to bootstrap")
    if len(array) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(statistic(array))
    if len(array) == 1:
        return Estimate(value, math.nan, math.nan, 1)
    if np.ptp(array) == 0:  # no spread to resample; the accelerated interval would be 0/0
        return Estimate(value, value, value, len(array))
    for method in ("BCa", "percentile"):
        with np.errstate(all="ignore"):
            interval = _interval(array, statistic, method, seed=seed, resamples=resamples, confidence=confidence)
        if np.isfinite(interval).all():
            break
    return Estimate(value, *interval, len(array))


def _interval(
    array: NDArray[np.float64], statistic: Statistic, method: str, *, seed: int, resamples: int, confidence: float
) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # answered by the fall-back to percentiles
        result = stats.bootstrap(
            (array,),
            statistic,
            n_resamples=resamples,
            confidence_level=confidence,
            method=method,
            rng=np.random.default_rng(seed),
        )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def area_under_roc(positives: ArrayLike, negatives: ArrayLike) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs: the Mann-Whitney statistic, ties counted half.

    Args:
        positives: scores, shape (p,), higher = more positive.
        negatives: scores, shape (m,).

    Raises:
        DoriError: a group is empty or holds a number that is not finite.
    """
    positives, negatives = _groups(positives, negatives)
    ranks = stats.rankdata(np.concatenate([positives, negatives]))[: len(positives)].sum()
    p, m = len(positives), len(negatives)
    return float((ranks - p * (p + 1) / 2) / (p * m))


def _groups(positives: ArrayLike, negatives: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    groups = _finite(positives, "the positives' scores"), _finite(negatives, "the negatives' scores")
    if not all(len(group) for group in groups):
        raise DoriError("AUROC and TPR need at least one positive and one negative; give both groups")
    return groups


def auroc(positives: ArrayLike, negatives: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """AUROC with a Wilson-type interval after Newcombe; n counts both groups.

    Newcombe, Statistics in Medicine 25 (2006) 559, method 5: the theta with |A - theta| <= z sqrt(V(theta)), V being
    Hanley and McNeil's variance, taken at theta and not at the estimate: a perfect separation of few images has a
    wide interval, where the bootstrap's and DeLong's is the point 1.

    V = theta (1 - theta) [1 + (p - 1) a + (m - 1) b] / (p m),  a = (1 - theta) / (2 - theta),  b = theta / (1 + theta)

    or with p and m exchanged, whichever is larger. (Newcombe puts (p + m) / 2 for both, the same for equal groups; of
    12 and 60 skewed scores that interval covered the truth in 90 % of cases only, this one in 95 %.)

    Args:
        positives: scores, shape (p,), higher = more positive.
        negatives: scores, shape (m,).
        confidence: in (0, 1).

    Raises:
        DoriError: as `area_under_roc`.
    """
    positives, negatives = _groups(positives, negatives)
    return auroc_interval(area_under_roc(positives, negatives), len(positives), len(negatives), confidence=confidence)


def auroc_interval(value: float, positives: int, negatives: int, *, confidence: float = 0.95) -> Estimate:
    """The interval of `auroc` for an AUROC that is known; the counts are of images in each group, at least one."""
    p, m = positives, negatives
    z = float(stats.norm.ppf((1 + confidence) / 2))

    def excess(theta: float) -> float:
        a, b = (1 - theta) / (2 - theta), theta / (1 + theta)
        spread = max((p - 1) * a + (m - 1) * b, (m - 1) * a + (p - 1) * b)
        return (value - theta) ** 2 - z**2 * theta * (1 - theta) * (1 + spread) / (p * m)

    # A hair off the estimate, since at 0 and at 1 it is itself a root, and not the one that bounds the interval.
    low = optimize.brentq(excess, 0.0, value - 1e-9) if value > 0 else 0.0
    high = optimize.brentq(excess, value + 1e-9, 1.0) if value < 1 else 1.0
    return Estimate(value, float(low), float(high), p + m)


def threshold_at_fpr(negatives: ArrayLike, fpr: float) -> float:
    """The lowest threshold that at most a share `fpr` of the negatives exceeds (strictly).

    Args:
        negatives: scores, shape (m,).
        fpr: in [0, 1); with m < 1/fpr the threshold is the largest negative.

    Raises:
        DoriError: no negatives.
    """
    negatives = _groups([0.0], negatives)[1]
    allowed = math.floor(fpr * len(negatives) + 1e-9)  # 0.001 * 3000 is 3, whatever the last bit says
    return float(np.sort(negatives)[len(negatives) - 1 - allowed])


def tpr_at_fpr(positives: ArrayLike, negatives: ArrayLike, *, fpr: float = 0.001) -> float:
    """Share of the positives above `threshold_at_fpr(negatives, fpr)`; ties with it count as misses."""
    positives, negatives = _groups(positives, negatives)
    return float(np.mean(positives > threshold_at_fpr(negatives, fpr)))


def median_and_deviation(values: ArrayLike) -> tuple[float, float]:
    """Median and unscaled median absolute deviation, both with the mid-point for an even count.

    The published tables' "a +- b" (methods.md 6.2). Unscaled: multiply by 1.4826 for a normal sigma.
    """
    array = _finite(values, "the values")
    if len(array) == 0:
        return math.nan, math.nan
    median = float(np.median(array))
    return median, float(np.median(np.abs(array - median)))


def by_turns(pools: Iterable[Iterable[Item]]) -> list[Item]:
    """The first of every pool, then the second of every pool that has one, and so on."""
    turns = zip_longest(*pools, fillvalue=None)
    return [item for turn in turns for item in turn if item is not None]


def choose(count: int, limit: int | None) -> list[int]:
    """Indices of at most `limit` of `count` items, evenly spread over their order, first and last included."""
    if limit is None or limit >= count:
        return list(range(count))
    return [round(k * (count - 1) / max(1, limit - 1)) for k in range(limit)]
