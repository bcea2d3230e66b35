"""What `dori erase` does: the erasure, its surrogates, the proof and the gauge of damage. Presets `quick` and `full`.

A small model moves by larger learning rates than Stable Diffusion, for which the published ones are; `scaled`
multiplies all of them by one factor, so that erasers and judges keep their proportions.
"""

import dataclasses
from dataclasses import dataclass, field

from dori.attack.dori import Dori
from dori.audit.plan import Plan as AuditPlan
from dori.audit.plan import Starts
from dori.erase.adversarial import AdversarialErasure
from dori.erase.latent_attack import LatentAttack
from dori.erase.protocol import Protocol
from dori.erase.relearn import Relearning
from dori.erase.surrogates import SurrogateSearch
from dori.erase.tuning import Tuner
from dori.mitigate.wanda import Wanda

TESTBED_SCALE = 20.0  # 2e-4 instead of 1e-5: the rate of the trial in testbed.md


@dataclass(frozen=True, slots=True)
class Plan:
    """All settings of an erasure and of its proof.

    Args:
        preset: name of the plan.
        memories, controls: at most so many, spread over their order; None takes all.
        adversarial: settings of the adversarial erasure, from which those of the baselines follow.
        mitigations: Wanda settings that hide the memories while surrogates are drawn, in the order of trying.
        surrogates: how surrogates are looked for.
        protocol: how the proof measures.
        retain: ordinary pairs to train on, at most.
        held_out: ordinary pairs for the held-out loss and, as images, for the quality distances.
        quality_prompts: ordinary prompts of the damage table.
        neighbours: of each erased caption.
        watch_seeds: images by which the erasure watches its own progress; 0 does not watch.
        seed: root of all random streams.
    """

    preset: str
    memories: int | None = None
    controls: int | None = None
    adversarial: AdversarialErasure = field(default_factory=AdversarialErasure)
    mitigations: tuple[Wanda, ...] = (Wanda(sparsity=0.1), Wanda(sparsity=0.3))
    surrogates: SurrogateSearch = field(default_factory=SurrogateSearch)
    protocol: Protocol = field(default_factory=Protocol)
    retain: int = 2000
    held_out: int = 256
    quality_prompts: int = 256
    neighbours: int = 4
    watch_seeds: int = 2
    seed: int = 0

    def audit(self) -> AuditPlan:
        """The audit of before and after: no mitigation, DoRI's published 50 steps."""
        p = self.protocol
        starts = p.starts if self.memories is None else p.starts[:1]
        return AuditPlan(
            self.preset,
            seeds=p.seeds,
            sampling_steps=p.sampling_steps,
            guidance_scale=p.guidance_scale,
            attack=Dori(steps=50, snapshots=(0, 10, 25, 50)),
            starts=Starts(starts, starts, (), starts[:1], ()),
            nemo=None,
            wandas=(),
            attack_random=False,
            calibration_prompts=64,
            quality_prompts=self.quality_prompts,
            seed=self.seed,
        )


def quick() -> Plan:
    """Eight memories and controls, attacked to 150 steps from one start, relearned for at most 60: a first look."""
    return Plan(
        "quick",
        memories=8,
        controls=8,
        adversarial=AdversarialErasure(rounds=5, steps_per_round=25, attack=Dori(steps=30), check_every=0),
        surrogates=SurrogateSearch(tries=6, sampling_steps=12, guidance_scale=4.0),
        protocol=Protocol(
            seeds=3,
            sampling_steps=12,
            starts=("prompt",),
            long=None,
            attack=Dori(steps=150, snapshots=(0, 25, 50, 150)),
            latent=LatentAttack(steps=15),
            again=Dori(steps=50, snapshots=(0, 50)),
            relearning=Relearning(),
        ),
        retain=512,
        held_out=96,
        quality_prompts=48,
        neighbours=4,
    )


def full() -> Plan:
    """All images, all starts, 500 steps from one, erased until a held-out attack finds nothing twice."""
    return Plan(
        "full",
        adversarial=AdversarialErasure(
            rounds=20,
            steps_per_round=25,
            attack=Dori(steps=50),
            attack_growth=1.15,
            safe_every=3,
            check_every=2,
            tuner=Tuner(ema_decay=0.98),
        ),
        surrogates=SurrogateSearch(sampling_steps=25, guidance_scale=4.0),
    )


def scaled(plan: Plan, factor: float) -> Plan:
    """The plan with every learning rate multiplied, the erasure's and those of relearning alike."""

    def faster(tuner: Tuner) -> Tuner:
        return dataclasses.replace(tuner, learning_rate=tuner.learning_rate * factor)

    adversarial = dataclasses.replace(plan.adversarial, tuner=faster(plan.adversarial.tuner))
    relearning = plan.protocol.relearning
    if relearning is not None:
        relearning = dataclasses.replace(relearning, tuner=faster(relearning.tuner))
    return dataclasses.replace(
        plan, adversarial=adversarial, protocol=dataclasses.replace(plan.protocol, relearning=relearning)
    )


PRESETS = {"quick": quick, "full": full}
