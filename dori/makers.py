"""What makes a figure beside its inputs: the code that computes it, the libraries and the kind of device.

A stored result that other makers made is not taken for one of this run (`dori.run`).
"""

import ast
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import dori

# They store, time or word what was computed, and cannot change it.
NO_FIGURES = frozenset(
    {"cost.py", "errors.py", "findings.py", "judgement.py", "lock.py", "makers.py", "progress.py", "record_file.py"}
)


def _file(root: Path, module: str) -> Path | None:
    """The file of `dori.a.b`; None for other packages and for what a module merely defines."""
    package, *parts = module.split(".")
    path = root.joinpath(*parts)
    if package != "dori":
        return None
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _imported(source: ast.Module) -> Iterator[str]:
    """Modules that are imported whenever this one is; what a function imports, to show its figures, is not."""
    for node in source.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_words(source: ast.Module) -> str:
    """The code without comments and docstrings."""
    for node in ast.walk(source):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(source)


def code_files(modules: Sequence[str]) -> dict[Path, str]:
    """The files of `modules` and of all of this package that they import and that makes figures, with their code.

    Comments and docstrings are left out.

    Raises:
        ValueError: one of `modules` does not exist.
    """
    root, waiting = Path(dori.__file__).parent, list(modules)
    unknown = [module for module in modules if _file(root, module) is None]
    if unknown:
        raise ValueError(f"there is no module {unknown[0]}")
    found: dict[Path, str] = {}
    while waiting:
        module = waiting.pop()
        package = module.rpartition(".")[0]
        waiting += [package] if package else []
        path = _file(root, module)
        if path is not None and path not in found and path.relative_to(root).as_posix() not in NO_FIGURES:
            source = ast.parse(path.read_text(encoding="utf-8"))
            waiting += _imported(source)
            found[path] = _without_words(source)
    return found


@cache
def code_sha256(modules: tuple[str, ...]) -> str:
    """SHA-256 over names and code of `code_files`."""
    root, digest = Path(dori.__file__).parent, hashlib.sha256()
    for path, code in sorted(code_files(modules).items()):
        digest.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(code.encode()).hexdigest()}\n".encode())
    return digest.hexdigest()


def makers(modules: Sequence[str], device: str) -> dict[str, str]:
    """Code, libraries and kind of device ("cpu", "cuda")."""
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return {"code": code_sha256(tuple(modules)), "device": device, **libraries}


def others(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """In words which makers were other ones: "other code and torch 2.12 (now 2.13)"; empty if none was."""
    found = [
        "other code" if name == "code" else f"{name} {before.get(name, 'unknown')} (now {value})"
        for name, value in now.items()
        if before.get(name) != value
    ]
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
