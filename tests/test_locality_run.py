"""A locality run asks everything that it planned, keeps it, resumes from it, and says what it did not find."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_parts
from torch import Tensor
from torch.nn import functional

from dori.attack.dori import Dori, Triggers
from dori.audit.judge import Judge, draw
from dori.audit.loop import Subjects, make_cases
from dori.cost import Rows, Speed
from dori.errors import DoriError
from dori.locality.bench import Bench, encoded
from dori.locality.costs import Sizes, by_stage, planned
from dori.locality.loop import costs, locality, says_less
from dori.locality.masks import method_names
from dori.locality.page.render import render
from dori.locality.plan import PRESETS, Causal, Plan
from dori.locality.records import LISTS, ON_TWIN, Locality, read_locality
from dori.locality.subjects import choose_sets, keep_memorized
from dori.memory import Memory
from dori.metrics.similarity import Descriptor, cosine
from dori.mitigate.nemo import Nemo
from dori.mitigate.wanda import Wanda
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run
from dori.sampling import Sampling

MEMORIES = tuple(
    Memory(f"m{k}", None if k == 2 else "abcde"[k:], Path(f"m{k}.png"), dose=float(2**k)) for k in range(3)
)
PLAN = Plan(
    "tiny",
    memories=2,
    gaussian=3,
    foreign=2,
    attack=Dori(steps=1, batch=1),
    twin_attacks=2,
    repeats=2,
    seeds=2,
    sampling_steps=2,
    guidance_scale=2.0,
    line_pairs=2,
    line_shares=(0.5,),
    ball_centres=2,
    ball_directions=1,
    ball_radii=(0.1, 1.0),
    probe_seeds=1,
    activation_steps=(0, 1),
    activation_noises=1,
    set_size=6,
    nemo=Nemo(noises=2, max_refinement_passes=2),
    wandas=(Wanda(sparsity=0.2, counted_steps=1, ddim_steps=4),),
    ceiling=3,
    ceiling_seeds=2,
    calibration_prompts=3,
    causal=Causal(
        memories=1,
        triggers=2,
        fresh=1,
        random=1,
        other=2,
        joined_fresh=1,
        taken_back=(0.1, 1.0),
        seeds=1,
        priced=1,
        quality_prompts=2,
    ),
    patch_seeds=1,
    chunk=3,
)


def thumbnails(images: Tensor) -> Tensor:
    """The pixel correlation of 4 x 4 thumbnails."""
    x = functional.adaptive_avg_pool2d(images, 4).flatten(1)
    return x - x.mean(dim=1, keepdim=True)


def judge(threshold: float) -> Judge:
    """A judge whom everything satisfies (below -1) or nothing (above 1)."""
    return Judge(Descriptor("pixel-correlation-4", "4 x 4, mean subtracted", thumbnails, threshold=threshold))


def tiny_subjects(model: StableDiffusion, *twins: StableDiffusion) -> Subjects:
    """Three memories, the last one without a text."""
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    return Subjects(
        model,
        make_cases(model, MEMORIES, images, "memory"),
        (),
        tuple(f"word {number}" for number in range(13)),
        None,
        twins,
    )


def tiny_run(subjects: Subjects, folder: Path, *, plan: Plan = PLAN, threshold: float = -1.5) -> Locality:
    """The run in a locked folder."""
    run = Run(folder, modules=())
    with run.locked():
        return locality(subjects, plan=plan, judge=judge(threshold), run=run)


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """A whole run with what it could have changed, and what it was planned to cost."""

    found: Locality
    folder: Path
    subjects: Subjects
    fingerprints: tuple[list[str], list[str]]
    planned: dict[str, Rows]
    said: list[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """One run with every analysis and two twins."""
    names = ("tiny", "twin-a", "twin-b")
    models = [StableDiffusion(**tiny_parts(tmp_path_factory.mktemp(name)), name=name) for name in names]
    for scale, model in zip((1.1, 1.01, 0.99), models, strict=True):
        with torch.no_grad():
            for weight in model.unet.parameters():
                weight.mul_(scale)
    subjects, folder, said = tiny_subjects(*models), tmp_path_factory.mktemp("run"), list[str]()
    before = [model_fingerprint(model) for model in models]
    run = Run(folder, say=said.append, modules=())
    with run.locked():
        found = locality(subjects, plan=PLAN, judge=judge(-1.5), run=run, say=said.append)
    (folder / "locality.json").write_text(found.to_json())
    after = [model_fingerprint(model) for model in models]
    return Whole(found, folder, subjects, (before, after), costs(subjects, PLAN, choose_sets(subjects, PLAN)), said)


def test_every_start_of_every_memory_is_attacked_once(whole: Whole) -> None:
    asked = [(t.memory, t.start, t.index) for t in whole.found.triggers]
    starts = [("gaussian", k) for k in range(3)] + [("foreign", k) for k in range(2)]
    expected = [("m1", "prompt", 0), *((memory, *start) for memory in ("m1", "m2") for start in starts)]
    assert sorted(asked) == sorted(expected)
    assert [(s.id, s.attacks, s.triggers) for s in whole.found.subjects] == [("m2", 5, 5), ("m1", 6, 6)]


def test_each_analysis_has_its_reference_levels(whole: Whole) -> None:
    found = whole.found
    beside = {"triggers of other images", "triggers, other noises", "triggers of other images, other noises"}
    beside |= {"other noises, same starts"}
    for memory in ("m1", "m2"):
        for method in ("NeMo", "Wanda 20 %"):
            groups = {o.group for o in found.overlaps if o.method == method and o.memory in (memory, "")}
            assert groups == {
                "triggers",
                "triggers, gaussian",
                "triggers, foreign",
                "other noises",
                "memorized prompts",
                "ordinary prompts",
                "random",
                "random, simulated",
                "memorized prompts, random",
                "ordinary prompts, random",
            } | (beside if memory == "m1" else set())  # m2 is the first
        groups = {a.group for a in found.activities if a.memory in (memory, "")}
        assert {"triggers", "other noises", "memorized prompts", "ordinary prompts", "gaussian starts"} <= groups
        assert ("triggers of other images" in groups) is ("triggers, same starts" in groups) is (memory == "m1")
    half = {a.n for a in found.activities if a.group == "triggers, same starts"}
    across = {a.n for a in found.activities if a.group == "triggers of other images"}
    assert (half, across) == ({4}, {2})  # two starts in common, of two memories; two pairs of different ones
    apart = {o.pairs for o in found.overlaps if o.group == "triggers, other noises"}
    assert apart == {8}  # two starts in two orders, two noises, two memories
    layers = found.settings["layers"]
    assert {a.layer for a in found.activities} == {*layers["attention_value"], *layers["feed_forward"]}
    measured = {m.name for m in found.measures if m.memory in ("m1", "")}
    assert {
        "between triggers",
        "between their starts",
        "between their moves, gaussian",
        "moved, prompt",
        "between ordinary prompts",
        "between memorized prompts",
        "common share of the moves, foreign",
        "common share, same starts, foreign",
        "the same, moves exchanged",
        "common share of a move and itself, attacked again",
    } <= measured
    shared = {m.memory: m.value for m in found.measures if m.name == "shared with moves to other images"}
    assert shared["m1"] == shared["m2"]  # of one pair of images
    assert {c.layer for c in found.covers if c.method == "NeMo"} > {"all"}
    assert all(0 <= c.density <= 1 and c.twins is not None for c in found.covers)
    assert found.changes[0].floor is not None and {c.level for c in found.changes} == {"kind", "layer"}
    on_twin = {m.memory: (m.value, m.n) for m in found.measures if m.name == ON_TWIN}
    assert on_twin == {"m1": (1.0, 2), "m2": (1.0, 2)}  # this judge is content with everything
    kinds = {(p.kind, p.at) for p in found.probes if p.memory == "m1"}
    assert kinds == {("line between triggers", 0.5), ("line to an ordinary prompt", 0.5), ("ball", 0.1), ("ball", 1.0)}


def test_values_of_one_embedding_do_not_depend_on_noise_and_noise_reaches_the_rest(whole: Whole) -> None:
    same = [a for a in whole.found.activities if a.group == "other noises" and a.memory == "m1" and a.step == 0]
    assert max(a.value or 0 for a in same if a.site == "attention_value") == pytest.approx(0, abs=1e-6)
    assert min(a.value or 0 for a in same if a.site == "feed_forward") > 1e-4


def test_the_causal_test_fills_its_matrix_for_the_first_memory_alone(whole: Whole) -> None:
    rows = {(c.memory, c.method, c.masks): (len(c.replay), len(c.again), len(c.fresh)) for c in whole.found.crosses}
    methods = ("NeMo", "Wanda 20 %")
    masked = {("m2", method, "triggers"): (2, 2, 2) for method in methods}
    masked |= {("m2", "Wanda 20 %", "other image"): (2, 2, 2)}  # of m1's triggers
    assert rows["m2", "", "none"] == (1, 1, 1) and masked.items() <= rows.items()
    assert rows["m2", "Wanda 20 %", "random"] == (1, 1, 1) and {memory for memory, _, _ in rows} == {"m2"}
    for cross in whole.found.crosses:
        assert {len(row) for row in (*cross.replay, *cross.again)} == {2}
        assert {len(row) for row in cross.fresh} == {2 if cross.masks == "none" else 1}  # one for each of two masks
    sizes = {c.masks: c.sizes for c in whole.found.crosses if c.method == "Wanda 20 %"}
    assert sizes["random"][0] == sizes["triggers"][0]  # as large as the mask that it stands beside
    assert sizes["planted change"] == (max(sizes["triggers"]),)  # of two the larger one is the upper median
    joined = {(j.method, j.masks, j.joined): (j.n, j.density) for j in whole.found.joined}
    assert joined["", "none", 0] == (1, 0)
    for control in ("random", "planted change"):
        assert joined["Wanda 20 %", "triggers", 2] == joined["Wanda 20 %", control, 2]
    assert {number for method, masks, number in joined if masks == "triggers"} == {1, 2, 4, 5}  # of all triggers
    assert {(p.masks, p.joined, p.row) for p in whole.found.prices if p.method in ("", "Wanda 20 %")} == {
        ("none", 0, 0),
        *((masks, 1, 0) for masks in ("triggers", "other image", "random", "planted change")),
        *((masks, number, None) for masks in ("triggers", "random", "planted change") for number in (1, 2, 4, 5)),
    }
    parts = [(u.chosen, u.share) for u in whole.found.undone]
    assert parts == [("most changed", 0.1), ("most changed", 1.0), ("at random", 0.1)]
    assert {(u.memory, u.triggers, u.n) for u in whole.found.undone} == {("m2", 2, 1)}
    likeness = [u.to_unedited for u in whole.found.undone]
    assert None not in likeness and likeness[0] != likeness[1]
    assert {p.direction for p in whole.found.patches} == {"sufficient", "necessary"}
    assert {p.memory for p in (*whole.found.patches, *whole.found.transplants)} == {"m1"}


def test_patched_images_are_compared_with_what_the_other_model_draws(whole: Whole) -> None:
    alike = {(p.direction, p.layers): p.alike for p in whole.found.patches}
    for direction in ("sufficient", "necessary"):
        assert alike[direction, "source"] == pytest.approx(1, abs=1e-5)  # with itself
        assert max(value for (way, _), value in alike.items() if way == direction and value is not None) <= 1 + 1e-5
    # Without a patch both directions compare the same two images, the one model's with the other's.
    assert alike["sufficient", "none"] == pytest.approx(alike["necessary", "none"], abs=1e-5) != 1


def test_a_run_leaves_the_weights_as_they_were(whole: Whole) -> None:
    assert whole.fingerprints[0] == whole.fingerprints[1]


def test_every_cell_was_planned_and_every_planned_cell_is_done(whole: Whole) -> None:
    stored = {path.stem for path in (whole.folder / "cells").iterdir()}
    assert stored <= set(whole.planned)
    # What is left was planned for masks that turned out empty: they have no price, and no other ones are as large.
    left = set(whole.planned) - stored
    assert left and all(re.search(r"NeMo\.(random|planted)|^price\.m2-NeMo-", key) for key in left)
    assert {c.sizes for c in whole.found.crosses if c.method == "NeMo"} == {(0, 0)}
    assert any(line.startswith("locality: 100 %") for line in whole.said)


def test_a_memory_whose_name_begins_another_ones_does_not_finish_its_cells(tmp_path: Path) -> None:
    model = StableDiffusion(**tiny_parts(tmp_path), name="tiny")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    named = (Memory("a", "ab", Path("a.png")), Memory("a.b/c", "cd", Path("b.png")))  # the second needs another key
    subjects = dataclasses.replace(tiny_subjects(model), memories=make_cases(model, named, images, "memory"), twins=())
    said: list[str] = []
    run = Run(tmp_path / "run", say=said.append, modules=())
    with run.locked():
        locality(subjects, plan=dataclasses.replace(PLAN, causal=None), judge=judge(1.5), run=run, say=said.append)
    first = said.index("memory 2 of 2: a.b/c")
    assert not any("100 %" in line for line in said[:first]) and "100 %" in said[-1]


def test_the_plan_counts_the_rows_that_go_through_the_network(tiny: StableDiffusion, tmp_path: Path) -> None:
    """Without NeMo's searches, whose length is not known beforehand, planned and counted rows are the same."""
    plan = dataclasses.replace(PLAN, causal=None, memories=1)
    subjects = tiny_subjects(tiny)
    rows = tiny.rows
    found = tiny_run(subjects, tmp_path / "run", plan=plan)
    used, planned = tiny.rows - rows, by_stage(costs(subjects, plan, choose_sets(subjects, plan)))
    assert sum(found.cost.values()) == sum(r.attacked + r.forward for r in planned.values())
    assert 0 < used <= sum(found.cost.values())
    # Five attacks, and the first two from noise made again.
    assert found.cost["triggers, forward and backward"] == 5 + 2 == planned["triggers"].attacked


