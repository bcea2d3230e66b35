"""The audit's one loop: for every model and edit, ask every image by prompt and by trigger, and judge.

Cells (`dori.run`) make it resumable: triggers and judgements of a chunk of images are computed once and stored with
the hash of all that they depend on: pixels, texts, seeds and settings, never rounded numbers, so that another number
of threads gives the same cells.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dori.attack.dori import restarts
from dori.attack.starts import foreign, gaussian
from dori.audit import checks
from dori.audit import schedule as planned
from dori.audit.edits import Edits, Names, edit_names, make_edits
from dori.audit.judge import Case, Judge, draw, judged, pixels_sha256
from dori.audit.plan import Plan
from dori.audit.quality import ordinary_quality
from dori.audit.schedule import Ask, Prompts, Setting, Subjects
from dori.edit import Edit
from dori.errors import DoriError
from dori.findings import Audit, Finding, Quality, Subject
from dori.image_file import png_bytes
from dori.memory import Memory
from dori.metrics.diversity import pairwise_similarity
from dori.metrics.similarity import cosine
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run, canonical_sha256, cell_key, write_bytes
from dori.sampling import named_seed

__all__ = ["Subjects", "audit", "make_cases"]
NO_CLIP = (
    "No CLIP was given (--clip FOLDER): alignment of image and prompt was not measured, and quality only by the "
    "copy descriptor's features."
)


@dataclass(slots=True)
class _Loop:
    """The state of one audit: what is fixed, and the findings so far."""

    subjects: Subjects
    plan: Plan
    prompts: Prompts
    judge: Judge
    run: Run
    fingerprints: dict[str, str]
    judged_by: Mapping[str, object]
    findings: list[Finding] = field(default_factory=list)
    gradients: dict[str, float] = field(default_factory=dict)
    unedited: dict[tuple[str, str, int, str], Tensor] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)
    diverged: int = 0

    def ask(self, setting: Setting, edit: Edit) -> None:
        """All ways of asking under one setting."""
        base: dict[str, object] = {"model": self.fingerprints[setting.model.name], "edit": edit.fingerprint}
        with edit.applied(setting.model):
            for ask in planned.asks(setting, self.plan):
                self._ask(ask, base)

    def _ask(self, ask: Ask, base: Mapping[str, object]) -> None:
        texts = [case.memory.text for case in ask.cases]
        if not ask.start:
            embeddings = ask.setting.model.encode([text or "" for text in texts])
            self._judge(ask, embeddings, (0, self.plan.seeds), base={**base, "asked": texts})
            return
        inputs = {**base, **self._attack_inputs(ask)}
        triggers = self._attack(ask, inputs)
        for step, seeds in ask.judged:
            self._judge(ask, triggers[str(step)], (step, seeds), base={**base, "attack": inputs, "step": step})

    def _attack_inputs(self, ask: Ask) -> dict[str, Any]:
        plan, ids = self.plan, [case.memory.id for case in ask.cases]
        return {
            "attack": ask.attack,
            "restarts": plan.restarts,
            "start": ask.start,
            "ids": ids,
            "seeds": [named_seed("attack", plan.seed, ask.start, one) for one in ids],
            "start_seeds": [[self._start_seed(ask, one, k) for one in ids] for k in range(plan.restarts)],
            "images": pixels_sha256(torch.stack([case.image for case in ask.cases])),
            "texts": [case.memory.text for case in ask.cases],
            "ordinary": canonical_sha256(self.prompts.foreign) if ask.start == "foreign" else "",
        }

    def _start_seed(self, ask: Ask, one: str, restart: int) -> int:
        return named_seed("start", self.plan.seed, ask.start, one, *([restart] if restart else []))

    def _attack(self, ask: Ask, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        plan, model = self.plan, ask.setting.model

        def compute() -> dict[str, Tensor]:
            found = restarts(
                ask.attack,
                model,
                torch.stack([case.latent for case in ask.cases]),
                [self._starts(ask, seeds) for seeds in inputs["start_seeds"]],
                seeds=inputs["seeds"],
            )
            return {str(step): found.at(step) for step in found.steps} | {
                "losses": found.losses,
                "first_gradient": found.first_gradient,
            }

        triggers = self.run.once_tensors(ask.triggers_key, inputs, compute)
        self._count(planned.ATTACK, planned.attack_rows(plan, ask))
        if model is self.subjects.model and ask.setting.edit == "none":
            for one, norm in zip(inputs["ids"], triggers["first_gradient"].tolist(), strict=True):
                if math.isfinite(norm):  # otherwise the generations diverge too, and those are counted
                    self.gradients.setdefault(one, norm)
        return triggers

    def _count(self, stage: str, rows: int) -> None:
        self.cost[stage] = self.cost.get(stage, 0) + rows

    def _starts(self, ask: Ask, seeds: Sequence[int]) -> Tensor:
        model = ask.setting.model
        if ask.start == "prompt":
            return model.encode([case.memory.text or "" for case in ask.cases])
        if ask.start == "gaussian":
            return gaussian(model, seeds)
        return torch.cat([foreign(model, self.prompts.foreign, 1, seed=seed) for seed in seeds])

    def _judge(
        self, ask: Ask, embeddings: Tensor, step_and_seeds: tuple[int, int], *, base: Mapping[str, object]
    ) -> None:
        plan, (step, count), model = self.plan, step_and_seeds, ask.setting.model
        seeds = plan.fresh_seeds()[:count]
        inputs = {
            **base,
            "judge": self.judged_by,
            "ids": [case.memory.id for case in ask.cases],
            "seeds": seeds,
            "texts": [case.memory.text for case in ask.cases],
            "boxes": [case.memory.varying_box for case in ask.cases],
            "images": pixels_sha256(torch.stack([case.image for case in ask.cases])),
            "steps": plan.sampling_steps,
            "guidance_scale": plan.guidance_scale,
        }
        key = ask.images_key(step)
        found = self.run.once_tensors(
            key, inputs, lambda: judged(self.judge, ask.cases, draw(model, plan, embeddings, seeds))
        )
        self._count(planned.DRAWN, planned.drawn_rows(plan, len(ask.cases) * count))
        self.diverged += int((~found["finite"]).sum())
        for row, case in enumerate(ask.cases):
            picture = f"pictures/{key}-{row:02d}.png"
            write_bytes(self.run.folder / picture, png_bytes(found["shown"][row].permute(2, 0, 1) / 255))
            self._record(ask, case, step, found={name: value[row] for name, value in found.items()}, picture=picture)

    def _record(self, ask: Ask, case: Case, step: int, *, found: Mapping[str, Tensor], picture: str) -> None:
        setting = ask.setting
        where = (setting.model.name, ask.start, step, case.memory.id)
        if setting.edit == "none":
            self.unedited[where] = found["descriptors"]
        original = self.unedited.get(where) if setting.edit != "none" else None
        self.findings.append(
            Finding(
                id=case.memory.id,
                group=case.group,
                kind=case.memory.kind,
                dose=case.memory.dose,
                model=setting.model.name,
                edit=setting.edit,
                edit_scope=setting.scope,
                start=ask.start,
                steps=step,
                similarities=_floats(found["similarity"]),
                masked=_floats(found["masked"]) if case.memory.varying_box is not None else (),
                to_unedited=() if original is None else _floats(cosine(found["descriptors"], original)),
                diversity=pairwise_similarity(found["descriptors"]) if len(found["descriptors"]) > 1 else None,
                alignment=_floats(found["alignment"]) if "alignment" in found and case.memory.text is not None else (),
                picture=picture,
            )
        )

    def blind(self, whole: Subjects) -> dict[str, float]:
        """Scores that look at no model, over all images that were given and not only over the audited ones."""
        cases = (*whole.memories, *whole.controls)
        inputs = {
            "model": self.fingerprints[whole.model.name],
            "groups": [case.group for case in cases],
            "texts": [case.memory.text for case in cases],
            "kinds": [case.memory.kind for case in cases],
            "images": pixels_sha256(torch.stack([case.image for case in cases])) if cases else "",
        }
        return self.run.once_record(
            "blind",
            inputs,
            lambda: {"scores": checks.blind_scores_by_kind(whole.model, whole.memories, whole.controls)},
        )["scores"]


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
    return tuple(
        Case(memory, group, image, latent)  # type: ignore[arg-type]
        for memory, image, latent in zip(memories, images, latents, strict=True)
    )


def audit(
    subjects: Subjects,
    *,
    plan: Plan,
    judge: Judge,
    run: Run,
    given: Sequence[Edit] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Audit:
    """Run (or resume) an audit.

    Args:
        subjects: what is audited.
        plan: how.
        judge: who judges.
        run: the folder that remembers; the caller holds its lock.
        given: edits made elsewhere, audited beside those of the plan; each with a name of its own.
        say: receives one line at a time.

    Returns:
        The audit; pictures and edits lie in the run's folder.

    Raises:
        DoriError: an ordinary prompt is too long for the model or there are too few, a given edit does not fit the
            model or bears the name of another one, or no space is left in the folder.
    """
    whole, subjects, others = subjects, planned.audited(subjects, plan), tuple(edit.name for edit in given)
    plan, model, run.device = planned.asking(subjects, plan), subjects.model, subjects.model.device.type
    prompts = planned.ordinary_prompts(whole, plan)
    model.check_prompts([*prompts.foreign, *prompts.quality])  # now, not after hours of attacks
    if prompts.short:
        say(prompts.short)
    wanted = planned.memory_prompts(subjects)
    names = edit_names(plan, prompted=len(wanted), given=others)
    _check_given(model, given, names)
    cells = planned.planned_cells(whole, plan, others)
    run.plan("audit", planned.weights(cells))
    fingerprints = {m.name: model_fingerprint(m) for m in (model, *subjects.twins)}
    loop = _Loop(subjects, plan, prompts, judge, run, fingerprints, judge.record())
    base = {"model": loop.fingerprints[model.name]}
    edits = make_edits(model, plan, run, base=base, prompts=wanted, ordinary=prompts.calibration, given=given)
    edits.save(run.folder / "edits", but=("none", *others))
    loop.cost[planned.EDITS] = edits.rows
    for setting in planned.settings(subjects, plan, names):
        own = setting.scope == "own"
        loop.ask(setting, edits.own[setting.edit][setting.cases[0].memory.id] if own else edits.joint[setting.edit])
    quality = ordinary_quality(
        model,
        plan,
        judge,
        run,
        base={**base, "judge": loop.judged_by},
        edits=list(edits.joint.values()),
        prompts=prompts.quality,
        held_out=subjects.held_out,
    )
    loop.cost[planned.QUALITY] = sum(cells[planned.QUALITY].values())
    return _assemble(loop, whole, edits=edits, quality=quality)


def _check_given(model: StableDiffusion, given: Sequence[Edit], names: Names) -> None:
    everything = [*names.joint, *names.asked_only]
    for edit in given:
        if everything.count(edit.name) > 1:
            raise DoriError(
                f"the given edit {edit.name!r} bears the name of another edit of this audit; rename its file"
            )
        with edit.applied(model):  # refuses what does not fit
            pass


def _assemble(loop: _Loop, whole: Subjects, *, edits: Edits, quality: tuple[Quality, ...]) -> Audit:
    subjects = loop.subjects
    shown = []
    for case in (*subjects.memories, *subjects.controls):
        picture = f"pictures/{cell_key('training', case.memory.id)}.png"
        write_bytes(loop.run.folder / picture, png_bytes(case.image))
        shown.append(
            Subject(
                case.memory.id,
                case.group,
                case.memory.kind,
                case.memory.dose,
                case.memory.text,
                picture,
                loop.gradients.get(case.memory.id),
                pixels_sha256(case.image),
            )
        )
    unfinished = Audit(
        model=subjects.model.name,
        twins=tuple(twin.name for twin in subjects.twins),
        descriptor=loop.judge.descriptor.record(),
        settings=_settings(loop, whole),
        provenance=loop.run.provenance(),
        cost=loop.cost,
        subjects=tuple(shown),
        edits=edits.infos(),
        findings=tuple(loop.findings),
        quality=quality,
        blind=loop.blind(whole),
        distrust=(),
    )
    found = checks.with_distrust(unfinished, diverged=loop.diverged)
    more = ([loop.prompts.short] if loop.prompts.short else []) + ([NO_CLIP] if loop.judge.clip is None else [])
    return dataclasses.replace(found, distrust=(*found.distrust, *more))


def _settings(loop: _Loop, whole: Subjects) -> dict[str, object]:
    pairs = {"memories": (loop.subjects.memories, whole.memories), "controls": (loop.subjects.controls, whole.controls)}
    images = {name: {"audited": len(some), "given": len(every)} for name, (some, every) in pairs.items()}
    plan: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(loop.plan)))
    return plan | {"fingerprints": loop.fingerprints, "images": images, "judge": loop.judged_by}
