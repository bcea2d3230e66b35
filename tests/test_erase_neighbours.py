"""Neighbours of the erased captions: what they are, which are taught, and that L_Near holds them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from erasing import DESCRIPTOR, cases, forget, retain
from test_erase_command import PLAN, bench, material

from dori.attack.dori import Dori
from dori.audit.judge import Judge
from dori.erase.adversarial import AdversarialErasure
from dori.erase.delta import CannotErase
from dori.erase.neighbours import drawn_neighbours, neighbours
from dori.erase.pairs import Pairs, former_losses, noised
from dori.erase.tuning import Tuner, tuning
from dori.model.stable_diffusion import StableDiffusion
from dori.sampling import Sampling, initial_noise, named_seed, sample

SAMPLING = Sampling(2, 2.0)
HOLDING = AdversarialErasure(
    rounds=1,
    steps_per_round=3,
    batch=4,
    attack=Dori(steps=1, batch=1),
    retain_weight=0.0,
    unconditional_weight=0.0,
    near_weight=1.0,
    tuner=Tuner(learning_rate=1e-2, weight_decay=0.0),
)


def test_neighbours_differ_from_a_caption_in_one_word(tiny: StableDiffusion) -> None:
    texts, words = ["red fox here", "one"], ["blue sky", "a tree"]
    found = neighbours(tiny, texts, words, each=5, seed=0)
    assert found and len(set(found)) == len(found) and found == neighbours(tiny, texts, words, each=5, seed=0)
    for text in found:
        best = min(
            sum(a != b for a, b in zip(text.split(), source.split(), strict=True))
            for source in texts
            if len(source.split()) == len(text.split())
        )
        assert best == 1
    assert neighbours(tiny, [], words, each=5, seed=0) == ()
    assert all(len(text) < 90 for text in neighbours(tiny, ["long " * 30, "one"], words, each=5, seed=0))


def test_what_shows_a_memory_is_not_taught(tiny: StableDiffusion) -> None:
    texts = ("ab cd", "ef gh", "ij kl")
    noise = initial_noise(tiny, [named_seed("neighbour", 3, text) for text in texts])
    latents = sample(tiny, tiny.encode(list(texts)), noise, steps=2, guidance_scale=2.0)
    shown = dataclasses.replace(cases(tiny, 1)[0], image=tiny.to_images(latents)[1])
    alike = DESCRIPTOR(tiny.to_images(latents)) @ DESCRIPTOR(shown.image[None]).T
    between = float(alike.flatten().sort().values[-2:].mean())  # all others lie below, the copy at 1
    settings = {"below": 1.0, "sampling": SAMPLING, "seed": 3}
    judge = dataclasses.replace(DESCRIPTOR, threshold=between)
    found = drawn_neighbours(tiny, texts, [shown], judge, **settings)
    assert torch.allclose(found.latents, latents[[0, 2]], atol=1e-5)
    assert torch.allclose(found.embeddings, tiny.encode([texts[0], texts[2]]))
    everything = drawn_neighbours(tiny, texts, [shown], dataclasses.replace(DESCRIPTOR, threshold=2.0), **settings)
    nothing = drawn_neighbours(tiny, texts, [shown], dataclasses.replace(DESCRIPTOR, threshold=-1.1), **settings)
    assert (len(everything), len(nothing)) == (3, 0)


def test_the_loss_on_neighbours_holds_the_model_where_it_was(tiny: StableDiffusion) -> None:
    near = dataclasses.replace(forget(tiny), near=retain(tiny))
    assert HOLDING(tiny, near, retain(tiny), seed=0).size == 0  # nothing else pulls, so nothing moves
    pulled = dataclasses.replace(HOLDING, unconditional_weight=1.0)
    for weight in (0.0, 1.0):
        made = dataclasses.replace(pulled, near_weight=weight)(tiny, near, retain(tiny), seed=0)
        assert (made.details["log"][-1]["near"] > 0) == (weight > 0)


def test_the_loss_on_neighbours_brings_a_moved_model_back(tiny: StableDiffusion) -> None:
    held = retain(tiny)
    batch = noised(tiny, held.latents, held.embeddings, torch.Generator().manual_seed(0))
    with tuning(tiny, Tuner(learning_rate=1e-2, weight_decay=0.0)) as tuned:
        assert tuned.gradient(former_losses(tuned, batch, batch.embeddings), 8)[1] == 0
        tuned.update([torch.ones_like(weight) for weight in tuned.weights.values()])
        losses = list[float]()
        for _ in range(30):
            gradient, loss = tuned.gradient(former_losses(tuned, batch, batch.embeddings), 8)
            tuned.update(gradient)
            losses.append(loss)
        assert losses[-1] < 0.2 * losses[0]


def test_an_erasure_that_shall_hold_neighbours_needs_some(tiny: StableDiffusion) -> None:
    none = Pairs(torch.zeros(0, *tiny.latent_shape), torch.zeros(0, *tiny.embedding_shape), "none")
    for near in (None, none):
        with pytest.raises(CannotErase, match="leave out near_weight"):
            HOLDING(tiny, dataclasses.replace(forget(tiny), near=near), retain(tiny), seed=0)


def test_taught_neighbours_are_drawn_once_and_cost_what_was_planned(tiny: StableDiffusion, tmp_path: Path) -> None:
    given = material(tiny)
    plan = dataclasses.replace(PLAN, adversarial=dataclasses.replace(PLAN.adversarial, near_weight=1.0))
    own = dataclasses.replace(bench(tmp_path, given, plan), judge=Judge(dataclasses.replace(DESCRIPTOR, threshold=2.0)))
    (planned,) = own.drawn_costs([plan.adversarial]).values()
    rows = tiny.rows
    found = own.forget([plan.adversarial]).near
    assert found is not None and tiny.rows - rows == planned.forward > 0
    taught = own.taught_neighbours()
    assert len(found) == len(taught) and torch.allclose(found.embeddings, tiny.encode(list(taught)).cpu())
    assert taught and own.judged_neighbours() and not set(taught) & set(own.judged_neighbours())
    rows = tiny.rows
    again = bench(tmp_path, given, plan)
    again = dataclasses.replace(again, judge=own.judge).forget([plan.adversarial])
    assert tiny.rows == rows and again.near is not None and again.near.source == found.source
    assert own.forget([PLAN.adversarial]).near is None and not own.drawn_costs([PLAN.adversarial])
    before = tiny.rows
    edit = own.edit("adversarial", plan.adversarial, again)
    assert tiny.rows - before == edit.details["rows"] == own.edit_rows(plan.adversarial).count
