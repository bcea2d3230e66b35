"""The page of a locality run says what the records hold, by its rules, and nothing that a stranger wrote runs in it."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commanding import status
from synthetic_locality import LEVELS, records

from dori.errors import DoriError
from dori.image_file import png_bytes
from dori.locality.page import intervened, observed, verdict
from dori.locality.page.render import render
from dori.locality.page.singly import singly
from dori.locality.page.summary import ALONE, banded, dose_relations, over_memories, overlap, own_share, said, way
from dori.locality.records import (
    APART,
    MEMORIZED,
    ON_TWIN,
    ORDINARY,
    OTHER_IMAGES,
    OTHER_NOISES,
    OTHERS_APART,
    PROMPTED,
    SIMULATED,
    TRIGGERS,
    WHOLE,
    Locality,
    Measure,
    read_locality,
)
from dori.run import write_bytes
from dori.stats import Estimate, wilson


def page(found: Locality, folder: Path, *, redact: bool = False) -> str:
    """The page, with training images in the folder."""
    for one in found.subjects:
        write_bytes(folder / one.picture, png_bytes(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))))
    return render(found, folder, redact=redact)


def test_the_page_shows_every_analysis_and_runs_and_loads_nothing(tmp_path: Path) -> None:
    html = page(records(), tmp_path)
    for key in (
        "embedding",
        "activations",
        "weights",
        "causal",
        "patching",
        "truth",
        "transplants",
        "dose",
        "numbers",
        "singly",
        "made",
    ):
        assert f'id="{key}"' in html
    assert "<script" not in html and "&lt;script&gt;" in html
    assert all(uri.startswith("data:") for uri in re.findall(r'(?:src|href)="([^"#][^"]*)"', html))
    assert html == page(records(), tmp_path)  # the same records, the same bytes
    assert "2 of 3 planned memories" in html and "6 of 8 from N(0, I)" in html
    assert "none of 10 such attacks" in html  # on the twin


def test_redaction_hides_prompts_and_images(tmp_path: Path) -> None:
    plain, redacted = (page(records(), tmp_path, redact=redact) for redact in (False, True))
    text = "“&lt;script&gt;"
    assert text in plain and text not in redacted
    images = [re.findall(r'src="(data:image/jpeg[^"]*)"', html) for html in (plain, redacted)]
    assert len(images[0]) == len(images[1]) == 2 and not {*images[0]} & {*images[1]}


def test_the_report_command_draws_the_page_again_from_the_records_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    redacted = page(records(), tmp_path, redact=True)
    (tmp_path / "locality.json").write_text(records().to_json())
    code, out, _ = status(["report", str(tmp_path), "--redact"], capsys)
    assert code == 0 and (tmp_path / "locality.html").read_text() == redacted
    assert out == f"page: {tmp_path / 'locality.html'}\n" and not (tmp_path / "report.html").exists()
    assert "report.html" not in redacted
    (tmp_path / "audit.json").write_text("{}")
    assert '<a href="report.html">' in page(records(), tmp_path)
    code, _, said = status(["report", str(tmp_path)], capsys)
    assert code == 2 and "audit.json has another schema" in said


def test_a_run_without_triggers_has_a_page_that_says_so(tmp_path: Path) -> None:
    found = records()
    bare = dataclasses.replace(
        found,
        subjects=tuple(dataclasses.replace(one, triggers=0) for one in found.subjects),
        triggers=tuple(dataclasses.replace(one, replicates=False) for one in found.triggers),
        measures=tuple(m for m in found.measures if not m.memory),
        probes=(),
        activities=tuple(a for a in found.activities if not a.memory),
        covers=(),
        changes=(),
        patches=(),
        crosses=(),
        joined=(),
        searches=(),
        overlaps=tuple(o for o in found.overlaps if o.group in (MEMORIZED, ORDINARY)),
    )
    html = page(bare, tmp_path)
    assert "No memory has two triggers, so nothing can be said about where it lives." in html
    assert html.count("Too few triggers") == 3 and "0 of 8 from N(0, I)" in html
    assert verdict.all_said(bare)["causal"].title == "Not run"
    assert "needs a twin" in verdict.all_said(bare)["patching"].sentences[0]
    quick = dataclasses.replace(bare, settings={**bare.settings, "preset": "quick", "causal": None, "patch_seeds": 0})
    for part, more in (("causal", ""), ("patching", ", and so has --patch-seeds N")):
        said = f"The preset quick leaves it out; --preset full has it{more}."
        assert verdict.all_said(quick)[part].sentences == (said,)


# ---------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("triggers", "ceiling", "word"),
    [
        (0.41, 0.83, "partly local"),
        (0.8, 0.83, "local"),
        (0.25, 0.83, "not local"),
        (0.1, 0.83, "not local"),
        (0.3, 0.26, "cannot be told, the ceiling is not above the reference"),
    ],
)
def test_weights_are_judged_on_the_way_from_reference_to_ceiling(triggers: float, ceiling: float, word: str) -> None:
    found = records(levels=LEVELS | {TRIGGERS: triggers, APART: triggers, OTHER_NOISES: ceiling})
    sentence = observed.weights(found).sentences[0]
    assert f"other seeds {ceiling:.2f}: {word}." in sentence
    chance = LEVELS[SIMULATED]
    assert f"what random masks of their sizes share ({chance:.2f} and 0.02) triggers agree" in sentence
    assert f"({triggers - chance:.2f} against 0.20)" in sentence
    assert ("in 1 of the 1 layers in which less than half of the masks are empty (most in layer 1 +" in sentence) == (
        triggers >= 0.3
    )
    beyond = triggers - chance
    assert ("more than" if beyond > 0.21 else "less than" if beyond < 0.19 else "as much as") in sentence


def test_the_way_starts_from_the_highest_reference_and_leaves_the_rest_out() -> None:
    place = way(records(), "Wanda")
    assert place.reference == OTHERS_APART and place.estimate.value == pytest.approx((0.41 - 0.24) / (0.83 - 0.24))
    assert math.isnan(place.estimate.low)
    higher = way(records(levels=LEVELS | {SIMULATED: 0.4}), "Wanda")
    assert higher.reference == SIMULATED and higher.estimate.value == pytest.approx(0.01 / 0.43)
    assert way(records(levels=LEVELS | {MEMORIZED: 0.4}), "Wanda") == place  # prompts' masks met one noise
    assert "half of the masks" in way(records(empty=0.3), "Wanda").why_not
    assert way(records(), "nothing").why_not == "too few triggers"
    # Masks that met one noise agree by that noise too: they decide nothing.
    one_noise = way(records(levels=LEVELS | {TRIGGERS: 0.8, OTHER_IMAGES: 0.7}), "Wanda")
    assert one_noise == place


def test_nothing_is_told_of_weights_without_triggers_of_another_image() -> None:
    """A run's first memory stands alone: masks of Gaussian-started triggers may agree whatever the image."""
    found = records(levels=LEVELS | {TRIGGERS: 0.8, APART: 0.8})
    assert observed.weight_word(found, "Wanda") == "local"
    rows = tuple(o for o in found.overlaps if o.group not in (OTHER_IMAGES, APART, OTHERS_APART))
    alone = dataclasses.replace(found, overlaps=rows)
    assert "no triggers of another image" in observed.weight_word(alone, "Wanda")
    assert "of the way" not in observed.weights(alone).sentences[0]


