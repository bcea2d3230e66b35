"""Every eraser by its name, and the arms that take parts of the adversarial one away."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from dori.attack.dori import Dori
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
from dori.erase.siss import Siss, as_released
from dori.erase.tuning import Part
from dori.erase.uce import Uce
from dori.model.stable_diffusion import StableDiffusion


class Eraser(Protocol):
    """What every eraser is: settings, and a call that returns an edit and leaves the model as it was."""

    def __call__(
        self, model: StableDiffusion, memories: Forget, retain: Pairs, *, seed: int, work: Work | None = None
    ) -> WeightDelta:
        """Erase the memories."""


def eraser(name: str, *, adversarial: AdversarialErasure, timesteps: int, sampling_steps: int) -> Eraser:
    """An eraser by its name, its learning rate scaled as the adversarial one's is against the published 1e-5.

    Small models move by larger rates than Stable Diffusion; one factor keeps the published proportions between
    methods. The baselines' steps are the published ones, except ordinary training's, which are the adversarial one's.

    Args:
        name: in `dori.erase.ERASERS`.
        adversarial: settings of the adversarial erasure.
        timesteps: T of the model.
        sampling_steps: of ESD's partial samples.
    """
    tuner = dataclasses.replace(adversarial.tuner, part="full")
    rate = tuner.learning_rate / 1e-5
    batch = adversarial.batch
    table: Mapping[str, Eraser] = {
        "adversarial": adversarial,
        "ordinary": OrdinaryTraining(adversarial.rounds * adversarial.steps_per_round, batch, tuner),
        "naive-deletion": NaiveDeletion(batch=batch, tuner=tuner),
        "gradient-ascent": GradientAscent(batch=batch, tuner=tuner),
        "erase-diff": EraseDiff(batch=batch, tuner=tuner),
        "siss": Siss(batch=batch, tuner=tuner),
        "siss-as-released": dataclasses.replace(as_released(timesteps), batch=batch, tuner=tuner),
        "esd": Esd(
            sampling_steps=sampling_steps,
            tuner=dataclasses.replace(tuner, learning_rate=5e-5 * rate, part="cross_attention"),
        ),
        "concept-ablation": ConceptAblation(tuner=dataclasses.replace(tuner, learning_rate=5e-7 * rate)),
        "uce": Uce(),
    }
    assert tuple(table) == ERASERS
    return table[name]


def arms(adversarial: AdversarialErasure) -> dict[str, AdversarialErasure]:
    """The ablation's arms by name: each takes one part away from the recipe (or puts a weaker one in its place)."""

    def tuned(part: Part) -> AdversarialErasure:
        return dataclasses.replace(adversarial, tuner=dataclasses.replace(adversarial.tuner, part=part))

    table = {
        "paper's recipe": adversarial,
        "prompt only": dataclasses.replace(adversarial, attack=Dori(steps=0), starts=("prompt",)),
        "first round's triggers": dataclasses.replace(adversarial, search_rounds=1),
        "prompt starts": dataclasses.replace(adversarial, starts=("prompt",)),
        "gaussian starts": dataclasses.replace(adversarial, starts=("gaussian",)),
        "no retain loss": dataclasses.replace(adversarial, retain_weight=0.0),
        "LoRA": tuned("lora"),
        "attention only": tuned("attention"),
        "one round": dataclasses.replace(adversarial, rounds=1),
        "three rounds": dataclasses.replace(adversarial, rounds=3),
    }
    assert tuple(table) == ARMS
    return table
