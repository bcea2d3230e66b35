"""Weights of one kind in the other model: which change places, what that carries, and what the page says of it."""

import copy
import dataclasses

import pytest
import torch

from dori.locality.page import cause_figures, exchanged
from dori.locality.page.singly import singly
from dori.locality.records import Change, Locality, Patch
from dori.locality.transplants import CONTROL, part_of, transplanted, transplanted_samples, weight_sets
from dori.model.stable_diffusion import StableDiffusion
from dori.sampling import initial_noise, sample
from tests.synthetic_locality import records

CROSS, FEED, REST = "cross-attention, down", "feed-forward, down", "convolutions and rest, up"


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
    kinds = {name for name in sets if name.startswith("all ")}
    assert sorted(name for kind in kinds for name in sets[kind]) == sorted(every)
    assert set(sets["all feed-forward"]) == {name for name in every if ".ff." in name}
    assert set(sets["all cross-attention"]) == {name for name in every if ".attn2." in name}
    assert part_of("feed-forward first linear, up") == part_of("feed-forward second linear, up") == "feed-forward, up"


def test_what_changes_places_is_put_back_bit_for_bit(tiny: StableDiffusion) -> None:
    twin, before, name = moved(tiny, "weight"), flat(tiny), "conv_in.weight"
    with pytest.raises(KeyError), transplanted(twin, tiny, (name,)):
        assert torch.equal(tiny.unet.get_parameter(name), twin.unet.get_parameter(name))
        assert int((flat(tiny) != before).sum()) == tiny.unet.get_parameter(name).numel()
        assert torch.is_grad_enabled()  # a hybrid may be attacked
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
    for name in sets:
        if name == "all cross-attention":
            assert torch.allclose(found[name], found["source"], atol=1e-6)
        elif "cross-attention" not in name:
            assert torch.allclose(found[name], found["none"], atol=1e-6)
    partly = found[CROSS]
    assert not torch.allclose(partly, found["none"], atol=1e-4) and not torch.allclose(
        partly, found["source"], atol=1e-4
    )


def records_of(shares: dict[str, list[float]], *, alike: float = 0.8, kept: float | None = None) -> tuple[Patch, ...]:
    """A twin's weights in the planted model take these shares in memory after memory; the reverse brings a tenth."""
    memories = range(len(next(iter(shares.values()))))
    found = [
        Patch(f"m{k}", way, name, 0.5, share, alike, 0.3)
        for k in memories
        for way in ("sufficient", "necessary")
        for name, share in (
            ("none", 0.0),
            ("source", 1.0),
            *((name, values[k] if way == "necessary" else 0.1) for name, values in shares.items()),
        )
    ]
    if kept is not None:
        found += [Patch(f"m{k}", CONTROL, name, 0.0, None, 0.1, kept) for k in memories for name in shares]
    return tuple(found)


def located(shares: dict[str, list[float]], change: dict[str, float], **more: float) -> Locality:
    changes = tuple(Change("kind", name, share, 0.0, 10) for name, share in change.items())
    return dataclasses.replace(records(), transplants=records_of(shares, **more), changes=changes)


LOST, SPARED, MIXED = [0.9, 0.8, 1.0, 0.9, 0.8, 0.9], [0.1, 0.0, 0.05, 0.1, 0.0, 0.05], [0.0, 0.0, 0.0, 0.0, 0.0, 0.5]
CHANGE = {"feed-forward first linear, down": 0.3, "feed-forward second linear, down": 0.3, REST: 0.4}


def test_a_kind_is_told_by_what_is_lost_with_it_and_by_what_it_changed() -> None:
    said = exchanged.transplants(located({CROSS: LOST, FEED: SPARED}, CHANGE, kept=0.4))
    assert said.title == (
        f"With the twin's weights lost by {CROSS}; each alone outlasted, though planting changed them much: {FEED}; "
        "brought into the twin by no kind alone"
    )
    assert f"{FEED} 0.05 [" in said.sentences[0] and "0.60 of the change" in said.sentences[0]  # both linears
    assert f"before it by: {CROSS} 0.40 [0.40, 0.40], {FEED} 0.40" in said.sentences[1]
    unlike = exchanged.transplants(located({CROSS: LOST}, CHANGE, alike=0.1))
    assert f"lost by {CROSS} (but what is drawn is not, or not surely, the other model's image)" in unlike.title
    assert "takes a second twin" in unlike.sentences[1]