def test_a_verdict_on_sets_that_the_cap_cut_short_says_so() -> None:
    found = records(levels=LEVELS | {TRIGGERS: 0.8, APART: 0.8})
    rows = tuple(dataclasses.replace(o, method="NeMo") for o in found.overlaps if o.method == "Wanda")
    for converged, more in (
        (0.9, ""),
        (0.1, " (of sets that are not fully refined, since most searches met their cap)"),
    ):
        searches = tuple(dataclasses.replace(one, converged=converged) for one in found.searches)
        one = dataclasses.replace(found, overlaps=rows, searches=searches)
        assert observed.weight_word(one, "NeMo") == f"local{more}"


def test_agreements_are_called_the_same_only_where_that_is_known() -> None:
    prompts = Estimate(0.22, math.nan, math.nan, 1)
    for triggers, words in (
        (Estimate(0.41, 0.3, 0.5, 6), "more than"),
        (Estimate(0.1, 0.05, 0.15, 6), "less than"),
        (Estimate(0.22, 0.215, 0.225, 6), "as much as"),
        (Estimate(0.41, 0.2, 0.6, 6), "not clearly more or less than"),
    ):
        assert observed._against(triggers, prompts) == words
    # NeMo may select nothing for any prompt.
    none = tuple(dataclasses.replace(o, without_empty=None) if o.group == MEMORIZED else o for o in records().overlaps)
    sentence = observed.weights(dataclasses.replace(records(), overlaps=none)).sentences[0]
    assert "cannot be compared with what different memorized prompts do (0.36 against not measured)" in sentence


