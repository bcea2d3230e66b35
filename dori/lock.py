"""One process at a time in a folder: a lock file that names its owner, and that outlives a killed one by nothing.

The file is made with O_EXCL and holds host, process id and start time. The lock of a dead process of this host is
taken over; while that is decided, the kernel's own lock on the folder (where there is one) keeps two heirs apart.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dori.errors import DoriError

try:
    import fcntl
except ImportError:  # not a POSIX system: a stale lock must be removed by hand
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(path: Path, *, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file inside the block.

    Args:
        path: the lock file; its folder exists.
        say: told when the lock of a dead process is taken over.

    Raises:
        DoriError: a living process, or one of another host, holds it.
    """
    me = _me()
    with _alone(path.parent):
        owner = _owner(path)
        if owner is not None:
            if _may_live(owner):
                raise DoriError(
                    f"{path.parent} is in use by process {owner.get('pid')} on {owner.get('host')}; wait "
                    f"for it, choose another folder, or, if it is gone, delete {path}"
                )
            say(f"{path.parent}: the process that worked here was killed, taking over")
        _create(path, me, over=owner is not None)
    try:
        yield
    finally:
        if _owner(path) == me:
            path.unlink(missing_ok=True)


def _create(path: Path, me: dict[str, Any], *, over: bool) -> None:
    try:
        if over:
            path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w") as file:
            json.dump(me, file)
    except FileExistsError:
        raise DoriError(
            f"{path.parent} was taken by another process this moment; wait for it or choose another folder"
        ) from None
    except OSError as error:
        raise DoriError(
            f"{path} cannot be written ({error.strerror}); choose a folder that you may write and that has space left"
        ) from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time look at the lock file and replace it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks; O_EXCL still decides
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _me() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid(), "started": _start(os.getpid())}


def _owner(path: Path) -> dict[str, Any] | None:
    """Who holds the lock: None if nobody, an empty dictionary if the file is torn."""
    try:
        owner = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _may_live(owner: dict[str, Any]) -> bool:
    """Whether the owner may still work: it is on another host, or a process of its number and start runs here."""
    if not owner:
        return fcntl is None  # torn: its maker died before the first byte, for we are alone here
    if owner.get("host") != platform.node() or os.name != "posix":
        return True
    pid = owner.get("pid")
    if type(pid) is not int or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, somebody else's
    # Numbers are used again: another start time is another process.
    return owner.get("started") is None or owner["started"] == _start(pid)


def _start(pid: int) -> int | None:
    """Start time of a process in ticks since boot; None where the system does not tell or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] == b"Z" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