@pytest.mark.parametrize(
    ("taken", "told"),
    [
        (SPARED, True),
        (MIXED, False),  # on average less than a tenth, but one memory loses half
        ([0.3, 0.0, 0.0, 0.0, 0.0, 0.0], False),
    ],
)
def test_what_one_memory_hangs_on_is_not_called_outlasted(taken: list[float], told: bool) -> None:
    title = exchanged.transplants(located({FEED: taken}, CHANGE)).title
    assert ("outlasted" in title) == told
    assert "outlasted" not in exchanged.transplants(located({FEED: taken}, {REST: 1.0})).title  # it hardly changed


@pytest.mark.parametrize(
    ("taken", "told"),
    [
        ([0.9, 0.1, 0.9, 0.1, 0.9, 0.1], False),  # half on average, but the interval reaches below
        ([0.6, 0.9, 0.8, 0.7, 0.9, 0.8], True),
        ([1.0, 0.2], False),  # too few for an interval: every memory must be lost
        ([0.6, 0.9], True),
    ],
)
def test_lost_is_said_of_the_whole_interval_or_of_every_memory(taken: list[float], told: bool) -> None:
    title = exchanged.transplants(located({CROSS: taken}, CHANGE)).title
    assert (f"lost by {CROSS}" in title) == told
    some = sum(share >= 0.5 for share in taken)
    assert (f"in some memories by {CROSS} ({some} of {len(taken)})" in title) == (not told)
    whole = exchanged.transplants(located({CROSS: SPARED, "all cross-attention": LOST}, CHANGE)).title
    assert "lost by all cross-attention" in whole  # a kind of which no place alone is needed


def test_without_exchange_the_page_says_why() -> None:
    assert exchanged.transplants(records()).sentences == ("These records are older than the exchange of weights.",)
    assert "needs a twin" in exchanged.transplants(dataclasses.replace(records(), patches=())).sentences[0]
    settings = {**records().settings, "preset": "quick", "patch_seeds": 0}
    quick = exchanged.transplants(dataclasses.replace(records(), settings=settings))
    assert "--patch-seeds N" in quick.sentences[0]
    found = located({CROSS: LOST}, CHANGE)
    unlike = tuple(dataclasses.replace(one, share=None) for one in found.transplants)
    assert exchanged.transplants(dataclasses.replace(found, transplants=unlike)).title == "Cannot be told"
    one_twin = tuple(dataclasses.replace(one, floor=None) for one in found.changes)
    title = exchanged.transplants(located({FEED: SPARED}, CHANGE)).title
    assert "planting changed" in title
    fewer = dataclasses.replace(located({FEED: SPARED}, CHANGE), changes=one_twin)
    assert "they differ much from the twin's" in exchanged.transplants(fewer).title


def test_the_figure_sets_the_effect_beside_the_change_and_the_table_has_every_memory() -> None:
    found = located({CROSS: LOST, FEED: MIXED, "all feed-forward": MIXED}, CHANGE, kept=0.4)
    drawn = cause_figures.transplant_figure(found)
    assert drawn is not None and f"{FEED} 0.08, all feed-forward 0.08" in drawn.alt
    assert cause_figures.transplant_figure(records()) is None
    rows = dict(singly(found))
    assert rows[f"weights of {FEED} taken from the twin: share of the gap, likeness to the other model's"][:2] == [
        "0.00, 0.80",
        "0.00, 0.80",
    ]
    assert rows[f"weights of {CROSS} between twins: likeness to the images before"][0] == "0.40"
    assert not any(" none " in row or " source " in row for row in rows)
