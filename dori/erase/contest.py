"""Three tables, one command each: eraser x attack, the ablation of the adversarial eraser's parts, and its frontier.

Every row is an edit made by the same door, judged by the same protocol on memories and controls beside the twins, with
its damage and its cost. The frontier goes from mild to strong: learning rate, rounds, surrogates.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dori.cost import Rows
from dori.erase import ARMS, ERASERS
from dori.erase.adversarial import AdversarialErasure
from dori.erase.battery import State
from dori.erase.cells import Bench
from dori.erase.damage import Damage
from dori.erase.delta import CannotErase, WeightDelta
from dori.erase.erasers import Eraser, arms, frontier
from dori.erase.ordinary import OrdinaryTraining
from dori.erase.outcomes import Outcome
from dori.erase.proof import battery_of, gauge_of, method_of
from dori.erase.protocol import Protocol
from dori.erase.rates import DASH, rates, ways
from dori.erase.verdict import ORIGINAL, Test, compare
from dori.run import cell_key

Kind = Literal["erasers", "ablations", "frontier"]
TAIL = (
    "similarity less unseen",
    "steps to relearn less unseen",
    "Frechet",
    "likeness to original",
    "held-out loss",
    "neighbours: likeness",
    "U-Net rows",
    "minutes",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A row: an edit's name, its cost, and why it could not be made, if so."""

    name: str
    rows: int
    seconds: float | None
    failure: str = ""


def row_names(kind: Kind, adversarial: AdversarialErasure) -> tuple[str, ...]:
    """Names of all rows of a table."""
    return {"erasers": ERASERS, "ablations": ARMS, "frontier": tuple(frontier(adversarial))}[kind]


def contestants(kind: Kind, own: Bench, names: Sequence[str] = ()) -> dict[str, Eraser]:
    """The rows' methods by name, all or those of these names, in their order."""
    adversarial = own.plan.adversarial
    wanted = names or row_names(kind, adversarial)
    if kind == "erasers":
        return {name: method_of(own, name) for name in wanted}
    methods = (arms if kind == "ablations" else frontier)(adversarial)
    return {name: methods[name] for name in wanted}


def contest_costs(own: Bench, kind: Kind, methods: Mapping[str, Eraser]) -> dict[str, Rows]:
    """Every cell of `contest` with its cost, at most."""
    subjects, protocol = own.material.subjects, own.plan.tables
    states = [*_fixed(own), *(State(name, subjects.model) for name in methods)]
    found = own.drawn_costs(methods.values())
    found |= {cell_key("edit", _key(kind, name)): own.edit_rows(method) for name, method in methods.items()}
    battery = battery_of(own, protocol)
    for state in states:
        found |= battery.costs(state, (*subjects.memories, *subjects.controls))
    return found | gauge_of(own, protocol).costs(states)


