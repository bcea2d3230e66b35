"""The proof measures what it says and survives a kill, and its verdict follows the stated rules on made-up outcomes."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from erasing import DESCRIPTOR, cases, draw

from dori.attack.dori import Dori
from dori.audit.judge import Judge
from dori.cost import Rows
from dori.erase.battery import Battery, State
from dori.erase.delta import WeightDelta
from dori.erase.latent_attack import LatentAttack
from dori.erase.outcomes import Outcome, areas, back, relearning_steps
from dori.erase.protocol import LORA_LONGER, Protocol
from dori.erase.relearn import Relearning
from dori.erase.tuning import Tuner
from dori.erase.verdict import Test as Compared
from dori.erase.verdict import _distances, compare, verdict
from dori.memory import Memory
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run

RELEARNINGS = ("relearn", "relearn, LoRA")
SHORT = Protocol(
    seeds=2,
    sampling_steps=1,
    guidance_scale=2.0,
    attack=Dori(steps=2, batch=1, snapshots=(0, 1, 2)),
    starts=("prompt", "foreign"),
    long=Dori(steps=3, batch=1),
    restricted=Dori(steps=1, batch=1, free_positions=(1,)),
    latent=LatentAttack(steps=1, sampling_steps=1),
    again=Dori(steps=1, batch=1, snapshots=(0, 1)),
    relearning=Relearning(steps=2, batch=1, check_every=1, tuner=Tuner(learning_rate=1e-3)),
    lora_rate=0.1,
    chunk=2,
)


def battery(folder: Path) -> Battery:
    """A battery on a run folder."""
    return Battery(SHORT, Judge(DESCRIPTOR), Run(folder, modules=()), ("x", "yy", "z"), {})


def small_edit(model: StableDiffusion) -> WeightDelta:
    """A change of one weight."""
    return WeightDelta("small", {"conv_in.weight": 0.05 * draw(*model.unet.conv_in.weight.shape, seed=3)})


def test_every_state_is_asked_in_every_way_and_nothing_is_left_behind(tiny: StableDiffusion, tmp_path: Path) -> None:
    images = (*cases(tiny, 2), *cases(tiny, 1, "control", seed=8))
    before, judge = model_fingerprint(tiny), battery(tmp_path)
    state = State("erased", tiny, (small_edit(tiny),))
    planned, rows = judge.costs(state, images), tiny.rows
    found = judge.measure(state, images)
    used, most = tiny.rows - rows, sum(planned.values(), Rows()).count
    skipped = Counter[str]()
    for last in last_looks(found):
        how = SHORT.relearnings[last.way]
        looks = (how.steps - last.steps) // how.check_every
        skipped["rows"] += (how.steps - last.steps) * how.batch + looks * 2 * SHORT.seeds * SHORT.sampling_steps
    assert used == most - skipped["rows"]
    assert model_fingerprint(tiny) == before
    assert {path.stem for path in (tmp_path / "cells").iterdir()} == set(planned)
    ways = {(o.way, o.start, o.steps) for o in found if o.way not in RELEARNINGS}
    assert ways == {
        ("prompt", "", 0),
        ("long", "prompt", 3),
        ("restricted", "prompt", 1),
        ("latent", "", 1),
        *(("dori", start, step) for start in ("prompt", "foreign") for step in (0, 1, 2)),
    }
    assert {(o.id, o.group) for o in found} == {(c.memory.id, c.group) for c in images}
    assert all((o.position is not None) == (o.way == "latent") for o in found)
    looks = {way: [o for o in found if o.way == way and o.id == "memory-0"] for way in RELEARNINGS}
    for (way, one), longer in zip(looks.items(), (1, LORA_LONGER), strict=True):
        assert [o.steps for o in one] == [0, longer, 2 * longer] or one[-1].came_back, way
    whole, lora = ([o.similarities for o in one] for one in looks.values())
    assert whole[0] == lora[0] and whole[1:] != lora[1:]  # before any update they are the same model
    again = battery(tmp_path)
    again.run.say = lambda line: pytest.fail(line)
    assert again.measure(state, images) == found  # all read back


def test_altered_states_differ_and_are_asked_by_the_short_attack(tiny: StableDiffusion, tmp_path: Path) -> None:
    images, judge = cases(tiny, 2), battery(tmp_path)
    asked = judge.measure(State("original", tiny, whole=False, relearned=False), images)
    assert {o.way for o in asked} == {"prompt", "dori"}
    plain = judge.measure(State("original", tiny, whole=False), images)
    eighth = judge.measure(State("original, int8", tiny, rounding="int8", whole=False), images)
    assert {o.way for o in plain} == {"prompt", "dori", *RELEARNINGS}
    assert {o.way for o in eighth} == {"prompt", "dori", "relearn"}  # a rounded form
    edited = State("erased, int8", tiny, (small_edit(tiny),), "int8", whole=False)
    assert {o.way for o in judge.measure(edited, images)} == {"prompt", "dori", "relearn"}  # no LoRA
    assert {o.restart for o in plain} == {0}
    assert max(o.steps for o in plain if o.way == "dori") == 1
    assert [o.similarities for o in plain] != [o.similarities for o in eighth]
    direct = [o for o in plain if o.way == "prompt"]
    same = [o for o in plain if o.way == "relearn" and o.steps == 0]
    assert [o.similarities for o in direct] == [o.similarities for o in same]


def test_what_is_compared_is_asked_as_often_in_every_state(tiny: StableDiffusion, tmp_path: Path) -> None:
    judge, images = battery(tmp_path), cases(tiny, 1)
    judge = dataclasses.replace(judge, protocol=dataclasses.replace(SHORT, restarts=3))
    for whole in (True, False):
        state = State(f"whole {whole}", tiny, whole=whole)
        found = judge.measure(state, images)
        for way, step in (("dori", 1), ("relearn", 1), ("relearn, LoRA", LORA_LONGER)):
            asked = [o for o in found if o.way == way and o.steps == step and o.start != "foreign"]
            looks = {o.restart: o.similarities for o in asked}
            assert len(looks) == 3 and len({*looks.values()}) == 3  # by other noises
    planned = judge.costs(State("whole False", tiny, whole=False), images)
    assert {*planned} <= {path.stem for path in (tmp_path / "cells").iterdir()}


def test_images_without_a_text_are_attacked_from_noise_instead_of_their_prompt(
    tiny: StableDiffusion, tmp_path: Path
) -> None:
    bare = dataclasses.replace(cases(tiny, 1)[0], memory=Memory("bare", None, Path("b.png")))
    found = battery(tmp_path).measure(State("erased", tiny), [bare])
    starts = {"dori": {"prompt", "foreign"}, "long": {"prompt"}, "restricted": {"prompt"}}
    starts |= {"latent": {""}} | {way: {""} for way in RELEARNINGS}
    assert {way: {o.start for o in found if o.way == way} for way in {o.way for o in found}} == starts
    # At step 0 nothing was attacked yet: the image comes from noise, not from the empty prompt.
    first = next(o for o in found if (o.way, o.start, o.steps) == ("dori", "prompt", 0))
    empty = next(o for o in found if (o.way, o.steps) == ("relearn", 0))
    assert first.similarities != empty.similarities


def test_templates_are_judged_blind_to_what_varies(tiny: StableDiffusion, tmp_path: Path) -> None:
    case = cases(tiny, 1)[0]
    template = dataclasses.replace(
        case, memory=dataclasses.replace(case.memory, kind="template", varying_box=(2, 2, 9, 9))
    )
    judge = battery(tmp_path)
    judge = dataclasses.replace(judge, judge=Judge(dataclasses.replace(DESCRIPTOR, masked_threshold=0.9)))
    whole, masked = (
        judge.measure(State(name, tiny, whole=False), [one])[0] for name, one in (("a", case), ("b", template))
    )
    assert (whole.threshold, masked.threshold) == (0.7, 0.9) and whole.similarities != masked.similarities


def last_looks(outcomes: list[Outcome]) -> list[Outcome]:
    """The last look at each image's relearning."""
    found = {(o.id, o.way): o for o in sorted(outcomes, key=lambda o: o.steps) if o.way in RELEARNINGS}
    return list(found.values())


