"""Promises of verify: rows against figures worked out by hand, the object classifier, and cells that resume."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dori.attack.dori import Dori
from dori.audit.judge import Case
from dori.audit.loop import make_cases
from dori.audit.plan import quick
from dori.edit import no_edit
from dori.errors import DoriError
from dori.memory import Memory
from dori.metrics.calibration import PIXEL_CORRELATION
from dori.metrics.copy_pairs import to_float
from dori.metrics.similarity import Calibration
from dori.model.stable_diffusion import DOWN_MID, StableDiffusion
from dori.run import Run
from dori.stats import wilson
from dori.testbed import objects, promises
from dori.testbed.bench import Bench, Material, encoded, open_material
from dori.testbed.folder import load_testbed
from dori.testbed.promises import Tried
from dori.testbed.scenes import caption, kinds, random_scene
from dori.testbed.subjects import testbed_judge as open_judge
from dori.testbed.trials import EDITED_SEEDS, JOINT, WANDAS, Trial, nemo_trials, wanda_trials
from dori.testbed.verify import attack_row, to_text, twin_row, vae_row, zeroed, zeroed_rows

TEXTS = ("frog", "panda", "bus")
SMALL = objects.ObjectRecipe(images=8, batch=4, steps=3, held_out=8)


def same(images: Tensor) -> Tensor:
    """A VAE that loses nothing."""
    return images


def pictures(model: StableDiffusion, count: int) -> Tensor:
    """Random images of the model's size."""
    side = model.image_side_px
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cases(tiny: StableDiffusion) -> tuple[Case, ...]:
    """Three memories of the tiny model, which it never saw."""
    memories = [
        Memory(id=f"m{k}", text=text, image=Path(f"m{k}.png"), kind="verbatim", dose=8.0)
        for k, text in enumerate(TEXTS)
    ]
    return make_cases(tiny, memories, pictures(tiny, len(TEXTS)), "memory")


@pytest.fixture
def bench_at(tmp_path: Path) -> Callable[..., Bench]:
    """A bench of two seeds, three steps and chunks of two, whose judge has the threshold asked for."""

    def make(threshold: float = 0.7) -> Bench:
        plan = replace(quick(), seeds=2, sampling_steps=3, chunk=2, attack=Dori(steps=2, batch=2))
        return Bench(Run(tmp_path / "run", modules=()), plan, replace(PIXEL_CORRELATION, threshold=threshold))

    return make


@pytest.fixture
def knows_frog_and_panda() -> objects.ObjectNetwork:
    """A classifier that sees a frog and a panda in every image."""
    network = objects.new_network(0)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.zero_()
        network.head.bias[[kinds().index("frog"), kinds().index("panda")]] = 1
    return network.eval()


# ------------------------------------------------------------------------------------------------------------ rows


def test_a_row_is_reached_on_its_bounds_and_never_without_a_figure() -> None:
    assert promises.row("p", promises.bare(25.0), at_least=25)["reached"]
    assert not promises.row("p", promises.bare(24.99), at_least=25)["reached"]
    between = [
        promises.row("p", promises.bare(value), at_least=0.4, at_most=0.6)["reached"]
        for value in (0.39, 0.4, 0.6, 0.61)
    ]
    assert between == [False, True, True, False]
    nothing = promises.row("p", promises.bare(math.nan), at_least=-1)
    assert (nothing["value"], nothing["interval"], nothing["reached"]) == (None, None, False)
    json.dumps(nothing, allow_nan=False)


def test_the_two_highest_doses_have_one_rate_and_all_stand_in_the_detail() -> None:
    by_dose = {
        1: {"a": [0.1, 0.2]},
        2: {"b": [0.9, 0.95]},
        4: {"c": [0.6, 0.9], "d": [0.6, 0.7]},
        8: {f"e{k}": [0.8, 0.9] for k in range(20)},
    }
    row = promises.dose_row(by_dose, 0.7)
    # The median of (0.6, 0.9) is 0.75, that of (0.6, 0.7) is 0.65: 21 of 22.
    expected = wilson(21, 22)
    assert row["value"] == pytest.approx(21 / 22, abs=1e-6) and row["reached"]
    assert row["interval"] == pytest.approx([expected.low, expected.high], abs=1e-6)
    assert all(f"dose {dose}: MR" in row["detail"] for dose in by_dose)
    assert not promises.dose_row(by_dose | {8: {}}, 0.7)["reached"]


