"""The whole of an erasure: erase, judge the erased model beside the original and the twins, name the result.

Everything is a cell of the run's folder, so that a killed command goes on with the same command. The result is a plain
record, `proof.json`, from which the certificate is drawn (`dori.erase.certificate`).
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dori.audit.checks import blind_scores
from dori.audit.judge import Case, pixels_sha256
from dori.cost import Rows
from dori.erase.battery import Battery, State
from dori.erase.cells import Bench
from dori.erase.damage import Gauge, spoiled
from dori.erase.delta import WeightDelta
from dori.erase.equivalence import Equivalence
from dori.erase.erasers import Eraser, eraser, ordinary
from dori.erase.ordinary import OrdinaryTraining
from dori.erase.outcomes import Outcome
from dori.erase.plan import Plan
from dori.erase.premise import unprompted_in, unprompted_key, unprompted_rows
from dori.erase.protocol import Protocol
from dori.erase.verdict import ERASED, ORDINARY, ORIGINAL, verdict
from dori.findings import Group
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.run import cell_key

HARMLESS = "harmless"


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """What an erasure left and how it was judged.

    Args:
        edit: the erasure.
        record: JSON-able: hashes, settings, verdict, tests, outcomes, damage, cost, provenance.
    """

    edit: WeightDelta
    record: Mapping[str, Any]


def judged_protocol(plan: Plan, *, twins: bool) -> Protocol:
    """The plan's protocol; without a twin there are at least three restarts of what is compared."""
    restarts = plan.protocol.restarts if twins else max(3, plan.protocol.restarts)
    return dataclasses.replace(plan.protocol, restarts=restarts)


def method_of(own: Bench, name: str) -> Eraser:
    """The eraser of that name under the plan."""
    model, plan = own.material.subjects.model, own.plan
    return eraser(
        name,
        adversarial=plan.adversarial,
        memories=len(own.material.subjects.memories),
        timesteps=model.timesteps,
        sampling_steps=plan.protocol.sampling_steps,
    )


def battery_of(own: Bench, protocol: Protocol) -> Battery:
    """The battery for this material."""
    model = own.material.subjects.model
    return Battery(protocol, own.judge, own.run, own.material.prompts.proving, {model.name: own.fingerprint})


def gauge_of(own: Bench, protocol: Protocol) -> Gauge:
    """The gauge of damage for this material."""
    material, plan = own.material, own.plan
    return Gauge(
        judge=own.judge,
        run=own.run,
        ordinary=material.prompts.quality,
        near=own.judged_neighbours(),
        cases=material.subjects.memories,
        below=plan.surrogates.below_target,
        held_out=material.pictures,
        pairs=material.held_out,
        sampling_steps=protocol.sampling_steps,
        guidance_scale=protocol.guidance_scale,
        seed=plan.seed,
        base=material.base.name if material.base else "",
    )


def states_of(own: Bench, edit: WeightDelta, harmless: WeightDelta | None, protocol: Protocol) -> list[State]:
    """The original, the erased model and its altered forms, the twins."""
    subjects, p = own.material.subjects, protocol
    model = subjects.model
    found = [State(ORIGINAL, model, whole=p.original_whole), State(ERASED, model, (edit,))]
    found += [
        State(f"{ERASED}, {rounding}", model, (edit,), rounding, whole=False, relearned=p.relearn_altered)
        for rounding in p.roundings
    ]
    if harmless is not None:
        name = f"{ERASED}, {p.harmless_steps} harmless steps"
        found.append(State(name, model, (edit, harmless), whole=False, relearned=p.relearn_altered))
    return found + [State(twin.name, twin) for twin in subjects.twins]


def gauged(states: Sequence[State], trained: WeightDelta, base: StableDiffusion | None) -> list[State]:
    """The states whose damage is gauged: original, erased, ordinary training, twins, and the base if there is one."""
    original = states[0]
    twins = [state for state in states if state.model is not original.model]
    bases = [] if base is None else [State(base.name, base)]
    return [*states[:2], State(ORDINARY, original.model, (trained,)), *twins, *bases]


def _pure(states: Sequence[State]) -> list[State]:
    """The original, the erased model and the twins, without altered forms."""
    return [state for state in states if state.pure]


def proof_costs(own: Bench, name: str) -> dict[str, Rows]:
    """Every cell of `prove` with its cost, at most."""
    plan, subjects = own.plan, own.material.subjects
    protocol, method = judged_protocol(plan, twins=bool(subjects.twins)), method_of(own, name)
    nothing = WeightDelta("", {})
    states = states_of(own, nothing, nothing if protocol.harmless_steps else None, protocol)
    found = own.drawn_costs([method])
    found[cell_key("edit", name)] = own.edit_rows(method)
    if protocol.harmless_steps:
        found[cell_key("edit", HARMLESS)] = own.edit_rows(_harmless(plan, protocol))
    most = getattr(method, "steps", None)  # where an eraser has none, the adversarial one's updates count
    found[cell_key("edit", ORDINARY)] = own.edit_rows(ordinary(plan.adversarial, most))
    battery = battery_of(own, protocol)
    cases = (*subjects.memories, *subjects.controls)
    for state in states:
        found |= battery.costs(state, cases)
    found |= {unprompted_key(state): unprompted_rows(cases) for state in _pure(states)}
    return found | gauge_of(own, protocol).costs(gauged(states, nothing, own.material.base))


