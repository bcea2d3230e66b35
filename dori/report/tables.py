"""From findings to the rows of the published tables: pure functions on records, used by report, README and compare.

One row is one population (memories, templates, controls, the memories on a twin) under one edit and one way of
asking. Figures are those of methods.md 6.2: per image the median over seeds (and the best seed), over images the
median +- the unscaled median absolute deviation; MR as `dori.metrics.replication` defines it. Two numbers under
different descriptors may not share a table (field.md section 10), so every caption is `caption(audit)`. Templates
count by their masked similarity where it has a threshold (`dori.judgement`).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dori.errors import DoriError
from dori.findings import Audit, Finding
from dori.judgement import Rule, last_step, rule_of
from dori.metrics.replication import Replication, replication
from dori.stats import Estimate, median_and_deviation

MEMORIES, TEMPLATES, ONCE, CONTROLS = "memories", "templates", "once", "controls"
POPULATIONS = (MEMORIES, TEMPLATES, ONCE, CONTROLS)
WORDS = {
    MEMORIES: ("memory", "memories"),
    TEMPLATES: ("template memory", "template memories"),
    ONCE: ("shown once", "shown once"),
    CONTROLS: ("control", "controls"),
}
STARTS = {"prompt": "its own prompt", "gaussian": "Gaussian noise", "foreign": "a foreign prompt"}


@dataclass(frozen=True, slots=True)
class Spread:
    """Median over images with its unscaled median absolute deviation."""

    median: float
    deviation: float

    def __str__(self) -> str:
        """The published tables' form."""
        return f"{number(self.median)} ± {number(self.deviation)}"


@dataclass(frozen=True, slots=True)
class Way:
    """A way of asking for an image: `start` is "" for the prompt itself; `steps` of attack, 0 without."""

    model: str
    edit: str
    edit_scope: str
    start: str
    steps: int

    @property
    def asked(self) -> str:
        """In words."""
        if not self.start:
            return "own prompt"
        start = STARTS.get(self.start, self.start)
        return f"DoRI from {start}, {self.steps} steps" if self.steps else f"{start}, not attacked"


@dataclass(frozen=True, slots=True)
class Row:
    """One population under one way of asking; columns that were not measured are None.

    Args:
        population: memories, templates, once, controls; `way.model` tells the audited model from a twin.
        way: model, edit and way of asking.
        seeds: fewest generations per image.
        similarity: to the training image, per image the median over seeds.
        best: the same with the best seed of each image.
        masked: as `similarity`, blind to the part that varies, of templates and of controls that carry a box.
        to_unedited: to the unedited model's image of the same seed (SSCD_Gen with SSCD).
        diversity: median pairwise similarity among one image's generations; lower is more diverse.
        alignment: of generation and prompt.
        replication: how many exceed the threshold that their kind has.
        masked_replication: how many of the painted images exceed the masked threshold; the judge of templates.
    """

    population: str
    way: Way
    seeds: int
    similarity: Spread
    best: Spread
    masked: Spread | None
    to_unedited: Spread | None
    diversity: Spread | None
    alignment: Spread | None
    replication: Replication
    masked_replication: Replication | None


