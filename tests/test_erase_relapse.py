"""The attack on the weights in training: what it finds, where its loss is asked, and what training against it gives."""

import dataclasses

import pytest
import torch
from erasing import forget, retain

from dori.attack.dori import Dori
from dori.erase.adversarial import AdversarialErasure
from dori.erase.delta import CannotErase
from dori.erase.pairs import denoising_errors, denoising_losses, memory_batch, step_generator
from dori.erase.relapse import Relapse
from dori.erase.tuning import Tuner, chosen, tuning
from dori.model.stable_diffusion import StableDiffusion

ALONE = AdversarialErasure(  # the relapse's term and no other
    rounds=1,
    steps_per_round=1,
    batch=6,
    attack=Dori(steps=0),
    starts=("prompt",),
    retain_weight=0.0,
    unconditional_weight=0.0,
    relapse_weight=1.0,
    relapse=Relapse(steps=8, every=2, rate=4.0),
    tuner=Tuner(learning_rate=1e-3, weight_decay=0.0, clip=1e9),
)


def test_a_relapse_learns_the_memories_and_leaves_the_training_as_it_was(tiny: StableDiffusion) -> None:
    memories, relapse = forget(tiny), Relapse(steps=40, rate=5.0)
    asked = memory_batch(tiny, memories, 96, torch.Generator().manual_seed(9))
    before = {name: value.clone() for name, value in tiny.unet.state_dict().items()}
    with tuning(tiny, Tuner(learning_rate=2e-3)) as tuned:
        change, again = (relapse(tuned, memories, 6, seed=0, step=4) for _ in range(2))
        other = relapse(tuned, memories, 6, seed=0, step=5)
        assert all(torch.equal(value, before[name]) for name, value in tiny.unet.state_dict().items())
        assert not tuned.optimizer.state and tuned.steps == 0
        assert all(weight.grad is None for weight in tuned.weights.values())
        assert all(torch.equal(again[name], part) for name, part in change.items())
        assert any(not torch.equal(other[name], part) for name, part in change.items())
        known = float(denoising_errors(tiny, asked).mean())
        with tuned.moved(change):
            assert float(denoising_errors(tiny, asked).mean()) < 0.9 * known
        assert float(denoising_errors(tiny, asked).mean()) == known


def test_its_first_step_is_adams_along_the_sign_of_the_gradient(tiny: StableDiffusion) -> None:
    memories = forget(tiny)
    with tuning(tiny, Tuner(learning_rate=1e-3)) as tuned:
        change = Relapse(steps=1, rate=4.0)(tuned, memories, 6, seed=3, step=7)
        batch = memory_batch(tiny, memories, 6, step_generator("relapse", 3, 7))
        loss = denoising_losses(tiny, batch)(torch.arange(6)).mean()
        gradient = torch.autograd.grad(loss, list(tuned.weights.values()), allow_unused=True)
    seen = 0
    for part, grad in zip(change.values(), gradient, strict=True):
        if grad is not None:
            large = grad.abs() > 1e-4  # Adam's epsilon counts beside smaller ones
            seen += int(large.sum())
            assert torch.allclose(part[large], -4e-3 * grad[large].sign(), rtol=1e-2)
    assert seen > 100


def test_a_relapse_through_a_lora_learns_the_memories_by_low_rank_changes_of_attention(tiny: StableDiffusion) -> None:
    memories, relapse = forget(tiny), Relapse(steps=40, rate=30.0, part="lora")
    asked = memory_batch(tiny, memories, 96, torch.Generator().manual_seed(9))
    before = {name: value.clone() for name, value in tiny.unet.state_dict().items()}
    known = float(denoising_errors(tiny, asked).mean())
    with tuning(tiny, Tuner(learning_rate=2e-3, rank=2)) as tuned:
        change, again, other = (relapse(tuned, memories, 6, seed=0, step=step) for step in (4, 4, 5))
        assert all(torch.equal(value, before[name]) for name, value in tiny.unet.state_dict().items())
        assert all(torch.equal(again[name], part) for name, part in change.items())
        assert any(not torch.equal(other[name], part) for name, part in change.items())
        assert set(change) == set(chosen(tiny, "lora")) < set(tuned.weights)
        assert {int(torch.linalg.matrix_rank(part.double(), rtol=1e-4)) for part in change.values()} <= {0, 1, 2}
        with tuned.moved(change):
            assert float(denoising_errors(tiny, asked).mean()) < 0.9 * known
    with (
        tuning(tiny, Tuner(part="not_cross_attention")) as tuned,
        pytest.raises(CannotErase, match="no relapse of the part 'cross_attention' lies"),
    ):
        Relapse(part="cross_attention")(tuned, memories, 6, seed=0, step=0)


