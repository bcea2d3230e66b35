"""Figures layer by layer: activation discrepancy, agreement of masks, what they hold of the change, patching."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dori.locality.page.intervened import patch_shares
from dori.locality.page.summary import activity, layers, over_memories, overlap
from dori.locality.patching import NECESSARY, SUFFICIENT
from dori.locality.records import (
    MEMORIZED,
    ORDINARY,
    OTHER_IMAGES,
    OTHER_NOISES,
    RANDOM,
    SIMULATED,
    STARTS,
    TRIGGERS,
    Locality,
)
from dori.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    WIDTH,
    Picture,
    bars,
    drawing,
    legend_above,
    picture,
)
from dori.stats import Estimate

LETTERS = 46  # of the longest labels of a legend's two columns, which fit beside each other
Style = tuple[str, str]  # colour; marker and line
STYLES: dict[str, tuple[str, Style]] = {
    TRIGGERS: ("triggers of one image", (BLUE, "o-")),
    OTHER_NOISES: ("one trigger, more noises", (GREEN, "^-.")),
    OTHER_IMAGES: ("triggers, different images", (SKY, "D:")),
    MEMORIZED: (MEMORIZED, (VERMILION, "s--")),
    ORDINARY: (ORDINARY, (ORANGE, "v:")),
    STARTS: ("bare Gaussian starts", (PURPLE, "P:")),
    RANDOM: ("random, closed form", (GREY, "--")),
    SIMULATED: ("random, simulated", (GREY, "x")),
}


def activity_figure(found: Locality, site: str, name: str, step: int) -> Picture:
    """D_l of triggers and of all reference levels at one step."""
    title = f"How differently do the {name} answer? D at step {step}"
    with drawing(WIDTH, 3.8, title=title) as figure:
        axes, names = figure.subplots(), found.settings["layers"][site]
        told = [
            _line(axes, *STYLES[group], [activity(found, layer, group, step) for layer in names])
            for group in (TRIGGERS, OTHER_IMAGES, MEMORIZED, ORDINARY, STARTS, OTHER_NOISES)
        ]
        _finish(axes, names, "D, mean pairwise l2 distance")
        return _told(figure, title, told)


def overlap_figure(found: Locality, method: str) -> Picture:
    """A_l of triggers between random masks and other seeds, pairs of two empty masks left out; hollow: as published."""
    title = f"Do {method} masks agree? Mean IoU, 1 is the same mask"
    with drawing(WIDTH, 4.1, title=title) as figure:
        axes, names = figure.subplots(), layers(found, method)
        told = [
            _line(axes, *STYLES[group], [overlap(found, method, layer, group, without_empty=True) for layer in names])
            for group in (TRIGGERS, OTHER_NOISES, OTHER_IMAGES, MEMORIZED, ORDINARY, RANDOM, SIMULATED)
        ]
        without = [overlap(found, method, layer, TRIGGERS, without_empty=True).value for layer in names]
        plain = [overlap(found, method, layer, TRIGGERS).value for layer in names]
        spots = [(x, a) for x, (a, b) in enumerate(zip(plain, without, strict=True), 1) if not abs(a - b) <= 0.005]
        if spots:
            label = "triggers, two empty masks 1 (published)"
            axes.plot(*zip(*spots, strict=True), "o", mfc="none", color=BLUE, ms=7, label=label)
        axes.set_ylim(0, 1.05)
        _finish(axes, names, "Agreement (IoU)")
        return _told(figure, title, told)


def cover_figure(found: Locality, method: str) -> Picture:
    """How much of a layer's planted change the masks hold, against what random masks hold."""
    title = f"Do {method} masks lie where planting changed the weights?"
    with drawing(WIDTH, 3.9, title=title) as figure:
        axes, names = figure.subplots(), layers(found, method)
        lines: tuple[tuple[str, str, str, Style], ...] = (
            ("one", "share", "one trigger's mask", (BLUE, "o-")),
            ("one", "best", "best mask as large", (PURPLE, "s--")),
            ("one", "random", "random mask as large", (GREY, "x:")),
            ("one", "twins", "one mask, twin - twin", (ORANGE, "v:")),
            ("union", "share", "union of all masks", (GREEN, "^-.")),
            ("union", "random", "random, the union's size", (GREY, "+--")),
        )
        told = [
            _line(
                axes,
                label,
                style,
                [
                    over_memories(
                        getattr(c, value) for c in found.covers if (c.method, c.layer, c.masks) == (method, layer, kind)
                    )
                    for layer in names
                ],
            )
            for kind, value, label, style in lines
        ]
        _finish(axes, names, "Share of the planted change")
        return _told(figure, title, told)


def patch_figure(found: Locality, name: str, kind: str) -> Picture | None:
    """Sufficiency and necessity beside each other, layer by layer, in shares of the gap between the models."""
    title = f"Which {name} carry the memory? 1 is all of the gap between the models"
    names = [layer for layer in found.settings["layers"][kind] if layer in {p.layers for p in found.patches}]
    with drawing(WIDTH, 3.6, title=title) as figure:
        axes, told = figure.subplots(), []
        for direction, label, style in (
            (SUFFICIENT, "sufficient: planted into twin", (BLUE, "o-")),
            (NECESSARY, "necessary: twin into planted", (ORANGE, "s--")),
        ):
            shares = patch_shares(found, direction)
            told.append(_line(axes, label, style, [shares[layer] for layer in names if layer in shares]))
        axes.axhline(0, color=GREY, lw=0.8)
        _finish(axes, names, "Share of the gap", columns=1)
        return _told(figure, title, told) if any(told) else None


def _line(axes: Axes, label: str, style: Style, estimates: Sequence[Estimate]) -> str:
    """One line over layers, unless nothing was measured; returns the figures in words."""
    if not estimates or all(np.isnan(e.value) for e in estimates):
        return ""
    colour, form = style
    values = [e.value for e in estimates]
    axes.errorbar(
        range(1, len(values) + 1), values, bars(estimates), color=colour, fmt=form, ms=4.5, capsize=2, label=label
    )
    return f"{label}: " + " ".join(f"{value:.2f}" for value in values)


def _finish(axes: Axes, names: Sequence[str], label: str, *, columns: int = 2) -> None:
    """Number the layers, say where down, mid and up lie, and put the legend above."""
    axes.set_ylabel(label)
    axes.set_xticks(range(1, len(names) + 1))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(0.5, len(names) + 0.5)
    axes.set_xlabel("Layer, in the network's order")
    low, high = axes.get_ylim()
    axes.set_ylim(low if low < -0.1 * high else 0, high + 0.09 * (high - low))  # room for the words
    places = [name.split("_")[0] for name in names]
    for place in dict.fromkeys(places):
        first, last = places.index(place) + 1, len(places) - places[::-1].index(place)
        if first > 1:
            axes.axvline(first - 0.5, color="#b9c2cc", lw=1)
        axes.annotate(
            place,
            ((first + last) / 2, 0.985),
            xycoords=("data", "axes fraction"),
            fontsize=7.5,
            color=GREY,
            ha="center",
            va="top",
        )
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        half = -(-len(labels) // 2)  # of the labels stand in the first column
        widths = [max(map(len, column), default=0) for column in (labels[:half], labels[half:])]
        legend_above(axes, columns if sum(widths) <= LETTERS else 1)


def _told(figure: Figure, title: str, lines: Sequence[str]) -> Picture:
    return picture(figure, f"{title}, layer by layer. {'; '.join(line for line in lines if line)}.")
