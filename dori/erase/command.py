"""What `dori erase` does, from arguments to files: the edit, its proof and certificate, an audit of before and after.

`edit.safetensors` is the change of weights (`dori audit MODEL --edit edit.safetensors`, or written out by
--save-model); `proof.json` holds everything that was measured, and `certificate.html` is drawn from it; `audit/` is the
audit of the model without and with the edit. With --table, `table.json` and `table.md` hold every eraser, every arm of
the ablation, or the frontier of removal against damage.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dori.audit.folders import OwnJudge
from dori.audit.judge import Judge, cases_sha256
from dori.audit.loop import audit
from dori.audit.schedule import planned_cost
from dori.cost import Rows, forecast, measured_speed
from dori.erase import DEFAULT
from dori.erase.cells import Bench
from dori.erase.certificate import render
from dori.erase.contest import contest, contest_costs, contestants, row_names
from dori.erase.delta import WeightDelta
from dori.erase.material import Material, Planted, Split, folder_material, testbed_material
from dori.erase.pairs import Work
from dori.erase.plan import PRESETS, TESTBED_SCALE, Plan, fitted, scaled
from dori.erase.proof import Proof, proof_costs, prove
from dori.erase.protocol import LORA_RATE
from dori.erase.tables import Kind, Table, read_table, to_markdown
from dori.erase.write import check_target, save_model
from dori.errors import DoriError
from dori.model.load import model_fingerprint
from dori.processes import Processes, started
from dori.report.render import render as report
from dori.run import Run, canonical_sha256, write_json, write_text
from dori.sampling import Sampling, sampling_of

Say = Callable[[str], None]
# Models whose own images can be erased, and their checkpoints.
TESTBEDS: dict[str, Planted] = {"testbed": "planted", "testbed-early": "early"}
COMPUTING = ("dori.erase.contest", "dori.erase.material")


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for.

    Args:
        model: `testbed` or `testbed-early`, a diffusers folder, a hub id or a single file.
        out: folder of the run.
        memories, retain, controls: folders; none of them with the testbed's own images.
        twins: models that never saw the memories.
        base: the model from which this one and the twins were trained; None without one.
        preset: name of the plan.
        eraser: name of the eraser; with a table the default alone.
        table: make a table instead of one erasure.
        rows: names of the table's rows to make, in this order; () makes all.
        take: tables of the same images and settings whose rows are taken over.
        split: part of the memories to erase.
        limit: at most so many memories and controls; None leaves it to the preset.
        budget: U-Net rows after which an adversarial erasure ends with its round; None makes all its rounds.
        lora_relearning: relearn through a LoRA too, as the full preset does.
        rate_scale: factor on all learning rates; None is 1, and the testbed's own for the testbed.
        seed: root of all random streams.
        device: of the model.
        save_model: where to write the erased model; None does not.
    """

    model: str
    out: Path
    memories: Path | None = None
    retain: Path | None = None
    controls: Path | None = None
    twins: tuple[str, ...] = ()
    base: str | None = None
    preset: str = "quick"
    eraser: str = DEFAULT
    table: Kind | None = None
    rows: tuple[str, ...] = ()
    take: tuple[Path, ...] = ()
    split: Split = "all"
    limit: int | None = None
    budget: int | None = None
    lora_relearning: bool = False
    rate_scale: float | None = None
    seed: int = 0
    device: str = "cpu"
    sampling_steps: int | None = None
    guidance_scale: float | None = None
    judge: OwnJudge = field(default_factory=OwnJudge)
    save_model: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what does not go together.

        Raises:
            DoriError: folders are missing or superfluous, a table is asked for one eraser or a row that it has not,
                or the model could not be written where it should.
        """
        if self.own_images and (self.retain or self.controls or self.twins or self.base or self.device != "cpu"):
            raise DoriError(
                "without --memories the testbed's own images are erased, judged by its own twins on the CPU; "
                "leave out --retain, --controls, --twin, --base and --device, or give --memories FOLDER"
            )
        if self.table is not None and self.base is not None:
            raise DoriError("--base is a scale of one erasure's damage, and tables have none; leave it out")
        if not self.own_images and (self.memories is None or self.retain is None):
            raise DoriError(
                "an erasure needs the images to erase and ordinary images with texts that hold the model "
                "in place; give --memories FOLDER and --retain FOLDER"
            )
        if self.save_model is not None and self.table is not None:
            raise DoriError("a table has no single model to write; leave out --save-model or --table")
        if self.table is not None and self.eraser != DEFAULT:
            raise DoriError(
                f"--table {self.table} has its own erasers and would not heed --eraser {self.eraser}; "
                "leave out --eraser or --table"
            )
        if self.budget is not None and self.table is None and not self.eraser.startswith("adversarial"):
            raise DoriError(f"--budget ends adversarial erasures, and {self.eraser} would not heed it; leave it out")
        self._check_rows()
        if self.save_model is not None:
            check_target(self.save_model, source=self.model)
            if self.out.resolve().is_relative_to(self.save_model.resolve()):
                raise DoriError(f"{self.save_model} will hold the run itself; name another place for --save-model")

    def _check_rows(self) -> None:
        if self.table is None:
            if self.rows or self.take:
                raise DoriError("--row and --take are of a table; give --table, or leave them out")
            return
        known = row_names(self.table, self.plan().adversarial)
        for name in self.rows:
            if name not in known or self.rows.count(name) > 1:
                raise DoriError(f"--row {name!r}: --table {self.table} has these, once each: {'; '.join(known)}")

    @property
    def own_images(self) -> bool:
        """Whether the testbed's own images are erased."""
        return self.model in TESTBEDS and self.memories is None

    def plan(self) -> Plan:
        """The preset with what the request changes."""
        testbed = self.model in TESTBEDS
        plan = PRESETS[self.preset]()
        if self.lora_relearning:
            protocol, tables = (dataclasses.replace(p, lora_rate=LORA_RATE) for p in (plan.protocol, plan.tables))
            plan = dataclasses.replace(plan, protocol=protocol, tables=tables)
        plan = scaled(plan, self.rate_scale or (TESTBED_SCALE if testbed else 1.0))
        plan = plan.drawn_by(
            sampling_of(
                Sampling(plan.protocol.sampling_steps, plan.protocol.guidance_scale),
                testbed=testbed,
                steps=self.sampling_steps,
                guidance_scale=self.guidance_scale,
            )
        )
        plan = dataclasses.replace(
            plan,
            seed=self.seed,
            adversarial=dataclasses.replace(plan.adversarial, budget_rows=self.budget),
            protocol=dataclasses.replace(plan.protocol, seed=self.seed),
            tables=dataclasses.replace(plan.tables, seed=self.seed),
        )
        return plan if self.limit is None else dataclasses.replace(plan, memories=self.limit, controls=self.limit)


