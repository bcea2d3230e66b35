"""Two audits side by side: what was done differently, how MR moved, and which images' verdicts turned.

The same memories, descriptor and threshold are needed for the difference to mean anything; where they differ, the
comparison says so first (field.md section 10). `worst_mr` is the number that a release gate holds against a limit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dori.errors import DoriError
from dori.findings import Audit
from dori.judgement import last_step, rule_of
from dori.report.tables import CONTROLS, Row, Way, called_twin, number, population_of, rate, table, threshold_of, way_of
from dori.stats import Estimate

SHOWN = 40
AUDITED = "audited model"


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that differs; None where one audit lacks it."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class RateChange:
    """MR of one population under one way of asking, in both audits; None where one audit did not ask so.

    `way.model` is "audited model", or the twin's name: the audited models of two audits may be called differently.
    """

    population: str
    way: Way
    before: Estimate | None
    after: Estimate | None

    @property
    def difference(self) -> float | None:
        """MR after minus MR before."""
        return None if self.before is None or self.after is None else self.after.value - self.before.value


@dataclass(frozen=True, slots=True)
class Flip:
    """An image that comes back in one audit and not in the other, asked the same way."""

    id: str
    population: str
    way: Way
    came_back_after: bool
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What changed from audit a to audit b.

    Args:
        models: names of the audited models.
        incomparable: why similarities and MR may not be compared, one sentence; "" where they may.
        shared: number of images that both audits judged; the rates and flips are of these alone.
        altered: ids under which the audits judged different pixels.
        settings: changed settings, fingerprints and edits, by dotted name.
        missing: ids of images that only one audit judged.
        rates: every way of asking of both, at the attack's last step that both took.
        flips: images whose verdict turned; empty where the numbers are not comparable.
    """

    models: tuple[str, str]
    incomparable: str
    shared: int
    altered: tuple[str, ...]
    settings: tuple[Change, ...]
    missing: tuple[str, ...]
    rates: tuple[RateChange, ...]
    flips: tuple[Flip, ...]


def worst_mr(audit: Audit) -> float:
    """The highest MR of memories over all ways of asking under the audited model.

    Every row of the audit's tables counts that holds images of the group "memory" (verbatim, template and shown once
    each for themselves): each edit and none, joint and own, each start, each number of steps. Controls and twins do
    not count. MR is the share of images whose median over seeds exceeds the threshold.

    Raises:
        DoriError: no memory was judged under the audited model, or there is no threshold.
    """
    rates = [
        row.replication.rate.value
        for row in table(audit)
        if row.population != CONTROLS and row.way.model == audit.model
    ]
    if not rates:
        raise DoriError(
            f"the audit of {audit.model} judged no memory, so there is no MR to hold against a limit; "
            "audit with memories"
        )
    return max(rates)


def compare(a: Audit, b: Audit) -> Comparison:
    """What changed from audit a to audit b, over the images that both judged.

    Raises:
        DoriError: no image in common, an audit without a threshold, or findings that contradict one another.
    """
    ids = [{finding.id for finding in audit.findings} for audit in (a, b)]
    pixels = [{subject.id: subject.sha256 for subject in audit.subjects} for audit in (a, b)]
    altered = {
        one for one in ids[0] & ids[1] if (old := pixels[0].get(one)) and (new := pixels[1].get(one)) and old != new
    }
    shared = (ids[0] & ids[1]) - altered
    if not shared:
        raise DoriError(
            f"the audits of {a.model} and {b.model} have no image in common, so nothing can be compared; "
            "audit both with the same memories"
        )
    before, after = (replace(audit, findings=tuple(f for f in audit.findings if f.id in shared)) for audit in (a, b))
    rates, incomparable = tuple(_rates(_by_role(before), _by_role(after))), _incomparable(a, b)
    return Comparison(
        models=(a.model, b.model),
        incomparable=incomparable,
        shared=len(shared),
        altered=tuple(sorted(altered)),
        missing=tuple(sorted(ids[0] ^ ids[1])),
        settings=tuple(_changes(_described(a), _described(b))),
        rates=rates,
        flips=() if incomparable else tuple(_flips(before, after, rates)),
    )


def _incomparable(a: Audit, b: Audit) -> str:
    parts: dict[str, list[object]] = {
        "descriptor": [audit.descriptor.get("name") for audit in (a, b)],
        "preprocessing": [audit.descriptor.get("preprocessing") for audit in (a, b)],
        "descriptor's weights": [audit.descriptor.get("fingerprint") for audit in (a, b)],
        "threshold": [threshold_of(a), threshold_of(b)],
        "masked threshold": [rule_of(a).masked, rule_of(b).masked],
    }
    differing = [name for name, (before, after) in parts.items() if before != after]
    if not differing:
        return ""
    return (
        f"The numbers of these two audits are not comparable: {' and '.join(differing)} differ"
        f"{'s' if len(differing) == 1 and not differing[0].endswith('s') else ''}."
    )


