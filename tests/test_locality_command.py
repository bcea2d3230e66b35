"""`dori locality` on folders of a user: mistakes are one sentence with status 2, and what there is makes a page."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from commanding import reading_sentences, status, write_folder
from test_locality_run import PLAN

from dori.erase.write import save_model
from dori.locality.plan import PRESETS
from dori.locality.records import read_locality


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models that read whole sentences, and folders of images."""
    folder = tmp_path_factory.mktemp("given")
    model = reading_sentences(folder / "words")
    save_model(model, folder / "model", source="tiny")
    with torch.no_grad():
        model.unet.conv_in.weight.mul_(1.1)
    save_model(model, folder / "other", source="tiny")
    write_folder(folder / "memories", ["a dog", "a cat", None], seed=0)
    write_folder(folder / "bare", [None, None], seed=1)
    write_folder(folder / "one", ["a dog"], seed=2)
    write_folder(folder / "few", ["a", "b", "c"], seed=3)
    write_folder(folder / "long", ["a" * 100, *(f"word {k}" for k in range(20))], seed=4)
    return folder


@pytest.fixture(autouse=True)
def _small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "quick", lambda: dataclasses.replace(PLAN, causal=None))
    monkeypatch.setitem(PRESETS, "full", lambda: PLAN)


def arguments(given: Path, out: Path, *more: str, model: str = "model", memories: str = "memories") -> list[str]:
    """The arguments of a run on one of the given models."""
    return ["locality", str(given / model), "--memories", str(given / memories), "--out", str(out), *more]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (("nothing",), "--memories"),
        (("testbed", "--half"), "leave out --ordinary"),
        (("nothing", "--memories", "nowhere"), "nowhere is no folder"),
    ],
)
def test_missing_arguments_are_told_in_one_sentence(
    changed: tuple[str, ...], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = status(["locality", *changed, "--out", str(tmp_path / "run")], capsys)
    assert code == 2 and word in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"memories": "nowhere"}, "nowhere is no folder"),
        ({"memories": "bare"}, "0 different texts"),
        ({"memories": "one"}, "1 different texts"),
        ({"model": "nowhere"}, "no model at"),
        ({"ordinary": "few"}, "3 are too few"),
        ({"ordinary": "long"}, "shorten it"),
        ({"ordinary": "nowhere"}, "nowhere is no folder"),
    ],
)
def test_wrong_folders_are_told_before_anything_runs(
    changed: dict[str, str], word: str, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--ordinary", str(given / changed.pop("ordinary"))] if "ordinary" in changed else []
    code, _, said = status(arguments(given, tmp_path / "run", *more, **changed), capsys)
    assert code == 2 and word in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "cells").exists()


def test_a_run_whose_attacks_all_fail_ends_in_a_page_that_says_so(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, said = status(arguments(given, tmp_path / "run", "--threshold", "1", "--preset", "full"), capsys)
    assert code == 0 and "locality.html" in out and "100 %" in said
    page = (tmp_path / "run" / "locality.html").read_text()
    assert "nothing can be said about where it lives" in page and "There is no model that never saw" in page


def test_a_finished_run_is_drawn_again_and_another_one_is_not_overwritten(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert status(arguments(given, run, "--threshold", "-1"), capsys)[0] == 0
    found = read_locality(run / "locality.json")
    assert [one.triggers for one in found.subjects] == [6, 6]  # no dose is known: in the folder's order
    stamps = {path: path.stat().st_mtime_ns for path in (run / "cells").iterdir()}
    for more, model, named in (
        (("--preset", "full"), "model", "causal"),
        (("--seed", "1"), "model", "seed"),
        ((), "other", "model"),
    ):
        code, _, said = status(arguments(given, run, *more, model=model), capsys)
        assert code == 2 and f"another locality run ({named}" in said
    # Another threshold, another look at prompts: judged and drawn anew from what is stored.
    assert status(arguments(given, run, "--threshold", "1", "--redact"), capsys)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (run / "cells").iterdir()} == stamps
    assert [one.triggers for one in read_locality(run / "locality.json").subjects] == [0, 0]
    assert "a dog" not in (run / "locality.html").read_text()


def test_a_damaged_record_is_made_again(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert status(arguments(given, run, "--threshold", "1"), capsys)[0] == 0
    whole = json.loads((run / "locality.json").read_text())
    (run / "locality.json").write_text("{")
    assert status(arguments(given, run, "--threshold", "1"), capsys)[0] == 0
    again = json.loads((run / "locality.json").read_text())
    assert again | {"provenance": 0} == whole | {"provenance": 0}
