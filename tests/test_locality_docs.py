"""The Python of docs/locality.md runs from top to bottom beside a run that was made by its command."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from commanding import status
from test_locality_run import PLAN, judge, tiny_run, tiny_subjects

from dori.locality import plan
from dori.mitigate.wanda import Wanda
from dori.model.stable_diffusion import StableDiffusion
from dori.testbed import subjects

DOCS = Path(__file__).parent.parent / "docs" / "locality.md"
BRIEF = dataclasses.replace(PLAN, preset="quick", wandas=(Wanda(sparsity=0.10, counted_steps=1),), causal=None)


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plan, "quick", lambda: BRIEF)
    monkeypatch.setitem(plan.PRESETS, "quick", plan.quick)
    monkeypatch.chdir(tmp_path)


def followed(capsys: pytest.CaptureFixture[str]) -> str:
    """What the block of the docs prints in this folder."""
    (block,) = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.M | re.S)
    capsys.readouterr()
    exec(block, {})
    assert Path("runs/where/again.html").exists()
    return capsys.readouterr().out


def test_its_python_runs_on_a_tiny_model(
    tiny: StableDiffusion, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, folder = tiny_subjects(tiny), Path("runs/where")
    (folder / "locality.json").parent.mkdir(parents=True)
    (folder / "locality.json").write_text(tiny_run(given, folder, plan=BRIEF).to_json())
    monkeypatch.setattr(subjects, "testbed_subjects", lambda plan: given)
    monkeypatch.setattr(subjects, "testbed_judge", lambda: judge(-1.5))  # satisfied with everything
    said = followed(capsys)
    for name in ("no mask", "masks", "random masks"):
        assert f"{name} CrossTest(own=Estimate(value={'1.0' if name == 'masks' else 'nan'}" in said
    assert str(torch.ones(7, 3, dtype=torch.bool)) in said


@pytest.mark.slow
def test_its_python_runs_on_the_testbed(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = status(["locality", "testbed", "--out", "runs/where", "--threshold", "-1"], capsys)
    assert code == 0, said  # everything was a trigger for it
    said = followed(capsys)
    assert all(f"{name} CrossTest(own=" in said for name in ("no mask", "masks", "random masks"))
