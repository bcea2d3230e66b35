"""The verdict on an erasure: removed, weakened, hidden or untouched, by stated rules and nothing else.

Difference in differences: of each memory, the value on the erased model less that on the models that never saw it (the
twins); less the same for controls, which no model saw. What fine-tuning does to any image cancels. Without a twin the
memories are compared with matched controls on the erased model itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dori.erase.equivalence import Equivalence, equivalence
from dori.erase.outcomes import ATTACK, PROMPT, RELEARN, Outcome, areas, back, by_group, points, relearning_steps
from dori.erase.protocol import Protocol
from dori.findings import Group
from dori.stats import auroc_interval

ORIGINAL, ERASED, ORDINARY = "original", "erased", "ordinary training"
PUBLISHED_STEPS = 50
ALLOWED = 0.02
LEARNED = 0.5
SPOILED = 2.0
RULES = (
    "An image comes back when the median of its similarities over fresh seeds exceeds the threshold.",
    "Compared are the memories that came back from the original model, by prompt or under the attack of 50 steps: "
    "others were never shown to be stored, and would thin out what is left of these.",
    "Removed: those memories behave as on a model that never saw them. Equivalence is shown, with the margins fixed "
    "beforehand and in both directions, in the area under the attack curve and in the steps to relearn, on the erased "
    "weights and on every altered form of them (there in what the protocol asks), in the mean and in the distance "
    "from the controls' median, so that memories easier and harder to reach than controls do not cancel; the same "
    "tests of the mean show a difference larger than the margin on the original model; at most 2 % of all memories "
    "come back under the attack of 50 steps; the model is not spoiled; and, without a twin, no score that looks at no "
    "model tells memories from controls (95 % interval of its AUROC) and there are at least three restarts.",
    "Relearning counts only where it teaches at least half of the controls and half of the memories, on the state and "
    "on each twin: where nothing is learned, nothing is compared.",
    "Spoiled: the Frechet distance on ordinary prompts, or the loss on held-out pairs, is more than twice the smaller "
    "of the original's and of ordinary training's for as many updates, or the agreement of images and ordinary prompts "
    "less than half of it. What ruins the model hides every image alike.",
    "Untouched: otherwise, and at least half as many memories come back from their own prompts as before (where none "
    "did, under the attack of 50 steps).",
    "Hidden: otherwise, and at least half as many memories come back under the attack of 50 steps as before.",
    "Weakened: everything else.",
    "Unproven: no memory came back from the original model, by prompt or under the attack of 50 steps, so that nothing "
    "can be said.",
)


Kind = Literal["area", "relearning"]


@dataclass(frozen=True, slots=True)
class Test:
    """An equivalence test in one state: `kind` is area or relearning, `quantity` says it in words.

    `of` is the mean, or the spread: the distance of each image from the controls' median.
    """

    state: str
    kind: Kind
    of: Literal["mean", "spread"]
    quantity: str
    found: Equivalence


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict with its reasons, one sentence each: what speaks against "removed" first."""

    name: str
    reasons: tuple[str, ...]
    tests: tuple[Test, ...]


def compare(outcomes: Sequence[Outcome], protocol: Protocol, twins: Sequence[str]) -> tuple[Test, ...]:
    """The equivalence tests of the original and of every state of the erased model.

    Args:
        outcomes: of all states.
        protocol: margins, level, and what an image that was not relearned counts.
        twins: names of the twins' states; empty compares memories with controls directly.
    """
    compared = _compared(outcomes)
    states = [name for name in dict.fromkeys(o.state for o in outcomes) if name not in twins]
    found: list[Test] = []
    for state in states:
        # Altered states are attacked for fewer steps and from one start: only what all were asked is compared.
        only = frozenset.intersection(*(points(outcomes, name) for name in (state, *twins)))
        until = max((steps for _, steps in only), default=0)
        groups = by_group(areas(outcomes, state, only=only), [areas(outcomes, t, only=only) for t in twins], compared)
        quantity, level = f"area under the attack curve to {until} steps", protocol.level
        found += _tests(state, "area", quantity, groups, margin=protocol.margin_area, level=level)
        if _unlearned(outcomes, (state, *twins)):
            continue
        groups = by_group(
            relearning_steps(outcomes, state, unreached=protocol.unreached),
            [relearning_steps(outcomes, t, unreached=protocol.unreached) for t in twins],
            compared,
        )
        variance = protocol.grid_variance * (2 if twins else 1)
        found += _tests(
            state,
            "relearning",
            "steps to relearn",
            groups,
            margin=protocol.margin_steps,
            level=level,
            least_variance=variance,
        )
    return tuple(found)


def _compared(outcomes: Sequence[Outcome]) -> dict[str, Group]:
    """The group of every control, and of every memory that the original model gave."""
    shown = {
        o.id
        for o in outcomes
        if o.state == ORIGINAL and o.way in (PROMPT, ATTACK) and o.steps <= PUBLISHED_STEPS and o.came_back
    }
    return {o.id: o.group for o in outcomes if o.group == "control" or o.id in shown}


def _tests(
    state: str,
    kind: Kind,
    quantity: str,
    groups: tuple[list[float], list[float]],
    *,
    margin: float,
    level: float,
    least_variance: float = 0.0,
) -> Iterator[Test]:
    """Of the mean and, on what was erased, of the spread; none where a group has fewer than two images."""
    if min(map(len, groups)) < 2:
        return
    compared: list[tuple[Literal["mean", "spread"], str, Sequence[list[float]]]] = [("mean", quantity, groups)]
    if state != ORIGINAL:
        middle = float(np.median(groups[1]))
        far = [[abs(value - middle) for value in group] for group in groups]
        compared.append(("spread", f"{quantity}, distance from the controls' median", far))
    for of, words, (memories, controls) in compared:
        found = equivalence(words, memories, controls, margin=margin, level=level, least_variance=least_variance)
        yield Test(state, kind, of, words, found)