def erase(request: Request, say: Say) -> list[str]:
    """Run, or go on with, the command; returns lines for the user.

    Raises:
        DoriError: bad input, a folder of another run, a diverged training, or no space left.
    """
    processes = started(device=request.device)
    if request.table is not None and processes.count > 1:
        raise DoriError("a table is made by one process; start the command without a launcher")
    others = {path: read_table(path) for path in request.take}
    folder = request.out if processes.first else request.out / "processes" / str(processes.index)
    run = Run(folder, say=say if processes.first else lambda line: None, modules=COMPUTING)
    with run.locked():
        plan = request.plan()
        material, judge = _opened(request, plan, processes)
        model = material.subjects.model
        run.device = model.device.type
        numbers, weights = math.prod(model.latent_shape), sum(w.numel() for w in model.unet.parameters())
        plan = fitted(plan, latent_numbers=numbers, weights=weights)
        work = Work(states=request.out, processes=processes, say=run.say)
        own = Bench(material, plan, judge, run, work, model_fingerprint(model))
        if processes.first:
            _claim(request, own)
        if request.table is not None:
            return _table(request, request.table, own, others)
        if processes.first:
            _announce(own, [*proof_costs(own, request.eraser).values(), audit_rows(own)])
        proof = prove(
            own, request.eraser, beside=audit_rows(own).weight, meanwhile=lambda edit: audited(request, own, edit)
        )
        return [] if proof is None else written(request, own, proof)


def _claim(request: Request, own: Bench) -> None:
    """Refuse a folder of another run, whose results would be overwritten.

    Twins may be added later, and where no edit is finished nothing is lost: a diverged erasure may go on elsewhere.

    Raises:
        DoriError: the folder holds another command's results, or another erasure's.
    """
    path, subjects = request.out / "erasure.json", own.material.subjects
    mine = {
        "table": request.table or "none",
        "eraser": "all" if request.table else request.eraser,
        "preset": request.preset,
        "split": request.split,
        "limit": request.limit,
        "budget": request.budget,
        "rate scale": request.rate_scale,
        "seed": request.seed,
        "sampling": [own.plan.protocol.sampling_steps, own.plan.protocol.guidance_scale],
        "judge": canonical_sha256(own.judge.record()),
        "model": own.fingerprint,
        "memories": cases_sha256(subjects.memories),
        "controls": cases_sha256(subjects.controls),
        "retain": own.material.retain.source,
    }
    mend = "name another folder with --out"
    if not path.exists():
        if (request.out / "cells").exists():
            raise DoriError(f"{request.out} holds the results of another command; {mend}")
        write_json(path, mine)
        return
    try:
        before = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DoriError(f"{path} cannot be read ({error}); {mend}") from None
    other = [name for name in mine if before.get(name) != mine[name]]
    if other and any((request.out / "cells").glob("edit*")):
        raise DoriError(f"{request.out} holds another erasure ({', '.join(other)} differ); {mend}")
    write_json(path, mine)


