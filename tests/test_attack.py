"""DoRI against its definition: gradient, independence of neighbours, restrictions, precision."""

import pytest
import torch

from dori.attack import dori
from dori.attack.dori import Dori, restarts
from dori.attack.starts import foreign, gaussian
from dori.model import stable_diffusion
from dori.model.stable_diffusion import StableDiffusion


def problem(model: StableDiffusion, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(5))
    return targets, gaussian(model, range(n))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_gradient_agrees_with_finite_differences_in_float64(tiny: StableDiffusion, prediction: str) -> None:
    tiny.unet.double()
    tiny.prediction_type = prediction
    targets, starts = problem(tiny, 1)
    attack = Dori(steps=1, batch=2)
    z, y = targets.double().repeat_interleave(2, 0), starts.double()

    def loss(embedding: torch.Tensor) -> torch.Tensor:
        return attack._loss(tiny, z, embedding, [torch.Generator().manual_seed(0)]).sum()

    point = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    directions = torch.randn(5, *y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for direction in directions:
        h = 1e-5
        slope = (loss(y + h * direction) - loss(y - h * direction)) / (2 * h)
        assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


def test_error_of_v_models_is_that_of_epsilon_over_the_signal(tiny: StableDiffusion) -> None:
    """With eps = sqrt(abar) v + sqrt(1 - abar) z_t the two errors differ by the factor abar alone."""
    tiny.unet.double()
    tiny.prediction_type = "v_prediction"
    z, noise = torch.randn(2, 3, *tiny.latent_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([5, 500, 990])
    y = gaussian(tiny, range(3)).double()
    eps = tiny.predict_noise(tiny.add_noise(z, noise, t), t, y)
    in_epsilon = (eps - noise).square().flatten(1).mean(1)
    ours = tiny.denoising_error(z, noise, t, y)
    assert torch.allclose(ours * tiny.alphas_cumprod[t], in_epsilon, rtol=1e-5)


def test_one_image_does_not_depend_on_its_neighbours(tiny: StableDiffusion) -> None:
    tiny.unet.double()  # Adam divides by the gradient's size: float32 rounding of a tiny gradient would show
    targets, starts = problem(tiny, 3)
    attack = Dori(steps=4, batch=2)
    together = attack(tiny, targets, starts, seeds=[1, 2, 3])
    for i in range(3):
        alone = attack(tiny, targets[i : i + 1], starts[i : i + 1], seeds=[i + 1])
        assert torch.allclose(alone.embeddings[0], together.embeddings[i], atol=1e-6)
        assert torch.allclose(alone.losses[0], together.losses[i], rtol=1e-6)


def test_chunks_and_repetition_change_nothing(tiny: StableDiffusion) -> None:
    tiny.unet.double()
    targets, starts = problem(tiny, 3)
    a = Dori(steps=3, batch=2)(tiny, targets, starts, seeds=[1, 2, 3])
    b = Dori(steps=3, batch=2)(tiny, targets, starts, seeds=[1, 2, 3])
    c = Dori(steps=3, batch=2, rows_per_call=2)(tiny, targets, starts, seeds=[1, 2, 3])
    assert torch.equal(a.embeddings, b.embeddings)
    assert torch.allclose(a.embeddings, c.embeddings, atol=1e-6)
    assert a.rows == c.rows == 3 * 3 * 2


def test_large_latents_are_attacked_and_decoded_in_smaller_calls(
    tiny: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight rows of Stable Diffusion's latents fit where 64 of the testbed's do, and four of its images at once."""
    assert dori.NUMBERS_PER_CALL // (4 * 64 * 64) == 8
    for side, images in ((16, 32), (64, 32), (512, 4), (2048, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(StableDiffusion, "image_side_px", side)
            assert tiny.images_per_call == images
    images = tiny.to_images(problem(tiny, 4)[0])
    monkeypatch.setattr(stable_diffusion, "VAE_PIXELS", 1)
    assert tiny.images_per_call == 1
    assert torch.allclose(tiny.to_images(problem(tiny, 4)[0]), images, atol=1e-5)
    tiny.unet.double()
    targets, starts = problem(tiny, 4)
    attack, sizes = Dori(steps=1, batch=2), list[int]()
    whole = attack(tiny, targets, starts, seeds=range(4))
    watch = tiny.unet.register_forward_hook(lambda _, inputs, output: sizes.append(len(inputs[0])))
    for numbers, calls in ((4 * 192, [4, 4]), (1, [2, 2, 2, 2])):
        monkeypatch.setattr(dori, "NUMBERS_PER_CALL", numbers)
        parts = attack(tiny, targets, starts, seeds=range(4))
        assert sizes == calls and torch.allclose(parts.embeddings, whole.embeddings, atol=1e-6)
        sizes.clear()
    watch.remove()


def test_attack_lowers_the_loss_on_fresh_noise(tiny: StableDiffusion) -> None:
    targets, starts = problem(tiny, 2)
    found = Dori(steps=40, batch=4)(tiny, targets, starts, seeds=[1, 2])
    judge = Dori(batch=64)
    z = targets.repeat_interleave(64, 0)
    with torch.no_grad():
        before, after = (
            judge._loss(tiny, z, y, [torch.Generator().manual_seed(s) for s in (90, 91)])
            for y in (starts, found.at(40))
        )
    assert (after < before).all()


def test_snapshots_are_prefixes_of_the_same_run(tiny: StableDiffusion) -> None:
    targets, starts = problem(tiny, 1)
    curve = Dori(steps=5, batch=2, snapshots=(0, 2, 5))(tiny, targets, starts, seeds=[1])
    short = Dori(steps=2, batch=2)(tiny, targets, starts, seeds=[1])
    assert torch.equal(curve.at(0), starts)
    assert torch.equal(curve.at(2), short.at(2))
    with pytest.raises(ValueError, match="ascend"):
        Dori(steps=5, snapshots=(0, 2))


def test_first_adam_step_moves_every_entry_by_the_learning_rate(tiny: StableDiffusion) -> None:
    targets, starts = problem(tiny, 1)
    moved = Dori(steps=1)(tiny, targets, starts, seeds=[1]).at(1) - starts
    assert (moved.abs().median() - 0.1).abs() < 1e-3


def test_restrictions_hold(tiny: StableDiffusion) -> None:
    targets, starts = problem(tiny, 2)
    positions = Dori(steps=3, batch=2, free_positions=(1, 4))(tiny, targets, starts, seeds=[1, 2]).at(3) - starts
    assert (positions[:, [1, 4]].abs() > 0).any()
    others = [i for i in range(starts.shape[1]) if i not in (1, 4)]
    assert (positions[:, others] == 0).all()
    ball = Dori(steps=3, batch=2, max_norm=0.5)(tiny, targets, starts, seeds=[1, 2]).at(3) - starts
    assert (ball.flatten(1).norm(dim=1) <= 0.5 + 1e-4).all()
    low = Dori(steps=3, batch=2, rank=1)(tiny, targets, starts, seeds=[1, 2]).at(3) - starts
    assert (torch.linalg.svdvals(low)[:, 1] < 1e-4).all()


def test_half_precision_models_keep_a_float32_embedding(tiny: StableDiffusion) -> None:
    tiny.unet.bfloat16()
    targets, starts = problem(tiny, 1)
    found = Dori(steps=2, batch=2)(tiny, targets, starts, seeds=[1])
    assert found.embeddings.dtype == torch.float32
    assert not torch.equal(found.at(2), starts)


def test_no_weight_no_gradient_and_no_global_generator_is_touched(tiny: StableDiffusion) -> None:
    before = {k: v.clone() for k, v in tiny.unet.state_dict().items()}
    state = torch.get_rng_state()
    targets, starts = problem(tiny, 1)
    Dori(steps=2, batch=2)(tiny, targets, starts, seeds=[1])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in tiny.unet.state_dict().items())
    assert all(p.grad is None for p in tiny.unet.parameters())


def test_restarts_keep_the_run_with_the_lowest_loss(tiny: StableDiffusion) -> None:
    targets, starts = problem(tiny, 2)
    attack = Dori(steps=3, batch=2)
    options = [starts, starts + 50 * torch.ones_like(starts)]
    best = restarts(attack, tiny, targets, options, seeds=[1, 2], last=3)
    runs = [attack(tiny, targets, o, seeds=[1 + 1_000_003 * k, 2 + 1_000_003 * k]) for k, o in enumerate(options)]
    for i in range(2):
        winner = min(runs, key=lambda run: run.losses[i].mean().item())
        assert torch.equal(best.embeddings[i], winner.embeddings[i])
    broken = [torch.full_like(starts, float("nan")), starts]
    kept = restarts(attack, tiny, targets, broken, seeds=[1, 2], last=3)
    assert torch.isfinite(kept.losses).all() and torch.isfinite(kept.embeddings).all()


def test_foreign_starts_are_embeddings_of_the_given_prompts(tiny: StableDiffusion) -> None:
    prompts = ["a b", "c d"]
    found = foreign(tiny, prompts, 6, seed=0)
    known = tiny.encode(prompts)
    assert all(any(torch.allclose(row, k) for k in known) for row in found)