def test_the_causal_test_costs_what_was_planned(whole: Whole) -> None:
    planned = by_stage(whole.planned)
    for stage in ("twin", "patching", "transplants", "price", "activations"):
        spent = sum(rows for name, rows in whole.found.cost.items() if name.startswith(f"{stage}, "))
        most = planned[stage].attacked + planned[stage].forward
        # Two memories' halves had two of three starts in common, 6 rows less; NeMo's masks are empty and have no price.
        unasked = [
            key
            for key in whole.planned
            if key.startswith("price") and not (whole.folder / "cells" / f"{key}.safetensors").exists()
        ]
        empty = sum(whole.planned[key].forward for key in unasked)
        assert spent == most - {"activations": 6, "price": empty}.get(stage, 0)
    for stage in ("causal", "joined"):  # without the random masks of empty ones
        assert whole.found.cost[f"{stage}, forward and backward"] <= planned[stage].attacked


def test_what_memories_share_is_counted_once(tiny: StableDiffusion, tmp_path: Path) -> None:
    run = Run(tmp_path, say=lambda line: None, modules=())
    bench = Bench(tiny, judge(-1.5), PLAN, run, "model", {})
    for key in ("price.none", "price.most-changed", "price.none"):
        bench.count_shared(key, Rows(forward=10))
    assert bench.cost == {"price, forward": 20}


