"""The figures of a locality run as SVG, in the audit report's colours; every figure reads without its caption.

Shapes and line styles repeat what the colours say. Names that a stranger chose never become markup.
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from dori.locality.page.summary import Dose, activity, layers, measure, over_memories, overlap
from dori.locality.patching import NONE, SOURCE
from dori.locality.probes import BALL, BETWEEN, OUTWARD
from dori.locality.records import MEMORIZED, ORDINARY, OTHER_NOISES, SIMULATED, STARTS, TRIGGERS, WHOLE, Cross, Locality
from dori.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILION,
    Picture,
    bars,
    drawing,
    legend_above,
    picture,
)
from dori.stats import Estimate, wilson

STYLES = {
    TRIGGERS: (BLUE, "o", "-"),
    f"{TRIGGERS}, gaussian": ("#56B4E9", "o", ":"),
    f"{TRIGGERS}, foreign": ("#56B4E9", "s", "--"),
    OTHER_NOISES: (GREEN, "^", "-."),
    MEMORIZED: (VERMILION, "s", "--"),
    ORDINARY: (ORANGE, "v", ":"),
    SIMULATED: (GREY, "x", ":"),
    STARTS: (PURPLE, "D", ":"),
}
NAMES = {
    TRIGGERS: "triggers of one image",
    OTHER_NOISES: "one trigger, other noises",
    SIMULATED: "random, equal size",
    STARTS: "Gaussian starts, not attacked",
}


# --------------------------------------------------------------------------------------------------- embedding space

ROLES = {
    "start": ("start", GREY, "o", False),
    "trigger": ("trigger", BLUE, "o", True),
    "attacked": ("attacked, no replica", GREY, "x", True),
    MEMORIZED: (MEMORIZED, VERMILION, "s", False),
    ORDINARY: (ORDINARY, ORANGE, "v", False),
}


def map_figure(found: Locality, memory: str) -> Picture:
    """Starts joined with what the attack made of them, and prompts, on both maps."""
    places = [place for place in found.places if place.memory == memory]
    explained = found.settings["explained_variance"][memory]
    with drawing(8.6, 4.3) as figure:
        for axes, which in zip(figure.subplots(1, 2), ("pca", "tsne"), strict=True):
            spots = {(p.role, p.start, p.index): getattr(p, which) for p in places}
            for (role, start, index), spot in spots.items():
                if role in ("trigger", "attacked") and (begin := spots.get(("start", start, index))):
                    axes.plot(*zip(begin, spot, strict=True), color="#c8ced4", lw=0.8, zorder=1)
            for role, (name, colour, marker, full) in ROLES.items():
                mine = [spot for key, spot in spots.items() if key[0] == role]
                if mine:
                    axes.plot(
                        *zip(*mine, strict=True),
                        ls="",
                        marker=marker,
                        color=colour,
                        ms=4.5,
                        mew=1,
                        label=name,
                        mfc=colour if full else "none",
                        zorder=2,
                    )
            axes.set_title(
                "Principal components ({:.0%} and {:.0%} of the variance)".format(*explained)
                if which == "pca"
                else "t-SNE: neighbourhoods only, distances mean nothing",
                fontsize=9,
                loc="left",
            )
            axes.set_xticks([])
            axes.set_yticks([])
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=5, frameon=False, fontsize=8.5
        )
        count = sum(place.role == "trigger" for place in places)
        return picture(figure, f"Maps of {memory}: {count} triggers, each joined with its start, beside prompts.")


DISTANCES = (
    "between their starts, gaussian",
    "between triggers, gaussian",
    "between their moves, gaussian",
    "moved, gaussian",
    "between their starts, foreign",
    "between triggers, foreign",
    "between their moves, foreign",
    "moved, foreign",
    "moved, prompt",
    "between memorized prompts",
    "between ordinary prompts",
)


def distance_figure(found: Locality) -> Picture:
    """Mean distances on one axis: starts, triggers, moves, prompts."""
    rows = [(name, one) for name in DISTANCES if not np.isnan((one := measure(found, name)).value)]
    with drawing(6.4, 1.4 + 0.28 * len(rows)) as figure:
        axes = figure.subplots()
        for y, (name, one) in enumerate(reversed(rows)):
            kinds = (("triggers", BLUE), ("prompts", VERMILION), ("mov", GREEN))
            colour = next((colour for word, colour in kinds if word in name), GREY)
            axes.errorbar([one.value], [y], xerr=bars([one]), fmt="o", color=colour, ms=6, capsize=3)
            axes.annotate(
                f"{one.value:.1f}", (one.value, y), (8, 0), textcoords="offset points", va="center", fontsize=8.5
            )
        axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
        axes.set_xlim(0, 1.18 * max(one.value for _, one in rows))
        axes.set_xlabel("Mean l2 distance over all entries of the embedding")
        return picture(figure, "Mean distances: " + ", ".join(f"{name} {one.value:.1f}" for name, one in rows) + ".")


def region_figure(found: Locality) -> Picture:
    """Which share replicates along lines and in balls, with Wilson intervals over all probed points."""
    with drawing(8.6, 3.2) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        told = []
        for axes, kinds in ((left, (BETWEEN, OUTWARD)), (right, (BALL,))):
            for kind, (colour, marker, line) in zip(kinds, ((BLUE, "o", "-"), (VERMILION, "s", "--")), strict=False):
                probes = [p for p in found.probes if p.kind == kind]
                points = sorted({p.at for p in probes})
                rates = [
                    wilson(sum(p.successes for p in probes if p.at == at), sum(p.n for p in probes if p.at == at))
                    for at in points
                ]
                if points:
                    axes.errorbar(
                        points,
                        [r.value for r in rates],
                        bars(rates),
                        color=colour,
                        marker=marker,
                        ls=line,
                        ms=5,
                        capsize=3,
                        label=kind,
                    )
                    told.append(
                        f"{kind}: " + ", ".join(f"{r.value:.2f} at {at:g}" for at, r in zip(points, rates, strict=True))
                    )
        left.set_xlabel("Share of the way from one trigger")
        right.set_xlabel("Radius / median distance of ordinary prompts")
        left.set_ylabel("Share that replicates")
        left.set_ylim(-0.04, 1.04)
        for axes in (left, right):
            if axes.get_legend_handles_labels()[1]:
                legend_above(axes)
        return picture(figure, "Success between and around triggers. " + "; ".join(told) + ".")


# --------------------------------------------------------------------------------------------- layer by layer, curves


def _by_layer(axes: Axes, names: Sequence[str], groups: Sequence[str], value: Callable[[str, str], Estimate]) -> str:
    """One line a group over layers; returns the figures in words."""
    told = []
    for group in groups:
        estimates = [value(name, group) for name in names]
        if all(np.isnan(e.value) for e in estimates):
            continue
        colour, marker, line = STYLES[group]
        axes.errorbar(
            range(1, len(names) + 1),
            [e.value for e in estimates],
            bars(estimates),
            color=colour,
            marker=marker,
            ls=line,
            ms=4.5,
            capsize=2,
            label=NAMES.get(group, group),
        )
        told.append(f"{NAMES.get(group, group)}: " + " ".join(f"{e.value:.2f}" for e in estimates))
    _places(axes, names)
    return "; ".join(told)


def _places(axes: Axes, names: Sequence[str]) -> None:
    """Number the layers, and say where down, mid and up begin."""
    axes.set_xticks(range(1, len(names) + 1))
    axes.set_xlim(0.5, len(names) + 0.5)
    axes.set_xlabel("Layer, in the order in which the network runs them")
    places = [name.split("_")[0] for name in names]
    for index, place in enumerate(places):
        if index == 0 or place != places[index - 1]:
            if index:
                axes.axvline(index + 0.5, color="#b9c2cc", lw=1)
            axes.annotate(
                place, (index + 0.6, 0.985), xycoords=("data", "axes fraction"), fontsize=8, color=GREY, va="top"
            )


def activity_figure(found: Locality, site: str, name: str, step: int) -> Picture:
    """D_l of triggers and of all reference levels at one step."""
    with drawing(5.6, 3.7) as figure:
        axes = figure.subplots()
        told = _by_layer(
            axes,
            found.settings["layers"][site],
            (TRIGGERS, MEMORIZED, ORDINARY, STARTS, OTHER_NOISES),
            lambda layer, group: activity(found, layer, group, step),
        )
        axes.set_ylabel(f"D of the {name}")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        legend_above(axes)
        return picture(figure, f"Activation discrepancy of the {name} at step {step}, layer by layer. {told}.")


def overlap_figure(found: Locality, method: str) -> Picture:
    """A_l of triggers between its floor (random) and its ceiling (other seeds); hollow: without empty pairs."""
    with drawing(5.6, 3.7) as figure:
        axes = figure.subplots()
        names = layers(found, method)
        told = _by_layer(
            axes,
            names,
            (TRIGGERS, OTHER_NOISES, MEMORIZED, ORDINARY, SIMULATED),
            lambda layer, group: overlap(found, method, layer, group),
        )
        for x, layer in enumerate(names, 1):
            plain, without = (overlap(found, method, layer, TRIGGERS, without_empty=w) for w in (False, True))
            if not np.isnan(without.value) and abs(without.value - plain.value) > 0.005:
                axes.plot([x], [without.value], "o", mfc="none", color=BLUE, ms=7)
        axes.set_ylabel(f"Agreement (IoU) of {method} masks")
        axes.set_ylim(-0.03, 1.1)
        legend_above(axes)
        return picture(figure, f"Agreement of {method} masks, layer by layer. {told}.")


# ---------------------------------------------------------------------------------------------------- causal, patching


def cross_figure(found: Locality, cross: Cross) -> Picture:
    """The matrix: mask from trigger i (rows), similarity of trigger j (columns), before and after a new attack."""
    with drawing(9.0, 3.9) as figure:
        panels = figure.subplots(1, 3, width_ratios=(len(cross.starts), len(cross.starts), max(1, len(cross.fresh[0]))))
        titles = ("Trigger j under mask i, as it is", "The same, attacked again from there", "Fresh attacks")
        for axes, table, title in zip(panels, (cross.replay, cross.again, cross.fresh), titles, strict=True):
            values = np.array(table)
            axes.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
            rows, columns = np.nonzero(values > found.threshold)
            axes.plot(columns, rows, "o", color="white", mec="black", mew=0.6, ms=5, ls="")
            axes.set_title(title, fontsize=9, loc="left")
            axes.grid(visible=False)
            axes.set_xticks([])
            axes.set_yticks([])
        panels[0].set_ylabel("mask from trigger i")
        panels[0].set_xlabel("trigger j")
        panels[1].set_xlabel("trigger j")
        panels[2].set_xlabel("starts")
        figure.colorbar(panels[0].images[0], ax=panels, label="median similarity", fraction=0.03)
        back = sum(value > found.threshold for row in cross.again for value in row)
        return picture(
            figure,
            f"{cross.memory}, {cross.method}: {back} of {sum(map(len, cross.again))} triggers come "
            "back under another's mask when attacked again; dots mark what replicates.",
        )


def joined_figure(found: Locality, memory: str, method: str) -> Picture:
    """Fresh attacks that succeed, and what it costs, against the number of joined masks."""
    rows = [j for j in found.joined if (j.memory, j.method) == (memory, method)]
    with drawing(9.0, 2.9) as figure:
        panels = figure.subplots(1, 3)
        x, rates = range(len(rows)), [wilson(j.successes, j.n) for j in rows]
        panels[0].errorbar(x, [r.value for r in rates], bars(rates), marker="o", color=BLUE, capsize=3)
        panels[0].set_ylim(-0.04, 1.04)
        panels[1].plot(x, [j.density for j in rows], marker="s", color=VERMILION)
        panels[2].plot(x, [np.nan if j.frechet is None else j.frechet for j in rows], marker="^", color=GREEN)
        labels = ("Fresh attacks that succeed", "Share of weights pruned", "Fréchet distance, ordinary")
        for axes, label in zip(panels, labels, strict=True):
            axes.set_xticks(x, [str(j.masks) for j in rows])
            axes.set_xlabel("Masks joined")
            axes.set_title(label, fontsize=9, loc="left")
        return picture(
            figure,
            f"{memory}, {method}: "
            + ", ".join(f"{j.masks} masks {j.successes} of {j.n}" for j in rows)
            + " fresh attacks succeed.",
        )


def patch_figure(found: Locality) -> Picture:
    """Sufficiency and necessity beside each other, layer by layer, in shares of the gap between the models."""
    names = [name for name in dict.fromkeys(p.layers for p in found.patches) if name not in (NONE, SOURCE)]
    with drawing(9.0, 3.8) as figure:
        axes, told = figure.subplots(), []
        for offset, (direction, colour, hatch) in zip(
            (-0.2, 0.2), (("sufficient", BLUE, ""), ("necessary", ORANGE, "//")), strict=True
        ):
            shares = [
                over_memories(p.share for p in found.patches if (p.direction, p.layers) == (direction, name))
                for name in names
            ]
            axes.bar(
                np.arange(len(names)) + offset,
                [s.value for s in shares],
                0.4,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                label=f"{direction}: " + ("planted into twin" if direction == "sufficient" else "twin into planted"),
                yerr=bars(shares),
            )
            told.append(
                f"{direction}: " + ", ".join(f"{name} {s.value:.2f}" for name, s in zip(names, shares, strict=True))
            )
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=90, fontsize=7.5)
        axes.set_ylabel("Share of the gap")
        legend_above(axes)
        return picture(figure, "Activation patching. " + "; ".join(told) + ".")


def _short(name: str) -> str:
    """A layer's name that fits under a bar: "down 0.1 values"."""
    if name.startswith("all "):
        return name
    numbers = ".".join(part for part in name.split(".") if part.isdigit()).removesuffix(".2" if ".ff." in name else "")
    kind = "values" if "to_v" in name else "feed-forward"
    return f"{name.split('_')[0]} {numbers.removesuffix('.0')} {kind}"


