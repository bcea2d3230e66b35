"""What the proof measures, as plain records, and the two numbers for each image that it compares.

An outcome is one image in one state of the model under one way of asking. The area under the attack curve is the mean
similarity over the attack's steps; the steps to relearn are the updates after which the image first comes back.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dori.findings import Group
from dori.stats import Estimate, wilson

PROMPT, ATTACK, RELEARN, RELEARN_LORA = "prompt", "dori", "relearn", "relearn, LoRA"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One image, judged.

    Args:
        id: the image's id.
        group: memory or control.
        state: name of the model's state: "original", "erased", "erased, int8", a twin's name, ...
        way: prompt, dori, long, restricted, latent, relearn, or "relearn, LoRA".
        start: where an attack began; "" for ways without a start.
        restart: which of several attacks from that start.
        steps: attack steps or relearning updates behind it.
        similarities: that decide, one a fresh seed: whole-image, or blind to the part of a template that varies.
        threshold: that their median must exceed.
        position: of a found latent's squared norm in its chi-square distribution; None elsewhere.
    """

    id: str
    group: Group
    state: str
    way: str
    start: str
    restart: int
    steps: int
    similarities: tuple[float, ...]
    threshold: float
    position: float | None = None

    @property
    def median(self) -> float:
        """The number that decides."""
        return float(np.median(self.similarities))

    @property
    def came_back(self) -> bool:
        """Whether the image came back."""
        return self.median > self.threshold


def points(outcomes: Iterable[Outcome], state: str) -> frozenset[tuple[str, int]]:
    """Starts and steps at which a state's attack curves were judged."""
    return frozenset((o.start, o.steps) for o in outcomes if o.state == state and o.way == ATTACK)


def areas(
    outcomes: Iterable[Outcome], state: str, *, only: frozenset[tuple[str, int]] | None = None
) -> dict[str, float]:
    """Mean similarity over the attack's steps: trapezoid over the curve, divided by its range, averaged over attacks.

    Args:
        outcomes: any.
        state: of which state.
        only: starts and steps that count, so that states with different curves can be compared; None takes all.

    Returns:
        Image id to area, in [-1, 1]; images with fewer than two points are left out.
    """
    curves: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for outcome in outcomes:
        counts = only is None or (outcome.start, outcome.steps) in only
        if outcome.state == state and outcome.way == ATTACK and counts:
            curves[outcome.id, outcome.start, outcome.restart][outcome.steps] = outcome.median
    found: dict[str, list[float]] = defaultdict(list)
    for (one, _, _), curve in curves.items():
        steps = sorted(curve)
        if len(steps) > 1:
            area = float(np.trapezoid([curve[step] for step in steps], steps))
            found[one].append(area / (steps[-1] - steps[0]))
    return {one: float(np.mean(values)) for one, values in found.items()}


def relearning_steps(
    outcomes: Iterable[Outcome], state: str, *, unreached: int, way: str = RELEARN
) -> dict[str, float]:
    """Updates after which each image first came back, averaged over restarts.

    Args:
        outcomes: any.
        state: of which state.
        unreached: what counts for an image that did not come back; at least one look later than the last.
        way: of relearning.
    """
    curves: dict[tuple[str, int], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.state == state and outcome.way == way:
            curves[outcome.id, outcome.restart].append(outcome)
    found: dict[str, list[float]] = defaultdict(list)
    for (one, _), looks in curves.items():
        found[one].append(min((float(look.steps) for look in looks if look.came_back), default=float(unreached)))
    return {one: float(np.mean(values)) for one, values in found.items()}


def attack_steps(outcomes: Iterable[Outcome], state: str) -> int:
    """The last step of the state's attack curve; 0 if it was not attacked."""
    return max((o.steps for o in outcomes if o.state == state and o.way == ATTACK), default=0)


def back(
    outcomes: Iterable[Outcome],
    state: str,
    group: Group,
    way: str,
    *,
    start: str | None = None,
    at_most: int | None = None,
) -> Estimate:
    """Share of a group's images that came back in any attack of this way, with Wilson's interval.

    Args:
        outcomes: any.
        state: of which state.
        group: whose images.
        way: of asking.
        start: count attacks from there; None takes all.
        at_most: count outcomes after at most so many steps.
    """
    found: dict[str, bool] = {}
    for o in outcomes:
        if (
            (o.state, o.group, o.way) == (state, group, way)
            and start in (None, o.start)
            and (at_most is None or o.steps <= at_most)
        ):
            found[o.id] = found.get(o.id, False) or o.came_back
    return wilson(sum(found.values()), len(found))


def less_twins(values: Mapping[str, float], twins: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each image's value less the mean of the same image on the twins; images that a twin lacks are left out."""
    return {
        one: value - float(np.mean([twin[one] for twin in twins]))
        for one, value in values.items()
        if all(one in twin for twin in twins)
    }


def by_group(
    values: Mapping[str, float], twins: Sequence[Mapping[str, float]], groups: Mapping[str, Group]
) -> tuple[list[float], list[float]]:
    """Values of memories and of controls, less the twins' where there are some."""
    values = less_twins(values, twins) if twins else values
    return (
        [value for one, value in values.items() if groups.get(one) == "memory"],
        [value for one, value in values.items() if groups.get(one) == "control"],
    )
