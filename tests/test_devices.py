"""Every command computes on the device that it is given, and finds there what it finds on the CPU.

The device is pretended (`pretend.py`): it computes as the CPU does, so that figures must agree, and refuses to mix.
It works in a process that makes it known before its first backward pass: this file, run as a script.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import erasing
import pytest
import test_audit
import test_locality_run
import torch
from commanding import FEW_STEPS, saved_with_twin, write_folder
from pretend import NAME, Away, pretended
from test_testbed import trained_in_parts
from torch import nn

from dori.audit import plan as audits
from dori.cli import main
from dori.erase import plan as erasures
from dori.locality import plan as localities
from dori.metrics import copy_training
from dori.metrics.copy_training import CopyRecipe
from dori.testbed import train
from dori.testbed.fit import Loss, fit
from dori.testbed.folder import DATA, load_testbed
from dori.testbed.pipeline import train_testbed
from dori.testbed.train import Recipe

ROOT = Path(__file__).parent.parent
ERASING = dataclasses.replace(  # the model as it was, averaged weights, neighbours and relapses count
    erasing.PLAN,
    adversarial=dataclasses.replace(
        erasing.PLAN.adversarial,
        steps_per_round=2,
        near_weight=1.0,
        relapse_weight=1.0,
        tuner=dataclasses.replace(erasing.PLAN.adversarial.tuner, ema_decay=0.5),
    ),
)
UNLIKE = {"provenance", "seconds", "tsne"}  # when, by what and how fast it was made; a map that rounding turns


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models that read whole sentences, and folders of images."""
    folder = tmp_path_factory.mktemp("given")
    saved_with_twin(folder)
    write_folder(folder / "memories", ["a dog", "a cat", None], seed=0)
    write_folder(folder / "controls", ["a fish", "a bird"], seed=1)
    write_folder(folder / "ordinary", [f"word {k}" for k in range(24)], seed=2)
    return folder


COMMANDS = {
    "audit": ("--controls", "controls", "--ordinary", "ordinary", "--clip", str(DATA / "clip")),
    "locality": ("--ordinary", "ordinary"),
    "erase": ("--controls", "controls", "--retain", "ordinary", "--clip", str(DATA / "clip")),
}
RECORDS = {"audit": "audit.json", "locality": "locality.json", "erase": "proof.json"}


def commanded(command: str, given: Path, out: Path, device: str) -> None:
    """Run a command with a small preset."""
    few = (audits, test_audit.PLAN), (localities, test_locality_run.PLAN), (erasures, ERASING)
    folders = [str(given / text) if (given / text).is_dir() else text for text in COMMANDS[command]]
    more = ["--memories", str(given / "memories"), "--twin", str(given / "twin"), *FEW_STEPS]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        for presets, plan in few:
            patch.setitem(presets.PRESETS, "quick", lambda plan=plan: plan)
        main([command, str(given / "model"), *more, *folders, "--device", device, "--out", str(out)])
    assert stopped.value.code == 0


def trained(given: Path, out: Path, device: str) -> None:
    """Train a testbed for one step a stage, each of which must take place on the device."""

    def checked(stage: str, model: nn.Module, loss: Loss, *more: Any, **named: Any) -> None:
        def there(step: int, generator: torch.Generator) -> torch.Tensor:
            found = loss(step, generator)
            assert found.device.type == device and {p.device.type for p in model.parameters()} == {device}, stage
            return found

        fit(stage, model, there, *more, **named)

    recipe = Recipe(images=32, fresh_images=8, batch=4, clip_batch=4, vae_steps=1, clip_steps=1, base_steps=1)
    recipe = dataclasses.replace(recipe, fork_steps=1, device=device)
    copies = CopyRecipe(groups=2, batch_groups=1, steps=1, negatives=36)
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, copy_training):
            patch.setattr(module, "fit", checked)
        train_testbed(
            out / "work", out, recipe, copies, say=lambda line: None, checkpoints=("base", "planted", "early")
        )


def fitted(given: Path, out: Path, device: str) -> None:
    """A training that is stopped and goes on there, and on the CPU, ends as one that was never stopped."""
    straight = trained_in_parts(out / "straight", {99: "cpu"})
    for name, stops in (("there", {6: device, 99: device}), ("back", {6: device, 9: "cpu", 99: device})):
        found = trained_in_parts(out / name, stops)
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(found, straight, strict=True))


def mixed(given: Path, out: Path, device: str) -> None:
    """The device takes and refuses what a real one does."""
    there, here = torch.ones(3, device=device), torch.ones(3)
    assert isinstance(there, Away) and there.device.type == device and (there + 1).sum().item() == 6
    assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]  # numbers mix
    assert there[torch.tensor([0, 2])].cpu().tolist() == [1, 1]  # so do indices
    there.data = torch.zeros(3, device=device)
    assert (there + 1).tolist() == [1, 1, 1]
    for mixing in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there.long()]):
        with pytest.raises(RuntimeError, match="same device"):
            mixing()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, generator=torch.Generator(), device=device)
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()


def elsewhere(work: str, given: Path, out: Path) -> None:
    """Do it in a process of its own, on the pretended device."""
    child = subprocess.run(
        [sys.executable, __file__, work, str(given), str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert child.returncode == 0, child.stderr


def figures(value: Any, number: Callable[[float], Any] = float) -> Any:
    """A record without what rounding changes beyond its last digits, and without when and by what it was made."""
    if isinstance(value, dict):
        alike = [key for key in value if key not in UNLIKE and "sha256" not in key]
        return {key: figures(value[key], number) for key in alike}
    if isinstance(value, list):
        return [figures(part, number) for part in value]
    return number(value) if isinstance(value, float) else value


def about(number: float) -> Any:
    """Equal up to what another order of sums changes."""
    return pytest.approx(number, rel=2e-3, abs=2e-3, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_finds_on_another_device_what_it_finds_on_the_cpu(command: str, given: Path, tmp_path: Path) -> None:
    commanded(command, given, tmp_path / "here", "cpu")
    elsewhere(command, given, tmp_path / "there")
    here, there = (json.loads((tmp_path / at / RECORDS[command]).read_text()) for at in ("here", "there"))
    assert figures(there) == figures(here, about)
    assert [record["provenance"]["machine"]["device"] for record in (here, there)] == ["cpu", NAME]


@pytest.mark.slow
def test_every_stage_of_the_testbed_is_trained_on_the_device(tmp_path: Path) -> None:
    trained(tmp_path, tmp_path / "here", "cpu")
    elsewhere("trained", tmp_path, tmp_path / "there")  # one step: that the numbers agree, `fitted` tells
    for checkpoint in ("base", "planted", "early"):
        here, there = (load_testbed(checkpoint, tmp_path / at).unet.state_dict() for at in ("here", "there"))
        apart, size = (
            sum(float(v.square().sum()) for v in found) for found in ([there[n] - here[n] for n in here], here.values())
        )
        assert apart < 1e-6 * size


@pytest.mark.parametrize("work", ["mixed", "fitted"])
def test_the_device_refuses_what_a_real_one_refuses_and_a_training_goes_on_there(work: str, tmp_path: Path) -> None:
    elsewhere(work, tmp_path, tmp_path)


if __name__ == "__main__":
    work, given_folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    load_testbed("planted")  # transformers loads rightly ever after; not if its first load comes after the device
    with pretended() as name:
        if work in COMMANDS:
            commanded(work, given_folder, out, name)
        else:
            {"trained": trained, "mixed": mixed, "fitted": fitted}[work](given_folder, out, name)
