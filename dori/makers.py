"""What makes a figure beside its inputs: this package's code, the libraries and the kind of device.

A stored result that other makers made is not taken for one of this run (`dori.run`).
"""

import hashlib
import importlib.metadata
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import dori

# What shows figures, or says how far they are, cannot change them; and what trains the testbed shows in its weights.
NO_FIGURES = (
    "report/",
    "locality/page/",
    "cli.py",
    "__main__.py",
    "compare.py",
    "errors.py",
    "lock.py",
    "progress.py",
    *(f"testbed/{name}.py" for name in ("networks", "pipeline", "pool", "train", "vocabulary")),
)


@cache
def code_sha256() -> str:
    """SHA-256 over the names and texts of this package's source files that can change a figure."""
    root, digest = Path(dori.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(NO_FIGURES):
            digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def makers(device: str) -> dict[str, str]:
    """Code, libraries and kind of device ("cpu", "cuda")."""
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return {"code": code_sha256(), "device": device, **libraries}


def others(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """In words which makers were other ones: "other code and torch 2.12 (now 2.13)"; empty if none was."""
    found = [
        "other code" if name == "code" else f"{name} {before.get(name, 'unknown')} (now {value})"
        for name, value in now.items()
        if before.get(name) != value
    ]
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
