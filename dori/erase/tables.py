"""A table of edits as a record: who comes back in each way, what it cost, and its text; rows of several runs together.

`table.json` is this record (schema 1). Rows that were made on several machines, or on another day, are joined if they
answer one question: the same images, models, judge and settings, and the same answers of the models without an edit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dori.erase.damage import Damage
from dori.erase.outcomes import PROMPT, Outcome
from dori.erase.protocol import Margins
from dori.erase.rates import DASH, by_lora, rates, ways
from dori.erase.verdict import ORIGINAL, Test, compare, figures
from dori.errors import DoriError
from dori.record_file import read_record

Kind = Literal["erasers", "ablations", "frontier"]
SCHEMA = 1
APART = 0.02  # similarities of one prompt's images differ by less on other devices; no attack is in them
TAIL = (
    "Frechet",
    "alignment",
    "likeness to original",
    "held-out loss",
    "neighbours: alignment",
    "neighbours: likeness",
    "U-Net rows",
    "minutes",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A row: an edit's name, its cost in U-Net rows and seconds, its updates, and why it could not be made, if so."""

    name: str
    rows: int
    seconds: float | None
    updates: int
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """Which rows one run made, and by what: versions, code, machine and times."""

    rows: tuple[str, ...]
    provenance: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """A table, whole or in part.

    Args:
        kind: what its rows are.
        split: which part of the memories: all, tune or test.
        memories, controls: numbers of images.
        twins: names of the twins, which stand in the table as the original does.
        margins: of equivalence, and what an image that was not relearned counts as.
        settings: everything that rows must share: hashes of models and images, judge, recipe, protocol, seed; and
            `rows`, the names of all rows in the table's order.
        entries: rows made or failed, in the table's order.
        left: names of the rows still to come.
        drawn_rows: at most so many U-Net rows for surrogates and neighbours, which are drawn once for all.
        outcomes: of the original, the twins and every edit.
        damage: of the original, the twins and every edit.
        made: which run made what.
        schema: of the file.
    """

    kind: Kind
    split: str
    memories: int
    controls: int
    twins: tuple[str, ...]
    margins: Margins
    settings: Mapping[str, Any]
    entries: tuple[Entry, ...]
    left: tuple[str, ...]
    drawn_rows: int
    outcomes: tuple[Outcome, ...]
    damage: tuple[Damage, ...]
    made: tuple[Made, ...]
    schema: int = SCHEMA

    @property
    def fixed(self) -> tuple[str, ...]:
        """States that no row makes."""
        return (ORIGINAL, *self.twins)

    def tests(self) -> tuple[Test, ...]:
        """Equivalence of every state's memories with unseen images."""
        return compare(self.outcomes, self.margins, self.twins)

    def with_row(
        self, entry: Entry, outcomes: Sequence[Outcome], damage: Sequence[Damage], provenance: Mapping[str, Any]
    ) -> "Table":
        """The table of one run with one more row."""
        return dataclasses.replace(
            self,
            entries=(*self.entries, entry),
            left=tuple(name for name in self.left if name != entry.name),
            outcomes=(*self.outcomes, *outcomes),
            damage=(*self.damage, *damage),
            made=(Made((*(made.name for made in self.entries), entry.name), provenance),),
        )

    def only(self, names: Sequence[str]) -> "Table":
        """The table with these rows alone, in this order, beside the original and the twins."""
        kept = [*self.fixed, *names]

        def ordered(records: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(record for name in kept for record in records if record.state == name)

        return dataclasses.replace(
            self,
            entries=tuple(entry for name in names for entry in self.entries if entry.name == name),
            outcomes=ordered(self.outcomes),
            damage=ordered(self.damage),
        )


def read_table(path: Path) -> Table:
    """The table of a file `table.json`.

    Raises:
        DoriError: no such file, another schema, or a field that does not fit.
    """
    return read_record(path, Table, schema=SCHEMA, what="table")


def joined(own: Table, others: Mapping[Path, Table]) -> Table:
    """The rows of several tables in one, in the table's order; a row that is there already stays.

    Args:
        own: the table, and the answers of the models without an edit that are kept.
        others: by their files, which messages name.

    Raises:
        DoriError: tables of other images, models or settings, or other answers of the original and the twins.
    """
    for path, other in others.items():
        check_same(path, other, kind=own.kind, settings=own.settings)
        if differ := _difference_of_answers(own, other):
            raise DoriError(f"{path} cannot stand beside these rows: {differ}")
        there = {entry.name for entry in own.entries}
        new = other.only([entry.name for entry in other.entries if entry.name not in there])
        names = {entry.name for entry in new.entries}
        made = (Made(tuple(name for name in one.rows if name in names), one.provenance) for one in other.made)
        own = dataclasses.replace(
            own,
            entries=own.entries + new.entries,
            left=tuple(name for name in own.left if name not in names),
            outcomes=own.outcomes + tuple(o for o in new.outcomes if o.state in names),
            damage=own.damage + tuple(d for d in new.damage if d.state in names),
            made=own.made + tuple(one for one in made if one.rows),
        )
    updates = {entry.name: entry.updates for entry in own.entries if not entry.failure}
    if len({updates[name] for name in ("adversarial", "ordinary") if name in updates}) > 1:
        raise DoriError(
            f"ordinary training made {updates['ordinary']} updates and the adversarial erasure "
            f"{updates['adversarial']}, so that it is no scale of damage; make both in one run"
        )
    return own.only(own.settings["rows"])


def check_same(path: Path, other: Table, *, kind: Kind, settings: Mapping[str, Any]) -> None:
    """Refuse a table whose rows answer another question.

    Raises:
        DoriError: another kind of table, or settings that differ, which are named.
    """
    if other.kind != kind:
        raise DoriError(f"{path} is a table of {other.kind}; give one of {kind}")
    if names := [name for name in settings if other.settings.get(name) != settings[name]]:
        raise DoriError(f"{path} cannot stand beside these rows: it was made with other settings ({', '.join(names)})")


def _difference_of_answers(own: Table, other: Table) -> str:
    """Whether the models without an edit were asked or answered otherwise, in words; else empty.

    Held against each other are images drawn from prompts, which no attack makes differ from device to device.
    """

    def drawn(table: Table) -> dict[tuple[str, str], Outcome]:
        return {(o.state, o.id): o for o in table.outcomes if o.way == PROMPT and o.state in table.fixed}

    def judged(table: Table) -> list[tuple[int, int]]:
        return [(row.neighbours, row.neighbours_shown) for row in table.damage if row.state == ORIGINAL]

    here, there = drawn(own), drawn(other)
    if own.twins != other.twins or here.keys() != there.keys():
        return "other images or twins were asked"
    if judged(own) != judged(other):
        return "other neighbours of the captions were drawn"
    for (state, id), outcome in here.items():
        pair = outcome.similarities, there[state, id].similarities
        if len(pair[0]) != len(pair[1]) or not np.allclose(*pair, atol=APART):
            return f"{state} drew {id} otherwise"
    return ""


# ------------------------------------------------------------------------------------------------------------- as text

LEGEND = (
    "Ways of asking: how many images come back (Wilson's 95 % interval; of the attack on the initial latent, the "
    "median position of what it found in its chi-square distribution). A success counts only as far as the controls' "
    'and the twins\' rows stay below it. "Less unseen" and "ratio to unseen": memories that the original gave, less '
    "controls, each less itself on the twins where there are some, with the interval of the equivalence test (90 %). "
    "Alignment: median agreement of image and prompt, on ordinary prompts and on neighbours of the erased captions, "
    "without those from which the original draws something like a memory. Likeness: median similarity to the "
    f"original's image of the same prompt and noise. {DASH}: not measured."
)


def to_markdown(table: Table) -> str:
    """The table as Markdown: memories, controls asked alike, the reasons of those that failed, what the columns say."""
    compared = [heading for heading, _, _ in _compared(table)]
    lines = _lines(["memories", *ways(table.outcomes), *compared, *TAIL], memory_rows(table))
    if controls := control_rows(table):
        lines += ["", *_lines(["controls", *ways(table.outcomes)], controls)]
    lines += [f"\n{entry.name}: {entry.failure}" for entry in table.entries if entry.failure]
    if table.left:
        lines += ["\nNot made yet: " + "; ".join(table.left) + "."]
    lines += [f"\n{table.memories} memories, {table.controls} controls; split: {table.split}. {LEGEND}"]
    if len(codes := {one.provenance.get("code") for one in table.made}) > 1:
        lines += [f"\nThe rows were made by {len(codes)} versions of the code."]
    if table.drawn_rows:
        lines += [
            "\nRows and minutes are the erasures' own; the surrogates and neighbours that some learn from, drawn once, "
            f"took at most {table.drawn_rows:,} rows."
        ]
    return "\n".join(lines) + "\n"


def memory_rows(table: Table) -> list[list[str]]:
    """Cells of the memories' rows: who comes back, less unseen images, damage, cost."""
    by_state = {row.state: row for row in table.damage}
    by_name = {entry.name: entry for entry in table.entries}
    by_test: dict[tuple[str, str, str], Test] = {
        (test.state, test.kind, test.of): test for test in table.tests() if test.of != "spread"
    }
    found, compared = [], _compared(table)
    for line in rates(table.outcomes, "memory", unreached=table.margins.unreached):
        row, entry = by_state[line.heading], by_name.get(line.heading)
        seconds = entry.seconds if entry else None
        found.append(
            [
                line.heading,
                *line.cells,
                *(_difference(by_test.get((line.heading, kind, of))) for _, kind, of in compared),
                f"{row.frechet:.4g}",
                _number(row.alignment),
                _number(row.to_original),
                _number(row.held_out_loss, digits=4),
                _number(row.neighbour_alignment),
                _number(row.neighbour_to_original),
                f"{entry.rows:,}" if entry else DASH,
                DASH if seconds is None else f"{seconds / 60:.1f}",
            ]
        )
    return found


def _compared(table: Table) -> list[tuple[str, str, str]]:
    """Headings of the comparisons with unseen images, and which tests fill them."""
    return [
        ("similarity less unseen", "area", "mean"),
        ("steps to relearn less unseen", "relearning", "mean"),
        ("steps to relearn, ratio to unseen", "relearning", "ratio"),
        *([("the same through a LoRA", "lora", "ratio")] if by_lora(table.outcomes) else []),
    ]


def control_rows(table: Table) -> list[list[str]]:
    """Cells of the controls' rows: who comes back."""
    if not table.controls:
        return []
    lines = rates(table.outcomes, "control", unreached=table.margins.unreached)
    return [[line.heading, *line.cells] for line in lines]


def _difference(test: Test | None) -> str:
    """Memories less controls (less the twins'), with its interval; nothing where nothing was compared."""
    if test is None:
        return DASH
    e = test.found
    difference, low, high, _ = figures(test.of, e.difference, e.low, e.high, e.margin)
    return f"{difference} ({low} to {high})"


def _number(value: float | None, *, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *escaped)]