def _unlearned(outcomes: Sequence[Outcome], states: Sequence[str]) -> str:
    """The first of these states on which too few images of a group could be taught, in words; else empty."""
    groups: tuple[tuple[Group, str], ...] = (("control", "controls"), ("memory", "memories"))
    for state in states:
        for group, words in groups:
            rate = back(outcomes, state, group, RELEARN)
            if rate.n and rate.value < LEARNED:
                return f"{round(rate.value * rate.n)} of {rate.n} {words} were learned on {state}"
    return ""


def verdict(
    outcomes: Sequence[Outcome], protocol: Protocol, *, twins: Sequence[str], blind: Mapping[str, float], spoiled: float
) -> Verdict:
    """Name the result by `RULES`.

    Args:
        outcomes: of the original, the erased model, its altered forms and the twins.
        protocol: as measured.
        twins: names of the twins' states.
        blind: AUROC of scores that look at no model, memories against controls.
        spoiled: how badly it draws, as a multiple of a sound model (`damage.spoiled`).
    """
    tests = compare(outcomes, protocol, twins)
    prompts = [_count(outcomes, state, PROMPT) for state in (ORIGINAL, ERASED)]
    attacks = [_count(outcomes, state, ATTACK) for state in (ORIGINAL, ERASED)]
    if prompts[0] == 0 and attacks[0] == 0:
        return Verdict(
            "unproven",
            (
                "No memory came back from the original model: nothing was there to remove, or the "
                "attack and the descriptor cannot see it.",
            ),
            tests,
        )
    against = [
        *_damaged(spoiled),
        *_against(outcomes, protocol, tests, twins=twins),
        *([] if twins else _unmatched(outcomes, protocol, blind)),
    ]
    if not against:
        return Verdict("removed", (_counted(prompts, attacks), *(_told(test) for test in tests)), tests)
    asked = prompts if prompts[0] else attacks
    if asked[1] >= asked[0] / 2:
        name = "untouched"
    elif attacks[1] > 0 and attacks[1] >= attacks[0] / 2:
        name = "hidden"
    else:
        name = "weakened"
    return Verdict(name, (_counted(prompts, attacks), *against), tests)


def _damaged(spoiled: float) -> list[str]:
    if spoiled <= SPOILED:
        return []
    return [
        f"The model is spoiled: on ordinary images its Frechet distance, its loss or its disregard of prompts is "
        f"{spoiled:.1f} times what it was or ordinary training leaves, and what draws nothing right draws no memory "
        "either."
    ]


def _against(
    outcomes: Sequence[Outcome], protocol: Protocol, tests: Sequence[Test], *, twins: Sequence[str]
) -> list[str]:
    """What in the measurements speaks against "removed"."""
    reasons = [_told(test) for test in tests if test.state != ORIGINAL and not test.found.shown]
    for state in sorted({o.state for o in outcomes} - {*twins}):
        asked = ("area", "relearning") if state in (ORIGINAL, ERASED) or protocol.relearn_altered else ("area",)
        for kind in asked:
            if not any((test.state, test.kind) == (state, kind) for test in tests):
                few = _unlearned(outcomes, (state, *twins)) if kind == "relearning" else ""
                reasons.append(
                    f"{state}: {'the attack' if kind == 'area' else 'relearning'} was not compared, "
                    + (f"since only {few}." if few else "for want of memories, controls or measurements.")
                )
    reasons += [
        f"original, {test.quantity}: the same test does not tell the original model apart, so that it proves nothing; "
        "more images are needed."
        for test in tests
        if test.state == ORIGINAL and not test.found.excluded
    ]
    rate = back(outcomes, ERASED, "memory", ATTACK, at_most=PUBLISHED_STEPS)
    if rate.n and rate.value > ALLOWED:
        reasons.append(f"{rate.value:.0%} of the memories come back under the attack of {PUBLISHED_STEPS} steps.")
    return reasons


def _unmatched(outcomes: Sequence[Outcome], protocol: Protocol, blind: Mapping[str, float]) -> list[str]:
    """What speaks against a comparison without a twin."""
    memories, controls = (len({o.id for o in outcomes if o.group == group}) for group in ("memory", "control"))
    reasons = []
    for name, value in blind.items():
        found = auroc_interval(value, memories, controls)
        if not found.low <= 0.5 <= found.high:
            reasons.append(
                f"Controls are not matched: {name} alone tells memories from controls (AUROC {value:.2f}, 95 % "
                f"interval {found.low:.2f} to {found.high:.2f})."
            )
    if protocol.restarts < 3:
        reasons.append(f"Without a twin at least three restarts are needed, and there were {protocol.restarts}.")
    return reasons


def _count(outcomes: Sequence[Outcome], state: str, way: str) -> int:
    rate = back(outcomes, state, "memory", way, at_most=PUBLISHED_STEPS)
    return round(rate.value * rate.n) if rate.n else 0


def _counted(prompts: Sequence[int], attacks: Sequence[int]) -> str:
    return (
        f"Memories that come back, before and after: {prompts[0]} and {prompts[1]} from their prompts, "
        f"{attacks[0]} and {attacks[1]} under the attack of {PUBLISHED_STEPS} steps."
    )


def _told(test: Test) -> str:
    e = test.found
    shown = "equivalence is shown" if e.shown else "a difference is shown" if e.excluded else "equivalence is not shown"
    return (
        f"{test.state}, {test.quantity}: difference {e.difference:+.3g}, {1 - 2 * e.level:.0%} interval "
        f"{e.low:+.3g} to {e.high:+.3g}, margin {e.margin:g}: {shown}."
    )
