"""A locality run asks everything that it planned, keeps it, resumes from it, and says what it did not find."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_parts
from torch import Tensor
from torch.nn import functional

from dori.attack.dori import Dori
from dori.audit.judge import Judge
from dori.audit.loop import Subjects, make_cases
from dori.errors import DoriError
from dori.locality.costs import Rows, by_stage
from dori.locality.loop import costs, locality
from dori.locality.plan import PRESETS, Causal, Plan
from dori.locality.records import LISTS, Locality, read_locality
from dori.locality.subjects import choose_sets
from dori.memory import Memory
from dori.metrics.similarity import Descriptor
from dori.mitigate.nemo import Nemo
from dori.mitigate.wanda import Wanda
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run

MEMORIES = tuple(
    Memory(f"m{k}", None if k == 2 else "abcde"[k:], Path(f"m{k}.png"), dose=float(2**k)) for k in range(3)
)
PLAN = Plan(
    "tiny",
    memories=2,
    gaussian=3,
    foreign=2,
    attack=Dori(steps=1, batch=1),
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
    set_size=5,
    nemo=Nemo(noises=2, max_refinement_passes=2),
    wandas=(Wanda(sparsity=0.2, counted_steps=1, ddim_steps=4),),
    ceiling=2,
    ceiling_seeds=2,
    calibration_prompts=3,
    causal=Causal(memories=1, triggers=2, fresh=1, joined_fresh=1, quality_prompts=2),
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
    expected = [("m0", "prompt", 0), *((memory, *start) for memory in ("m0", "m2") for start in starts)]
    assert sorted(asked) == sorted(expected)
    assert [(s.id, s.attacks, s.triggers) for s in whole.found.subjects] == [("m0", 6, 6), ("m2", 5, 5)]


def test_each_analysis_has_its_reference_levels(whole: Whole) -> None:
    found = whole.found
    for memory in ("m0", "m2"):
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
            }
        groups = {a.group for a in found.activities if a.memory in (memory, "")}
        assert {"triggers", "other noises", "memorized prompts", "ordinary prompts", "gaussian starts"} <= groups
    layers = found.settings["layers"]
    assert {a.layer for a in found.activities} == {*layers["attention_value"], *layers["feed_forward"]}
    measured = {m.name for m in found.measures if m.memory in ("m0", "")}
    assert {
        "between triggers",
        "between their starts",
        "between their moves, gaussian",
        "moved, prompt",
        "between ordinary prompts",
        "between memorized prompts",
        "common share of the moves, foreign",
    } <= measured
    assert {c.layer for c in found.covers if c.method == "NeMo"} > {"all"}
    assert all(0 <= c.density <= 1 and c.twins is not None for c in found.covers)
    assert found.changes[0].floor is not None
    kinds = {(p.kind, p.at) for p in found.probes if p.memory == "m0"}
    assert kinds == {("line between triggers", 0.5), ("line to an ordinary prompt", 0.5), ("ball", 0.1), ("ball", 1.0)}


def test_values_of_one_embedding_do_not_depend_on_noise_and_noise_reaches_the_rest(whole: Whole) -> None:
    same = [a for a in whole.found.activities if a.group == "other noises" and a.memory == "m0" and a.step == 0]
    assert max(a.value or 0 for a in same if a.site == "attention_value") == pytest.approx(0, abs=1e-6)
    assert min(a.value or 0 for a in same if a.site == "feed_forward") > 1e-4


def test_the_causal_test_fills_its_matrix_for_the_first_memory_alone(whole: Whole) -> None:
    crosses = {(c.memory, c.method): c for c in whole.found.crosses}
    assert set(crosses) == {("m0", "NeMo"), ("m0", "Wanda 20 %")}
    for cross in crosses.values():
        assert [len(cross.replay), len(cross.again), len(cross.fresh)] == [2, 2, 2]
        assert {len(row) for row in (*cross.replay, *cross.again)} == {2} and {len(row) for row in cross.fresh} == {1}
    masks = [(j.masks, j.n) for j in whole.found.joined if j.method == "NeMo"]
    assert masks == [(0, 1), (1, 1), (2, 1)]
    assert {p.direction for p in whole.found.patches} == {"sufficient", "necessary"}
    assert {p.memory for p in whole.found.patches} == {"m0"}


def test_a_run_leaves_the_weights_as_they_were(whole: Whole) -> None:
    assert whole.fingerprints[0] == whole.fingerprints[1]


def test_every_cell_was_planned_and_every_planned_cell_is_done(whole: Whole) -> None:
    stored = {path.stem for path in (whole.folder / "cells").iterdir()}
    assert stored - {"quality.reference"} <= set(whole.planned)
    assert whole.said[-1].startswith("locality: 100 %") or any("100 %" in line for line in whole.said)


def test_the_plan_counts_the_rows_that_go_through_the_network(tiny: StableDiffusion, tmp_path: Path) -> None:
    """Without NeMo's searches, whose length is not known beforehand, planned and counted rows are the same."""
    plan = dataclasses.replace(PLAN, causal=None, memories=1)
    subjects = tiny_subjects(tiny)
    rows = tiny.rows
    found = tiny_run(subjects, tmp_path / "run", plan=plan)
    used, planned = tiny.rows - rows, by_stage(costs(subjects, plan, choose_sets(subjects, plan)))
    assert sum(found.cost.values()) == sum(r.attacked + r.forward for r in planned.values())
    assert 0 < used <= sum(found.cost.values())
    assert found.cost["triggers, forward and backward"] == 6 == planned["triggers"].attacked


def test_a_finished_run_costs_nothing_again_and_gives_the_same(whole: Whole) -> None:
    rows = [model.rows for model in (whole.subjects.model, *whole.subjects.twins)]
    again = tiny_run(whole.subjects, whole.folder)
    assert [model.rows for model in (whole.subjects.model, *whole.subjects.twins)] == rows
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
    assert [(s.id, s.triggers) for s in found.subjects] == [("m0", 0), ("m2", 0)]
    assert not found.probes and not found.crosses and {o.memory for o in found.overlaps} == {""}
    values = {m.name: m.value for m in found.measures if m.memory == "m0"}
    assert values["between triggers"] is None and values["common share of the moves"] is None


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
    assert len(set(texts)) == len(texts) and [len(part) for part in parts] == [5, 2, 3] and len(sets.quality) == 2


def test_the_presets_fit_their_time(tiny: StableDiffusion) -> None:
    """By arithmetic at the testbed's measured speeds, for as many memories and layers as it has."""
    from dori.locality.costs import Sizes, planned

    for name, limit_s in (("quick", 600), ("full", 12 * 3600)):
        plan = PRESETS[name]()
        sizes = Sizes(
            tuple((f"m{k}", True) for k in range(plan.memories)),
            min(68, plan.set_size),
            plan.set_size,
            plan.foreign,
            plan.calibration_prompts,
            32,
            2,
        )
        total = by_stage(planned(plan, sizes, ("NeMo", *(f"Wanda {k}" for k in range(len(plan.wandas))))))
        assert sum(rows.seconds_s(55, 120) for rows in total.values()) < 0.9 * limit_s
