"""Figures over memories: means with bootstrap intervals over memories, values alone where there are fewer than five."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dori.locality.records import (
    APART,
    ENOUGH,
    OTHER_IMAGES,
    OTHER_NOISES,
    OTHERS_APART,
    SAME_APART,
    SAME_STARTS,
    SIMULATED,
    TRIGGERS,
    WHOLE,
    Activity,
    Locality,
)
from dori.report.tables import number
from dori.stats import Estimate, bootstrap

NOTHING = Estimate(math.nan, math.nan, math.nan, 0)
REFERENCES = (OTHERS_APART, SIMULATED)  # prompts' masks met one noise, which makes them agree more
CLOSE = 0.02  # from a cut, within which a value without an interval is said to lie close to it
LEAST = 0.05  # ceiling above reference, below which a place between them means nothing
EMPTY = "every mask is empty"
ALONE = "no triggers of another image from the same starts were compared"
SITES = {"attention_value": "value projections", "feed_forward": "feed-forward layers"}
HALF_EMPTY = 0.25  # of the pairs are of two empty masks where half of the masks are empty


@dataclass(frozen=True, slots=True)
class Said:
    """What an analysis says: the verdict in few words, and sentences with its figures."""

    title: str
    sentences: tuple[str, ...] = ()


def over_memories(values: Iterable[float | None], *, seed: int = 0) -> Estimate:
    """Mean over memories; with a bootstrap interval from five memories on. What was not measured is left out."""
    found = [value for value in values if value is not None and not math.isnan(value)]
    if not found:
        return NOTHING
    if len(found) < ENOUGH:
        return Estimate(float(np.mean(found)), math.nan, math.nan, len(found))
    return bootstrap(found, np.mean, seed=seed)


def said(estimate: Estimate, digits: int = 2) -> str:
    """A figure in a sentence: with its interval where there is one."""
    if math.isnan(estimate.value):
        return "not measured"
    value, low, high = (number(one, digits) for one in (estimate.value, estimate.low, estimate.high))
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"


def left_out(found: Locality, setting: str) -> str:
    """A sentence if the plan has no such analysis, else empty."""
    if found.settings.get(setting):
        return ""
    other = ", and so has --patch-seeds N" if setting == "patch_seeds" else ""
    return f"The preset {found.settings.get('preset')} leaves it out; --preset full has it{other}."


def ends(estimate: Estimate) -> tuple[float, float]:
    """Of the interval; without one, twice the value."""
    return (estimate.value, estimate.value) if math.isnan(estimate.low) else (estimate.low, estimate.high)


def banded(estimate: Estimate, cuts: Sequence[float], words: Sequence[str]) -> str:
    """The word of the band in which a figure lies with its whole interval; across a cut nothing can be told.

    Args:
        estimate: the figure; without an interval its value decides.
        cuts: ascending; a figure on a cut belongs to the band above it.
        words: one more than cuts.
    """
    if math.isnan(estimate.value):
        return "not measured"
    first, last = (words[bisect_right(cuts, end)] for end in ends(estimate))
    if first != last:
        return f"cannot be told ({first} to {last})"
    close = math.isnan(estimate.low) and any(abs(estimate.value - cut) < CLOSE for cut in cuts)
    return f"{first}, but close to the border" if close else first


def measure(found: Locality, name: str) -> Estimate:
    """A measure of the embedding space over memories; one that belongs to no memory as it is."""
    return over_memories(m.value for m in found.measures if m.name == name)


def own_share(found: Locality, start: str = "") -> Estimate:
    """What the moves towards an image share beyond what they share with moves towards other images, from same starts.

    Args:
        found: the records.
        start: a kind of start; else all together.
    """
    return over_memories(own_shares(found, start).values())


def own_shares(found: Locality, start: str = "") -> dict[str, float]:
    """The same memory by memory."""
    end = f", {start}" if start else ""
    common, other = (
        {m.memory: m.value for m in found.measures if m.name == f"{name}{end}" and m.value is not None}
        for name in ("common share, same starts", "shared with moves to other images")
    )
    return {memory: value - other[memory] for memory, value in common.items() if memory in other}


# ----------------------------------------------------------------------------------------------------------- weights


def levels(
    found: Locality, method: str, group: str, layer: str = WHOLE, *, without_empty: bool = False
) -> dict[str, float]:
    """A_l of a group, memory by memory."""
    values = {
        o.memory: o.without_empty if without_empty else o.published
        for o in found.overlaps
        if (o.method, o.layer, o.group) == (method, layer, group)
    }
    return {memory: value for memory, value in values.items() if value is not None}


def overlap(found: Locality, method: str, layer: str, group: str, *, without_empty: bool = False) -> Estimate:
    """A_l of a group over memories."""
    return over_memories(levels(found, method, group, layer, without_empty=without_empty).values())


def empty_share(found: Locality, method: str, layer: str = WHOLE) -> Estimate:
    """Share of the pairs of triggers' masks in which both are empty, over memories."""
    return over_memories(
        o.empty_share for o in found.overlaps if (o.method, o.layer, o.group) == (method, layer, TRIGGERS)
    )


