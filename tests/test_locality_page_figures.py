"""What figures of a locality page promise: names, axes, IDs of layers, and that nothing hides behind something else."""

import dataclasses
import re

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from synthetic_locality import FEED, VALUES, cross, records

from dori.locality.page import cause_figures, layer_figures, layer_ids, observed, space_figures, verdict
from dori.locality.page.summary import dose_relations
from dori.locality.records import NO_MASK, OTHER_NOISES, OTHERS_APART, TRIGGERS, Change, Locality
from dori.report import drawing


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is drawn, as matplotlib holds it."""
    figures: list[Figure] = []

    def kept(figure: Figure, alt: str) -> drawing.Picture:
        figures.append(figure)
        return drawing.Picture("", alt)

    for module in (space_figures, layer_figures, cause_figures):
        monkeypatch.setattr(module, "picture", kept)
    return figures


def title(figure: Figure) -> str:
    """The title, its line breaks undone."""
    return " ".join(figure.get_suptitle().split())


def labels(axes: Axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def test_a_map_names_its_memory_and_dose_and_hides_no_start(drawn: list[Figure]) -> None:
    found = records()
    space_figures.map_figures(found, "m1")
    assert [title(figure).split(":")[0] for figure in drawn] == ["m1 (dose 2)"] * 2
    assert "50% and 25% of the variance" in title(drawn[0]) and "seed 7" in title(drawn[1])
    for figure in drawn:
        (axes,) = figure.axes
        lines = {str(line.get_label()): line for line in axes.get_lines()}
        start, trigger = lines["start (large ring, on top)"], lines["trigger"]
        assert start.get_markersize() >= 2 * trigger.get_markersize() and start.get_markerfacecolor() == "none"
        order = axes.get_lines()
        assert order.index(start) > order.index(trigger) and start.get_zorder() >= trigger.get_zorder()
    unknown = tuple(dataclasses.replace(one, dose=None) for one in found.subjects)
    space_figures.map_figures(dataclasses.replace(found, subjects=unknown), "m0")
    assert title(drawn[-1]).startswith("m0: ")


def test_feed_forwards_have_a_logarithmic_axis_and_values_no_line_that_is_zero_by_construction(
    drawn: list[Figure],
) -> None:
    found = records()
    for site in ("attention_value", "feed_forward"):
        layer_figures.activity_figure(found, site, site, 0)
    values, feed = (figure.axes[0] for figure in drawn)
    noises = layer_figures.STYLES[OTHER_NOISES][0]
    assert (values.get_yscale(), feed.get_yscale()) == ("linear", "log") and feed.get_ylabel().endswith("(log)")
    assert noises in labels(feed) and noises not in labels(values)


def test_all_figures_and_sentences_call_a_layer_by_one_id(drawn: list[Figure]) -> None:
    found = records()
    assert [layer_ids.layer_id(found, f"{name}.weight") for name in (*VALUES, *FEED)] == [1, 2, 1, 2]
    assert layer_ids.layer_id(found, "up_blocks.0.resnets.0.conv1") is None
    assert layer_ids.module(found, FEED[1].replace("net.2", "net.0.proj")) == "layer 2: ff.net.0.proj"
    assert layer_ids.called(found, FEED[1]) == "the feed-forward of layer 2"
    assert layer_ids.called(found, "all values") == "all values"
    assert layer_ids.key(found).endswith("1 down_blocks.0, 2 mid_block.")
    assert layer_ids.with_key(found)["layers"][1] == {"id": 2, "attention_value": VALUES[1], "feed_forward": FEED[1]}
    # Masks that lie in the second block alone stand at its ID, in the figure as in the sentence.
    late = tuple(dataclasses.replace(o, layer=o.layer.replace(*names(found))) for o in found.overlaps)
    shifted = dataclasses.replace(found, overlaps=late)
    layer_figures.overlap_figure(shifted, "Wanda")
    assert [tick.get_text() for tick in drawn[-1].axes[0].get_xticklabels()] == ["2"]
    assert "(most in layer 2 +" in observed.weights(shifted).sentences[0]
    changes = (
        *found.changes,
        Change("layer", FEED[1], 9.0, 1.0, 10),
        Change("layer", "up_blocks.0.conv", 5.0, 1.0, 10),
    )
    cause_figures.excess_figure(dataclasses.replace(found, changes=changes), "layer")
    told = [tick.get_text() for tick in drawn[-1].axes[0].get_yticklabels()]
    assert told == ["layer 2: ff.net.2", "up_blocks.0.conv", "layer 1: attn2.to_v"]


def names(found: Locality) -> tuple[str, str]:
    """The names of the two blocks of the records."""
    first, second = layer_ids.blocks(found).values()
    return first, second


def test_every_memory_has_a_dot_of_its_own_in_the_figures_of_the_dose(drawn: list[Figure]) -> None:
    found = records(6)
    alike = tuple(dataclasses.replace(one, dose=8.0 if k < 3 else 6.0) for k, one in enumerate(found.subjects))
    one = next(one for one in dose_relations(dataclasses.replace(found, subjects=alike)) if "replicate" in one.name)
    assert {*zip(one.doses, one.values, strict=True)} == {(8.0, 0.75), (6.0, 0.75)}  # six memories, two points
    cause_figures.dose_figure(dataclasses.replace(one, rank=0.0, p=1.0))
    (dots,) = drawn[-1].axes[0].get_lines()
    x = np.asarray(dots.get_xdata(), float).tolist()
    assert len({*x}) == 6 and all(abs(place - dose) < 0.5 for place, dose in zip(x, one.doses, strict=True))


def test_what_a_twins_weights_stop_is_drawn_by_number_and_by_what_they_take_back(drawn: list[Figure]) -> None:
    shown = cause_figures.undone_figure(records(), "m0")
    by_number, by_change = drawn[-1].axes
    assert [tick.get_text() for tick in by_number.get_xticklabels()] == ["1%", "10%", "100%"]
    assert "squared difference" in by_change.get_xlabel()
    number, change = (
        {str(line.get_label()): line for line in axes.get_lines()}["most changed: triggers as they are"]
        for axes in (by_number, by_change)
    )
    assert np.asarray(change.get_xdata(), float).tolist() == [0.4, 0.7, 1.0]
    for line in (number, change):
        assert np.asarray(line.get_ydata(), float).tolist() == [5 / 6, 0, 0]
    assert shown is not None and "1% (holds 0.40) 3 of 8" in shown.alt and "10% (holds 0.10) 0 of 8" in shown.alt


# --------------------------------------------------------------------------------------------------- headline, rules


def test_a_verdict_from_few_memories_says_so_in_the_headline() -> None:
    found = records()
    assert "Wanda masks: in 2 memories partly local." in verdict.headline(found)
    assert "Pruned in one memory by Wanda: not local (of the other triggers" in verdict.headline(found)
    one = tuple(o for o in found.overlaps if o.group != OTHERS_APART or o.memory == "m0")
    first = tuple(o for o in one if o.memory != "m1")
    assert "Wanda masks: in one memory partly local." in verdict.headline(dataclasses.replace(found, overlaps=first))
    enough = dataclasses.replace(records(6), crosses=())
    assert re.search(r"Wanda masks: partly local\.$", verdict.headline(enough))
    second = [cross(kind, own=0.2, others=0.7, fresh=0.6, memory="m1") for kind in (TRIGGERS, NO_MASK)]
    nemo = dataclasses.replace(second[0], method="NeMo")
    both = verdict.headline(dataclasses.replace(found, crosses=(*found.crosses, *second)))
    assert "Pruned in 2 memories by Wanda" in both
    unequal = verdict.headline(dataclasses.replace(found, crosses=(*found.crosses, *second, nemo)))
    assert "Pruned (in 2 memories by Wanda; in one memory by NeMo) by Wanda" in unequal


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Lines", "the region is so large that lines say nothing where"),
        ("Balls", "the first at which their share, the mean over memories, lies below a half"),
        ("Activations", "Each layer and each step counts the same"),
        ("Weights beside prompts", f"more than {observed.SAME:g} above (below)"),
        ("Weights beside prompts", f"at most {2 * observed.SAME:g} wide"),
        ("Weights", f"by more than {observed.MORE:g} beyond the higher reference"),
        ("Intervals", "it is said in how many memories"),
    ],
)
def test_every_rule_behind_a_word_is_declared(name: str, words: str) -> None:
    assert any(rule.startswith(name) and words in rule for rule in verdict.RULES)
