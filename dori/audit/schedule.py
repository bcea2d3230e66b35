"""What an audit asks and what it costs, known before anything is computed: one list for the loop and the progress."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dori.attack.dori import Dori
from dori.audit.edits import Names, edit_cells, edit_names
from dori.audit.judge import Case
from dori.audit.plan import Plan, Start
from dori.audit.quality import quality_cells
from dori.cost import Rows, drawn
from dori.errors import DoriError
from dori.model.stable_diffusion import StableDiffusion
from dori.run import cell_key
from dori.stats import choose

# Stages of the cost, as reports name them.
EDITS, ATTACK, DRAWN, QUALITY = (
    "edits, forward",
    "attack, forward and backward",
    "generation, forward",
    "quality, forward",
)


@dataclass(frozen=True, slots=True, eq=False)
class Subjects:
    """What is audited, and what it is compared with.

    Args:
        model: the audited model.
        memories: images believed to be in it; a plan may audit some of them.
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


def audited(subjects: Subjects, plan: Plan) -> Subjects:
    """The subjects with the images that the plan takes; of those seen once, some only if the others do not suffice."""
    often = [case for case in subjects.memories if case.memory.kind != "once"]
    pool = subjects.memories if plan.memories is None or len(often) < plan.memories else often
    return replace(
        subjects,
        memories=tuple(pool[k] for k in choose(len(pool), plan.memories)),
        controls=tuple(subjects.controls[k] for k in choose(len(subjects.controls), plan.controls)),
    )


def asking(subjects: Subjects, plan: Plan) -> Plan:
    """The plan, or one that asks for an image without a text as well.

    Where a memory or a control has none, attacks begin from Gaussian embeddings and other prompts too, on everything
    that is attacked at all, so that memories, controls and twins are asked in the same way.
    """
    if all(case.memory.text is not None for case in (*subjects.memories, *subjects.controls)):
        return plan
    starts = plan.starts

    def more(own: tuple[Start, ...]) -> tuple[Start, ...]:
        others: tuple[Start, ...] = ("gaussian", "foreign")
        return (*own, *(start for start in others if start not in own)) if own else own

    return replace(
        plan,
        starts=replace(
            starts,
            memories=more(starts.memories),
            controls=more(starts.controls),
            edited=more(starts.edited),
            once=more(starts.once),
            twins=more(starts.twins),
        ),
    )


@dataclass(frozen=True, slots=True)
class Prompts:
    """Ordinary prompts by use; those of quality serve nothing else, so that no edit is tuned on what judges it.

    Args:
        calibration: for NeMo's statistics.
        foreign: where attacks from another prompt begin; those of the calibration are among them.
        quality: for the quality table.
        short: one sentence if there are fewer than the plan wants, else empty.
    """

    calibration: tuple[str, ...]
    foreign: tuple[str, ...]
    quality: tuple[str, ...]
    short: str


