"""What is installed is whole: a wheel holds all that the demo needs, and the scripts' commands exist."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("check", "demo", ".ci/run")
TOOLS = {"ruff": "ruff", "mypy": "mypy", "pytest": "pytest", "dori": "dori"}  # command -> module that answers it


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources, so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "dori", source / "dori", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "--disable-pip-version-check",
        "--wheel-dir",
        str(folder),
    ]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="README.md is not written yet")
def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dori").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".partial" not in path.name
    }
    assert {"dori/testbed/data/sprites.png", "dori/testbed/data/sprites.json", "dori/report/template.html"} <= ours
    held = {info.filename: info.file_size for info in wheel.infolist() if info.filename.startswith("dori/")}
    assert set(held) == ours
    assert [name for name, size in held.items() if size != (ROOT / name).stat().st_size] == []


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="README.md is not written yet")
def test_the_wheel_installs_the_command_and_nothing_beside_the_package(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"dori"}
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "dori = dori.cli:main" in wheel.read(entry_points).decode()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_executable_and_sound_bash(name: str) -> None:
    path = ROOT / name
    assert path.stat().st_mode & 0o111
    assert path.read_text().startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in path.read_text()
    if bash := shutil.which("bash"):
        subprocess.run([bash, "-n", str(path)], check=True)


def test_the_commands_of_the_scripts_exist() -> None:
    # A line's first word, past `exec`, an `if` and an environment; the tools come from the dev extra.
    first = re.compile(r"(?:^|then |else |exec |; )(ruff|mypy|pytest|dori|\./\w+)\b", re.M)
    used = {word for name in SCRIPTS for word in first.findall((ROOT / name).read_text())}
    assert {"ruff", "mypy", "pytest", "dori", "./check"} <= used
    for word in used:
        if word.startswith("./"):
            assert (ROOT / word).exists()
        else:
            subprocess.run([sys.executable, "-m", TOOLS[word], "--version"], check=True, capture_output=True, cwd=ROOT)
