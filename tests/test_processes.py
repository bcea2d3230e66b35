"""Several processes: they share rows, triggers and the search for surrogates, and reach what one reaches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from erasing import draw, forget, retain
from test_erase_adversarial import METHOD

from dori.erase.tuning import Tuner, tuning
from dori.model.stable_diffusion import StableDiffusion
from dori.processes import Processes

ROOT = Path(__file__).parent.parent


def test_a_process_without_rows_adds_nothing_to_the_gradient(
    tiny: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dori.processes.reduce", lambda tensor, reduction: tensor)
    with tuning(tiny, Tuner(), processes=Processes(1, 2)) as tuned:
        gradient, loss = tuned.gradient(lambda rows: pytest.fail("no row is this process's"), 1)
    assert loss == 0 and all(not grad.any() for grad in gradient)


def test_shares_of_rows_cover_the_batch_once() -> None:
    for count in (1, 2, 3, 5):
        for rows in (7, 1, 0):  # more processes than rows are no error
            shares = torch.cat([Processes(index, count).share(rows) for index in range(count)])
            assert shares.sort().values.tolist() == list(range(rows))
    given = {0: draw(2, 3, seed=0), 1: draw(0, 3, seed=0), 2: draw(5, 3, seed=1)}
    alone = Processes().every(given, 3, like=given[1])
    assert all(torch.equal(alone[row], rows) for row, rows in given.items()) and len(alone) == 3


def test_shares_of_cells_are_even_and_the_first_process_goes_on_with_the_others_from_their_end() -> None:
    costs = {f"cell-{i}": (7 * i) % 11 + 1 for i in range(30)}
    for count, beside in ((1, 5), (2, 0), (3, 40), (4, 10_000)):
        processes = [Processes(index, count) for index in range(count)]
        shares = processes[0].shares(costs, beside=beside)
        assert sorted(key for share in shares for key in share) == sorted(costs)
        assert all(share == [key for key in costs if key in share] for share in shares)  # in the given order
        loads = [sum(costs[key] for key in share) + beside * (i == 0) for i, share in enumerate(shares)]
        assert max(loads[1:] or [0]) - min(loads) <= max(costs.values())
        assert loads[0] <= max([beside, *loads[1:]]) + max(costs.values()) or count == 1
        turns = [one.in_turn(costs, beside=beside) for one in processes]
        assert [own for own, _ in turns] == shares and all(not then for _, then in turns[1:])
        assert turns[0][1] == [key for share in shares[1:] for key in reversed(share)]


def test_processes_go_towards_each_other() -> None:
    items = list("abcdefgh")
    assert [Processes(index, 2).towards(items) for index in (0, 1)] == [items, items[::-1]]
    assert [Processes(index, 3).towards(items) for index in (0, 1, 2)] == [items, list("edcba"), items[::-1]]
    assert Processes().towards(items) == items
    assert Processes(1, 5).towards(["a"]) == [] and Processes(4, 5).towards(["a"]) == ["a"]
    assert Processes(9, 16, local=1).device("cuda") == "cuda:1" and Processes(9, 16).device("cuda:3") == "cuda:3"
    assert Processes().device("cuda") == "cuda" and Processes(1, 2, 1).device("cpu") == "cpu"


WORKER = """
import sys
from pathlib import Path
from typing import Any
sys.path.insert(0, "tests")
import torch
from conftest import tiny_parts
from erasing import forget, retain
from test_erase_adversarial import METHOD, watch
from dori.erase.pairs import Work
from dori.processes import started
from dori.model.stable_diffusion import StableDiffusion
folder = Path(sys.argv[1])
processes = started(device="cpu")
own = folder / f"tokenizer-{processes.index}"
own.mkdir()
model = StableDiffusion(**tiny_parts(own), name="tiny")
edit = METHOD(model, forget(model), retain(model), seed=0, work=Work(folder / "state.safetensors", processes=processes))
edit.save(folder / f"edit-{processes.index}.safetensors")
mine = {row: torch.full((row, 2), row + 0.5) for row in processes.share(4).tolist()}
for count, held in ((4, mine), (1, {0: torch.ones(3, 2)} if processes.first else {})):
    every = processes.every(held, count, like=torch.zeros(0, 2))
    assert [len(rows) for rows in every] == ([0, 1, 2, 3] if count == 4 else [3])
    assert all(torch.equal(rows, torch.full_like(rows, i + 0.5 if count == 4 else 1.0)) for i, rows in enumerate(every))