def test_a_finished_run_costs_nothing_again_and_gives_the_same(whole: Whole) -> None:
    rows = [model.rows for model in (whole.subjects.model, *whole.subjects.twins)]
    again = tiny_run(whole.subjects, whole.folder)
    assert [model.rows for model in (whole.subjects.model, *whole.subjects.twins)] == rows
    assert dataclasses.replace(again, provenance={}) == dataclasses.replace(whole.found, provenance={})


def test_a_killed_run_goes_on_where_it_was_and_ends_the_same(whole: Whole, tmp_path: Path) -> None:
    lines = 0

    def die(line: str) -> None:
        nonlocal lines
        lines += line.startswith("locality: ")
        if lines == 20:
            raise KeyboardInterrupt

    run = Run(tmp_path, say=die, modules=())
    with pytest.raises(KeyboardInterrupt), run.locked():
        locality(whole.subjects, plan=PLAN, judge=judge(-1.5), run=run)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    again = tiny_run(whole.subjects, tmp_path)
    assert len(kept) == 20 and all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert dataclasses.replace(again, provenance={}) == dataclasses.replace(whole.found, provenance={})


def test_locality_json_is_read_back_as_it_was(whole: Whole, tmp_path: Path) -> None:
    read = read_locality(whole.folder / "locality.json")
    assert read.to_json() == whole.found.to_json()
    assert all(getattr(read, name) == getattr(whole.found, name) for name in LISTS)
    data = json.loads(whole.found.to_json())
    for broken in ({}, data | {"schema": 0}, data | {"overlaps": [{}]}):
        (tmp_path / "x.json").write_text(json.dumps(broken))
        with pytest.raises(DoriError, match="x.json"):
            read_locality(tmp_path / "x.json")


