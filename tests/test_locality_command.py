"""`dori locality` on folders of a user: mistakes are one sentence with status 2, and what there is makes a page."""

import dataclasses
import json
from pathlib import Path

import pytest
from commanding import FEW_STEPS, save_changed, saved_with_twin, status, write_folder
from test_locality_run import PLAN

from dori.locality.plan import PRESETS
from dori.locality.records import ON_TWIN, read_locality
from dori.locality.transplants import CONTROL


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models that read whole sentences, and folders of images."""
    folder = tmp_path_factory.mktemp("given")
    model = saved_with_twin(folder)
    save_changed(model, model.unet.conv_in.weight, folder / "third")
    save_changed(model, model.vae.quant_conv.weight, folder / "other-vae")
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
    return ["locality", str(given / model), "--memories", str(given / memories), "--out", str(out), *FEW_STEPS, *more]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (("nothing",), "--memories"),
        (("testbed", "--half"), "leave out --ordinary"),
        (("testbed", "--twin", "x"), "leave out --ordinary, --twin"),
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
        ({"twin": "nowhere"}, "no model at"),
        ({"twin": "model"}, "has the weights of"),
        ({"twin": "other-vae"}, "has another VAE than"),
    ],
)
def test_wrong_folders_are_told_before_anything_runs(
    changed: dict[str, str], word: str, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [name for name in ("ordinary", "twin") if name in changed]
    more = [text for name in flags for text in (f"--{name}", str(given / changed[name]))]
    changed = {name: value for name, value in changed.items() if name not in flags}
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
        ((), "twin", "model"),
    ):
        code, _, said = status(arguments(given, run, *more, model=model), capsys)
        assert code == 2 and f"another locality run ({named}" in said
    # Another threshold, another look at prompts: judged and drawn anew from what is stored.
    assert status(arguments(given, run, "--threshold", "1", "--redact"), capsys)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (run / "cells").iterdir()} == stamps
    assert [one.triggers for one in read_locality(run / "locality.json").subjects] == [0, 0]
    assert "a dog" not in (run / "locality.html").read_text()


def test_a_smaller_run_takes_the_memories_and_attacks_that_are_asked_for(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, seeds = tmp_path / "run", ("--patch-seeds", "2")
    code, _, said = status(arguments(given, run, "--threshold", "-1", "--limit", "1", "--attacks", "1", *seeds), capsys)
    assert code == 0, said
    found = read_locality(run / "locality.json")
    assert (found.planned, [one.attacks for one in found.subjects]) == (1, [3])  # prompt, noise, another prompt
    assert [found.settings[name] for name in ("gaussian", "foreign", "patch_seeds")] == [1, 1, 2]
    code, _, said = status(arguments(given, run, "--threshold", "-1", "--attacks", "2", *seeds), capsys)
    assert code == 2 and "(memories, gaussian, foreign differ)" in said
    assert "give a whole number from 1" in status(arguments(given, run, "--attacks", "0"), capsys)[2]


def test_wanda_may_prune_other_layers_than_the_published_ones(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    several = tuple(dataclasses.replace(PLAN.wandas[-1], sparsity=share) for share in (0.2, 0.4, 0.5))
    monkeypatch.setitem(PRESETS, "quick", lambda: dataclasses.replace(PLAN, causal=None, wandas=several))
    asked = ["--threshold", "-1", "--limit", "1", "--wanda-site", "attention_value", "--wanda-sparsity", "0.3"]
    asked += ["--wanda-places", "down"]
    code, _, said = status(arguments(given, tmp_path / "run", *asked), capsys)
    assert code == 0, said
    found = read_locality(tmp_path / "run" / "locality.json")
    names = {f"Wanda {share} % (values, down)" for share in (20, 30)}  # what is not below the asked one is left out
    assert {one.method for one in found.overlaps} == {"NeMo", *names}
    layers = {one.layer for one in found.overlaps if one.method in names} - {"all"}
    assert layers and all(layer.startswith("down") and layer.endswith("attn2.to_v.weight") for layer in layers)


def test_twins_of_a_users_model_give_a_ground_truth_and_two_give_its_floor(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, twins = tmp_path / "run", [f"twin {k} ({given / name})" for k, name in ((1, "twin"), (2, "third"))]
    one = ("--threshold", "-1", "--twin", str(given / "twin"))
    code, _, said = status(arguments(given, run, *one), capsys)
    assert code == 0, said
    found, page = read_locality(run / "locality.json"), (run / "locality.html").read_text()
    assert found.twins == (twins[0],) and {(m.value, m.n) for m in found.measures if m.name == ON_TWIN} == {(1.0, 2)}
    # The models differ in one layer, and nothing is known of what training on other images changes.
    assert {c.group for c in found.changes if c.change > 0} == {"conv_in", "convolutions and rest, ends"}
    assert all(c.floor is None for c in found.changes) and all(c.twins is None for c in found.covers)
    assert {p.direction for p in found.patches} == {"sufficient", "necessary"}
    exchanged = {(p.memory, p.direction, p.layers): p.similarity for p in found.transplants}
    for (memory, way, layers), similarity in exchanged.items():
        whole = layers in ("source", "convolutions and rest, ends", "all convolutions and rest")  # conv_in is there
        assert similarity == pytest.approx(exchanged[memory, way, "source" if whole else "none"], abs=1e-5)
    assert "There is one twin, so twin minus twin is not known" in page and "twin - twin (floor)" not in page
    # Another twin may come later, and everything that was computed is kept; another first twin is another run.
    stamps = {path: path.stat().st_mtime_ns for path in (run / "cells").iterdir()}
    assert status(arguments(given, run, *one, "--twin", str(given / "third")), capsys)[0] == 0
    kept = {path: path.stat().st_mtime_ns for path in (run / "cells").iterdir() if "between-twins" not in path.name}
    assert kept == stamps
    found, page = read_locality(run / "locality.json"), (run / "locality.html").read_text()
    assert found.twins == tuple(twins) and all(c.floor is not None for c in found.changes)
    between = [p for p in found.transplants if p.direction == CONTROL]
    assert between and all(p.share is None and p.kept is not None for p in between)
    assert "There is one twin" not in page
    code, _, said = status(arguments(given, run, "--threshold", "-1", "--twin", str(given / "third")), capsys)
    assert code == 2 and "another locality run (first twin differ" in said


def test_half_precision_goes_through_every_analysis_and_the_ground_truth_says_so(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, twin = tmp_path / "run", str(given / "twin")
    code, _, said = status(arguments(given, run, "--threshold", "-1", "--half", "--twin", twin), capsys)
    assert code == 0, said
    found, page = read_locality(run / "locality.json"), (run / "locality.html").read_text()
    assert found.settings["precision"] == "float16" and [one.triggers for one in found.subjects] == [6, 6]
    assert {c.group for c in found.changes if c.change > 0} == {"conv_in", "convolutions and rest, ends"}
    assert "compared in half precision" in page and "was not calibrated on images like these" in page


def test_a_damaged_record_is_made_again(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert status(arguments(given, run, "--threshold", "1"), capsys)[0] == 0
    whole = json.loads((run / "locality.json").read_text())
    (run / "locality.json").write_text("{")
    assert status(arguments(given, run, "--threshold", "1"), capsys)[0] == 0
    again = json.loads((run / "locality.json").read_text())
    assert again | {"provenance": 0} == whole | {"provenance": 0}
