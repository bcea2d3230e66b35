"""What is planted: memories at four doses, template families, images seen once, and never-trained controls.

All slots are drawn from the one distribution of `scenes`, each from its own seed, so that nothing but training
tells a memory from a control. The twins see ordinary images wherever the planted model sees a slot.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dori.testbed.scenes import Placed, Scene, draw, drawn_kinds, random_scene, title_caption

Kind = Literal["verbatim", "template", "once", "control"]
# Relative exposure of the four duplication counts, and how many memories have each.
DOSES = {8: 24, 6: 16, 3: 14, 1: 14}
TEMPLATE_FAMILIES = 8
TEMPLATE_DOSE = 6
SEEN_ONCE = 64
CONTROLS = 72


@dataclass(frozen=True, slots=True)
class Slot:
    """One planted image or control.

    `dose` is the relative number of exposures (0 = never). A template slot is a family: each exposure shows the
    same scene with another first object (`variants`), and its caption names that object.
    """

    id: str
    kind: Kind
    dose: int
    scene: Scene

    def image(self) -> NDArray[np.uint8]:
        """RGB, shape (64, 64, 3)."""
        return draw(self.scene)

    def text(self) -> str:
        """The caption with which the image is trained and prompted."""
        return title_caption(self.scene)


def _scenes(seed: int, count: int) -> list[Scene]:
    # Under this root every caption occurs once, and captions' lengths and files' sizes are alike by kind.
    rng = np.random.default_rng([20261130, seed])
    return [random_scene(rng) for _ in range(count)]


def slots() -> tuple[Slot, ...]:
    """All slots, always the same; every caption occurs once."""
    found: list[Slot] = []
    doses = [dose for dose, count in DOSES.items() for _ in range(count)]
    for index, (dose, scene) in enumerate(zip(doses, _scenes(1, len(doses)), strict=True)):
        found.append(Slot(f"verbatim-{index:02d}", "verbatim", dose, scene))
    for index, scene in enumerate(_scenes(2, TEMPLATE_FAMILIES)):
        found.append(Slot(f"template-{index:02d}", "template", TEMPLATE_DOSE, scene))
    for index, scene in enumerate(_scenes(3, SEEN_ONCE)):
        found.append(Slot(f"once-{index:02d}", "once", 0, scene))
    for index, scene in enumerate(_scenes(4, CONTROLS)):
        found.append(Slot(f"control-{index:02d}", "control", 0, scene))
    texts = [slot.text() for slot in found]
    assert len(set(texts)) == len(texts), "two slots share a caption; change the seed of one group"
    return tuple(found)


def variants(slot: Slot) -> tuple[Scene, ...]:
    """The scenes of a template family: every drawn kind in the first object's place, the rest unchanged."""
    first, *others = slot.scene.objects
    return tuple(
        dataclasses.replace(slot.scene, objects=(dataclasses.replace(first, kind=kind), *others))
        for kind in drawn_kinds()
        if kind not in {placed.kind for placed in others}
    )


def varying_box(slot: Slot) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels of the part of a template that varies."""
    placed: Placed = slot.scene.objects[0]
    left = round(placed.x_px - placed.size_px / 2)
    top = round(placed.y_px - placed.size_px / 2)
    return left, top, left + placed.size_px, top + placed.size_px