def number(value: float | None, digits: int = 2) -> str:
    """Fixed decimals; an en dash for what was not measured, and never a minus before zero."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value + 0.0 if round(value, digits) else 0.0:.{digits}f}"


def rate(estimate: Estimate) -> str:
    """A share with its interval and counts: 0.88 [0.53, 0.98] (7/8)."""
    counts = f"({round(estimate.value * estimate.n)}/{estimate.n})" if estimate.n else "(0/0)"
    return f"{interval(estimate)} {counts}"


def interval(estimate: Estimate) -> str:
    """A figure with its interval alone: 0.88 [0.53, 0.98]."""
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def threshold_of(audit: Audit) -> float:
    """The descriptor's threshold of whole-image similarities.

    Raises:
        DoriError: the audit holds none.
    """
    return rule_of(audit).threshold


def is_sscd(audit: Audit) -> bool:
    """Whether the similarity is SSCD, and columns may use the published names."""
    return str(audit.descriptor.get("name", "")).lower().startswith("sscd")


def caption(audit: Audit) -> str:
    """Everything without which a similarity means nothing: descriptor, preprocessing, threshold, calibration."""
    descriptor = audit.descriptor
    text = (
        f"Similarity: cosine of {descriptor.get('name') or 'an unnamed descriptor'} "
        f"({descriptor.get('preprocessing') or 'preprocessing not stated'}); an image counts as replicated above "
        f"{threshold_of(audit):.3g}"
    )
    return f"{text}{_measured(descriptor.get('calibration'))}."


def masked_caption(audit: Audit) -> str:
    """The same for templates: which similarity decides about them, and against which threshold."""
    known, calibration = rule_of(audit).masked, audit.descriptor.get("masked_calibration")
    if known is None:
        return (
            "No threshold is calibrated for the masked similarity here, so templates count by whole images, which "
            "understates how much of one is stored."
        )
    return f"Templates count as replicated where their masked similarity exceeds {known:.3g}{_measured(calibration)}."


def _measured(calibration: object) -> str:
    if not isinstance(calibration, Mapping):
        return ""
    return (
        f", a threshold measured on {calibration.get('measured_on', 'pairs not named')} (false positives "
        f"{_percent(calibration.get('false_positive_rate'))}, true positives "
        f"{_percent(calibration.get('true_positive_rate'))})"
    )


def _percent(share: object) -> str:
    return f"{100 * share:.3g} %" if isinstance(share, int | float) else "not stated"


def population_of(finding: Finding) -> str:
    """Which rows a finding belongs to: templates and images shown once are never mixed with verbatim memories."""
    if finding.group == "control":
        return CONTROLS
    return {"template": TEMPLATES, "once": ONCE}.get(finding.kind, MEMORIES)


def way_of(finding: Finding) -> Way:
    """The way of asking behind a finding."""
    return Way(finding.model, finding.edit, finding.edit_scope, finding.start, finding.steps)


def median_similarity(finding: Finding) -> float:
    """Median over seeds of the whole-image similarity (mid-point for an even count)."""
    return float(np.median(finding.similarities))


def table(audit: Audit) -> tuple[Row, ...]:
    """All rows: edits in the audit's order, the unedited model first; then ways of asking; then populations.

    Raises:
        DoriError: no threshold, an image judged twice the same way, or one without similarities.
    """
    groups: dict[tuple[str, Way], dict[str, Finding]] = {}
    for finding in audit.findings:
        group = groups.setdefault((population_of(finding), way_of(finding)), {})
        if finding.id in group:
            raise DoriError(
                f"the audit judges {finding.id!r} twice in the same way (edit {finding.edit!r}, start "
                f"{finding.start!r}, {finding.steps} steps); keep one of the findings"
            )
        group[finding.id] = finding
    rule = rule_of(audit)
    rows = [_row(population, way, group, rule) for (population, way), group in groups.items()]
    return tuple(sorted(rows, key=_order(audit)))


def _order(audit: Audit) -> Callable[[Row], tuple[Any, ...]]:
    edits = {"none": -1} | {edit.name: index for index, edit in reversed(list(enumerate(audit.edits)))}
    starts = {start: index for index, start in enumerate(("", *STARTS))}

    def key(row: Row) -> tuple[Any, ...]:
        way = row.way
        return (
            way.edit_scope == "own",
            edits.get(way.edit, len(edits)),
            way.edit,
            starts.get(way.start, len(starts)),
            way.start,
            way.steps,
            way.model != audit.model,
            way.model,
            POPULATIONS.index(row.population),
        )

    return key


def _row(population: str, way: Way, group: Mapping[str, Finding], rule: Rule) -> Row:
    findings = list(group.values())
    counts = replication(
        {finding.id: rule.deciding(finding) for finding in findings},
        {finding.id: rule.limit(finding) for finding in findings},
    )
    painted = {finding.id: finding.masked for finding in findings if finding.masked}
    return Row(
        population=population,
        way=way,
        seeds=min(len(finding.similarities) for finding in findings),
        similarity=_needed([median_similarity(finding) for finding in findings]),
        best=_needed([max(finding.similarities) for finding in findings]),
        masked=_spread(finding.masked for finding in findings),
        to_unedited=_spread(finding.to_unedited for finding in findings),
        diversity=_spread(() if finding.diversity is None else (finding.diversity,) for finding in findings),
        alignment=_spread(finding.alignment for finding in findings),
        replication=counts,
        masked_replication=None if rule.masked is None or not painted else replication(painted, rule.masked),
    )


def _needed(values: Sequence[float]) -> Spread:
    return Spread(*median_and_deviation(values))


def _spread(per_image: Iterable[Sequence[float]]) -> Spread | None:
    medians = [float(np.median(values)) for values in per_image if len(values)]
    return _needed(medians) if medians else None


def final_rows(rows: Sequence[Row], audit: Audit) -> tuple[Row, ...]:
    """The rows of the published table: the prompt itself, and each start at the attack's last step for all images.

    The last step is the one that the audited model's memories reached, under each edit and start; controls and twins
    that went further are shown at that step, so that one row is one budget.
    """
    last: dict[tuple[str, str, str], int] = {}
    judged = [row for row in rows if row.population == CONTROLS or row.way.model != audit.model]
    for part in (judged, [row for row in rows if row not in judged]):
        last |= _last_steps(part)
    return tuple(row for row in rows if not row.way.start or row.way.steps == last[_attack(row.way)])


def main_rows(final: Sequence[Row]) -> list[Row]:
    """Of the final rows those of the main table: memories, controls and twins, without an edit and under joint ones."""
    return [row for row in final if row.population in (MEMORIES, CONTROLS) and row.way.edit_scope != "own"]


def _attack(way: Way) -> tuple[str, str, str]:
    return way.edit, way.edit_scope, way.start


def _last_steps(rows: Iterable[Row]) -> dict[tuple[str, str, str], int]:
    images: dict[tuple[str, str, str], Counter[int]] = defaultdict(Counter)
    for row in rows:
        images[_attack(row.way)][row.way.steps] += row.replication.memories
    return {attack: last_step(counts) for attack, counts in images.items()}


def called_edit(edit: str, scope: str) -> str:
    """An edit's name in a heading."""
    return "unedited model" if edit == "none" else edit + (" (own edits)" if scope == "own" else "")


