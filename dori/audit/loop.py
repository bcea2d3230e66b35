"""The audit's one loop: for every model and edit, ask every image by prompt and by trigger, and judge.

Cells (`dori.run`) make it resumable: triggers and judgements of a chunk of images are computed once and stored with
the hash of all that they depend on.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dori.attack.starts import foreign, gaussian
from dori.audit import checks
from dori.audit.edits import Edits, fingerprint, make_edits
from dori.audit.judge import Case, Judge, draw, judged
from dori.audit.plan import Plan, Start
from dori.audit.quality import ordinary_quality, quality_rows
from dori.edit import WeightMask, no_edit
from dori.findings import Audit, EditInfo, Finding, Quality, Subject
from dori.image_file import png_bytes
from dori.memory import Memory
from dori.metrics.diversity import pairwise_similarity
from dori.metrics.similarity import cosine
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run, cell_key, tensors_sha256, write_bytes
from dori.sampling import named_seed


@dataclass(frozen=True, slots=True, eq=False)
class Subjects:
    """What is audited, and what it is compared with.

    Args:
        model: the audited model.
        memories: images believed to be in it.
        controls: images that are not; empty means that no claim of storage can be made.
        ordinary: prompts that belong to neither, for statistics, foreign starts and quality.
        held_out: ordinary images in [0, 1], shape (m, 3, H, W), for the quality distances; None compares with the
            unedited model's own generations.
        twins: models that never saw the memories. They are judges only: nothing but the attack and the prompts ever
            runs on them.
    """

    model: StableDiffusion
    memories: tuple[Case, ...]
    controls: tuple[Case, ...]
    ordinary: tuple[str, ...]
    held_out: Tensor | None = None
    twins: tuple[StableDiffusion, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """A model with an edit on, the images to ask it for, and whether it is attacked."""

    model: StableDiffusion
    edit: WeightMask
    scope: str
    cases: tuple[Case, ...]
    starts: tuple[Start, ...]

    @property
    def label(self) -> str:
        """Names the setting in cells."""
        own = f".{self.cases[0].memory.id}" if self.scope == "own" else ""
        return f"{self.model.name}.{self.edit.name}{own}"


@dataclass(slots=True)
class _Loop:
    """The state of one audit: what is fixed, and the findings so far."""

    subjects: Subjects
    plan: Plan
    judge: Judge
    run: Run
    fingerprints: dict[str, str]
    findings: list[Finding] = field(default_factory=list)
    gradients: dict[str, float] = field(default_factory=dict)
    unedited: dict[tuple[str, str, int, str], Tensor] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)
    diverged: int = 0

    def ask(self, setting: Setting) -> None:
        """All ways of asking under one setting."""
        base: dict[str, object] = {"model": self.fingerprints[setting.model.name], "edit": fingerprint(setting.edit)}
        with setting.edit.applied(setting.model):
            for first in range(0, len(setting.cases), self.plan.chunk):
                chunk = setting.cases[first : first + self.plan.chunk]
                self._ask_chunk(setting, chunk, base)

    def _ask_chunk(self, setting: Setting, cases: Sequence[Case], base: dict[str, object]) -> None:
        texts = [case for case in cases if case.memory.text is not None]
        if texts:
            embeddings = setting.model.encode([case.memory.text or "" for case in texts])
            self._judge(setting, texts, embeddings, "", 0, base)
        for start in setting.starts:
            attacked = texts if start == "prompt" else list(cases)
            if not attacked:
                continue
            triggers = self._attack(setting, attacked, start, base)
            for step in self.plan.attack.snapshots or (self.plan.attack.steps,):
                if step > 0:
                    self._judge(setting, attacked, triggers[str(step)], start, step, base)

    def _attack(self, setting: Setting, cases: Sequence[Case], start: Start,
                base: dict[str, object]) -> dict[str, Tensor]:
        plan, model = self.plan, setting.model
        ids = [case.memory.id for case in cases]
        seeds = [named_seed("attack", plan.seed, start, one) for one in ids]
        targets = torch.stack([case.latent for case in cases])
        inputs = base | {"attack": plan.attack, "start": start, "ids": ids, "seeds": seeds,
                         "targets": tensors_sha256({"z": targets}), "texts": [case.memory.text for case in cases],
                         "ordinary": list(self.subjects.ordinary) if start == "foreign" else []}

        def compute() -> dict[str, Tensor]:
            found = plan.attack(model, targets, self._starts(model, cases, start), seeds=seeds)
            return {str(step): found.at(step) for step in found.steps} | {
                "losses": found.losses, "first_gradient": found.first_gradient}

        key = cell_key("triggers", setting.label, start, ids[0])
        triggers = self.run.once_tensors(key, inputs, compute)
        rows = len(cases) * plan.attack.steps * plan.attack.batch
        self.cost["attack, forward and backward"] = self.cost.get("attack, forward and backward", 0) + rows
        if setting.model is self.subjects.model and setting.edit.name == "none":
            for one, norm in zip(ids, triggers["first_gradient"].tolist(), strict=True):
                if math.isfinite(norm):  # otherwise the generations diverge too, and those are counted
                    self.gradients.setdefault(one, norm)
        return triggers

    def _starts(self, model: StableDiffusion, cases: Sequence[Case], start: Start) -> Tensor:
        seeds = [named_seed("start", self.plan.seed, start, case.memory.id) for case in cases]
        if start == "prompt":
            return model.encode([case.memory.text or "" for case in cases])
        if start == "gaussian":
            return gaussian(model, seeds)
        return torch.cat([foreign(model, self.subjects.ordinary, 1, seed=seed) for seed in seeds])

    def _judge(self, setting: Setting, cases: Sequence[Case], embeddings: Tensor, start: str, step: int,
               base: dict[str, object]) -> None:
        plan = self.plan
        ids = [case.memory.id for case in cases]
        inputs = base | {
            "embeddings": tensors_sha256({"y": embeddings}), "ids": ids, "seeds": plan.fresh_seeds(),
            "texts": [case.memory.text for case in cases],
            "boxes": [case.memory.varying_box for case in cases],
            "images": tensors_sha256({"x": torch.stack([case.image for case in cases])}),
            "steps": plan.sampling_steps, "guidance_scale": plan.guidance_scale,
            "descriptor": [self.judge.descriptor.name, self.judge.descriptor.preprocessing,
                           self.judge.descriptor.fingerprint]}
        key = cell_key("images", setting.label, start or "asked", str(step), ids[0])
        found = self.run.once_tensors(key, inputs, lambda: judged(
            self.judge, cases, draw(setting.model, plan, embeddings, plan.fresh_seeds())))
        self.cost["generation, forward"] = self.cost.get("generation, forward", 0) + self._generation_rows(len(cases))
        self.diverged += int((~found["finite"]).sum())
        for row, case in enumerate(cases):
            self._record(setting, case, start, step, {name: value[row] for name, value in found.items()}, key, row)

    def _generation_rows(self, cases: int) -> int:
        return cases * self.plan.seeds * self.plan.sampling_steps * (2 if self.plan.guidance_scale != 1 else 1)

    def _record(self, setting: Setting, case: Case, start: str, step: int, found: Mapping[str, Tensor], key: str,
                row: int) -> None:
        where = (setting.model.name, start, step, case.memory.id)
        if setting.edit.name == "none":
            self.unedited[where] = found["descriptors"]
        original = self.unedited.get(where)
        picture = f"pictures/{key}-{row:02d}.png"
        write_bytes(self.run.folder / picture, png_bytes(found["shown"].permute(2, 0, 1) / 255))
        self.findings.append(Finding(
            id=case.memory.id, group=case.group, kind=case.memory.kind, dose=case.memory.dose,
            model=setting.model.name, edit=setting.edit.name, edit_scope=setting.scope, start=start, steps=step,
            similarities=_floats(found["similarity"]),
            masked=_floats(found["masked"]) if case.memory.varying_box is not None else (),
            to_unedited=() if original is None or setting.edit.name == "none"
            else _floats(cosine(found["descriptors"], original)),
            diversity=pairwise_similarity(found["descriptors"]) if self.plan.seeds > 1 else None,
            alignment=_floats(found["alignment"]) if "alignment" in found and case.memory.text is not None else (),
            picture=picture))


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in values.tolist())


def make_cases(model: StableDiffusion, memories: Sequence[Memory], images: Tensor, group: str) -> tuple[Case, ...]:
    """Bind records to their pixels, shape (n, 3, H, W) in [0, 1], and to the model's latents of them.

    Raises:
        DoriError: the model cannot read a text as a whole.
    """
    if not memories:
        return ()
    model.check_prompts([memory.text for memory in memories if memory.text is not None])
    latents = model.to_latents(images).cpu()
    return tuple(Case(memory, group, image, latent)  # type: ignore[arg-type]
                 for memory, image, latent in zip(memories, images, latents, strict=True))


def choose(count: int, limit: int | None) -> list[int]:
    """Indices of at most `limit` of `count` items, evenly spread over their order, first and last included."""
    if limit is None or limit >= count:
        return list(range(count))
    return [round(k * (count - 1) / max(1, limit - 1)) for k in range(limit)]


def _settings(subjects: Subjects, plan: Plan, edits: Edits) -> list[Setting]:
    everything = (*subjects.memories, *subjects.controls)
    settings = [Setting(subjects.model, edit, "" if edit.name == "none" else "joint", everything, plan.starts)
                for edit in edits.joint]
    settings += [Setting(subjects.model, edit, "joint", everything, ()) for edit in edits.asked_only]
    by_id = {case.memory.id: case for case in subjects.memories}
    own_starts: tuple[Start, ...] = ("prompt",) if plan.attack_own else ()
    for table in edits.own.values():
        settings += [Setting(subjects.model, edit, "own", (by_id[one],), own_starts) for one, edit in table.items()]
    for twin in subjects.twins:
        settings.append(Setting(twin, no_edit(), "", subjects.memories, plan.starts))
    return settings


def _planned(loop: _Loop, settings: Sequence[Setting]) -> dict[str, int]:
    """Every cell to come with its cost; a backward pass counts as much again as a forward pass and a bit."""
    costs: dict[str, int] = {}
    plan = loop.plan
    snapshots = [s for s in plan.attack.snapshots or (plan.attack.steps,) if s > 0]
    for setting in settings:
        for first in range(0, len(setting.cases), plan.chunk):
            cases = setting.cases[first : first + plan.chunk]
            texts = [c for c in cases if c.memory.text is not None]
            if texts:
                key = cell_key("images", setting.label, "asked", "0", texts[0].memory.id)
                costs[key] = loop._generation_rows(len(texts))
            for start in setting.starts:
                attacked = texts if start == "prompt" else list(cases)
                if not attacked:
                    continue
                one = attacked[0].memory.id
                costs[cell_key("triggers", setting.label, start, one)] = round(
                    2.4 * len(attacked) * plan.attack.steps * plan.attack.batch)
                for step in snapshots:
                    costs[cell_key("images", setting.label, start, str(step), one)] = loop._generation_rows(
                        len(attacked))
    return costs


def audit(subjects: Subjects, *, plan: Plan, judge: Judge, run: Run,
          say: Callable[[str], None] = lambda line: None) -> Audit:
    """Run (or resume) an audit.

    Args:
        subjects: what is audited.
        plan: how.
        judge: who judges.
        run: the folder that remembers; the caller holds its lock.
        say: receives one line at a time.

    Returns:
        The audit; pictures lie in the run's folder.

    Raises:
        DoriError: an ordinary prompt is too long for the model, or no space is left in the folder.
    """
    model = subjects.model
    model.check_prompts(subjects.ordinary)  # now, not after hours of attacks
    loop = _Loop(subjects, plan, judge, run, {m.name: model_fingerprint(m) for m in (model, *subjects.twins)})
    asked = [case for case in subjects.memories if case.memory.text is not None]
    embeddings = model.encode([case.memory.text or "" for case in asked]) if asked else torch.zeros(
        0, *model.embedding_shape)
    say("computing the edits")
    ordinary = model.encode(list(subjects.ordinary[: plan.calibration_prompts]))
    edits = make_edits(model, plan, run, {"model": loop.fingerprints[model.name]},
                       [case.memory.id for case in asked], embeddings, ordinary)
    loop.cost["edits, forward"] = edits.rows
    settings = _settings(subjects, plan, edits)
    run.plan("audit", _planned(loop, settings))
    for setting in settings:
        loop.ask(setting)
    say("quality on ordinary prompts")
    quality = ordinary_quality(subjects.model, plan, judge, run, loop.fingerprints[model.name],
                               (*edits.joint, *edits.asked_only), subjects.ordinary, subjects.held_out)
    loop.cost["quality, forward"] = quality_rows(plan, quality, subjects.held_out)
    return _assemble(loop, edits, quality)


def _assemble(loop: _Loop, edits: Edits, quality: tuple[Quality, ...]) -> Audit:
    subjects, plan, descriptor = loop.subjects, loop.plan, loop.judge.descriptor
    shown = []
    for case in (*subjects.memories, *subjects.controls):
        picture = f"pictures/{cell_key('training', case.memory.id)}.png"
        write_bytes(loop.run.folder / picture, png_bytes(case.image))
        shown.append(Subject(case.memory.id, case.group, case.memory.kind, case.memory.dose, case.memory.text, picture,
                             loop.gradients.get(case.memory.id)))
    calibration = descriptor.calibration
    infos = [EditInfo(e.name, "" if e.name == "none" else "joint", e.size, e.details)
             for e in (*edits.joint, *edits.asked_only)]
    unfinished = Audit(
        model=subjects.model.name, twins=tuple(twin.name for twin in subjects.twins),
        descriptor={"name": descriptor.name, "preprocessing": descriptor.preprocessing,
                    "threshold": descriptor.threshold, "fingerprint": descriptor.fingerprint,
                    "calibration": None if calibration is None else {
                        name: getattr(calibration, name) for name in calibration.__slots__}},
        settings=_plain_settings(plan) | {"fingerprints": loop.fingerprints},
        provenance=loop.run.provenance(), cost=loop.cost, subjects=tuple(shown), edits=tuple(infos),
        findings=tuple(loop.findings), quality=quality,
        blind=checks.blind_scores(subjects.model, subjects.memories, subjects.controls), distrust=())
    return checks.with_distrust(unfinished, diverged=loop.diverged)


def _plain_settings(plan: Plan) -> dict[str, object]:
    return json.loads(json.dumps(dataclasses.asdict(plan)))
