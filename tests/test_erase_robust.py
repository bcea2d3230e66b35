"""`dori erase` on folders of a user: mistakes are one sentence with status 2, and nothing that was computed is lost."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commanding import FEW_STEPS, save_changed, saved_with_twin, status, write_folder
from erasing import PLAN

from dori.erase.plan import PRESETS
from dori.image_file import load_image, png_bytes
from dori.metrics.copy_descriptor import load_copy_descriptor
from dori.model.load import load_model
from dori.testbed.subjects import DESCRIPTOR

ROOT = Path(__file__).parent.parent
LIMIT = load_copy_descriptor(DESCRIPTOR).threshold


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads whole sentences, a twin, and folders of images."""
    folder = tmp_path_factory.mktemp("given")
    model = saved_with_twin(folder)
    save_changed(model, model.vae.quant_conv.weight, folder / "other-vae")
    for seed, (name, count) in enumerate([("memories", 2), ("controls", 2), ("retain", 12), ("few", 7)]):
        write_folder(folder / name, [f"{name} word {i}" for i in range(count)], seed=seed)
    write_folder(folder / "bare", [None, None], seed=8)
    for name, source in (("leaking", "memories"), ("twice", "controls"), ("alike", "memories")):
        shutil.copytree(folder / "retain", folder / name)
        shutil.copy(folder / source / f"{source}-1.png", folder / name / "retain-3.png")
    darker = load_image(folder / "alike" / "retain-3.png", 16) * 0.9
    for name in ("retain-3", "retain-5"):
        (folder / "alike" / f"{name}.png").write_bytes(png_bytes(darker))
    shutil.copytree(folder / "memories", folder / "renamed")
    lines = (folder / "renamed" / "metadata.jsonl").read_text().replace('"memories-', '"control-')
    (folder / "renamed" / "metadata.jsonl").write_text(
        lines.replace('"file_name": "control-', '"file_name": "memories-')
    )
    return folder


@pytest.fixture(autouse=True)
def _small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "quick", lambda: PLAN)


def run(given: Path, out: Path, *arguments: str, memories: str = "memories", retain: str = "retain") -> list[str]:
    """The arguments of an erasure of the given model."""
    folders = ["--memories", str(given / memories), "--retain", str(given / retain)]
    return ["erase", str(given / "model"), *folders, "--out", str(out), *FEW_STEPS, *arguments]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"memories": "nowhere"}, "is no folder"),
        ({"retain": "nowhere"}, "is no folder"),
        ({"retain": "few"}, "holds 7 images with a text"),
        ({"retain": "bare"}, "holds 0 images with a text"),
        ({"retain": "leaking"}, "'retain-3' shows memory 'memories-1', which it would teach"),
        ({"retain": "twice", "controls": "controls"}, "'retain-3' shows control 'controls-1', which it would teach"),
        ({"retain": "alike"}, "'retain-3' shows memory 'memories-1', which it would teach (similarity 0.9"),
        (
            {"retain": "alike"},
            f"above {LIMIT:.2f} is a copy), and 1 more copies are among them ('retain-5'); leave it out of one",
        ),
        ({"controls": "renamed"}, "control 'control-0' shows the image of memory 'memories-0'"),
        ({"twin": "model"}, "has the weights of"),
        ({"twin": "other-vae"}, "has another VAE than"),
        ({"twin": "nowhere"}, "no model at"),
        ({"split": "test", "limit": "1", "memories": "one"}, "the split 'test' of 1 memories is empty"),
    ],
)
def test_wrong_folders_are_told_before_anything_runs(
    changed: dict[str, str], sentence: str, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "one", ["one word 0"], seed=0)
    folders = {name: changed.pop(name) for name in ("memories", "retain") if name in changed}
    if folders.get("memories") == "one":
        folders["memories"] = str(tmp_path / "one")
    rest = [
        text
        for name, value in changed.items()
        for text in (f"--{name}", str(given / value) if name in ("controls", "twin") else value)
    ]
    code, _, said = status(run(given, tmp_path / "run", *rest, **folders), capsys)
    assert code == 2 and sentence in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "cells").exists()


