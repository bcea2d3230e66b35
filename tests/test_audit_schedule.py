"""An audit knows beforehand what it asks and costs, and its cells depend on what changes figures and nothing else."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_parts
from safetensors.torch import load_file, save_file
from test_audit import BRIEF, JUDGE, MEMORIES, PLAN, tiny_audit, tiny_subjects
from transformers import CLIPConfig, CLIPModel

from dori.attack.dori import Dori
from dori.audit.checks import blind_scores, blind_scores_by_kind
from dori.audit.folders import load_clip
from dori.audit.judge import Case, Judge
from dori.audit.loop import audit, make_cases
from dori.audit.plan import Plan, Starts, paper, quick
from dori.audit.schedule import (
    ATTACK,
    Subjects,
    asking,
    audited,
    ordinary_prompts,
    planned_cells,
    planned_cost,
    planned_rows,
)
from dori.cost import BACKWARD, Rows, Speed, measured_speed
from dori.edit import WeightMask, load_edit
from dori.errors import DoriError
from dori.memory import Memory
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run

QUALITY = dataclasses.replace(BRIEF, quality_prompts=2)


def cases(count: int, kind: str, group: str = "memory") -> tuple[Case, ...]:
    """Images of which only the records matter."""
    nothing = torch.zeros(3, 2, 2)
    return tuple(
        Case(Memory(f"{kind}-{k}", f"{kind} {k}", Path("a.png"), kind), group, nothing, nothing)  # type: ignore
        for k in range(count)
    )


def whole_testbed(model: StableDiffusion, folder: Path) -> Subjects:
    """As many images of each kind as the testbed has, and a twin."""
    folder.mkdir()
    twin = StableDiffusion(**tiny_parts(folder), name="twin")
    return Subjects(
        model,
        (*cases(68, "verbatim"), *cases(8, "template"), *cases(64, "once")),
        cases(72, "control", "control"),
        tuple(f"word {k}" for k in range(600)),
        None,
        (twin,),
    )


# --------------------------------------------------------------------------------------------------- what it costs

# What threads may move in the last bits.
MEASURED: dict[str, Any] = {"similarities": (0.0,), "masked": (), "to_unedited": (), "diversity": None, "alignment": ()}


def test_the_paper_preset_takes_five_hours_at_most(tiny: StableDiffusion, tmp_path: Path) -> None:
    plan = paper()
    whole = whole_testbed(tiny, tmp_path / "twin")
    rows = planned_cost(whole, plan)
    # 76 + 72 images from the prompt thrice, and without an edit from noise; once, one twin, own NeMo and Wanda edits.
    attacks = 3 * 148 + 148 + 64 + 76 + 2 * 76
    longer = 3 * (8 + 8) + 8  # to 150 steps: of both groups under each edit, and on the twin
    assert rows.attacked == planned_rows(whole, plan)[ATTACK] == (attacks * 50 + longer * 100) * 8
    assert plan.nemo is not None
    rows += Rows(76 * plan.nemo.noises * plan.nemo.max_refinement_passes)  # whatever size the model has
    assert rows.seconds_s(Speed(250, 90)) < 5 * 3600


def test_final_attacks_have_ten_seeds_and_their_curves_three(tiny: StableDiffusion, tmp_path: Path) -> None:
    subjects, plan = whole_testbed(tiny, tmp_path / "twin"), paper()
    drawn = planned_cells(subjects, plan)["generation, forward"]
    per_image = 2 * plan.sampling_steps
    assert drawn["images.tiny.none.gaussian.50.verbatim-0"] == plan.chunk * 10 * per_image
    assert drawn["images.tiny.none.gaussian.0.verbatim-0"] == plan.chunk * 3 * per_image
    once = {key.split(".")[2:4][0] + "." + key.split(".")[3] for key in drawn if ".once-" in key}
    assert once == {"none.asked", "none.prompt"}


def test_long_attacks_go_on_from_where_the_usual_ones_end(tiny: StableDiffusion, tmp_path: Path) -> None:
    plan = dataclasses.replace(
        BRIEF,
        seeds=2,
        curve_seeds=1,
        attack=Dori(steps=2, batch=1, snapshots=(1, 2)),
        starts=Starts(memories=("prompt", "gaussian"), controls=("prompt",), once=(), twins=("prompt",), own=()),
    )
    longer = dataclasses.replace(plan, long_steps=(3, 4), long_images=2)
    subjects = tiny_subjects(tiny, StableDiffusion(**tiny_parts(tmp_path), name="twin"))
    usual, found = (
        {(f.model, f.start, f.steps, f.id): f.similarities for f in tiny_audit(subjects, tmp_path / n, p).findings}
        for n, p in (("usual", plan), ("longer", longer))
    )
    assert {key: len(values) for key, values in found.items() if key not in usual} == {
        (model, "prompt", step, one): 1
        for step in (3, 4)
        for model, one in (("tiny", "m0"), ("tiny", "c0"), ("twin", "m0"))
    }  # the other memory of the two has no prompt
    for key, values in usual.items():
        assert found[key] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("preset", [quick, paper])
def test_an_image_without_a_text_is_asked_from_both_other_starts_under_every_preset(
    tiny: StableDiffusion, preset: Callable[[], Plan]
) -> None:
    whole, starts = tiny_subjects(tiny), preset().starts
    titled = dataclasses.replace(whole, memories=tuple(c for c in whole.memories if c.memory.text is not None))
    assert asking(titled, preset()) == preset()
    asked = asking(whole, preset()).starts
    for name in ("memories", "controls", "edited", "twins"):
        assert getattr(starts, name) and set(getattr(asked, name)) == {"prompt", "gaussian", "foreign"}, name
        assert len(getattr(asked, name)) == 3
    assert bool(asked.once) == bool(starts.once)  # what is not attacked is not attacked for that


def test_a_memory_without_a_text_is_asked_even_where_attacks_begin_from_prompts(
    tiny: StableDiffusion, tmp_path: Path
) -> None:
    twin = StableDiffusion(**tiny_parts(tmp_path), name="twin")
    whole = dataclasses.replace(tiny_subjects(tiny), twins=(twin,))
    plan = dataclasses.replace(BRIEF, starts=quick().starts)

    def attacked(subjects: Subjects) -> set[tuple[str, ...]]:
        return {tuple(key.split(".")[1:4:2]) for key in planned_cells(subjects, plan)[ATTACK]}

    titled = dataclasses.replace(whole, memories=tuple(c for c in whole.memories if c.memory.text is not None))
    assert attacked(titled) == {("tiny", "prompt"), ("twin", "prompt")}
    bare = make_cases(tiny, [Memory("c1", None, Path("c1.png"), "control")], whole.controls[0].image[None], "control")
    assert attacked(dataclasses.replace(titled, controls=bare)) == attacked(whole)
    everywhere = {(model, start) for model in ("tiny", "twin") for start in ("prompt", "gaussian", "foreign")}
    assert attacked(whole) == everywhere
    run = Run(tmp_path / "run", modules=())
    with run.locked():
        found = audit(whole, plan=plan, judge=JUDGE, run=run)
    asked = {(finding.id, finding.start) for finding in found.findings if finding.model == "tiny"}
    assert {start for one, start in asked if one == "bare image"} == {"gaussian", "foreign"}
    assert {start for one, start in asked if one == "c0"} == {"", "prompt", "gaussian", "foreign"}


def test_under_an_edit_attacks_begin_where_the_plan_says(tiny: StableDiffusion) -> None:
    plan = dataclasses.replace(PLAN, starts=Starts(controls=("prompt", "gaussian"), edited=("prompt", "foreign")))
    starts: dict[tuple[str, str], set[str]] = {}
    whole = tiny_subjects(tiny)
    titled = dataclasses.replace(whole, memories=tuple(c for c in whole.memories if c.memory.text is not None))
    for key in planned_cells(titled, plan)[ATTACK]:
        _, _, edit, start, first = key.split(".", 4)
        starts.setdefault((edit, first[0]), set()).add(start)
    assert starts["none", "c"] == {"prompt", "gaussian"} and starts["NeMo", "c"] == {"prompt"}
    assert starts["none", "m"] == {"prompt", "gaussian", "foreign"} and starts["NeMo", "m"] == {"prompt", "foreign"}


def test_time_is_the_rows_over_the_speed() -> None:
    assert Rows(300, 60, 20).seconds_s(Speed(10, 3)) == 300 / 10 + (60 + 1.5 * 20) / 3


def test_speed_is_measured_by_the_clock(tiny: StableDiffusion) -> None:
    def measured(*moments: float) -> Speed | None:
        ticks = iter(moments)
        return measured_speed(tiny, clock=lambda: next(ticks))

    assert measured(0, 0.5, 1, 5, 5, 5.5, 6, 14) == Speed(64 / 4, 64 / 8)
    # A slow machine is not asked for the large batch, and its first pass, cold or beside other work, is no measure.
    assert measured(0, 20, 20, 22, 22, 42, 42, 46) == Speed(4 / 2, 4 / 4)


def test_progress_counts_every_cell_and_ends_at_the_whole(tiny: StableDiffusion, tmp_path: Path) -> None:
    subjects, said = tiny_subjects(tiny), list[str]()
    plan = dataclasses.replace(QUALITY, nemo=PLAN.nemo, wandas=PLAN.wandas)
    run = Run(tmp_path, said.append, modules=())
    with run.locked():
        audit(subjects, plan=plan, judge=JUDGE, run=run)
    cells = planned_cells(subjects, plan)
    stored = {path.name.removesuffix(".safetensors") for path in (tmp_path / "cells").glob("*.safetensors")}
    assert stored == {key for part in cells.values() for key in part}
    assert all(stored & part.keys() for part in cells.values()) and len(cells) == 4
    assert said[-1] == f"audit: 100 % ({len(stored)}/{len(stored)} cells)"
    assert run.progress is not None
    assert run.progress.costs["nemo-calibration"] == 3 * 2
    attack = next(iter(cells[ATTACK]))
    assert run.progress.costs[attack] == round(BACKWARD * cells[ATTACK][attack])


# ----------------------------------------------------------------------------------------------- which it asks for


def test_a_limit_spreads_over_the_images_that_were_seen_often(tiny: StableDiffusion, tmp_path: Path) -> None:
    subjects = whole_testbed(tiny, tmp_path / "twin")
    few = audited(subjects, Plan("few", memories=8, controls=8))
    assert Counter(case.memory.kind for case in few.memories) == {"verbatim": 7, "template": 1}
    assert len(few.controls) == 8
    assert len(audited(subjects, Plan("many", memories=100)).memories) == 100
    assert audited(few, Plan("few", memories=8, controls=8)).memories == few.memories
    assert len(audited(subjects, Plan("all")).memories) == 140


def test_an_audit_of_some_says_of_how_many_and_scores_all_blindly(tiny: StableDiffusion, tmp_path: Path) -> None:
    subjects = tiny_subjects(tiny)
    found = tiny_audit(subjects, tmp_path / "some", dataclasses.replace(BRIEF, memories=1))
    assert {f.id for f in found.findings} == {"m0", "c0"}
    assert found.settings["images"] == {"memories": {"audited": 1, "given": 3}, "controls": {"audited": 1, "given": 1}}
    assert found.blind == blind_scores_by_kind(tiny, subjects.memories, subjects.controls)
    verbatim = tuple(case for case in subjects.memories if case.memory.kind == "verbatim")
    apart = {name: value for name, value in found.blind.items() if not name.endswith(", verbatim")}
    assert apart == blind_scores(tiny, subjects.memories, subjects.controls)
    alone = blind_scores(tiny, verbatim, subjects.controls)
    rest = {name.removesuffix(", verbatim"): v for name, v in found.blind.items() if name not in apart}
    assert rest == (alone if len(verbatim) < len(subjects.memories) else {})
    templates = tuple(
        dataclasses.replace(case, memory=dataclasses.replace(case.memory, kind="template")) for case in verbatim[:1]
    )
    mixed = blind_scores_by_kind(tiny, (*templates, *subjects.memories), subjects.controls)
    assert mixed["file size, verbatim"] == alone["file size"]
    assert found.blind != blind_scores(tiny, subjects.memories[:1], subjects.controls)


def test_prompts_of_quality_serve_nothing_else(tiny: StableDiffusion) -> None:
    subjects = tiny_subjects(tiny)
    mixed = dataclasses.replace(subjects, ordinary=("abc", "xyz", *subjects.ordinary, *subjects.ordinary))
    found = ordinary_prompts(mixed, dataclasses.replace(PLAN, calibration_prompts=4, quality_prompts=3))
    assert (len(found.calibration), len(found.quality), found.short) == (4, 3, "")
    assert not {*found.quality} & {*found.foreign} and {*found.calibration} <= {*found.foreign}
    # "abc" and "xyz" are a memory's and a control's own prompts.
    assert {*found.quality, *found.foreign} == {*subjects.ordinary}


def test_too_few_prompts_are_shared_out_and_said(tiny: StableDiffusion, tmp_path: Path) -> None:
    subjects = dataclasses.replace(tiny_subjects(tiny), ordinary=tuple("word " + letter for letter in "abcdef"))
    plan = dataclasses.replace(QUALITY, calibration_prompts=8, quality_prompts=4)
    found = ordinary_prompts(subjects, plan)
    assert (len(found.calibration), len(found.quality)) == (4, 2)
    assert found.short.startswith("Only 6 ordinary prompts for 12 places: 4 serve NeMo's statistics and 2 other ones")
    assert found.short in tiny_audit(subjects, tmp_path, plan).distrust
    with pytest.raises(DoriError, match="1 different ordinary prompts, .* are too few; give 12"):
        ordinary_prompts(dataclasses.replace(subjects, ordinary=("one",)), dataclasses.replace(plan, nemo=PLAN.nemo))


# ------------------------------------------------------------------------------------------ what cells depend on


def test_rounding_recomputes_nothing(tiny: StableDiffusion, tmp_path: Path) -> None:
    subjects = tiny_subjects(tiny)
    plan = dataclasses.replace(QUALITY, nemo=PLAN.nemo, wandas=PLAN.wandas, starts=Starts())
    first, rows = tiny_audit(subjects, tmp_path, plan), tiny.rows
    # As another number of threads would: a little off in every latent and every embedding.
    nudged = dataclasses.replace(
        subjects, memories=tuple(dataclasses.replace(case, latent=case.latent + 1e-6) for case in subjects.memories)
    )
    handle = tiny.text_encoder.register_forward_hook(
        lambda module, inputs, output: setattr(output, "last_hidden_state", output.last_hidden_state + 1e-6)
    )
    again = tiny_audit(nudged, tmp_path, plan)
    handle.remove()
    assert tiny.rows == rows and again.findings == first.findings and again.edits == first.edits


def test_threads_move_no_similarity_by_more_than_a_thousandth(tiny: StableDiffusion, tmp_path: Path) -> None:
    subjects, usual, found = tiny_subjects(tiny), torch.get_num_threads(), []
    plan = dataclasses.replace(PLAN, wanda_sweep=())
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(tiny_audit(subjects, tmp_path / str(threads), plan).findings)
    finally:
        torch.set_num_threads(usual)
    assert len(found[0]) == len(found[1]) > 0
    for one, two in zip(*found, strict=True):
        assert dataclasses.replace(one, **MEASURED) == dataclasses.replace(two, **MEASURED)
        assert one.similarities == pytest.approx(two.similarities, abs=1e-3)


def test_another_pixel_or_text_is_another_cell(tiny: StableDiffusion, tmp_path: Path) -> None:
    subjects = tiny_subjects(tiny)
    tiny_audit(subjects, tmp_path)
    rows, case = tiny.rows, subjects.memories[0]
    brighter = case.image.clone()
    brighter[0, 0, 0] += 1 / 255 if brighter[0, 0, 0] < 0.5 else -1 / 255
    for changed in (
        dataclasses.replace(case, image=brighter),
        dataclasses.replace(case, memory=dataclasses.replace(MEMORIES[0], text="abd")),
    ):
        tiny_audit(dataclasses.replace(subjects, memories=(changed, *subjects.memories[1:])), tmp_path)
        assert tiny.rows > rows
        rows = tiny.rows


def clip(model: StableDiffusion, seed: int) -> CLIPModel:
    """A tiny random CLIP."""
    torch.manual_seed(seed)
    layer = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = model.tokenizer
    text = layer | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": model.context_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=layer | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    ).eval()


def test_another_clip_judges_anew_and_attacks_nothing_anew(tiny: StableDiffusion, tmp_path: Path) -> None:
    subjects = tiny_subjects(tiny)
    judges = [Judge(JUDGE.descriptor, clip(tiny, seed), tiny.tokenizer) for seed in (1, 2)]
    first = tiny_audit(subjects, tmp_path, QUALITY, judges[0])
    rows = tiny.rows
    assert tiny_audit(subjects, tmp_path, QUALITY, judges[0]).quality == first.quality and tiny.rows == rows
    other = tiny_audit(subjects, tmp_path, QUALITY, judges[1])
    assert tiny.rows - rows == sum(other.cost.values()) - other.cost[ATTACK]
    assert [f.alignment for f in first.findings] != [f.alignment for f in other.findings]
    assert first.quality != other.quality
    assert not any("CLIP" in reason for reason in first.distrust)
    assert any("No CLIP was given" in reason for reason in tiny_audit(subjects, tmp_path / "none", QUALITY).distrust)


def test_a_clip_is_opened_from_its_folder_or_refused_in_one_sentence(tiny: StableDiffusion, tmp_path: Path) -> None:
    folder, images = tmp_path / "clip", torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = clip(tiny, 1)
    network.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    judge = load_clip(JUDGE, folder)
    expected = Judge(JUDGE.descriptor, network, tiny.tokenizer)
    torch.testing.assert_close(judge.align(images, ["a", "b"]), expected.align(images, ["a", "b"]))
    assert judge.record() == expected.record()
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}')
    assert (load_clip(JUDGE, folder).mean, load_clip(JUDGE, folder).std) == ((0.5, 0.5, 0.5), (1, 1, 1))
    (folder / "preprocessor_config.json").write_text('{"image_mean": 3}')
    for broken in (folder, tmp_path / "nowhere"):
        with pytest.raises(DoriError, match="cannot be opened as a CLIP") as caught:
            load_clip(JUDGE, broken)
        assert "\n" not in str(caught.value)
    (folder / "preprocessor_config.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("visual_projection.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DoriError, match="weights are missing"):
        load_clip(JUDGE, folder)


# ------------------------------------------------------------------------------------------------ edits are files


def test_every_computed_edit_is_a_file_and_can_be_given(tiny: StableDiffusion, tmp_path: Path) -> None:
    subjects = tiny_subjects(tiny)
    plan = dataclasses.replace(BRIEF, wandas=PLAN.wandas, starts=Starts(*[("prompt",)] * 5))
    first = tiny_audit(subjects, tmp_path / "a", plan)
    files = sorted((tmp_path / "a" / "edits").iterdir())
    edits = {path: load_edit(path) for path in files}
    assert Counter(edit.name for edit in edits.values()) == {"Wanda 20 %": 3, "random weights": 1}
    joint = next(edit for path, edit in edits.items() if edit.name == "Wanda 20 %" and ".m" not in path.name)
    renamed = dataclasses.replace(joint, name="Wanda 20 % (a.safetensors)")
    own = {info.name: info for info in first.edits if info.scope == "own"}["Wanda 20 %"]
    sizes = {path.stem.split(".")[1].split("-")[0]: edit.size for path, edit in edits.items() if ".m" in path.name}
    assert own.details["sizes"] == sizes and len(sizes) == 2 and own.size == min(sizes.values())

    run = Run(tmp_path / "b", modules=())
    with run.locked():
        found = audit(subjects, plan=dataclasses.replace(plan, wandas=()), judge=JUDGE, run=run, given=[renamed])
    assert [(info.name, info.size) for info in found.edits] == [("none", 0), (renamed.name, joint.size)]
    assert found.edits[1].details == first.edits[1].details
    assert not (tmp_path / "b" / "edits").exists()  # it was not computed here

    def similarities(results: object, name: str) -> list[tuple[float, ...]]:
        return [f.similarities for f in results.findings if f.edit == name and f.edit_scope == "joint"]  # type: ignore

    assert similarities(found, renamed.name) == similarities(first, "Wanda 20 %") != []


def test_an_edit_that_does_not_fit_or_has_a_taken_name_is_refused_at_once(
    tiny: StableDiffusion, tmp_path: Path
) -> None:
    subjects, rows = tiny_subjects(tiny), tiny.rows
    strange = WeightMask("other", {"down_blocks.7.weight": torch.ones(2, dtype=torch.bool)})
    for given, said in (
        ([strange], "'other' does not fit tiny"),
        ([WeightMask("none", {})], "name of another edit"),
        ([WeightMask("x", {}), WeightMask("x", {})], "name of another edit"),
    ):
        run = Run(tmp_path, modules=())
        with run.locked(), pytest.raises(DoriError, match=said):
            audit(subjects, plan=BRIEF, judge=JUDGE, run=run, given=given)
    assert tiny.rows == rows
