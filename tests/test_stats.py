"""Promises of dori.stats, against closed forms, brute force and simulation."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats as reference

from dori import stats
from dori.errors import DoriError


def test_wilson_agrees_with_scipy() -> None:
    for successes, n in ((0, 5), (3, 10), (56, 112), (112, 112)):
        expected = reference.binomtest(successes, n).proportion_ci(0.95, method="wilson")
        estimate = stats.wilson(successes, n)
        assert estimate.value == successes / n
        assert estimate.n == n
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (stats.wilson(0, 7).low, stats.wilson(7, 7).high) == (0, 1)
    assert stats.wilson(6, 12).low < stats.wilson(1.5, 3).value == 0.5 < stats.wilson(6, 12).high


def test_wilson_covers_the_true_share_about_as_often_as_it_says() -> None:
    n = 40
    intervals = np.array([[e.low, e.high] for e in (stats.wilson(k, n) for k in range(n + 1))])
    for share in (0.05, 0.3, 0.5, 0.9):
        drawn = np.random.default_rng(0).binomial(n, share, 20_000)
        covered = ((intervals[drawn, 0] <= share) & (share <= intervals[drawn, 1])).mean()
        assert 0.91 < covered < 0.99


def test_wilson_of_no_trials_knows_nothing() -> None:
    estimate = stats.wilson(0, 0)
    assert math.isnan(estimate.value)
    assert (estimate.low, estimate.high, estimate.n) == (0.0, 1.0, 0)


def test_bootstrap_of_the_mean_agrees_with_the_t_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, 200)
    estimate = stats.bootstrap(values, np.mean, seed=0)
    half = reference.t.ppf(0.975, 199) * values.std(ddof=1) / math.sqrt(200)
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06)


def test_bootstrap_depends_on_its_seed_alone() -> None:
    values = np.random.default_rng(2).normal(size=30)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = stats.bootstrap(values, seed=4)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002 (the global generator was not read)
    assert stats.bootstrap(values, seed=4) == first
    assert stats.bootstrap(values, seed=5) != first


def test_bootstrap_median_covers_the_true_median() -> None:
    rng = np.random.default_rng(3)
    estimates = [stats.bootstrap(rng.exponential(size=60), seed=i, resamples=400) for i in range(150)]
    assert np.mean([e.low <= math.log(2) <= e.high for e in estimates]) > 0.88


@pytest.mark.filterwarnings("error")
def test_bootstrap_answers_degenerate_samples() -> None:
    constant = stats.bootstrap([0.7] * 5, seed=0)
    assert (constant.value, constant.low, constant.high, constant.n) == (0.7, 0.7, 0.7, 5)
    single = stats.bootstrap([0.7], seed=0)
    assert single.value == 0.7
    assert math.isnan(single.low)
    assert stats.bootstrap([], seed=0).n == 0
    nearly = stats.bootstrap([0.0] * 9 + [1.0], seed=0)  # the jackknife of this median has no spread
    assert 0.0 <= nearly.low <= nearly.high <= 1.0
    with pytest.raises(DoriError, match="finite"):
        stats.bootstrap([0.1, math.nan], seed=0)


def test_area_under_roc_counts_pairs_and_half_ties() -> None:
    rng = np.random.default_rng(0)
    positives, negatives = rng.integers(0, 6, 23), rng.integers(0, 5, 31)
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives]
    assert stats.area_under_roc(positives, negatives) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert stats.area_under_roc([1, 1], [1, 1, 1]) == 0.5


@pytest.mark.parametrize(("p", "m", "truth"), [(8, 8, 0.76), (8, 8, 0.95), (8, 8, 0.99), (28, 8, 0.9), (12, 60, 0.97)])
@pytest.mark.parametrize("family", ["normal", "exponential"])
def test_auroc_interval_covers_the_truth_as_often_as_it_says(family: str, p: int, m: int, truth: float) -> None:
    rng = np.random.default_rng(5)
    if family == "normal":  # P(x > y) = Phi(d / sqrt 2)
        shift = reference.norm.ppf(truth) * math.sqrt(2)
        draws = [(rng.normal(shift, 1, p), rng.normal(0, 1, m)) for _ in range(300)]
    else:  # P(x > y) = s / (s + 1) for scales s and 1
        draws = [(rng.exponential(truth / (1 - truth), p), rng.exponential(1, m)) for _ in range(300)]
    estimates = [stats.auroc(*groups) for groups in draws]
    covered = np.mean([e.low <= truth <= e.high for e in estimates])
    assert covered > 0.9  # 300 draws; the interval itself covers 93 % at worst, at the steepest of these
    assert all(e.low <= e.value <= e.high and e.n == p + m for e in estimates)


def test_auroc_of_a_perfect_separation_is_as_wide_as_its_groups_are_small() -> None:
    lows = [stats.auroc(np.arange(n) + 1000.0, np.arange(n)).low for n in (1, 2, 8, 24, 200)]
    assert lows == sorted(lows)
    assert lows[0] < 0.5
    theta = lows[2]  # the root by hand: (1 - theta)^2 = z^2 V(theta), N = 8
    variance = theta * (1 - theta) * (1 + 7 * ((1 - theta) / (2 - theta) + theta / (1 + theta))) / 64
    assert (1 - theta) ** 2 == pytest.approx(reference.norm.ppf(0.975) ** 2 * variance, rel=1e-6)
    assert 0.7 < theta < 0.8
    upside_down = stats.auroc(np.arange(8.0), np.arange(8) + 100.0)
    assert (upside_down.low, upside_down.value, upside_down.high) == pytest.approx((0, 0, 1 - theta))


def test_auroc_needs_both_groups() -> None:
    with pytest.raises(DoriError, match="one positive and one negative"):
        stats.auroc([], [1.0])


def test_threshold_at_fpr_is_the_lowest_that_keeps_the_rate() -> None:
    rng = np.random.default_rng(6)
    for negatives in (rng.normal(size=1000), rng.integers(0, 20, 1000).astype(float)):
        for fpr in (0.0, 0.001, 0.01, 0.25):
            threshold = stats.threshold_at_fpr(negatives, fpr)
            assert (negatives > threshold).mean() <= fpr
            lower = negatives[negatives < threshold]
            assert (negatives > lower.max()).mean() > fpr


def test_threshold_at_fpr_survives_the_last_bit() -> None:
    negatives = np.arange(3000.0)
    assert (negatives > stats.threshold_at_fpr(negatives, 0.001)).sum() == 3
    assert (np.arange(1000.0) > stats.threshold_at_fpr(np.arange(1000.0), 0.29)).sum() == 290


def test_tpr_at_fpr_counts_ties_with_the_threshold_as_misses() -> None:
    assert stats.tpr_at_fpr([1.0, 2.0, 3.0, 3.0], [0.0, 2.0], fpr=0.001) == 0.5


def test_median_and_deviation_by_hand() -> None:
    assert stats.median_and_deviation([1, 2, 4, 9]) == (3.0, 1.5)  # deviations 2, 1, 1, 6
    assert math.isnan(stats.median_and_deviation([])[0])


@pytest.mark.parametrize(("count", "limit"), [(0, None), (5, None), (5, 9), (10, 4), (240, 8), (7, 1), (2, 2)])
def test_chosen_items_are_spread_and_different(count: int, limit: int | None) -> None:
    chosen = stats.choose(count, limit)
    assert len(chosen) == len(set(chosen)) == (count if limit is None else min(count, limit))
    assert chosen == sorted(chosen)
    if len(chosen) > 1:
        assert chosen[0] == 0 and chosen[-1] == count - 1
        gaps = {b - a for a, b in pairwise(chosen)}
        assert max(gaps) - min(gaps) <= 1


def test_pools_are_gone_through_by_turns() -> None:
    assert stats.by_turns([[0, 1, 2], [], [3], [4, 5]]) == [0, 3, 4, 1, 5, 2]
    assert stats.by_turns([]) == []
