"""Every memory has another one beside it, whichever of them the run reaches, and prompts keep their uses."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from test_locality_run import PLAN, tiny_run, tiny_subjects

from dori.audit.loop import make_cases
from dori.locality.costs import by_stage
from dori.locality.loop import costs, in_turns
from dori.locality.masks import Masks
from dori.locality.measures import apart_overlaps
from dori.locality.page.summary import least_p
from dori.locality.records import WHOLE
from dori.locality.subjects import choose_sets
from dori.locality.weights import agreement
from dori.memory import Memory
from dori.model.stable_diffusion import StableDiffusion
from dori.stats import choose


def test_every_memory_of_three_stands_beside_another(tiny: StableDiffusion, tmp_path: Path) -> None:
    """The first beside the last, and what that costs was planned."""
    plan = dataclasses.replace(PLAN, causal=None, memories=3)
    subjects = tiny_subjects(tiny)
    found = tiny_run(subjects, tmp_path / "run", plan=plan)
    for group in ("triggers of other images", "triggers of other images, other noises", "other noises, same starts"):
        assert {o.memory for o in found.overlaps if o.group == group} == {"m0", "m1", "m2"}, group
    assert {a.memory for a in found.activities if a.group == "triggers, same starts"} == {"m0", "m1", "m2"}
    planned = by_stage(costs(subjects, plan, choose_sets(subjects, plan)))["activations"].forward
    # Each two memories' halves had two of three starts in common, 6 rows less.
    assert planned - found.cost["activations, forward"] == 3 * 6


def test_the_ceiling_and_both_memories_are_of_the_same_triggers() -> None:
    """By brute force: within either memory, between them, and one trigger with itself, all under different noises."""
    draw = torch.Generator().manual_seed(0)
    here, there = (
        [Masks("Wanda", {"w": torch.rand(3, 4, 6, generator=draw) < 0.4}, torch.zeros(0)) for _ in range(2)]
        for _ in range(2)
    )
    found = {o.group: o for o in apart_overlaps("m", here, there) if o.layer == WHOLE}

    def iou(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a & b).sum()) / float((a | b).sum())

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    noises = [(0, 1), (1, 0)]
    different = [(i, j) for i in range(3) for j in range(3) if i != j]
    w = {"here": [m.by_layer["w"] for m in here], "there": [m.by_layer["w"] for m in there]}
    within = [iou(one[a][i], one[b][j]) for one in w.values() for a, b in noises for i, j in different]
    across = [iou(w["here"][a][i], w["there"][b][j]) for a, b in noises for i, j in different]
    same = [float(agreement(torch.stack([one[0][i], one[1][i]])).published) for one in w.values() for i in range(3)]
    assert found["triggers, other noises"].published == pytest.approx(mean(within), abs=1e-6)
    assert found["triggers of other images, other noises"].published == pytest.approx(mean(across), abs=1e-6)
    assert found["other noises, same starts"].published == pytest.approx(mean(same), abs=1e-6)


def test_memories_come_dose_by_dose_so_that_a_stopped_run_has_several(tiny: StableDiffusion) -> None:
    doses = (8, 8, 8, 6, 6, 3, 1, 1)
    memories = [Memory(f"v{k}", f"{'abcdefgh'[k]}", Path(f"{k}.png"), dose=float(d)) for k, d in enumerate(doses)]
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    subjects = dataclasses.replace(tiny_subjects(tiny), memories=make_cases(tiny, memories, images, "memory"))

    def analysed(limit: int) -> list[float | None]:
        return [case.memory.dose for case in choose_sets(subjects, dataclasses.replace(PLAN, memories=limit)).cases]

    assert analysed(8) == [8, 6, 3, 1, 8, 6, 1, 8]
    assert sorted(map(str, analysed(6))) == sorted(str(float(doses[k])) for k in choose(8, 6))
    assert analysed(3) == [8, 8, 8]  # of so few no relation to the dose can be told


def test_fewer_attacks_leave_the_other_prompts_as_they_are(tiny: StableDiffusion) -> None:
    subjects = tiny_subjects(tiny)
    many, few = (choose_sets(subjects, dataclasses.replace(PLAN, set_size=4, foreign=k)) for k in (2, 1))
    assert many.quality == few.quality and len(many.foreign) == 2 and len(few.foreign) == 1
    assert many.calibration.sha256 == few.calibration.sha256 and many.ordinary.sha256 == few.ordinary.sha256


def test_the_least_p_is_that_of_the_most_extreme_order() -> None:
    assert least_p([1, 2, 3, 4, 5]) == pytest.approx(2 / 120)
    assert least_p([8, 8, 8, 6, 6]) == pytest.approx(2 * 6 * 2 / 120)
    assert least_p([1, 1, 1]) == 1


def test_the_first_tests_differ_in_method_and_memory() -> None:
    assert in_turns("ab", [1, 2]) == [("a", 1), ("b", 2), ("a", 2), ("b", 1)]
    assert in_turns("ab", [1]) == [("a", 1), ("b", 1)] and in_turns("ab", []) == []
    assert sorted(in_turns("ab", [1, 2, 3])) == sorted(itertools.product("ab", [1, 2, 3]))
