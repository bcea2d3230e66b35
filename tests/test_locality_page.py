"""The page of a locality run says what the records hold, by its rules, and nothing that a stranger wrote runs in it."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dori.cli import main
from dori.image_file import png_bytes
from dori.locality.page import verdict
from dori.locality.page.render import render
from dori.locality.page.summary import dose_relations, over_memories, overlap, said
from dori.locality.records import (
    MEMORIZED,
    ORDINARY,
    OTHER_NOISES,
    SIMULATED,
    STARTS,
    TRIGGERS,
    WHOLE,
    Activity,
    Analysed,
    Change,
    Cover,
    Cross,
    Joined,
    Locality,
    Measure,
    Overlap,
    Patch,
    Place,
    Probe,
    Search,
    Trigger,
)
from dori.run import write_bytes

EVIL = "<script>alert(1)</script>"
LAYERS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
]
FEED = [layer.replace("attn2.to_v", "ff.net.2") for layer in LAYERS]
LEVELS = {TRIGGERS: 0.41, OTHER_NOISES: 0.83, MEMORIZED: 0.22, ORDINARY: 0.2, SIMULATED: 0.05}


def overlaps(memory: str, levels: dict[str, float], method: str = "Wanda") -> list[Overlap]:
    """Whole masks and one layer, every group at its level."""
    return [
        Overlap("" if group in (MEMORIZED, ORDINARY) else memory, method, layer, group, level, level, 0.0, 9.0, 3)
        for layer in (f"{FEED[0]}.weight", WHOLE)
        for group, level in levels.items()
    ]


def records(memories: int = 2, levels: dict[str, float] = LEVELS) -> Locality:
    """Records of every kind, with a stranger's names."""
    ids = [f"m{k}" for k in range(memories)]
    names = [
        "between triggers",
        "between their starts",
        "moved",
        "nearest start is the own",
        "common share of the moves",
        "shared with moves to other images",
        "between triggers, gaussian",
    ]
    return Locality(
        model=EVIL,
        twins=("twin",),
        descriptor={"name": "d", "threshold": 0.5},
        provenance={"versions": {}},
        settings={
            "explained_variance": {one: [0.5, 0.25] for one in ids},
            "embedding_shape": [4, 8],
            "layers": {"attention_value": LAYERS, "feed_forward": FEED},
        },
        cost={"triggers, forward": 10},
        planned=memories + 1,
        subjects=tuple(
            Analysed(one, "verbatim", float(k + 1), EVIL, f"pictures/{one}.png", 4, 3) for k, one in enumerate(ids)
        ),
        triggers=tuple(Trigger(one, "gaussian", 0, 0.7, True, 2.0) for one in ids),
        places=tuple(
            Place(one, role, "gaussian", k, (k, 1.0), (0.5, k))
            for one in ids
            for k in range(2)
            for role in ("start", "trigger", ORDINARY)
        ),
        measures=(
            *(Measure(one, name, 0.05 * (k + 1), 3) for k, one in enumerate(ids) for name in names),
            Measure("", "between ordinary prompts", 9.0, 3),
            Measure("", "between memorized prompts", 8.0, 3),
        ),
        probes=tuple(
            Probe(one, kind, 0.5, wins, 4)
            for one in ids
            for kind, wins in (("line between triggers", 3), ("line to an ordinary prompt", 1), ("ball", 2))
        ),
        activities=tuple(
            Activity("" if group in (MEMORIZED, ORDINARY, STARTS) else one, site, layer, 0, group, value, 3)
            for site, layers in (("attention_value", LAYERS), ("feed_forward", FEED))
            for layer in layers
            for one in ids
            for group, value in (
                (TRIGGERS, 6.0),
                (MEMORIZED, 10.0),
                (ORDINARY, 5.0),
                (STARTS, 8.0),
                (OTHER_NOISES, 1.0),
            )
        ),
        overlaps=tuple(dict.fromkeys(row for one in ids for row in overlaps(one, levels))),
        searches=(Search("m0", TRIGGERS, 3, 7.0, 9, 1.0, 0.5, 0.5, 0.25),),
        covers=tuple(
            Cover(one, "Wanda", layer, kind, 0.1, 0.3, 0.12)
            for one in ids
            for layer in (f"{FEED[0]}.weight", WHOLE)
            for kind in ("one", "union")
        ),
        changes=(Change("cross-attention values, down", 3.0, 1.0, 10), Change("self-attention, up", 1.0, 1.0, 10)),
        patches=tuple(
            Patch("m0", way, name, 0.6, share)
            for way in ("sufficient", "necessary")
            for name, share in (("none", 0.0), ("source", 1.0), (LAYERS[0], 0.4), ("all values", 0.8))
        ),
        crosses=(
            Cross(
                "m0",
                "Wanda",
                ("prompt", "gaussian"),
                (5, 6),
                replay=((0.2, 0.6), (0.6, 0.2)),
                again=((0.2, 0.6), (0.7, 0.2)),
                fresh=((0.6,), (0.4,)),
            ),
        ),
        joined=(
            Joined("m0", "Wanda", 0, 0.0, 4, 4, 0.1, None),
            Joined("m0", "Wanda", 1, 0.1, 1, 4, 0.2, None),
            Joined("m0", "Wanda", 2, 0.2, 0, 4, 0.3, None),
        ),
    )


