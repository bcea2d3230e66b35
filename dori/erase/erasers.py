"""Every eraser by its name; of the adversarial one, arms that change one part, and settings from mild to strong."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, TypeVar

from dori.attack.dori import Dori
from dori.cost import Rows
from dori.erase import ARMS, ERASERS
from dori.erase.adversarial import AdversarialErasure
from dori.erase.concept_ablation import ConceptAblation
from dori.erase.delta import WeightDelta
from dori.erase.erase_diff import EraseDiff
from dori.erase.esd import Esd
from dori.erase.gradient_ascent import GradientAscent
from dori.erase.naive_deletion import NaiveDeletion
from dori.erase.ordinary import OrdinaryTraining
from dori.erase.pairs import Forget, Pairs, Work
from dori.erase.relapse import Relapse
from dori.erase.siss import Siss, as_released
from dori.erase.tuning import Part
from dori.erase.uce import Uce
from dori.model.stable_diffusion import StableDiffusion

# On the testbed the steps and the rate at which a LoRA learns most in the updates that a relapse can afford.
LORA_RELAPSE = Relapse(steps=20, every=20, rate=30.0, part="lora")

Published = TypeVar("Published", NaiveDeletion, GradientAscent, EraseDiff, Siss, Esd)


class Eraser(Protocol):
    """What every eraser is: settings, and a call that returns an edit and leaves the model as it was."""

    @property
    def needs_surrogates(self) -> bool:
        """Whether it looks at the memories' surrogates."""

    def rows(self, memories: int) -> Rows:
        """At most so many U-Net rows for so many memories."""

    def __call__(
        self, model: StableDiffusion, memories: Forget, retain: Pairs, *, seed: int, work: Work | None = None
    ) -> WeightDelta:
        """Erase the memories."""


def eraser(name: str, *, adversarial: AdversarialErasure, memories: int, timesteps: int, sampling_steps: int) -> Eraser:
    """An eraser by its name, its learning rate scaled as the adversarial one's is against the published 1e-5.

    Small models move by larger rates than Stable Diffusion; one factor keeps the published proportions between
    methods. Published steps are for one image, so that as many images get so many times as many. Concept Ablation's
    tiny batches grow instead, and its rate with them, since its base rate is meant for one row: as many rows and as
    long a way, in the published number of steps (for hundreds of images at once that rate would be too high). There is
    no average of weights, which would hold short trainings back. Ordinary training is the scale of damage: its steps,
    rate and average are the adversarial one's.

    Args:
        name: in `dori.erase.ERASERS`.
        adversarial: settings of the adversarial erasure.
        memories: number of memories.
        timesteps: T of the model.
        sampling_steps: of ESD's partial samples.
    """

    def each(method: Published) -> Published:
        return dataclasses.replace(method, steps=method.steps * memories)

    tuner = dataclasses.replace(adversarial.tuner, part="full", ema_decay=0.0)
    rate = tuner.learning_rate / 1e-5
    batch, anchors = adversarial.batch, 2 * memories
    table: Mapping[str, Eraser] = {
        "adversarial": adversarial,
        "adversarial-relapses": adversarial.against_relapses(),
        "adversarial-paper": adversarial.paper(),
        "ordinary": ordinary(adversarial),
        "naive-deletion": each(NaiveDeletion(batch=batch, tuner=tuner)),
        "gradient-ascent": each(GradientAscent(batch=batch, tuner=tuner)),
        "erase-diff": each(EraseDiff(batch=batch, tuner=tuner)),
        "siss": each(Siss(batch=batch, tuner=tuner)),
        "siss-as-released": each(dataclasses.replace(as_released(timesteps), batch=batch, tuner=tuner)),
        "esd": each(
            Esd(
                sampling_steps=sampling_steps,
                tuner=dataclasses.replace(tuner, learning_rate=5e-5 * rate, part="cross_attention"),
            )
        ),
        "concept-ablation": ConceptAblation(
            batch=anchors, tuner=dataclasses.replace(tuner, learning_rate=5e-7 * anchors * rate)
        ),
        "uce": Uce(),
    }
    assert tuple(table) == ERASERS
    return table[name]


def ordinary(adversarial: AdversarialErasure, updates: int | None = None) -> OrdinaryTraining:
    """Ordinary training as long as an erasure.

    Args:
        adversarial: whose batch, rate and average of weights are taken.
        updates: steps of the erasure; None or 0 takes all that the adversarial one may make.
    """
    steps = updates or adversarial.rounds * adversarial.steps_per_round
    return OrdinaryTraining(steps, adversarial.batch, dataclasses.replace(adversarial.tuner, part="full"))


def arms(adversarial: AdversarialErasure) -> dict[str, AdversarialErasure]:
    """The ablation's arms by name: each changes one part of the recipe: away, another in its place, or one more."""

    def tuned(part: Part, rate: float = 1.0) -> AdversarialErasure:
        faster = adversarial.tuner.learning_rate * rate
        return dataclasses.replace(
            adversarial, tuner=dataclasses.replace(adversarial.tuner, part=part, learning_rate=faster)
        )

    table = {
        "whole recipe": adversarial,
        "paper's loss": adversarial.paper(),
        "both losses": dataclasses.replace(adversarial, adversarial_weight=1.0),
        "neighbours held": dataclasses.replace(adversarial, near_weight=1.0),
        "prompt only": dataclasses.replace(adversarial, attack=Dori(steps=0), starts=("prompt",)),
        "first round's triggers": dataclasses.replace(adversarial, search_rounds=1),
        "prompt starts": dataclasses.replace(adversarial, starts=("prompt",)),
        "gaussian starts": dataclasses.replace(adversarial, starts=("gaussian",)),
        "no retain loss": dataclasses.replace(adversarial, retain_weight=0.0),
        "LoRA": tuned("lora"),
        "LoRA, rate x 10": tuned("lora", 10.0),  # as LoRAs are customarily trained: their factors are small
        "attention only": tuned("attention"),
        "one round": dataclasses.replace(adversarial, rounds=1),
        "three rounds": dataclasses.replace(adversarial, rounds=3),
    }
    assert tuple(table) == ARMS
    return table


def frontier(adversarial: AdversarialErasure) -> dict[str, AdversarialErasure]:
    """The adversarial erasure from mild to strong: by learning rate and rounds, with L_Adv or relapses beside L_Unc."""

    def changed(rate: float, rounds: float) -> AdversarialErasure:
        tuner = dataclasses.replace(adversarial.tuner, learning_rate=adversarial.tuner.learning_rate * rate)
        return dataclasses.replace(adversarial, tuner=tuner, rounds=max(1, round(adversarial.rounds * rounds)))

    table = {
        f"rate x {rate:g}, {changed(rate, rounds).rounds} rounds": changed(rate, rounds)
        for rate in (0.5, 1, 2)
        for rounds in (0.5, 1, 2)
    }
    both = dataclasses.replace(adversarial, adversarial_weight=1.0)
    relapses = dataclasses.replace(adversarial, relapse_weight=1.0)
    return table | {
        "surrogates too": both,
        "one surrogate each": dataclasses.replace(both, surrogates=1),
        "against relapses": relapses,
        "relapses of 0 updates": dataclasses.replace(relapses, relapse=Relapse(steps=0)),  # their term, without them
        "against relapses, L_DM x 3": dataclasses.replace(relapses, retain_weight=3.0),
        "against relapses, neighbours held": dataclasses.replace(relapses, near_weight=1.0),
        "against relapses, both": adversarial.against_relapses(),
        "against LoRA relapses, both": dataclasses.replace(adversarial.against_relapses(), relapse=LORA_RELAPSE),
    }