def test_without_a_trigger_nothing_is_said_about_triggers(tiny: StableDiffusion, tmp_path: Path) -> None:
    found = tiny_run(tiny_subjects(tiny), tmp_path / "run", threshold=1.5)
    assert [(s.id, s.triggers) for s in found.subjects] == [("m2", 0), ("m1", 0)]
    assert not found.probes and not found.crosses and {o.memory for o in found.overlaps} == {""}
    values = {m.name: m.value for m in found.measures if m.memory == "m1"}
    assert values["between triggers"] is None and values["common share of the moves"] is None


def test_attacks_that_diverge_find_nothing_and_end_no_run(
    tiny: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision may overflow: here the first attack of every chunk ends in no number."""
    attacked = Dori.__call__

    def diverging(self: Dori, *given: Any, **named: Any) -> Triggers:
        found = attacked(self, *given, **named)
        found.embeddings[0] = float("nan")
        return found

    monkeypatch.setattr(Dori, "__call__", diverging)
    found = tiny_run(tiny_subjects(tiny), tmp_path / "run", plan=dataclasses.replace(PLAN, memories=1, causal=None))
    lost = [(t.start, t.index) for t in found.triggers if t.moved is None]
    assert lost == [("gaussian", 0), ("foreign", 0)] and not any(t.replicates for t in found.triggers if not t.moved)
    assert [(s.attacks, s.triggers) for s in found.subjects] == [(5, 3)]
    ends = [(p.start, p.index) for p in found.places if p.role in ("trigger", "attacked")]
    assert sorted(ends) == [("foreign", 1), ("gaussian", 1), ("gaussian", 2)]
    (tmp_path / "locality.json").write_text(found.to_json())
    assert read_locality(tmp_path / "locality.json") == found
    assert "2 of 5 attacks diverged and count as failed" in render(found, tmp_path / "run")


def test_a_prompt_that_is_too_long_is_told_before_anything_runs(tiny: StableDiffusion) -> None:
    """Also the last one, whose turn comes after hours and only because a memory's own text was left out."""
    ordinary = ("abcde", *(f"word {k}" for k in range(12)), "x" * 40)
    subjects = dataclasses.replace(tiny_subjects(tiny), ordinary=ordinary)
    with pytest.raises(DoriError, match="shorten it"):
        choose_sets(subjects, PLAN)


def test_too_few_prompts_are_refused_in_one_sentence(tiny: StableDiffusion) -> None:
    subjects = tiny_subjects(tiny)
    with pytest.raises(DoriError, match="ordinary prompts"):
        choose_sets(dataclasses.replace(subjects, ordinary=("a", "b")), PLAN)
    with pytest.raises(DoriError, match="at least two texts"):
        choose_sets(dataclasses.replace(subjects, memories=subjects.memories[:1]), PLAN)


def test_no_ordinary_prompt_serves_two_uses(tiny: StableDiffusion) -> None:
    sets = choose_sets(tiny_subjects(tiny), PLAN)
    parts = [sets.ordinary, sets.foreign, sets.calibration]
    texts = [text for part in parts for text in part.origin["texts"]] + list(sets.quality)  # type: ignore[attr-defined]
    assert len(set(texts)) == len(texts) and [len(part) for part in parts] == [6, 2, 3] and len(sets.quality) == 2


def test_reference_prompts_are_different_and_none_is_a_memorys(tiny: StableDiffusion) -> None:
    subjects = tiny_subjects(tiny)
    ordinary = ("abcde", "word 0", *subjects.ordinary)  # a memory's own text, and one that stands there twice
    sets = choose_sets(dataclasses.replace(subjects, ordinary=ordinary), PLAN)
    parts = (sets.ordinary, sets.foreign, sets.calibration)
    texts = [text for part in parts for text in part.origin["texts"]] + list(sets.quality)  # type: ignore[attr-defined]
    assert len(set(texts)) == len(texts) and "abcde" not in texts
    twice = subjects.memories[:1] * 2
    with pytest.raises(DoriError, match="1 different texts"):
        choose_sets(dataclasses.replace(subjects, memories=twice), PLAN)


def test_memorized_prompts_are_those_that_bring_their_image_back(tiny: StableDiffusion, tmp_path: Path) -> None:
    """One of the images of a text is enough; with fewer than two such prompts all stay, and the share tells."""
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    texts = ("abcde", "bcde", "cde", "abcde")
    named = [Memory(f"m{k}", text, Path("a.png")) for k, text in enumerate(texts)]
    subjects = dataclasses.replace(tiny_subjects(tiny), memories=make_cases(tiny, named, images, "memory"))
    drawn = draw(tiny, PLAN.judging(), tiny.encode(list(texts)), PLAN.fresh_seeds())
    like = cosine(thumbnails(drawn.flatten(0, 1)), thumbnails(images).repeat_interleave(PLAN.seeds, dim=0))
    medians = like.unflatten(0, (4, PLAN.seeds)).double().quantile(0.5, dim=1)
    by_text = {"abcde": medians[[0, 3]].max(), "bcde": medians[1], "cde": medians[2]}
    worst_first = sorted(by_text, key=lambda text: float(by_text[text]))
    for missed, kept in ((0, set(texts)), (1, set(worst_first[1:])), (2, set(texts)), (3, set(texts))):
        threshold = float(by_text[worst_first[missed - 1]]) + 1e-4 if missed else -1.5
        run = Run(tmp_path / str(missed), modules=())
        bench = Bench(tiny, judge(threshold), PLAN, run, "tiny", {"descriptor": threshold})
        sets, share = keep_memorized(bench, choose_sets(subjects, PLAN))
        assert set(sets.memorized.origin["texts"]) == kept and len(sets.memorized) == len(kept)  # type: ignore[call-overload]
        assert share.value == pytest.approx((3 - missed) / 3, abs=1e-6) and share.n == 3


def test_where_a_prompt_brings_nothing_back_the_next_one_is_tried(tiny: StableDiffusion, tmp_path: Path) -> None:
    """Two are wanted: the first and the last text are tried, then the one between, if one of them failed."""
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    texts, plan = ("abcde", "bcde", "cde"), dataclasses.replace(PLAN, set_size=2)
    named = [Memory(f"m{k}", text, Path("a.png")) for k, text in enumerate(texts)]
    cases = make_cases(tiny, named, images, "memory")
    subjects = dataclasses.replace(tiny_subjects(tiny), memories=cases)
    for failing, kept in (((), ("abcde", "cde")), (("m0",), ("cde", "bcde")), (("m0", "m1"), ("abcde", "cde"))):
        run = Run(tmp_path / "-".join(("run", *failing)), modules=())
        bench = Bench(tiny, judge(0.0), plan, run, "tiny", {"descriptor": 0.0})
        for case in cases:  # what is stored is taken, so that the test decides who comes back
            like = torch.full((1, plan.seeds), -1.0 if case.memory.id in failing else 1.0)
            inputs = bench.judged_inputs(case, encoded(tiny, [str(case.memory.text)]), plan.fresh_seeds())
            bench.tensors(f"memorized.{case.memory.id}", inputs, Rows(), lambda like=like: {"similarity": like})
        sets, share = keep_memorized(bench, choose_sets(subjects, plan))
        assert sets.memorized.origin["texts"] == list(kept)
        assert (share.value, share.n) == {0: (1.0, 2), 1: (0.666667, 3), 2: (0.333333, 3)}[len(failing)]


def test_a_shorter_run_does_not_replace_a_longer_ones_records(whole: Whole) -> None:
    path, found = whole.folder / "locality.json", whole.found
    assert not says_less(found, path) and not says_less(found, path.with_name("none.json"))
    assert says_less(dataclasses.replace(found, crosses=()), path)
    assert says_less(dataclasses.replace(found, subjects=found.subjects[:1]), path)


def test_few_memories_are_the_most_duplicated_and_many_are_spread_over_the_doses(tiny: StableDiffusion) -> None:
    images = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    doses = (1.0, 8.0, 3.0, 6.0, 1.0, 8.0, None, 3.0, 6.0)  # as a folder may list them
    named = [Memory(f"m{k}", chr(97 + k), Path("a.png"), dose=dose) for k, dose in enumerate(doses)]
    subjects = dataclasses.replace(tiny_subjects(tiny), memories=make_cases(tiny, named, images, "memory"))
    for limit, ids in ((2, ["m1", "m5"]), (5, ["m1", "m3", "m2", "m0", "m6"])):
        sets = choose_sets(subjects, dataclasses.replace(PLAN, memories=limit))
        assert [case.memory.id for case in sets.cases] == ids


@pytest.mark.parametrize(("name", "limit_s"), [("quick", 600), ("full", 12 * 3600)])
def test_the_presets_fit_their_time(name: str, limit_s: int) -> None:
    """By arithmetic at the testbed's speeds on two cores, for as many memories and layers as it has."""
    plan = PRESETS[name]()
    memories = tuple((f"m{k}", True) for k in range(plan.memories))
    counts = (min(68, plan.set_size), plan.set_size, plan.foreign, plan.calibration_prompts, 38, 17)
    prompted = tuple(f"p{k}" for k in range(counts[0]))
    sizes = Sizes(memories, prompted, *counts, twins=2, quality=plan.quality_prompts, held_out=True)
    cells = planned(plan, sizes, method_names(plan)).values()
    total = [rows for part in cells for rows in part.values()]
    assert sum(total, Rows()).seconds_s(Speed(250, 90)) < 0.9 * limit_s
    attacks = sum(
        rows.attacked
        for key, rows in {k: v for part in cells for k, v in part.items()}.items()
        if key.startswith("triggers")
    )
    assert attacks == plan.memories * (1 + plan.gaussian + plan.foreign + plan.repeats) * 50 * 8


def test_activations_are_read_at_the_same_places_of_any_grid() -> None:
    plan = PRESETS["full"]()
    assert plan.activation_steps == (0, 5, 12) and plan.sampling_steps == 25
    finer, coarse = plan.drawn_by(Sampling(50, 7.0)), plan.drawn_by(Sampling(1, 1.0))
    assert (finer.activation_steps, finer.sampling_steps, finer.guidance_scale) == ((0, 10, 24), 50, 7.0)
    assert coarse.activation_steps == (0,)
