"""Who came back under each edit, as sets of ids: what the verdict's words rest on.

The claim "hidden, but still stored" is about the images that an edit hid, so the attack is counted on those alone,
and so are the same images on a twin. Where an edit hid nothing, all images count.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dori.findings import Audit, Finding
from dori.judgement import rule_of
from dori.report.tables import CONTROLS, TEMPLATES, Row, Way, population_of, way_of
from dori.stats import Estimate, wilson


@dataclass(frozen=True, slots=True)
class Tally:
    """The images asked one way, and those of them that came back."""

    way: Way
    asked: frozenset[str]
    back: frozenset[str]

    @property
    def rate(self) -> Estimate:
        """Share that came back with its Wilson interval."""
        return wilson(len(self.back), len(self.asked))

    def among(self, ids: frozenset[str]) -> "Tally":
        """The same of some images only."""
        return Tally(self.way, self.asked & ids, self.back & ids)


@dataclass(frozen=True, slots=True)
class Case:
    """One edit on one population.

    Args:
        edit, scope: of the edit; "none" and "" for the unedited model.
        population: whose images.
        prompt: asked by their own prompts under the edit; None if they have none.
        attacks: each start at the attack's last step.
        judges: "controls" or a twin's name to its tallies under the same attacks.
        before: images that came back from their own prompt on the unedited model.
        hidden: those of them that do not come back under the edit.
        check: whether it is a random edit of another edit's size.
    """

    edit: str
    scope: str
    population: str
    prompt: Tally | None
    attacks: tuple[Tally, ...]
    judges: Mapping[str, tuple[Tally, ...]]
    before: frozenset[str]
    hidden: frozenset[str]
    check: bool

    def on_hidden(self) -> "Case":
        """The case of the hidden images alone: attacks and twins count no others; controls stay as they are."""
        return Case(
            self.edit,
            self.scope,
            self.population,
            self.prompt,
            _among(self.attacks, self.hidden),
            {
                name: kept
                for name, tallies in self.judges.items()
                if (kept := tallies if name == CONTROLS else _among(tallies, self.hidden))
            },
            self.before,
            self.hidden,
            self.check,
        )

    def evidence(self) -> bool:
        """Whether the best attack's interval lies wholly above the best of every judge, by the starts that both met."""
        return bool(self.judges) and all(map(self._above, self.judges.values()))

    def _above(self, judge: Sequence[Tally]) -> bool:
        starts = {tally.way.start for tally in judge}
        ours, theirs = most([tally for tally in self.attacks if tally.way.start in starts]), most(judge)
        return ours is not None and theirs is not None and ours.rate.low > theirs.rate.high

    def broken(self) -> bool:
        """Whether some judge reproduced an image that it never saw."""
        return any(tally.back for tallies in self.judges.values() for tally in tallies)


def _among(tallies: Iterable[Tally], ids: frozenset[str]) -> tuple[Tally, ...]:
    return tuple(part for tally in tallies if (part := tally.among(ids)).asked)


def most(tallies: Sequence[Tally]) -> Tally | None:
    """The tally of the highest rate; None of none."""
    return max(tallies, key=lambda tally: tally.rate.value, default=None)


def cases(audit: Audit, rows: Sequence[Row], population: str) -> tuple[Case, ...]:
    """One case an edit that the population met, the unedited model first.

    Args:
        audit: what was found.
        rows: `dori.report.tables.final_rows`.
        population: memories, templates or once.
    """
    ours = [row for row in rows if row.population == population and row.way.model == audit.model]
    return tuple(
        _case(audit, rows, ours, edit, scope)
        for edit, scope in dict.fromkeys((row.way.edit, row.way.edit_scope) for row in ours)
    )


def _case(audit: Audit, rows: Sequence[Row], ours: Sequence[Row], edit: str, scope: str) -> Case:
    population = ours[0].population
    here = [row for row in ours if (row.way.edit, row.way.edit_scope) == (edit, scope)]
    asked = [_tally(audit, row) for row in here if not row.way.start]
    unedited = [_tally(audit, row) for row in ours if row.way.edit == "none" and not row.way.start]
    before = unedited[0].back if unedited else frozenset()
    hidden = (before & asked[0].asked) - asked[0].back if asked and edit != "none" else frozenset()
    attacks = [row for row in here if row.way.steps]
    judges = {
        CONTROLS: _same_attack(
            [row for row in rows if row.population == CONTROLS and row.way.model == audit.model], attacks
        )
    }
    for twin in audit.twins:
        judges[twin] = _same_attack(
            [row for row in rows if row.population == population and row.way.model == twin], attacks
        )
    return Case(
        edit,
        scope,
        population,
        asked[0] if asked else None,
        tuple(_tally(audit, row) for row in attacks),
        {
            name: tuple(_tally(audit, row, painted=name == CONTROLS and population == TEMPLATES) for row in found)
            for name, found in judges.items()
            if found
        },
        before,
        hidden,
        any(info.name == edit and "like" in info.details for info in audit.edits),
    )


def _tally(audit: Audit, row: Row, *, painted: bool = False) -> Tally:
    """The images behind a row; `painted` counts controls by masked similarities where all of them have some."""
    findings = [
        finding for finding in audit.findings if way_of(finding) == row.way and population_of(finding) == row.population
    ]
    rule = rule_of(audit)
    came_back = rule.came_back_masked if painted and judged_painted(audit, findings) else rule.came_back
    return Tally(
        row.way,
        frozenset(finding.id for finding in findings),
        frozenset(finding.id for finding in findings if came_back(finding)),
    )


def judged_painted(audit: Audit, findings: Sequence[Finding]) -> bool:
    """Whether controls can judge templates as templates are judged: by masked similarities, with a threshold."""
    return rule_of(audit).masked is not None and all(finding.masked for finding in findings)


def _same_attack(candidates: Sequence[Row], attacks: Sequence[Row]) -> tuple[Row, ...]:
    """The judge's rows under the memories' starts and steps: with the same edit, else its other scope, else none."""
    found = []
    for attack in attacks:
        same = [row for row in candidates if (row.way.start, row.way.steps) == (attack.way.start, attack.way.steps)]
        ranked = sorted(
            same,
            key=lambda row: (
                row.way.edit != attack.way.edit,
                row.way.edit != "none",
                row.way.edit_scope != attack.way.edit_scope,
            ),
        )
        found += [row for row in ranked[:1] if row.way.edit in (attack.way.edit, "none")]
    return tuple(found)