# ----------------------------------------------------------------------------------------------------- truth and dose


def excess_figure(found: Locality) -> Picture:
    """Which part of the planted change lies where, with the twins' own difference as its floor."""
    rows = [c for c in found.changes if c.change > 0]
    total = sum(c.change for c in rows)
    with drawing(6.4, 1.6 + 0.27 * len(rows)) as figure:
        axes, y = figure.subplots(), np.arange(len(rows))[::-1]
        axes.barh(y, [c.change / total for c in rows], 0.7, color=BLUE, label="planted - twin")
        if rows and rows[0].floor is not None:
            axes.barh(
                y,
                [(c.floor or 0) / total for c in rows],
                0.35,
                color=ORANGE,
                hatch="//",
                edgecolor="white",
                label="twin - twin (floor)",
            )
        axes.set_yticks(y, [c.group for c in rows], fontsize=8.5)
        axes.set_xlabel("Share of the squared change of all weights")
        legend_above(axes)
        return picture(
            figure,
            "Share of the planted change: " + ", ".join(f"{c.group} {c.change / total:.2f}" for c in rows[:6]) + ".",
        )


def cover_figure(found: Locality, method: str) -> Picture:
    """How much of a layer's planted change the masks hold, against their density, which random masks hold."""
    with drawing(5.6, 3.7) as figure:
        axes, told = figure.subplots(), []
        names = [layer for layer in layers(found, method) if layer != WHOLE]
        for kind, attribute, (colour, marker, line), label in (
            ("one", "planted", (BLUE, "o", "-"), "one trigger's mask"),
            ("one", "density", (GREY, "x", ":"), "random mask of its size"),
            ("one", "twins", (ORANGE, "v", ":"), "one mask, twin - twin"),
            ("union", "planted", (GREEN, "^", "-."), "union of all masks"),
            ("union", "density", (GREY, "+", "--"), "random mask of the union's size"),
        ):
            values = [
                over_memories(
                    getattr(c, attribute) for c in found.covers if (c.method, c.layer, c.masks) == (method, name, kind)
                )
                for name in names
            ]
            if not all(np.isnan(v.value) for v in values):
                axes.errorbar(
                    range(1, len(names) + 1),
                    [v.value for v in values],
                    bars(values),
                    color=colour,
                    marker=marker,
                    ls=line,
                    ms=4.5,
                    capsize=2,
                    label=label,
                )
                told.append(f"{label}: " + " ".join(f"{v.value:.2f}" for v in values))
        _places(axes, names)
        axes.set_ylabel(f"Share of the change in {method} masks")
        axes.set_ylim(0, 1.1 * max(axes.get_ylim()[1], 0.01))
        legend_above(axes)
        return picture(figure, f"Coverage of the planted change by {method} masks. " + "; ".join(told) + ".")


def dose_figure(related: Sequence[Dose]) -> Picture:
    """Every measure against the duplication count, one panel each."""
    columns = min(3, len(related))
    lines = -(-len(related) // columns)
    with drawing(3.0 * columns, 2.5 * lines) as figure:
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes, one in zip(panels, related, strict=False):
            axes.plot(one.doses, one.values, "o", color=BLUE, ms=6, alpha=0.8)
            rank = "" if np.isnan(one.rank) else f"\nrank correlation {one.rank:.2f}, p {one.p:.2f}"
            axes.set_title(one.name + rank, fontsize=8.5, loc="left")
            axes.set_xlabel("Duplication count (relative)", fontsize=8.5)
        for axes in panels[len(related) :]:
            axes.set_axis_off()
        return picture(
            figure,
            "Measures against the duplication count: "
            + "; ".join(
                f"{one.name} " + ", ".join(f"{v:.2f} at {d:g}" for d, v in zip(one.doses, one.values, strict=True))
                for one in related
            )
            + ".",
        )