# ------------------------------------------------------------------------------------------------ numbers and verdict


def curve(
    one: str,
    state: str,
    values: list[float],
    *,
    group: str = "memory",
    steps: tuple[int, ...] = (0, 50, 150),
    restart: int = 0,
) -> list[Outcome]:
    """An attack curve."""
    return [
        Outcome(one, group, state, "dori", "prompt", restart, step, (value,), 0.7)  # type: ignore[arg-type]
        for step, value in zip(steps, values, strict=True)
    ]


def test_areas_and_steps_are_counted_by_hand() -> None:
    found = [
        *curve("a", "s", [0.0, 0.5, 0.7]),
        *curve("a", "s", [0.2, 0.7, 0.9], restart=1),
        *curve("b", "other", [1, 1, 1]),
    ]
    first, second = (0.25 * 50 + 0.6 * 100) / 150, (0.45 * 50 + 0.8 * 100) / 150
    assert areas(found, "s") == {"a": pytest.approx((first + second) / 2)}
    assert areas(found, "s", only=frozenset({("prompt", 0), ("prompt", 50)})) == {"a": pytest.approx((0.25 + 0.45) / 2)}
    looks = [
        Outcome("a", "memory", "s", "relearn", "", 0, step, (value, value), 0.7)
        for step, value in ((0, 0.1), (5, 0.71), (10, 0.6))
    ]
    looks += [Outcome("b", "memory", "s", "relearn", "", 0, step, (0.7,), 0.7) for step in (0, 60)]
    assert relearning_steps(looks, "s", unreached=65) == {"a": 5.0, "b": 65.0}
    rate = back(found, "s", "memory", "dori", at_most=150)
    assert (rate.value, rate.n) == (1.0, 1) and back(found, "s", "memory", "dori", at_most=50).value == 0.0


