"""What all figures share: SVG text, the same bytes for the same numbers: text as paths, no date, no pyplot state.

Names that a stranger chose (edits, models) are drawn with `parse_math` off and never become SVG ids. Colours are
Okabe and Ito's, told apart by the colour-blind; markers and line styles repeat what the colours say.
"""

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dori.report.pictures import svg_uri
from dori.stats import Estimate

BLUE, ORANGE, GREEN, PURPLE, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#555555"
SKY = "#56B4E9"
SETTINGS = {
    "svg.hashsalt": "dori",
    "svg.fonttype": "path",
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#222222",
    "xtick.color": "#222222",
    "ytick.color": "#222222",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
}
WIDTH, HEIGHT = 4.3, 3.0  # inches; two stand side by side on a page, one on a telephone
WRAPPED = 50  # letters of a title's line
LEGEND = 30  # letters of a label, of which two stand side by side


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG with what it shows in words."""

    svg: str
    alt: str

    @property
    def uri(self) -> str:
        """The SVG as a data URI."""
        return svg_uri(self.svg)


@contextmanager
def drawing(width: float = WIDTH, height: float = HEIGHT, *, title: str = "") -> Iterator[Figure]:
    """A figure under fixed settings, which end with the block; a title says what it shows, so that it stands alone."""
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in scripts the font lacks show boxes
        figure = Figure(figsize=(width, height), layout="constrained")
        if title:
            letters = round(WRAPPED * width / WIDTH)
            figure.suptitle(textwrap.fill(title, letters), x=0.01, ha="left", fontsize=9.5, fontweight="bold")
        yield figure


def picture(figure: Figure, alt: str) -> Picture:
    """The finished figure; called inside the block of `drawing`."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(file.getvalue(), alt)


def png(figure: Figure) -> bytes:
    """The finished figure as a PNG file; called inside the block of `drawing`."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def legend_above(axes: Axes, columns: int = 2) -> None:
    """Above the panel, so that it never covers a line; in one column where two would not fit."""
    longest = max((len(label) for label in axes.get_legend_handles_labels()[1]), default=0)
    columns = 1 if longest > LEGEND else columns
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.03, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        handlelength=2.4,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def bars(estimates: Sequence[Estimate]) -> list[list[float]] | None:
    """Lengths of the error bars down and up; none where an estimate has no interval, None where none has."""
    if all(math.isnan(e.low) for e in estimates):
        return None
    return [
        [0.0 if math.isnan(e.low) else max(0.0, e.value - e.low) for e in estimates],
        [0.0 if math.isnan(e.high) else max(0.0, e.high - e.value) for e in estimates],
    ]