@dataclass(frozen=True, slots=True)
class Way:
    """How far triggers' agreement lies from the higher reference (0) to the ceiling (1); or why that is not known."""

    estimate: Estimate
    reference: str
    why_not: str = ""


def way(found: Locality, method: str, *, seed: int = 0) -> Way:
    """The place of triggers between reference and ceiling, pairs of two empty masks left out.

    (mean over memories of triggers - reference) / (ceiling - reference), all resampled together over memories; the
    reference is the higher of `REFERENCES`. Triggers, those of other images and ceiling all compare masks that met
    different noises, of the same triggers of a memory and of the one beside it (in older records the ceiling is of the
    first triggers, and the others of one memory's).
    """
    ceilings = SAME_APART if any(o.group == SAME_APART for o in found.overlaps) else OTHER_NOISES
    tables = {group: levels(found, method, group, without_empty=True) for group in (APART, ceilings, *REFERENCES)}
    memories = [memory for memory in tables[APART] if memory in tables[ceilings]]

    def level(group: str, chosen: Sequence[str]) -> float:
        table = tables[group]
        return float(np.mean([table[memory] for memory in chosen if memory in table] or list(table.values())))

    def place(rows: Sequence[int]) -> float:
        chosen = [memories[int(row)] for row in rows]
        reference = max(level(group, chosen) for group in references)
        ceiling = level(ceilings, chosen)
        return (level(APART, chosen) - reference) / (ceiling - reference) if ceiling - reference >= LEAST else math.nan

    references = [group for group in REFERENCES if tables[group]]
    triggers = levels(found, method, TRIGGERS)
    if not triggers or empty_share(found, method).value == 1:
        return Way(NOTHING, "", EMPTY if triggers else "too few triggers")
    if not memories:  # without other images one image's masks might agree as those of any image do
        return Way(NOTHING, "", ALONE)
    highest = max(references, key=lambda group: level(group, memories))
    if empty_share(found, method).value >= HALF_EMPTY:
        return Way(NOTHING, highest, "half of the masks or more are empty")
    value, count = place(range(len(memories))), len(memories)
    estimate = Estimate(value, math.nan, math.nan, count)
    if count >= ENOUGH and not math.isnan(value):
        estimate = bootstrap(np.arange(count, dtype=float), place, seed=seed)
    if math.isnan(value) or (count >= ENOUGH and math.isnan(estimate.low)):  # in some resample there is no place
        return Way(NOTHING, highest, "the ceiling is not above the reference")
    return Way(estimate, highest)


def methods(found: Locality) -> list[str]:
    """The methods whose masks were compared, in their order."""
    return list(dict.fromkeys(o.method for o in found.overlaps))


def layers(found: Locality, method: str) -> list[str]:
    """Parameters that a method's masks lie in, in the network's order."""
    return [layer for layer in dict.fromkeys(o.layer for o in found.overlaps if o.method == method) if layer != WHOLE]


# ------------------------------------------------------------------------------------------------------ ground truth


def excess_shares(found: Locality, level: str) -> dict[str, float]:
    """Which share of the planted excess lies in each kind or layer, largest first; empty where there is none."""
    excess = {c.group: max(0.0, c.change - (c.floor or 0.0)) for c in found.changes if c.level == level}
    total = sum(excess.values())
    return {group: excess[group] / total for group in sorted(excess, key=lambda group: -excess[group])} if total else {}


