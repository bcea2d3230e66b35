"""A training that is killed and begun again reaches the same weights, whatever the eraser."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from erasing import FAST, forget, retain

from dori.erase import course
from dori.erase.concept_ablation import ConceptAblation
from dori.erase.erase_diff import EraseDiff
from dori.erase.esd import Esd
from dori.erase.gradient_ascent import GradientAscent
from dori.erase.naive_deletion import NaiveDeletion
from dori.erase.ordinary import OrdinaryTraining
from dori.erase.pairs import Work
from dori.erase.siss import Siss
from dori.errors import DoriError
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion

SLOW = dataclasses.replace(FAST, learning_rate=1e-4, ema_decay=0.5)
ERASERS: tuple[Any, ...] = (
    OrdinaryTraining(5, 2, SLOW),
    NaiveDeletion(steps=5, batch=2, tuner=SLOW),
    GradientAscent(steps=5, batch=2, stop_above=None, tuner=SLOW),
    EraseDiff(steps=5, batch=2, tuner=SLOW),
    Siss(steps=5, batch=2, tuner=SLOW),
    Esd(steps=5, batch=1, sampling_steps=2, tuner=SLOW),
    ConceptAblation(steps=5, batch=2, tuner=SLOW),
)


class Killed(Exception):
    """What a kill does to the process."""


@pytest.mark.parametrize("method", ERASERS, ids=lambda method: type(method).__name__)
def test_a_killed_training_goes_on_to_the_same_weights(
    method: Any, tiny: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(course, "EVERY", 2)
    before, said, path = model_fingerprint(tiny), list[str](), tmp_path / "state.safetensors"

    def kill(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            raise Killed

    whole = method(tiny, forget(tiny), retain(tiny), seed=3)
    with pytest.raises(Killed):
        method(tiny, forget(tiny), retain(tiny), seed=3, work=Work(checkpoint=path, say=kill))
    assert model_fingerprint(tiny) == before and path.exists()
    assert [re.sub("about .*", "", line) for line in said] == [f"training: {n} of 5 updates, " for n in (2, 4)]
    rows = tiny.rows
    resumed = method(tiny, forget(tiny), retain(tiny), seed=3, work=Work(checkpoint=path))
    assert tiny.rows - rows < whole.details["rows"]
    assert all(torch.equal(resumed.deltas[name], delta) for name, delta in whole.deltas.items())
    assert resumed.details == whole.details and resumed.details["updates"] == 5 == len(resumed.details["log"])
    with pytest.raises(DoriError, match="belongs to an erasure with other settings"):
        method(tiny, forget(tiny), retain(tiny), seed=4, work=Work(checkpoint=path))


def test_a_climb_that_was_killed_ends_where_it_would_have(
    tiny: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(course, "EVERY", 2)
    free = GradientAscent(steps=9, batch=2, stop_above=None, tuner=dataclasses.replace(FAST, learning_rate=1e-2))
    losses = free(tiny, forget(tiny), retain(tiny), seed=3).details["log"]
    assert losses[4] < losses[5]
    stopping = dataclasses.replace(free, stop_above=(max(losses[:5]) + losses[5]) / 2)
    whole, path = stopping(tiny, forget(tiny), retain(tiny), seed=3), tmp_path / "state.safetensors"
    assert whole.details["updates"] == 5 and len(whole.details["log"]) == 6

    def kill(line: str) -> None:
        if "4 of" in line:
            raise Killed

    with pytest.raises(Killed):
        stopping(tiny, forget(tiny), retain(tiny), seed=3, work=Work(checkpoint=path, say=kill))
    resumed = stopping(tiny, forget(tiny), retain(tiny), seed=3, work=Work(checkpoint=path))
    assert resumed.fingerprint == whole.fingerprint and resumed.details == whole.details
