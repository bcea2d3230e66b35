"""What a locality run does: counts, methods and seeds. Two presets: `quick` and `full`."""

from dataclasses import dataclass, field, replace

from dori.attack.dori import Dori
from dori.audit import plan as auditing
from dori.mitigate.nemo import Nemo
from dori.mitigate.wanda import Wanda
from dori.sampling import GUIDANCE_SCALE, Sampling, named_seed


@dataclass(frozen=True, slots=True)
class Causal:
    """The causal test.

    Args:
        memories: the first so many analysed memories are tested.
        triggers: masks and triggers of the matrix, at most as many as replicate.
        fresh: attacks from fresh Gaussian starts under each single mask; each mask has starts of its own.
        random: random masks, as large as triggers' masks in each layer, that every trigger meets too.
        other: masks of another image's triggers that every trigger meets too.
        joined_fresh: attacks from fresh starts under joined masks, and under random ones of the unions' sizes.
        taken_back: parts of all weights that get a twin's values, where there is one, before the same fresh attacks.
        seeds: generation seeds of every trigger and attack, the first of those that chose the triggers.
        priced: masks of each kind of which it is told what they cost.
        quality_prompts: ordinary prompts that tell what masks cost.
    """

    memories: int = 2
    triggers: int = 16
    fresh: int = 2
    random: int = 8
    other: int = 8
    joined_fresh: int = 8
    taken_back: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    seeds: int = 3
    priced: int = 3
    quality_prompts: int = 64

    @property
    def planted_fresh(self) -> int:
        """Fresh attacks under the one mask of the planted change: those of all random ones."""
        return self.fresh * max(1, self.random)

    @property
    def fresh_starts(self) -> int:
        """Fresh starts of all single masks together; those of joined masks come after them."""
        return self.fresh * max(self.triggers, self.random, self.other)


@dataclass(frozen=True, slots=True)
class Plan:
    """All settings; together with the model and the images they determine every figure.

    Args:
        preset: name of the plan, for the page.
        memories: at most so many are analysed, spread over the doses; of fewer than five the most duplicated.
        gaussian, foreign: attacks of each memory from N(0, I) and from other prompts' embeddings; one more begins at
            its own prompt. The same starts serve every memory.
        attack: DoRI.
        twin_attacks: the first so many Gaussian-started attacks are made on a twin too: an embedding may carry an
            image by itself, and then it replicates where nothing was memorized. 0, or no twin, leaves it out.
        repeats: the first so many of them are made again under other noise: what a move shares with itself is the
            ceiling of what moves from different starts may share.
        seeds: fresh generation seeds that decide whether a trigger replicates.
        sampling_steps, guidance_scale: of every generation.
        perplexity: of t-SNE, cut where there are too few points.
        line_pairs, line_shares: pairs of triggers, and points on the line of each.
        ball_centres, ball_directions, ball_radii: triggers around which is probed, points at each radius, radii in
            units of the median distance between ordinary prompts.
        probe_seeds: generation seeds of each probed point.
        activation_steps: positions on the sampling grid at which activations are read.
        activation_noises: fixed initial noises over which D_l is averaged; also the number of "other noises" is at
            least this and 4.
        set_size: embeddings of each group in the analyses of activations and weights.
        nemo: NeMo with its refinement capped: Gaussian-started triggers lie far outside its statistics.
        wandas: Wanda settings; the last one is used by the causal test.
        ceiling: triggers whose masks are computed again under other noise seeds.
        ceiling_seeds: noise seeds of each, the usual one included.
        calibration_prompts: ordinary prompts of NeMo's statistics and threshold.
        causal: the causal test; None leaves it out.
        patch_seeds: generation seeds of activation patching and of transplanted weights; 0 leaves both out.
        chunk: embeddings per cell.
        seed: root of all random streams.
    """

    preset: str
    memories: int = 8
    gaussian: int = 100
    foreign: int = 100
    attack: Dori = field(default_factory=Dori)
    twin_attacks: int = 20
    repeats: int = 10
    seeds: int = 5
    sampling_steps: int = 25
    guidance_scale: float = GUIDANCE_SCALE
    perplexity: float = 30.0
    line_pairs: int = 30
    line_shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    ball_centres: int = 10
    ball_directions: int = 2
    ball_radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
    probe_seeds: int = 2
    activation_steps: tuple[int, ...] = (0, 5, 12)
    activation_noises: int = 2
    set_size: int = 100
    nemo: Nemo = field(default_factory=lambda: Nemo(max_refinement_passes=40))
    wandas: tuple[Wanda, ...] = (Wanda(), Wanda(sparsity=0.10))
    ceiling: int = 10
    ceiling_seeds: int = 5
    calibration_prompts: int = 256
    causal: Causal | None = field(default_factory=Causal)
    patch_seeds: int = 4
    chunk: int = 10
    seed: int = 0

    def fresh_seeds(self, count: int | None = None) -> list[int]:
        """Generation seeds that no attack has seen; the probes take the first ones."""
        return [named_seed("fresh", self.seed, k) for k in range(self.seeds if count is None else count)]

    def drawn_by(self, sampling: Sampling) -> "Plan":
        """The plan with this sampling; activations are read at the same places of the finer or coarser grid."""
        places = (step * sampling.steps // self.sampling_steps for step in self.activation_steps)
        return replace(
            self,
            sampling_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            activation_steps=tuple(dict.fromkeys(places)),
        )

    def of_size(self, *, memories: int | None, attacks: int | None) -> "Plan":
        """The plan with at most so many memories, and so many attacks of each from noise and from other prompts."""
        plan = self if memories is None else replace(self, memories=memories)
        return plan if attacks is None else replace(plan, gaussian=attacks, foreign=attacks)

    def judging(self) -> auditing.Plan:
        """The audit's plan for drawing images, for calibration and for quality."""
        return auditing.Plan(
            self.preset,
            seeds=self.seeds,
            sampling_steps=self.sampling_steps,
            guidance_scale=self.guidance_scale,
            attack=self.attack,
            memories=None,
            controls=None,
            calibration_prompts=self.ordinary_prompts,
            seed=self.seed,
            quality_prompts=max(2, self.quality_prompts),
        )

    @property
    def quality_prompts(self) -> int:
        """Ordinary prompts that tell what masks cost."""
        return self.causal.quality_prompts if self.causal else 0

    @property
    def ordinary_prompts(self) -> int:
        """Ordinary prompts that are wanted, each for one use: reference, foreign starts, NeMo's statistics, quality."""
        return self.set_size + self.foreign + self.calibration_prompts + self.quality_prompts


def quick() -> Plan:
    """Two memories with 12 triggers each and no causal test: a first look within ten minutes on two cores."""
    return Plan(
        "quick",
        memories=2,
        gaussian=6,
        foreign=5,
        twin_attacks=3,
        repeats=3,
        seeds=4,
        sampling_steps=12,
        line_pairs=6,
        line_shares=(0.25, 0.5, 0.75),
        ball_centres=3,
        ball_radii=(0.1, 0.3, 0.6, 1.0),
        activation_steps=(0, 4),
        activation_noises=1,
        set_size=12,
        nemo=Nemo(max_refinement_passes=24),
        wandas=(Wanda(sparsity=0.10),),
        ceiling=4,
        ceiling_seeds=3,
        calibration_prompts=48,
        causal=None,
        patch_seeds=0,
        chunk=6,
    )


def full() -> Plan:
    """Eight memories, 100 triggers from each kind of start, all analyses: hours, resumable."""
    return Plan("full")


PRESETS = {"quick": quick, "full": full}
