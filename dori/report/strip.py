"""One picture of a few memories side by side, for a README, a slide or a paper: what comes back, under which edit."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from PIL.Image import Image

from dori.errors import DoriError
from dori.findings import Audit, Finding
from dori.judgement import rule_of
from dori.report import tables
from dori.report.drawing import GREY, VERMILION, drawing, png
from dori.report.pictures import Album
from dori.report.render import may_show
from dori.report.tables import Way
from dori.stats import choose

LINES = 5
SIDE = 0.95  # inches of each picture


def strip(audit: Audit, folder: Path, *, lines: int = LINES, redact: bool = False) -> bytes:
    """A PNG with a line a memory: its training image, its prompt, and prompt and attack under every attacked edit.

    The memories are verbatim ones that the unedited model draws from their prompts, evenly spread over them in the
    audit's order; where it draws none, over all. Pictures are each first seed's. A red frame: the median over seeds is
    above the threshold. The last column is the first twin under the same attack.

    Args:
        audit: what was found.
        folder: the run's folder, in which the pictures lie.
        lines: at most so many memories.
        redact: blur as in the report.

    Raises:
        DoriError: no verbatim memory, a picture outside the folder or damaged, or no threshold.
    """
    rule, album = rule_of(audit), Album(folder)
    found = {(one.id, tables.way_of(one)): one for one in audit.findings if one.group == "memory"}
    ways = _ways(audit)
    memories = [one for one in audit.subjects if one.group == "memory" and one.kind == "verbatim"]
    drawn = [one for one in memories if (asked := found.get((one.id, ways[0]))) and rule.came_back(asked)]
    candidates = drawn or memories
    shown = [candidates[place] for place in choose(len(candidates), lines)]
    if not shown:
        raise DoriError("a strip shows verbatim memories, and this audit has none; open its report instead")
    titles = ["training image", *(_title(audit, way) for way in ways)]
    with drawing(SIDE * len(titles), (SIDE + 0.04) * len(shown) + 0.35) as figure:
        grid = figure.subplots(len(shown), len(titles), squeeze=False)
        for line, memory in zip(grid, shown, strict=True):
            cells: list[Finding | None] = [found.get((memory.id, way)) for way in ways]
            pictures = [(memory.picture, redact, False)]
            pictures += [
                (one.picture, redact and may_show(one, rule), rule.came_back(one)) if one else ("", False, False)
                for one in cells
            ]
            for axes, (picture, blurred, back) in zip(line, pictures, strict=True):
                _draw(axes, album.image(picture, blurred=blurred), framed=back)
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title, fontsize=8)
        return png(figure)


def _draw(axes: Axes, image: Image | None, *, framed: bool) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set(visible=True, color=VERMILION if framed else GREY, linewidth=2.5 if framed else 0.5)
    if image is not None:
        axes.imshow(np.asarray(image))


def _ways(audit: Audit) -> list[Way]:
    """The prompt and the attack from it, without an edit and under each joint edit that was attacked; then a twin."""
    final = [row.way for row in tables.final_rows(tables.table(audit), audit) if row.population == tables.MEMORIES]
    attacks = [way for way in final if way.start == "prompt" and way.edit_scope != "own"]
    own = [way for way in attacks if way.model == audit.model]
    twins = [way for way in attacks if way.model in audit.twins[:1]]
    asked = [Way(audit.model, "none", "", "", 0)]
    for way in own:
        asked += [Way(way.model, way.edit, way.edit_scope, "", 0), way]
    return list(dict.fromkeys([*asked, *twins]))


def _title(audit: Audit, way: Way) -> str:
    under = "a twin" if way.model != audit.model else "unedited" if way.edit == "none" else way.edit
    asked = f"DoRI, {way.steps} steps" if way.start else "prompt"
    return f"{textwrap.shorten(under, 16, placeholder=' …')}\n{asked}"
