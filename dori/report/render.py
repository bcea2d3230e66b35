"""An audit as one self-contained HTML file: no script, no outside request, every text escaped.

`render` is a pure function of the audit's records and of the run's folder (its pictures, and whether a locality page
stands beside), so the same run gives the same bytes, and a report can be drawn again at any time without a model.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from dori.findings import Audit, Finding, Subject
from dori.judgement import Rule, rule_of
from dori.report import tables
from dori.report.assurance import checks
from dori.report.curves import Curve, Separation, curves, dose_response, judges_last, painted, separations
from dori.report.drawing import Picture
from dori.report.figures import dose_rate_figure, dose_similarity_figure, rate_figure, short, similarity_figure
from dori.report.nested import sheet, spoken
from dori.report.page import page
from dori.report.pictures import Album
from dori.report.tables import Row, Way, number
from dori.report.verdict import verdict

TEXT = 240


@dataclass(frozen=True, slots=True)
class Shown:
    """One generation beside its training image. `mark` is a word as well as a sign; `note` holds further numbers."""

    uri: str
    alt: str
    median: str
    above: bool
    notes: tuple[str, ...]


def render(audit: Audit, folder: Path, *, redact: bool = False) -> str:
    """The report as HTML.

    Args:
        audit: what was found.
        folder: the run's folder, in which the pictures lie.
        redact: blur, in the pixels, every training image and every generation that may show one (any seed above the
            threshold, and all of template memories), and leave the prompts out.

    Raises:
        DoriError: a picture outside the folder or damaged, no threshold, or findings that contradict one another.
    """
    album, rows = Album(folder), tables.table(audit)
    final = tables.final_rows(rows, audit)
    return page(
        "report/template.html",
        filters={"spoken": spoken, "number": number, "stacked": _stacked},
        audit=audit,
        redact=redact,
        located=(folder / "locality.json").exists(),
        verdict=verdict(audit),
        checks=checks(audit),
        threshold=_thresholds(audit),
        caption=tables.caption(audit),
        main_tables=list(_main_tables(audit, final)),
        quality_made=_quality_made(audit),
        attacks=list(_attacks(audit)),
        doses=list(_doses(audit, final)),
        memories=_matrix(audit, final, album, group="memory", redact=redact),
        controls=_matrix(audit, final, album, group="control", redact=redact),
        edits=[(edit, sheet(edit.details)) for edit in audit.edits],
        settings=sheet(audit.settings),
        descriptor=sheet(audit.descriptor),
        provenance=sheet(audit.provenance),
    )


def _stacked(rate: str) -> str:
    """A rate that breaks once, before its interval: 0.88 (7/8), and under it [0.53, 0.98]."""
    value, low, high, *counts = rate.split(" ")
    return "\u00a0".join((value, *counts)) + f" {low}\u00a0{high}"


def _thresholds(audit: Audit) -> str:
    """The thresholds in words: that of templates beside that of whole images, where both are used."""
    rule = rule_of(audit)
    both = rule.masked is not None and any(rule.judges_masked(finding) for finding in audit.findings)
    return number(rule.threshold) + (f" ({number(rule.masked)} for templates, masked)" if both else "")


# ------------------------------------------------------------------------------------------------------------ tables


@dataclass(frozen=True, slots=True)
class _Block:
    """A table: `groups` are edit, number of lines, and by way of asking the lines: of a judge or not, other cells."""

    title: str
    note: str
    header: tuple[str, ...]
    groups: tuple[tuple[str, int, tuple[tuple[str, tuple[tuple[bool, tuple[str, ...]], ...]], ...]], ...]


def _main_tables(audit: Audit, final: Sequence[Row]) -> Iterable[_Block]:
    joint = (
        "Each edit of this table is one edit for all memories together (joint); each start is shown at the "
        "attack's last step."
    )
    own = "Each memory is asked under its own edit, made for it alone; the published per-prompt evaluations do this."
    template = (
        "Part of a template varies, so whole-image similarity understates how much of one is stored. The "
        "masked similarity is blind to that part; its painted box lifts all values, those of strangers too. "
        + tables.masked_caption(audit)
    )
    once = "Images that were shown to the model a single time."
    owned = [
        row for row in final if row.population in (tables.MEMORIES, tables.CONTROLS) and row.way.edit_scope == "own"
    ]
    parts = [
        ("Memories, controls and twins", joint, tables.main_rows(final)),
        ("The same with each memory's own edit", own, owned),
        ("Template memories", template, _templates(final)),
        ("Images shown once", once, [row for row in final if row.population == tables.ONCE]),
    ]
    for title, note, rows in parts:
        if rows:
            yield _block(audit, title, note, rows)


def _templates(final: Sequence[Row]) -> list[Row]:
    """The templates' rows, beside controls that were painted alike and count by their masked similarities too."""
    ways = {row.way for row in final if row.population == tables.TEMPLATES}
    rows = []
    for row in final:
        if row.population == tables.TEMPLATES:
            rows.append(row)
        elif row.population == tables.CONTROLS and row.way in ways and row.masked_replication is not None:
            rows.append(replace(row, replication=row.masked_replication))
    return rows


