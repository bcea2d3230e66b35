"""Weights set back to a twin's values: which ones, how many, and what is left of the difference."""

import copy

import pytest
import torch

from dori.locality.undone import AT_RANDOM, MOST_CHANGED, taken_back
from dori.model.stable_diffusion import StableDiffusion


def noisy(model: StableDiffusion, seed: int) -> StableDiffusion:
    """The model with another unet, every weight moved."""
    other, generator = copy.copy(model), torch.Generator().manual_seed(seed)
    other.unet = copy.deepcopy(model.unet)
    with torch.no_grad():
        for weight in other.unet.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return other


def flat(model: StableDiffusion) -> torch.Tensor:
    return torch.cat([weight.detach().double().flatten() for weight in model.unet.parameters()])


def test_the_weights_that_differ_most_get_the_twins_values_and_no_others(tiny: StableDiffusion) -> None:
    twin, before = noisy(tiny, 3), flat(tiny)
    squares = (flat(twin) - before).square()
    order = squares.argsort(descending=True)  # brute force, float64
    for part in taken_back(tiny, twin, (0.01, 0.3, 1.0), chosen=MOST_CHANGED, seed=0):
        first = order[: round(part.share * len(order))]
        with part.edit.applied(tiny):
            after = flat(tiny)
        assert torch.equal((after != before).nonzero().flatten(), first.sort().values)
        torch.testing.assert_close(after[first], flat(twin)[first], rtol=1e-6, atol=1e-7)
        assert part.held == pytest.approx(float(squares[first].sum() / squares.sum()), rel=1e-4)
        assert part.edit.size == len(first)
    assert torch.equal(flat(tiny), before)


def test_random_parts_are_as_large_grow_into_one_another_and_hold_their_share(tiny: StableDiffusion) -> None:
    twin, shares = noisy(tiny, 4), (0.1, 0.3)

    def chosen(seed: int) -> list[torch.Tensor]:
        found = []
        for part in taken_back(tiny, twin, shares, chosen=AT_RANDOM, seed=seed):
            assert part.held == pytest.approx(part.share, rel=0.05)
            with part.edit.applied(tiny):
                found.append(flat(tiny))
        return [after != flat(tiny) for after in found]

    small, large = chosen(1)
    size = len(small)
    assert (int(small.sum()), int(large.sum())) == (round(0.1 * size), round(0.3 * size))
    assert not (small & ~large).any() and torch.equal(chosen(1)[0], small) and not torch.equal(chosen(2)[0], small)


def test_a_twin_that_is_the_model_leaves_nothing_to_take_back(tiny: StableDiffusion) -> None:
    (part,) = taken_back(tiny, tiny, (0.5,), chosen=MOST_CHANGED, seed=0)
    assert (part.held, part.edit.size) == (0, 0)
