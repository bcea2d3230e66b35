"""A locality run as one self-contained HTML file: no script, no outside request, every text escaped.

A pure function of the records and of the training images in the run's folder; the style is the audit report's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dori.locality.page import figures, verdict
from dori.locality.page.summary import dose_relations, methods, overlap, said
from dori.locality.page.verdict import Said
from dori.locality.records import MEMORIZED, ORDINARY, OTHER_NOISES, RANDOM, SIMULATED, TRIGGERS, WHOLE, Locality
from dori.report.drawing import Picture
from dori.report.nested import sheet
from dori.report.page import page
from dori.report.pictures import Album

COLUMNS = (
    TRIGGERS,
    f"{TRIGGERS}, gaussian",
    f"{TRIGGERS}, foreign",
    OTHER_NOISES,
    MEMORIZED,
    ORDINARY,
    RANDOM,
    SIMULATED,
)
READ = {
    "embedding": "Each thin line joins a start with what the attack made of it. Distances are over all entries of the "
    "embedding; moves are ends minus starts, so the starts' own distance is taken out of them.",
    "activations": "D is the mean pairwise l2 distance of one layer's output under different embeddings and one "
    "initial noise. High means that the layer answers differently.",
    "weights": "1 means the same weights, the grey line what random masks of equal size share. Hollow circles leave "
    "out pairs of two empty masks, which count 1 as published.",
    "causal": "Dots mark what replicates. Were the memory local, no dot would be left: one trigger's mask would stop "
    "every other trigger.",
    "patching": "1 means that the layer's activations alone carry the whole difference between the planted model and "
    "its twin, 0 that they carry nothing.",
    "truth": "A mask that knew where planting changed the weights would lie far above random masks of its size.",
    "dose": "One dot is one memory.",
}
TITLES = {
    "embedding": "Embedding space",
    "activations": "Activations",
    "weights": "Weights",
    "causal": "Causal test",
    "patching": "Activation patching",
    "truth": "Ground truth",
    "dose": "Dose",
}


@dataclass(frozen=True, slots=True)
class Section:
    """One analysis: its verdict, how to read it, its pictures, and further ones that are folded."""

    key: str
    title: str
    said: Said
    read: str
    pictures: tuple[Picture, ...]
    folded: tuple[Picture, ...]


def render(found: Locality, folder: Path, *, redact: bool = False) -> str:
    """The page as HTML.

    Args:
        found: the records.
        folder: the run's folder, in which the training images lie.
        redact: blur the training images and leave the prompts out.

    Raises:
        DoriError: a picture outside the folder or damaged.
    """
    album = Album(folder)
    return page(
        "locality/page/template.html",
        found=found,
        redact=redact,
        headline=verdict.headline(found),
        done=verdict.done(found),
        rules=verdict.RULES,
        sections=list(_sections(found)),
        header=COLUMNS,
        rows=_agreement_rows(found),
        subjects=[(one, album.uri(one.picture, blurred=redact)) for one in found.subjects],
        settings=sheet(found.settings),
        descriptor=sheet(found.descriptor),
        provenance=sheet(found.provenance),
    )


def _sections(found: Locality) -> Iterable[Section]:
    everything = verdict.all_said(found)
    drawn = {
        "embedding": _embedding(found),
        "activations": _activations(found),
        "weights": _weights(found),
        "causal": _causal(found),
        "patching": ([figures.patch_figure(found)] if found.patches else [], []),
        "truth": _truth(found),
        "dose": _dose(found),
    }
    for key, (shown, folded) in drawn.items():
        if shown or key in ("embedding", "weights"):
            yield Section(key, TITLES[key], everything[key], READ[key], tuple(shown), tuple(folded))


Drawn = tuple[list[Picture], list[Picture]]


def _embedding(found: Locality) -> Drawn:
    ranked = sorted(found.subjects, key=lambda one: -one.triggers)
    maps = [figures.map_figure(found, one.id) for one in ranked]
    shown = maps[:1]
    if any(one.name in figures.DISTANCES and one.value is not None for one in found.measures):
        shown.append(figures.distance_figure(found))
    if found.probes:
        shown.append(figures.region_figure(found))
    return shown, maps[1:]


def _activations(found: Locality) -> Drawn:
    steps = sorted({one.step for one in found.activities})
    drawn = [
        [figures.activity_figure(found, site, name, step) for site, name in verdict.SITES.items()] for step in steps
    ]
    return (drawn[0], [picture for later in drawn[1:] for picture in later[1:]]) if drawn else ([], [])


def _weights(found: Locality) -> Drawn:
    return [figures.overlap_figure(found, method) for method in methods(found)], []


def _causal(found: Locality) -> Drawn:
    drawn = []
    for cross in found.crosses:
        drawn += [figures.cross_figure(found, cross), figures.joined_figure(found, cross.memory, cross.method)]
    return drawn[:2], drawn[2:]


def _truth(found: Locality) -> Drawn:
    if not found.changes:
        return [], []
    covered = dict.fromkeys(one.method for one in found.covers)
    return [figures.excess_figure(found), *(figures.cover_figure(found, method) for method in covered)], []


def _dose(found: Locality) -> Drawn:
    related = dose_relations(found)
    return ([figures.dose_figure(related)] if related else []), []


def _agreement_rows(found: Locality) -> list[tuple[str, ...]]:
    """Agreement of whole masks, by method: as published, without empty pairs, and their share."""
    rows = []
    for method in methods(found):
        rows.append((method, "as published", *(said(overlap(found, method, WHOLE, group)) for group in COLUMNS)))
        rows.append(
            (
                method,
                "without empty pairs",
                *(said(overlap(found, method, WHOLE, group, without_empty=True)) for group in COLUMNS),
            )
        )
    return rows