def _is_judge(audit: Audit, row: Row) -> bool:
    return row.population == tables.CONTROLS or row.way.model != audit.model


def _block(audit: Audit, title: str, note: str, rows: Sequence[Row]) -> _Block:
    header, body = tables.cells(rows, audit)
    mixed = {row.way.edit_scope for row in rows} >= {"joint", "own"}
    named = [
        (edit + " (own)" * (mixed and row.way.edit_scope == "own"), asked, _is_judge(audit, row), tuple(rest))
        for row, (edit, asked, *rest) in zip(rows, body, strict=True)
    ]
    groups = []
    for edit, of_edit in groupby(named, key=lambda line: line[0]):
        lines = list(of_edit)
        asked = tuple((how, tuple(line[2:] for line in same)) for how, same in groupby(lines, key=lambda line: line[1]))
        groups.append((edit, len(lines), asked))
    return _Block(title, note, header, tuple(groups))


def _quality_made(audit: Audit) -> tuple[str, ...]:
    """What the quality distances were measured with: each set of features and reference images once."""
    said = dict.fromkeys((row.features, row.reference, row.references) for row in audit.quality)
    return tuple(
        f"Features: {features or 'not named by this audit'}. Reference: "
        f"{f'{count} {reference}' if reference else 'not named by this audit'}."
        for features, reference, count in said
    )


# ----------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True, slots=True)
class _Panels:
    title: str
    panels: tuple[Picture, ...]
    sentences: tuple[str, ...]
    main: bool


def _attacks(audit: Audit) -> Iterable[_Panels]:
    """Memories beside controls and twins, by edit and start; templates and images shown once apart, one start each."""
    every, apart, rule = curves(audit), separations(audit), rule_of(audit)
    for population in (tables.MEMORIES, tables.TEMPLATES, tables.ONCE):
        keys = dict.fromkeys(
            _key(curve)
            for curve in every
            if curve.population == population
            and not curve.twin
            and (population == tables.MEMORIES or curve.start == "prompt")
        )
        for edit, scope, start in keys:
            mine = [
                curve
                for curve in every
                if _key(curve) == (edit, scope, start)
                and (curve.population == population or (curve.population == tables.CONTROLS and not curve.twin))
            ]
            mine.sort(key=judges_last)
            alike = [one for curve in mine if (one := painted(curve))] if population == tables.TEMPLATES else []
            mine, threshold = (alike, rule.masked) if alike and rule.masked is not None else (mine, rule.threshold)
            said = tuple(_evidence(s) for s in apart if (*_key(s), s.population) == (edit, scope, start, population))
            title = _attack_title(edit, scope, start)
            if population != tables.MEMORIES:
                title += f", {mine[0].label}"
            yield _Panels(
                title,
                (rate_figure(mine), similarity_figure(mine, threshold)),
                said or (NO_JUDGE,),
                start == "prompt" and population == tables.MEMORIES,
            )


NO_JUDGE = "No control or twin was attacked over the same steps: this curve is no evidence of storage."


def _key(curve: Curve | Separation) -> tuple[str, str, str]:
    return curve.edit, curve.edit_scope, curve.start


def _attack_title(edit: str, scope: str, start: str) -> str:
    return f"{tables.called_edit(edit, scope)}, from {tables.STARTS.get(start, start)}"


def _evidence(separation: Separation) -> str:
    """How far a success counts as evidence, in words: by the interval's lower end, and never much with few images."""
    estimate, fewest = separation.auroc, min(separation.memories, separation.others)
    strength = next(index for index, (end, _) in enumerate(STRENGTHS) if estimate.low > end)
    words = STRENGTHS[strength][1]
    if fewest < FEW and strength < WEAK:
        words = f"{STRENGTHS[WEAK][1]} for want of images: {fewest} are too few for more"
    return (
        f"Areas of {separation.memories} against {separation.others} ({separation.judge}): AUROC "
        f"{tables.interval(estimate)}, {words}."
    )


