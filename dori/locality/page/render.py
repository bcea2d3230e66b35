"""A locality run as one self-contained HTML file: no script, no outside request, every text escaped.

A pure function of the records and of the training images in the run's folder; the style is the audit report's.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dori.locality.page import cause_figures, layer_figures, layer_ids, space_figures, verdict
from dori.locality.page.singly import GROUPS, singly
from dori.locality.page.summary import SITES, Said, dose_relations, methods, over_memories, overlap, said
from dori.locality.records import TRIGGERS, WHOLE, Locality
from dori.report.drawing import Picture
from dori.report.nested import sheet
from dori.report.page import page
from dori.report.pictures import Album

READ = {
    "embedding": "Thin lines join a start with what the attack made of it; a ring round a dot is a start that lies "
    "where its trigger lies. Distances are over all entries of the embedding; moves are ends minus starts, so the "
    "starts' own distance is taken out of them.",
    "activations": "D is the mean pairwise l2 distance of one layer's output under different embeddings and one "
    "initial noise. High means that the layer answers differently. Feed-forwards have a logarithmic axis; value "
    "projections see no noise, so that of one trigger under several there is none to draw.",
    "weights": "1 means the same weights. Triggers of different images differ from those of one image by the image, "
    "and by what comes with it: masks of another size share less.",
    "causal": "Dots mark what replicates. Where one trigger's mask stops the other triggers as they are and random "
    "masks as large do not, what it points at is theirs too. Were the memory local, new attacks would find no dot "
    "either. Weights with a twin's values can be counted, or weighed by how much of the squared difference from the "
    "twin they take back; as many at random hold far less of it, so that the two readings may disagree: both are "
    "drawn.",
    "patching": "1 means that the patched activations carry the whole difference between the analysed model (planted) "
    "and its twin, 0 that they carry nothing. Feed-forwards, self-attentions and the second convolutions of ResNet "
    "blocks are some of what a U-Net adds to its residual stream, values a step before it. A diamond is the "
    "likeness to the images that the other model draws itself: low beside a high bar, what is drawn is "
    "neither model's image.",
    "transplants": "Where planting changed the weights most need not be where the memory is. 1 means that with the "
    "other model's weights of this kind the whole difference in likeness to the memory is gone, or there; 0 that none "
    "is. Where the control (a cross) lies as high, any image is lost so.",
    "truth": "A mask that knew where planting changed the weights would lie far above random masks as large.",
    "dose": "One dot is one memory; those of one dose are spread a little, so that none hides another.",
}
TITLES = {
    "embedding": "Embedding space",
    "activations": "Activations",
    "weights": "Weights",
    "causal": "Causal test",
    "patching": "Activation patching",
    "truth": "Ground truth",
    "transplants": "Weights exchanged",
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
        audited=(folder / "audit.json").exists(),
        headline=verdict.headline(found),
        done=verdict.done(found),
        rules=verdict.RULES,
        sections=list(_sections(found)),
        header=list(_columns(found).values()),
        agreement=list(_agreement(found)),
        singly=singly(found),
        subjects=[(one, album.uri(one.picture, blurred=redact)) for one in found.subjects],
        settings=sheet(layer_ids.with_key(found)),
        descriptor=sheet(found.descriptor),
        provenance=sheet(found.provenance),
    )


def _sections(found: Locality) -> Iterable[Section]:
    drawn = {
        "embedding": _embedding(found),
        "activations": _activations(found),
        "weights": ([layer_figures.overlap_figure(found, method) for method in methods(found)], []),
        "causal": _causal(found),
        "patching": _patching(found),
        "truth": _truth(found),
        "transplants": ([one for one in [cause_figures.transplant_figure(found)] if one is not None], []),
        "dose": ([cause_figures.dose_figure(one) for one in dose_relations(found) if not math.isnan(one.rank)], []),
    }
    for key, said_ in verdict.all_said(found).items():
        shown, folded = drawn[key]
        layers = f" {layer_ids.key(found)}" if key == "activations" else ""
        yield Section(key, TITLES[key], said_, READ[key] + layers, tuple(shown), tuple(folded))


Drawn = tuple[list[Picture], list[Picture]]


def _embedding(found: Locality) -> Drawn:
    ranked = sorted(found.subjects, key=lambda one: -one.triggers)
    shown, *folded = [space_figures.map_figures(found, one.id) for one in ranked] or [[]]
    if distances := space_figures.distance_figure(found):
        shown.append(distances)
    if found.probes:
        shown += [space_figures.line_figure(found), space_figures.ball_figure(found)]
    return shown, [picture for pair in folded for picture in pair]


def _activations(found: Locality) -> Drawn:
    first, *later = [
        [layer_figures.activity_figure(found, site, name, step) for site, name in SITES.items()]
        for step in sorted({one.step for one in found.activities})
    ] or [[]]
    return first, [values_and_feed[1] for values_and_feed in later]  # values are the same at every step


def _causal(found: Locality) -> Drawn:
    shown: list[Picture] = []
    folded: list[Picture] = []
    tested = [cross for cross in found.crosses if cross.masks == TRIGGERS]
    for cross in tested:
        drawn = shown if cross.memory == tested[0].memory else folded
        drawn += [*cause_figures.cross_figures(found, cross), *cause_figures.joined_figures(found, cross)]
    memories = dict.fromkeys(one.memory for one in found.undone)
    drawn = [one for memory in memories if (one := cause_figures.undone_figure(found, memory)) is not None]
    return shown + drawn[:1], folded + drawn[1:]


def _patching(found: Locality) -> Drawn:
    if not any(one.share is not None for one in found.patches):
        return [], []
    drawn = [cause_figures.patch_kinds_figure(found)]
    drawn += [layer_figures.patch_figure(found, name, site) for site, name in SITES.items()]
    return [one for one in drawn if one is not None], []


def _truth(found: Locality) -> Drawn:
    if not found.changes:
        return [], []
    covered = dict.fromkeys(one.method for one in found.covers)
    drawn = [cause_figures.excess_figure(found, level) for level in ("kind", "layer")]
    return [*(one for one in drawn if one), *(layer_figures.cover_figure(found, method) for method in covered)], []


def _columns(found: Locality) -> dict[str, str]:
    """The groups of masks that were compared, with their names; older records lack some."""
    return {group: name for group, name in GROUPS.items() if any(o.group == group for o in found.overlaps)}


def _agreement(found: Locality) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Whole masks by method: agreement as published and without empty pairs, their share, sizes, numbers of pairs."""
    columns = _columns(found)
    for method in methods(found):
        rows = [o for o in found.overlaps if (o.method, o.layer) == (method, WHOLE)]
        lines = [
            (name, *(said(overlap(found, method, WHOLE, group, without_empty=without)) for group in columns))
            for name, without in (("IoU, two empty masks 1 (published)", False), ("IoU without such pairs", True))
        ]
        for name, attribute, form in (
            ("share of such pairs", "empty_share", "{:.2f}"),
            ("neurons in a mask" if method == "NeMo" else "weights in a mask", "size", "{:,.0f}"),
            ("pairs of a memory", "pairs", "{:,.0f}"),
        ):
            means = [over_memories(getattr(o, attribute) for o in rows if o.group == group).value for group in columns]
            lines.append((name, *("–" if math.isnan(mean) else form.format(mean) for mean in means)))
        yield method, lines
