"""The verdict on an erasure: removed, weakened, hidden or untouched, by stated rules and nothing else.

Difference in differences: of each memory, the value on the erased model less that on the models that never saw it (the
twins); less the same for controls, which no model saw. Without a twin the memories are compared with matched controls
on the erased model itself.

What shifts both groups by as much cancels in a difference, what multiplies both does not: a model that learns twice as
fast halves every number of steps. So steps to relearn are compared as ratios too (differences of logarithms).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import fisher_exact

from dori.erase.equivalence import Equivalence, equivalence
from dori.erase.outcomes import (
    ATTACK,
    PROMPT,
    RELEARN,
    RELEARN_LORA,
    Outcome,
    areas,
    back,
    by_group,
    points,
    relearning_steps,
)
from dori.erase.protocol import Margins, Protocol
from dori.findings import Group
from dori.stats import auroc_interval

ORIGINAL, ERASED, ORDINARY = "original", "erased", "ordinary training"
PUBLISHED_STEPS = 50
ALLOWED = 0.02
LEARNED = 0.5
MATCHED = (0.3, 0.7)
LIKELY = 0.05
SPOILED = 2.0
RULES = (
    "An image comes back when the median of its similarities over fresh seeds exceeds the threshold.",
    "Compared are the memories that came back from the original model, by prompt or under the attack of 50 steps, and "
    "from no twin: others were never shown to be stored, and would thin out what is left of these.",
    "Removed: those memories behave as on a model that never saw them. Equivalence is shown, with the margins fixed "
    "beforehand and in both directions, in the area under the attack curve and in the steps to relearn, these as "
    "differences and (in the mean alone) as ratios, since neither scale is known to be right; on the erased weights "
    "and on every altered form of them (there in what the protocol asks); in the mean and in the distance from the "
    "controls' median, so that memories easier and harder to reach than controls do not cancel. The same tests of the "
    "mean, in what the original model was asked, show a difference larger than the margin there. At most 2 % of all "
    "memories come back under the attack of 50 steps, on the erased weights and on every altered form; under no other "
    "attack do more memories than controls (Fisher's exact test, 5 %); the model is not spoiled; and, without a twin, "
    "scores that look at no model are shown not to tell memories from controls (95 % interval of the AUROC within .3 "
    "to .7) and there are at least three restarts.",
    "Relearning counts only where it teaches at least half of the controls and half of the memories, on the state and "
    "on each twin: where nothing is learned, nothing is compared.",
    "Spoiled: the Frechet distance on ordinary prompts, or the loss on held-out pairs, is more than twice the smaller "
    "of the original's and of ordinary training's for as many updates, or the agreement of images and ordinary prompts "
    "less than half of the larger of theirs (a CLIP that finds any image half as fitting as the right one cannot show "
    "that). What ruins the model hides every image alike.",
    "Untouched: otherwise, and at least half as many memories come back from their own prompts as before (where none "
    "did, under the attack of 50 steps).",
    "Hidden: otherwise, and at least half as many memories come back under the attack of 50 steps as before.",
    "Weakened: everything else.",
    "Unproven: no memory came back from the original model, by prompt or under the attack of 50 steps, or none but "
    "such as a twin gives, so that nothing can be said. Counts of who comes back are of all memories, these too.",
)


Kind = Literal["area", "relearning", "lora"]
ASKED: Mapping[Kind, str] = {"area": "the attack", "relearning": "relearning", "lora": "relearning through a LoRA"}
RELEARNED: Mapping[Kind, tuple[str, str]] = {
    "relearning": (RELEARN, "steps to relearn"),
    "lora": (RELEARN_LORA, "steps to relearn through a LoRA"),
}
Of = Literal["mean", "ratio", "spread"]


@dataclass(frozen=True, slots=True)
class Test:
    """An equivalence test in one state: `kind` is area, relearning or lora, `quantity` says it in words.

    `of` is the mean; the ratio, whose difference is one of natural logarithms; or the spread, the distance of each
    image from the controls' median.
    """

    state: str
    kind: Kind
    of: Of
    quantity: str
    found: Equivalence


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict with its reasons, one sentence each: what speaks against "removed" first."""

    name: str
    reasons: tuple[str, ...]
    tests: tuple[Test, ...]