FEW = 10
STRENGTHS = (
    (0.9, "strong evidence of storage"),
    (0.7, "fair evidence of storage"),
    (0.5, "weak evidence of storage"),
    (-math.inf, "no evidence of storage"),
)
WEAK = 2


def _doses(audit: Audit, final: Sequence[Row]) -> Iterable[_Panels]:
    ways = dict.fromkeys(
        row.way for row in final if row.population in (tables.MEMORIES, tables.ONCE) and row.way.model == audit.model
    )
    for edit, scope in dict.fromkeys((way.edit, way.edit_scope) for way in ways):
        points = dose_response(audit, [way for way in ways if (way.edit, way.edit_scope) == (edit, scope)])
        if len({point.dose for point in points}) > 1:
            yield _Panels(
                tables.called_edit(edit, scope),
                (dose_rate_figure(points), dose_similarity_figure(points, tables.threshold_of(audit))),
                (),
                True,
            )


# ---------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True, slots=True)
class _Line:
    subject: Subject
    uri: str
    text: str
    cells: tuple[Shown | None, ...]


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One line an image, one column a way of asking, columns under the edit's name."""

    groups: tuple[tuple[str, int], ...]
    columns: tuple[tuple[str, bool], ...]
    lines: tuple[_Line, ...]


def _matrix(audit: Audit, final: Sequence[Row], album: Album, *, group: str, redact: bool) -> _Matrix:
    rule = rule_of(audit)
    is_control = group == "control"
    ways = list(dict.fromkeys(row.way for row in final if (row.population == tables.CONTROLS) == is_control))
    ways.sort(key=lambda way: way.model != audit.model)  # stable: the audited model, then the twins
    found = {(finding.id, tables.way_of(finding)): finding for finding in audit.findings if finding.group == group}
    names = [_over(audit, way) for way in ways]
    lines = []
    for subject in audit.subjects:
        if subject.group == group:
            shown = tuple(_shown(found.get((subject.id, way)), way, album, rule, redact=redact) for way in ways)
            text = "" if redact or subject.text is None else subject.text
            text = text if len(text) <= TEXT else text[:TEXT] + " …"
            lines.append(_Line(subject, album.uri(subject.picture, blurred=redact), text, shown))
    edges = [index == 0 or name != names[index - 1] for index, name in enumerate(names)]
    return _Matrix(
        tuple((name, len(list(span))) for name, span in groupby(names)),
        tuple((_under(way), edge) for way, edge in zip(ways, edges, strict=True)),
        tuple(lines),
    )


def _over(audit: Audit, way: Way) -> str:
    name = "unedited" if way.edit == "none" else way.edit + (" (own)" if way.edit_scope == "own" else "")
    return (
        name
        if way.model == audit.model
        else tables.called_twin(way.model) + ("" if way.edit == "none" else f", {name}")
    )


def _under(way: Way) -> str:
    return f"{short(way)}, {way.steps} steps" if way.steps else way.asked


def _shown(finding: Finding | None, way: Way, album: Album, rule: Rule, *, redact: bool) -> Shown | None:
    if finding is None:
        return None
    median, above = rule.median(finding), rule.came_back(finding)
    blurred = redact and may_show(finding, rule)
    # The picture is the first seed's; the median decides. Both are said, since they can disagree.
    notes = [f"this {number(rule.deciding(finding)[0])}"]
    if rule.judges_masked(finding):
        notes.append(f"whole {number(tables.median_similarity(finding))}")
    elif finding.masked:
        notes.append(f"masked {number(float(np.median(finding.masked)))}")
    alt = (
        f"{finding.id}, {finding.edit}, {way.asked}: median similarity {number(median)}, "
        f"{'above' if above else 'not above'} the threshold{', blurred' if blurred else ''}"
    )
    return Shown(album.uri(finding.picture, blurred=blurred), alt, number(median), above, tuple(notes))


def may_show(finding: Finding, rule: Rule) -> bool:
    """Whether a generation must be blurred with its training image: any seed replicates, or it is of a template."""
    masked = rule.threshold if rule.masked is None else rule.masked
    return (
        tables.population_of(finding) == tables.TEMPLATES
        or any(v > rule.threshold for v in finding.similarities)
        or any(v > masked for v in finding.masked)
    )