def called_twin(model: str) -> str:
    """A twin's name in a sentence: the word "twin" once, whether or not the name begins with it."""
    return model if model.startswith("twin ") else f"twin {model}"


def described(row: Row, audit: Audit, *, one: bool = False) -> str:
    """The population in words, with the twin's name where the model is one; `one` for the singular."""
    words = WORDS[row.population][0 if one else 1]
    if row.way.model == audit.model:
        return words
    return ("" if row.population == MEMORIES else f"{words} ") + f"on {called_twin(row.way.model)}"


COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("Similarity to training image ↓", "SSCD_Orig ↓", lambda row: str(row.similarity)),
    ("Best seed ↓", "SSCD_Orig, best seed ↓", lambda row: str(row.best)),
    ("Masked similarity ↓", "SSCD_Orig, masked ↓", lambda row: str(row.masked or "–")),
    ("Similarity to unedited ↓", "SSCD_Gen ↓", lambda row: str(row.to_unedited or "–")),
    ("Self-similarity (diversity) ↓", "D_SSCD ↓", lambda row: str(row.diversity or "–")),
    ("Alignment ↑", "Alignment ↑", lambda row: str(row.alignment or "–")),
    ("MR ↓", "MR ↓", lambda row: rate(row.replication.rate)),
    ("MR, best seed ↓", "MR, best seed ↓", lambda row: rate(row.replication.rate_by_maximum)),
    ("Images above threshold ↓", "Images above threshold ↓", lambda row: interval(row.replication.image_rate)),
)


def cells(rows: Sequence[Row], audit: Audit) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and body as text; columns that no row measured are left out."""
    sscd = is_sscd(audit)
    measured = {2: "masked", 3: "to_unedited", 4: "diversity", 5: "alignment"}
    templates = any(row.population == TEMPLATES for row in rows)  # controls are painted too, but only as their judges
    shown = [
        column
        for index, column in enumerate(COLUMNS)
        if index not in measured
        or ((index != 2 or templates) and any(getattr(row, measured[index]) is not None for row in rows))
    ]
    header = ("Edit", "How asked", "Whose images", *(column[1] if sscd else column[0] for column in shown))
    body = [(row.way.edit, row.way.asked, _whose(row, audit), *(column[2](row) for column in shown)) for row in rows]
    return header, body


def _whose(row: Row, audit: Audit) -> str:
    count = row.replication.memories
    return f"{count} {described(row, audit, one=count == 1)}"


def to_markdown(rows: Sequence[Row], audit: Audit) -> str:
    """The rows as a Markdown table under their caption, for a README."""
    return f"{_plain(caption(audit))}\n\n{_lines(*cells(rows, audit))}"


def page_markdown(audit: Audit) -> str:
    """All tables as Markdown: joint edits, each memory's own, templates, images shown once, quality."""
    final = final_rows(table(audit), audit)
    own = [row for row in final if row.way.edit_scope == "own" and row.population in (MEMORIES, CONTROLS)]
    parts = {
        "The model, and one edit for all memories": main_rows(final),
        "Each memory's own edit": own,
        "Templates": [row for row in final if row.population == TEMPLATES],
        "Shown once": [row for row in final if row.population == ONCE],
    }
    text = [_plain(caption(audit))]
    for title, rows in parts.items():
        if rows:
            note = f"\n\n{_plain(masked_caption(audit))}" if title == "Templates" else ""
            text.append(f"## {title}{note}\n\n{_lines(*cells(rows, audit))}".rstrip())
    if audit.quality:
        header = ("Edit", "Model", "Prompts", "Fréchet ↓", "Kernel ↓", "Alignment ↑", "Similarity to unedited ↑")
        body = [
            (
                row.edit,
                row.model,
                str(row.prompts),
                number(row.frechet),
                f"{number(row.kernel, 4)} ± {number(row.kernel_std, 4)}" if row.kernel_std else number(row.kernel, 4),
                number(row.alignment),
                number(row.to_unedited),
            )
            for row in audit.quality
        ]
        text.append(f"## Ordinary prompts\n\n{_lines(header, body)}".rstrip())
    return "\n\n".join(text) + "\n"


def _lines(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ("---",) * len(header), *body]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines) + "\n"


def _plain(cell: str) -> str:
    """No pipe, no line break and no markup out of somebody's edit name."""
    return " ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
