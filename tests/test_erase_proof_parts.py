"""The parts of the proof: an equivalence test of the stated size, relearning, and latents with their likelihood."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from erasing import draw, weights
from scipy import stats

from dori.erase.equivalence import equivalence
from dori.erase.latent_attack import LatentAttack, norm_positions
from dori.erase.premise import Unprompted, unprompted_contrast
from dori.erase.relearn import Relearning
from dori.erase.tuning import Tuner
from dori.erase.unprompted import unprompted_errors
from dori.erase.verdict import between_looks
from dori.errors import DoriError
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.sampling import initial_noise, sample


def test_the_test_agrees_with_two_welch_tests() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.02, 0.1, 30), rng.normal(0.0, 0.2, 20)
    found = equivalence("x", a, b, margin=0.15)
    above = stats.ttest_ind(a + 0.15, b, equal_var=False, alternative="greater").pvalue
    below = stats.ttest_ind(a - 0.15, b, equal_var=False, alternative="less").pvalue
    assert found.p == pytest.approx(max(above, below), rel=1e-9)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.90)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.shown == (found.low > -0.15 and found.high < 0.15)


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("shape", ["normal", "skewed", "censored"])
def test_its_size_at_the_margin_is_the_level(side: int, shape: str) -> None:
    """Simulated at the border of equivalence, where a claim is wrong: it is made in at most 5 % of samples."""
    rng, runs, margin = np.random.default_rng(1), 3000, 0.5

    def drawn(n: int, mean: float) -> np.ndarray:
        if shape == "normal":
            return rng.normal(mean, 1.0, n)
        if shape == "skewed":
            return mean + rng.exponential(1.0, n) - 1.0
        # Steps to relearn, capped, in units that put the mean of the capped steps at `mean`.
        capped = np.minimum(np.round(rng.exponential(3.0, n)), 8.0)
        return mean + capped

    claims = sum(equivalence("x", drawn(32, side * margin), drawn(32, 0.0), margin=margin).shown for _ in range(runs))
    rate = claims / runs
    assert rate < 0.05 + 4 * (0.05 * 0.95 / runs) ** 0.5
    if shape == "normal":  # and not far below: it is a test of that size, not one that never claims
        power = (
            sum(
                equivalence("x", rng.normal(0, 0.2, 32), rng.normal(0, 0.2, 32), margin=margin).shown
                for _ in range(100)
            )
            / 100
        )
        assert power > 0.95 and rate > 0.02


@pytest.mark.parametrize("look", [5, 6])
@pytest.mark.parametrize("middle", [14.0, 30.0])
@pytest.mark.parametrize("factor", [1.5, 1 / 1.5])
def test_the_ratio_of_steps_keeps_its_level_though_looks_are_rare(look: int, middle: float, factor: float) -> None:
    """At the border memories need 1.5 times as many steps as controls, or as few; all are seen at the next look."""
    rng, runs = np.random.default_rng(2), 1500

    def logarithms(steps: float) -> np.ndarray:
        seen = np.ceil(rng.lognormal(math.log(steps), 0.25, 20) / look) * look
        return np.log([between_looks(value, look) for value in seen])

    def claimed() -> bool:
        groups = logarithms(factor * middle), logarithms(middle)
        return equivalence("x", *groups, margin=math.log(1.5), least_variance=look**2 / 12 / middle**2).shown

    assert sum(claimed() for _ in range(runs)) / runs < 0.09


def test_both_directions_count_and_no_spread_is_said() -> None:
    rng = np.random.default_rng(2)
    group = rng.normal(0, 0.01, 20)
    for shift in (-0.3, 0.3):
        found = equivalence("x", group + shift, group, margin=0.1)
        assert not found.shown and found.excluded
    same = equivalence("x", [3.0, 3.0], [3.0, 3.0], margin=0.1)
    assert not same.shown and not same.spread  # two images that agree show nothing
    apart = equivalence("x", [3.0, 3.0], [2.0, 2.0], margin=0.1)
    assert not apart.shown and apart.excluded
    # On a grid of 5, images on one point still differ by what it rounds away: 25/12 each.
    grid = equivalence("x", [20.0] * 8, [20.0] * 8, margin=6, least_variance=25 / 12)
    half = float(stats.t.ppf(0.95, 14)) * (2 * 25 / 12 / 8) ** 0.5
    assert (grid.low, grid.high) == pytest.approx((-half, half)) and grid.shown and grid.spread
    assert not equivalence("x", [20.0] * 2, [20.0] * 2, margin=6, least_variance=25).shown
    assert equivalence("x", [1.0, 9.0], [2.0, 8.0], margin=1, least_variance=0.1) == equivalence(
        "x", [1.0, 9.0], [2.0, 8.0], margin=1
    )
    for bad in (([1.0], [1.0, 2.0], 0.1), ([1.0, np.nan], [1.0, 2.0], 0.1), ([1.0, 1.0], [1.0, 2.0], 0.0)):
        with pytest.raises(DoriError, match="at least two"):
            equivalence("x", bad[0], bad[1], margin=bad[2])


def test_relearning_lowers_the_loss_looks_when_told_and_restores(tiny: StableDiffusion) -> None:
    latent, embedding, before = draw(*tiny.latent_shape, seed=0), tiny.encode(["a"])[0], model_fingerprint(tiny)
    seen: list[torch.Tensor] = []

    def look() -> tuple[float, ...]:
        seen.append(weights(tiny)["conv_in.weight"])
        return (0.1 * len(seen),)

    method = Relearning(steps=7, batch=2, check_every=3, tuner=Tuner(learning_rate=1e-3))
    curve = method(tiny, latent, embedding, seed=0, look=look, enough=lambda values: False)
    assert list(curve) == [0, 3, 6, 7] and model_fingerprint(tiny) == before
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))
    curve = method(tiny, latent, embedding, seed=0, look=lambda: (0.9,), enough=lambda values: values[0] > 0.5)
    assert list(curve) == [0]
    ruinous = dataclasses.replace(method, tuner=Tuner(learning_rate=1e25))
    curve = ruinous(tiny, latent, embedding, seed=0, look=lambda: (0.0,), enough=lambda values: False)
    assert list(curve) == [0] and model_fingerprint(tiny) == before  # it diverged, and nothing was raised


def test_a_latents_position_is_that_of_its_squared_norm() -> None:
    typical = draw(400, 3, 8, 8, seed=0)
    positions = norm_positions(typical)
    assert stats.kstest(positions.numpy(), "uniform").pvalue > 1e-3
    assert float(norm_positions(1.5 * typical).min()) > 0.999 and float(norm_positions(0.5 * typical).max()) < 0.001


def test_the_latent_attack_lowers_its_loss_and_keeps_to_the_sphere(tiny: StableDiffusion) -> None:
    targets, y = 0.5 * draw(3, *tiny.latent_shape, seed=1), tiny.encode(["a", "b", "c"])
    attack = LatentAttack(steps=12, sampling_steps=2, learning_rate=0.1, rows_per_call=2)
    found = attack(tiny, targets, y, seeds=[1, 2, 3])
    assert bool((found.losses[:, -1] < found.losses[:, 0]).all())
    alone = attack(tiny, targets[1:2], y[1:2], seeds=[2])
    assert torch.allclose(alone.latents[0], found.latents[1], atol=1e-3)
    first = sample(tiny, y, initial_noise(tiny, [1, 2, 3]), steps=2, guidance_scale=1.0)
    assert torch.allclose(found.losses[:, 0], (first - targets).square().flatten(1).mean(1), rtol=1e-3)
    guided = LatentAttack(steps=1, sampling_steps=2, guidance_scale=3.0)(tiny, targets, y, seeds=[1, 2, 3])
    first = sample(tiny, y, initial_noise(tiny, [1, 2, 3]), steps=2, guidance_scale=3.0)
    assert torch.allclose(guided.losses[:, 0], (first - targets).square().flatten(1).mean(1), rtol=1e-3)
    sphere = LatentAttack(steps=3, sampling_steps=2, on_sphere=True)(tiny, targets, y, seeds=[1, 2, 3])
    d = targets[0].numel()
    assert torch.allclose(sphere.latents.flatten(1).norm(dim=1), torch.full((3,), d**0.5), rtol=1e-4)


def test_the_error_without_a_prompt_depends_on_the_image_and_its_place_alone(tiny: StableDiffusion) -> None:
    latents = draw(3, *tiny.latent_shape, seed=4)
    whole = unprompted_errors(tiny, latents, seed=2)
    assert torch.allclose(whole, unprompted_errors(tiny, latents, seed=2, rows_per_call=5), rtol=1e-5)
    others = unprompted_errors(tiny, torch.cat([latents[:2], draw(1, *tiny.latent_shape, seed=9)]), seed=2)
    assert torch.allclose(whole[:2], others[:2], rtol=1e-5) and not torch.allclose(whole[2], others[2], rtol=1e-3)
    assert not torch.allclose(whole, unprompted_errors(tiny, latents, seed=3), rtol=1e-3)


def test_what_is_known_without_a_prompt_is_a_difference_in_differences() -> None:
    """Against Welch's interval; a shift of a whole model, or of all images of a model, takes itself off."""
    rng = np.random.default_rng(3)
    twins = {name: rng.normal(0.5, 0.1, 15) for name in ("a", "b")}
    own = np.concatenate([rng.normal(0.3, 0.1, 9), rng.normal(0.5, 0.1, 6)])

    def rows(shift: float) -> list[Unprompted]:
        values = {"original": own + shift} | twins
        return [
            Unprompted(state, f"i{k}", "memory" if k < 9 else "control", float(value))
            for state, errors in values.items()
            for k, value in enumerate(errors)
        ]

    found = unprompted_contrast(rows(0.0), "original", ["a", "b"])
    less = own - (twins["a"] + twins["b"]) / 2
    wanted = stats.ttest_ind(less[:9], less[9:], equal_var=False).confidence_interval(0.95)
    assert found.value == pytest.approx(less[:9].mean() - less[9:].mean()) and found.n == 9
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    moved = unprompted_contrast(rows(0.7), "original", ["a", "b"])
    assert (moved.value, moved.low, moved.high) == pytest.approx((found.value, found.low, found.high))
    alone = unprompted_contrast(rows(0.0), "original", [])
    assert alone.value == pytest.approx(own[:9].mean() - own[9:].mean())
    lost = [dataclasses.replace(one, error=None) if one.id == "i0" and one.state == "a" else one for one in rows(0.0)]
    assert unprompted_contrast(lost, "original", ["a", "b"]).n == 8
    assert np.isnan(unprompted_contrast([one for one in lost if one.group == "memory"], "original", []).value)
