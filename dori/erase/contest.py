"""Two tables, one command each: eraser x attack, and the ablation of the adversarial eraser's parts.

Every row is an edit made by the same door, judged by the same protocol beside the twins, with its damage and its cost.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dori.audit.judge import Judge
from dori.erase import ERASERS
from dori.erase.battery import Battery, State
from dori.erase.cells import bench
from dori.erase.certificate import DASH, WAYS, rates
from dori.erase.damage import Damage
from dori.erase.erasers import Eraser, arms, eraser
from dori.erase.material import Material
from dori.erase.outcomes import Outcome, areas, less_twins
from dori.erase.pairs import Work
from dori.erase.plan import Plan
from dori.erase.proof import gauge_of
from dori.erase.protocol import Protocol
from dori.erase.verdict import ORIGINAL
from dori.errors import DoriError
from dori.run import Run

Kind = Literal["erasers", "ablations"]
TAIL = ("area less twins", "Frechet", "likeness to original", "neighbours: likeness", "U-Net rows", "minutes")


@dataclass(frozen=True, slots=True)
class Entry:
    """A row: an edit's name, its cost, and why it could not be made, if so."""

    name: str
    rows: int
    seconds: float | None
    failure: str = ""


def contestants(kind: Kind, plan: Plan, *, timesteps: int) -> dict[str, Eraser]:
    """The erasers, or the arms of the adversarial one."""
    if kind == "ablations":
        return dict(arms(plan.adversarial))
    return {
        name: eraser(
            name, adversarial=plan.adversarial, timesteps=timesteps, sampling_steps=plan.protocol.sampling_steps
        )
        for name in ERASERS
    }


def contest(material: Material, plan: Plan, kind: Kind, *, judge: Judge, run: Run, work: Work) -> dict[str, Any]:
    """Make and judge every edit of a table; an eraser that fails leaves its reason instead.

    Returns:
        A JSON-able record: header, rows as texts, entries, outcomes and damage.
    """
    subjects = material.subjects
    own, protocol = bench(material, plan, judge, run, work), _protocol(plan)
    methods = contestants(kind, plan, timesteps=subjects.model.timesteps)
    battery = Battery(protocol, judge, run, material.prompts.proving, {})
    gauge = gauge_of(material, plan, judge, run, protocol)
    fixed = [State(ORIGINAL, subjects.model), *(State(twin.name, twin) for twin in subjects.twins)]
    every = [*fixed, *(State(name, subjects.model) for name in methods)]
    costs: dict[str, int] = {}
    for state in every:
        costs |= battery.costs(state, subjects.memories)
    run.plan(kind, costs | gauge.cells(every))
    forget, states, entries = own.forget(), list(fixed), []
    for name, method in methods.items():
        key = name if kind == "erasers" else f"arm {name}"
        try:
            edit = own.edit(key, method, forget)
        except DoriError as error:
            entries.append(Entry(name, 0, None, str(error)))
            continue
        entries.append(Entry(name, int(edit.details["rows"]), own.seconds(key)))
        states.append(State(name, subjects.model, (edit,)))
    outcomes = [outcome for state in states for outcome in battery.measure(state, subjects.memories)]
    damage = gauge.measure(states, battery.fingerprints)
    twins = [twin.name for twin in subjects.twins]
    return json.loads(
        json.dumps(
            {
                "kind": kind,
                "split": material.split,
                "header": [*WAYS, *TAIL],
                "rows": _rows(outcomes, damage, entries, twins=twins, protocol=protocol),
                "failures": {entry.name: entry.failure for entry in entries if entry.failure},
                "entries": [dataclasses.asdict(entry) for entry in entries],
                "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
                "damage": [dataclasses.asdict(row) for row in damage],
                "provenance": run.provenance(),
            }
        )
    )


def _protocol(plan: Plan) -> Protocol:
    """The plan's protocol on the memories, as delivered, from one restart."""
    return dataclasses.replace(plan.protocol, restarts=1, roundings=(), harmless_steps=0)


def _rows(
    outcomes: Sequence[Outcome],
    damage: Sequence[Damage],
    entries: Sequence[Entry],
    *,
    twins: Sequence[str],
    protocol: Protocol,
) -> list[list[str]]:
    by_state: Mapping[str, Damage] = {row.state: row for row in damage}
    by_name = {entry.name: entry for entry in entries}
    found = []
    for line in rates(outcomes, "memory", unreached=protocol.unreached):
        row, entry = by_state[line.heading], by_name.get(line.heading)
        area = areas(outcomes, line.heading)
        values = less_twins(area, [areas(outcomes, twin) for twin in twins]) if twins else area
        seconds = entry.seconds if entry else None
        found.append(
            [
                line.heading,
                *line.cells,
                f"{np.mean(list(values.values())):+.3f}" if values else DASH,
                f"{row.frechet:.4g}",
                *(DASH if value is None else f"{value:.3f}" for value in (row.to_original, row.neighbour_to_original)),
                f"{entry.rows:,}" if entry else DASH,
                DASH if seconds is None else f"{seconds / 60:.1f}",
            ]
        )
    return found


def to_markdown(record: Mapping[str, Any]) -> str:
    """The table as Markdown, with the reasons of those that failed below."""
    lines = ["| | " + " | ".join(record["header"]) + " |", "|" + "---|" * (len(record["header"]) + 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in record["rows"]]
    lines += [f"\n{name}: {reason}" for name, reason in record["failures"].items()]
    return "\n".join(lines) + "\n"