Values = Callable[[str, int], tuple[float, float, float, float]]  # prompt, area at 50 and 150, steps to relearn


def population(state: str, memory: Values, control: Values, count: int = 20) -> list[Outcome]:
    """Outcomes of memories and controls in one state, with a little spread between images."""
    rng, found = np.random.default_rng(sum(map(ord, state))), []
    for group, values in (("memory", memory), ("control", control)):
        for i in range(count):
            prompt, at_50, at_150, learn = values(state, i)
            shake = 0.005 * rng.standard_normal(3)
            one = f"{group}-{i}"
            found.append(Outcome(one, group, state, "prompt", "", 0, 0, (prompt + shake[0],), 0.7))
            found += curve(one, state, [prompt + shake[0], at_50 + shake[1], at_150 + shake[2]], group=group)
            found += [
                Outcome(one, group, state, way, "", 0, longer * step, (1.0 if step >= learn else 0.0,), 0.7)
                for way, longer in zip(RELEARNINGS, (1, LORA_LONGER), strict=True)
                for step in range(0, 61, 5)
                if longer == 1 or "," not in state
            ]
    return found


def unseen(state: str, index: int) -> tuple[float, float, float, float]:
    """An image that nobody saw."""
    return 0.1, 0.3, 0.5, 30 + 5 * (index % 3)


def judged_as(
    erased: Values,
    *,
    original: Values | None = None,
    twins: bool = True,
    restarts: int = 1,
    blind: float = 0.5,
    altered: Values | None = None,
    spoiled: float = 1.0,
    learnable: bool = True,
) -> tuple[str, tuple[str, ...]]:
    """The verdict on made-up outcomes."""
    stored: Values = lambda state, index: (0.9, 0.95, 0.95, 0)  # noqa: E731
    found = population("original", original or stored, unseen) + population("erased", erased, unseen)
    if altered is not None:
        found += population("erased, int8", altered, unseen)
    if twins:
        found += population("twin", unseen, unseen)
    if not learnable:
        found = [dataclasses.replace(o, similarities=(0.0,)) if o.way in RELEARNINGS and o.steps else o for o in found]
    names = ("twin",) if twins else ()
    result = verdict(found, Protocol(restarts=restarts), twins=names, blind={"size": blind}, spoiled=spoiled)
    return result.name, result.reasons


def hidden(state: str, index: int) -> tuple[float, float, float, float]:
    """Gone from the prompt, back under attack."""
    return 0.2, 0.9, 0.9, 5


