"""Promises of dori.stats, against closed forms, brute force and simulation."""

import math

import numpy as np
import pytest
from scipy import stats as reference

from dori import stats
from dori.errors import DoriError


def test_wilson_is_the_closed_form() -> None:
    for successes, n in ((0, 5), (3, 10), (56, 112), (112, 112)):
        z, p = reference.norm.ppf(0.975), successes / n
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        estimate = stats.wilson(successes, n)
        assert estimate.value == p
        assert estimate.n == n
        assert (estimate.low, estimate.high) == pytest.approx((centre - half, centre + half), abs=1e-12)


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


def test_auroc_interval_covers_the_normal_closed_form() -> None:
    truth = reference.norm.cdf(1 / math.sqrt(2))  # unit normals one apart
    rng = np.random.default_rng(5)
    estimates = [stats.auroc(rng.normal(1, 1, 40), rng.normal(0, 1, 40), seed=i, resamples=150) for i in range(40)]
    assert np.mean([e.low <= truth <= e.high for e in estimates]) > 0.85
    assert all(e.low <= e.value <= e.high and e.n == 80 for e in estimates)
    assert math.isnan(stats.auroc([1.0], [0.0, 0.1], seed=0).low)


def test_auroc_needs_both_groups() -> None:
    with pytest.raises(DoriError, match="one positive and one negative"):
        stats.auroc([], [1.0], seed=0)


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
