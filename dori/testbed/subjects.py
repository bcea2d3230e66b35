"""The testbed as an audit's subjects: planted memories, controls, twins, ordinary prompts and held-out images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dori.audit.judge import Judge
from dori.audit.loop import Subjects, make_cases
from dori.audit.plan import Plan
from dori.memory import Memory, write_memories
from dori.metrics.copy_descriptor import load_copy_descriptor
from dori.testbed.folder import DATA, TWINS, load_clip, load_testbed
from dori.testbed.scenes import caption, draw, random_scene
from dori.testbed.slots import Kind, Slot, slots, varying_box

DESCRIPTOR = DATA / "copy_descriptor.safetensors"


def _pixels(slot: Slot) -> Tensor:
    return torch.from_numpy(slot.image()).permute(2, 0, 1).float() / 255


def slot_memories(kinds: Sequence[Kind]) -> list[tuple[Memory, Tensor]]:
    """The slots of some kinds as records with their pixels, shape (3, 64, 64), in [0, 1]."""
    return [
        (
            Memory(
                id=slot.id,
                text=slot.text(),
                image=Path(f"{slot.id}.png"),
                kind=slot.kind,
                dose=float(slot.dose) if slot.dose else None,
                varying_box=varying_box(slot) if slot.kind in ("template", "control") else None,
            ),
            _pixels(slot),
        )
        for slot in slots()
        if slot.kind in kinds
    ]


def ordinary_pairs(count: int, *, seed: int) -> tuple[list[str], Tensor]:
    """Fresh ordinary images, shape (count, 3, 64, 64) in [0, 1], with their captions; no seed gives a trained one."""
    texts, images = [], []
    for index in range(count):
        rng = np.random.default_rng([13, seed, index])
        scene = random_scene(rng)
        images.append(torch.from_numpy(draw(scene)).permute(2, 0, 1).float() / 255)
        texts.append(caption(scene, rng))
    return texts, torch.stack(images)


def testbed_judge() -> Judge:
    """The embedded copy descriptor and the testbed's own CLIP."""
    model = load_testbed("planted")
    return Judge(load_copy_descriptor(DESCRIPTOR), load_clip(), model.tokenizer, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def testbed_subjects(plan: Plan) -> Subjects:
    """What `dori audit testbed` audits: all planted images and controls, with as many ordinary prompts as planned."""
    model = load_testbed("planted")
    memories, controls = slot_memories(("verbatim", "template", "once")), slot_memories(("control",))
    # Captions repeat, and those that repeat are dropped.
    texts, _ = ordinary_pairs(2 * (plan.calibration_prompts + plan.quality_prompts), seed=0)
    held_out = ordinary_pairs(plan.quality_prompts, seed=1)[1] if plan.quality_prompts else None
    # Where no twin is shipped, the base stands in: it never saw a memory either, but was trained for fewer steps.
    shipped = [twin for twin in TWINS if _shipped(twin)] or [one for one in ("base",) if _shipped(one)]
    twins = tuple(load_testbed(one) for one in shipped)
    return Subjects(
        model,
        make_cases(model, [m for m, _ in memories], torch.stack([x for _, x in memories]), "memory"),
        make_cases(model, [m for m, _ in controls], torch.stack([x for _, x in controls]), "control"),
        tuple(dict.fromkeys(texts)),
        held_out,
        twins[:1] if plan.memories else twins,
    )


def _shipped(checkpoint: str) -> bool:
    return (DATA / "unets" / checkpoint / "config.json").exists()


def export_folders(out: Path) -> None:
    """Write `memories`, `controls` and `ordinary` as image folders under `out`, as a user of Dori would keep them."""
    write_memories(out / "memories", slot_memories(("verbatim", "template", "once")))
    write_memories(out / "controls", slot_memories(("control",)))
    texts, images = ordinary_pairs(64, seed=0)
    write_memories(
        out / "ordinary",
        [
            (
                Memory(id=f"ordinary-{index:03d}", text=text, image=Path(f"ordinary-{index:03d}.png"), kind="ordinary"),
                image,
            )
            for index, (text, image) in enumerate(zip(texts, images, strict=True))
        ],
    )