def ordinary_prompts(subjects: Subjects, plan: Plan) -> Prompts:
    """Divide the ordinary prompts: different texts, none of them a memory's or a control's.

    Too few are shared out in proportion to what the plan wants.

    Raises:
        DoriError: none is left for something that the plan needs.
    """
    taken = {case.memory.text for case in (*subjects.memories, *subjects.controls)}
    free = [text for text in dict.fromkeys(subjects.ordinary) if text not in taken]
    wanted = plan.calibration_prompts + plan.quality_prompts
    count = min(plan.quality_prompts, len(free) * plan.quality_prompts // max(1, wanted))
    quality, others = free[:count], free[count:]
    calibration = others[: plan.calibration_prompts]
    starts = {
        start
        for group in (plan.starts.memories, plan.starts.controls, plan.starts.twins, plan.starts.own)
        for start in group
    }
    if (plan.nemo is not None and len(calibration) < 2) or ("foreign" in starts and not others):
        raise DoriError(
            f"{len(free)} different ordinary prompts, none of them a memory's or a control's, are too few; "
            f"give {wanted}, or leave out --ordinary to take Dori's own"
        )
    short = (
        ""
        if len(free) >= wanted
        else (
            f"Only {len(free)} ordinary prompts for {wanted} places: {len(calibration)} serve NeMo's statistics and "
            f"{len(quality)} other ones the quality table."
        )
    )
    return Prompts(tuple(calibration), tuple(others), tuple(quality), short)


# --------------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """A model with an edit on, the images to ask it for, and where the attacks on them begin.

    `scope` is "joint", "own" (the edit of the one case), or empty without an edit.
    """

    model: StableDiffusion
    edit: str
    scope: str
    cases: tuple[Case, ...]
    starts: tuple[Start, ...]

    @property
    def label(self) -> str:
        """Names the setting in cells."""
        own = f".{self.cases[0].memory.id}" if self.scope == "own" else ""
        return f"{self.model.name}.{self.edit}{own}"


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One way of asking for a chunk of images.

    Args:
        setting: the model with its edit.
        cases: the chunk.
        start: where the attack begins; "" is the prompt itself without one.
        attack: the attack, as long as it is on these images.
        judged: steps and number of seeds each.
    """

    setting: Setting
    cases: tuple[Case, ...]
    start: str
    attack: Dori
    judged: tuple[tuple[int, int], ...]

    @property
    def triggers_key(self) -> str:
        """The cell of the attack."""
        return cell_key("triggers", self.setting.label, self.start, self.cases[0].memory.id)

    def images_key(self, step: int) -> str:
        """The cell of the judged generations."""
        return cell_key("images", self.setting.label, self.start or "asked", str(step), self.cases[0].memory.id)


def settings(subjects: Subjects, plan: Plan, names: Names) -> list[Setting]:
    """Every setting in the order of the loop: without an edit first."""
    model, starts = subjects.model, plan.starts
    once = tuple(case for case in subjects.memories if case.memory.kind == "once")
    memories = tuple(case for case in subjects.memories if case not in once)
    found = [Setting(model, "none", "", once, starts.once)]
    for edit in (*names.joint, *names.asked_only):
        scope, taken = "" if edit == "none" else "joint", starts.edited if edit in names.joint else ()
        found += [
            Setting(model, edit, scope, cases, tuple(s for s in own if edit == "none" or s in taken))
            for cases, own in ((memories, starts.memories), (subjects.controls, starts.controls))
        ]
    prompted = [case for case in memories if case.memory.text is not None]
    found += [Setting(model, edit, "own", (case,), starts.own) for edit in names.own for case in prompted]
    found += [Setting(twin, "none", "", memories, starts.twins) for twin in subjects.twins]
    return [setting for setting in found if setting.cases]


def asks(setting: Setting, plan: Plan) -> Iterator[Ask]:
    """All ways of asking under one setting, chunk by chunk."""
    for cases in _chunks(setting.cases, plan):
        texts = tuple(case for case in cases if case.memory.text is not None)
        if texts:
            yield Ask(setting, texts, "", plan.attack, ((0, plan.seeds),))
        for start in setting.starts:
            if start == "prompt":
                yield from _from_prompt(setting, plan, texts)
            else:
                yield Ask(setting, cases, start, plan.attack, tuple(_judged(setting, plan, start, plan.attack)))


def _chunks(cases: tuple[Case, ...], plan: Plan) -> Iterator[tuple[Case, ...]]:
    for first in range(0, len(cases), plan.chunk):
        yield cases[first : first + plan.chunk]


def _from_prompt(setting: Setting, plan: Plan, texts: tuple[Case, ...]) -> Iterator[Ask]:
    """Attacks from the prompt: long ones on some of the images, the usual one on the others."""
    alone = setting.scope == "own" or setting.cases[0].memory.kind == "once"
    count = plan.long_images if plan.long_steps and not alone else 0
    long = {setting.cases[k].memory.id for k in choose(len(setting.cases), count)}
    attack = further = plan.attack
    if long:
        steps = (*(attack.snapshots or (attack.steps,)), *plan.long_steps)
        further = replace(attack, steps=steps[-1], snapshots=steps)
    for cases, chosen in (
        (tuple(case for case in texts if case.memory.id not in long), attack),
        (tuple(case for case in texts if case.memory.id in long), further),
    ):
        if cases:
            yield Ask(setting, cases, "prompt", chosen, tuple(_judged(setting, plan, "prompt", chosen)))


def _judged(setting: Setting, plan: Plan, start: Start, attack: Dori) -> Iterator[tuple[int, int]]:
    """Steps and seeds. The prompt itself is asked anyway, other starts are step 0; own edits are judged at the end."""
    last = plan.attack.steps
    for step in attack.snapshots or (last,):
        if step == last:
            yield step, plan.seeds
        elif setting.scope != "own" and not (start == "prompt" and step == 0):
            yield step, min(plan.seeds, plan.curve_seeds or plan.seeds)


# --------------------------------------------------------------------------------------------------- what it costs


def attack_rows(plan: Plan, ask: Ask) -> int:
    """U-Net rows, forward and backward, of the attacks of one ask."""
    return len(ask.cases) * plan.restarts * ask.attack.steps * ask.attack.batch if ask.start else 0


def drawn_rows(plan: Plan, images: int) -> int:
    """U-Net rows of so many generations."""
    return drawn(images, sampling_steps=plan.sampling_steps, guidance_scale=plan.guidance_scale).forward


def planned_cells(whole: Subjects, plan: Plan, given: Sequence[str] = ()) -> dict[str, dict[str, int]]:
    """Stage to cell to U-Net rows: exact but for NeMo's searches, see `edit_cells`.

    Args:
        whole: all images that were given.
        plan: the plan.
        given: names of edits given from outside.
    """
    subjects = audited(whole, plan)
    plan = asking(subjects, plan)
    prompts = ordinary_prompts(whole, plan)
    ids = list(memory_prompts(subjects))
    names = edit_names(plan, prompted=len(ids), given=given)
    cells: dict[str, dict[str, int]] = {
        EDITS: edit_cells(subjects.model, plan, ids, len(prompts.calibration)),
        ATTACK: {},
        DRAWN: {},
        QUALITY: {
            key: drawn_rows(plan, images)
            for key, images in quality_cells(
                (*names.joint, *names.asked_only), len(prompts.quality), held_out=subjects.held_out is not None
            ).items()
        },
    }
    for setting in settings(subjects, plan, names):
        for ask in asks(setting, plan):
            if ask.start:
                cells[ATTACK][ask.triggers_key] = attack_rows(plan, ask)
            cells[DRAWN] |= {
                ask.images_key(step): drawn_rows(plan, len(ask.cases) * seeds) for step, seeds in ask.judged
            }
    return cells


def weights(cells: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Every cell of `planned_cells` with its weight in the forecast of the time."""
    return {
        key: (Rows(attacked=rows) if stage == ATTACK else Rows(rows)).weight
        for stage, part in cells.items()
        for key, rows in part.items()
    }


def memory_prompts(subjects: Subjects) -> dict[str, str]:
    """Id to prompt of the memories for which edits are made: those with a text, but for images seen once."""
    return {
        case.memory.id: case.memory.text
        for case in subjects.memories
        if case.memory.text is not None and case.memory.kind != "once"
    }


def planned_rows(whole: Subjects, plan: Plan, given: Sequence[str] = ()) -> dict[str, int]:
    """U-Net rows by stage, as `planned_cells`."""
    return {stage: sum(cells.values()) for stage, cells in planned_cells(whole, plan, given).items()}


def planned_cost(whole: Subjects, plan: Plan, given: Sequence[str] = ()) -> Rows:
    """All rows, as `planned_cells`."""
    stages = planned_rows(whole, plan, given)
    attacked = stages.pop(ATTACK)
    return Rows(sum(stages.values()), attacked)
