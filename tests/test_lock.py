"""One process at a time works in a run folder, and a killed one does not keep it."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dori.errors import DoriError
from dori.run import Run

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
HOLDER = """
import sys, time
from pathlib import Path
from dori.lock import locked
with locked(Path(sys.argv[1]) / "lock", say=print):
    print("held", flush=True)
    time.sleep(100)
"""
# Six processes find the lock of a dead one at the same moment; each tells whether it got in. The say
# that follows the look at the old lock sleeps, so that heirs who are not kept apart all see it.
HEIRS = """
import os, sys, time
from pathlib import Path
from dori.errors import DoriError
from dori.lock import locked
folder, stale = Path(sys.argv[1]), sys.argv[2]
(folder / "lock").write_text(stale)
for number in range(6):
    if os.fork() == 0:
        try:
            with locked(folder / "lock", say=lambda line: time.sleep(0.05 * (number + 1))):
                os.write(1, b"in\\n")
                time.sleep(2)
        except DoriError:
            os.write(1, b"refused\\n")
        os._exit(0)
for _ in range(6):
    os.wait()
"""
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes")


def write_lock(folder: Path, owner: object) -> None:
    """A lock file that another process left."""
    (folder / "lock").write_text(owner if isinstance(owner, str) else json.dumps(owner))


def dead_pid() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_the_lock_is_gone_after_the_block_also_when_it_raises(tmp_path: Path) -> None:
    run = Run(tmp_path / "new", modules=())
    with pytest.raises(ZeroDivisionError), run.locked():
        assert (tmp_path / "new" / "lock").exists()
        raise ZeroDivisionError
    with run.locked():
        pass
    assert list(run.folder.iterdir()) == []


def test_a_second_user_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with Run(tmp_path, modules=()).locked():
        with (
            pytest.raises(DoriError, match=f"in use by process {os.getpid()} .* delete"),
            Run(tmp_path, modules=()).locked(),
        ):
            pass
        assert (tmp_path / "lock").exists()


@posix
def test_a_living_process_keeps_others_out_and_a_killed_one_does_not(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(DoriError, match=f"in use by process {holder.pid} on "), Run(tmp_path, modules=()).locked():
            pass
        holder.kill()
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / ".a.json.7.partial").write_text("half")
    (tmp_path / "cells" / "a.json").write_text("whole")
    said: list[str] = []
    with Run(tmp_path, said.append, modules=()).locked():
        assert [path.name for path in (tmp_path / "cells").iterdir()] == ["a.json"]
    assert len(said) == 1 and "taking over" in said[0]


@posix
def test_a_lock_of_a_dead_reused_or_torn_number_is_taken_over(tmp_path: Path) -> None:
    host = platform.node()
    stale = [
        {"host": host, "pid": dead_pid(), "started": 1},
        {"host": host, "pid": 2**40},
        {"host": host, "pid": "x"},
        {"host": host, "pid": -1},
        "",
        '{"host": "',
        "[]",
        "\x00",
    ]
    if Path("/proc/self/stat").exists():
        stale.append({"host": host, "pid": os.getpid(), "started": 1})  # our number, another process
    for owner in stale:
        write_lock(tmp_path, owner)
        said: list[str] = []
        with Run(tmp_path, said.append, modules=()).locked():
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        assert len(said) == 1, owner


def test_a_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    write_lock(tmp_path, {"host": "elsewhere", "pid": dead_pid(), "started": 1})
    with pytest.raises(DoriError, match=r"on elsewhere; .* delete .*lock"), Run(tmp_path, modules=()).locked():
        pass
    assert (tmp_path / "lock").exists()


@posix
def test_of_many_heirs_one_gets_in(tmp_path: Path) -> None:
    stale = json.dumps({"host": platform.node(), "pid": dead_pid(), "started": 1})
    child = subprocess.run(
        [sys.executable, "-c", HEIRS, str(tmp_path), stale],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert sorted(child.stdout.split()) == ["in"] + ["refused"] * 5
    assert not (tmp_path / "lock").exists()