def test_the_loss_is_asked_on_relapsed_weights_and_the_step_taken_from_the_current_ones(tiny: StableDiffusion) -> None:
    """By hand: the gradient at theta + delta of the squared distance to the former prediction without a prompt."""
    memories = forget(tiny)
    made = ALONE(tiny, memories, retain(tiny), seed=0)
    with tuning(tiny, ALONE.tuner) as tuned:
        change = ALONE.relapse(tuned, memories, ALONE.batch, seed=0, step=0)
    batch = memory_batch(tiny, memories, ALONE.batch, step_generator("adversarial", 0, 0))
    noisy = tiny.add_noise(batch.latents, batch.noise, batch.timestep)
    with torch.no_grad():
        target = tiny.predict(noisy, batch.timestep, tiny.encode([""]).expand_as(batch.embeddings))
    weights = dict(tiny.unet.named_parameters())
    with torch.no_grad():
        for name, part in change.items():
            weights[name] += part
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = (tiny.predict(noisy, batch.timestep, batch.embeddings) - target).square().flatten(1).mean(1).mean()
    gradient = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    assert made.details["log"][0]["relapse"] == pytest.approx(float(loss.detach()), rel=1e-4)
    moved = 0
    for (name, _), grad in zip(weights.items(), gradient, strict=True):
        if grad is None or name not in made.deltas:
            continue
        large = grad.abs() > 1e-4
        moved += int(large.sum())
        assert torch.allclose(made.deltas[name][large], -1e-3 * grad[large].sign(), rtol=1e-2)
    assert moved > 100


def test_a_new_relapse_is_sought_each_round_and_after_so_many_updates(
    tiny: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = Relapse.__call__, list[tuple[int, float]]()

    def spy(self: Relapse, *given: object, step: int, **rest: object):  # noqa: ANN202
        seen.append((step, float(tiny.unet.conv_in.weight.detach().sum())))
        return original(self, *given, step=step, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Relapse, "__call__", spy)
    method = dataclasses.replace(ALONE, rounds=2, steps_per_round=3, retain_weight=1.0)
    before = tiny.rows
    method(tiny, forget(tiny), retain(tiny), seed=0)
    assert tiny.rows - before == method.rows(3).count
    assert [step for step, _ in seen] == [0, 2, 3, 5] and len({weight for _, weight in seen}) == 4
    seen.clear()
    dataclasses.replace(method, relapse_weight=0.0)(tiny, forget(tiny), retain(tiny), seed=0)
    assert not seen


def test_after_training_against_relapses_a_relapse_ends_farther_from_the_memories(tiny: StableDiffusion) -> None:
    """Farther than after the same training with relapses of 0 updates: the loss alone, without what it is asked at."""
    memories, found = forget(tiny), dict[int, float]()
    asked = memory_batch(tiny, memories, 96, torch.Generator().manual_seed(9))
    slow = dataclasses.replace(ALONE.tuner, learning_rate=5e-4)
    method = dataclasses.replace(ALONE, steps_per_round=40, unconditional_weight=1.0, retain_weight=1.0, tuner=slow)
    for steps in (0, 8):
        against = dataclasses.replace(
            method, relapse_weight=3.0, relapse=dataclasses.replace(ALONE.relapse, steps=steps)
        )
        made = against(tiny, memories, retain(tiny), seed=0)
        with made.applied(tiny), tuning(tiny, slow) as tuned:
            change = Relapse(steps=10, rate=4.0)(tuned, memories, 6, seed=77, step=0)
            with tuned.moved(change):
                found[steps] = float(denoising_errors(tiny, asked).mean())
    assert found[8] > 1.02 * found[0]
