"""Every eraser: deterministic in its seed, a model left as it was, its formula against a closed form or a reference."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_parts
from erasing import draw, forget, retain, weights

from dori.attack.dori import Dori
from dori.erase.adversarial import AdversarialErasure
from dori.erase.concept_ablation import ConceptAblation
from dori.erase.delta import CannotErase, WeightDelta
from dori.erase.erase_diff import EraseDiff, balance
from dori.erase.esd import Esd, negative_targets, partial_samples
from dori.erase.gradient_ascent import GradientAscent
from dori.erase.naive_deletion import NaiveDeletion
from dori.erase.ordinary import OrdinaryTraining
from dori.erase.pairs import denoising_losses, noised, ordinary_batch, prediction_losses, step_generator
from dori.erase.siss import Siss, as_released, importance_weights
from dori.erase.tuning import Tuner
from dori.erase.uce import Uce, closed_form, cross_projections
from dori.errors import DoriError
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion

FAST = Tuner(learning_rate=1e-3, rows_per_call=3)
ERASERS: dict[str, Any] = {
    "ordinary": OrdinaryTraining(steps=2, batch=4, tuner=FAST),
    "naive": NaiveDeletion(steps=2, batch=4, tuner=FAST),
    "ascent": GradientAscent(steps=2, batch=4, stop_above=None, tuner=FAST),
    "erase_diff": EraseDiff(steps=2, batch=4, tuner=FAST),
    "siss": Siss(steps=2, batch=4, tuner=FAST),
    "siss_as_released": as_released(1000),
    "esd": Esd(steps=3, sampling_steps=3, tuner=Tuner(learning_rate=1e-3, part="cross_attention")),
    "concept_ablation": ConceptAblation(steps=2, batch=2, tuner=FAST),
    "uce": Uce(),
    "adversarial": AdversarialErasure(rounds=2, steps_per_round=2, batch=4, attack=Dori(steps=1, batch=1), tuner=FAST),
}
ERASERS["adversarial_paper"] = ERASERS["adversarial"].paper()
ERASERS["siss_as_released"] = Siss(steps=2, batch=4, timesteps=as_released(1000).timesteps, tuner=FAST)
every_eraser = pytest.mark.parametrize("eraser", ERASERS.values(), ids=ERASERS.keys())
Eraser = Callable[..., WeightDelta]


@every_eraser
def test_the_edit_depends_on_the_seed_alone_and_leaves_no_trace(eraser: Eraser, tiny: StableDiffusion) -> None:
    before, state = model_fingerprint(tiny), torch.get_rng_state()
    first, again, other = (eraser(tiny, forget(tiny), retain(tiny), seed=seed) for seed in (3, 3, 4))
    assert model_fingerprint(tiny) == before and torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in tiny.unet.parameters())
    assert first.fingerprint == again.fingerprint and first.size > 0
    assert (first.fingerprint == other.fingerprint) == isinstance(eraser, Uce)
    assert first.details["method"] == type(eraser).__name__ and first.details["seed"] == 3


@every_eraser
def test_the_model_is_restored_when_an_eraser_is_interrupted(eraser: Eraser, tiny: StableDiffusion) -> None:
    before = model_fingerprint(tiny)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = tiny.unet.conv_out.register_forward_hook(stop)
    if not isinstance(eraser, Uce):  # it never asks the network
        with pytest.raises(KeyboardInterrupt):
            eraser(tiny, forget(tiny), retain(tiny), seed=0)
    handle.remove()
    assert model_fingerprint(tiny) == before


def test_what_an_eraser_needs_is_said_in_one_sentence(tiny: StableDiffusion) -> None:
    bare, poor = forget(tiny, texts=("a", None)), forget(tiny, surrogates=0)
    for name in ("esd", "concept_ablation", "uce"):
        with pytest.raises(DoriError, match="'m1' has no text"):
            ERASERS[name](tiny, bare, retain(tiny), seed=0)
    for name in ("naive", "siss", "concept_ablation", "adversarial_paper"):
        with pytest.raises(DoriError, match=r"of memory 'm0' .* none could be made"):
            ERASERS[name](tiny, poor, retain(tiny), seed=0)


@every_eraser
def test_rows_are_planned_as_they_are_used(eraser: Any, tiny: StableDiffusion) -> None:
    before, planned = tiny.rows, eraser.rows(3)
    edit = eraser(tiny, forget(tiny), retain(tiny), seed=0)
    used = tiny.rows - before
    assert edit.details["rows"] == used and planned.count >= used
    if not isinstance(eraser, Esd):  # its samples stop at steps drawn at random
        assert planned.count == used
    moved = {True: planned.trained > 0, False: edit.details["updates"] == 0}
    assert moved[not isinstance(eraser, Uce)]


@every_eraser
def test_those_that_need_no_surrogates_say_so_truly(eraser: Any, tiny: StableDiffusion) -> None:
    poor, rich = forget(tiny, surrogates=0), forget(tiny)
    if eraser.needs_surrogates:
        with pytest.raises(CannotErase, match="'m0'"):
            eraser(tiny, poor, retain(tiny), seed=0)
    else:
        found = [eraser(tiny, memories, retain(tiny), seed=0).fingerprint for memories in (poor, rich)]
        assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_prediction_losses_are_the_models_own_errors(prediction: str, tmp_path) -> None:  # noqa: ANN001
    model = StableDiffusion(**tiny_parts(tmp_path, prediction), name="tiny")
    model.unet.double()
    batch = noised(model, draw(5, *model.latent_shape, seed=0), model.encode(list("abcde")), step_generator("t", 0, 0))
    noisy = model.add_noise(batch.latents, batch.noise, batch.timestep)
    with torch.no_grad():
        rows = torch.tensor([4, 0, 2])
        found = prediction_losses(model, noisy, batch.timestep, batch.embeddings, batch.noise)(rows)
        expected = denoising_losses(model, batch)(rows)
    assert torch.allclose(found, expected, rtol=1e-6)


def test_a_tenth_of_ordinary_prompts_is_empty(tiny: StableDiffusion) -> None:
    pairs = retain(tiny)
    batch = ordinary_batch(tiny, pairs, 2000, step_generator("t", 0, 0))
    empty = (batch.embeddings == tiny.encode([""])).flatten(1).all(1)
    assert abs(float(empty.float().mean()) - 0.1) < 5 * (0.09 / 2000) ** 0.5
    own = (batch.embeddings[:, None] == pairs.embeddings).flatten(2).all(2)
    picked = (batch.latents[:, None] == pairs.latents).flatten(2).all(2)
    assert bool((own.any(1) | empty).all()) and torch.equal(own[~empty], picked[~empty])


# ----------------------------------------------------------------------------------------------------------- baselines


def test_siss_weights_are_the_density_ratios() -> None:
    keep, memory = draw(6, 1, 1, 2, seed=0).double(), draw(6, 1, 1, 2, seed=1).double()
    abar = torch.linspace(0.02, 0.9, 6).double()
    noisy = abar.sqrt()[:, None, None, None] * keep + 0.7 * draw(6, 1, 1, 2, seed=2).double()
    w_x, w_a = importance_weights(noisy, keep, memory, abar, mixing=0.3)
    for i in range(6):
        spread = (1 - abar[i]) * torch.eye(2).double()
        q = [
            torch.distributions.MultivariateNormal(abar[i].sqrt() * z[i].flatten(), spread)
            .log_prob(noisy[i].flatten())
            .exp()
            for z in (keep, memory)
        ]
        mixture = 0.7 * q[0] + 0.3 * q[1]
        assert w_x[i] == pytest.approx(float(q[0] / mixture), rel=1e-9)
        assert w_a[i] == pytest.approx(float(q[1] / mixture), rel=1e-9)
    assert torch.allclose(0.7 * w_x + 0.3 * w_a, torch.ones(6).double(), atol=1e-12)
    same = importance_weights(noisy, keep, keep, abar, mixing=0.3)
    assert torch.equal(same[0], same[1]) and torch.allclose(same[0], torch.ones(6).double())
    far_x, far_a = importance_weights(100 * noisy, keep, 1000 * memory, abar, mixing=0.3)  # no overflow
    assert torch.isfinite(far_x).all() and torch.isfinite(far_a).all()


def test_siss_estimates_the_two_term_loss_without_bias() -> None:
    """In two dimensions, with f(m) = m/2: the mixture's weighted mean equals each term's own mean."""
    generator, n = torch.Generator().manual_seed(0), 400_000
    abar, mixing = torch.full((n,), 0.4).double(), 0.5
    keep = torch.tensor([1.0, -0.5]).double().view(1, 1, 1, 2).expand(n, 1, 1, 2)
    memory = torch.tensor([0.2, 0.8]).double().view(1, 1, 1, 2).expand(n, 1, 1, 2)
    noise = torch.randn(n, 1, 1, 2, generator=generator).double()
    coin = torch.rand(n, 1, 1, 1, generator=generator) < mixing
    noisy = 0.4**0.5 * torch.where(coin, memory, keep) + 0.6**0.5 * noise
    for weight, image in zip(importance_weights(noisy, keep, memory, abar, mixing=mixing), (keep, memory), strict=True):
        loss = weight * (((noisy - 0.4**0.5 * image) / 0.6**0.5) - noisy / 2).square().sum((1, 2, 3))
        own = 0.4**0.5 * image + 0.6**0.5 * noise
        direct = (noise - own / 2).square().sum((1, 2, 3))
        error = float((loss.std() ** 2 / n + direct.std() ** 2 / n) ** 0.5)
        assert abs(float(loss.mean() - direct.mean())) < 5 * error


def test_siss_as_released_sees_the_last_timestep_alone(tiny: StableDiffusion) -> None:
    seen = []
    handle = tiny.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].clone()))
    ERASERS["siss_as_released"](tiny, forget(tiny), retain(tiny), seed=0)
    handle.remove()
    assert torch.cat(seen).unique().tolist() == [999]


def test_siss_brings_the_forget_gradient_to_its_share_or_to_a_fixed_norm(
    tiny: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    measured = Siss._gradient

    def noting(self: Siss, *given: Any) -> Any:
        gradient, loss = measured(self, *given)
        norms.append(float(torch.cat([g.double().flatten() for g in gradient]).norm()))
        return gradient, loss

    monkeypatch.setattr(Siss, "_gradient", noting)
    for settings in ({"forget_share": 0.3}, {"forget_norm": 750.0}):
        norms.clear()
        log = Siss(steps=2, batch=4, tuner=FAST, **settings)(tiny, forget(tiny), retain(tiny), seed=0).details["log"]
        for step, (keep, away) in zip(log, (norms[:2], norms[2:]), strict=True):
            # The norm is that of a loss summed over a latent's numbers; ours is their mean.
            size = math.prod(tiny.latent_shape)
            wanted = settings["forget_norm"] / size if "forget_norm" in settings else 0.3 * keep
            assert step["scale"] * away == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("rule", ["bome", "released"])
def test_erase_diff_balances_as_its_rule_says(rule: str) -> None:
    for seed in range(20):
        keep, memory = [draw(3, 2, seed=seed), draw(4, seed=50 + seed)], [draw(3, 2, seed=90 + seed), draw(4, seed=140)]
        weight = balance(keep, memory, eta=0.1, rule=rule)  # type: ignore[arg-type]
        r, f = (torch.cat([g.flatten() for g in gradient]).double() for gradient in (keep, memory))
        scale = f @ f if rule == "bome" else r.norm() * f.norm()
        assert weight == pytest.approx(max(0.0, 0.1 - float(r @ f / scale)), abs=1e-9)
        if rule == "bome":  # the memories' loss falls at least at the asked rate
            assert float(f @ (r + weight * f)) >= 0.1 * float(f @ f) - 1e-9
    assert balance([torch.ones(2)], [torch.zeros(2)], eta=0.1, rule=rule) == 0  # type: ignore[arg-type]


def test_gradient_ascent_climbs_and_stops(tiny: StableDiffusion) -> None:
    climbed = GradientAscent(steps=16, batch=6, stop_above=None, tuner=FAST)(tiny, forget(tiny), retain(tiny), seed=0)
    log = climbed.details["log"]
    assert len(log) == 16 and sum(log[-5:]) > sum(log[:5])
    stopped = GradientAscent(steps=30, batch=6, stop_above=0.0, tuner=FAST)(tiny, forget(tiny), retain(tiny), seed=0)
    assert len(stopped.details["log"]) == 1 and stopped.size == 0


def test_esd_targets_oppose_the_prompt(tiny: StableDiffusion) -> None:
    y, x, t = tiny.encode(["a", "bb"]), draw(2, *tiny.latent_shape, seed=0), torch.tensor([10, 700])
    with torch.no_grad():
        conditional, empty = tiny.predict_noise(x, t, y), tiny.predict_noise(x, t, tiny.encode(["", ""]))
    for eta in (0.0, 1.0, 2.0):
        found = negative_targets(tiny, x, t, y, eta=eta, rows_per_call=2)
        assert torch.allclose(found, (1 - eta) * conditional + eta * empty, atol=1e-5)


def test_partial_samples_are_points_of_the_trajectory(tiny: StableDiffusion) -> None:
    y = tiny.encode(["a", "bb", "c", "d"])
    x, t = partial_samples(tiny, y, torch.Generator().manual_seed(0), steps=4, guidance_scale=3.0, rows_per_call=4)
    generator = torch.Generator().manual_seed(0)
    stops = torch.randint(4, (4,), generator=generator)
    noise = torch.randn((4, *tiny.latent_shape), generator=generator)
    null = tiny.encode([""])
    for row in range(4):
        scheduler, z = tiny.ddim(4), noise[row : row + 1]
        for index in range(int(stops[row])):
            time = scheduler.timesteps[index]
            with torch.no_grad():
                e0, e1 = (tiny.predict_noise(z, time[None], c) for c in (null, y[row : row + 1]))
            z = scheduler.step(e0 + 3.0 * (e1 - e0), time, z).prev_sample
        assert torch.allclose(x[row], z[0], atol=1e-4) and t[row] == scheduler.timesteps[int(stops[row])]


def test_uce_solves_its_normal_equations() -> None:
    w, c, a, p = draw(5, 4, seed=0), draw(3, 4, seed=1), draw(3, 4, seed=2), draw(6, 4, seed=3)
    settings = {"ridge": 0.5, "erase_scale": 2.0, "preserve_scale": 0.3}
    found = closed_form(w, c, a, p, **settings)
    w, c, a, p = (x.double() for x in (w, c, a, p))
    variable = found.clone().requires_grad_()
    objective = (
        2.0 * (c @ variable.T - a @ w.T).square().sum()
        + 0.3 * (p @ (variable - w).T).square().sum()
        + 0.5 * (variable - w).square().sum()
    )
    (gradient,) = torch.autograd.grad(objective, variable)
    assert float(gradient.abs().max()) < 1e-10
    strong = closed_form(w, c[:1], a[:1], p[:0], ridge=1e-9, erase_scale=1.0, preserve_scale=1.0)
    assert torch.allclose(strong @ c[0], w @ a[0], atol=1e-6)  # the concept reads like its anchor


def test_uce_rewrites_the_last_words_of_prompts(tiny: StableDiffusion) -> None:
    memories, before = forget(tiny), weights(tiny)
    edit = Uce(ridge=1e-4, preserve_scale=0.0)(tiny, memories, retain(tiny), seed=0)
    assert {key.removesuffix(".weight") for key in edit.deltas} == set(cross_projections(tiny))
    empty = tiny.encode([""])[0]
    for key, delta in edit.deltas.items():
        for row, text in enumerate(memories.texts):
            last = len(tiny.tokenizer(text).input_ids) - 2
            token = memories.embeddings[row, last]
            assert torch.allclose((before[key] + delta) @ token, before[key] @ empty[last], atol=2e-2)


def test_uce_moves_the_last_words_whatever_it_preserves(tiny: StableDiffusion) -> None:
    """Thousands of preserved tokens must not outweigh a few erased ones: at equal scales the weights would stay."""
    memories, before, empty = forget(tiny), weights(tiny), tiny.encode([""])[0]
    deltas = Uce()(tiny, memories, retain(tiny), seed=0).deltas
    left = []
    for key, delta in deltas.items():
        for row, text in enumerate(memories.texts):
            last = len(tiny.tokenizer(text).input_ids) - 2
            token, goal = memories.embeddings[row, last], before[key] @ empty[last]
            left.append(float(((before[key] + delta) @ token - goal).norm() / (before[key] @ token - goal).norm()))
    assert max(left) < 0.7


def test_concept_ablation_learns_the_anchors_prediction(tiny: StableDiffusion) -> None:
    memories = forget(tiny, surrogates=1)
    slow = ConceptAblation(steps=24, batch=6, prior_weight=0.0, tuner=Tuner(learning_rate=3e-3))
    log = slow(tiny, memories, retain(tiny), seed=0).details["log"]
    assert sum(log[-6:]) < 0.7 * sum(log[:6])
    same = ConceptAblation(steps=1, batch=6, prior_weight=0.0)(tiny, forget_with_own_anchor(tiny), retain(tiny), seed=0)
    assert same.details["log"][0] < 1e-10  # anchor and target alike: nothing to learn


def forget_with_own_anchor(model: StableDiffusion):  # noqa: ANN201
    """Memories whose anchors are their own prompts."""
    import dataclasses

    memories = forget(model)
    return dataclasses.replace(memories, anchors=memories.texts)


def test_naive_deletion_lowers_the_surrogates_loss(tiny: StableDiffusion) -> None:
    log = NaiveDeletion(steps=24, batch=6, tuner=FAST)(tiny, forget(tiny), retain(tiny), seed=0).details["log"]
    assert sum(log[-8:]) < sum(log[:8])
