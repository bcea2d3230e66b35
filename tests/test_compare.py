"""Promises of the comparison of two audits and of the number that a release gate reads."""

import dataclasses
from collections.abc import Callable

import pytest
from synthetic_audit import synthetic_audit

from dori.compare import compare, to_text, worst_mr
from dori.errors import DoriError
from dori.findings import Audit, Finding


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    return synthetic_audit(tmp_path_factory.mktemp("run"), edits=(("none", ""), ("NeMo", "joint")))


def changed(audit: Audit, when: Callable[[Finding], bool], **changes: object) -> Audit:
    return dataclasses.replace(
        audit, findings=tuple(dataclasses.replace(f, **changes) if when(f) else f for f in audit.findings)
    )  # type: ignore[arg-type]


def test_equal_audits_differ_in_nothing(audit: Audit) -> None:
    found = compare(audit, audit)
    assert (found.incomparable, found.settings, found.missing, found.flips) == ("", (), (), ())
    assert {change.difference for change in found.rates} == {0.0}
    assert "No setting changed." in to_text(found)


def test_a_turned_verdict_is_named_with_its_numbers(audit: Audit) -> None:
    def first(f: Finding) -> bool:
        return f.id == "memory-0" and not f.start and f.edit == "none" and f.model == "painter"

    repaired = dataclasses.replace(changed(audit, first, similarities=(0.2, 0.2, 0.2)), model="painter")
    found = compare(audit, repaired)
    assert [(f.id, f.came_back_after, f.before, f.after) for f in found.flips] == [("memory-0", False, 0.95, 0.2)]
    moved = [change for change in found.rates if change.difference]
    assert [(c.population, c.way.asked, c.difference) for c in moved] == [("memories", "own prompt", -0.125)]
    text = to_text(found)
    assert "memories, unedited, own prompt: 0.88 [0.53, 0.98] (7/8) -> 0.75 [0.41, 0.93] (6/8), -0.12" in text
    assert "memory-0 (memories, unedited, own prompt): no longer comes back, 0.95 -> 0.20" in text


def test_models_of_different_names_are_still_compared(audit: Audit) -> None:
    renamed = dataclasses.replace(changed(audit, lambda f: f.model == "painter", model="erased"), model="erased")
    found = compare(audit, renamed)
    assert found.models == ("painter", "erased")
    assert {change.difference for change in found.rates} == {0.0}


def test_the_largest_budget_that_both_took_is_compared(audit: Audit) -> None:
    shorter = dataclasses.replace(audit, findings=tuple(f for f in audit.findings if f.steps <= 25))
    steps = {c.way.steps for c in compare(audit, shorter).rates if c.way.start}
    assert steps == {25}


def test_what_only_one_audit_asked_is_said(audit: Audit) -> None:
    bare = dataclasses.replace(audit, findings=tuple(f for f in audit.findings if f.edit == "none"))
    text = to_text(compare(audit, bare))
    assert "memories, NeMo, own prompt: 0.00 [0.00, 0.32] (0/8), only in the first audit" in text


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("threshold", 0.7, "not comparable: threshold differs."),
        ("name", "SSCD", "not comparable: descriptor differs."),
        ("preprocessing", "288", "not comparable: preprocessing differs."),
    ],
)
def test_other_judges_are_said_not_to_be_comparable(audit: Audit, field: str, value: object, sentence: str) -> None:
    other = dataclasses.replace(audit, descriptor={**audit.descriptor, field: value})
    found = compare(audit, other)
    assert sentence in found.incomparable
    assert found.flips == ()
    assert [change.name for change in found.settings] == [f"descriptor.{field}"]
    assert to_text(found).splitlines()[1] == found.incomparable


def test_the_images_that_both_judged_are_compared_and_counted(audit: Audit) -> None:
    fewer = dataclasses.replace(audit, findings=tuple(f for f in audit.findings if f.id != "memory-7"))
    found = compare(audit, fewer)
    everyone = {f.id for f in audit.findings}
    assert (found.missing, found.altered, found.shared) == (("memory-7",), (), len(everyone) - 1)
    # Seven of eight come back from their prompts, and memory-7 is the eighth: without it, all seven.
    way = ("memories", "none", "own prompt")
    asked = next(c for c in found.rates if (c.population, c.way.edit, c.way.asked) == way)
    assert (asked.before.value, asked.before.n) == (1.0, 7) and asked.difference == 0  # type: ignore[union-attr]
    assert f"Compared are the {len(everyone) - 1} images that both judged." in to_text(found)


def test_other_pixels_under_one_name_are_another_image(audit: Audit) -> None:
    def named(pixels: str) -> Audit:
        return dataclasses.replace(
            audit,
            subjects=tuple(
                dataclasses.replace(s, sha256=pixels if s.id == "memory-0" else "same") for s in audit.subjects
            ),
        )

    found = compare(named("old"), named("new"))
    assert (found.altered, found.missing) == (("memory-0",), ())
    assert "different pixels under the name memory-0." in to_text(found)
    assert not any(flip.id == "memory-0" for flip in found.flips)
    assert compare(audit, named("new")).altered == ()  # an older audit does not say what it judged


def test_audits_without_a_common_image_are_refused(audit: Audit) -> None:
    others = dataclasses.replace(
        audit, findings=tuple(dataclasses.replace(f, id=f"other {f.id}") for f in audit.findings)
    )
    with pytest.raises(DoriError, match="no image in common"):
        compare(audit, others)


def test_names_cannot_steer_a_terminal(audit: Audit) -> None:
    other = dataclasses.replace(audit, model="x\x1b[2Jy\nz", settings={"a\rb": 1})
    assert not set(to_text(compare(audit, other))) & set("\x1b\r")


def test_worst_mr_is_the_highest_of_the_memories_alone(audit: Audit) -> None:
    assert worst_mr(audit) == 1.0  # DoRI on the unedited model draws all eight
    quiet = changed(audit, lambda f: f.model == "painter" and f.group == "memory", similarities=(0.1,), masked=())
    assert worst_mr(changed(quiet, lambda f: f.group == "control" or f.model != "painter", similarities=(0.9,))) == 0
    one = changed(quiet, lambda f: f.id == "memory-3" and f.edit == "NeMo" and f.steps == 10, similarities=(0.9,))
    assert worst_mr(one) == 1 / 8


def test_worst_mr_needs_a_memory(audit: Audit) -> None:
    with pytest.raises(DoriError, match="judged no memory"):
        worst_mr(dataclasses.replace(audit, findings=()))