@pytest.mark.parametrize("twins", [True, False])
def test_removed_is_said_only_when_memories_behave_as_unseen(twins: bool) -> None:
    assert judged_as(unseen, twins=twins, restarts=3)[0] == "removed"
    assert judged_as(hidden, twins=twins, restarts=3)[0] == "hidden"
    assert judged_as(lambda s, i: (0.9, 0.95, 0.95, 0), twins=twins, restarts=3)[0] == "untouched"
    weaker = judged_as(lambda s, i: (0.1, 0.45, 0.65, 30), twins=twins, restarts=3)
    told = [reason for reason in weaker[1] if "area" in reason]
    assert weaker[0] == "weakened" and "a difference is shown" in told[0]


def test_harder_to_reach_than_an_unseen_image_is_not_removed() -> None:
    name, reasons = judged_as(lambda s, i: (0.0, 0.05, 0.1, 60))
    assert name == "weakened" and any("a difference is shown" in reason for reason in reasons)
    assert judged_as(lambda s, i: (0.1, 0.3, 0.5, 10))[0] == "weakened"  # relearned too fast


def test_what_rounding_brings_back_is_not_removed() -> None:
    assert judged_as(unseen, altered=unseen)[0] == "removed"
    name, reasons = judged_as(unseen, altered=hidden)
    assert name == "weakened" and any(reason.startswith("erased, int8") for reason in reasons)


def test_a_ruined_model_is_not_called_clean() -> None:
    """What draws nothing hides memories and controls alike, so that all differences of differences vanish."""
    dead: Values = lambda state, index: (0.0, 0.0, 0.0, 999)  # noqa: E731
    found = population("original", lambda s, i: (0.9, 0.95, 0.95, 0), unseen)
    found += population("erased", dead, dead) + population("twin", unseen, unseen)
    result = verdict(found, Protocol(), twins=("twin",), blind={}, spoiled=9.0)
    assert result.name == "weakened" and any("spoiled" in reason for reason in result.reasons)
    assert any("0 of 20 controls were learned on erased" in reason for reason in result.reasons)
    assert judged_as(unseen, spoiled=1.9)[0] == "removed" and judged_as(unseen, spoiled=2.1)[0] == "weakened"


def test_a_second_kind_of_relearning_can_forbid_removed_alone() -> None:
    found = population("original", lambda s, i: (0.9, 0.95, 0.95, 0), unseen)
    found += population("erased", unseen, unseen) + population("twin", unseen, unseen)

    def told(outcomes: list[Outcome], protocol: Protocol) -> list[str]:
        result = verdict(outcomes, protocol, twins=("twin",), blind={}, spoiled=1.0)
        against = [] if result.name == "removed" else [r for r in result.reasons if "LoRA" in r]
        assert bool(against) == (result.name != "removed")
        return against

    def sooner(o: Outcome) -> Outcome:
        hit = (o.way, o.state, o.group) == (RELEARNINGS[1], "erased", "memory") and o.steps >= 10 * LORA_LONGER
        return dataclasses.replace(o, similarities=(1.0,)) if hit else o

    assert told(found, Protocol()) == []
    against = told([sooner(o) for o in found], Protocol())
    assert any("steps to relearn through a LoRA" in line and "a difference is shown" in line for line in against)
    without = [o for o in found if o.way != RELEARNINGS[1]]
    assert any("erased: relearning through a LoRA was not compared" in line for line in told(without, Protocol()))
    assert told(without, Protocol(lora_rate=None)) == []


def test_relearning_that_teaches_nothing_compares_nothing() -> None:
    name, reasons = judged_as(unseen, learnable=False)
    assert name == "weakened" and any("controls were learned" in reason for reason in reasons)


def test_the_original_must_have_been_compared_too() -> None:
    found = population("erased", unseen, unseen) + population("twin", unseen, unseen)
    found += [Outcome(f"memory-{i}", "memory", "original", "prompt", "", 0, 0, (0.9,), 0.7) for i in range(12)]
    result = verdict(found, Protocol(), twins=("twin",), blind={}, spoiled=1.0)
    assert result.name == "weakened" and any("original: the attack was not compared" in r for r in result.reasons)


