"""Figures of interventions and of the ground truth: masks against triggers, joined masks, patching, change, dose."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dori.locality.page.exchanged import change_shares, kept_between
from dori.locality.page.intervened import patch_likeness, patch_shares
from dori.locality.page.layer_ids import module
from dori.locality.page.pruned import beside, of_masks, prices, scored
from dori.locality.page.summary import NOTHING, Dose, excess_shares
from dori.locality.page.taken_back import taken_back
from dori.locality.patching import NECESSARY, SUFFICIENT, TOGETHER
from dori.locality.records import NO_MASK, OTHER_MASKS, PLANTED, RANDOM, TRIGGERS, Cross, Joined, Locality, Undone
from dori.locality.undone import AT_RANDOM, MOST_CHANGED
from dori.report.drawing import BLUE, GREEN, GREY, ORANGE, WIDTH, Picture, bars, drawing, legend_above, picture
from dori.stats import wilson

ROWS = {
    TRIGGERS: "mask of\ntrigger i",
    OTHER_MASKS: "other\nimage's",
    RANDOM: "random\nmasks",
    PLANTED: "planted change",
    NO_MASK: "no mask",
}
BELOW = (OTHER_MASKS, RANDOM, PLANTED, NO_MASK)  # in a matrix, of the masks of the memory's own triggers
LARGEST = 16  # groups of a figure
SPREAD = 0.3  # of the gap between two doses, over which memories of one dose are drawn
LETTERS = {"prompt": "P", "gaussian": "G", "foreign": "F"}


def cross_figures(found: Locality, cross: Cross) -> list[Picture]:
    """The matrix "mask from trigger i, replication by j": attacked again with fresh attacks beside, and as it is.

    Random masks and the whole model stand below. Rows of empty masks are blank, and of what fails without a mask no dot
    or missing dot says anything.
    """
    blocks = [cross, *(one for kind in BELOW if (one := beside(found, cross, kind)) is not None)]
    few, name = len(cross.fresh[0]), f"{cross.memory}, {cross.method}"
    again = _stacked(
        [[(*a, np.nan, *f[:few]) for a, f in zip(_full(c, c.again), _full(c, c.fresh), strict=True)] for c in blocks]
    )
    replay = _stacked([_full(c, c.replay) for c in blocks])
    return [
        _matrix(
            found,
            cross,
            blocks,
            again,
            title=f"{name}: pruned for trigger i, attacked again from j",
            told=f"{_back(found, cross, 'again')} when attacked again",
        ),
        _matrix(
            found,
            cross,
            blocks,
            replay,
            title=f"{name}: pruned for trigger i, trigger j as it is",
            told=_back(found, cross, "replay"),
        ),
    ]


def _full(cross: Cross, table: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """The rows, those of empty masks blank."""
    blank = cross.masks != NO_MASK
    return [[np.nan] * len(row) if blank and not size else row for row, size in zip(table, cross.sizes, strict=True)]


def _back(found: Locality, cross: Cross, name: str) -> str:
    rows = [row for row, size in zip(scored(found, cross, name), cross.sizes, strict=True) if size]
    cells = [value for row in rows for value in row.values()]
    return f"{sum(cells)} of {len(cells)} that come back without a mask do so under a trigger's mask"


def _stacked(blocks: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    """Blocks of rows under one another, an empty row between."""
    rows: list[Sequence[float]] = []
    for block in blocks:
        rows += [[np.nan] * len(block[0])] * bool(rows) + list(block)
    return np.array(rows, float)


def _matrix(
    found: Locality, cross: Cross, blocks: Sequence[Cross], values: np.ndarray, *, title: str, told: str
) -> Picture:
    count, wide = len(cross.starts), values.shape[1] > len(cross.starts)
    with drawing(WIDTH, 4.2, title=title) as figure:
        axes = figure.subplots()
        image = axes.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
        rows, columns = np.nonzero(values > found.threshold)  # never in the gaps, which are NaN
        size = 5.0 if len(values) < 30 else 3.0
        axes.plot(columns, rows, "o", color="white", mec="black", mew=0.6, ms=size)
        ticks, names = [], []
        first = 0
        for block in blocks:
            ticks.append(first + (len(block.sizes) - 1) / 2)
            names.append(ROWS[block.masks])
            first += len(block.sizes) + 1
        axes.set_yticks(ticks, names, fontsize=8.5)
        fresh = range(count + 1, values.shape[1]) if wide else range(0)
        letters = [LETTERS[start] for start in cross.starts] + ["*"] * len(fresh)
        axes.set_xticks([*range(count), *fresh], letters, fontsize=7.5)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.set_xlabel("trigger j (P own prompt, G Gaussian, F other prompt)" + ("\n* fresh attack" if wide else ""))
        figure.colorbar(image, ax=axes, label="median similarity; dot: replicates", fraction=0.05)
        return picture(figure, f"{title}. {told + '; ' if told else ''}dots mark what replicates.")


def joined_figures(found: Locality, cross: Cross) -> list[Picture]:
    """Fresh attacks that succeed against the number of joined masks, and what the unions cost."""
    bare = of_masks(found.joined, cross, NO_MASK)
    rows = {masks: bare + of_masks(found.joined, cross, masks) for masks in (TRIGGERS, RANDOM, PLANTED)}
    if len(rows[TRIGGERS]) == len(bare) or not any(cross.sizes):
        return []
    name = f"{cross.memory}, {cross.method}"
    return [
        _successes(rows, bare, f"{name}: how many triggers' masks stop fresh attacks?"),
        *_prices(found, cross, name),
    ]


def _successes(rows: dict[str, list[Joined]], bare: list[Joined], title: str) -> Picture:
    places = {j.joined: place for place, j in enumerate(rows[TRIGGERS])}  # an empty union has no control
    with drawing(WIDTH, 3.3, title=title) as figure:
        axes, told = figure.subplots(), []
        for offset, masks, label, colour, style in (
            (-0.06, TRIGGERS, "masks of triggers", BLUE, "o-"),
            (0.06, RANDOM, "random masks as large", GREY, "x:"),
            (0.12, PLANTED, "weights that planting changed most", ORANGE, "s--"),
        ):
            if len(rows[masks]) == len(bare):
                continue
            rates = [wilson(j.successes, j.n) for j in rows[masks]]
            x = np.array([places[j.joined] for j in rows[masks]]) + offset
            axes.errorbar(x, [r.value for r in rates], bars(rates), fmt=style, color=colour, capsize=3, label=label)
            told.append(f"{label}: " + ", ".join(f"{j.joined} joined {j.successes} of {j.n}" for j in rows[masks]))
        _numbered(axes, rows[TRIGGERS])
        axes.set_ylabel("Fresh attacks that succeed")
        axes.set_ylim(-0.04, 1.04)
        legend_above(axes)
        return picture(figure, f"{title} {'; '.join(told)}.")


def _prices(found: Locality, cross: Cross, name: str) -> list[Picture]:
    title = f"{name}: what do joined masks cost on ordinary prompts?"
    bare = prices(found, cross, NO_MASK, single=True)
    rows = {masks: bare + prices(found, cross, masks, single=False) for masks in (TRIGGERS, RANDOM, PLANTED)}
    if len(rows[TRIGGERS]) == len(bare):
        return []
    places = {p.joined: place for place, p in enumerate(rows[TRIGGERS])}
    with drawing(WIDTH, 3.3, title=title) as figure:
        axes, told = figure.subplots(), []
        for masks, label, colour, style in (
            (TRIGGERS, "masks of triggers", GREEN, "^-"),
            (RANDOM, "random masks as large", GREY, "x:"),
            (PLANTED, "weights that planting changed most", ORANGE, "s--"),
        ):
            if len(rows[masks]) == len(bare):
                continue
            values = [math.nan if p.kernel is None else p.kernel for p in rows[masks]]
            axes.plot([places[p.joined] for p in rows[masks]], values, style, color=colour, label=label)
            pairs = zip(rows[masks], values, strict=True)
            told.append(f"{label}: " + ", ".join(f"{p.joined} joined {value:.3g}" for p, value in pairs))
        axes.set_xticks(range(len(rows[TRIGGERS])), [str(p.joined) for p in rows[TRIGGERS]], fontsize=8.5)
        axes.set_xlabel("Masks joined")
        axes.set_ylabel("Kernel distance")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.0), high)  # from 0 on, so that a small price looks small
        legend_above(axes)
        return [picture(figure, f"{title} {'; '.join(told)}.")]


def undone_figure(found: Locality, memory: str) -> Picture | None:
    """What succeeds when weights have a twin's values, by their number and by how much of the difference they hold.

    At random as many weights hold far less of it than the most changed, so that the two ways to read a choice may
    disagree: both are drawn.
    """
    lines = [(chosen, taken_back(found, memory, chosen)) for chosen in (MOST_CHANGED, AT_RANDOM)]
    if not lines[0][1]:
        return None
    title = f"{memory}: how much of a twin's weights stops the attacks?"
    shares = sorted({row.share for _, rows in lines for row in rows})
    with drawing(WIDTH, 5.6, title=title) as figure:
        by_number, by_change = figure.subplots(2)
        told = []
        for (chosen, rows), colour, offset in zip(lines, (ORANGE, GREY), (-0.05, 0.05), strict=True):
            _kept(by_number, [shares.index(row.share) + offset for row in rows], rows, colour, chosen)
            _kept(by_change, [row.held for row in rows], rows, colour, chosen)
            told.append(
                f"{chosen}: "
                + ", ".join(f"{row.share:.0%} (holds {row.held:.2f}) {row.successes} of {row.n}" for row in rows)
            )
        by_number.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
        by_number.set_xlabel("Share of all weights that have the twin's values")
        by_change.set_xlim(-0.03, 1.03)
        by_change.set_xlabel("Share of the squared difference from the twin\nthat they take back")
        legend_above(by_number)
        return picture(figure, f"{title} New attacks that succeed, {'; '.join(told)}.")


def _kept(axes: Axes, places: Sequence[float], rows: Sequence[Undone], colour: str, chosen: str) -> None:
    """New attacks and triggers as they are that succeed, at these places."""
    fresh = [wilson(row.successes, row.n) for row in rows]
    values = [rate.value for rate in fresh]
    ends = bars(fresh) if fresh else None
    axes.errorbar(places, values, ends, fmt="o-", color=colour, capsize=3, label=f"{chosen}: new attacks")
    kept = [row.replayed / row.triggers if row.triggers else math.nan for row in rows]
    axes.plot(places, kept, "^:", color=colour, label=f"{chosen}: triggers as they are")
    axes.set_ylabel("Share that succeeds")
    axes.set_ylim(-0.04, 1.04)


def _numbered(axes: Axes, rows: Sequence[Joined]) -> None:
    axes.set_xticks(range(len(rows)), [f"{j.joined}\n{j.density:.0%}" for j in rows], fontsize=8.5)
    axes.set_xlabel("Masks joined, and share of the layers' weights")


def patch_kinds_figure(found: Locality) -> Picture | None:
    """Kinds of layers patched together, sufficiency and necessity beside each other, and whose images they draw."""
    title = "Which kinds of layers carry the memory together?"
    both = {direction: patch_shares(found.patches, direction) for direction in (SUFFICIENT, NECESSARY)}
    names = [name for name in dict.fromkeys([*both[SUFFICIENT], *both[NECESSARY]]) if name.startswith(TOGETHER)]
    if not names:
        return None
    with drawing(WIDTH, 3.8, title=title) as figure:
        axes, told = figure.subplots(), []
        for offset, direction, label, colour, hatch in (
            (-0.2, SUFFICIENT, "sufficient: planted into twin", BLUE, ""),
            (0.2, NECESSARY, "necessary: twin into planted", ORANGE, "//"),
        ):
            shares = [both[direction].get(name, NOTHING) for name in names]
            alike = [patch_likeness(found.patches, direction, name).value for name in names]
            x, heights = np.arange(len(names)) + offset, [s.value for s in shares]
            axes.bar(x, heights, 0.4, color=colour, hatch=hatch, edgecolor="white", yerr=bars(shares), label=label)
            axes.plot(x, alike, "D", color="white", mec=colour, mew=1.6, ms=6)
            told.append(
                f"{label}: "
                + ", ".join(
                    f"{name} {share.value:.2f}, alike by {like:.2f}"
                    for name, share, like in zip(names, shares, alike, strict=True)
                )
            )
        axes.plot([], [], "D", color="white", mec=GREY, mew=1.6, ms=6, label="likeness to the other model's own images")
        axes.axhline(0, color=GREY, lw=0.8)
        axes.axhline(1, color=GREY, lw=0.8, ls=":")
        short = [name.removeprefix(TOGETHER).replace(" ", "\n").replace("-", "-\n") for name in names]
        axes.set_xticks(range(len(names)), short, fontsize=8)
        axes.set_xlabel("All layers of a kind")
        axes.set_ylabel("Share of the gap, or likeness")
        legend_above(axes, 1)
        return picture(figure, f"{title} {'; '.join(told)}.")


def transplant_figure(found: Locality) -> Picture | None:
    """What kinds of weights take and bring when they change models, beside their share of the planted change."""
    taken, brought = (patch_shares(found.transplants, direction) for direction in (NECESSARY, SUFFICIENT))
    if not taken or not brought:
        return None
    change = change_shares(found)
    parts = [name for name in change if name in taken] or [name for name in taken if not name.startswith(TOGETHER)]
    rows = [*parts, *(name for name in taken if name.startswith(TOGETHER))]
    title = "Weights of one kind change models: with which is the memory lost, with which brought?"
    with drawing(WIDTH, 1.7 + 0.27 * len(rows), title=title) as figure:
        axes, y, told = figure.subplots(), np.arange(len(rows))[::-1], []
        shares = [change.get(name, math.nan) for name in rows]
        axes.barh(y, shares, 0.7, color=GREY, alpha=0.35, label="share of the change")
        between = [1 - kept_between(found, name).value for name in rows]
        axes.plot(between, y, "x", color=GREY, ms=7, mew=1.6, label="any image lost (control)")
        for offset, shown, label, style, colour in (
            (0.15, taken, "memory lost with the twin's", "s", ORANGE),
            (-0.15, brought, "brought into the twin", "o", BLUE),
        ):
            estimates = [shown.get(name, NOTHING) for name in rows]
            values = [estimate.value for estimate in estimates]
            axes.errorbar(
                values, y + offset, xerr=bars(estimates), color=colour, fmt=style, ms=5, capsize=2, label=label
            )
            told.append(f"{label}: " + ", ".join(f"{n} {v:.2f}" for n, v in zip(rows, values, strict=True)))
        for at in (0, 1):
            axes.axvline(at, color=GREY, lw=0.8, ls=":" if at else "-")
        axes.axhline(len(rows) - len(parts) - 0.5, color=GREY, lw=0.6)
        axes.set_yticks(y, rows, fontsize=8)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("Share of the gap between the models, or of the change")
        legend_above(axes, 1)
        return picture(figure, f"{title}. {'; '.join(told)}.")


def excess_figure(found: Locality, level: str) -> Picture | None:
    """Which share of the planted excess lies in which kind or layer of weights, beside its share of all weights."""
    every = {c.group: c for c in found.changes if c.level == level}
    weights, shares = sum(c.weights for c in every.values()), excess_shares(found, level)
    if not shares:
        return None
    rows = [*shares][:LARGEST]
    held = [every[group].weights / weights for group in rows]
    title = f"Where did planting change the weights? By {level}{' (the largest)' if len(rows) < len(every) else ''}"
    with drawing(WIDTH, 1.4 + 0.24 * len(rows), title=title) as figure:
        axes, y = figure.subplots(), np.arange(len(rows))[::-1]
        label = "share of the change" if every[rows[0]].floor is None else "share of the excess"
        axes.barh(y, [shares[group] for group in rows], 0.7, color=BLUE, label=label)
        axes.plot(held, y, "|", color=ORANGE, ms=11, mew=2.5, label="share of all weights")
        names = [module(found, group) for group in rows]  # those of a kind are in no block and keep theirs
        axes.set_yticks(y, [name.replace("attentions", "att") for name in names], fontsize=8)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("Share")
        legend_above(axes, 1)
        both = zip(names, rows, held, strict=True)
        told = [f"{name} {shares[group]:.2f} (weights {share:.2f})" for name, group, share in both]
        return picture(figure, f"{title}. Shares: {', '.join(told[:6])}.")


def dose_figure(one: Dose) -> Picture:
    """A measure against the duplication count."""
    title = f"Dose: {one.name}"
    with drawing(WIDTH, 2.7, title=title) as figure:
        axes = figure.subplots()
        axes.plot(_side_by_side(one.doses), one.values, "o", color=BLUE, ms=6, alpha=0.8)
        axes.set_title(f"rank correlation {one.rank:+.2f}, p {one.p:.2f}", fontsize=8.5, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("Duplication count, relative (equal ones spread)")
        points = ", ".join(f"{v:.2f} at {d:g}" for d, v in zip(one.doses, one.values, strict=True))
        return picture(figure, f"{title}, against the duplication count: {points}.")


def _side_by_side(doses: Sequence[float]) -> list[float]:
    """Places of the memories: those of one dose a little apart, so that equal values do not hide one another."""
    gap = min(np.diff(sorted(set(doses))), default=1.0)
    seen: Counter[float] = Counter()
    places = []
    for dose in doses:
        count = doses.count(dose)
        places.append(dose + SPREAD * gap * (seen[dose] - (count - 1) / 2) / max(1, count - 1))
        seen[dose] += 1
    return places
