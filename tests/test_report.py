"""Promises of the report: numbers a hand can check, a verdict that claims no more than they say, and safe HTML."""

import base64
import dataclasses
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_audit import BRACES, BREAKOUT, SCRIPT, synthetic_audit

from dori.audit.checks import with_distrust
from dori.errors import DoriError
from dori.findings import Audit, EditInfo, Finding, read_audit
from dori.judgement import Rule
from dori.report import tables
from dori.report.assurance import checks
from dori.report.curves import Separation, areas, curves, dose_response, of_all, painted, separations
from dori.report.figures import _label, dose_rate_figure, similarity_figure
from dori.report.nested import sheet
from dori.report.pictures import Album
from dori.report.render import _evidence, may_show, render
from dori.stats import Estimate

FEW = (("none", ""), ("NeMo", "joint"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def audit(folder: Path) -> Audit:
    return synthetic_audit(folder, edits=FEW)


@pytest.fixture(scope="module")
def hostile(audit: Audit) -> Audit:
    """Only the unedited model's prompt, and an edit and a twin whose names a stranger chose; quick to draw."""
    kept = [
        f
        for f in audit.findings
        if f.steps in (0, 50) and f.start in ("", "prompt") and f.kind in ("verbatim", "control")
    ]
    renamed = [
        dataclasses.replace(
            f, edit="none" if f.edit == "none" else "$x^" + SCRIPT, model=f.model if f.model == "painter" else BREAKOUT
        )
        for f in kept
    ]
    return dataclasses.replace(
        audit,
        findings=tuple(renamed),
        twins=(BREAKOUT,),
        distrust=(SCRIPT,),
        edits=(EditInfo("$x^" + SCRIPT, "joint", 1, {BREAKOUT: SCRIPT}),),
        settings={SCRIPT: BRACES},
    )


@pytest.fixture(scope="module")
def page(hostile: Audit, folder: Path) -> str:
    return render(hostile, folder)


def finding(**changes: object) -> Finding:
    plain = {
        "id": "a",
        "group": "memory",
        "kind": "verbatim",
        "dose": None,
        "model": "painter",
        "edit": "none",
        "edit_scope": "",
        "start": "",
        "steps": 0,
        "similarities": (0.5,),
    }
    return Finding(**{**plain, **changes})  # type: ignore[arg-type]


def only(audit: Audit, *findings: Finding) -> Audit:
    return dataclasses.replace(audit, findings=findings)


# ------------------------------------------------------------------------------------------------------------ tables


def test_a_row_holds_the_figures_that_a_hand_computes(audit: Audit) -> None:
    row = tables.table(audit)[0]
    assert (row.population, row.way.asked) == ("memories", "own prompt")
    # .95 .93 .91 .90 .88 .80 .72 .30: median .89; distances .01 .01 .02 .04 .06 .09 .17 .59, median .05
    assert (row.similarity.median, row.similarity.deviation) == pytest.approx((0.89, 0.05))
    assert row.best.median == pytest.approx(0.92)
    assert tables.rate(row.replication.rate) == "0.88 [0.53, 0.98] (7/8)"
    assert row.replication.images == 24
    assert row.replication.images_replicated == 21  # .72 - .04 still exceeds .6


def test_templates_and_images_shown_once_are_not_mixed_with_memories(audit: Audit) -> None:
    every = tables.table(audit)
    rows = [row for row in every if row.way == every[0].way]
    assert {row.population: row.replication.memories for row in rows} == {
        "memories": 8,
        "templates": 1,
        "once": 1,
        "controls": 8,
    }
    masked = {row.population: row.masked for row in rows}
    assert masked["memories"] is None
    assert str(masked["templates"]) == "0.70 ± 0.00"


def test_the_published_table_shows_one_budget_for_all(audit: Audit) -> None:
    mixed = only(
        audit,
        *(finding(start="prompt", steps=s) for s in (10, 50)),
        *(finding(id="c", group="control", kind="control", start="prompt", steps=s) for s in (50, 150)),
    )
    final = tables.final_rows(tables.table(mixed), mixed)
    assert [(row.population, row.way.steps) for row in final] == [("memories", 50), ("controls", 50)]


def longer(audit: Audit, *, similarity: float) -> Audit:
    """The audit with two memories and two controls attacked to 150 steps, where all four come back or none."""
    more = [
        dataclasses.replace(finding, steps=150, similarities=(similarity,) * 3, masked=())
        for finding in audit.findings
        if finding.steps == 50
        and finding.start == "prompt"
        and finding.edit_scope != "own"
        and finding.id in ("memory-0", "memory-1", "control-0", "control-1")
    ]
    assert len(more) > 8
    return dataclasses.replace(audit, findings=(*audit.findings, *more))


def test_steps_that_some_images_alone_went_through_belong_to_the_curve_alone(audit: Audit) -> None:
    found = longer(audit, similarity=1.0)
    assert tables.final_rows(tables.table(found), found) == tables.final_rows(tables.table(audit), audit)
    assert separations(found) == separations(audit)
    assert with_distrust(found, diverged=0) == dataclasses.replace(
        with_distrust(audit, diverged=0), findings=found.findings
    )
    own = next(
        c for c in curves(found) if (c.population, c.edit, c.start, c.twin) == ("memories", "NeMo", "prompt", False)
    )
    assert (own.rows[-1].way.steps, own.rows[-1].replication.memories) == (150, 2)
    assert _label(own) == "memories (2 of 8 beyond 50)" and _label(of_all(own)) == "memories"


def test_columns_say_sscd_only_when_the_descriptor_is(audit: Audit) -> None:
    rows = tables.table(audit)
    assert "SSCD" not in tables.to_markdown(rows, audit)
    sscd = dataclasses.replace(audit, descriptor={"name": "SSCD disc_mixup", "threshold": 0.7})
    assert "| SSCD_Orig ↓ |" in tables.to_markdown(rows, sscd)


def test_markdown_has_one_line_a_row_and_survives_pipes(audit: Audit) -> None:
    odd = only(audit, finding(edit="a|b\n<i>", edit_scope="joint"))
    text = tables.to_markdown(tables.table(odd), odd)
    assert "a\\|b &lt;i>" in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 3


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (float("nan"), "–"), (-0.001, "0.00"), (0.125, "0.12"), (-0.5, "-0.50")]
)
def test_numbers_have_two_decimals(value: float | None, text: str) -> None:
    assert tables.number(value) == text