def page(found: Locality, folder: Path, *, redact: bool = False) -> str:
    """The page, with training images in the folder."""
    for one in found.subjects:
        write_bytes(folder / one.picture, png_bytes(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))))
    return render(found, folder, redact=redact)


def test_the_page_shows_every_analysis_and_runs_and_loads_nothing(tmp_path: Path) -> None:
    html = page(records(), tmp_path)
    for key in ("embedding", "activations", "weights", "causal", "patching", "truth", "dose", "numbers", "made"):
        assert f'id="{key}"' in html
    assert "<script" not in html and "&lt;script&gt;" in html
    assert all(uri.startswith("data:") for uri in re.findall(r'(?:src|href)="([^"#][^"]*)"', html))
    assert html == page(records(), tmp_path)  # the same records, the same bytes
    assert "2 of 3 planned memories" in html and "6 of 8 attacks replicate" in html


def test_redaction_hides_prompts_and_images(tmp_path: Path) -> None:
    plain, redacted = (page(records(), tmp_path, redact=redact) for redact in (False, True))
    text = "“&lt;script&gt;"
    assert text in plain and text not in redacted
    images = [re.findall(r'src="(data:image/jpeg[^"]*)"', html) for html in (plain, redacted)]
    assert len(images[0]) == len(images[1]) == 2 and not {*images[0]} & {*images[1]}


def test_a_run_without_triggers_has_a_page_that_says_so(tmp_path: Path) -> None:
    bare = dataclasses.replace(
        records(),
        measures=(),
        probes=(),
        activities=(),
        covers=(),
        changes=(),
        patches=(),
        crosses=(),
        joined=(),
        searches=(),
        overlaps=tuple(o for o in records().overlaps if o.group in (MEMORIZED, ORDINARY)),
    )
    html = page(bare, tmp_path)
    assert "too few triggers to tell" in html and "Too few triggers" in html


@pytest.mark.parametrize(
    ("triggers", "ceiling", "word"),
    [
        (0.41, 0.83, "partly local"),
        (0.8, 0.83, "local"),
        (0.23, 0.83, "not local"),
        (0.1, 0.83, "not local"),
        (0.3, 0.24, "cannot be told"),
    ],
)
def test_weights_are_judged_on_the_way_from_reference_to_ceiling(triggers: float, ceiling: float, word: str) -> None:
    found = records(levels=LEVELS | {TRIGGERS: triggers, OTHER_NOISES: ceiling})
    sentence = verdict.weights(found).sentences[0]
    assert f"other seeds {ceiling:.2f}: {word}" in sentence
    assert f"({triggers:.2f} against 0.22)" in sentence
    assert ("more than" if triggers > 0.23 else "less than" if triggers < 0.21 else "as much as") in sentence


def test_activations_are_compared_with_different_memorized_prompts() -> None:
    said_ = verdict.activations(records())
    assert said_.title == (
        "Value projections closer together than different memorized prompts; feed-forward "
        "layers closer together than different memorized prompts"
    )
    assert "ratio of D 0.60" in said_.sentences[0] and "ordinary prompts 1.20" in said_.sentences[0]


def test_the_causal_verdict_counts_what_comes_back() -> None:
    said_ = verdict.causal(records())
    assert said_.title == "Not local" and "0.00" in said_.sentences[0]  # own triggers stay away, all others return
    assert "from 2 joined masks on (0.20 of the layers' weights" in said_.sentences[1]


def test_ground_truth_patching_and_embedding_speak_in_their_numbers() -> None:
    assert "values, down 1.00" in verdict.ground_truth(records()).sentences[0]
    assert verdict.ground_truth(records()).title == "Wanda finds it"
    assert "0.40 of the gap" in verdict.patching(records()).sentences[0]
    said_ = verdict.embedding(records())
    assert said_.title == "The moves have no common direction"
    assert any("6 of 8 points replicate" in sentence and "are connected" in sentence for sentence in said_.sentences)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nothing"], "--memories"),
        (["testbed", "--half"], "leave out --ordinary"),
        (["nothing", "--memories", "nowhere"], "nowhere is no folder"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["locality", *arguments, "--out", str(tmp_path / "run")])
    told = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(told) == 1 and word in told[0]


def test_intervals_need_five_memories() -> None:
    few, enough = over_memories([1.0, 2.0, 3.0, 4.0]), over_memories([1.0, 2.0, 3.0, 4.0, None, 5.0])
    assert few.value == 2.5 and math.isnan(few.low) and said(few) == "2.50"
    assert enough.n == 5 and enough.low < 3 < enough.high and "[" in said(enough)
    assert said(over_memories([])) == "not measured"
    assert overlap(records(6), "Wanda", WHOLE, TRIGGERS).low == pytest.approx(0.41)


def test_dose_relations_are_rank_correlations() -> None:
    found = records(6)
    related = {one.name: one for one in dose_relations(found)}
    assert related["between triggers"].rank == pytest.approx(1) and related["between triggers"].p < 0.01
    assert math.isnan(related["agreement of Wanda masks"].rank)  # no spread
    assert np.isnan(dose_relations(records(3))[1].rank) and dose_relations(records(1)) == []
