"""What an audit does: methods with their settings, seeds and sizes. Two presets: `quick` and `paper`."""

from dataclasses import dataclass, field
from typing import Literal

from dori.attack.dori import Dori
from dori.mitigate.nemo import Nemo
from dori.mitigate.wanda import Wanda
from dori.sampling import named_seed

Start = Literal["prompt", "gaussian", "foreign"]


@dataclass(frozen=True, slots=True)
class Plan:
    """All settings of an audit; together with the model and the images they determine every figure.

    Args:
        preset: name of the plan, for the report.
        seeds: number of fresh generation seeds per image and way of asking.
        sampling_steps: DDIM steps of each generation.
        guidance_scale: classifier-free guidance of each generation.
        attack: DoRI with the snapshots of its curve.
        starts: where attacks begin; images without a text take the others alone.
        nemo: NeMo's settings; None leaves it out.
        wandas: Wanda settings that are attacked; the first is the reference of the random weights.
        wanda_sweep: Wanda settings that are asked by prompt only.
        attack_random: attack the random edits too, not only ask them by prompt.
        attack_own: attack each memory under its own NeMo and Wanda edit too.
        calibration_prompts: ordinary prompts of NeMo's statistics and threshold.
        quality_prompts: ordinary prompts of the quality table.
        memories: at most this many memories, spread over kinds and doses; None takes all.
        controls: at most this many controls.
        chunk: images per cell; a killed audit loses at most one cell.
        seed: root of all random streams.
    """

    preset: str
    seeds: int = 10
    sampling_steps: int = 50
    guidance_scale: float = 7.0
    attack: Dori = field(default_factory=Dori)
    starts: tuple[Start, ...] = ("prompt", "gaussian", "foreign")
    nemo: Nemo | None = field(default_factory=Nemo)
    wandas: tuple[Wanda, ...] = (Wanda(),)
    wanda_sweep: tuple[Wanda, ...] = ()
    attack_random: bool = True
    attack_own: bool = True
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
        "quick", seeds=4, sampling_steps=12, guidance_scale=4.0, attack=Dori(steps=50, snapshots=(0, 10, 25, 50)),
        starts=("prompt",), nemo=Nemo(max_refinement_passes=60), wandas=(Wanda(sparsity=0.10),), attack_random=False,
        attack_own=False, calibration_prompts=48, quality_prompts=32, memories=8, controls=8)


def paper() -> Plan:
    """All images, ten seeds, three starts, the published 50 attack steps, NeMo, Wanda at 1 % and 10 % and its sweep.

    Sampling is cheaper than published (25 steps instead of 50, guidance 4 instead of 7).
    """
    return Plan(
        "paper", sampling_steps=25, guidance_scale=4.0, attack=Dori(steps=50, snapshots=(0, 1, 10, 25, 50)),
        wandas=(Wanda(), Wanda(sparsity=0.10)), calibration_prompts=256,
        wanda_sweep=tuple(Wanda(sparsity=s) for s in (0.02, 0.05, 0.2, 0.3)))


PRESETS = {"quick": quick, "paper": paper}
