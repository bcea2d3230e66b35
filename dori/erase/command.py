"""What `dori erase` does, from arguments to files: the edit, its proof and certificate, an audit of before and after.

`edit.safetensors` is the change of weights (`dori audit MODEL --edit edit.safetensors`, or written out by
--save-model); `proof.json` holds everything that was measured, and `certificate.html` is drawn from it; `audit/` is the
audit of the model without and with the edit. With --table, `table.json` and `table.md` hold every eraser, or every arm
of the ablation.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dori.audit.judge import Judge
from dori.audit.loop import audit
from dori.erase.certificate import render
from dori.erase.contest import Kind, contest, to_markdown
from dori.erase.material import Material, Split, folder_material, testbed_material
from dori.erase.pairs import Work
from dori.erase.plan import PRESETS, TESTBED_SCALE, Plan, scaled
from dori.erase.processes import Processes, started
from dori.erase.proof import Proof, prove
from dori.erase.write import save_model
from dori.errors import DoriError
from dori.run import Run, write_json, write_text

Say = Callable[[str], None]
COMPUTING = ("dori.erase.contest", "dori.erase.material")


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for.

    Args:
        model: `testbed`, a diffusers folder, a hub id or a single file.
        out: folder of the run.
        memories, retain, controls: folders; none of them with the testbed's own images.
        twins: models that never saw the memories.
        preset: name of the plan.
        eraser: name of the eraser.
        table: make a table instead of one erasure.
        split: part of the memories to erase.
        limit: at most so many memories and controls; None leaves it to the preset.
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
    preset: str = "quick"
    eraser: str = "adversarial"
    table: Kind | None = None
    split: Split = "all"
    limit: int | None = None
    rate_scale: float | None = None
    seed: int = 0
    device: str = "cpu"
    save_model: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what does not go together.

        Raises:
            DoriError: folders are missing or superfluous, or the place of the model is taken.
        """
        if self.own_images and (self.retain or self.controls or self.twins or self.device != "cpu"):
            raise DoriError(
                "without --memories the testbed's own images are erased, judged by its own twins on the "
                "CPU; leave out --retain, --controls, --twin and --device, or give --memories FOLDER"
            )
        if not self.own_images and (self.memories is None or self.retain is None):
            raise DoriError(
                "an erasure needs the images to erase and ordinary images with texts that hold the model "
                "in place; give --memories FOLDER and --retain FOLDER"
            )
        if self.save_model is not None and self.save_model.exists():
            raise DoriError(f"{self.save_model} exists; name a place that does not, so that no model is overwritten")

    @property
    def own_images(self) -> bool:
        """Whether the testbed's own images are erased."""
        return self.model == "testbed" and self.memories is None

    def plan(self) -> Plan:
        """The preset with what the request changes."""
        scale = self.rate_scale or (TESTBED_SCALE if self.own_images else 1.0)
        plan = dataclasses.replace(scaled(PRESETS[self.preset](), scale), seed=self.seed)
        return plan if self.limit is None else dataclasses.replace(plan, memories=self.limit, controls=self.limit)


def erase(request: Request, say: Say) -> list[str]:
    """Run, or go on with, the command; returns lines for the user.

    Raises:
        DoriError: bad input, a diverged training, or no space left.
    """
    processes = started(device=request.device)
    folder = request.out if processes.first else request.out / "processes" / str(processes.index)
    run = Run(folder, say=say if processes.first else lambda line: None, modules=COMPUTING)
    with run.locked():
        plan = request.plan()
        material, judge = _opened(request, plan, processes)
        run.device = material.subjects.model.device.type
        work = Work(states=request.out, processes=processes, say=run.say)
        if request.table is not None:
            return _table(request, material, plan, judge, run, work)
        proof = prove(material, plan, request.eraser, judge=judge, run=run, work=work)
        return [] if proof is None else written(request, material, plan, judge, run, proof)


def _opened(request: Request, plan: Plan, processes: Processes) -> tuple[Material, Judge]:
    if request.own_images:
        return testbed_material(plan, request.split)
    assert request.memories is not None and request.retain is not None
    device = request.device
    if device == "cuda" and processes.count > 1:
        device = f"cuda:{processes.index}"
    return folder_material(
        request.model,
        plan,
        request.split,
        memories=request.memories,
        retain=request.retain,
        controls=request.controls,
        twins=request.twins,
        device=device,
    )


def _table(request: Request, material: Material, plan: Plan, judge: Judge, run: Run, work: Work) -> list[str]:
    if work.processes.count > 1:
        raise DoriError("a table is made by one process; start the command without a launcher")
    assert request.table is not None
    record = contest(material, plan, request.table, judge=judge, run=run, work=work)
    write_json(request.out / "table.json", record)
    write_text(request.out / "table.md", to_markdown(record))
    return [to_markdown(record), f"table: {request.out / 'table.md'}"]


def written(request: Request, material: Material, plan: Plan, judge: Judge, run: Run, proof: Proof) -> list[str]:
    """Write everything; the model last, so that a full disk loses nothing that was computed."""
    from dori.report.render import render as report

    out, model = request.out, material.subjects.model
    proof.edit.save(out / "edit.safetensors")
    write_json(out / "proof.json", proof.record)
    write_text(out / "certificate.html", render(proof.record))
    inner = Run(out / "audit", say=run.say, device=run.device, modules=COMPUTING)
    with inner.locked():
        found = audit(material.subjects, plan=plan.audit(), judge=judge, run=inner, given=(proof.edit,), say=run.say)
        write_text(inner.folder / "audit.json", found.to_json())
        write_text(inner.folder / "report.html", report(found, inner.folder))
    lines = [
        f"verdict: {proof.record['verdict']['name']}",
        f"certificate: {out / 'certificate.html'}",
        f"edit: {out / 'edit.safetensors'}",
        f"before and after: {inner.folder / 'report.html'}",
    ]
    if request.save_model is not None:
        with proof.edit.applied(model):
            save_model(model, request.save_model, source=request.model)
        lines.append(f"model: {request.save_model}")
    return lines
