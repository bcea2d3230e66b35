"""What an audit does: methods with their settings, seeds and sizes. Two presets: `quick` and `paper`."""

from dataclasses import dataclass, field, replace
from typing import Literal

from dori.attack.dori import Dori
from dori.mitigate.nemo import Nemo
from dori.mitigate.wanda import Wanda
from dori.model.stable_diffusion import EVERYWHERE
from dori.sampling import GUIDANCE_SCALE, named_seed

Start = Literal["prompt", "gaussian", "foreign"]


@dataclass(frozen=True, slots=True)
class Starts:
    """Where the attacks on each group of images begin; an image without a text leaves the prompt out.

    Args:
        memories: where attacks on them begin.
        controls: likewise.
        edited: which of these starts are taken under an attacked edit, too.
        once: images that the model saw a single time; they are asked and attacked without an edit alone.
        twins: the memories on models that never saw them.
        own: each memory under its own NeMo and Wanda edit; empty computes no Wanda edit of its own.
    """

    memories: tuple[Start, ...] = ("prompt", "gaussian", "foreign")
    controls: tuple[Start, ...] = ("prompt", "gaussian", "foreign")
    edited: tuple[Start, ...] = ("prompt", "gaussian", "foreign")
    once: tuple[Start, ...] = ("prompt",)
    twins: tuple[Start, ...] = ("prompt", "gaussian", "foreign")
    own: tuple[Start, ...] = ("prompt",)


@dataclass(frozen=True, slots=True)
class Plan:
    """All settings of an audit; together with the model and the images they determine every figure.

    Args:
        preset: name of the plan, for the report.
        seeds: number of fresh generation seeds per image and way of asking.
        curve_seeds: the first so many of them judge an attack before its last step, where only the curve is drawn;
            None takes all.
        sampling_steps: DDIM steps of each generation.
        guidance_scale: classifier-free guidance of each generation.
        attack: DoRI with the snapshots of its curve; its last step is the one that is judged by all seeds.
        long_steps: attacks from the prompt go on to the last of these, with curve seeds at each, for
        long_images: so many memories and as many controls, spread over all, and on the twins alike; edits of a single
            memory and images seen once are left out.
        restarts: attacks on each image from each start; the one whose last losses are lowest is judged.
        starts: where attacks begin.
        nemo: NeMo's settings; None leaves it out.
        wandas: Wanda settings that are attacked; the first is the reference of the random weights and of own edits.
        wanda_sweep: Wanda settings that are asked by prompt only.
        attack_random: attack the random edits too, not only ask them by prompt.
        calibration_prompts: ordinary prompts of NeMo's statistics and threshold.
        quality_prompts: ordinary prompts of the quality table, none of which calibrates or begins an attack.
        memories: at most this many memories, spread over kinds and doses; None takes all.
        controls: at most this many controls.
        chunk: images per cell; a killed audit loses at most one cell.
        seed: root of all random streams.
    """

    preset: str
    seeds: int = 10
    curve_seeds: int | None = None
    sampling_steps: int = 50
    guidance_scale: float = 7.0
    attack: Dori = field(default_factory=Dori)
    long_steps: tuple[int, ...] = ()
    long_images: int = 0
    restarts: int = 1
    starts: Starts = field(default_factory=Starts)
    nemo: Nemo | None = field(default_factory=Nemo)
    wandas: tuple[Wanda, ...] = (Wanda(),)
    wanda_sweep: tuple[Wanda, ...] = ()
    attack_random: bool = True
    calibration_prompts: int = 1000
    quality_prompts: int = 256
    memories: int | None = None
    controls: int | None = None
    chunk: int = 16
    seed: int = 0

    def fresh_seeds(self) -> list[int]:
        """The seeds of the judged generations: the same for every image and edit, unknown to every attack."""
        return [named_seed("fresh", self.seed, k) for k in range(self.seeds)]


def quick() -> Plan:
    """About eight memories and eight controls, one start: a first look within ten minutes on two cores."""
    return Plan(
        "quick",
        seeds=4,
        sampling_steps=12,
        guidance_scale=GUIDANCE_SCALE,
        attack=Dori(steps=50, snapshots=(0, 10, 25, 50)),
        starts=Starts(memories=("prompt",), controls=("prompt",), twins=("prompt",), own=()),
        nemo=Nemo(max_refinement_passes=60),
        wandas=(Wanda(sparsity=0.10),),
        attack_random=False,
        calibration_prompts=48,
        quality_prompts=32,
        memories=8,
        controls=8,
    )


def paper() -> Plan:
    """All images, ten seeds, the published 50 attack steps; NeMo and Wanda at 10 % are attacked.

    Attacks begin from the prompt, and on the unedited model from Gaussian embeddings too, memories and controls alike;
    those from other prompts are `dori locality`'s. Wanda at 1 % and in all blocks, and the random edits, are asked by
    prompt alone; before the last step, and on the way to 150 steps, three seeds judge. Sampling is cheaper than
    published (12 steps instead of 50, guidance 3 instead of 7).
    """
    tenth = Wanda(sparsity=0.10)
    return Plan(
        "paper",
        curve_seeds=3,
        sampling_steps=12,
        guidance_scale=GUIDANCE_SCALE,
        attack=Dori(steps=50, snapshots=(0, 1, 10, 25, 50)),
        long_steps=(100, 150),
        long_images=8,
        starts=Starts(
            memories=("prompt", "gaussian"), controls=("prompt", "gaussian"), edited=("prompt",), twins=("prompt",)
        ),
        nemo=Nemo(max_refinement_passes=100),
        wandas=(tenth,),
        attack_random=False,
        calibration_prompts=256,
        wanda_sweep=(Wanda(), replace(tenth, places=EVERYWHERE)),
    )


PRESETS = {"quick": quick, "paper": paper}
