"""The whole of an erasure: erase, judge the erased model beside the original and the twins, name the result.

Everything is a cell of the run's folder, so that a killed command goes on with the same command. The result is a plain
record, `proof.json`, from which the certificate is drawn (`dori.erase.certificate`).
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dori.audit.checks import blind_scores
from dori.audit.judge import Case, Judge, pixels_sha256
from dori.erase.battery import Battery, State
from dori.erase.cells import Bench, bench
from dori.erase.damage import Damage, Gauge, neighbours
from dori.erase.delta import WeightDelta
from dori.erase.equivalence import Equivalence
from dori.erase.erasers import eraser
from dori.erase.material import Material
from dori.erase.ordinary import OrdinaryTraining
from dori.erase.outcomes import Outcome
from dori.erase.pairs import Forget, Work
from dori.erase.plan import Plan
from dori.erase.protocol import Protocol
from dori.erase.tuning import Tuner
from dori.erase.verdict import ERASED, ORIGINAL, Verdict, verdict
from dori.findings import Group
from dori.model.load import model_fingerprint
from dori.run import Run, cell_key

ORDINARY = "ordinary training"


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
    """The plan's protocol; without a twin there are at least three restarts of each attack."""
    restarts = plan.protocol.restarts if twins else max(3, plan.protocol.restarts)
    return dataclasses.replace(plan.protocol, restarts=restarts)


def states_of(material: Material, edit: WeightDelta, harmless: WeightDelta | None, protocol: Protocol) -> list[State]:
    """The original, the erased model and its altered forms, the twins."""
    model = material.subjects.model
    found = [State(ORIGINAL, model), State(ERASED, model, (edit,))]
    found += [State(f"{ERASED}, {rounding}", model, (edit,), rounding, whole=False) for rounding in protocol.roundings]
    if harmless is not None:
        found.append(State(f"{ERASED}, {protocol.harmless_steps} harmless steps", model, (edit, harmless), whole=False))
    return found + [State(twin.name, twin) for twin in material.subjects.twins]


def prove(material: Material, plan: Plan, name: str, *, judge: Judge, run: Run, work: Work) -> Proof | None:
    """Erase, or go on erasing, and judge.

    Args:
        material: what is erased and what judges it.
        plan: all settings.
        name: of the eraser, in `dori.erase.ERASERS`.
        judge: whose descriptor decides.
        run: the folder that remembers; the caller holds its lock.
        work: processes and progress.

    Returns:
        The proof; None in processes that only helped to erase.
    """
    subjects = material.subjects
    protocol = judged_protocol(plan, twins=bool(subjects.twins))
    own = bench(material, plan, judge, run, work)
    method = eraser(
        name, adversarial=plan.adversarial, timesteps=subjects.model.timesteps, sampling_steps=protocol.sampling_steps
    )
    battery = Battery(protocol, judge, run, material.prompts.proving, {})
    gauge = gauge_of(material, plan, judge, run, protocol)
    placeholder = WeightDelta(name, {})
    planned = states_of(material, placeholder, placeholder if protocol.harmless_steps else None, protocol)
    cases = (*subjects.memories, *subjects.controls)
    costs = {
        cell_key("edit", name): _edit_rows(plan, len(subjects.memories)),
        cell_key("edit", ORDINARY): _ordinary_rows(plan),
    }
    for state in planned:
        costs |= battery.costs(state, cases)
    twins = [state for state in planned if state.model is not subjects.model]
    run.plan("erase", costs | gauge.cells([*planned[:2], State(ORDINARY, subjects.model), *twins]))
    forget = own.forget()
    edit = own.edit(name, method, forget)
    if not work.processes.first:
        return None
    alone = dataclasses.replace(own, work=Work(say=work.say))
    harmless = None
    if protocol.harmless_steps:
        trained = OrdinaryTraining(protocol.harmless_steps, plan.adversarial.batch, _full(plan))
        harmless = alone.edit("harmless", trained, forget, on=edit)
    states = states_of(material, edit, harmless, protocol)
    outcomes = [outcome for state in states for outcome in battery.measure(state, cases)]
    damage = _damage(alone, gauge, states, edit, forget=forget, battery=battery)
    blind = blind_scores(subjects.model, subjects.memories, subjects.controls)
    found = verdict(outcomes, protocol, twins=[twin.name for twin in subjects.twins], blind=blind)
    return Proof(
        edit, _record(own, name, edit, found=found, outcomes=outcomes, protocol=protocol, damage=damage, blind=blind)
    )


