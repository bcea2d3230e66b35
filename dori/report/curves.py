"""Attack curves and dose-response: the step budget is part of the test (methods.md 1.4), so curves beside numbers.

A single success after enough steps proves nothing, since a free embedding can carry an image; the curve of memories
against the curve of images that the model never saw, under one budget, is what counts.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dori.findings import Audit, Finding
from dori.judgement import last_step, rule_of
from dori.report.tables import (
    CONTROLS,
    MEMORIES,
    ONCE,
    TEMPLATES,
    Row,
    Way,
    described,
    median_similarity,
    population_of,
    table,
    way_of,
)
from dori.stats import Estimate, auroc, wilson


@dataclass(frozen=True, slots=True)
class Curve:
    """One population under one edit and start: MR and similarity at each number of attack steps."""

    label: str
    population: str
    twin: bool
    edit: str
    edit_scope: str
    start: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Separation:
    """How far the area under the curve tells a population from images that were never stored; `judge` says which."""

    population: str
    edit: str
    edit_scope: str
    start: str
    judge: str
    auroc: Estimate
    memories: int
    others: int


SEEN_ONCE = 0.0  # stands below every relative dose


@dataclass(frozen=True, slots=True)
class DosePoint:
    """The memories of one duplication count under one way of asking.

    `dose` is `SEEN_ONCE` for images shown a single time whose relative dose is not stated.
    """

    way: Way
    dose: float
    rate: Estimate
    similarity: float
    deviation: float


def curves(audit: Audit) -> tuple[Curve, ...]:
    """All curves of at least two points; the prompt itself is step 0 of the start "prompt"."""
    groups: dict[tuple[str, str, str, str, str], list[Row]] = defaultdict(list)
    rows = table(audit)
    for row in rows:
        way = row.way
        if way.start:
            groups[row.population, way.model, way.edit, way.edit_scope, way.start].append(row)
    found = []
    for (population, model, edit, scope, start), members in groups.items():
        if start == "prompt" and members[0].way.steps > 0:
            members = [
                row for row in rows if row.population == population and row.way == Way(model, edit, scope, "", 0)
            ] + members
        if len(members) > 1:
            found.append(
                Curve(
                    described(members[0], audit), population, model != audit.model, edit, scope, start, tuple(members)
                )
            )
    return tuple(found)


def judges_last(curve: Curve) -> tuple[bool, bool]:
    """Sorts a population before controls, and those before twins."""
    return curve.twin, curve.population == CONTROLS


def of_all(curve: Curve) -> Curve:
    """The curve up to the last step for all images, since areas over different ranges cannot be compared."""
    last = last_step({row.way.steps: row.replication.memories for row in curve.rows})
    return replace(curve, rows=tuple(row for row in curve.rows if row.way.steps <= last))


def painted(curve: Curve) -> Curve | None:
    """The curve by masked similarities, as templates are judged; None where not all of it was painted."""
    rows = [
        replace(row, similarity=row.masked, replication=row.masked_replication)
        for row in curve.rows
        if row.masked is not None and row.masked_replication is not None
    ]
    return replace(curve, rows=tuple(rows)) if len(rows) == len(curve.rows) else None


def areas(findings: Iterable[Finding], *, masked: bool = False) -> dict[str, float]:
    """Area under each image's curve: trapezoid of the median similarity over steps, divided by the step range.

    Args:
        findings: of one population under one edit and start, at several numbers of steps.
        masked: of the masked similarities, which all findings must have.

    Returns:
        Image id to its mean similarity over the budget, in [-1, 1]; images with one point are left out.
    """
    points: dict[str, dict[int, float]] = defaultdict(dict)
    for finding in findings:
        points[finding.id][finding.steps] = float(np.median(finding.masked)) if masked else median_similarity(finding)
    result = {}
    for image, curve in points.items():
        steps = sorted(curve)
        if len(steps) > 1:
            area = np.trapezoid([curve[step] for step in steps], steps)
            result[image] = float(area) / (steps[-1] - steps[0])
    return result


def separations(audit: Audit) -> tuple[Separation, ...]:
    """AUROC of the curves' areas: memories against controls and against the same memories on each twin.

    Only curves over the same steps are compared; where the edit was not put on controls or twin, the unedited ones
    stand in and the judge's name says so. Templates are compared by masked similarities where both sides have them.
    """
    every = [of_all(curve) for curve in curves(audit)]
    result = []
    for curve in every:
        if curve.twin or curve.population == CONTROLS:
            continue
        steps = [row.way.steps for row in curve.rows]
        for judge in _judges(every, curve):
            if [row.way.steps for row in judge.rows] != steps:
                continue
            behind = [_behind(audit, one) for one in (curve, judge)]
            masked = curve.population == TEMPLATES and all(finding.masked for side in behind for finding in side)
            ours, theirs = (list(areas(side, masked=masked).values()) for side in behind)
            name = judge.label + (", without the edit" if judge.edit != curve.edit else "")
            result.append(
                Separation(
                    curve.population,
                    curve.edit,
                    curve.edit_scope,
                    curve.start,
                    name,
                    auroc(ours, theirs),
                    len(ours),
                    len(theirs),
                )
            )
    return tuple(result)


def _judges(every: Sequence[Curve], curve: Curve) -> list[Curve]:
    """Controls and twins under the same start: with the same edit, else another scope of it, else unedited."""
    candidates = [
        c
        for c in every
        if c.start == curve.start
        and ((c.population == CONTROLS and not c.twin) or (c.twin and c.population == curve.population))
    ]
    found = []
    for label in dict.fromkeys(c.label for c in candidates):
        for fits in (
            lambda c: (c.edit, c.edit_scope) == (curve.edit, curve.edit_scope),
            lambda c: c.edit == curve.edit,
            lambda c: c.edit == "none",
        ):
            matching = [c for c in candidates if c.label == label and fits(c)]
            if matching:
                found.append(matching[0])
                break
    return found


def _behind(audit: Audit, curve: Curve) -> list[Finding]:
    ways = {row.way for row in curve.rows}
    return [
        finding for finding in audit.findings if population_of(finding) == curve.population and way_of(finding) in ways
    ]


def dose_response(audit: Audit, ways: Iterable[Way]) -> tuple[DosePoint, ...]:
    """MR with its Wilson interval, and similarity, of the verbatim memories of each dose, by way of asking."""
    rule = rule_of(audit)
    points = []
    for way in dict.fromkeys(ways):
        by_dose: dict[float, list[float]] = defaultdict(list)
        for finding in audit.findings:
            dose = _dose(finding)
            if dose is not None and way_of(finding) == way:
                by_dose[dose].append(rule.median(finding))
        for dose in sorted(by_dose):
            values = np.array(by_dose[dose])
            middle = float(np.median(values))
            points.append(
                DosePoint(
                    way,
                    dose,
                    wilson(int((values > rule.threshold).sum()), len(values)),
                    middle,
                    float(np.median(np.abs(values - middle))),
                )
            )
    return tuple(points)


def _dose(finding: Finding) -> float | None:
    """None where the finding has no place in the figure."""
    population = population_of(finding)
    if population == ONCE and finding.dose is None:
        return SEEN_ONCE
    return finding.dose if population in (MEMORIES, ONCE) else None