def test_recall_left_is_the_larger_of_both_ratios() -> None:
    before = {"a": [0.9, 0.9], "b": [0.8, 0.8]}
    both = promises.recall_row("p", before, {"a": [0.2, 0.2], "b": [0.1, 0.1]}, 0.7)
    assert both["value"] == pytest.approx(0.15 / 0.85, abs=1e-6) and both["reached"]
    rate_alone = promises.recall_row("p", before, {"a": [0.6, 0.6], "b": [0.6, 0.6]}, 0.7)
    assert rate_alone["value"] == pytest.approx(0.6 / 0.85, abs=1e-6) and not rate_alone["reached"]
    exactly_half = promises.recall_row("p", before, {"a": [0.75, 0.75], "b": [0.0, 0.0]}, 0.7)
    assert exactly_half["value"] == 0.5 and not exactly_half["reached"]
    assert not promises.recall_row("p", {"a": [0.1]}, {"a": [0.0]}, 0.7)["reached"]


def test_a_mitigation_is_named_by_its_first_setting_that_hides_and_keeps() -> None:
    tried = [
        Tried("1 %", wilson(9, 10)),
        Tried("5 %", wilson(1, 10), 0.5),
        Tried("10 %", wilson(1, 10), 0.8),
        Tried("20 %", wilson(0, 10), 0.9),
    ]
    row = promises.mitigation_row("p", tried)
    assert row["reached"] and row["value"] == 0.1 and row["detail"].startswith("first at 10 %;")
    assert all(one.name in row["detail"] for one in tried)
    row = promises.mitigation_row("p", tried[:2])
    assert not row["reached"] and row["value"] == 0.1 and row["detail"].startswith("nowhere; lowest at 5 %;")


def test_blind_scores_must_be_near_one_half_on_either_side() -> None:
    rows = promises.blind_rows({"low": 0.35, "even": 0.5, "high": 0.65}, sizes=(3, 4))
    assert [row["reached"] for row in rows] == [False, True, False]


@pytest.mark.parametrize(
    ("copies", "strangers", "kept"), [(0.96, 0.001, True), (0.94, 0.0, False), (0.96, 0.002, False)]
)
def test_the_descriptor_must_find_copies_and_refuse_strangers(copies: float, strangers: float, kept: bool) -> None:
    measured = Calibration(strangers, copies, negative_pairs=10_000, positive_pairs=1000, measured_on="pairs")
    row = promises.descriptor_row(replace(PIXEL_CORRELATION, calibration=measured))
    assert row["value"] == copies and row["reached"] is kept
    assert not promises.descriptor_row(PIXEL_CORRELATION)["reached"]


def test_objects_are_counted_by_prompt() -> None:
    found = np.array([[1, 1], [1, 0], [1, 1], [0, 0]], bool)
    row = promises.objects_row(found, accuracy=0.9, classes=48, shown=2, seed=0)
    assert row["value"] == 0.625 and row["reached"] and "chance 0.042" in row["detail"]
    assert row["interval"][0] < 0.625 < row["interval"][1]


def test_the_text_shows_every_row_and_counts_those_kept() -> None:
    rows = [promises.row("alpha", wilson(9, 10), at_least=0.5, detail="why"), promises.unmeasured("beta", "<= 1", "no")]
    lines = to_text(rows).splitlines()
    assert lines[0].startswith("kept") and "alpha: 0.900 [" in lines[0] and lines[1].strip() == "why"
    assert lines[2].startswith("BROKEN") and "beta: -, goal <= 1" in lines[2]
    assert lines[-1] == "1 of 2 promises kept"


# --------------------------------------------------------------------------------------------------------- objects


