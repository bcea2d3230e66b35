"""One picture of a few memories: who is shown, what is framed, what is blurred."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from synthetic_audit import synthetic_audit

from dori.cli import main
from dori.errors import DoriError
from dori.report.figures import overview
from dori.report.strip import strip
from dori.report.tables import final_rows, main_rows, page_markdown, table

RED = np.array([0xD5, 0x5E, 0x00])


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int64)


def frames(png: bytes) -> int:
    """Red frames: connected regions that are as large as a frame's side at least."""
    labels, _ = ndimage.label(np.abs(pixels(png) - RED).max(axis=2) < 12)
    return int((np.bincount(labels.ravel())[1:] > 100).sum())


def test_what_came_back_is_framed(tmp_path: Path) -> None:
    # Of the seven memories that the prompt draws, numbers 0, 2, 3, 4 and 6: by prompt and by DoRI all five; under NeMo
    # DoRI brings four back, under Wanda one; the twin, and the edits without an attack, none.
    audit = synthetic_audit(tmp_path)
    assert frames(strip(audit, tmp_path)) == 5 + 5 + 4 + 1
    assert frames(strip(audit, tmp_path, lines=1)) == 1 + 1 + 1 + 1  # number 0
    assert strip(audit, tmp_path) == strip(audit, tmp_path)


def test_without_edits_twins_or_replications_there_is_still_a_picture(tmp_path: Path) -> None:
    audit = synthetic_audit(tmp_path, edits=[("none", "")], twin=False)
    assert frames(strip(audit, tmp_path)) == 10
    strict = dataclasses.replace(audit, descriptor={**audit.descriptor, "threshold": 0.99})
    assert frames(strip(strict, tmp_path)) == 0


def test_a_redacted_strip_shows_no_training_image(tmp_path: Path) -> None:
    audit = synthetic_audit(tmp_path)
    plain, hidden = (pixels(strip(audit, tmp_path, redact=redact)) for redact in (False, True))
    assert plain.shape == hidden.shape
    sharp, blurred = (np.abs(np.diff(one, axis=1))[60:, :90].mean() for one in (plain, hidden))  # the first column
    assert blurred < sharp


def test_an_audit_without_verbatim_memories_has_no_strip(tmp_path: Path) -> None:
    audit = synthetic_audit(tmp_path)
    templates = tuple(one for one in audit.subjects if one.kind != "verbatim")
    with pytest.raises(DoriError, match="has none"):
        strip(dataclasses.replace(audit, subjects=templates), tmp_path)


def test_the_command_writes_the_picture_beside_the_report(tmp_path: Path) -> None:
    audit = synthetic_audit(tmp_path)
    (tmp_path / "audit.json").write_text(audit.to_json())
    files = {name: tmp_path / name for name in ("strip.png", "curves.png", "table.md")}
    options = [f"--{name.split('.')[0]}={path}" for name, path in files.items()]
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path), *options])
    assert ended.value.code == 0 and (tmp_path / "report.html").exists()
    assert files["strip.png"].read_bytes() == strip(audit, tmp_path)
    assert files["curves.png"].read_bytes() == overview(audit)
    rows = main_rows(final_rows(table(audit), audit))
    assert {row.population for row in rows} == {"memories", "controls"} and "own" not in {
        r.way.edit_scope for r in rows
    }
    text = files["table.md"].read_text()
    assert text == page_markdown(audit)
    parts = {part.split("\n")[0]: part for part in text.split("## ")[1:]}
    joint, own = (parts[title] for title in ("The model, and one edit for all memories", "Each memory's own edit"))
    count = sum(line.startswith("| ") for line in joint.splitlines())
    assert count == len(rows) + 2  # header and rule
    finals = final_rows(table(audit), audit)
    assert sum(line.startswith("| ") for line in own.splitlines()) - 2 == sum(
        row.way.edit_scope == "own" and row.population in ("memories", "controls") for row in finals
    )
    assert "masked similarity" in parts["Templates"] and {"Shown once", "Ordinary prompts"} <= set(parts)
    assert sum(line.startswith("| ") for line in parts["Ordinary prompts"].splitlines()) == len(audit.quality) + 2


def test_a_report_whose_pictures_are_gone_is_not_drawn_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = synthetic_audit(tmp_path)
    (tmp_path / "audit.json").write_text(audit.to_json())
    (tmp_path / "report.html").write_text("with pictures")
    for subject in audit.subjects:
        (tmp_path / subject.picture).unlink()
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 0 and "stays as it is" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text() == "with pictures"


def test_attack_curves_have_a_panel_an_attacked_edit(tmp_path: Path) -> None:
    """Panels of 3.4 x 3.4 inches at 110 dots: the unedited model, NeMo and Wanda; the random edits were only asked."""
    audit = synthetic_audit(tmp_path)
    assert abs(Image.open(io.BytesIO(overview(audit))).width - 3 * 374) <= 3
    asked = tuple(one for one in audit.findings if not one.start)
    with pytest.raises(DoriError, match="nothing to draw"):
        overview(dataclasses.replace(audit, findings=asked))
