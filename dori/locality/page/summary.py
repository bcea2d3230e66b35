"""Figures over memories: means with bootstrap intervals over memories, values alone where there are fewer than five."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dori.locality.records import MEMORIZED, ORDINARY, OTHER_NOISES, SIMULATED, TRIGGERS, WHOLE, Activity, Locality
from dori.stats import Estimate, bootstrap

ENOUGH = 5
LEVELS = (TRIGGERS, OTHER_NOISES, MEMORIZED, ORDINARY, SIMULATED)


def over_memories(values: Iterable[float | None], *, seed: int = 0) -> Estimate:
    """Mean over memories; with a bootstrap interval from five memories on. What was not measured is left out."""
    found = [value for value in values if value is not None]
    if not found:
        return Estimate(math.nan, math.nan, math.nan, 0)
    if len(found) < ENOUGH:
        return Estimate(float(np.mean(found)), math.nan, math.nan, len(found))
    return bootstrap(found, np.mean, seed=seed)


def said(estimate: Estimate, digits: int = 2) -> str:
    """A figure in a sentence: with its interval where there is one."""
    if math.isnan(estimate.value):
        return "not measured"
    value = f"{estimate.value:.{digits}f}"
    if math.isnan(estimate.low):
        return value
    return f"{value} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def measure(found: Locality, name: str) -> Estimate:
    """A measure of the embedding space over memories; one that belongs to no memory as it is."""
    return over_memories(m.value for m in found.measures if m.name == name)


def overlap(found: Locality, method: str, layer: str, group: str, *, without_empty: bool = False) -> Estimate:
    """A_l of a group over memories."""
    rows = [o for o in found.overlaps if (o.method, o.layer, o.group) == (method, layer, group)]
    return over_memories(o.without_empty if without_empty else o.published for o in rows)


def overlap_by_memory(found: Locality, method: str, group: str) -> dict[str, float]:
    """A of whole masks, memory by memory."""
    return {
        o.memory: o.published
        for o in found.overlaps
        if (o.method, o.layer, o.group) == (method, WHOLE, group) and o.published is not None
    }


def methods(found: Locality) -> list[str]:
    """The methods whose masks were compared, in their order."""
    return list(dict.fromkeys(o.method for o in found.overlaps))


def layers(found: Locality, method: str) -> list[str]:
    """Parameters that a method's masks lie in, in the network's order."""
    return [layer for layer in dict.fromkeys(o.layer for o in found.overlaps if o.method == method) if layer != WHOLE]


def activity(found: Locality, layer: str, group: str, step: int) -> Estimate:
    """D_l of a group at one step over memories."""
    return over_memories(a.value for a in found.activities if (a.layer, a.group, a.step) == (layer, group, step))


def activity_ratio(found: Locality, site: str, group: str, reference: str) -> Estimate:
    """D(group) over D(reference), averaged over layers and steps, then over memories."""
    shared = {(a.layer, a.step): a.value for a in found.activities if a.group == reference and a.memory == ""}
    own = {(a.memory, a.layer, a.step): a.value for a in found.activities if a.group == reference}
    ratios: dict[str, list[float]] = {}
    for a in found.activities:
        if a.group == group and a.site == site and a.value is not None:
            below = _reference(a, shared, own)
            if below:
                ratios.setdefault(a.memory, []).append(a.value / below)
    return over_memories(float(np.mean(parts)) for parts in ratios.values())


def _reference(
    a: Activity, shared: Mapping[tuple[str, int], float | None], own: Mapping[tuple[str, str, int], float | None]
) -> float | None:
    return shared.get((a.layer, a.step)) or own.get((a.memory, a.layer, a.step))


@dataclass(frozen=True, slots=True)
class Dose:
    """How one measure goes with the duplication count: points, and their rank correlation with its permutation p."""

    name: str
    doses: tuple[float, ...]
    values: tuple[float, ...]
    rank: float
    p: float


def dose_relations(found: Locality) -> list[Dose]:
    """Every summary of a memory against its dose, where memories of at least two doses have it."""
    doses = {s.id: s.dose for s in found.subjects if s.dose is not None}
    tables = {"share of attacks that replicate": {s.id: s.triggers / s.attacks for s in found.subjects if s.attacks}}
    for name in ("between triggers", "common share of the moves"):
        tables[name] = {m.memory: m.value for m in found.measures if m.name == name and m.value is not None}
    for method in methods(found):
        tables[f"agreement of {method} masks"] = overlap_by_memory(found, method, TRIGGERS)
    related = []
    for name, table in tables.items():
        pairs = [(doses[memory], value) for memory, value in table.items() if memory in doses]
        if len({dose for dose, _ in pairs}) > 1:
            x, y = zip(*pairs, strict=True)
            related.append(Dose(name, x, y, *_rank(x, y)))
    return related


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