def pruned_share(found: Locality, method: str) -> float:
    """The share of the planted excess in the layers that a method prunes; NaN where it is not known."""
    shares, names = excess_shares(found, "layer"), {name.removesuffix(".weight") for name in layers(found, method)}
    return sum(share for name, share in shares.items() if name in names) if shares and names else math.nan


# ------------------------------------------------------------------------------------------------------- activations


def activity(found: Locality, layer: str, group: str, step: int) -> Estimate:
    """D_l of a group at one step over memories."""
    return over_memories(a.value for a in found.activities if (a.layer, a.group, a.step) == (layer, group, step))


def activity_ratio(found: Locality, site: str, group: str, reference: str) -> Estimate:
    """D(group) over D(reference), averaged over layers and steps, then over memories."""
    return over_memories(activity_ratios(found, site, group, reference).values())


def activity_ratios(found: Locality, site: str, group: str, reference: str) -> dict[str, float]:
    """The same memory by memory."""
    shared = {(a.layer, a.step): a.value for a in found.activities if a.group == reference and a.memory == ""}
    own = {(a.memory, a.layer, a.step): a.value for a in found.activities if a.group == reference}
    ratios: dict[str, list[float]] = {}
    for a in found.activities:
        if a.group == group and a.site == site and a.value is not None:
            below = _reference(a, shared, own)
            if below:
                ratios.setdefault(a.memory, []).append(a.value / below)
    return {memory: float(np.mean(parts)) for memory, parts in ratios.items()}


def _reference(
    a: Activity, shared: Mapping[tuple[str, int], float | None], own: Mapping[tuple[str, str, int], float | None]
) -> float | None:
    return shared.get((a.layer, a.step)) or own.get((a.memory, a.layer, a.step))


# -------------------------------------------------------------------------------------------------------------- dose


@dataclass(frozen=True, slots=True)
class Dose:
    """How one measure goes with the duplication count: points, and their rank correlation with its permutation p."""

    name: str
    doses: tuple[float, ...]
    values: tuple[float, ...]
    rank: float
    p: float


def dose_relations(found: Locality) -> list[Dose]:
    """Every summary of a memory against its dose, where memories of at least two doses have it.

    Those of one image alone: what triggers share or how far they lie apart beyond what triggers of other images do.
    """
    doses = {s.id: s.dose for s in found.subjects if s.dose is not None}
    tables = {"share of attacks that replicate": {s.id: s.triggers / s.attacks for s in found.subjects if s.attacks}}
    tables["distance moved"] = {m.memory: m.value for m in found.measures if m.name == "moved" and m.value is not None}
    tables["common share of the moves beyond other images'"] = own_shares(found)
    for site, words in SITES.items():
        tables[f"D in the {words} over other images'"] = activity_ratios(found, site, SAME_STARTS, OTHER_IMAGES)
    for method in methods(found):
        own, other = (levels(found, method, group, without_empty=True) for group in (APART, OTHERS_APART))
        beyond = {memory: value - other[memory] for memory, value in own.items() if memory in other}
        tables[f"agreement of {method} masks beyond other images'"] = beyond
    related = []
    for name, table in tables.items():
        pairs = [(doses[memory], value) for memory, value in table.items() if memory in doses]
        if len({dose for dose, _ in pairs}) > 1:
            x, y = zip(*pairs, strict=True)
            related.append(Dose(name, x, y, *_rank(x, y)))
    return related


def least_p(x: Sequence[float]) -> float:
    """The smallest two-sided permutation p that values without ties can have beside these, of which some are equal.

    The most extreme order and its mirror image, each in as many permutations as keep it, of n!.
    """
    same = math.prod(math.factorial(count) for count in Counter(x).values())
    return min(1.0, 2 * same / math.factorial(len(x)))


def _rank(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Spearman's rank correlation and its permutation p; NaN with fewer than five memories or no spread."""
    if len(x) < ENOUGH or np.ptp(y) == 0:
        return math.nan, math.nan
    ranks = stats.rankdata(x)

    def correlation(values: np.ndarray) -> float:
        return float(np.corrcoef(ranks, stats.rankdata(values))[0, 1])

    result = stats.permutation_test(
        (np.asarray(y),),
        correlation,
        permutation_type="pairings",
        n_resamples=2000,
        vectorized=False,
        rng=np.random.default_rng(0),
    )
    return float(result.statistic), float(result.pvalue)
