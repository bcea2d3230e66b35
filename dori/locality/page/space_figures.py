"""Figures of embedding space: maps, distances, and the region that replicates.

In all figures of the page shapes and line styles repeat what the colours say, a title says what is shown, and names
that a stranger chose never become markup.
"""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes

from dori.locality.page.observed import rate
from dori.locality.page.summary import measure
from dori.locality.probes import BALL, BETWEEN, OUTWARD
from dori.locality.records import MEMORIZED, ORDINARY, Locality, Place
from dori.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    WIDTH,
    Picture,
    bars,
    drawing,
    legend_above,
    picture,
)

SIZE, RING = 4.5, 9.0  # of a marker; of a start's, which is seen round a trigger that lies on it
ROLES = {  # name, colour, marker, filled, size; those later are drawn on top
    MEMORIZED: (MEMORIZED, VERMILION, "s", False, SIZE),
    ORDINARY: (ORDINARY, ORANGE, "v", False, SIZE),
    "attacked": ("attacked, no replica", GREY, "x", True, SIZE),
    "trigger": ("trigger", BLUE, "o", True, SIZE),
    "start": ("start (large ring, on top)", GREY, "o", False, RING),
}


def map_figures(found: Locality, memory: str) -> list[Picture]:
    """Starts joined with what the attack made of them, and prompts: principal components, and t-SNE beside them."""
    places = [place for place in found.places if place.memory == memory]
    drawn, name = found.settings["maps"][memory], _named(found, memory)
    count = sum(place.role == "trigger" for place in places)
    titles = {
        "pca": "{}: where triggers lie, principal components, {:.0%} and {:.0%} of the variance".format(
            name, *drawn["explained"]
        ),
        "tsne": f"{name}: t-SNE keeps neighbours only, its distances mean nothing "
        f"(perplexity {drawn['perplexity']:g}, seed {drawn['seed']})",
    }
    pictures = []
    for which, title in titles.items():
        with drawing(WIDTH, 3.9, title=title) as figure:
            axes = figure.subplots()
            _map(axes, places, which)
            legend_above(axes)
            pictures.append(picture(figure, f"{title}. {count} triggers, each joined with its start, beside prompts."))
    return pictures


def _named(found: Locality, memory: str) -> str:
    """A memory in a title, with its dose where that is known."""
    dose = next((one.dose for one in found.subjects if one.id == memory), None)
    return memory if dose is None else f"{memory} (dose {dose:g})"


def _map(axes: Axes, places: Iterable[Place], which: str) -> None:
    spots = {(p.role, p.start, p.index): getattr(p, which) for p in places}
    for (role, start, index), spot in spots.items():
        if role in ("trigger", "attacked") and (begin := spots.get(("start", start, index))):
            axes.plot(*zip(begin, spot, strict=True), color="#c8ced4", lw=0.8, zorder=1)
    for role, (name, colour, marker, full, size) in ROLES.items():
        mine = [spot for key, spot in spots.items() if key[0] == role]
        if mine:
            fill = colour if full else "none"
            axes.plot(
                *zip(*mine, strict=True), ls="", marker=marker, color=colour, ms=size, mew=1, label=name, mfc=fill
            )
    axes.set_xticks([])
    axes.set_yticks([])


DISTANCES = {  # measure -> how the figure calls it, and its colour
    "between their starts, gaussian": ("N(0, I): two starts", GREY),
    "between triggers, gaussian": ("N(0, I): two triggers", BLUE),
    "between their moves, gaussian": ("N(0, I): two moves", GREEN),
    "moved, gaussian": ("N(0, I): start and trigger", GREEN),
    "between their starts, foreign": ("other prompts: two starts", GREY),
    "between triggers, foreign": ("other prompts: two triggers", BLUE),
    "between their moves, foreign": ("other prompts: two moves", GREEN),
    "moved, foreign": ("other prompts: start and trigger", GREEN),
    "moved, prompt": ("own prompt: start and trigger", GREEN),
    "between memorized prompts": ("two memorized prompts", VERMILION),
    "between ordinary prompts": ("two ordinary prompts", ORANGE),
}


def distance_figure(found: Locality) -> Picture | None:
    """Mean distances on one axis: starts, triggers, moves, prompts; None where none was measured."""
    rows = [(name, colour, one) for key, (name, colour) in DISTANCES.items() if (one := measure(found, key)).n]
    rows = [row for row in rows if not np.isnan(row[2].value)]
    if not rows:
        return None
    with drawing(WIDTH, 1.3 + 0.25 * len(rows), title="How far apart? Starts, what the attack made, moves") as figure:
        axes = figure.subplots()
        for y, (_, colour, one) in enumerate(reversed(rows)):
            axes.errorbar([one.value], [y], xerr=bars([one]), fmt="o", color=colour, ms=6, capsize=3)
            end = one.value if np.isnan(one.high) else one.high
            axes.annotate(f"{one.value:.1f}", (end, y), (7, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)], fontsize=8.5)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(0, 1.3 * max(one.value for _, _, one in rows))
        axes.set_xlabel("Mean l2 distance, all entries")
        return picture(figure, "Mean distances. " + ", ".join(f"{name} {one.value:.1f}" for name, _, one in rows) + ".")


def line_figure(found: Locality) -> Picture:
    """Which share replicates along lines from triggers to triggers, and to ordinary prompts."""
    with drawing(title="On straight lines from a trigger: what still replicates?") as figure:
        axes = figure.subplots()
        told = [_rates(axes, found, BETWEEN, BLUE, "o-"), _rates(axes, found, OUTWARD, VERMILION, "s--")]
        axes.set_xlabel("Share of the way")
        axes.set_xlim(0, 1)
        legend_above(axes)
        return picture(figure, f"Success on straight lines. {' '.join(told)}")


def ball_figure(found: Locality) -> Picture:
    """Which share replicates at random points on spheres around triggers."""
    with drawing(title="In random directions from a trigger: what still replicates?") as figure:
        axes = figure.subplots()
        told = _rates(axes, found, BALL, BLUE, "o-")
        axes.set_xlabel("Radius, in median distances of ordinary prompts")
        axes.set_xlim(0, None)
        return picture(figure, f"Success around a trigger. {told}")


def _rates(axes: Axes, found: Locality, kind: str, colour: str, style: str) -> str:
    """A line of shares over memories, with intervals where there are enough; returns them in words."""
    places = sorted({p.at for p in found.probes if p.kind == kind})
    rates = [rate(found, kind, at) for at in places]
    values = [one.value for one in rates]
    axes.errorbar(places, values, bars(rates) if rates else None, fmt=style, color=colour, ms=5, capsize=3, label=kind)
    axes.set_ylabel("Share that replicates")
    axes.set_ylim(-0.04, 1.04)
    return f"{kind}: " + ", ".join(f"{one.value:.2f} at {at:g}" for at, one in zip(places, rates, strict=True)) + "."