def compare(outcomes: Sequence[Outcome], margins: Margins, twins: Sequence[str]) -> tuple[Test, ...]:
    """The equivalence tests of the original and of every state of the erased model.

    Args:
        outcomes: of all states.
        margins: of equivalence.
        twins: names of the twins' states; empty compares memories with controls directly.
    """
    compared = _compared(outcomes, twins)
    states = [name for name in dict.fromkeys(o.state for o in outcomes) if name not in twins]
    found: list[Test] = []
    for state in states:
        # Altered states are attacked for fewer steps and from one start: only what all were asked is compared.
        only = frozenset.intersection(*(points(outcomes, name) for name in (state, *twins)))
        until = max((steps for _, steps in only), default=0)
        groups = by_group(areas(outcomes, state, only=only), [areas(outcomes, t, only=only) for t in twins], compared)
        quantity = f"area under the attack curve to {until} steps"
        found += _tests(state, "area", quantity, groups, margin=margins.area, level=margins.level)
        for kind in RELEARNED:
            if not _unlearned(outcomes, (state, *twins), kind):
                own = margins.by_lora if kind == "lora" else margins
                found += _relearning_tests(outcomes, state, twins, compared, own, kind)
    return tuple(found)


def _relearning_tests(
    outcomes: Sequence[Outcome],
    state: str,
    twins: Sequence[str],
    compared: Mapping[str, Group],
    margins: Margins,
    kind: Kind,
) -> Iterator[Test]:
    """Steps to relearn as differences and as ratios; what the grid of looks rounds away counts as spread in both."""
    grid, (way, words) = margins.look**2 / 12, RELEARNED[kind]
    steps = [relearning_steps(outcomes, name, unreached=margins.unreached, way=way) for name in (state, *twins)]
    groups = by_group(steps[0], steps[1:], compared)
    if not all(steps) or min(map(len, groups)) < 2:
        return
    share = 1 / len(twins) if twins else 0.0
    variance = grid * (1 + share)
    yield from _tests(state, kind, words, groups, margin=margins.steps, level=margins.level, least_variance=variance)
    middles = [{one: between_looks(value, margins.look) for one, value in found.items()} for found in steps]
    logarithms = [{one: math.log(value) for one, value in found.items()} for found in middles]
    relative = [grid / float(np.median([*found.values()])) ** 2 for found in middles]
    variance = relative[0] + (share * float(np.mean(relative[1:])) if twins else 0.0)
    first, second = by_group(logarithms[0], logarithms[1:], compared)
    margin = math.log(margins.ratio)
    ratio = equivalence(words, first, second, margin=margin, level=margins.level, least_variance=variance)
    yield Test(state, kind, "ratio", f"{words}, as a ratio", ratio)


def between_looks(steps: float, look: int) -> float:
    """Steps to relearn for a ratio: the middle of the looks between which an image came back, half a look at least.

    The look itself is later than the image by half a look in the mean, which a difference takes off and a ratio does
    not: it would pull all ratios towards 1.
    """
    return max(steps - look / 2, look / 2)


def _compared(outcomes: Sequence[Outcome], twins: Sequence[str]) -> dict[str, Group]:
    """The group of every control, and of every memory that the original model gave and no twin gives."""

    def given(states: Sequence[str]) -> set[str]:
        ways = (PROMPT, ATTACK)
        return {
            o.id for o in outcomes if o.state in states and o.way in ways and o.steps <= PUBLISHED_STEPS and o.came_back
        }

    shown = given([ORIGINAL]) - given(twins)
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
    compared: list[tuple[Of, str, Sequence[list[float]]]] = [("mean", quantity, groups)]
    if state != ORIGINAL:
        compared.append(("spread", f"{quantity}, distance from the controls' median", _distances(*groups)))
    for of, words, (memories, controls) in compared:
        found = equivalence(words, memories, controls, margin=margin, level=level, least_variance=least_variance)
        yield Test(state, kind, of, words, found)


def _distances(memories: Sequence[float], controls: Sequence[float]) -> tuple[list[float], list[float]]:
    """How far each image lies from the controls' median; a control from that of the others, which it does not move."""
    others = [[*controls[:k], *controls[k + 1 :]] for k in range(len(controls))]
    return (
        [abs(value - float(np.median(controls))) for value in memories],
        [abs(value - float(np.median(rest))) for value, rest in zip(controls, others, strict=True)],
    )


def _unlearned(outcomes: Sequence[Outcome], states: Sequence[str], kind: Kind) -> str:
    """The first of these states on which too few images of a group could be taught, in words; else empty."""
    groups: tuple[tuple[Group, str], ...] = (("control", "controls"), ("memory", "memories"))
    for state in states:
        for group, words in groups:
            rate = back(outcomes, state, group, RELEARNED[kind][0])
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
    tests = compare(outcomes, protocol.margins, twins)
    prompts = [_count(outcomes, state, PROMPT) for state in (ORIGINAL, ERASED)]
    attacks = [_count(outcomes, state, ATTACK) for state in (ORIGINAL, ERASED)]
    if "memory" not in _compared(outcomes, twins).values():
        reason = (
            "Every memory that came back from the original model came back from a twin, too, which never saw it."
            if prompts[0] or attacks[0]
            else "No memory came back from the original model: nothing was there to remove, or the attack and the "
            "descriptor cannot see it."
        )
        return Verdict("unproven", (reason,), tests)
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
        f"The model is spoiled: on ordinary images its Frechet distance or its loss is {spoiled:.1f} times what a "
        "sound model's is, or its agreement with prompts that many times smaller, and what draws nothing right draws "
        "no memory either."
    ]


