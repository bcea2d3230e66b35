"""Promises of the verdict: it claims no more than the counts say, and of hidden images only what was seen of them."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest
from synthetic_audit import synthetic_audit

from dori.audit.checks import with_distrust
from dori.findings import Audit, Finding
from dori.report.verdict import OWN, Card, _headline, verdict

FEW = (("none", ""), ("NeMo", "joint"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def audit(folder: Path) -> Audit:
    return synthetic_audit(folder, edits=FEW)


def only(audit: Audit, *findings: Finding) -> Audit:
    return dataclasses.replace(audit, findings=findings)


def asked(
    count: int,
    back: Iterable[int],
    edit: str,
    start: str = "",
    *,
    kind: str = "verbatim",
    model: str = "painter",
    masked: bool = False,
) -> list[Finding]:
    """Images 0 to count - 1 asked one way (by attack with 50 steps if there is a start); those in `back` come back."""
    values = [0.9 if index in set(back) else 0.1 for index in range(count)]
    return [
        Finding(
            id=f"{kind}-{index}",
            group="control" if kind == "control" else "memory",
            kind=kind,
            dose=None,
            model=model,
            edit=edit,
            edit_scope="" if edit == "none" else "joint",
            start=start,
            steps=50 if start else 0,
            similarities=(0.1 if masked else value,),
            masked=(value,) * masked,
        )
        for index, value in enumerate(values)
    ]


def judged(audit: Audit, *groups: list[Finding]) -> Card:
    """The card of NeMo, of an audit with the twin "painter-without" and these findings."""
    found = verdict(only(audit, *(finding for group in groups for finding in group)))
    return next(card for card in found.parts[0].cards if card.edit == "NeMo")


def test_verdict_counts_what_is_hidden_and_brought_back(audit: Audit) -> None:
    found = verdict(audit).parts[0]
    assert found.headline == "Still in the model after NeMo."
    assert found.lead.startswith(
        "Of 8 memories, 7 come back from their own prompt. NeMo hides 7 of them; DoRI (50 steps) brings 6 back. "
        "Controls that the model never saw: 0 of 8 under the same attack."
    )
    assert [card.title for card in found.cards] == ["Stored in the model", "Hidden, but still stored"]


@pytest.mark.parametrize(
    ("options", "title", "sentence"),
    [
        (
            {"controls": 0, "twin": False},
            "Comes back, but without controls that is no evidence",
            "no evidence of storage",
        ),
        ({"control_final": 0.9}, "Comes back, but so do images it never saw", "so a success here is no evidence"),
        ({"controls": 2, "twin": False}, "Comes back, but too few images to tell", "too few images"),
    ],
)
def test_no_storage_is_claimed_without_sound_controls(folder: Path, options: dict, title: str, sentence: str) -> None:
    found = verdict(synthetic_audit(folder, edits=FEW, **options)).parts[0]
    assert found.cards[1].title == title
    assert sentence in " ".join(found.cards[1].sentences)
    assert "Still in the model" not in found.headline


def test_nothing_brought_back_is_not_called_removed(audit: Audit) -> None:
    low = [dataclasses.replace(f, similarities=(0.1,)) if f.edit == "NeMo" else f for f in audit.findings]
    found = verdict(only(audit, *low)).parts[0]
    assert found.cards[1].level == "absent"
    assert "does not prove removal" in found.cards[1].sentences[-1]


@pytest.mark.parametrize(("distance", "spoiled"), [(62.0, False), (64.0, True)])
def test_an_edit_that_spoils_ordinary_prompts_is_not_praised_for_hiding(
    audit: Audit, distance: float, spoiled: bool
) -> None:
    """Twice the unedited model's 31.4 is the border."""
    low = [dataclasses.replace(f, similarities=(0.1,)) if f.edit == "NeMo" else f for f in audit.findings]
    rows = tuple(dataclasses.replace(q, frechet=distance) if q.edit == "NeMo" else q for q in audit.quality)
    part = verdict(dataclasses.replace(only(audit, *low), quality=rows)).parts[0]
    plain, card = part.cards
    assert (card.title == "Not brought back within this budget, but the model is spoiled") == spoiled
    assert f"from 31.4 to {distance:.1f}" in card.sentences[1] and "Fréchet" not in " ".join(plain.sentences)
    assert ("NeMo spoils ordinary prompts too" in part.lead) == spoiled


# ------------------------------------------------------------------------------------------------ hidden images alone


def test_hidden_but_still_stored_needs_hidden_images_that_come_back(audit: Audit) -> None:
    prompts = [*asked(24, range(24), "none"), *asked(24, range(4, 24), "NeMo")]  # four are hidden
    controls = asked(24, (), "NeMo", "prompt", kind="control")
    away = judged(audit, prompts, asked(24, range(4, 24), "NeMo", "prompt"), controls)  # 20 of 24, none was hidden
    assert (away.level, away.title) == ("stored", "The hidden ones stay away, others are still stored")
    assert "DoRI (50 steps) brings back 0 of the 4 hidden when it starts from its own prompt." in away.sentences
    again = judged(audit, prompts, asked(24, range(24), "NeMo", "prompt"), controls)  # all four, but four are few
    assert (again.level, again.title) == ("stored", "Hidden, but still stored")
    one = judged(audit, prompts, asked(24, range(3, 24), "NeMo", "prompt"), controls)
    assert (one.level, one.title) == ("stored", "Still stored, though unproven for the hidden ones")
    assert any("too few images" in sentence for sentence in one.sentences)