def test_places_that_cannot_be_written_are_told_before_anything_runs(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    for arguments, sentence in (
        (run(given, tmp_path / "file"), "cannot be written"),
        (run(given, tmp_path / "run", "--save-model", str(tmp_path / "m.safetensors")), "would be a single file"),
        (run(given, tmp_path / "run", "--save-model", str(tmp_path / "m"), "--table", "erasers"), "no single model"),
    ):
        code, _, said = status(arguments, capsys)
        assert code == 2 and sentence in said
    assert (tmp_path / "file").read_text() == "x" and not (tmp_path / "run").exists()


def test_one_memory_alone_is_erased_and_nothing_is_claimed(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, said = status(run(given, tmp_path / "run", "--limit", "1"), capsys)
    assert code == 0 and "verdict: " in found and "verdict: removed" not in found
    assert "planned at most: " in said and "left" in said
    record = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert len(record["memories"]) == 1 and record["controls"] == [] and record["twins"] == []
    assert "neither a model that never saw the memories nor a control" in (
        (tmp_path / "run" / "certificate.html").read_text()
    )


def test_memories_without_texts_are_erased_by_those_erasers_that_can(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, _ = status(run(given, tmp_path / "run", memories="bare"), capsys)
    outcomes = json.loads((tmp_path / "run" / "proof.json").read_text())["outcomes"]
    assert code == 0 and "verdict: " in found
    assert {o["way"] for o in outcomes if o["state"] == "erased"} == {"dori", "latent", "relearn", "relearn, LoRA"}
    code, _, said = status(run(given, tmp_path / "other", "--eraser", "uce", memories="bare"), capsys)
    assert code == 2 and "'bare-0' has no text" in said


def test_a_folder_of_another_run_is_left_alone(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    controls = ("--controls", str(given / "controls"), "--eraser", "uce")
    assert status(run(given, tmp_path / "run", *controls), capsys)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for other, named in (
        (("--eraser", "ordinary", *controls[:2]), "eraser"),
        ((*controls, "--seed", "1"), "seed"),
        (controls[2:], "controls"),
        ((*controls[:2], "--table", "ablations"), "table"),
    ):
        code, _, said = status(run(given, tmp_path / "run", *other), capsys)
        assert code == 2 and f"holds another erasure ({named}" in said
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    # A twin may come later: the erasure itself is kept.
    cells = (tmp_path / "run" / "cells").iterdir()
    kept = {path: path.stat().st_mtime_ns for path in cells if path.name.startswith(("edit", "proof"))}
    assert status(run(given, tmp_path / "run", *controls, "--twin", str(given / "twin")), capsys)[0] == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert "twin 1" in (tmp_path / "run" / "certificate.html").read_text()
    (tmp_path / "run" / "erasure.json").unlink()
    code, _, said = status(run(given, tmp_path / "run", *controls), capsys)
    assert code == 2 and "results of another command" in said


def test_a_rate_that_diverges_is_told_and_a_smaller_one_goes_on_in_the_same_folder(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = dataclasses.replace(PLAN.adversarial.tuner, learning_rate=1e25)
    longer = dataclasses.replace(PLAN.adversarial, steps_per_round=5, tuner=wild)
    monkeypatch.setitem(PRESETS, "quick", lambda: dataclasses.replace(PLAN, adversarial=longer))
    code, _, said = status(run(given, tmp_path / "run", "--rate-scale", "2"), capsys)
    assert code == 2 and "diverged after" in said and "--rate-scale" in said
    monkeypatch.setitem(PRESETS, "quick", lambda: PLAN)
    assert status(run(given, tmp_path / "run", "--rate-scale", "1"), capsys)[0] == 0


def test_an_erasure_is_written_as_a_model(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--eraser", "uce", "--save-model", str(tmp_path / "clean"))
    code, found, _ = status(run(given, tmp_path / "run", *arguments), capsys)
    assert code == 0 and f"model: {tmp_path / 'clean'}" in found
    opened = (load_model(str(path)) for path in (tmp_path / "clean", given / "model"))
    changed = {
        name
        for (name, a), (_, b) in zip(*(model.unet.named_parameters() for model in opened), strict=True)
        if not torch.equal(a, b)
    }
    assert changed and all(".attn2.to_" in name for name in changed)


FULL_DISK = """
import resource, sys
sys.path.insert(0, "tests")
from erasing import PLAN
from dori.cli import main
from dori.erase.plan import PRESETS
PRESETS["quick"] = lambda: PLAN
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(given: Path, tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    more = ("--save-model", str(tmp_path / "clean"), "--eraser", "adversarial-paper")  # its surrogates fit
    arguments = run(given, tmp_path / "run", *more)

    def tried(limit: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", FULL_DISK, str(limit), *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    weights = sum(path.stat().st_size for path in (given / "model" / "unet").glob("*.safetensors"))
    first = tried(weights // 4)
    assert first.returncode == 2 and "no space left" in first.stderr and "Traceback" not in first.stderr, first.stderr
    kept = {path: path.read_bytes() for path in (tmp_path / "run" / "cells").iterdir()}
    assert kept
    second = tried(weights * 40)
    assert second.returncode == 0 and (tmp_path / "clean" / "model_index.json").exists(), second.stderr
    assert all(path.read_bytes() == data for path, data in kept.items())