def test_states_are_compared_only_where_both_were_asked() -> None:
    """An altered state attacked to 50 steps from one start, a twin to 150 from two: like curves, no difference."""
    found = []
    for index, group in enumerate(["memory"] * 6 + ["control"] * 6):
        one, level = f"{group}-{index}", 0.3 + 0.001 * index
        found += curve(one, "twin", [level, level, 0.9], group=group)
        found += [dataclasses.replace(o, start="gaussian") for o in curve(one, "twin", [0.0, 0.6, 0.9], group=group)]
        shaken = level + 1e-3 * (-1) ** index
        found += curve(one, "erased, int8", [shaken, shaken], group=group, steps=(0, 50))
    found += [Outcome(f"memory-{i}", "memory", "original", "prompt", "", 0, 0, (0.9,), 0.7) for i in range(6)]
    test, spread = compare(found, Protocol().margins, ("twin",))
    assert (test.of, spread.of) == ("mean", "spread")
    assert spread.found.difference == pytest.approx(0, abs=2e-3)
    assert test.found.difference == pytest.approx(0, abs=1e-12) and test.found.shown and "to 50 steps" in test.quantity


def test_without_a_twin_controls_must_match_and_restarts_suffice() -> None:
    assert any(
        "not shown to be matched" in reason for reason in judged_as(unseen, twins=False, restarts=3, blind=0.8)[1]
    )
    assert any("three restarts" in reason for reason in judged_as(unseen, twins=False)[1])
    assert judged_as(unseen, twins=True, blind=0.8)[0] == "removed"


def test_nothing_is_claimed_where_nothing_was_seen() -> None:
    assert judged_as(unseen, original=unseen)[0] == "unproven"


def test_an_attack_that_draws_everything_tells_nothing_apart() -> None:
    drawn: Values = lambda state, index: (0.1, 0.8, 0.9, 30 + 5 * (index % 3))  # noqa: E731
    found = [o for state in ("original", "erased", "twin") for o in population(state, drawn, drawn)]
    result = verdict(found, Protocol(), twins=("twin",), blind={}, spoiled=1.0)
    assert result.name == "unproven" and "came back from a twin, too" in result.reasons[0]
    assert result.tests == ()  # the twin gives every memory too: none was shown to be stored


def test_a_test_that_shows_nothing_on_the_original_proves_nothing_on_the_erased() -> None:
    """Neither equivalent nor different: memories that differ so much that the interval covers the margin."""

    def mixed(state: str, i: int) -> tuple[float, float, float, float]:
        return (0.9, 0.95, 0.95, 0) if i == 0 else (0.75 if i == 1 else 0.1, 0.3, 0.5, 30)

    name, reasons = judged_as(unseen, original=mixed)
    told = [reason for reason in reasons if reason.startswith("original, ")]
    assert name == "weakened" and len(told) == 5 and not any("is shown" in reason for reason in told)


def test_memories_easier_and_harder_to_reach_do_not_cancel() -> None:
    """Half of them far above unseen images and half as far below: the means agree, the distances do not."""

    def split(state: str, i: int) -> tuple[float, float, float, float]:
        return 0.1, 0.3 + 0.07 * (-1) ** i, 0.5 + 0.07 * (-1) ** i, 30 + 5 * (i % 3)

    name, reasons = judged_as(split)
    told = [reason for reason in reasons if "area under the attack curve" in reason]
    assert name == "weakened" and len(told) == len(reasons) - 1 == 1
    assert "distance from the controls' median" in told[0]


def test_memories_that_never_came_back_do_not_thin_out_what_is_left() -> None:
    def some(state: str, i: int) -> tuple[float, float, float, float]:
        return (0.9, 0.95, 0.95, 0) if i < 4 else unseen(state, i)

    def left(state: str, i: int) -> tuple[float, float, float, float]:
        return (0.1, 0.4, 0.6, 30 + 5 * (i % 3)) if i < 4 else unseen(state, i)

    assert judged_as(unseen, original=some)[0] == "removed"
    name, reasons = judged_as(left, original=some)
    assert name == "weakened" and any("a difference is shown" in reason for reason in reasons)


def test_memories_that_cannot_be_relearned_are_not_compared() -> None:
    name, reasons = judged_as(lambda state, i: (0.1, 0.3, 0.5, 999))
    assert name == "weakened" and any("0 of 20 memories were learned on erased" in reason for reason in reasons)