def test_an_interval_over_memories_that_crosses_a_border_leaves_the_verdict_open() -> None:
    found = records(6)
    rows = []
    for o in found.overlaps:
        if o.group == APART and o.layer == WHOLE:  # half of the memories local, half not
            level = 0.82 if int(o.memory[1:]) % 2 else 0.24
            o = dataclasses.replace(o, published=level, without_empty=level)
        rows.append(o)
    found = dataclasses.replace(found, overlaps=tuple(rows))
    estimate = way(found, "Wanda").estimate
    assert estimate.value == pytest.approx((0.53 - 0.24) / 0.59) and 0 <= estimate.low < 0.1 + 0.2 < estimate.high <= 1
    word = observed.weight_word(found, "Wanda")
    assert word == banded(estimate, observed.PLACE, ("not local", "partly local", "local"))
    assert observed.weight_word(records(6), "Wanda") == "partly local"  # all alike: an interval of width zero


def test_a_band_is_told_only_where_the_whole_interval_lies_in_it() -> None:
    words = ("low", "middle", "high")
    assert banded(Estimate(0.5, math.nan, math.nan, 2), (0.1, 0.9), words) == "middle"
    assert banded(Estimate(0.5, 0.2, 0.8, 9), (0.1, 0.9), words) == "middle"
    assert banded(Estimate(0.5, 0.05, 0.8, 9), (0.1, 0.9), words) == "cannot be told (low to middle)"
    assert banded(Estimate(0.9, 0.9, 0.95, 9), (0.1, 0.9), words) == "high"
    assert banded(Estimate(0.89, math.nan, math.nan, 2), (0.1, 0.9), words) == "middle, but close to the border"
    assert banded(Estimate(0.89, 0.89, 0.89, 9), (0.1, 0.9), words) == "middle"
    assert banded(Estimate(math.nan, math.nan, math.nan, 0), (0.1, 0.9), words) == "not measured"


# --------------------------------------------------------------------------------------------- space and activations


def test_activations_are_judged_by_triggers_of_different_images() -> None:
    said_ = observed.activations(records())
    both = "Value projections: in 2 memories closer together; feed-forward layers: in 2 memories closer together"
    assert said_.title.endswith(both)
    assert "is 0.50 times that of different images from the same starts: closer together." in said_.sentences[0]
    assert "D is 0.60 times that of different memorized prompts; of bare Gaussian" in said_.sentences[0]
    assert "before any attack, it is 0.80 times that" in said_.sentences[0]
    assert "ordinary prompts the ratio of triggers is 1.20. Under other noises" in said_.sentences[0]
    # Value projections see no noise: a zero there is no finding.
    assert "one and the same output by construction: these layers see no noise." in said_.sentences[0]
    assert said_.sentences[1].endswith("One trigger under other noises has 0.17 times the D of triggers.")
    assert "mean over layers and steps, each counting the same" in said_.sentences[-1]
    # Closer together than prompts, but no closer than triggers of other images: the image has no part in it.
    like = tuple(dataclasses.replace(a, value=4.0) if a.group == OTHER_IMAGES else a for a in records().activities)
    same = observed.activations(dataclasses.replace(records(), activities=like))
    assert "Value projections: in 2 memories about as far apart" in same.title and "0.60 times" in same.sentences[0]
    alone = dataclasses.replace(records(), activities=tuple(a for a in records().activities if a.group != OTHER_IMAGES))
    assert "cannot be told, no triggers of another image" in observed.activations(alone).title


