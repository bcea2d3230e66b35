"""The house rules that no linter knows: short files, telling names, no deep classes, a true tree in the README."""

import ast
import re
import subprocess
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dori"
SOURCES = sorted(path for folder in ("dori", "tests") for path in (ROOT / folder).rglob("*.py"))
LINES = 500
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "base"}
# Folders of one machine; "~" and "/tmp" are everyone's. Assembled, so that this file does not name them itself.
MACHINE = re.compile(rb"(?<![\w.-])/(?:" + b"|".join([b"work", b"root", b"home", b"Users", b"mnt"]) + rb")/")


def tree(path: Path) -> ast.Module:
    """A file's syntax."""
    return ast.parse(path.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    """A path as people of this repository say it."""
    return path.relative_to(ROOT).as_posix()


def shipped() -> list[Path]:
    """Every file of the repository that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("no git repository here")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def tree_of_readme() -> set[str]:
    """Files of the annotated tree in README.md: the code block whose first line is `dori/`.

    A name's folder is the nearest line above with a smaller indent that ends in a slash; after two blanks a further
    name may follow, or what the file is.
    """
    blocks = re.findall(r"^```\w*\n(dori/.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 1, "README.md shows the tree of dori/ in one code block that begins with `dori/`"
    folders: list[tuple[int, str]] = []
    found = set()
    for line in blocks[0].splitlines():
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip(" │├└─|`-"))
        names = list(takewhile(re.compile(r"[\w.-]+(\.\w+|/)").fullmatch, re.split(r"\s{2,}", line[indent:].strip())))
        folders = [entry for entry in folders if entry[0] < indent]
        for name in names:
            path = "".join(folder for _, folder in folders) + name
            found.add(path)
            if name.endswith("/"):
                folders.append((indent, name))
    return found


def test_no_file_is_longer_than_a_sitting() -> None:
    long = {
        named(path): count for path in SOURCES if (count := len(path.read_text(encoding="utf-8").splitlines())) > LINES
    }
    assert long == {}


def test_no_module_is_a_drawer_for_anything() -> None:
    assert [named(path) for path in PACKAGE.rglob("*") if path.stem.lower() in VAGUE and "data" not in path.parts] == []


def test_no_class_of_the_package_inherits_through_another() -> None:
    bases = {
        node.name: {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
    }
    deep = {
        name: inner
        for name, direct in bases.items()
        for base in direct & set(bases)
        if (inner := bases[base] & set(bases))
    }
    assert deep == {}


def test_everything_public_says_what_it_is() -> None:
    silent = [
        f"{named(path)}: {node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    silent += [named(path) for path in PACKAGE.rglob("*.py") if not ast.get_docstring(tree(path))]
    assert silent == []


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="README.md is not written yet")
def test_the_readme_shows_every_file_of_the_package_and_no_other() -> None:
    shown = tree_of_readme()
    # The testbed's data has one line as a folder: weights in many files.
    files = {named(path) for path in shipped() if PACKAGE in path.parents and "data" not in path.parts}
    assert files - shown == set()
    assert [name for name in shown if not (ROOT / name).exists()] == []


def test_no_file_names_a_folder_of_one_machine() -> None:
    assert [named(path) for path in shipped() if MACHINE.search(path.read_bytes())] == []
