"""Figures layer by layer: activation discrepancy, agreement of masks, what they hold of the change, patching."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from dori.locality.page.intervened import patch_shares
from dori.locality.page.layer_ids import numbered
from dori.locality.page.summary import NOTHING, activity, layers, over_memories, overlap
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
from dori.report.tables import number
from dori.stats import Estimate

LETTERS = 46  # of the longest labels of a legend's two columns, which fit beside each other
Style = tuple[str, str]  # colour; marker and line
STYLES: dict[str, tuple[str, Style]] = {
    TRIGGERS: ("triggers of one image", (BLUE, "o-")),
    OTHER_NOISES: ("one trigger reseeded", (GREEN, "^-.")),
    OTHER_IMAGES: ("triggers, other images", (SKY, "D:")),
    MEMORIZED: (MEMORIZED, (VERMILION, "s--")),
    ORDINARY: (ORDINARY, (ORANGE, "v:")),
    STARTS: ("bare Gaussian starts", (PURPLE, "P:")),
    RANDOM: ("random, closed form", (GREY, "--")),
    SIMULATED: ("random, simulated", (GREY, "x")),
}


def activity_figure(found: Locality, site: str, name: str, step: int) -> Picture:
    """D_l of triggers and of all reference levels at one step.

    Feed-forwards differ by two orders of magnitude, so that their axis is logarithmic. Value projections see no noise:
    of one trigger under several noises there is nothing to draw.
    """
    title = f"How differently do the {name} answer? D at step {step}"
    blind = site == "attention_value"
    with drawing(WIDTH, 3.8 if blind else 4.3, title=title) as figure:
        axes, names = figure.subplots(), numbered(found, found.settings["layers"][site])
        if not blind:
            _logarithmic(axes)
        told = [
            _line(axes, *STYLES[group], names, [activity(found, layer, group, step) for layer in names.values()])
            for group in (TRIGGERS, OTHER_IMAGES, MEMORIZED, ORDINARY, STARTS, OTHER_NOISES)
            if not (blind and group == OTHER_NOISES)
        ]
        _finish(axes, names, f"D, mean pairwise l2 distance{'' if blind else ' (log)'}")
        return _told(figure, title, told)


def overlap_figure(found: Locality, method: str) -> Picture:
    """A_l of triggers between random masks and other seeds, pairs of two empty masks left out; hollow: as published."""
    title = f"Do {method} masks agree? Mean IoU, 1 is the same mask"
    with drawing(WIDTH, 4.1, title=title) as figure:
        axes, names = figure.subplots(), numbered(found, layers(found, method))

        def level(group: str, *, without_empty: bool = True) -> list[Estimate]:
            return [overlap(found, method, layer, group, without_empty=without_empty) for layer in names.values()]

        told = [
            _line(axes, *STYLES[group], names, level(group))
            for group in (TRIGGERS, OTHER_NOISES, OTHER_IMAGES, MEMORIZED, ORDINARY, RANDOM, SIMULATED)
        ]
        both = zip(names, level(TRIGGERS, without_empty=False), level(TRIGGERS), strict=True)
        spots = [(x, plain.value) for x, plain, without in both if not abs(plain.value - without.value) <= 0.005]
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
        axes, names = figure.subplots(), numbered(found, layers(found, method))
        lines: tuple[tuple[str, str, str, Style], ...] = (
            ("one", "share", "one trigger's mask", (BLUE, "o-")),
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
                names,
                [
                    over_memories(
                        getattr(c, value) for c in found.covers if (c.method, c.layer, c.masks) == (method, layer, kind)
                    )
                    for layer in names.values()
                ],
            )
            for kind, value, label, style in lines
        ]
        _finish(axes, names, "Share of the planted change")
        return _told(figure, title, told)


def patch_figure(found: Locality, name: str, kind: str) -> Picture | None:
    """Sufficiency and necessity beside each other, layer by layer, in shares of the gap between the models."""
    title = f"Which {name} carry the memory? 1 is all of the gap between the models"
    patched = {p.layers for p in found.patches}
    names = numbered(found, [layer for layer in found.settings["layers"][kind] if layer in patched])
    with drawing(WIDTH, 3.6, title=title) as figure:
        axes, told = figure.subplots(), []
        for direction, label, style in (
            (SUFFICIENT, "sufficient: planted into twin", (BLUE, "o-")),
            (NECESSARY, "necessary: twin into planted", (ORANGE, "s--")),
        ):
            shares = patch_shares(found.patches, direction)
            told.append(_line(axes, label, style, names, [shares.get(layer, NOTHING) for layer in names.values()]))
        axes.axhline(0, color=GREY, lw=0.8)
        _finish(axes, names, "Share of the gap", columns=1)
        return _told(figure, title, told) if any(told) else None


def _line(axes: Axes, label: str, style: Style, places: Iterable[int], estimates: Sequence[Estimate]) -> str:
    """One line over layers, unless nothing was measured; returns the figures in words."""
    if not estimates or all(np.isnan(e.value) for e in estimates):
        return ""
    colour, form = style
    values = [e.value for e in estimates]
    axes.errorbar([*places], values, bars(estimates), color=colour, fmt=form, ms=4.5, capsize=2, label=label)
    return f"{label}: " + " ".join(number(value) for value in values)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _finish(axes: Axes, names: Mapping[int, str], label: str, *, columns: int = 2) -> None:
    """Write the layers' IDs, say where down, mid and up lie, and put the legend above."""
    axes.set_ylabel(label)
    axes.set_xticks([*names])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(min(names, default=1) - 0.5, max(names, default=1) + 0.5)
    axes.set_xlabel("Layer ID, in the network's order")
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(low, high * (high / low) ** 0.09)  # room for the words
    else:
        axes.set_ylim(low if low < -0.1 * high else 0, high + 0.09 * (high - low))
    places: dict[str, list[int]] = {}
    for one, name in names.items():
        places.setdefault(name.split("_")[0], []).append(one)
    for place, numbers in places.items():
        first, last = min(numbers), max(numbers)
        if first > min(names):
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