def test_moves_are_judged_beyond_what_moves_to_other_images_share() -> None:
    found = records()  # common: 0.05 and 0.10; the second memory shares 0.02 with the first
    assert own_share(found).value == pytest.approx(0.08)
    said_ = observed.embedding(found)
    assert said_.title == "The moves of triggers: in one memory little is common"
    assert "0.08 is the image's own" in said_.sentences[2]
    assert "had each been moved as another one was, 0.04" in said_.sentences[1]
    other = "shared with moves to other images"
    alone = dataclasses.replace(found, measures=tuple(m for m in found.measures if m.name != other))
    assert math.isnan(own_share(alone).value) and "stays open" in observed.embedding(alone).sentences[2]
    assert observed.embedding(alone).title == "The moves of triggers: cannot be told, " + ALONE
    # Kinds of starts differ: each is told by itself.
    kinds = [
        Measure("m1", f"{name}, {start}", value, 3)
        for start, own in (("gaussian", 0.3), ("foreign", 0.05))
        for name, value in (("common share, same starts", own), (other, 0.02))
    ]
    sentence = observed.embedding(dataclasses.replace(found, measures=(*found.measures, *kinds))).sentences[2]
    assert sentence.endswith("image's own (from N(0, I) 0.28, from other prompts 0.03).")
    again = Measure("m1", "common share of a move and itself, attacked again", 0.7, 5)
    sentence = observed.embedding(dataclasses.replace(found, measures=(*found.measures, again))).sentences[2]
    assert sentence.endswith("one move shares 0.70 with itself, attacked again under other noise: the ceiling.")
    low = observed.embedding(
        dataclasses.replace(alone, measures=(*alone.measures, dataclasses.replace(again, value=0.4)))
    )
    assert low.sentences[2].endswith("No moves could be called mostly one direction.")


def test_no_figure_is_minus_zero() -> None:
    assert said(Estimate(-0.001, -0.004, 0.2, 9)) == "0.00 [0.00, 0.20]" and said(over_memories([])) == "not measured"


@pytest.mark.parametrize(
    ("between", "outward", "word"),
    [
        ((20, 24, 22, 18, 24, 20), (4, 2, 6, 4, 0, 4), "are connected by straight lines"),
        ((4, 2, 6, 4, 0, 4), (4, 2, 6, 4, 0, 4), "are not connected"),
        ((20, 24, 22, 18, 24, 20), (20, 24, 22, 18, 24, 20), "lines say nothing"),
        # Pooled, 84 of 144 points against 36 would be certain; but half of the memories do the one, half the other.
        ((24, 24, 24, 4, 4, 4), (20, 8, 8, 0, 0, 0), "cannot be told"),
        ((20, 24), (4, 2), "are connected by straight lines"),  # too few memories for an interval: the values decide
    ],
)
def test_lines_are_judged_over_memories(between: tuple[int, ...], outward: tuple[int, ...], word: str) -> None:
    found = records(len(between))
    wins = {
        (f"m{k}", kind): count
        for kind, counts in (("line between triggers", between), ("line to an ordinary prompt", outward))
        for k, count in enumerate(counts)
    }
    probes = [dataclasses.replace(p, successes=wins.get((p.memory, p.kind), p.successes)) for p in found.probes]
    sentences = observed.embedding(dataclasses.replace(found, probes=tuple(probes))).sentences
    (sentence,) = [one for one in sentences if one.startswith("Half way between")]
    assert sentence.startswith(f"Half way between two triggers {sum(between) / 24 / len(between):.2f}")
    assert ("[" in sentence) == (len(between) > 4)
    alone = wilson(sum(between), 24 * len(between))
    assert f"({sum(between)} of {24 * len(between)} points), half way to an ordinary prompt" in sentence
    assert f"alone would give 95 % intervals of {alone.low:.2f} to {alone.high:.2f} and" in sentence
    assert "hang together, so these are too narrow and decide nothing." in sentence
    assert word in sentence


def test_the_ball_is_as_large_as_half_of_its_directions_replicate() -> None:
    found = records(1)
    assert "up to a radius of 0.5 (0.5: 12 of 24; 1: 2 of 24), in" in observed.embedding(found).sentences[-1]
    every = tuple(dataclasses.replace(p, successes=p.n) for p in found.probes)
    assert (
        "at every radius that was tried (1: 24 of 24), in"
        in observed.embedding(dataclasses.replace(found, probes=every)).sentences[-1]
    )
    no = tuple(dataclasses.replace(p, successes=0) for p in found.probes)
    assert (
        "at no radius that was tried (0.1: 0 of 24), in"
        in observed.embedding(dataclasses.replace(found, probes=no)).sentences[-1]
    )


