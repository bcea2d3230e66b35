"""Three tables, one command each: eraser x attack, the ablation of the adversarial eraser's parts, and its frontier.

Every row is an edit made by the same door, judged by the same protocol on memories and controls beside the twins, with
its damage and its cost. The frontier goes from mild to strong: learning rate, rounds, surrogates, relapses.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dori.audit.judge import cases_sha256
from dori.cost import Rows
from dori.erase import ARMS, ERASERS
from dori.erase.adversarial import AdversarialErasure
from dori.erase.battery import Battery, State
from dori.erase.cells import Bench
from dori.erase.damage import Damage
from dori.erase.delta import CannotErase
from dori.erase.erasers import Eraser, arms, frontier
from dori.erase.neighbours import SEEDS
from dori.erase.ordinary import OrdinaryTraining
from dori.erase.outcomes import Outcome
from dori.erase.proof import battery_of, gauge_of, method_of
from dori.erase.tables import Entry, Kind, Table, check_same, joined
from dori.erase.verdict import ORIGINAL
from dori.run import as_read_again, cell_key


def row_names(kind: Kind, adversarial: AdversarialErasure) -> tuple[str, ...]:
    """Names of all rows of a table."""
    return {"erasers": ERASERS, "ablations": ARMS, "frontier": tuple(frontier(adversarial))}[kind]


def contestants(kind: Kind, own: Bench, names: Sequence[str]) -> dict[str, Eraser]:
    """The methods of these rows by name, in this order; ordinary training, as long as the adversarial one, after it."""
    names = sorted(names, key=lambda name: name == "ordinary")
    adversarial = own.plan.adversarial
    if kind == "erasers":
        return {name: method_of(own, name) for name in names}
    methods = (arms if kind == "ablations" else frontier)(adversarial)
    return {name: methods[name] for name in names}


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
    own: Bench,
    kind: Kind,
    methods: Mapping[str, Eraser],
    after: Callable[[Table], object] | None = None,
    others: Mapping[Path, Table] | None = None,
) -> Table:
    """Make and judge every edit of a table; an eraser that cannot do it leaves its reason instead.

    Args:
        own: what is erased and what judges it; the caller holds the lock of its folder.
        kind: which table.
        methods: its rows, as `contestants` gives them.
        after: called with the table so far after each row, made or failed, so that an interrupted one shows what it
            has.
        others: tables by their files, whose rows stand beside these.

    Raises:
        DoriError: a table among `others` answers another question.
    """
    subjects, protocol, others = own.material.subjects, own.plan.tables, others or {}
    battery, gauge, cases = battery_of(own, protocol), gauge_of(own, protocol), (*subjects.memories, *subjects.controls)
    settings = settings_of(own, kind, battery)
    for path, other in others.items():  # before anything is computed
        check_same(path, other, kind=kind, settings=settings)
    own.run.plan(kind, {key: rows.weight for key, rows in contest_costs(own, kind, methods).items()})
    forget, fixed = own.forget(methods.values()), _fixed(own)
    mine = _without_rows(own, kind, settings)
    mine = dataclasses.replace(
        mine,
        outcomes=tuple(outcome for state in fixed for outcome in battery.measure(state, cases)),
        damage=gauge.measure(fixed, battery.fingerprints),
    )
    _whole(own, mine, others)  # before hours of work: do the others answer the same question?
    updates = {entry.name: entry.updates for other in others.values() for entry in other.entries}
    for name, method in methods.items():
        outcomes, damage = list[Outcome](), list[Damage]()
        try:
            edit = own.edit(_key(kind, name), _as_long_as(updates.get("adversarial"), method), forget)
        except CannotErase as error:
            entry = Entry(name, 0, None, 0, str(error))
        else:
            updates[name] = int(edit.details["updates"])
            entry = Entry(name, int(edit.details["rows"]), own.seconds(_key(kind, name)), updates[name])
            state = State(name, subjects.model, (edit,))
            outcomes += battery.measure(state, cases)
            damage += gauge.measure([fixed[0], state], battery.fingerprints)[1:]
        mine = mine.with_row(entry, outcomes, damage, own.run.provenance())
        if after is not None and len(mine.entries) < len(methods):
            after(_whole(own, mine, others))
    return _whole(own, mine, others)


def _without_rows(own: Bench, kind: Kind, settings: Mapping[str, Any]) -> Table:
    """A table before anything is measured."""
    subjects = own.material.subjects
    return Table(
        kind,
        own.material.split,
        len(subjects.memories),
        len(subjects.controls),
        tuple(twin.name for twin in subjects.twins),
        own.plan.tables.margins,
        settings,
        entries=(),
        left=tuple(settings["rows"]),
        drawn_rows=0,
        outcomes=(),
        damage=(),
        made=(),
    )


def _whole(own: Bench, mine: Table, others: Mapping[Path, Table]) -> Table:
    """This run's rows beside the others', with what was drawn for all of them.

    Raises:
        DoriError: as `joined`.
    """
    table = joined(mine, others)
    drawn = own.drawn_rows(contestants(table.kind, own, [entry.name for entry in table.entries]).values())
    return dataclasses.replace(table, drawn_rows=drawn.count)


def settings_of(own: Bench, kind: Kind, battery: Battery) -> dict[str, Any]:
    """What all rows of a table must share, as it will be read again."""
    subjects, plan = own.material.subjects, own.plan
    found = {
        "rows": row_names(kind, plan.adversarial),
        "model": own.fingerprint,
        "twins": {twin.name: battery.fingerprint(twin) for twin in subjects.twins},
        "memories": cases_sha256(subjects.memories),
        "controls": cases_sha256(subjects.controls),
        "retain": own.material.retain.source,
        "held_out": own.material.held_out.source,
        "prompts": own.material.prompts,
        "judge": own.judge.record(),
        "neighbours": [plan.neighbours, SEEDS],
        "adversarial": plan.adversarial,
        "mitigations": plan.mitigations,
        "surrogates": plan.surrogates,
        "protocol": plan.tables,
        "seed": plan.seed,
    }
    return dict(as_read_again(found))


def _as_long_as(updates: int | None, method: Eraser) -> Eraser:
    """Ordinary training with as many updates as the adversarial row made, the scale of its damage; others unchanged."""
    if not updates or not isinstance(method, OrdinaryTraining):
        return method
    return dataclasses.replace(method, steps=updates)


def _fixed(own: Bench) -> list[State]:
    """What the rows are compared with."""
    subjects = own.material.subjects
    return [State(ORIGINAL, subjects.model), *(State(twin.name, twin) for twin in subjects.twins)]


def _key(kind: Kind, name: str) -> str:
    """Name of an edit's cell."""
    return name if kind == "erasers" else f"{kind} {name}"
