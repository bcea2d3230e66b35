"""The report's figures: attack curves, dose and response."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dori.errors import DoriError
from dori.findings import Audit
from dori.report.curves import SEEN_ONCE, Curve, DosePoint, curves, judges_last, of_all
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
    png,
)
from dori.report.tables import CONTROLS, MEMORIES, STARTS, Way, called_edit, number
from dori.stats import Estimate

STYLES = ((BLUE, "o", "-"), (VERMILION, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":"), (ORANGE, "v", "--"))
LABEL = 26


def rate_figure(shown: Sequence[Curve]) -> Picture:
    """MR against attack steps with Wilson bands, one line a population."""
    with drawing() as figure:
        axes = _axes(figure, "Attack steps", "MR")
        _draw_rates(axes, shown)
        legend_above(axes)
        told = "; ".join(
            f"{curve.label}: "
            + ", ".join(f"{number(row.replication.rate.value)} at {row.way.steps}" for row in curve.rows)
            for curve in shown
        )
        return picture(figure, f"Memorization rate against attack steps. {told}.")


def _draw_rates(axes: Axes, drawn: Sequence[Curve]) -> None:
    for curve in drawn:
        colour, marker, line = style(curve)
        estimates = [row.replication.rate for row in curve.rows]
        steps = [row.way.steps for row in curve.rows]
        axes.plot(steps, [e.value for e in estimates], line, marker=marker, color=colour, ms=5, label=_label(curve))
        axes.fill_between(
            steps, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.12, lw=0
        )
    axes.set_ylim(-0.03, 1.03)


def overview(audit: Audit) -> bytes:
    """A PNG for a README or a slide: MR against steps of the attack from the prompt, a panel an attacked joint edit.

    Memories beside controls, and beside the memories on the twins where the model is unedited; Wilson bands.

    Raises:
        DoriError: nothing was attacked from the prompt at two numbers of steps, or there is no threshold.
    """
    shown: dict[str, list[Curve]] = {}
    for curve in curves(audit):
        if curve.start == "prompt" and curve.edit_scope != "own" and curve.population in (MEMORIES, CONTROLS):
            shown.setdefault(curve.edit, []).append(curve)
    if not shown:
        raise DoriError("no attack from a prompt has a curve in this audit, so there is nothing to draw")
    with drawing(3.4 * len(shown), 3.4) as figure:
        for axes, (edit, mine) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            _draw_rates(axes, sorted(mine, key=judges_last))
            axes.set(xlabel="Attack steps", ylabel="MR")
            axes.set_title(called_edit(edit, "joint"), fontsize=10, fontweight="bold", loc="left")
        named = {
            label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
        return png(figure)


def similarity_figure(shown: Sequence[Curve], threshold: float) -> Picture:
    """Median similarity +- median absolute deviation against attack steps, with the threshold."""
    with drawing() as figure:
        axes = _axes(figure, "Attack steps", "Median similarity")
        for curve in shown:
            colour, marker, line = style(curve)
            steps = [row.way.steps for row in curve.rows]
            middle, width = zip(*((r.similarity.median, r.similarity.deviation) for r in curve.rows), strict=True)
            axes.plot(steps, middle, line, marker=marker, color=colour, label=_label(curve), ms=5)
            axes.fill_between(
                steps,
                [m - w for m, w in zip(middle, width, strict=True)],
                [m + w for m, w in zip(middle, width, strict=True)],
                color=colour,
                alpha=0.12,
                lw=0,
            )
        _threshold(axes, threshold)
        legend_above(axes)
        told = "; ".join(
            f"{curve.label}: " + ", ".join(f"{number(row.similarity.median)} at {row.way.steps}" for row in curve.rows)
            for curve in shown
        )
        return picture(figure, f"Median similarity against attack steps; threshold {number(threshold)}. {told}.")


def dose_rate_figure(points: Sequence[DosePoint]) -> Picture:
    """MR with Wilson intervals against the duplication count, one line a way of asking."""
    return _dose(points, "MR", lambda p: p.rate, None)


def dose_similarity_figure(points: Sequence[DosePoint], threshold: float) -> Picture:
    """Median similarity +- median absolute deviation against the duplication count."""
    return _dose(
        points,
        "Median similarity",
        lambda p: Estimate(p.similarity, p.similarity - p.deviation, p.similarity + p.deviation, p.rate.n),
        threshold,
    )


def _axes(figure: Figure, x: str, y: str) -> Axes:
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def style(curve: Curve) -> tuple[str, str, str]:
    """Colour, marker and line of a population: memories, controls and twins look the same in every figure."""
    if curve.twin:
        return PURPLE, "D", ":"
    if curve.population == CONTROLS:
        return VERMILION, "s", "--"
    return {"templates": (GREEN, "^", "-."), "once": (ORANGE, "v", "-.")}.get(curve.population, (BLUE, "o", "-"))


def _dose(
    points: Sequence[DosePoint], label: str, value: Callable[[DosePoint], Estimate], threshold: float | None
) -> Picture:
    doses = sorted({point.dose for point in points})
    ways: list[Way] = list(dict.fromkeys(point.way for point in points))
    told = []
    with drawing() as figure:
        axes = _axes(figure, "Duplication count (dose)", label)
        for index, way in enumerate(ways):
            colour, marker, line = STYLES[index % len(STYLES)]
            mine = [point for point in points if point.way == way]
            # Doses are spread evenly, since counts may span decades; ways stand side by side, not on one another.
            x = [doses.index(point.dose) + 0.09 * (index - (len(ways) - 1) / 2) for point in mine]
            estimates = [value(point) for point in mine]
            axes.errorbar(
                x,
                [e.value for e in estimates],
                bars(estimates),
                fmt=marker,
                ls=line,
                color=colour,
                ms=5,
                capsize=2.5,
                elinewidth=1,
                label=short(way),
            )
            told.append(
                f"{way.asked}: "
                + ", ".join(f"{number(e.value)} {_at_dose(p.dose)}" for e, p in zip(estimates, mine, strict=True))
            )
        axes.set_xticks(range(len(doses)), ["once" if dose == SEEN_ONCE else f"{dose:g}" for dose in doses])
        axes.set_xlim(-0.5, len(doses) - 0.5)
        if threshold is None:
            axes.set_ylim(-0.03, 1.03)
        else:
            _threshold(axes, threshold)
        legend_above(axes)
        return picture(figure, f"{label} against duplication count. {'; '.join(told)}.")


def _at_dose(dose: float) -> str:
    return "where seen once" if dose == SEEN_ONCE else f"at dose {dose:g}"


def short(way: Way) -> str:
    """A way of asking, short enough for a legend."""
    if not way.start:
        return "own prompt"
    start = STARTS.get(way.start, way.start).removeprefix("its ").removeprefix("a ")
    return f"DoRI from {start}"


def _threshold(axes: Axes, threshold: float) -> None:
    axes.axhline(threshold, color=GREY, lw=1, ls=(0, (4, 3)))
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0), max(high, 1))
    axes.annotate(
        "threshold",
        (1, threshold),
        (-2, 2),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=GREY,
        fontsize=8.5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
    )


def _label(curve: Curve) -> str:
    """The population; where only some of its images were attacked further, how many."""
    whole, last = of_all(curve).rows[-1], curve.rows[-1]
    name = curve.label if len(curve.label) <= LABEL else curve.label[: LABEL - 1] + "…"
    if whole is last:
        return name
    return f"{name} ({last.replication.memories} of {whole.replication.memories} beyond {whole.way.steps})"