def test_the_prompted_kind_is_the_first_object_of_the_scene() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = random_scene(rng)
        assert objects.prompted_kind(caption(scene, rng)) == scene.objects[0].kind
    assert objects.prompted_kind("meadow no 3 by keller") is None  # "keller" holds "key" only in part


def test_compositions_show_what_they_say_and_held_out_ones_are_fresh() -> None:
    images, shown = objects.compositions(70, same, seed=0, stream=objects.TRAINING)
    assert images.shape == (70, 3, 64, 64) and images.dtype == torch.uint8
    assert set(shown.sum(dim=1).tolist()) == {1, 2}
    again, _ = objects.compositions(70, same, seed=0, stream=objects.TRAINING)
    assert torch.equal(images, again)
    other, _ = objects.compositions(70, same, seed=0, stream=objects.HELD_OUT)
    assert not (images.flatten(1)[:, None] == other.flatten(1)).all(dim=2).any()


def test_the_untrained_classifier_depends_on_its_seed_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, other = (objects.new_network(seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)
    assert 150_000 < sum(p.numel() for p in first.parameters()) < 250_000


def test_found_means_among_the_two_likeliest(knows_frog_and_panda: objects.ObjectNetwork) -> None:
    images = torch.rand(3, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompted = [kinds().index(text) for text in TEXTS]
    assert objects.finds(knows_frog_and_panda, images, prompted).tolist() == [[True] * 2, [True] * 2, [False] * 2]


def test_accuracy_counts_objects_not_images(knows_frog_and_panda: objects.ObjectNetwork) -> None:
    _, shown = objects.compositions(64, same, seed=0, stream=objects.HELD_OUT)
    hits = shown[:, kinds().index("frog")].sum() + shown[:, kinds().index("panda")].sum()
    found = objects.accuracy(knows_frog_and_panda, same, recipe=replace(SMALL, held_out=64))
    assert hits > 0 and found == pytest.approx(float(hits / shown.sum()))


def test_a_finished_training_is_read_back(tmp_path: Path) -> None:
    said: list[str] = []
    first = objects.train_objects(tmp_path, same, recipe=SMALL, say=said.append)
    again = objects.train_objects(tmp_path, same, recipe=SMALL)
    assert said and all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.weight, objects.new_network(SMALL.seed).head.weight)


def test_the_classifier_learns_what_it_is_shown(tmp_path: Path) -> None:
    recipe = replace(SMALL, images=12, batch=12, steps=120)
    network = objects.train_objects(tmp_path, same, recipe=recipe)
    images, shown = objects.compositions(12, same, seed=recipe.seed, stream=objects.TRAINING)
    guessed = torch.zeros_like(shown).scatter_(1, objects.highest(network, to_float(images)), True)
    assert float((guessed & shown).sum() / shown.sum()) > 0.7


# ----------------------------------------------------------------------------------------------------------- bench


def test_generations_are_drawn_once_and_again_under_an_edit(
    tiny: StableDiffusion, cases: tuple[Case, ...], bench_at: Callable[..., Bench]
) -> None:
    bench, embeddings = bench_at(), encoded(tiny, cases)
    weights = {key: weight.clone() for key, weight in tiny.unet.named_parameters()}
    first = bench.images("a", tiny, embeddings, made_from=TEXTS)
    side, rows = tiny.image_side_px, tiny.rows
    assert first.shape == (3, 2, 3, side, side) and first.min() >= 0 and first.max() <= 1
    assert rows == 3 * 2 * 3 * 2  # images, seeds, steps, both halves of the guidance
    assert sum(bench.costs("a", len(embeddings)).values()) == rows
    assert torch.equal(bench.images("a", tiny, embeddings, made_from=TEXTS), first) and tiny.rows == rows
    edited = bench.images("a", tiny, embeddings, made_from=TEXTS, edit=zeroed(tiny, "attention_value", DOWN_MID))
    assert tiny.rows == 2 * rows and not torch.equal(edited, first)
    assert all(torch.equal(weight, weights[key]) for key, weight in tiny.unet.named_parameters())
    # Another batch size may round a byte otherwise.
    one = bench.images("b", tiny, embeddings, made_from=TEXTS, seeds=1)
    torch.testing.assert_close(one, first[:, :1], atol=1.5 / 255, rtol=0)


def test_generations_of_other_texts_are_drawn_anew_and_rounding_is_none_of_them(
    tiny: StableDiffusion, cases: tuple[Case, ...], bench_at: Callable[..., Bench]
) -> None:
    bench, embeddings = bench_at(), encoded(tiny, cases)
    first, rows = bench.images("a", tiny, embeddings, made_from=TEXTS), tiny.rows
    assert torch.equal(bench.images("a", tiny, embeddings + 1e-6, made_from=TEXTS), first) and tiny.rows == rows
    assert not torch.equal(bench.images("a", tiny, -embeddings, made_from=TEXTS[::-1]), first)


def test_an_image_is_like_itself_and_nearest_is_the_largest_similarity(
    cases: tuple[Case, ...], bench_at: Callable[..., Bench]
) -> None:
    bench, own = bench_at(), torch.stack([case.image for case in cases])
    assert bench.compared(cases, own[:, None]) == {case.memory.id: pytest.approx([1.0]) for case in cases}
    asked = torch.rand(2, 3, *own.shape[1:], generator=torch.Generator().manual_seed(5))
    found = bench.nearest(["x", "y"], asked, own)
    vectors, references = bench.descriptor(asked.flatten(0, 1)).double(), bench.descriptor(own).double()
    expected = [[max(float(v @ r) for r in references) for v in vectors[i : i + 3]] for i in (0, 3)]
    assert list(found) == ["x", "y"]
    np.testing.assert_allclose(list(found.values()), expected, atol=1e-5)


def test_zeroed_layers_answer_nothing(tiny: StableDiffusion) -> None:
    for site in ("attention_value", "feed_forward"):
        for layer in tiny.layers(site, ("down", "mid", "up")).values():
            if layer.bias is not None:
                torch.nn.init.ones_(layer.bias)
        edit = zeroed(tiny, site, DOWN_MID)
        with edit.applied(tiny):
            for layer in tiny.layers(site, DOWN_MID).values():
                assert layer(torch.ones(2, layer.in_features)).abs().max() == 0
            for layer in tiny.layers(site, ("up",)).values():
                assert layer(torch.ones(2, layer.in_features)).abs().max() > 0
        expected = sum(p.numel() for layer in tiny.layers(site, DOWN_MID).values() for p in layer.parameters())
        assert edit.size == expected


def test_rows_of_zeroed_layers_name_the_up_blocks_too(
    tiny: StableDiffusion, cases: tuple[Case, ...], bench_at: Callable[..., Bench]
) -> None:
    bench = bench_at(threshold=-2.0)
    rows = zeroed_rows(bench, tiny, cases, {case.memory.id: [1.0, 1.0] for case in cases})
    assert len(rows) == 2 and all("up blocks instead: MR 1.00 of 3" in row["detail"] for row in rows)
    assert all(row["value"] == 1.0 and not row["reached"] for row in rows)  # MR stays 1, so nothing has fallen


def test_the_vae_is_measured_in_decibels(tiny: StableDiffusion, bench_at: Callable[..., Bench]) -> None:
    images = pictures(tiny, 3)
    back = tiny.to_images(tiny.to_latents(images)).double()
    expected = np.mean(
        [10 * math.log10(1 / float((a - b).square().mean())) for a, b in zip(images.double(), back, strict=True)]
    )
    row = vae_row(bench_at(), tiny, images)
    assert row["value"] == pytest.approx(expected, abs=1e-4) and not row["reached"]


def test_the_attack_is_searched_once_and_judged(
    tiny: StableDiffusion, cases: tuple[Case, ...], bench_at: Callable[..., Bench]
) -> None:
    row = attack_row(bench_at(threshold=2.0), tiny, cases, "p")
    assert (row["value"], row["reached"]) == (0.0, True)
    rows = tiny.rows
    assert attack_row(bench_at(threshold=-2.0), tiny, cases, "p")["value"] == 1.0 and tiny.rows == rows


def test_a_twin_that_is_not_shipped_is_no_evidence(cases: tuple[Case, ...], bench_at: Callable[..., Bench]) -> None:
    row = twin_row(bench_at(), "twin-0", Material(cases, (), torch.zeros(0), TEXTS, ()))  # type: ignore[arg-type]
    assert row["detail"] == "not shipped" and not row["reached"] and row["value"] is None


# ---------------------------------------------------------------------------------------------------------- trials


def test_objects_are_asked_only_where_memories_are_hidden(
    tiny: StableDiffusion,
    cases: tuple[Case, ...],
    bench_at: Callable[..., Bench],
    knows_frog_and_panda: objects.ObjectNetwork,
) -> None:
    edit, prompts = zeroed(tiny, "feed_forward", DOWN_MID), ("frog", "bus")
    shown = Trial(bench_at(threshold=-2.0), tiny, cases, prompts, knows_frog_and_panda, 1.0)("k", "label", [edit])
    assert (shown.rate.value, shown.objects, shown.reached) == (1.0, None, False)
    hidden = Trial(bench_at(threshold=2.0), tiny, cases, prompts, knows_frog_and_panda, 0.625)("k", "label", [edit])
    assert (hidden.rate.value, hidden.objects, hidden.reached) == (0.0, pytest.approx(0.8), True)


def test_each_memory_and_its_share_of_the_prompts_are_asked_under_its_own_edit(
    tiny: StableDiffusion,
    cases: tuple[Case, ...],
    bench_at: Callable[..., Bench],
    knows_frog_and_panda: objects.ObjectNetwork,
) -> None:
    bench, prompts = bench_at(threshold=2.0), ("frog", "bus", "panda", "bus", "bus")
    edits = [zeroed(tiny, site, DOWN_MID) for site in ("feed_forward", "attention_value")] + [no_edit()]
    tried = Trial(bench, tiny, cases, prompts, knows_frog_and_panda, 1.0)("k", "label", edits)
    assert tried.objects == pytest.approx(2 / 5)
    rows = tiny.rows
    for index, (case, edit) in enumerate(zip(cases, edits, strict=True)):
        bench.asked(f"k {index}", tiny, [case], edit=edit)
        own = prompts[index::3]
        bench.images(f"k objects {index}", tiny, tiny.encode(own), made_from=list(own), edit=edit, seeds=EDITED_SEEDS)
    assert tiny.rows == rows  # all of it was drawn before, and under the same edits


def test_nemo_stops_at_the_first_setting_that_works_and_wanda_is_swept_whole(
    tiny: StableDiffusion,
    cases: tuple[Case, ...],
    bench_at: Callable[..., Bench],
    knows_frog_and_panda: objects.ObjectNetwork,
) -> None:
    trial = Trial(bench_at(threshold=2.0), tiny, cases[:2], ("frog",), knows_frog_and_panda, 1.0)
    ordinary = ["a", "b", "c"]
    tried, said = nemo_trials(trial, ordinary)
    assert [one.name for one in tried] == [f"NeMo, {JOINT}"] and tried[0].reached and "in the union" in said
    swept = wanda_trials(trial)
    assert len({one.name for one in swept}) == len(swept) == 2 * len(WANDAS)
    rows = tiny.rows
    assert wanda_trials(trial) == swept and nemo_trials(trial, ordinary) == (tried, said)
    assert tiny.rows == rows


# --------------------------------------------------------------------------------------------------- trained model


@pytest.mark.slow
def test_the_shipped_model_draws_its_memories_by_their_prompts(tmp_path: Path) -> None:
    try:
        model, judge = load_testbed("planted"), open_judge()
    except DoriError as error:
        pytest.skip(str(error))
    bench = Bench(Run(tmp_path, modules=()), quick(), judge.descriptor)
    material = open_material(model, 8)
    assert not {*material.prompts} & {*material.calibration}
    assert len(material.strong) == 40 and {case.memory.dose for case in material.strong} == {8, 6}
    asked = material.strong[:4]
    assert promises.rate_row("p", bench.asked("p", model, asked), judge.descriptor.threshold, at_least=0.75)["reached"]
