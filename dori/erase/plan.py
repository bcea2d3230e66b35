"""What `dori erase` does: the erasure, its surrogates, the proof and the gauge of damage. Presets `quick` and `full`.

A small model moves by larger learning rates than Stable Diffusion, for which the published ones are; `scaled`
multiplies all of them by one factor, so that erasers and judges keep their proportions.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dori.attack.dori import Dori
from dori.audit.plan import Plan as AuditPlan
from dori.audit.plan import Starts
from dori.erase.adversarial import AdversarialErasure
from dori.erase.latent_attack import LatentAttack
from dori.erase.protocol import EVERY, Protocol
from dori.erase.relearn import Relearning
from dori.erase.surrogates import SurrogateSearch
from dori.erase.tuning import Tuner
from dori.mitigate.wanda import Wanda
from dori.sampling import GUIDANCE_SCALE, Sampling

LARGE = 100_000_000
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
        tables: how a table measures its many edits.
        retain: ordinary pairs to train on, at most.
        held_out: ordinary pairs for the held-out loss and, as images, for the quality distances.
        quality_prompts: ordinary prompts of the damage table.
        neighbours: of each erased caption, in the damage table.
        taught_neighbours: others, of each, that an erasure with `near_weight` holds.
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
    tables: Protocol = field(default_factory=Protocol)
    retain: int = 2000
    held_out: int = 256
    quality_prompts: int = 256
    neighbours: int = 4
    taught_neighbours: int = 8
    watch_seeds: int = 2
    seed: int = 0

    def drawn_by(self, sampling: Sampling) -> "Plan":
        """The plan with this sampling of surrogates and of everything that is judged."""
        chosen: dict[str, Any] = {"sampling_steps": sampling.steps, "guidance_scale": sampling.guidance_scale}
        return dataclasses.replace(
            self,
            surrogates=dataclasses.replace(self.surrogates, **chosen),
            protocol=dataclasses.replace(self.protocol, **chosen),
            tables=dataclasses.replace(self.tables, **chosen),
        )

    def audit(self) -> AuditPlan:
        """The audit of before and after: no mitigation, DoRI's published 50 steps."""
        p = self.protocol
        # The proof attacks the twins already, and draws the curve.
        some = self.memories is not None
        starts = p.starts[:1] if some else p.starts
        return AuditPlan(
            self.preset,
            seeds=p.seeds,
            sampling_steps=p.sampling_steps,
            guidance_scale=p.guidance_scale,
            attack=Dori(steps=50, snapshots=(0, 50) if some else (0, 10, 25, 50)),
            starts=Starts(starts, starts, (), () if some else starts[:1], ()),
            nemo=None,
            wandas=(),
            attack_random=False,
            calibration_prompts=64,
            quality_prompts=self.quality_prompts,
            seed=self.seed,
        )


def quick() -> Plan:
    """Eight memories and controls, attacked to 150 steps from one start, relearned for at most 60: a first look.

    What the full plan asks beside: rounding to half precision (the coarser 8-bit integers are asked), restricted and
    long attacks and that on the latent, relearning of altered weights. Tables attack for 50 steps from every start.
    """
    protocol = Protocol(
        seeds=3,
        sampling_steps=12,
        starts=("prompt",),
        attack=Dori(steps=150, snapshots=(0, 50, 150)),
        long=None,
        restricted=None,
        latent=None,
        relearning=Relearning(batch=4, check_every=6),
        again=Dori(steps=50, snapshots=(0, 50)),
        roundings=("int8",),
        original_whole=False,
        relearn_altered=False,
        lora_rate=None,
    )
    return Plan(
        "quick",
        memories=8,
        controls=8,
        adversarial=AdversarialErasure(
            rounds=4, steps_per_round=60, attack=Dori(steps=25), tuner=Tuner(ema_decay=0.98)
        ),
        surrogates=SurrogateSearch(tries=6, sampling_steps=12, guidance_scale=GUIDANCE_SCALE),
        protocol=protocol,
        tables=dataclasses.replace(
            protocol,
            starts=EVERY,
            attack=protocol.again,
            restricted=Protocol().restricted,
            latent=LatentAttack(steps=15),
            harmless_steps=0,
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
            steps_per_round=100,
            attack=Dori(steps=50),
            attack_growth=1.15,
            safe_every=3,
            check_every=2,
            tuner=Tuner(ema_decay=0.98),
        ),
        surrogates=SurrogateSearch(sampling_steps=25, guidance_scale=GUIDANCE_SCALE),
        tables=Protocol(roundings=(), harmless_steps=0, lora_rate=None),
    )


def scaled(plan: Plan, factor: float) -> Plan:
    """The plan with every learning rate multiplied, the erasure's and those of relearning alike."""

    def faster(tuner: Tuner) -> Tuner:
        return dataclasses.replace(tuner, learning_rate=tuner.learning_rate * factor)

    def judging(protocol: Protocol) -> Protocol:
        relearning = protocol.relearning
        if relearning is None:
            return protocol
        rate = protocol.lora_rate and protocol.lora_rate * factor
        relearning = dataclasses.replace(relearning, tuner=faster(relearning.tuner))
        return dataclasses.replace(protocol, relearning=relearning, lora_rate=rate)

    return dataclasses.replace(
        plan,
        adversarial=dataclasses.replace(plan.adversarial, tuner=faster(plan.adversarial.tuner)),
        protocol=judging(plan.protocol),
        tables=judging(plan.tables),
    )


def fitted(plan: Plan, *, latent_numbers: int, weights: int) -> Plan:
    """The plan with batches cut into calls that a model of this size can hold; figures differ by rounding alone.

    The presets are for the testbed, whose latents have 2,048 numbers. Of a model of a hundred million weights and more
    activations are computed again in the backward pass. `Dori` cuts its own calls.

    Args:
        plan: the plan.
        latent_numbers: in one latent.
        weights: of the U-Net.
    """
    share = min(1.0, 2048 / latent_numbers)

    def rows(usual: int) -> int:
        return max(1, int(usual * share))

    def tuner(usual: Tuner) -> Tuner:
        return dataclasses.replace(
            usual, rows_per_call=rows(usual.rows_per_call), checkpointing=usual.checkpointing or weights >= LARGE
        )

    def judging(p: Protocol) -> Protocol:
        return dataclasses.replace(
            p,
            latent=p.latent and dataclasses.replace(p.latent, rows_per_call=rows(p.latent.rows_per_call)),
            relearning=p.relearning and dataclasses.replace(p.relearning, tuner=tuner(p.relearning.tuner)),
        )

    a = plan.adversarial
    return dataclasses.replace(
        plan,
        adversarial=dataclasses.replace(a, tuner=tuner(a.tuner)),
        protocol=judging(plan.protocol),
        tables=judging(plan.tables),
    )


PRESETS = {"quick": quick, "full": full}