def _announce(own: Bench, costs: Sequence[Rows]) -> None:
    count = own.work.processes.count
    several = f"{count} processes; " if count > 1 else ""
    own.run.say(several + forecast(sum(costs, Rows()), measured_speed(own.material.subjects.model)))


def audit_rows(own: Bench) -> Rows:
    """Cost of the audit of before and after."""
    return planned_cost(own.material.subjects, own.plan.audit(), ("the edit",))


def _opened(request: Request, plan: Plan, processes: Processes) -> tuple[Material, Judge]:
    material, judge = _material(request, plan, processes)
    return material, request.judge.instead_of(judge, device=str(material.subjects.model.device))


def _material(request: Request, plan: Plan, processes: Processes) -> tuple[Material, Judge]:
    if request.own_images:
        return testbed_material(plan, request.split, checkpoint=TESTBEDS[request.model])
    assert request.memories is not None and request.retain is not None
    return folder_material(
        request.model,
        plan,
        request.split,
        memories=request.memories,
        retain=request.retain,
        controls=request.controls,
        twins=request.twins,
        base=request.base,
        device=processes.device(request.device),
    )


def _table(request: Request, kind: Kind, own: Bench, others: Mapping[Path, Table]) -> list[str]:
    path = request.out / "table.json"
    there = {entry.name for other in others.values() for entry in other.entries}
    names = request.rows or tuple(name for name in row_names(kind, own.plan.adversarial) if name not in there)
    methods = contestants(kind, own, names)
    _announce(own, list(contest_costs(own, kind, methods).values()))

    def write(table: Table) -> bool:
        longer = len(table.left) > _left(path)  # it stays until it is made again
        if not longer:
            write_json(path, dataclasses.asdict(table))
            write_text(request.out / "table.md", to_markdown(table))
        return longer

    table = contest(own, kind, methods, write, others)
    stays = " (a longer one, which stays)" if write(table) else ""
    return [to_markdown(table), f"table: {request.out / 'table.md'}{stays}"]


def _left(path: Path) -> float:
    """How many rows a stored table still lacks; infinite where there is none."""
    try:
        return len(read_table(path).left)
    except DoriError:
        return math.inf


def _rounded(own: Bench) -> str:
    judged = "half" in own.plan.protocol.roundings
    row = "the row of half precision judges it" if judged else "no row judges that; --preset full does"
    return f" (in the lower precision of the file that it came from: {row})"


def audited(request: Request, own: Bench, edit: WeightDelta) -> Path:
    """The audit of the model without and with the edit, its page written."""
    run = Run(request.out / "audit", say=own.run.say, device=own.run.device, modules=COMPUTING)
    with run.locked():
        found = audit(
            own.material.subjects, plan=own.plan.audit(), judge=own.judge, run=run, given=(edit,), say=run.say
        )
        write_text(run.folder / "audit.json", found.to_json())
        write_text(run.folder / "report.html", report(found, run.folder))
    return run.folder / "report.html"


def written(request: Request, own: Bench, proof: Proof) -> list[str]:
    """Write everything; the model last, so that a full disk loses nothing that was computed."""
    out, subjects = request.out, own.material.subjects
    proof.edit.save(out / "edit.safetensors")
    write_json(out / "proof.json", proof.record)
    write_text(out / "certificate.html", render(proof.record))
    before_and_after = audited(request, own, proof.edit)
    lines = [
        f"verdict: {proof.record['verdict']['name']}",
        f"certificate: {out / 'certificate.html'}",
        f"edit: {out / 'edit.safetensors'}",
        f"before and after: {before_and_after}",
    ]
    if request.save_model is not None:
        with proof.edit.applied(subjects.model):
            rounded = save_model(subjects.model, request.save_model, source=request.model)
        lines.append(f"model: {request.save_model}{_rounded(own) if rounded else ''}")
    return lines