def contest(
    own: Bench, kind: Kind, methods: Mapping[str, Eraser], after: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Make and judge every edit of a table; an eraser that cannot do it leaves its reason instead.

    Args:
        own: what is erased and what judges it; the caller holds the lock of its folder.
        kind: which table.
        methods: its rows, as `contestants` gives them.
        after: called with the record so far after each row, made or failed, so that an interrupted table shows what it
            has.

    Returns:
        A JSON-able record: header, rows as texts for memories and for controls, names of rows still to come, entries,
        outcomes, tests, damage, and the U-Net rows of surrogates and neighbours, which are drawn once for all.
    """
    subjects, protocol = own.material.subjects, own.plan.tables
    own.run.plan(kind, {key: rows.weight for key, rows in contest_costs(own, kind, methods).items()})
    forget = own.forget(methods.values())
    battery, gauge, cases = battery_of(own, protocol), gauge_of(own, protocol), (*subjects.memories, *subjects.controls)
    fixed, entries, made = _fixed(own), list[Entry](), dict[str, WeightDelta]()
    outcomes = [outcome for state in fixed for outcome in battery.measure(state, cases)]
    damage = [*gauge.measure(fixed, battery.fingerprints)]
    for name, method in methods.items():
        try:
            edit = own.edit(_key(kind, name), _as_long_as(made.get("adversarial"), method), forget)
        except CannotErase as error:
            entries.append(Entry(name, 0, None, str(error)))
        else:
            entries.append(Entry(name, int(edit.details["rows"]), own.seconds(_key(kind, name))))
            made[name], state = edit, State(name, subjects.model, (edit,))
            outcomes += battery.measure(state, cases)
            damage += gauge.measure([fixed[0], state], battery.fingerprints)[1:]
        if after is not None and len(entries) < len(methods):
            after(_record(own, kind, methods, entries, outcomes, damage))
    return _record(own, kind, methods, entries, outcomes, damage)


def _record(
    own: Bench,
    kind: Kind,
    methods: Mapping[str, Eraser],
    entries: Sequence[Entry],
    outcomes: Sequence[Outcome],
    damage: Sequence[Damage],
) -> dict[str, Any]:
    subjects, protocol = own.material.subjects, own.plan.tables
    tests = compare(outcomes, protocol, [twin.name for twin in subjects.twins])
    record = {
        "kind": kind,
        "split": own.material.split,
        "images": [len(subjects.memories), len(subjects.controls)],
        "header": [*ways(outcomes), *TAIL],
        "controls": [[line.heading, *line.cells] for line in rates(outcomes, "control", unreached=protocol.unreached)],
        "rows": _rows(outcomes, damage, tests, entries, protocol=protocol),
        "left": [*methods][len(entries) :],
        "failures": {entry.name: entry.failure for entry in entries if entry.failure},
        "drawn_rows": own.drawn_rows(methods.values()).count,
        "entries": [dataclasses.asdict(entry) for entry in entries],
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        "tests": [dataclasses.asdict(test) for test in tests],
        "damage": [dataclasses.asdict(row) for row in damage],
        "provenance": own.run.provenance(),
    }
    return json.loads(json.dumps(record))  # as it will be read again


def _as_long_as(erased: WeightDelta | None, method: Eraser) -> Eraser:
    """Ordinary training with as many updates as the adversarial row made, the scale of its damage; others unchanged."""
    if erased is None or not isinstance(method, OrdinaryTraining):
        return method
    return dataclasses.replace(method, steps=erased.details["updates"])


def _fixed(own: Bench) -> list[State]:
    """What the rows are compared with."""
    subjects = own.material.subjects
    return [State(ORIGINAL, subjects.model), *(State(twin.name, twin) for twin in subjects.twins)]


def _key(kind: Kind, name: str) -> str:
    """Name of an edit's cell."""
    return name if kind == "erasers" else f"{kind} {name}"


def _rows(
    outcomes: Sequence[Outcome],
    damage: Sequence[Damage],
    tests: Sequence[Test],
    entries: Sequence[Entry],
    *,
    protocol: Protocol,
) -> list[list[str]]:
    by_state = {row.state: row for row in damage}
    by_name = {entry.name: entry for entry in entries}
    by_test = {(test.state, test.kind): test for test in tests if test.of == "mean"}
    found = []
    for line in rates(outcomes, "memory", unreached=protocol.unreached):
        row, entry = by_state[line.heading], by_name.get(line.heading)
        seconds = entry.seconds if entry else None
        found.append(
            [
                line.heading,
                *line.cells,
                _difference(by_test.get((line.heading, "area")), digits=3),
                _difference(by_test.get((line.heading, "relearning")), digits=1),
                f"{row.frechet:.4g}",
                _number(row.to_original),
                _number(row.held_out_loss, digits=4),
                _number(row.neighbour_to_original),
                f"{entry.rows:,}" if entry else DASH,
                DASH if seconds is None else f"{seconds / 60:.1f}",
            ]
        )
    return found


def _difference(test: Test | None, *, digits: int) -> str:
    """Memories less controls (less the twins'), with its interval; nothing where nothing was compared."""
    if test is None:
        return DASH
    e = test.found
    return f"{e.difference:+.{digits}f} ({e.low:+.{digits}f} to {e.high:+.{digits}f})"


def _number(value: float | None, *, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


LEGEND = (
    "Ways of asking: how many images come back (Wilson's 95 % interval; of the attack on the initial latent, the "
    "median position of what it found in its chi-square distribution). A success counts only as far as the controls' "
    'and the twins\' rows stay below it. "Less unseen": memories that the original gave, less controls, each less '
    "itself on the twins where there are some, with the interval of the equivalence test (90 %). Likeness: median "
    f"similarity to the original's image of the same prompt and noise. {DASH}: not measured."
)


def to_markdown(record: Mapping[str, Any]) -> str:
    """The table as Markdown: memories, controls asked alike, the reasons of those that failed, what the columns say."""
    ways_ = record["header"][: len(record["controls"][0]) - 1] if record["controls"] else []
    lines = _table(["memories", *record["header"]], record["rows"])
    if record["controls"]:
        lines += ["", *_table(["controls", *ways_], record["controls"])]
    lines += [f"\n{name}: {reason}" for name, reason in record["failures"].items()]
    if record["left"]:
        lines += ["\nNot made yet: " + ", ".join(record["left"]) + "; the same command goes on."]
    memories, controls = record["images"]
    lines += [f"\n{memories} memories, {controls} controls; split: {record['split']}. {LEGEND}"]
    if made := record["drawn_rows"]:
        lines += [
            "\nRows and minutes are the erasures' own; the surrogates and neighbours that some learn from, drawn once, "
            f"took at most {made:,} rows."
        ]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *escaped)]