def _full(plan: Plan) -> Tuner:
    return dataclasses.replace(plan.adversarial.tuner, part="full", ema_decay=0.0)


def _edit_rows(plan: Plan, memories: int) -> int:
    """About as many forward rows as the adversarial erasure takes."""
    a = plan.adversarial
    searching = 2.4 * len(a.starts) * memories * a.attack.steps * a.attack.batch
    return round(a.rounds * (searching + 6 * a.steps_per_round * a.batch))


def _ordinary_rows(plan: Plan) -> int:
    a = plan.adversarial
    return 3 * a.rounds * a.steps_per_round * a.batch


def gauge_of(material: Material, plan: Plan, judge: Judge, run: Run, protocol: Protocol) -> Gauge:
    """The gauge of damage for this material."""
    model, uses = material.subjects.model, material.prompts
    texts = [case.memory.text for case in material.subjects.memories if case.memory.text]
    near = tuple(
        text
        for text in neighbours(texts, uses.quality, each=plan.neighbours, seed=plan.seed)
        if len(model.tokenizer(text).input_ids) <= model.context_length
    )
    return Gauge(
        judge,
        run,
        uses.quality,
        near,
        material.pictures,
        material.held_out,
        protocol.sampling_steps,
        protocol.guidance_scale,
        plan.seed,
    )


def _damage(
    own: Bench, gauge: Gauge, states: list[State], edit: WeightDelta, *, forget: Forget, battery: Battery
) -> tuple[Damage, ...]:
    """The damage of the erasure beside ordinary training for the same steps and the twins."""
    a, model = own.plan.adversarial, own.material.subjects.model
    trained = own.edit(ORDINARY, OrdinaryTraining(a.rounds * a.steps_per_round, a.batch, _full(own.plan)), forget)
    twins = [state for state in states if state.model is not model]
    return gauge.measure([*states[:2], State(ORDINARY, model, (trained,)), *twins], battery.fingerprints)


def _record(
    own: Bench,
    name: str,
    edit: WeightDelta,
    *,
    found: Verdict,
    outcomes: list[Outcome],
    protocol: Protocol,
    damage: tuple[Damage, ...],
    blind: Mapping[str, float],
) -> dict[str, Any]:
    subjects, material = own.material.subjects, own.material
    with edit.applied(subjects.model):
        erased = model_fingerprint(subjects.model)
    record = {
        "schema": 1,
        "verdict": found,
        "eraser": edit.details,
        "edit": {"name": edit.name, "sha256": edit.fingerprint, "weights": edit.size, "norm": round(edit.norm, 6)},
        "model": {"name": subjects.model.name, "original_sha256": own.fingerprint, "erased_sha256": erased},
        "twins": [twin.name for twin in subjects.twins],
        "split": material.split,
        "memories": [_image(case) for case in subjects.memories],
        "controls": [_image(case) for case in subjects.controls],
        "descriptor": own.judge.descriptor.record(),
        "protocol": protocol,
        "plan": own.plan,
        "blind": blind,
        "damage": damage,
        "outcomes": outcomes,
        "seconds": own.seconds(name),
        "provenance": own.run.provenance(),
    }
    return json.loads(json.dumps(record, default=_plain, sort_keys=True))  # as it will be read again


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
