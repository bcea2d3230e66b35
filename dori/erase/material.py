"""What is erased and what judges it, from the testbed or from a user's folders.

Ordinary prompts are divided by use: those from which the erasure's attacks may begin, those of the proof's attacks, and
those of the damage table. Ordinary pairs are divided into those that are trained on and those held out.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dori.audit.folders import folder_subjects
from dori.audit.judge import Case, Judge, pixels_sha256
from dori.audit.schedule import Subjects
from dori.erase.decide import deciding_pairs, limit
from dori.erase.pairs import Pairs
from dori.erase.plan import Plan
from dori.errors import DoriError
from dori.memory import Memory, load_images, read_memories
from dori.metrics.similarity import Descriptor
from dori.model.stable_diffusion import StableDiffusion
from dori.model.twins import load_base
from dori.prompts import ordinary_prompts
from dori.run import canonical_sha256
from dori.stats import choose

Split = Literal["all", "tune", "test"]
Planted = Literal["planted", "early"]
RETAIN_SEED, HELD_OUT_SEED = 5, 6  # seeds 0 to 2 of the testbed's ordinary pairs serve audit and verify
APART = "leave it out of one of the folders"
NAMED = 20  # further copies that a refusal names
ATTACKS = 64  # ordinary prompts from which attacks may begin, for the erasure and for the proof


@dataclass(frozen=True, slots=True)
class Uses:
    """Ordinary prompts by use; none serves two.

    Args:
        erasing: from which the erasure's attacks may begin.
        proving: from which the proof's attacks may begin.
        quality: of the damage table.
    """

    erasing: tuple[str, ...]
    proving: tuple[str, ...]
    quality: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """Everything that an erasure and its proof look at.

    Args:
        subjects: model, memories to erase, controls, twins, as an audit has them. Twins only judge.
        retain: ordinary pairs to train on.
        held_out: ordinary pairs that nothing is trained on.
        pictures: their images in [0, 1], shape (m, 3, H, W).
        prompts: ordinary prompts by use.
        split: which part of the given memories is erased.
        base: the model from which this one and its twins were trained, whose drift from it is a scale of damage; None
            where there is none.
    """

    subjects: Subjects
    retain: Pairs
    held_out: Pairs
    pictures: Tensor
    prompts: Uses
    split: Split
    base: StableDiffusion | None = None


def of_split(cases: Sequence[Case], split: Split) -> tuple[Case, ...]:
    """All of the memories, or every other one: those of even position to tune settings on, the others to test."""
    return {"all": tuple(cases), "tune": tuple(cases[::2]), "test": tuple(cases[1::2])}[split]


def taken(subjects: Subjects, plan: Plan, split: Split) -> Subjects:
    """The subjects with the memories of the split, at most as many images as planned, and none seen once."""
    often = [case for case in subjects.memories if case.memory.kind != "once"] or list(subjects.memories)
    part = of_split(often, split)
    if not part:
        raise DoriError(f"the split {split!r} of {len(often)} memories is empty; give more memories or --split all")
    return dataclasses.replace(
        subjects,
        memories=tuple(part[k] for k in choose(len(part), plan.memories)),
        controls=tuple(subjects.controls[k] for k in choose(len(subjects.controls), plan.controls)),
    )


def divided(prompts: Sequence[str], subjects: Subjects, quality: int) -> Uses:
    """Prompts for the damage table, which takes the first ones, and for the erasure's and the proof's attacks.

    Raises:
        DoriError: too few prompts that are no memory's or control's.
    """
    used = {case.memory.text for case in (*subjects.memories, *subjects.controls)}
    free = [text for text in dict.fromkeys(prompts) if text not in used]
    attacks = min(ATTACKS, len(free) // 4)
    if attacks < 1 or len(free) - 2 * attacks < 2:
        raise DoriError(
            f"{len(free)} ordinary prompts that belong to no memory are too few; give more texts in --retain"
        )
    count = min(quality, len(free) - 2 * attacks)
    others = free[count:]
    return Uses(tuple(others[:attacks]), tuple(others[attacks : 2 * attacks]), tuple(free[:count]))


def pairs_of(model: StableDiffusion, texts: Sequence[str], images: Tensor) -> Pairs:
    """Images, shape (n, 3, H, W) in [0, 1], with their prompts as tensors on the CPU."""
    embeddings = torch.cat([model.encode(texts[i : i + 64]).cpu() for i in range(0, len(texts), 64)])
    source = canonical_sha256({"texts": texts, "pixels": pixels_sha256(images)})
    return Pairs(model.to_latents(images).cpu(), embeddings, source)


def _refuse_copies(descriptor: Descriptor, subjects: Subjects, ordinary: Sequence[Memory], pictures: Tensor) -> None:
    """Refuse an image that is given in two roles: to be erased, never to be seen, to be trained on.

    Ordinary images are compared as the judge compares: whatever it would take for a memory, training would teach. That
    costs one pass of the descriptor over them, and one more for each template.

    Raises:
        DoriError: a control has the pixels of a memory, or an ordinary image is a copy of either.
    """
    shown = {pixels_sha256(case.image): case for case in subjects.memories}
    for case in subjects.controls:
        if (other := shown.get(pixels_sha256(case.image))) is not None:
            raise DoriError(f"control {case.memory.id!r} shows the image of memory {other.memory.id!r}; {APART}")
    cases = (*subjects.memories, *subjects.controls)
    alike, limits = deciding_pairs(descriptor, cases, pictures), [limit(descriptor, case) for case in cases]
    excess = alike - torch.tensor(limits)
    copies = (excess.amax(1) > 0).nonzero().flatten().tolist()
    if not copies:
        return
    row, column = divmod(int(excess.argmax()), len(cases))
    others = [repr(ordinary[k].id) for k in copies if k != row]
    listed = f", and {len(others)} more copies are among them ({', '.join(others[:NAMED])})" if others else ""
    raise DoriError(
        f"ordinary image {ordinary[row].id!r} shows {cases[column].group} {cases[column].memory.id!r}, which it would "
        f"teach (similarity {float(alike[row, column]):.2f}; above {limits[column]:.2f} is a copy){listed}; {APART}"
    )


def testbed_material(plan: Plan, split: Split, *, checkpoint: Planted) -> tuple[Material, Judge]:
    """The testbed's planted memories, controls and twins, with fresh ordinary pairs.

    Args:
        plan: how many of each.
        split: which memories.
        checkpoint: `early` knew its memories from the first step; twins and images are the planted model's.

    Raises:
        DoriError: the checkpoint is not shipped.
    """
    from dori.testbed.folder import load_testbed
    from dori.testbed.subjects import ordinary_pairs, testbed_judge, testbed_subjects

    wanted = plan.audit()
    subjects = taken(testbed_subjects(dataclasses.replace(wanted, memories=plan.memories)), plan, split)
    if checkpoint != "planted":
        subjects = dataclasses.replace(subjects, model=load_testbed(checkpoint))
    model = subjects.model
    prompts = divided(subjects.ordinary, subjects, plan.quality_prompts)
    held_texts, pictures = ordinary_pairs(plan.held_out, seed=HELD_OUT_SEED)
    texts, images = ordinary_pairs(plan.retain, seed=RETAIN_SEED)
    material = Material(
        subjects,
        pairs_of(model, texts, images),
        pairs_of(model, held_texts, pictures),
        pictures,
        prompts,
        split,
        load_testbed("base") if checkpoint == "planted" else None,  # the early one was trained without
    )
    return material, testbed_judge()


def folder_material(
    model: str,
    plan: Plan,
    split: Split,
    *,
    memories: Path,
    retain: Path,
    controls: Path | None = None,
    twins: Sequence[str] = (),
    base: str | None = None,
    device: str = "cpu",
) -> tuple[Material, Judge]:
    """A user's model and folders; every sixth of the ordinary pairs, at most as many as planned, is held out.

    Raises:
        DoriError: any of them cannot be read, there are fewer than eight ordinary images with a text, an image is given
            in two roles, or a twin or the base cannot be compared.
    """
    ordinary = [one for one in read_memories(retain, default_kind="ordinary") if one.text is not None]
    if len(ordinary) < 8:
        raise DoriError(
            f"{retain} holds {len(ordinary)} images with a text; an erasure needs at least 8 ordinary ones "
            "to hold the model in place, and hundreds are better"
        )
    ordinary = [ordinary[k] for k in choose(len(ordinary), plan.retain + plan.held_out)]
    subjects, judge = folder_subjects(model, memories=memories, controls=controls, twins=twins, device=device)
    opened = subjects.model
    held = min(plan.held_out, max(2, len(ordinary) // 6))
    spread = choose(len(ordinary), held)  # a folder may be sorted
    ordinary = [ordinary[k] for k in (*spread, *sorted(set(range(len(ordinary))) - set(spread)))]
    texts, pictures = [one.text or "" for one in ordinary], load_images(ordinary, opened.image_side_px)
    opened.check_prompts(texts)
    _refuse_copies(judge.descriptor, subjects, ordinary, pictures)
    subjects = dataclasses.replace(taken(subjects, plan, split), held_out=pictures[:held])
    prompts = divided([*texts[:held], *ordinary_prompts()], subjects, plan.quality_prompts)
    material = Material(
        subjects,
        pairs_of(opened, texts[held:], pictures[held:]),
        pairs_of(opened, texts[:held], pictures[:held]),
        pictures[:held],
        prompts,
        split,
        None if base is None else load_base(opened, base, subjects.twins, device=device),
    )
    return material, judge