def prove(
    own: Bench, name: str, *, beside: int = 0, meanwhile: Callable[[WeightDelta], object] = lambda edit: None
) -> Proof | None:
    """Erase, or go on erasing, and judge.

    Args:
        own: what is erased and what judges it; the caller holds the lock of its folder.
        name: of the eraser, in `dori.erase.ERASERS`.
        beside: cost of `meanwhile`, in units of a forward row.
        meanwhile: what the first of several processes does with the edit while the others still ask.

    Returns:
        The proof; None in processes that only helped.

    Raises:
        CannotErase: the training diverged, or a memory lacks a text or a surrogate.
    """
    plan, subjects = own.plan, own.material.subjects
    protocol, method = judged_protocol(plan, twins=bool(subjects.twins)), method_of(own, name)
    own.run.plan("erase", {key: rows.weight for key, rows in proof_costs(own, name).items()})
    forget = own.forget([method])
    edit = own.edit(name, method, forget)
    harmless = own.edit(HARMLESS, _harmless(plan, protocol), forget, on=edit) if protocol.harmless_steps else None
    trained = own.edit(ORDINARY, ordinary(plan.adversarial, edit.details["updates"]), forget)
    processes, own = own.work.processes, own.beside_first().alone()
    battery, states = battery_of(own, protocol), states_of(own, edit, harmless, protocol)
    cases, gauge = (*subjects.memories, *subjects.controls), gauge_of(own, protocol)
    spent = gauged(states, trained, own.material.base)
    alone = [*gauge.costs(spent).values(), *(unprompted_rows(cases) for _ in _pure(states))]
    costs = {key: rows.weight for state in states for key, rows in battery.costs(state, cases).items()}
    share, rest = processes.in_turn(costs, beside=sum(rows.weight for rows in alone) + beside)
    answers = _asked(battery, states, cases, share)
    if not processes.first:
        return None
    for state in spent:
        battery.fingerprint(state.model)
    damage = gauge.measure(spent, battery.fingerprints)
    unprompted = [
        one
        for state in _pure(states)
        for one in unprompted_in(own.run, state, cases, battery.fingerprints, seed=plan.seed)
    ]
    if processes.count > 1:
        meanwhile(edit)
        answers |= _asked(battery, states, cases, rest)
    outcomes = [outcome for key in costs for outcome in answers[key]]
    blind = blind_scores(subjects.model, subjects.memories, subjects.controls)
    found = verdict(
        outcomes,
        protocol,
        twins=[twin.name for twin in subjects.twins],
        blind=blind,
        spoiled=spoiled(damage, ERASED, (ORIGINAL, ORDINARY)),
    )
    record = _about(own, name, edit, battery.fingerprints)
    record |= {"verdict": found, "protocol": protocol, "blind": blind, "damage": damage, "outcomes": outcomes}
    record |= {"unprompted": unprompted}
    return Proof(edit, json.loads(json.dumps(record, default=_plain, sort_keys=True)))  # as it will be read again


def _asked(
    battery: Battery, states: Sequence[State], cases: Sequence[Case], keys: Sequence[str]
) -> dict[str, list[Outcome]]:
    """The answers to some of the questions, asked in this order; each is a cell."""
    answers: dict[str, list[Outcome]] = {}
    asked = {key: (state, ask) for state in states for key, ask in battery.cells(state, cases).items()}
    for state, part in groupby(keys, key=lambda key: asked[key][0]):
        with state.applied():
            for key in part:
                answers[key] = asked[key][1]()
    return answers


def _harmless(plan: Plan, protocol: Protocol) -> OrdinaryTraining:
    tuner = dataclasses.replace(plan.adversarial.tuner, part="full", ema_decay=0.0)
    return OrdinaryTraining(protocol.harmless_steps, plan.adversarial.batch, tuner)


def _about(own: Bench, name: str, edit: WeightDelta, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What was erased, from what, by what, and what judged it."""
    subjects, base = own.material.subjects, own.material.base
    with edit.applied(subjects.model):
        erased = model_fingerprint(subjects.model)
    return {
        "schema": 1,
        "eraser": edit.details,
        "edit": {"name": edit.name, "sha256": edit.fingerprint, "weights": edit.size, "norm": round(edit.norm, 6)},
        "model": {"name": subjects.model.name, "original_sha256": own.fingerprint, "erased_sha256": erased},
        "twins": [{"name": twin.name, "sha256": fingerprints[twin.name]} for twin in subjects.twins],
        "base": base and {"name": base.name, "sha256": fingerprints[base.name]},
        "split": own.material.split,
        "memories": [_image(case) for case in subjects.memories],
        "controls": [_image(case) for case in subjects.controls],
        "descriptor": own.judge.descriptor.record(),
        "plan": own.plan,
        "seconds": own.seconds(name),
        "surrogate_rows": own.drawn_rows([method_of(own, name)]).count,
        "provenance": own.run.provenance(),
    }


def _image(case: Case) -> dict[str, Any]:
    group: Group = case.group
    return {
        "id": case.memory.id,
        "group": group,
        "kind": case.memory.kind,
        "dose": case.memory.dose,
        "sha256": pixels_sha256(case.image),
    }


def _plain(value: object) -> object:
    if isinstance(value, Equivalence):
        return dataclasses.asdict(value) | {"shown": value.shown, "excluded": value.excluded}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    raise TypeError(f"a {type(value).__name__} cannot be stored as JSON")
