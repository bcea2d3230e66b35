"""Weights of one kind in the other model: which change places, what that carries, and what the page says of it."""

import copy
import dataclasses

import pytest
import torch

from dori.locality.page import cause_figures, intervened
from dori.locality.page.singly import singly
from dori.locality.records import Change, Patch
from dori.locality.transplants import BLOCKS, transplanted, transplanted_samples, weight_sets
from dori.model.stable_diffusion import StableDiffusion
from dori.sampling import initial_noise, sample
from tests.synthetic_locality import records

VALUES, FEED, CONVOLUTIONS = (
    "cross-attention values, down",
    "feed-forward second linear, down",
    "convolutions and rest, up",
)


def moved(model: StableDiffusion, ending: str) -> StableDiffusion:
    """The model with every weight moved whose name ends so."""
    other, generator = copy.copy(model), torch.Generator().manual_seed(4)
    other.unet = copy.deepcopy(model.unet)
    with torch.no_grad():
        for name, weight in other.unet.named_parameters():
            if name.endswith(ending):
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return other


def flat(model: StableDiffusion) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.unet.parameters()])


def test_kinds_and_places_part_the_weights(tiny: StableDiffusion) -> None:
    every, sets = [name for name, _ in tiny.unet.named_parameters()], weight_sets(tiny)
    parts = {name: members for name, members in sets.items() if not name.startswith("all ")}
    assert sorted(name for members in parts.values() for name in members) == sorted(every)
    for name, members in parts.items():
        place = name.rpartition(", ")[2]
        assert place == "ends" or all(member.startswith(place) for member in members)
    kinds = {name for name in sets if name.startswith("all ")} - {BLOCKS}
    assert sorted(name for kind in kinds for name in sets[kind]) == sorted(every)
    assert set(sets[BLOCKS]) == {name for name in every if ".attn" in name or ".ff." in name}


def test_what_changes_places_is_put_back_bit_for_bit(tiny: StableDiffusion) -> None:
    twin, before, name = moved(tiny, "weight"), flat(tiny), "conv_in.weight"
    with pytest.raises(KeyError), transplanted(twin, tiny, (name,)):
        assert torch.equal(tiny.unet.get_parameter(name), twin.unet.get_parameter(name))
        assert int((flat(tiny) != before).sum()) == tiny.unet.get_parameter(name).numel()
        raise KeyError
    assert torch.equal(flat(tiny), before)


def test_a_transplant_carries_exactly_what_the_weights_make(tiny: StableDiffusion) -> None:
    """Models that differ in value projections alone: sets that hold those are the source, all others the target."""
    twin, sets = moved(tiny, "attn2.to_v.weight"), weight_sets(tiny)
    y, noise = tiny.encode(["abc"]), initial_noise(tiny, [0, 1])
    found = transplanted_samples(tiny, twin, y, noise, sets, steps=2, guidance_scale=2.0)
    for name, model in (("none", twin), ("source", tiny)):
        alone = sample(model, y.expand(2, -1, -1), noise, steps=2, guidance_scale=2.0, null=tiny.encode([""]))
        assert torch.allclose(found[name], alone, atol=1e-6)
    assert not torch.allclose(found["none"], found["source"], atol=1e-3)
    whole = {"all cross-attention values", BLOCKS}
    for name in sets:
        if name in whole:
            assert torch.allclose(found[name], found["source"], atol=1e-6)
        elif "values" not in name:
            assert torch.allclose(found[name], found["none"], atol=1e-6)
    partly = found[VALUES]
    assert not torch.allclose(partly, found["none"], atol=1e-4) and not torch.allclose(
        partly, found["source"], atol=1e-4
    )


def exchanged(memories: int = 6) -> tuple[Patch, ...]:
    """Values are needed and cured, convolutions needed and ruined, feed-forwards are not needed."""
    shares = {VALUES: (0.1, 0.9, 0.8), CONVOLUTIONS: (0.2, 0.8, 0.1), FEED: (0.0, 0.05, 0.0), BLOCKS: (0.6, 1.0, 0.9)}
    return tuple(
        Patch(f"m{k}", way, name, 0.5, share, alike)
        for k in range(memories)
        for index, way in enumerate(("sufficient", "necessary"))
        for name, share, alike in (
            ("none", 0.0, 0.0),
            ("source", 1.0, 1.0),
            *((name, both[index], both[2]) for name, both in shares.items()),
        )
    )


def planted(values: float, feed: float) -> tuple[Change, ...]:
    return (
        Change("kind", VALUES, values, 0.0, 10),
        Change("kind", FEED, feed, 0.0, 10),
        Change("kind", CONVOLUTIONS, 1 - values - feed, 0.0, 10),
    )


def test_the_page_names_what_is_needed_and_what_is_not_though_it_changed_much() -> None:
    found = dataclasses.replace(records(), transplants=exchanged(), changes=planted(0.1, 0.5))
    said = intervened.transplants(found)
    assert said.title == (
        f"Needed: {VALUES}, {CONVOLUTIONS} (that it ruins the images is not excluded); not needed, though planting "
        f"changed them much: {FEED}; sufficient: {BLOCKS}"
    )
    assert f"{FEED} 0.50 of the change, takes 0.05" in said.sentences[0]
    assert f"Most brings {BLOCKS} (0.60" in said.sentences[1]
    small = intervened.transplants(dataclasses.replace(found, changes=planted(0.1, 0.05)))
    assert "not needed" not in small.title  # planting hardly changed them
    few = intervened.transplants(dataclasses.replace(found, transplants=exchanged(1)))
    assert few.title.startswith("In one memory needed: ")


def test_without_transplants_the_page_says_why() -> None:
    assert "needs a twin" in intervened.transplants(records()).sentences[0]
    settings = {**records().settings, "preset": "quick", "patch_seeds": 0}
    quick = intervened.transplants(dataclasses.replace(records(), settings=settings))
    assert quick.sentences == ("The preset quick leaves it out; --preset full has it.",)
    unlike = tuple(dataclasses.replace(one, share=None) for one in exchanged())
    assert intervened.transplants(dataclasses.replace(records(), transplants=unlike)).title == "Cannot be told"


def test_the_figure_sets_the_effect_beside_the_change_and_the_table_has_every_memory() -> None:
    found = dataclasses.replace(records(), transplants=exchanged(), changes=planted(0.1, 0.5))
    drawn = cause_figures.transplant_figure(found)
    assert drawn is not None and f"take: {FEED} 0.05, {CONVOLUTIONS} 0.80, {VALUES} 0.90, {BLOCKS} 1.00" in drawn.alt
    assert cause_figures.transplant_figure(records()) is None
    rows = dict(singly(found))
    assert rows[f"weights of {FEED} taken from the twin: share of the gap, likeness to the other model's"][:2] == [
        "0.05, 0.00",
        "0.05, 0.00",
    ]
    assert not any(" none " in row or " source " in row for row in rows)
