"""A locality run in several processes: each makes cells of one folder, and the first one's records are as of one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_parts
from test_locality_run import PLAN, judge, tiny_run, tiny_subjects

from dori.locality.loop import locality
from dori.locality.records import Locality
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
    for index, order in ((1, ["m1", "m2", "m0"]), (2, ["m2", "m0", "m1"]), (0, ["m0", "m1", "m2"])):
        assert Processes(index, 3).turned(["m0", "m1", "m2"]) == order
    assert Processes(1, 5).turned(["m0"]) == ["m0"] and Processes(1, 2).turned([]) == []
