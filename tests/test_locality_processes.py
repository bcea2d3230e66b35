"""A locality run in several processes: each makes cells of one folder, and the first one's records are as of one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commanding import FEW_STEPS, saved_with_twin, status, write_folder
from conftest import tiny_parts
from test_locality_run import PLAN, judge, tiny_run, tiny_subjects

from dori.locality.loop import locality
from dori.locality.plan import PRESETS
from dori.locality.records import Locality, read_locality
from dori.model.stable_diffusion import StableDiffusion
from dori.processes import Processes
from dori.run import Run


def parts_of(found: Locality) -> dict[str, Any]:
    """All records but what differs from run to run."""
    return {key: value for key, value in json.loads(found.to_json()).items() if key != "provenance"}


def test_several_processes_make_the_cells_of_one_folder_and_the_first_reads_them(tmp_path: Path) -> None:
    models = [StableDiffusion(**tiny_parts(tmp_path), name=name) for name in ("tiny", "twin-a", "twin-b")]
    for scale, model in zip((1.1, 1.01, 0.99), models, strict=True):
        with torch.no_grad():
            for weight in model.unet.parameters():
                weight.mul_(scale)
    subjects = tiny_subjects(*models)
    plan = dataclasses.replace(PLAN, causal=dataclasses.replace(PLAN.causal, memories=2))
    made, found = list[set[str]](), dict[int, Locality]()
    for index in (1, 0):  # the further process first
        before = {path.stem for path in (tmp_path / "two" / "cells").glob("*")}
        found[index] = locality(
            subjects, plan=plan, judge=judge(-1.5), run=Run(tmp_path / "two", modules=()), processes=Processes(index, 2)
        )
        made.append({path.stem for path in (tmp_path / "two" / "cells").glob("*")} - before)
    ahead, first = made
    alone = tiny_run(subjects, tmp_path / "one", plan=plan)
    assert parts_of(found[0]) == parts_of(alone)
    assert ahead | first == {path.stem for path in (tmp_path / "one" / "cells").glob("*")}
    assert {key.split(".")[0] for key in first} == {"activations", "masks"}  # of prompts, and beside the memory before
    assert not any(f".{memory}." in key for key in first for memory in ("m0", "m1") if ".across" not in key)


LAUNCHED = """
import os, sys
sys.path.insert(0, "tests")
from test_locality_run import PLAN
from dori.cli import main
from dori.locality.plan import PRESETS
from dori.run import Run
PRESETS["quick"] = lambda: PLAN
made, once = open(sys.argv.pop(1) + os.environ["RANK"], "a"), Run._once
def told(self, key, suffix, inputs, read, packed):
    return once(self, key, suffix, inputs, read, lambda header: print(key, file=made) or packed(header))
Run._once = told
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_launched_run_says_what_one_process_says_and_makes_hardly_a_cell_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_with_twin(tmp_path)
    write_folder(tmp_path / "memories", ["a dog", "a cat", "a cow", "a hen"], seed=0)
    (tmp_path / "launched.py").write_text(LAUNCHED)

    def command(out: str) -> list[str]:
        given = ["locality", str(tmp_path / "model"), "--memories", str(tmp_path / "memories"), "--limit", "4"]
        return [*given, "--twin", str(tmp_path / "twin"), "--threshold", "-1", "--out", str(tmp_path / out), *FEW_STEPS]

    root = Path(__file__).parent.parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "launched.py")]
    ran = subprocess.run(
        [*launcher, str(tmp_path / "made-"), *command("two")],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("page: ") == 1  # the first one speaks
    first, second = ((tmp_path / f"made-{rank}").read_text().split() for rank in (0, 1))
    assert len(second) > 10 and len(first) > 10
    twice = set(first) & set(second)
    assert len({key.split(".")[1] for key in twice if key.startswith(("triggers", "judged"))}) <= 1  # where they met
    monkeypatch.setitem(PRESETS, "quick", lambda: PLAN)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as those that were launched: another number rounds otherwise
    try:
        assert status(command("one"), capsys)[0] == 0
    finally:
        torch.set_num_threads(threads)
    assert parts_of(read_locality(tmp_path / "two" / "locality.json")) == parts_of(
        read_locality(tmp_path / "one" / "locality.json")
    )
