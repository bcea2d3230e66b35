"""The figures memory by memory, of which the page else gives means."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from dori.locality.page.intervened import patched
from dori.locality.page.summary import SITES, activity_ratios, levels, methods, own_shares, way
from dori.locality.patching import NECESSARY, NONE, SOURCE, SUFFICIENT, TOGETHER
from dori.locality.probes import BALL, BETWEEN, OUTWARD
from dori.locality.records import (
    APART,
    MEMORIZED,
    ORDINARY,
    OTHER_IMAGES,
    OTHER_NOISES,
    OTHERS_APART,
    SAME_APART,
    SAME_STARTS,
    SIMULATED,
    STARTS,
    TRIGGERS,
    WHOLE,
    Cover,
    Locality,
    Patch,
)
from dori.locality.transplants import CONTROL
from dori.report.tables import number

GROUPS = {  # of masks, and what the page calls them
    TRIGGERS: "triggers of one image",
    f"{TRIGGERS}, gaussian": "those from N(0, I)",
    f"{TRIGGERS}, foreign": "those from other prompts",
    OTHER_NOISES: "one trigger, other noises (ceiling)",
    OTHER_IMAGES: "triggers of different images",
    APART: "triggers of one image, different noises",
    OTHERS_APART: "triggers of different images, different noises",
    SAME_APART: "one of these triggers, different noises (their ceiling)",
    MEMORIZED: MEMORIZED,
    ORDINARY: ORDINARY,
    SIMULATED: "random, equal size",
}
KINDS = {"prompt": "from the own prompt", "gaussian": "from N(0, I)", "foreign": "from other prompts"}  # of starts
RATIOS = {  # of D: group, reference, and what the row says
    "triggers to those of other images, same starts": (SAME_STARTS, OTHER_IMAGES),
    "triggers to memorized prompts": (TRIGGERS, MEMORIZED),
    "triggers from N(0, I) to their starts": (f"{TRIGGERS}, gaussian", STARTS),
}
PROBED = {
    BETWEEN: "between two triggers, {:g} of the way",
    OUTWARD: "to an ordinary prompt, {:g} of the way",
    BALL: "around a trigger, radius {:g}",
}
SEARCHED = {
    "median_size": "neurons in the median set",
    "flagged": "share taken for memorized",
    "localized": "share called localized",
    "suppressed": "share that found a set that suppresses",
    "converged": "share that ended before the cap",
}
PATCHED = {SUFFICIENT: "put into the twin", NECESSARY: "taken from the twin"}
Row = tuple[str, Mapping[str, str]]  # what it says, and memory to cell


def singly(found: Locality) -> list[tuple[str, list[str]]]:
    """Rows of a table with a column for each memory; what was measured of none of them has no row."""
    rows = [
        ("attacks that replicate", {s.id: f"{s.triggers} of {s.attacks}" for s in found.subjects}),
        *_space(found),
        *_activations(found),
        *_weights(found),
        *_searches(found),
        *_covered(found),
        *_carried(found.patches, "activations of {} {}", TOGETHER),
        *_carried(found.transplants, "weights of {} {}", ""),
        *_between(found),
    ]
    memories = [subject.id for subject in found.subjects]
    return [(name, [cells.get(one, "–") for one in memories]) for name, cells in rows if cells.keys() & {*memories}]


def _space(found: Locality) -> Iterable[Row]:
    """Every measure of the embedding space under its own name, and all points of lines and balls."""
    for name in dict.fromkeys(m.name for m in found.measures if m.memory):
        yield _spoken(name), _numbers({m.memory: m.value for m in found.measures if m.name == name})
    yield "common share of the moves beyond other images'", _numbers(own_shares(found))
    for kind, words in PROBED.items():
        for at in sorted({probe.at for probe in found.probes if probe.kind == kind}):
            chosen = [p for p in found.probes if (p.kind, p.at) == (kind, at) and p.n]
            yield words.format(at), {p.memory: f"{p.successes} of {p.n}" for p in chosen}


def _spoken(name: str) -> str:
    """A measure's name in the table: what is a distance says so, and the kind of start stands in brackets."""
    stem, _, kind = name.rpartition(", ")
    words, kind = (stem, f" ({KINDS[kind]})") if kind in KINDS else (name, "")
    return f"{'distance ' if words.startswith(('between', 'moved')) else ''}{words}{kind}"


def _activations(found: Locality) -> Iterable[Row]:
    for site, name in SITES.items():
        for words, (group, reference) in RATIOS.items():
            yield f"D in the {name}: {words}", _numbers(activity_ratios(found, site, group, reference))


def _weights(found: Locality) -> Iterable[Row]:
    """Agreement of every group, and the place between reference and ceiling, which each memory has of its own."""
    for method in methods(found):
        for group, name in GROUPS.items():
            yield f"{method} masks: {name}", _numbers(levels(found, method, group, WHOLE, without_empty=True))
        places = {one.id: way(_alone(found, one.id), method).estimate for one in found.subjects}
        known = {memory: place.value for memory, place in places.items() if place.n}
        yield f"{method} masks: share of the way from the higher reference to the ceiling", _numbers(known)


def _alone(found: Locality, memory: str) -> Locality:
    return dataclasses.replace(found, overlaps=tuple(o for o in found.overlaps if o.memory in (memory, "")))


def _searches(found: Locality) -> Iterable[Row]:
    for field, words in SEARCHED.items():
        chosen = {s.memory: getattr(s, field) for s in found.searches if s.group == TRIGGERS}
        yield f"NeMo's searches: {words}", _numbers(chosen, 0 if field == "median_size" else 2)


def _covered(found: Locality) -> Iterable[Row]:
    """What one trigger's mask holds of the planted change in its layers, beside random masks as large."""
    for method in dict.fromkeys(c.method for c in found.covers):
        chosen = [c for c in found.covers if (c.method, c.layer, c.masks) == (method, WHOLE, "one")]
        yield (
            f"{method} masks: share of the planted change in their layers, and of random masks as large",
            {c.memory: _beside_chance(c) for c in chosen if c.share is not None},
        )


def _beside_chance(cover: Cover) -> str:
    times = f" ({cover.share / cover.random:.2f} times)" if cover.share is not None and cover.random else ""
    return f"{number(cover.share, 3)}, {number(cover.random, 3)}{times}"


def _carried(patches: Sequence[Patch], says: str, begins: str) -> Iterable[Row]:
    """Sets of layers or weights whose names begin so."""
    for direction, words in PATCHED.items():
        for name in dict.fromkeys(p.layers for p in patches if p.layers.startswith(begins)):
            if name in (NONE, SOURCE):
                continue
            chosen = [p for p in patched(patches, direction, name) if p.share is not None]
            yield (
                f"{says.format(name, words)}: share of the gap, likeness to the other model's",
                {p.memory: f"{number(p.share, 2)}, {number(p.alike, 2)}" for p in chosen},
            )


def _between(found: Locality) -> Iterable[Row]:
    """The control of exchanged weights."""
    for name in dict.fromkeys(p.layers for p in found.transplants if p.layers not in (NONE, SOURCE)):
        kept = {p.memory: p.kept for p in patched(found.transplants, CONTROL, name)}
        yield f"weights of {name} {CONTROL}: likeness to the images before", _numbers(kept)


def _numbers(values: Mapping[str, float | None], digits: int = 2) -> dict[str, str]:
    return {memory: number(value, digits) for memory, value in values.items()}