def test_a_twin_is_asked_for_the_hidden_images_alone(audit: Audit) -> None:
    prompts = [*asked(24, range(24), "none"), *asked(24, range(12, 24), "NeMo")]
    ours = asked(24, range(12), "NeMo", "prompt")
    twins = {
        name: asked(24, back, "none", "prompt", model="painter-without")
        for name, back in (("others", range(12, 24)), ("hidden", range(12)))
    }
    card = judged(audit, prompts, ours, twins["others"])
    assert card.title == "Hidden, but still stored"
    assert any(s.startswith("The hidden images on painter-without") and ": 0 of 12 under" in s for s in card.sentences)
    assert judged(audit, prompts, ours, twins["hidden"]).title == "Comes back, but so do images it never saw"


def test_a_success_counts_only_from_starts_that_the_judge_met(audit: Audit) -> None:
    prompts = [*asked(24, range(24), "none"), *asked(24, (), "NeMo")]
    ours = [*asked(24, range(2), "NeMo", "prompt"), *asked(24, range(24), "NeMo", "gaussian")]
    by_prompt = asked(24, (), "NeMo", "prompt", kind="control")
    card = judged(audit, prompts, ours, by_prompt)
    assert card.title == "Comes back, but too few images to tell"
    assert "Not every start was tried on the controls; the verdict uses those that were." in card.sentences
    both = [*by_prompt, *asked(24, (), "NeMo", "gaussian", kind="control")]
    assert judged(audit, prompts, ours, both).title == "Hidden, but still stored"


def test_an_edit_that_hid_nothing_is_told_apart(audit: Audit) -> None:
    attack, controls = asked(24, range(24), "NeMo", "prompt"), asked(24, (), "NeMo", "prompt", kind="control")
    seen = [*asked(24, range(24), "none"), *asked(24, range(24), "NeMo")]
    assert judged(audit, seen, attack, controls).title == "Not hidden, still stored"
    unseen = [*asked(24, (), "none"), *asked(24, (), "NeMo")]
    assert judged(audit, unseen, attack, controls).title == "Still stored, though no prompt showed it"


# ------------------------------------------------------------------------------------- templates and images shown once


def test_templates_and_images_shown_once_have_verdicts_of_their_own(audit: Audit) -> None:
    parts = verdict(audit).parts
    assert [part.title for part in parts] == ["Memories", "Template memories", "Images shown once"]
    template, once = parts[1:]
    # .58 + .2 exceeds the masked threshold, .58 not that of whole images
    assert template.lead.startswith("Of 1 template memory, 0 come back from its own prompt.")
    assert {(bar.label, bar.count) for bar in template.cards[0].bars if not bar.judge} == {
        ("Own prompt", 0),
        ("DoRI from its own prompt, 50 steps", 1),
        ("DoRI from Gaussian noise, 50 steps", 1),
    }
    assert template.cards[0].title == "Comes back, but too few images to tell"
    assert template.note.startswith("Templates count as replicated where their masked similarity exceeds 0.72")
    assert once.headline == "Nothing came back within this audit's budget. That does not prove removal."
    assert once.note == ""
    low = tuple(
        dataclasses.replace(f, masked=(0.1,) * len(f.masked)) if f.kind == "template" and f.edit != "none" else f
        for f in audit.findings
    )
    hidden = verdict(dataclasses.replace(audit, findings=low)).parts[1]
    assert hidden.headline.startswith("Not brought back after NeMo") and hidden.headline.endswith("prove removal.")


@pytest.mark.parametrize(
    ("painted", "back", "title"),
    [
        (True, (), "Stored in the model"),
        (True, range(20), "Comes back, but so do images it never saw"),
        (False, (), "Stored in the model"),
    ],
)
def test_controls_judge_templates_painted_alike(audit: Audit, painted: bool, back: Iterable[int], title: str) -> None:
    templates = [
        *asked(20, (), "none", kind="template", masked=True),
        *asked(20, range(20), "none", "prompt", kind="template", masked=True),
    ]
    controls = asked(20, back, "none", "prompt", kind="control", masked=painted)
    part = verdict(only(audit, *templates, *controls)).parts[0]
    assert (part.title, part.cards[0].title) == ("Template memories", title)
    assert ("more lenient" in part.note) == (not painted)


def test_without_a_masked_threshold_templates_are_judged_whole_and_the_verdict_says_so(audit: Audit) -> None:
    bare = dataclasses.replace(audit, descriptor={"name": "x", "threshold": 0.6})
    part = verdict(bare).parts[1]
    assert [bar.count for bar in part.cards[0].bars if not bar.judge] == [0, 0, 0]
    assert "templates count by whole images" in part.note


def test_an_own_edit_that_was_only_asked_does_not_speak_over_the_attacked_joint_edit() -> None:
    attacked, asked = Card("NeMo", "stored", "", (), ()), Card("NeMo" + OWN, "hidden", "", (), ())
    assert _headline([attacked, asked]) == "Still in the model after NeMo."
    assert _headline([asked]).startswith("No attack was run under NeMo")
    weaker = Card("NeMo" + OWN, "unproven", "", (), ())
    assert _headline([attacked, weaker]) == "Still in the model after NeMo."  # named once, by its gravest card


def test_a_missing_or_weak_masked_threshold_is_a_reason_to_distrust(audit: Audit) -> None:
    def reasons(**changes: object) -> str:
        changed = dataclasses.replace(audit, descriptor={**audit.descriptor, **changes})
        return " ".join(with_distrust(changed, diverged=0).distrust)

    assert "Templates are judged by whole images" in reasons(masked_threshold=None)
    weak = {**audit.descriptor["masked_calibration"], "true_positive_rate": 0.7}
    assert "misses 30 % of known copies with a box painted over" in reasons(masked_calibration=weak)
    assert "emplate" not in reasons()