def _described(audit: Audit) -> dict[str, Any]:
    edits = {f"edits.{edit.name}{'.' + edit.scope if edit.scope else ''}": {"size": edit.size} for edit in audit.edits}
    return {
        "descriptor": dict(audit.descriptor),
        "settings": dict(audit.settings),
        "twins": list(audit.twins),
        "versions": audit.provenance.get("versions", {}),
        **edits,
    }


def _leaves(value: Any, name: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, list(value) if isinstance(value, tuple) else value


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[Change]:
    before, after = dict(_leaves(a, "")), dict(_leaves(b, ""))
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            yield Change(name, before.get(name), after.get(name))


# A row's key without its steps, since two audits may have attacked with different budgets.
_Role = tuple[str, str, str, str, str]


def _by_role(audit: Audit) -> dict[_Role, dict[int, Row]]:
    found: dict[_Role, dict[int, Row]] = {}
    for row in table(audit):
        way = row.way
        model = AUDITED if way.model == audit.model else way.model
        found.setdefault((row.population, model, way.edit, way.edit_scope, way.start), {})[way.steps] = row
    return found


def _rates(a: Mapping[_Role, Mapping[int, Row]], b: Mapping[_Role, Mapping[int, Row]]) -> Iterable[RateChange]:
    for role in dict.fromkeys((*a, *b)):
        before, after = a.get(role, {}), b.get(role, {})
        both = set(before) & set(after)
        common = {step: before[step] for step in both}
        steps = [_last(rows) for rows in ([common] if common else [before, after]) if rows]
        for step in steps:
            ours, theirs = before.get(step), after.get(step)
            yield RateChange(
                role[0],
                Way(*role[1:], step),
                None if ours is None else ours.replication.rate,
                None if theirs is None else theirs.replication.rate,
            )


def _last(rows: Mapping[int, Row]) -> int:
    return last_step({step: row.replication.memories for step, row in rows.items()})


def _flips(a: Audit, b: Audit, rates: Iterable[RateChange]) -> Iterable[Flip]:
    rule = rule_of(a)  # equal to b's, or nothing is compared
    before, after = ({(_way(audit, way_of(f)), population_of(f), f.id): f for f in audit.findings} for audit in (a, b))
    for change in rates:
        if change.before is None or change.after is None:
            continue
        for way, population, image in before:
            key = (change.way, change.population, image)
            if (way, population) != key[:2] or key not in after:
                continue
            now = rule.came_back(after[key])
            if rule.came_back(before[key]) != now:
                yield Flip(image, population, change.way, now, rule.median(before[key]), rule.median(after[key]))


def _way(audit: Audit, way: Way) -> Way:
    return replace(way, model=AUDITED) if way.model == audit.model else way


def to_text(comparison: Comparison) -> str:
    """The comparison as plain text for a terminal."""
    lines = [f"{comparison.models[0]} -> {comparison.models[1]}"]
    lines += [comparison.incomparable] if comparison.incomparable else []
    if comparison.missing:
        lines.append(f"Only one of the audits judged {_some(comparison.missing)}.")
    if comparison.altered:
        lines.append(f"The audits judged different pixels under the name {_some(comparison.altered)}.")
    if comparison.missing or comparison.altered:
        lines.append(f"Compared are the {comparison.shared} images that both judged.")
    lines += ["", "Changed settings" if comparison.settings else "No setting changed."]
    lines += [
        f"  {change.name}: {_short(change.before)} -> {_short(change.after)}" for change in comparison.settings[:SHOWN]
    ]
    lines += _more(len(comparison.settings))
    lines += ["", "MR by edit and way of asking"] + [
        f"  {_named(change.population, change.way)}: {_moved(change)}" for change in comparison.rates
    ]
    if not comparison.incomparable:
        lines += ["", "Images whose verdict turned" if comparison.flips else "No image's verdict turned."]
        lines += [
            f"  {flip.id} ({_named(flip.population, flip.way)}): "
            f"{'now comes back' if flip.came_back_after else 'no longer comes back'}, {number(flip.before)} -> "
            f"{number(flip.after)}"
            for flip in comparison.flips[:SHOWN]
        ]
        lines += _more(len(comparison.flips))
    return "\n".join(line.translate(CONTROL_CHARACTERS) for line in lines) + "\n"


# Names come from strangers' files: none of them may steer a terminal.
CONTROL_CHARACTERS = dict.fromkeys((*range(32), *range(127, 160)), "?")


def _named(population: str, way: Way) -> str:
    whose = population if way.model == AUDITED else f"{population} on {called_twin(way.model)}"
    edit = "unedited" if way.edit == "none" else way.edit + (" (own)" if way.edit_scope == "own" else "")
    return f"{whose}, {edit}, {way.asked}"


def _moved(change: RateChange) -> str:
    if change.before is None or change.after is None:
        known, where = (change.after, "second") if change.before is None else (change.before, "first")
        return f"{rate(known)}, only in the {where} audit" if known else "not asked"
    return f"{rate(change.before)} -> {rate(change.after)}, {change.after.value - change.before.value:+.2f}"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _more(count: int) -> list[str]:
    return [f"  and {count - SHOWN} more"] if count > SHOWN else []


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
