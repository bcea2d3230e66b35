"""The README's Python does what it says."""

import dataclasses
import re
from pathlib import Path

import pytest

from dori.attack.dori import Dori
from dori.audit import plan

README = Path(__file__).parent.parent / "README.md"


def blocks() -> list[str]:
    """The README's pieces of Python: an audit, and one attack."""
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


def test_its_audit_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brief = dataclasses.replace(
        plan.quick(),
        seeds=1,
        sampling_steps=1,
        attack=Dori(steps=1, batch=1),
        nemo=None,
        wandas=(),
        memories=1,
        controls=1,
        quality_prompts=0,
    )
    monkeypatch.setattr(plan, "quick", lambda: brief)
    monkeypatch.chdir(tmp_path)
    exec(blocks()[0], {})
    assert "<h1>Audit of testbed-planted</h1>" in (tmp_path / "runs" / "python" / "report.html").read_text()


def test_its_attack_brings_a_memory_back(capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks()[1], {})
    found, threshold = map(float, capsys.readouterr().out.split())
    assert found > threshold
