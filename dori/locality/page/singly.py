"""The figures memory by memory, of which the page else gives means."""

from collections.abc import Mapping

from dori.locality.page.summary import SITES, TOGETHER, activity_ratios, levels, methods, own_shares
from dori.locality.patching import NECESSARY, SUFFICIENT
from dori.locality.probes import BALL, BETWEEN
from dori.locality.records import APART, OTHER_IMAGES, OTHER_NOISES, OTHERS_APART, SAME_STARTS, WHOLE, Locality
from dori.report.tables import number

PATCHED = {SUFFICIENT: "put into the twin", NECESSARY: "taken from the twin"}


def singly(found: Locality) -> list[tuple[str, list[str]]]:
    """Rows of a table with a column for each memory; what was measured of none of them has no row."""
    rows: dict[str, Mapping[str, str]] = {
        "attacks that replicate": {s.id: f"{s.triggers} of {s.attacks}" for s in found.subjects},
        "common share of the moves beyond other images'": _numbers(own_shares(found)),
        "half way between two triggers": _counted(found, BETWEEN, 0.5),
    }
    for radius in sorted({probe.at for probe in found.probes if probe.kind == BALL}):
        rows[f"around a trigger, radius {radius:g}"] = _counted(found, BALL, radius)
    for site, name in SITES.items():
        ratios = activity_ratios(found, site, SAME_STARTS, OTHER_IMAGES)
        rows[f"D in the {name}, to triggers of other images"] = _numbers(ratios)
    for method in methods(found):
        for group, name in (
            (APART, "triggers, other noises"),
            (OTHERS_APART, "triggers of other images"),
            (OTHER_NOISES, "one trigger (ceiling)"),
        ):
            agreement = levels(found, method, group, WHOLE, without_empty=True)
            rows[f"{method} masks: {name}"] = _numbers(agreement)
    for direction, words in PATCHED.items():
        for patch in dict.fromkeys(p.layers for p in found.patches if p.layers.startswith(TOGETHER)):
            chosen = {p.memory: p for p in found.patches if (p.direction, p.layers) == (direction, patch)}
            rows[f"{patch} {words}: share of the gap, likeness to the other model's"] = {
                memory: f"{number(p.share, 2)}, {'–' if p.alike is None else number(p.alike, 2)}"
                for memory, p in chosen.items()
                if p.share is not None
            }
    memories = [subject.id for subject in found.subjects]
    return [(name, [cells.get(one, "–") for one in memories]) for name, cells in rows.items() if cells]


def _numbers(values: Mapping[str, float]) -> dict[str, str]:
    return {memory: number(value, 2) for memory, value in values.items()}


def _counted(found: Locality, kind: str, at: float) -> dict[str, str]:
    return {p.memory: f"{p.successes} of {p.n}" for p in found.probes if (p.kind, p.at) == (kind, at) and p.n}