def test_one_memory_in_many_that_comes_back_forbids_removed() -> None:
    name, reasons = judged_as(lambda s, i: (0.1, 0.72 if i == 0 else 0.3, 0.5, 30 + 5 * (i % 3)))
    assert name == "weakened" and "erased: 5% of the memories come back under the attack of 50 steps." in reasons
    name, reasons = judged_as(unseen, altered=lambda s, i: (0.1, 0.72 if i == 0 else 0.3, 0.5, 30 + 5 * (i % 3)))
    assert name == "weakened" and any(reason.startswith("erased, int8: 5% of the mem") for reason in reasons)


@pytest.mark.parametrize(
    ("way", "words"), [("long", "long"), ("restricted", "restricted"), ("latent", "initial latent")]
)
def test_any_attack_that_tells_memories_from_controls_forbids_removed(way: str, words: str) -> None:
    found = population("original", lambda s, i: (0.9, 0.95, 0.95, 0), unseen)
    found += population("erased", unseen, unseen) + population("twin", unseen, unseen)

    def asked(memories: int, controls: int) -> list[str]:
        counts = {"memory": memories, "control": controls}
        more = [
            Outcome(f"{group}-{i}", group, "erased", way, "prompt", 0, 500, (0.9 if i < n else 0.1,), 0.7)  # type: ignore[arg-type]
            for group, n in counts.items()
            for i in range(20)
        ]
        result = verdict([*found, *more], Protocol(), twins=("twin",), blind={}, spoiled=1.0)
        against = [reason for reason in result.reasons if words in reason]
        assert (result.name == "removed") == (not against)
        return against

    assert asked(20, 20) == [] and asked(4, 0) == []  # Fisher: .053
    assert "5 of 20 memories come back and 0 of 20 controls" in asked(5, 0)[0]  # .024
    assert asked(9, 4) == [] and len(asked(12, 4)) == 1


def test_steps_to_relearn_are_compared_as_ratios_too() -> None:
    """Twice as fast on the erased model whatever the image: no ratio, and a difference where the twin needs longer."""

    def slow(state: str, i: int) -> tuple[float, float, float, float]:
        return 0.1, 0.3, 0.5, 30 if state == "erased" else 60

    def fast(state: str, i: int) -> tuple[float, float, float, float]:
        return 0.1, 0.3, 0.5, 15 if state == "erased" else 30

    def found(memory: Values) -> dict[str, Compared]:
        outcomes = population("original", lambda s, i: (0.9, 0.95, 0.95, 0), fast)
        outcomes += population("erased", memory, fast) + population("twin", memory, fast)
        tests = compare(outcomes, Protocol().margins, ("twin",))
        return {test.of: test for test in tests if (test.state, test.kind) == ("erased", "relearning")}

    assert found(slow)["mean"].found.difference == pytest.approx(-15) and not found(slow)["mean"].found.shown
    assert abs(found(slow)["ratio"].found.difference) < 0.06 and found(slow)["ratio"].found.shown  # the grid of looks
    name, reasons = judged_as(lambda s, i: (0.1, 0.3, 0.5, 20 if s == "erased" else 35))
    told = [reason for reason in reasons if "as a ratio" in reason and reason.startswith("erased")]
    assert name == "weakened" and "margin 1.5" in told[0]


def test_an_image_that_a_twin_gives_is_not_shown_to_be_stored() -> None:
    given: Values = lambda state, i: (0.1, 0.9, 0.9, 30) if i == 0 else (0.1, 0.3, 0.5, 30 + 5 * (i % 3))  # noqa: E731
    found = population("original", lambda s, i: (0.9, 0.95, 0.95, 0), unseen)
    found += population("erased", unseen, unseen) + population("twin", given, unseen)
    tests = compare(found, Protocol().margins, ("twin",))
    assert {test.found.counts for test in tests} == {(19, 20)}


def test_distances_from_the_controls_median_are_unbiased() -> None:
    """Memories that are like controls lie no farther from their median than they do, however few there are."""
    rng, excess = np.random.default_rng(0), []
    for _ in range(400):
        memories, controls = _distances(list(rng.standard_normal(8)), list(rng.standard_normal(8)))
        excess.append(np.mean(memories) - np.mean(controls))
    assert abs(np.mean(excess)) < 3 * np.std(excess) / 20 < 0.06
