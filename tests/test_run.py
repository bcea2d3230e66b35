"""A run folder keeps what was finished, gives it back only for the same inputs, and survives whatever kills it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import dori
from dori.cli import AUDITING, LOCATING, VERIFYING
from dori.erase.command import COMPUTING
from dori.errors import DoriError
from dori.makers import code_files, code_sha256
from dori.run import Run, canonical_sha256, cell_key, tensors_sha256, write_json, write_text

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Method:
    """A method with two settings, one nested in a tuple."""

    steps: int = 3
    rates: tuple[float, ...] = (0.1, 0.2)


class Counted:
    """A computation that counts how often it runs."""

    def __init__(self, result: dict) -> None:
        self.result, self.calls = result, 0

    def __call__(self) -> dict:
        self.calls += 1
        return self.result


def run_child(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python in a process of its own, with this repository importable."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_record_is_computed_once_and_comes_back_equal(tmp_path: Path) -> None:
    work = Counted({"losses": (0.1, 1e-300, -0.0), "name": "Zoë \u2028", "none": None, "nested": {"b": [1, True]}})
    first = Run(tmp_path, modules=()).once_record("a", {"method": Method(), "path": Path("x/y")}, work)
    second = Run(tmp_path, modules=()).once_record("a", {"path": "x/y", "method": Method()}, work)
    assert work.calls == 1
    assert (
        first
        == second
        == {"losses": [0.1, 1e-300, -0.0], "name": "Zoë \u2028", "none": None, "nested": {"b": [1, True]}}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    tensors = {"a": values, "same memory": values, "turned": values.T, "empty": values[:0], "one": values[0, 0]}
    work = Counted(tensors)
    first = Run(tmp_path, modules=()).once_tensors("a", {"seed": 0}, work)
    second = Run(tmp_path, modules=()).once_tensors("a", {"seed": 0}, work)
    assert work.calls == 1
    for stored in (first, second):
        assert stored.keys() == tensors.keys()
        assert all(torch.equal(stored[name], tensors[name]) and stored[name].dtype == dtype for name in tensors)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({"seed": 1, "steps": 2}, {"seed": 2, "steps": 2}, "seed"),
        ({"method": Method()}, {"method": Method(rates=(0.1, 0.3))}, "method.rates[1]"),
        ({"method": Method(), "seed": 1}, {"method": Method(steps=4), "seed": 2}, "method.steps, seed"),
        ({"seed": 1}, {"seed": 1, "new": None}, "new"),
        ({"seed": 1, "old": []}, {"seed": 1}, "old"),
        ({str(i): 0 for i in range(9)}, {str(i): 1 for i in range(9)}, "0, 1, 2, 3, 4, more"),
    ],
)
def test_other_inputs_compute_again_and_are_named(tmp_path: Path, before: dict, after: dict, named: str) -> None:
    said: list[str] = []
    run = Run(tmp_path, said.append, modules=())
    run.once_record("a", before, lambda: {"value": 1})
    run.once_tensors("a", before, lambda: {"value": torch.tensor(1)})
    assert said == []
    assert run.once_record("a", after, lambda: {"value": 2}) == {"value": 2}
    assert run.once_tensors("a", after, lambda: {"value": torch.tensor(2)})["value"] == 2
    assert said == [f"a: {named} changed, computed again"] * 2


@pytest.mark.parametrize("stale", [False, True])
def test_what_another_process_stored_meanwhile_stays(tmp_path: Path, *, stale: bool) -> None:
    mine, theirs, said = Run(tmp_path, modules=(), say=lambda line: said.append(line)), Run(tmp_path, modules=()), []
    if stale:
        mine.once_record("a", {"x": 0}, lambda: {"by": "before"})
        mine.once_tensors("b", {"x": 0}, lambda: {"by": torch.zeros(1)})

    def slow_record() -> dict[str, str]:
        theirs.once_record("a", {"x": 1}, lambda: {"by": "the other"})
        return {"by": "me"}

    def slow_tensors() -> dict[str, torch.Tensor]:
        theirs.once_tensors("b", {"x": 1}, lambda: {"by": torch.ones(1)})
        return {"by": torch.full((1,), 2.0)}

    assert mine.once_record("a", {"x": 1}, slow_record) == {"by": "the other"}
    assert mine.once_tensors("b", {"x": 1}, slow_tensors)["by"].item() == 1
    assert theirs.once_record("a", {"x": 1}, lambda: pytest.fail("it is stored")) == {"by": "the other"}
    assert len(said) == 2 * stale  # why each is computed again, once
    # One of other inputs is no answer to this question.
    found = mine.once_record("c", {"x": 1}, lambda: theirs.once_record("c", {"x": 2}, lambda: {"n": 2}) and {"n": 1})
    assert found == {"n": 1}


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("code", "made by other code"),
        ("torch", "made by torch 0.1 (now {torch})"),
        ("device", "made by device 0.1 (now cpu)"),
    ],
)
def test_other_makers_compute_anew_and_are_named_once(
    tmp_path: Path, part: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    made_by = Run(tmp_path, modules=()).made_by
    with monkeypatch.context() as patched:
        patched.setattr(Run, "made_by", property(lambda run: made_by | {part: "0.1"}))
        for key in "ab":
            Run(tmp_path, modules=()).once_record(key, {"seed": 1}, lambda: {"value": 1})
        assert Run(tmp_path, lines.append, modules=()).once_record("a", {"seed": 1}, lambda: {"value": 2}) == {
            "value": 1
        }
    run = Run(tmp_path, lines.append, modules=())
    for key in "ab":
        assert run.once_record(key, {"seed": 1}, lambda: {"value": 2}) == {"value": 2}
    assert lines == [f"{tmp_path}: {said.format(torch=made_by['torch'])}; results are computed anew"]


def test_a_cell_of_another_device_is_computed_anew(tmp_path: Path) -> None:
    lines: list[str] = []
    Run(tmp_path, device="cuda", modules=()).once_record("a", {}, lambda: {"value": 1})
    assert Run(tmp_path, lines.append, modules=()).once_record("a", {}, lambda: {"value": 2}) == {"value": 2}
    assert lines == [f"{tmp_path}: made by device cuda (now cpu); results are computed anew"]


FILES = {
    "__init__.py": "",
    "sampling.py": "import dori.noise\n",
    "noise.py": "x = 1\n",
    "attack/__init__.py": "",
    "attack/dori.py": '"""What it is."""\nfrom dori.sampling import x\nfrom dori.errors import E\n\ndef f(): ...\n',
    "errors.py": "class E: ...\n",
    "audit.py": "from dori.attack import dori\n\ndef f():\n    import dori.page\n",
    "page.py": "x = 1\n",
}


def test_the_code_is_all_that_the_computing_module_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed() -> str:
        return code_sha256.__wrapped__(("dori.audit",))

    def changed(name: str, text: str) -> bool:
        before = hashed()
        (tmp_path / name).write_text(text)
        return hashed() != before

    (tmp_path / "attack").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(dori, "__file__", str(tmp_path / "__init__.py"))
    assert changed("noise.py", "x = 2\n")
    assert changed("attack/__init__.py", "x = 2\n")
    assert changed("attack/dori.py", FILES["attack/dori.py"].replace("...", "return 1"))
    assert changed("sampling.py", "import dori.other\n")
    assert not changed("page.py", "x = 2\n")
    assert not changed("errors.py", "class E:\n    x = 2\n")
    assert not changed("noise.py", "# why\nx  =  2\n")
    assert not changed("attack/dori.py", FILES["attack/dori.py"].replace("...", "return 1").replace("What", "How"))
    with pytest.raises(ValueError, match="no module"):
        code_sha256.__wrapped__(("dori.adit",))


@pytest.mark.parametrize("modules", [AUDITING, LOCATING, VERIFYING, COMPUTING])
def test_a_commands_code_is_found_and_holds_no_page(modules: tuple[str, ...]) -> None:
    files = {path.relative_to(ROOT / "dori").as_posix() for path in code_files(modules)}
    assert {"sampling.py", "attack/dori.py", "model/stable_diffusion.py", "metrics/copy_descriptor.py"} <= files
    assert not [name for name in files if name.startswith(("report/", "locality/page/", "cli.py", "testbed/train.py"))]


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_torn_or_altered_cell_is_computed_again(tmp_path: Path, suffix: str) -> None:
    def once(run: Run) -> object:
        if suffix == ".json":
            return run.once_record("a", {"seed": 1}, Counted({"value": [1.5, 2.5]}))
        return run.once_tensors("a", {"seed": 1}, Counted({"value": torch.arange(4.0)}))

    once(Run(tmp_path, modules=()))
    path = tmp_path / "cells" / f"a{suffix}"
    whole = path.read_bytes()
    for end in range(0, len(whole) - 1, 5):  # to the last but one: a record may lack its final line break
        path.write_bytes(whole[:end])
        said: list[str] = []
        once(Run(tmp_path, said.append, modules=()))
        assert said == ["a: the stored cell is damaged, computed again"], end
        assert path.read_bytes() == whole
    flipped = whole.replace(b"2.5", b"2.6") if suffix == ".json" else whole[:-1] + bytes([whole[-1] ^ 1])
    for damage in (flipped, b"[]", b"3", b"[" * 100_000, b"\xff" * 50, b"{}"):
        path.write_bytes(damage)
        said = []
        once(Run(tmp_path, said.append, modules=()))
        assert said == ["a: the stored cell is damaged, computed again"], damage[:20]
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "key", ["", ".", "..", "../a", "a/b", "/a", "a\\b", ".hidden", "a\n", "a\0", "ä", "a" * 151, "-a", "a b"]
)
def test_a_key_cannot_leave_the_cells(tmp_path: Path, key: str) -> None:
    folder = tmp_path / "run"
    for once in (Run(folder, modules=()).once_record, Run(folder, modules=()).once_tensors):
        with pytest.raises(DoriError, match="cannot name a cell"):
            once(key, {}, dict)
    assert list(tmp_path.iterdir()) == []


def test_cell_keys_are_safe_and_keep_different_texts_apart() -> None:
    assert cell_key("none", "memory-01") == "none.memory-01"
    odd = ["a b", "a-b", "a/b", "../a", "", "ä" * 400, "ä" * 401, "a.b"]
    keys = [cell_key(text) for text in odd] + [cell_key("a/", "b"), cell_key("a", "/b")]
    assert len(set(keys)) == len(keys)
    for key in keys:
        Run(Path("unused"), modules=())._path(key, ".json")  # raises if it is not allowed


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_stored(tmp_path: Path, bad: float) -> None:
    run = Run(tmp_path, modules=())
    with pytest.raises(DoriError, match=r"cell 'a' holds .* at 'losses\[1\].x'"):
        run.once_record("a", {}, lambda: {"losses": [0.0, {"x": bad}]})
    with pytest.raises(DoriError, match="inputs of a cell"):
        run.once_record("a", {"method": Method(rates=(bad,))}, dict)
    with pytest.raises(DoriError, match="out.json"):
        write_json(tmp_path / "out.json", {"x": bad})
    assert not list(tmp_path.rglob("*.*"))


def test_a_failing_computation_stores_nothing(tmp_path: Path) -> None:
    def fail() -> dict:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Run(tmp_path, modules=()).once_record("a", {}, fail)
    assert Run(tmp_path, modules=()).once_record("a", {}, lambda: {"x": 1}) == {"x": 1}


def test_texts_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "long " * 100)
    write_text(path, "Zoë\n")
    assert path.read_bytes() == "Zoë\n".encode()
    assert [other.name for other in path.parent.iterdir()] == ["a.txt"]
    write_json(path, {"b": Method(), "a": "ä"})
    assert json.loads(path.read_text("utf-8")) == {"a": "ä", "b": {"class": "Method", "steps": 3, "rates": [0.1, 0.2]}}


def test_hashes_do_not_depend_on_order_and_see_every_difference() -> None:
    x = torch.arange(6.0)
    assert tensors_sha256({"a": x, "b": x}) == tensors_sha256({"b": x, "a": x.clone()})
    others = [{"a": x, "c": x}, {"a": x, "b": x.reshape(2, 3)}, {"a": x, "b": x.double()}, {"a": x, "b": -x}, {"a": x}]
    hashes = {tensors_sha256(tensors) for tensors in [{"a": x, "b": x}, *others]}
    assert len(hashes) == 1 + len(others)
    assert canonical_sha256({"a": 1, "b": 2}) == canonical_sha256({"b": 2, "a": 1}) != canonical_sha256({"a": 1})


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for run in (Run(tmp_path / "file", modules=()), Run(tmp_path / "file" / "below", modules=())):
        with pytest.raises(DoriError, match="cannot be written .* choose a folder"):
            run.once_record("a", {}, lambda: {"x": 1})
        with pytest.raises(DoriError, match="cannot be written"), run.locked():
            pass


def test_provenance_keeps_times_apart(tmp_path: Path) -> None:
    found = Run(tmp_path, modules=()).provenance()
    times = found.pop("times")
    again = Run(tmp_path, modules=()).provenance()
    again.pop("times")
    assert found == again
    assert found["versions"]["dori"] == dori.__version__
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert times["started"] <= times["finished"]
    assert json.loads(json.dumps(found)) == found


# One process imports torch once and forks a child for each point of death: just before the n-th thing that touches
# a file. Then a fresh child resumes, and the folder must be that of an undisturbed run, byte for byte.
KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from dori.run import Run

torch.set_num_threads(1)
root = Path(sys.argv[1])

def work(folder):
    run = Run(folder, modules=())
    with run.locked():
        run.plan("work", {f"cell-{i}": 1 for i in range(3)})
        for i in range(3):
            tensors = run.once_tensors(f"cell-{i}", {"i": i}, lambda: {"x": torch.arange(4000) * i, "y": torch.ones(2)})
            run.once_record(f"cell-{i}", {"i": i}, lambda: {"sum": int(tensors["x"].sum())})

def die_at(number, folder):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(folder) in str(arguments[0]):
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
    sys.addaudithook(hook)

def child(folder, number):
    pid = os.fork()
    if pid == 0:
        if number is not None:
            die_at(number, folder)
        work(folder)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])

def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

assert child(root / "whole", None) == 0
whole, deaths, different = contents(root / "whole"), 0, []
while child(folder := root / f"killed-{deaths}", deaths):
    assert child(folder, None) == 0
    if contents(folder) != whole:
        different.append(deaths)
    deaths += 1
print(json.dumps({"deaths": deaths, "different": different, "files": sorted(whole)}))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_killed_at_any_file_operation_a_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    child = run_child(KILLED, str(tmp_path))
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout)
    assert result["different"] == []
    assert result["deaths"] > 6 * 3  # six files, each opened, renamed and its folder forced to disk
    assert result["files"] == sorted(f"cells/cell-{i}.{end}" for i in range(3) for end in ("json", "safetensors"))


FULL = """
import resource, sys
from pathlib import Path
from dori.errors import DoriError
from dori.run import Run

run, limit = Run(Path(sys.argv[1]), modules=()), resource.getrlimit(resource.RLIMIT_FSIZE)
run.once_record("first", {}, lambda: {"x": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
try:
    run.once_record("second", {}, lambda: {"x": "x" * 100_000})
except DoriError as error:
    print(error)
names = sorted(path.name for path in Path(sys.argv[1]).rglob("*") if path.is_file())
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
def never():
    raise AssertionError("a finished cell was lost")
run.once_record("first", {}, never)
run.once_record("second", {}, lambda: {"x": "x" * 100_000})
print(*names)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_full_disk_loses_no_finished_cell_and_leaves_no_rest(tmp_path: Path) -> None:
    child = run_child(FULL, str(tmp_path))
    assert child.returncode == 0, child.stderr
    sentence, names = child.stdout.splitlines()
    assert "no space left" in sentence and "everything finished is kept" in sentence and "same command" in sentence
    assert names == "first.json"
