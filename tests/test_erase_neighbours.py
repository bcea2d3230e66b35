"""Neighbours of the erased captions: what they are, which are taught, and that L_Near holds them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from erasing import DESCRIPTOR, PLAN, bench, cases, forget, material, retain
from torch import Tensor

from dori.attack.dori import Dori
from dori.audit.judge import Judge
from dori.cost import Rows
from dori.erase.adversarial import AdversarialErasure
from dori.erase.battery import State
from dori.erase.cells import ANCHORS
from dori.erase.concept_ablation import ConceptAblation
from dori.erase.damage import Damage
from dori.erase.delta import CannotErase
from dori.erase.neighbours import drawn_neighbours, neighbours
from dori.erase.pairs import Pairs, former_losses, noised
from dori.erase.proof import gauge_of
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
    for caption in ("one two", " one  two"):  # the same to the tokenizer
        assert "one two" not in neighbours(tiny, [caption], ["one two three"], each=40, seed=0)
    apart = neighbours(tiny, texts, words, each=5, seed=0, apart_from=[found[0].upper(), f" {found[1]} "])
    assert apart == found[2:]  # those of the damage table, as the model reads them, are not taught
    both = neighbours(tiny, ["one two"], ["RED red"], each=40, seed=0)
    assert len(both) == 2 == len({text.lower() for text in both})
    assert all(len(text) < 90 for text in neighbours(tiny, ["long " * 30, "one"], words, each=5, seed=0))


def test_a_neighbour_that_shows_a_memory_under_any_seed_is_not_taught(tiny: StableDiffusion) -> None:
    texts = ("ab cd", "ef gh", "ij kl")
    noise = initial_noise(tiny, [named_seed("neighbour", 3, text, k) for text in texts for k in range(3)])
    y = tiny.encode(list(texts)).repeat_interleave(3, 0)
    latents = sample(tiny, y, noise, steps=2, guidance_scale=2.0)
    images = tiny.to_images(latents)
    shown = dataclasses.replace(cases(tiny, 1)[0], image=images[4])  # the second text's, under one of three seeds
    alike = (DESCRIPTOR(images) @ DESCRIPTOR(shown.image[None]).T).flatten()
    between = float(alike.sort().values[-2:].mean())  # all others lie below, the copy at 1

    def found(threshold: float, below: float) -> tuple[Tensor, Tensor]:
        judge = dataclasses.replace(DESCRIPTOR, threshold=threshold)
        return drawn_neighbours(tiny, texts, [shown], judge, below=below, sampling=SAMPLING, seed=3).kept()

    for kept in (found(between, 1.0), found(4 * between, 0.25)):  # likeness is a share of the threshold
        assert torch.allclose(kept[0], latents[[0, 1, 2, 6, 7, 8]], atol=1e-5)
        assert torch.allclose(kept[1], y[[0, 1, 2, 6, 7, 8]])
    assert [len(found(threshold, 1.0)[0]) for threshold in (2.0, -1.1)] == [9, 0]


def test_the_loss_on_neighbours_holds_the_model_where_it_was(tiny: StableDiffusion) -> None:
    held = retain(tiny)
    near = dataclasses.replace(forget(tiny), near=held)
    assert HOLDING(tiny, near, retain(tiny), seed=0).size == 0  # nothing else pulls, so nothing moves
    slow = dataclasses.replace(HOLDING.tuner, learning_rate=1e-3)
    pulled = dataclasses.replace(HOLDING, unconditional_weight=1.0, steps_per_round=24, tuner=slow)
    t = torch.arange(8) * 12
    drift = dict[float, float]()
    for weight in (0.0, 9.0):
        made = dataclasses.replace(pulled, near_weight=weight)(tiny, near, retain(tiny), seed=0)
        assert (made.details["log"][-1]["near"] > 0) == (weight > 0)
        with torch.no_grad():
            before = tiny.predict_noise(held.latents, t, held.embeddings)
            with made.applied(tiny):
                moved = tiny.predict_noise(held.latents, t, held.embeddings)
        drift[weight] = float((moved - before).square().mean())
    assert drift[9.0] < 0.9 * drift[0.0]


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
    for near, word in ((None, "none were drawn"), (none, "none that shows no memory")):
        with pytest.raises(CannotErase, match=word):
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
    wanted = tiny.encode(list(taught)).cpu().repeat_interleave(3, 0)
    assert torch.allclose(found.embeddings, wanted)
    assert taught and own.judged_neighbours() and not set(taught) & set(own.judged_neighbours())
    rows = tiny.rows
    again = bench(tmp_path, given, plan)
    again = dataclasses.replace(again, judge=own.judge).forget([plan.adversarial])
    assert tiny.rows == rows and again.near is not None and again.near.source == found.source
    assert own.forget([PLAN.adversarial]).near is None and not own.drawn_costs([PLAN.adversarial])
    before = tiny.rows
    edit = own.edit("adversarial", plan.adversarial, again)
    assert tiny.rows - before == edit.details["rows"] == own.edit_rows(plan.adversarial).count


def test_an_anchor_is_the_longest_short_prompt_that_shows_no_memory(tiny: StableDiffusion, tmp_path: Path) -> None:
    given, search = material(tiny), PLAN.surrogates
    first, second = given.subjects.memories
    first = dataclasses.replace(first, memory=dataclasses.replace(first.memory, text="ab cd ef gh"))
    seed = named_seed("anchors", PLAN.seed)
    noise = initial_noise(tiny, [named_seed("neighbour", seed, "ab cd", 1)])
    guided = {"steps": search.sampling_steps, "guidance_scale": search.guidance_scale}
    (image,) = tiny.to_images(sample(tiny, tiny.encode(["ab cd"]), noise, **guided))
    second = dataclasses.replace(second, image=image)  # half of the first one's prompt shows the second
    subjects = dataclasses.replace(given.subjects, memories=(first, second))
    given = dataclasses.replace(given, subjects=subjects)

    def anchors(threshold: float, below: float) -> tuple[str | None, ...]:
        plan = dataclasses.replace(PLAN, surrogates=dataclasses.replace(search, below_target=below))
        own = bench(tmp_path, given, plan)
        own = dataclasses.replace(own, judge=Judge(dataclasses.replace(DESCRIPTOR, threshold=threshold)))
        planned, rows = own.drawn_costs([ConceptAblation()])[ANCHORS], tiny.rows
        found = own._anchors(own.forget([]).source)
        assert tiny.rows - rows == planned.forward > 0
        return found

    assert anchors(2.0, 1.0) == ("ab cd", "m") and anchors(0.9999, 1.0) == ("ab", "m")  # half of "m 1"
    assert anchors(-1.1, 1.0) == (None, None)
    without = dataclasses.replace(forget(tiny), anchors=("a", None, ""))
    with pytest.raises(CannotErase, match="memory 'm1'"):
        ConceptAblation()(tiny, without, retain(tiny), seed=0)
    noise = ConceptAblation(steps=1, target="noise")
    assert noise(tiny, without, retain(tiny), seed=0).size
    assert ANCHORS not in bench(tmp_path, given).drawn_costs([noise])
    assert bench(tmp_path, given).forget([PLAN.adversarial]).anchors == (None, None)


def test_damage_is_not_judged_by_neighbours_that_show_a_memory(tiny: StableDiffusion, tmp_path: Path) -> None:
    own, texts = bench(tmp_path, material(tiny)), ("ab cd", "ef gh", "ij kl")
    gauge = dataclasses.replace(gauge_of(own, PLAN.tables), near=texts)
    seed, p = named_seed("judged neighbours", gauge.seed), PLAN.tables
    noise = initial_noise(tiny, [named_seed("neighbour", seed, "ef gh", 2)])
    image = tiny.to_images(
        sample(tiny, tiny.encode(["ef gh"]), noise, steps=p.sampling_steps, guidance_scale=p.guidance_scale)
    )
    shown = dataclasses.replace(cases(tiny, 1)[0], image=image[0])
    states, prints = [State("original", tiny)], {tiny.name: own.fingerprint}
    found = dict[bool, Damage]()
    with own.run.locked():
        for strict in (False, True):
            judge = Judge(dataclasses.replace(DESCRIPTOR, threshold=0.9999 if strict else 2.0))
            used = tiny.rows
            (found[strict],) = dataclasses.replace(gauge, cases=(shown,), below=1.0, judge=judge).measure(
                states, prints
            )
            assert tiny.rows - used <= sum(gauge.costs(states).values(), Rows()).count
    assert [(found[strict].neighbours, found[strict].neighbours_shown) for strict in (False, True)] == [(3, 0), (2, 1)]