def test_an_image_judged_twice_and_a_missing_threshold_are_refused(audit: Audit) -> None:
    with pytest.raises(DoriError, match="twice"):
        tables.table(only(audit, finding(), finding()))
    with pytest.raises(DoriError, match="no threshold"):
        tables.table(dataclasses.replace(audit, descriptor={"name": "x", "threshold": None}))


def test_every_share_carries_its_interval(audit: Audit) -> None:
    rows = tables.table(audit)
    header, body = tables.cells(rows[:1], audit)
    line = dict(zip(header, body[0], strict=True))
    assert line["MR ↓"] == "0.88 [0.53, 0.98] (7/8)"
    assert line["MR, best seed ↓"] == "0.88 [0.53, 0.98] (7/8)"
    share = rows[0].replication.image_rate
    assert line["Images above threshold ↓"] == f"0.88 [{share.low:.2f}, {share.high:.2f}]"
    assert share.n == 8


def test_templates_count_by_their_masked_similarity_where_it_has_a_threshold(audit: Audit) -> None:
    rows = [
        finding(id="t", kind="template", similarities=(0.1,) * 3, masked=masked)
        for masked in ((0.7, 0.73, 0.9), (0.7, 0.72, 0.9))
    ]
    assert [tables.table(only(audit, row))[0].replication.by_median for row in rows] == [1, 0]
    bare = dataclasses.replace(only(audit, rows[0]), descriptor={"name": "x", "threshold": 0.6})
    assert tables.table(bare)[0].replication.by_median == 0
    assert "so templates count by whole images" in tables.masked_caption(bare)
    assert "exceeds 0.72, a threshold measured on the same, a random box" in tables.masked_caption(audit)
    memory = finding(similarities=(0.1,), masked=(0.9,))  # only templates are judged so
    assert tables.table(only(audit, memory))[0].replication.by_median == 0


def test_curves_from_every_start_begin_with_what_was_not_attacked(audit: Audit) -> None:
    steps = (0, 10, 50)
    asked = only(
        audit,
        *(
            finding(start=start, steps=step, similarities=(0.1 + step / 100,))
            for start in ("gaussian", "foreign")
            for step in steps
        ),
    )
    found = curves(asked)
    assert [(curve.start, tuple(row.way.steps for row in curve.rows)) for curve in found] == [
        ("gaussian", steps),
        ("foreign", steps),
    ]
    assert "0.10 at 0" in similarity_figure(found[:1], 0.6).alt
    assert found[0].rows[0].way.asked == "Gaussian noise, not attacked"
    assert [row.way.steps for row in tables.final_rows(tables.table(asked), asked)] == [50, 50]