def test_methods_of_which_the_same_is_said_are_named_together() -> None:
    found = records()
    again = tuple(dataclasses.replace(o, method="Wanda 10 %") for o in found.overlaps)
    both = dataclasses.replace(found, overlaps=(*found.overlaps, *again))
    (word,) = observed.weight_words(found).values()
    assert observed.weight_words(both) == {"Wanda and Wanda 10 %": word}
    assert f"Wanda and Wanda 10 % masks: {word}" in verdict.headline(both)


def test_the_page_says_which_prompts_the_memorized_ones_are() -> None:
    def told(share: float) -> str:
        rows = (*records().measures, Measure("", PROMPTED, share, 10))
        return " ".join(verdict.done(dataclasses.replace(records(), measures=rows)))

    assert "the 7 of 10 prompts of memories that bring their image back" in told(0.7)
    assert "Only 1 of 10 prompts" in told(0.1) and "most of which are not memorized" in told(0.1)


def test_triggers_that_work_on_a_twin_are_told_to_carry_the_image_themselves() -> None:
    found = records()
    both = tuple(
        dataclasses.replace(m, value=0.4) if m.name == ON_TWIN and m.memory == "m0" else m for m in found.measures
    )
    assert "2 of 10 such attacks" in verdict.done(dataclasses.replace(found, measures=both))[2]
    none = tuple(m for m in found.measures if m.name != ON_TWIN)
    assert "There is no model that never saw" in verdict.done(dataclasses.replace(found, measures=none))[2]


def test_too_few_ordinary_prompts_are_said() -> None:
    found = records()
    found = dataclasses.replace(found, settings={**found.settings, "prompts": {"NeMo's statistics": 5}})
    assert any("5 instead of 48" in sentence for sentence in verdict.done(found))


def test_what_speaks_against_the_judge_is_said_before_any_verdict() -> None:
    found = records()
    assert any("threshold of d was not calibrated" in sentence for sentence in verdict.done(found))
    sound = dataclasses.replace(found, descriptor={**found.descriptor, "calibration": {"true_positive_rate": 1.0}})
    assert not any("calibrated" in sentence or "diverged" in sentence for sentence in verdict.done(sound))
    template = tuple(dataclasses.replace(one, kind="template") for one in found.subjects)
    lost = tuple(dataclasses.replace(t, moved=None) if t.index == 3 else t for t in found.triggers)
    told = verdict.done(dataclasses.replace(sound, subjects=template, triggers=lost))
    assert "Templates are judged by whole images" in told[-2] and told[-1].startswith("2 of 8 attacks diverged")


def test_weights_compared_in_half_precision_are_told_so() -> None:
    found = records()
    half = dataclasses.replace(found, settings={**found.settings, "precision": "float16"})
    assert any("half precision" in sentence for sentence in intervened.ground_truth(half).sentences)
    assert not any("half precision" in sentence for sentence in intervened.ground_truth(found).sentences)


def test_intervals_need_five_memories() -> None:
    few, enough = over_memories([1.0, 2.0, 3.0, 4.0]), over_memories([1.0, 2.0, 3.0, 4.0, None, 5.0])
    assert few.value == 2.5 and math.isnan(few.low) and said(few) == "2.50"
    assert enough.n == 5 and enough.low < 3 < enough.high and "[" in said(enough)
    assert said(over_memories([])) == "not measured"
    assert overlap(records(6), "Wanda", WHOLE, TRIGGERS).low == pytest.approx(0.41)


def test_dose_relations_are_rank_correlations_and_count_how_many_were_tried() -> None:
    found = records(6)
    related = {one.name: one for one in dose_relations(found)}
    assert related["distance moved"].rank == pytest.approx(1) and related["distance moved"].p < 0.01
    assert math.isnan(related["agreement of Wanda masks beyond other images'"].rank)  # no spread
    assert np.isnan(dose_relations(records(3))[1].rank) and dose_relations(records(1)) == []
    assert intervened.dose(found).title.startswith("Changes with the dose: distance moved")
    assert intervened.dose(records(3)).title == "Cannot be told"