"""


SEARCHER = """
import sys
from pathlib import Path
from typing import Any
sys.path.insert(0, "tests")
import dataclasses
import torch
from conftest import tiny_parts
from erasing import PLAN, bench, material
from dori.erase.pairs import Work
from dori.processes import started
from dori.model.stable_diffusion import StableDiffusion
folder = Path(sys.argv[1])
processes = started(device="cpu")
own = folder / f"tokenizer-{processes.index}"
own.mkdir(exist_ok=True)
model = StableDiffusion(**tiny_parts(own), name="tiny")
run = folder if processes.first else folder / str(processes.index)
method = dataclasses.replace(PLAN.adversarial.paper(), near_weight=1.0)
plan = dataclasses.replace(PLAN, adversarial=method)
made = dataclasses.replace(bench(run, material(model), plan), work=Work(processes=processes)).forget([method])
tensors = [*made.surrogates, made.near.latents, made.near.embeddings]
torch.save([tensors, made.near.source, model.rows], folder / f"found-{processes.index}.pt")
"""


PROVER = """
import sys
from pathlib import Path
from typing import Any
sys.path.insert(0, "tests")
import dataclasses, json
import torch
from conftest import tiny_parts
from erasing import PLAN, bench, material
from dori.erase.pairs import Work
from dori.processes import started
from dori.erase.proof import prove
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run
folder, asked = Path(sys.argv[1]), []
processes = started(device="cpu")
own = folder / f"tokenizer-{processes.index}"
own.mkdir(exist_ok=True)
model = StableDiffusion(**tiny_parts(own), name="tiny")
run = folder / "run" if processes.first else folder / "run" / "processes" / str(processes.index)
work = Work(states=folder / "run", processes=processes)
once = Run.once_record
def counted(self, key, inputs, compute):
    return once(self, key, inputs, lambda: asked.append(key) or compute())
Run.once_record = counted
own = dataclasses.replace(bench(run, material(model)), work=work)
proof = prove(own, "adversarial", beside=9, meanwhile=lambda edit: asked.append("meanwhile"))
assert (proof is None) == (not processes.first)
record = proof and {key: value for key, value in proof.record.items() if key != "provenance"}
(folder / f"proven-{processes.index}.json").write_text(json.dumps([record, asked], sort_keys=True))
"""


@pytest.mark.slow
def test_several_processes_share_the_judging_and_any_number_goes_on(tmp_path: Path) -> None:
    def proven(count: int, name: str) -> list[Any]:
        (tmp_path / name).mkdir(exist_ok=True)
        run_together(PROVER, tmp_path / name, count)
        return [json.loads((tmp_path / name / f"proven-{rank}.json").read_text()) for rank in range(count)]

    (record, first), (_, second) = proven(2, "two")
    met = first.index("meanwhile")  # the first one's own work comes before the others' cells
    assert "meanwhile" not in second and any(key.startswith("unprompted") for key in first[:met])
    assert all(key.startswith("proof") for key in first[met + 1 :])
    first.remove("meanwhile")
    assert any(".relearn." in key for key in second) and any(".dori." in key for key in second)
    assert sum(key.startswith("proof") for key in first) > 3
    assert len([*first, *second]) - len({*first, *second}) <= 1  # the cell at which they met
    (again, asked), (helped, nothing) = proven(1, "two")[0], proven(2, "two")[1]
    assert again == record and asked == nothing == [] and helped is None  # all was there, and one has no meanwhile
    alone, every = proven(1, "one")[0]
    assert set(every) == {*first, *second}
    # The training's sums are rounded otherwise; whom it does not touch answers the same.
    assert unedited(alone["outcomes"]) == unedited(record["outcomes"]) != []
    for one, other in zip(alone["outcomes"], record["outcomes"], strict=True):
        assert one["similarities"] == pytest.approx(other["similarities"], abs=0.02)


def unedited(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the original model and of the twin."""
    return [one for one in outcomes if not one["state"].startswith("erased")]


@pytest.mark.slow
def test_several_processes_share_the_search_and_any_number_goes_on(tmp_path: Path) -> None:
    def found(count: int) -> list[Any]:
        run_together(SEARCHER, tmp_path, count)
        return [torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) for rank in range(count)]

    two = found(2)
    spent = [rows for _, _, rows in two]
    assert 0 < spent[1] < spent[0]  # the first one draws the neighbours too
    (alone,), again = found(1), found(2)
    assert [one[2] for one in (alone, *again)] == [0, 0, 0]
    for tensors, source, _ in (two[1], alone, *again):
        assert source == two[0][1]
        assert all(torch.equal(a, b) for a, b in zip(tensors, two[0][0], strict=True)) and len(tensors[0]) > 0


def run_together(program: str, folder: Path, count: int) -> None:
    """The program in so many processes, each with the folder as its argument."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
        "ACCELERATE_USE_CPU": "true",
        "LOCAL_WORLD_SIZE": str(count),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder)],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0] * count


@pytest.mark.slow
def test_several_processes_reach_the_weights_of_one(tiny: StableDiffusion, tmp_path: Path) -> None:
    from dori.edit import load_edit

    alone = METHOD(tiny, forget(tiny), retain(tiny), seed=0)
    run_together(WORKER, tmp_path, 2)
    edits = [load_edit(tmp_path / f"edit-{rank}.safetensors") for rank in range(2)]
    assert edits[0].fingerprint == edits[1].fingerprint
    for key, value in alone.deltas.items():
        assert torch.allclose(edits[0].deltas[key], value, atol=2e-4)