def test_area_is_the_trapezoid_over_the_range_of_steps() -> None:
    points = [finding(start="prompt", steps=s, similarities=(v,)) for s, v in ((50, 0.8), (0, 0.2), (10, 0.4))]
    assert areas(points) == pytest.approx({"a": (10 * 0.3 + 40 * 0.6) / 50})
    assert areas(points[:1]) == {}


def test_separation_compares_memories_with_controls_and_twin(audit: Audit) -> None:
    found = [s for s in separations(audit) if (s.population, s.edit, s.start) == ("memories", "NeMo", "prompt")]
    assert [s.judge for s in found] == ["controls", "on twin painter-without, without the edit"]
    assert all(s.auroc.value == 1 and s.memories == s.others == 8 for s in found)
    assert all(0.7 < s.auroc.low < 0.8 for s in found)  # eight against eight: no more can be known


def test_templates_are_drawn_and_compared_by_masked_similarities(audit: Audit) -> None:
    curve = next(c for c in curves(audit) if (c.population, c.edit, c.start) == ("templates", "NeMo", "prompt"))
    assert [round(row.similarity.median, 2) for row in curve.rows][::4] == [0.5, 0.58]
    alike = painted(curve)
    assert alike is not None
    assert [round(row.similarity.median, 2) for row in alike.rows][::4] == [0.7, 0.78]
    assert alike.rows[-1].replication.by_median == 1
    every = [f for f in audit.findings if f.kind == "template" and f.edit == "NeMo" and f.start == "prompt"]
    whole, masked = areas(every)["template-0"], areas(every, masked=True)["template-0"]
    assert masked == pytest.approx(whole + 0.2)


@pytest.mark.parametrize(
    ("low", "memories", "words"),
    [
        (0.95, 30, "strong evidence of storage."),
        (0.75, 30, "fair evidence of storage."),
        (0.95, 9, "weak evidence of storage for want of images: 9 are too few for more."),
        (0.6, 9, "weak evidence of storage."),
        (0.4, 9, "no evidence of storage."),
    ],
)
def test_words_follow_the_lower_end_and_the_number_of_images(low: float, memories: int, words: str) -> None:
    estimate = Estimate(0.97, low, 0.99, memories + 40)
    assert _evidence(Separation("memories", "none", "", "prompt", "controls", estimate, memories, 40)).endswith(words)


def test_dose_response_counts_each_dose(audit: Audit) -> None:
    way = tables.table(audit)[0].way
    assert [(p.dose, p.rate.n, p.rate.value) for p in dose_response(audit, [way])] == [
        (0.001, 1, 0.0),
        (0.0625, 2, 0.5),
        (0.25, 3, 1.0),
        (1.0, 3, 1.0),
    ]


def test_images_seen_once_without_a_stated_dose_are_the_lowest_point(audit: Audit) -> None:
    bare = dataclasses.replace(
        audit, findings=tuple(dataclasses.replace(f, dose=None) if f.kind == "once" else f for f in audit.findings)
    )
    points = dose_response(bare, [tables.table(bare)[0].way])
    assert [(p.dose, p.rate.n) for p in points] == [(0.0, 1), (0.0625, 2), (0.25, 3), (1.0, 3)]
    assert "0.00 where seen once" in dose_rate_figure(points).alt


def test_checks_fail_without_controls_twins_seeds_or_calibration(audit: Audit) -> None:
    assert all(check.passed for check in checks(audit))
    bare = dataclasses.replace(
        only(audit, finding(start="prompt", steps=5)), twins=(), blind={}, descriptor={"threshold": 0.6}
    )
    assert not any(check.passed for check in checks(bare))


# -------------------------------------------------------------------------------------------------------------- page