def test_a_file_that_does_not_fit_is_refused_with_its_first_wrong_field(tmp_path: Path) -> None:
    path, data = tmp_path / "locality.json", json.loads(records().to_json())
    path.write_text(json.dumps(data))
    assert read_locality(path) == records()
    for change, word in (
        ({"overlaps": [{"memory": 3}]}, "overlaps[0]"),
        ({"overlaps": "x"}, "overlaps is 'x'"),
        ({"planned": True}, "planned is True"),
        ({"crosses": [data["crosses"][0] | {"again": [["high"]]}]}, "crosses[0].again[0][0]"),
        ({"places": [data["places"][0] | {"pca": [1.0]}]}, "places[0].pca has 1 entries"),
        ({"stranger": 1}, "stranger is not known"),
    ):
        path.write_text(json.dumps(data | change))
        with pytest.raises(DoriError) as caught:
            read_locality(path)
        assert word in str(caught.value) and "\n" not in str(caught.value)
    path.write_text(records().to_json().replace("0.41", "NaN"))
    with pytest.raises(DoriError, match="NaN is no number"):
        read_locality(path)


def test_every_memory_has_its_own_figures_beside_the_means() -> None:
    found = records(3)
    table = dict(singly(found))
    assert all(len(cells) == 3 for cells in table.values())
    assert table["attacks that replicate"] == ["3 of 4"] * 3
    shares = {o.memory: o.without_empty for o in found.overlaps if (o.layer, o.group) == (WHOLE, APART)}
    apart = "Wanda masks: triggers of one image, different noises"
    assert [float(cell) for cell in table[apart]] == [*shares.values()]
    fewer = dataclasses.replace(found, overlaps=tuple(o for o in found.overlaps if o.memory != "m1"))
    assert dict(singly(fewer))[apart][1] == "–"
    # Of what belongs to no single memory there is no row.
    assert not [name for name in table if "prompts" in name and name.startswith("Wanda")]
    # Distances, each point of lines and balls, what random masks share, the way, searches, what masks hold.
    assert table["distance between triggers"] == ["0.05", "0.10", "0.15"] and "distance moved" in table
    assert table["distance between triggers (from N(0, I))"] == ["0.05", "0.10", "0.15"]
    for words, told in (("between two triggers", "20"), ("to an ordinary prompt", "4")):
        assert [table[f"{words}, {at:g} of the way"] for at in (0.25, 0.5, 0.75)] == [[f"{told} of 24"] * 3] * 3
    assert [table[f"around a trigger, radius {at:g}"][0] for at in (0.1, 0.5, 1)] == ["24 of 24", "12 of 24", "2 of 24"]
    assert table["Wanda masks: random, equal size"] == ["0.05"] * 3
    place = f"{way(found, 'Wanda').estimate.value:.2f}"  # all memories are alike here
    assert table["Wanda masks: share of the way from the higher reference to the ceiling"] == [place] * 3
    assert table["NeMo's searches: neurons in the median set"] == ["7", "–", "–"]
    assert table["NeMo's searches: share that found a set that suppresses"] == ["0.50", "–", "–"]
    covered = "Wanda masks: share of the planted change in their layers, and of random masks as large"
    assert table[covered] == ["0.300, 0.120 (2.50 times)"] * 3
    assert table["D in the value projections: triggers to memorized prompts"] == ["0.60"] * 3
    assert not [name for name, _ in singly(dataclasses.replace(found, probes=())) if "trigger, radius" in name]


def test_more_than_prompts_is_more_beyond_what_masks_of_these_sizes_share_by_chance() -> None:
    """.41 against .22 in IoU; where the triggers' larger masks share .3 by chance alone, it is less."""
    levels = LEVELS | {APART: 0.41, TRIGGERS: 0.41, MEMORIZED: 0.22, f"{MEMORIZED}, random": 0.02}
    for chance, word in ((0.02, "more than"), (0.3, "less than"), (0.21, "as much as")):
        sentence = observed.weights(records(2, levels | {SIMULATED: chance})).sentences[0]
        assert f"share ({chance:.2f} and 0.02) triggers agree {word} different memorized prompts do" in sentence
    bare = records(2, levels)
    bare = dataclasses.replace(bare, overlaps=tuple(o for o in bare.overlaps if o.group != f"{MEMORIZED}, random"))
    (sentence, *_) = observed.weights(bare).sentences
    assert ". Triggers agree more than different memorized prompts do (0.41 against 0.22)." in sentence
    assert sentence.startswith("Triggers of one image agree on Wanda weights by 0.41") and "s they are" not in sentence
