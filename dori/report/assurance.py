"""What the report itself checks about an audit, from its records: each check with its outcome, passed or not.

They stand beside the reasons to distrust that the audit brought along (`Audit.distrust`), which may know more.
"""

from dataclasses import dataclass

from dori.findings import Audit
from dori.judgement import rule_of
from dori.report.tables import CONTROLS, TEMPLATES, Row, final_rows, number, population_of, rate, table

SEEDS = 3
BLIND = (0.4, 0.6)  # AUROC; farther from 1/2 the pictures alone tell the groups apart (the rule of `audit.checks`)


@dataclass(frozen=True, slots=True)
class Check:
    """One check: whether it passed, and what was found, in one sentence."""

    passed: bool
    sentence: str


def checks(audit: Audit) -> tuple[Check, ...]:
    """All checks, in a fixed order."""
    rows = final_rows(table(audit), audit)
    memories = [row for row in rows if row.population != CONTROLS and row.way.model == audit.model]
    judges = [row for row in rows if row not in memories]
    return (
        _attacked_alike(memories, judges),
        _judges_hold(judges),
        _twins(audit),
        _seeds(rows),
        _calibrated(audit),
        _blind(audit),
    )


def _attacked_alike(memories: list[Row], judges: list[Row]) -> Check:
    wanted = {(row.way.start, row.way.steps) for row in memories if row.way.steps}
    done = {(row.way.start, row.way.steps) for row in judges if row.population == CONTROLS}
    if not wanted:
        return Check(False, "No attack was run: what is hidden but stored cannot show.")
    if not done:
        return Check(False, "No controls: no image that the model never saw was attacked.")
    missing = len(wanted - done)
    return Check(
        not missing,
        "Controls were attacked from the same starts with the same steps as the memories."
        if not missing
        else f"Controls lack {missing} of the {len(wanted)} attacks that the memories met.",
    )


def _judges_hold(judges: list[Row]) -> Check:
    attacked = [row for row in judges if row.way.steps]
    broken = max((row.replication.rate for row in attacked), key=lambda found: found.value, default=None)
    if broken is None:
        return Check(False, "Nothing shows whether the attack also draws what a model never saw.")
    if broken.value:
        return Check(False, f"The attack also drew images that were never seen (up to {rate(broken)} of a group).")
    return Check(True, "Under the attack no control and no twin reproduced an image that it never saw.")


def _twins(audit: Audit) -> Check:
    if not audit.twins:
        return Check(False, "No twin: the same images were not attacked on a model that never saw them.")
    return Check(True, f"The same images were tried on a model that never saw them ({', '.join(audit.twins)}).")


def _seeds(rows: tuple[Row, ...]) -> Check:
    fewest = min((row.seeds for row in rows), default=0)
    return Check(
        fewest >= SEEDS,
        f"Every image was judged over at least {fewest} fresh seed{'s' * (fewest != 1)}"
        + ("." if fewest >= SEEDS else f"; at least {SEEDS} are wanted."),
    )


def _calibrated(audit: Audit) -> Check:
    if not audit.descriptor.get("calibration"):
        return Check(False, "The descriptor's threshold comes with no measurement of its false positives.")
    if any(population_of(finding) == TEMPLATES for finding in audit.findings) and rule_of(audit).masked is None:
        return Check(
            False,
            "The threshold of whole images was measured, but not that of templates with the varying part painted over.",
        )
    return Check(True, "The descriptor's threshold was measured, at a stated rate of false positives.")


def _blind(audit: Audit) -> Check:
    if not audit.blind:
        return Check(False, "Blind baselines were not measured: memories and controls may differ by mere looks.")
    name, far = max(sorted(audit.blind.items()), key=lambda item: abs(item[1] - 0.5))
    inside = BLIND[0] <= far <= BLIND[1]
    return Check(
        inside,
        f"Scores that look at no model tell memories from controls {'little' if inside else 'well'}: "
        f"the farthest AUROC is {number(far)} ({name.replace('_', ' ')}).",
    )