class Parsed(HTMLParser):
    """Tags, attributes and text as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_strangers_texts_stay_texts(page: str) -> None:
    parsed = Parsed(page)
    assert not {tag for tag, _ in parsed.tags} & {"script", "iframe", "object", "embed", "link", "form", "base", "svg"}
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    for text in (SCRIPT, BREAKOUT, BRACES):
        assert text in parsed.text


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    parsed = Parsed(page)
    links = [v for _, attributes in parsed.tags for k, v in attributes.items() if k in ("src", "href", "srcset")]
    assert links
    assert all(
        link and link.startswith(("data:image/jpeg;base64,", "data:image/svg+xml;base64,", "#")) for link in links
    )
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and a.get("http-equiv"))
    assert policy and policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert "url(" not in page and "@import" not in page
    assert all(attributes.get("alt") for tag, attributes in parsed.tags if tag == "img")


def test_quality_names_its_features_and_its_reference(page: str, hostile: Audit, folder: Path) -> None:
    assert "Features: CLIP image features, 64 x 64. Reference: 64 held-out ordinary images." in Parsed(page).text
    unnamed = dataclasses.replace(
        hostile, quality=(dataclasses.replace(hostile.quality[0], features="", reference="", references=0),)
    )
    assert "Features: not named by this audit." in Parsed(render(unnamed, folder)).text


def test_the_same_audit_gives_the_same_bytes_also_from_json(hostile: Audit, folder: Path, page: str) -> None:
    path = folder / "audit.json"
    path.write_text(hostile.to_json())
    assert render(read_audit(path), folder) == page


def test_redaction_leaves_no_pixel_of_what_replicates_and_no_prompt(hostile: Audit, folder: Path, page: str) -> None:
    hidden = render(hostile, folder, redact=True)
    album = Album(folder)
    secret = {album.uri(s.picture, blurred=False) for s in hostile.subjects if s.kind in ("verbatim", "control")}
    secret |= {album.uri(f.picture, blurred=False) for f in hostile.findings if max(f.similarities) > 0.6}
    assert "" not in secret
    assert all(uri in page for uri in {album.uri(s.picture, blurred=False) for s in hostile.subjects[:8]})
    assert not [uri for uri in secret if uri in hidden]
    assert "meadow no 5" in page and "meadow no" not in hidden


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))), np.float64)


def test_blurring_destroys_detail_before_it_is_written(tmp_path: Path) -> None:
    checks_px = (np.indices((96, 96)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks_px).convert("RGB").save(tmp_path / "a.png")
    album = Album(tmp_path)
    assert decoded(album.uri("a.png", blurred=False)).std() > 60
    assert decoded(album.uri("a.png", blurred=True)).std() < 3


def test_what_may_show_a_training_image() -> None:
    rule = Rule(0.6, 0.8)
    assert may_show(finding(similarities=(0.1, 0.61)), rule)
    assert not may_show(finding(similarities=(0.1, 0.6), masked=(0.8,)), rule)
    assert may_show(finding(similarities=(0.1, 0.6), masked=(0.81,)), rule)
    assert may_show(finding(similarities=(0.1,), masked=(0.61,)), Rule(0.6, None))
    assert may_show(finding(kind="template", similarities=(0.1,)), rule)


def test_thumbnails_are_small_and_missing_pictures_are_no_error(tmp_path: Path) -> None:
    Image.new("RGB", (400, 300), "red").save(tmp_path / "big.png")
    assert decoded(Album(tmp_path).uri("big.png", blurred=False)).shape == (128, 128, 3)
    assert Album(tmp_path).uri("gone.png", blurred=False) == Album(tmp_path).uri("", blurred=False) == ""


@pytest.mark.parametrize("path", ["../a.png", "x/../../a.png", "/a.png", "C:\\a.png", "..\\a.png", "link.png"])
def test_pictures_outside_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(DoriError, match="outside the run's folder"):
        Album(folder).uri(path, blurred=False)


def test_a_locality_page_beside_is_linked(hostile: Audit, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "locality.json").write_text("{}")
    assert "locality.html" not in render(hostile, folder) and 'href="locality.html"' in render(hostile, tmp_path)


def test_figures_are_reproducible_and_undated(audit: Audit) -> None:
    points = dose_response(audit, [tables.table(audit)[0].way])
    first, second = dose_rate_figure(points), dose_rate_figure(points)
    assert first == second
    assert "dc:date" not in first.svg and not re.search(r"<text\b", first.svg)
    assert "0.50 at dose 0.0625" in first.alt


def test_details_become_lines_and_tables() -> None:
    found = sheet(
        {
            "tau": 0.43,
            "score": {"window": 11},
            "memories": [
                {"id": "a", "localized": True, "neurons": {"l1": [1, 2], "l2": []}},
                {"id": "b", "floor": 0.004},
            ],
        }
    )
    assert found.lines == (("score.window", "11"), ("tau", "0.43"))
    assert found.grids[0].header == ("id", "localized", "neurons", "floor")
    assert found.grids[0].rows == (("a", "yes", "2 in 1 of 2 layers", "–"), ("b", "–", "–", "0.004"))


def test_parallel_lists_become_one_table_and_long_lists_are_counted() -> None:
    found = sheet({"floor": [0.1, 0.2], "ceiling": [0.8, 0.9], "steps": list(range(9))})
    assert found.lines == (("steps", "9 entries"),)
    assert found.grids[0].header == ("ceiling", "floor")
    assert found.grids[0].rows == (("0.80", "0.10"), ("0.90", "0.20"))