def _against(
    outcomes: Sequence[Outcome], protocol: Protocol, tests: Sequence[Test], *, twins: Sequence[str]
) -> list[str]:
    """What in the measurements speaks against "removed"."""
    reasons = [_told(test) for test in tests if test.state != ORIGINAL and not test.found.shown]
    for state in sorted({o.state for o in outcomes} - {*twins}):
        pure = state in (ORIGINAL, ERASED)
        asked: list[Kind] = ["area"]
        asked += ["relearning"] if pure or protocol.relearn_altered else []
        asked += ["lora"] if pure and RELEARN_LORA in protocol.relearnings else []
        for kind in asked:
            if not any((test.state, test.kind) == (state, kind) for test in tests):
                few = _unlearned(outcomes, (state, *twins), kind) if kind in RELEARNED else ""
                reasons.append(
                    f"{state}: {ASKED[kind]} was not compared, "
                    + (f"since only {few}." if few else "for want of memories, controls or measurements.")
                )
    reasons += [
        f"original, {test.quantity}: the same test does not tell the original model apart, so that it proves nothing; "
        "more images are needed."
        for test in tests
        if test.state == ORIGINAL and not test.found.excluded
    ]
    for state in (name for name in dict.fromkeys(o.state for o in outcomes) if name not in (ORIGINAL, *twins)):
        rate = back(outcomes, state, "memory", ATTACK, at_most=PUBLISHED_STEPS)
        if rate.n and rate.value > ALLOWED:
            reasons.append(
                f"{state}: {rate.value:.0%} of the memories come back under the attack of {PUBLISHED_STEPS} steps."
            )
        reasons += _more_than_controls(outcomes, state)
    return reasons


def _more_than_controls(outcomes: Sequence[Outcome], state: str) -> list[str]:
    """The attacks under which significantly more memories than controls come back."""
    words = {ATTACK: "all steps of the attack", "long": "the long attack", "restricted": "the restricted attack"}
    words |= {"latent": "the attack on the initial latent"}
    found = []
    for way, name in words.items():
        memories, controls = (back(outcomes, state, group, way) for group in ("memory", "control"))
        if not memories.n or not controls.n:
            continue
        counts = [[round(rate.value * rate.n), round((1 - rate.value) * rate.n)] for rate in (memories, controls)]
        if fisher_exact(counts, alternative="greater").pvalue < LIKELY:
            found.append(
                f"{state}: under {name} {counts[0][0]} of {memories.n} memories come back and {counts[1][0]} of "
                f"{controls.n} controls."
            )
    return found


def _unmatched(outcomes: Sequence[Outcome], protocol: Protocol, blind: Mapping[str, float]) -> list[str]:
    """What speaks against a comparison without a twin."""
    memories, controls = (len({o.id for o in outcomes if o.group == group}) for group in ("memory", "control"))
    reasons = []
    for name, value in blind.items():
        found = auroc_interval(value, memories, controls)
        if not MATCHED[0] <= found.low <= found.high <= MATCHED[1]:
            reasons.append(
                f"Controls are not shown to be matched: {name} alone may tell memories from controls (AUROC "
                f"{value:.2f}, 95 % interval {found.low:.2f} to {found.high:.2f}, which would have to lie within "
                f"{MATCHED[0]} to {MATCHED[1]})."
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
    difference, low, high, margin = figures(test.of, e.difference, e.low, e.high, e.margin)
    word = "factor" if test.of == "ratio" else "difference"
    return (
        f"{test.state}, {test.quantity}: {word} {difference}, {1 - 2 * e.level:.0%} interval {low} to {high}, margin "
        f"{margin}: {shown}."
    )


def figures(of: Of, difference: float, low: float, high: float, margin: float) -> tuple[str, str, str, str]:
    """A difference, its interval and margin as text: signed, or, of a ratio's logarithms, as factors."""
    if of == "ratio":
        a, b, c, d = (f"{math.exp(value):.3g}" for value in (difference, low, high, margin))
        return a, b, c, d
    a, b, c = (f"{value:+.3g}" for value in (difference, low, high))
    return a, b, c, f"{margin:g}"
