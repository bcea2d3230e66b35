"""The audit asks everything once, changes nothing, never looks ahead, survives a kill, and distrusts itself."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_parts
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dori.attack.dori import Dori
from dori.audit.checks import with_distrust
from dori.audit.folders import folder_subjects
from dori.audit.judge import Case, Judge, finite_images, judged
from dori.audit.loop import Subjects, audit, make_cases
from dori.audit.plan import Plan, Starts
from dori.audit.schedule import EDITS, planned_rows
from dori.errors import DoriError
from dori.findings import Audit, Finding, read_audit
from dori.memory import Memory, write_memories
from dori.metrics.similarity import Descriptor
from dori.mitigate.nemo import Nemo
from dori.mitigate.wanda import Wanda
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run
from dori.sampling import named_seed
from dori.testbed.subjects import DESCRIPTOR

ROOT = Path(__file__).parent.parent
BOX = (4, 4, 10, 12)
MEMORIES = (
    Memory("m0", "abc", Path("m0.png"), dose=8.0),
    Memory("m1", "defg", Path("m1.png"), "template", 2.0, BOX),
    Memory("bare image", None, Path("m2.png")),
)
CONTROLS = (Memory("c0", "xyz", Path("c0.png"), "control"),)
JOINT = ("none", "NeMo", "Wanda 20 %", "random neurons", "random weights")
ASKED_ONLY = ("Wanda 40 %",)
WANDA = Wanda(sparsity=0.2, counted_steps=1, ddim_steps=4)
PLAN = Plan(
    "tiny",
    seeds=3,
    curve_seeds=2,
    sampling_steps=2,
    guidance_scale=3.0,
    attack=Dori(steps=2, batch=2, snapshots=(0, 1, 2)),
    nemo=Nemo(noises=2, max_refinement_passes=3),
    wandas=(WANDA,),
    wanda_sweep=(dataclasses.replace(WANDA, sparsity=0.4),),
    calibration_prompts=3,
    quality_prompts=3,
    chunk=2,
)
BRIEF = dataclasses.replace(
    PLAN,
    sampling_steps=1,
    attack=Dori(steps=1, batch=1),
    nemo=None,
    starts=Starts(*[("gaussian",)] * 6),
    wandas=(),
    wanda_sweep=(),
    quality_prompts=0,
)


def colours(images: Tensor) -> Tensor:
    """The pixel correlation of 4 x 4 thumbnails: with few dimensions, the quality distances are cheap."""
    x = functional.adaptive_avg_pool2d(images, 4).flatten(1)
    return x - x.mean(dim=1, keepdim=True)


JUDGE = Judge(Descriptor("pixel-correlation-4", "4 x 4, mean subtracted", colours, threshold=0.7))


def tiny_subjects(model: StableDiffusion, *twins: StableDiffusion, controls: bool = True) -> Subjects:
    """Three memories, one of them without a text, and one control, all noise."""
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    return Subjects(
        model,
        make_cases(model, MEMORIES, images[:3], "memory"),
        make_cases(model, CONTROLS, images[3:], "control") if controls else (),
        tuple(f"word {number}" for number in range(8)),
        None,
        twins,
    )


def tiny_audit(subjects: Subjects, folder: Path, plan: Plan = BRIEF, judge: Judge = JUDGE) -> Audit:
    """The audit in a locked folder."""
    run = Run(folder, modules=())
    with run.locked():
        return audit(subjects, plan=plan, judge=judge, run=run)


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """A whole audit with everything that it could have changed."""

    audit: Audit
    folder: Path
    twin: StableDiffusion
    before: tuple[str, str]
    after: tuple[str, str]
    twin_rows: int
    global_state: tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """One audit with all edits, all starts and a twin."""
    model, twin = (StableDiffusion(**tiny_parts(tmp_path_factory.mktemp(name)), name=name) for name in ("tiny", "twin"))
    with torch.no_grad():
        next(twin.unet.parameters()).mul_(1.01)
    subjects, folder = tiny_subjects(model, twin), tmp_path_factory.mktemp("run")
    before, rows, state = (model_fingerprint(model), model_fingerprint(twin)), twin.rows, torch.get_rng_state()
    found = tiny_audit(subjects, folder, PLAN)
    return Whole(
        found,
        folder,
        twin,
        before,
        (model_fingerprint(model), model_fingerprint(twin)),
        twin.rows - rows,
        (state, torch.get_rng_state()),
    )


def asked(finding: Finding) -> tuple[str, ...]:
    """Everything that tells a finding from all others."""
    return (finding.id, finding.model, finding.edit, finding.edit_scope, finding.start, str(finding.steps))


def test_every_image_under_every_edit_and_way_of_asking_is_found_exactly_once(whole: Whole) -> None:
    # The start itself is asked too; that of the prompt is the prompt.
    ways = [
        ("", "0"),
        *((start, step) for start in ("prompt", "gaussian", "foreign") for step in "012"[start == "prompt" :]),
    ]
    prompts = {"m0", "m1", "c0"}
    expected = []
    for one in ("m0", "m1", "bare image", "c0"):
        for start, step in ways:
            if start in ("", "prompt") and one not in prompts:
                continue
            expected += [(one, "tiny", edit, "joint" if edit != "none" else "", start, step) for edit in JOINT]
            expected += [(one, "tiny", edit, "joint", start, step) for edit in ASKED_ONLY if start == ""]
            if one != "c0":
                expected.append((one, "twin", "none", "", start, step))
            if one in ("m0", "m1") and (start, step) in (("", "0"), ("prompt", "2")):
                expected += [(one, "tiny", edit, "own", start, step) for edit in ("NeMo", "Wanda 20 %")]
    assert Counter(map(asked, whole.audit.findings)) == Counter(expected)


def test_each_finding_holds_a_figure_for_each_seed_and_its_picture(whole: Whole) -> None:
    pictures = [finding.picture for finding in whole.audit.findings]
    assert len(set(pictures)) == len(pictures)
    for finding in whole.audit.findings:
        seeds = 2 if finding.start and finding.steps < 2 else 3  # curve_seeds before the last step
        assert len(finding.similarities) == seeds and all(-1 <= s <= 1 for s in finding.similarities)
        assert len(finding.masked) == (seeds if finding.id == "m1" else 0)
        assert len(finding.to_unedited) == (0 if finding.edit == "none" else seeds)
        assert finding.kind == {"m1": "template", "c0": "control"}.get(finding.id, "verbatim")
        with Image.open(whole.folder / finding.picture) as image:
            assert image.size == (16, 16)
    assert {subject.picture for subject in whole.audit.subjects}.isdisjoint(pictures)


def test_an_audit_leaves_weights_and_global_randomness_as_they_were(whole: Whole) -> None:
    assert whole.before == whole.after
    assert torch.equal(*whole.global_state)


def test_a_twin_is_only_asked_and_attacked(whole: Whole) -> None:
    assert {finding.edit for finding in whole.audit.findings if finding.model == "twin"} == {"none"}
    assert {finding.group for finding in whole.audit.findings if finding.model == "twin"} == {"memory"}
    # Its U-Net saw these rows and no others: neither an edit's statistics nor the quality prompts.
    generations = sum(len(f.similarities) for f in whole.audit.findings if f.model == "twin") * PLAN.sampling_steps
    attacks = 2 * 3 + 1 * 2  # two memories from three starts, the one without text from two
    assert whole.twin_rows == 2 * generations + attacks * PLAN.attack.steps * PLAN.attack.batch


def test_the_cost_is_that_of_the_networks_rows(whole: Whole, tiny: StableDiffusion) -> None:
    folder_cost = dict(whole.audit.cost)
    rows, subjects = tiny.rows, tiny_subjects(tiny)
    again = tiny_audit(subjects, whole.folder.parent / "cost", PLAN)
    twin_cost = sum(folder_cost.values()) - sum(again.cost.values())
    assert tiny.rows - rows == sum(again.cost.values())
    assert twin_cost == whole.twin_rows


def test_the_planned_rows_are_those_spent(whole: Whole, tiny: StableDiffusion) -> None:
    subjects = dataclasses.replace(tiny_subjects(tiny), twins=(whole.twin,))
    planned, spent = planned_rows(subjects, PLAN), dict(whole.audit.cost)
    assert planned.pop(EDITS) >= spent.pop(EDITS) > 0  # of NeMo's searches only a bound is known
    assert planned == spent
    exact = dataclasses.replace(PLAN, nemo=None, attack=BRIEF.attack, sampling_steps=1)
    assert planned_rows(subjects, exact)[EDITS] == 2 * 2 + 2 * 2 + 2 * 2 * 2  # two runs of two prompts, and of each own
    alone = dataclasses.replace(subjects, twins=())
    assert planned_rows(alone, exact) == tiny_audit(alone, whole.folder.parent / "exact", exact).cost


def test_judged_noise_is_never_an_attacks_noise() -> None:
    fresh = Plan("any", seeds=50).fresh_seeds()
    attacks = [
        named_seed(stream, 0, start, memory.id)
        for stream in ("attack", "start")
        for start in ("prompt", "gaussian", "foreign")
        for memory in (*MEMORIES, *CONTROLS)
    ]
    methods = [named_seed(name, 0) for name in ("nemo", "wanda", "random neurons", "random weights")]
    assert len({*fresh, *attacks, *methods}) == 50 + 24 + 4
    assert not {*fresh} & {*Plan("any", seeds=50, seed=1).fresh_seeds()}


def test_the_seeds_in_the_cells_are_those_apart(whole: Whole) -> None:
    used = {"images": set[int](), "triggers": set[int]()}
    for path in (whole.folder / "cells").glob("*.safetensors"):
        kind = path.name.split(".")[0]
        if kind in used:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            used[kind] |= set(json.loads(header["__metadata__"]["dori"])["inputs"]["seeds"])
    assert used["images"] == set(PLAN.fresh_seeds())
    assert len(used["triggers"]) == 3 * 3 + 2  # a stream of its own for each image and start
    assert not used["images"] & used["triggers"]


def test_audit_json_is_read_back_as_it_was(whole: Whole, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    path.write_text(whole.audit.to_json())
    read = read_audit(path)
    assert read.findings == whole.audit.findings and read.subjects == whole.audit.subjects
    assert read.quality == whole.audit.quality and read.distrust == whole.audit.distrust
    assert read.to_json() == whole.audit.to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"schema": 99}',
        '{"schema": 1}',
        "[" * 100_000,
        '{"schema": 1, "subjects": [], "edits": [], "findings": ["x"], "quality": []}',
    ],
)
def test_what_is_no_audit_is_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    path.write_text(text)
    with pytest.raises(DoriError) as caught:
        read_audit(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# One process imports torch once and forks a child for each audit. The killed ones die just before the n-th thing that
# touches a file; a fresh child resumes, and everything but the times must be that of an undisturbed audit.
KILLED = """
import json, os, random, signal, sys
from pathlib import Path
import torch
from dori.model.stable_diffusion import StableDiffusion
from dori.run import write_text
sys.path.insert(0, sys.argv[2])
from conftest import tiny_parts
from test_audit import KILLED_PLAN, tiny_audit, tiny_subjects

torch.set_num_threads(1)
root = Path(sys.argv[1])
subjects = tiny_subjects(StableDiffusion(**tiny_parts(root), name="tiny"))
seen, mortal = 0, None

def hook(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.mkdir") and folder is not None and str(folder) in str(arguments[0]):
        if seen == mortal:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

def child(number):
    global seen, mortal
    pid = os.fork()
    if pid == 0:
        seen, mortal = 0, number
        write_text(folder / "audit.json", tiny_audit(subjects, folder, KILLED_PLAN).to_json())
        write_text(root / "count", str(seen))
        os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])

def contents():
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    audit = json.loads(files.pop("audit.json"))
    audit["provenance"].pop("times")
    return json.dumps(audit), files

folder = None
sys.addaudithook(hook)
folder = root / "whole"
assert child(None) == 0
whole, count = contents(), int((root / "count").read_text())
rng, signals, equal = random.Random(sys.argv[3]), [], []
for third in range(3):
    folder = root / f"killed-{third}"
    signals.append(child(rng.randrange(third * count // 3, (third + 1) * count // 3)))
    assert child(None) == 0
    equal.append(contents() == whole)
print(json.dumps({"signals": signals, "equal": equal, "count": count}))
"""
KILLED_PLAN = dataclasses.replace(
    PLAN,
    sampling_steps=1,
    attack=Dori(steps=1, batch=1),
    starts=Starts(("prompt",), ("prompt",), own=()),
    attack_random=False,
)


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_a_killed_and_resumed_audit_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(ROOT / "tests"), str(0)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout)
    assert result["signals"] == [9, 9, 9] and result["count"] > 60
    assert result["equal"] == [True, True, True]


def test_a_finished_audit_costs_nothing_again(whole: Whole, tiny: StableDiffusion, tmp_path: Path) -> None:
    subjects, folder = tiny_subjects(tiny), tmp_path / "run"
    first = tiny_audit(subjects, folder)
    rows = tiny.rows
    assert tiny_audit(subjects, folder).findings == first.findings
    assert tiny.rows == rows


# --------------------------------------------------------------------------------------------------------- distrust


def with_similarity(found: Audit, value: float, *, when: Callable[[Finding], bool]) -> Audit:
    """The audit with other figures in some findings."""
    return dataclasses.replace(
        found,
        findings=tuple(
            dataclasses.replace(f, similarities=(value,) * len(f.similarities)) if when(f) else f
            for f in found.findings
        ),
    )


def reasons(found: Audit, word: str, diverged: int = 0) -> list[str]:
    """Reasons to distrust in which a word occurs."""
    return [reason for reason in with_distrust(found, diverged=diverged).distrust if word in reason]


def test_without_controls_nothing_is_said_about_storage(tiny: StableDiffusion, tmp_path: Path) -> None:
    found = tiny_audit(tiny_subjects(tiny, controls=False), tmp_path / "run")
    assert any("no controls" in reason and "storage" in reason for reason in found.distrust)
    assert found.blind == {}
    assert {finding.group for finding in found.findings} == {"memory"}


def test_a_control_that_replicates_is_a_reason_to_distrust(whole: Whole) -> None:
    clean = with_similarity(whole.audit, 0.0, when=lambda f: True)
    assert reasons(clean, "attacks on controls succeeded") == reasons(clean, "comes back from its own prompt") == []

    attacked = with_similarity(
        clean, 0.9, when=lambda f: f.group == "control" and f.start == "foreign" and f.steps == 2 and f.edit == "none"
    )
    assert [reason[:5] for reason in reasons(attacked, "attacks on controls succeeded")] == ["1 of "]
    for edit in ("none", "NeMo", "Wanda 20 %"):
        under = with_similarity(
            clean, 0.9, when=lambda f, e=edit: f.group == "control" and f.steps == 2 and f.edit == e
        )
        said = reasons(under, "attacks on controls succeeded")
        assert len(said) == 1 and (f"under {edit}" in said[0]) == (edit != "none")
    from_prompt = with_similarity(clean, 0.9, when=lambda f: f.group == "control" and not f.start)
    assert len(reasons(from_prompt, "comes back from its own prompt")) == 1
    memory = with_similarity(clean, 0.9, when=lambda f: f.group == "memory" and f.model == "tiny")
    assert reasons(memory, "ontrol") == reasons(clean, "ontrol")


def test_a_twin_that_gives_memories_is_a_reason_to_distrust(whole: Whole) -> None:
    clean = with_similarity(whole.audit, 0.0, when=lambda f: True)
    assert reasons(clean, "never saw the memories") == []
    broken = with_similarity(clean, 0.9, when=lambda f: f.model == "twin" and f.start == "gaussian" and f.steps == 2)
    assert reasons(broken, "never saw the memories")[0].startswith("3 of 8 attacks succeeded on twin")


def test_silent_attacks_blind_scores_and_divergence_are_reasons_to_distrust(whole: Whole) -> None:
    assert reasons(whole.audit, "no gradient") == []
    silent = tuple(dataclasses.replace(s, first_gradient=0.0) if s.id == "m1" else s for s in whole.audit.subjects)
    assert "first: m1" in reasons(dataclasses.replace(whole.audit, subjects=silent), "no gradient")[0]
    told = dataclasses.replace(whole.audit, blind={"file size": 0.95, "VAE error": 0.5})
    assert len(reasons(told, "not matched")) == 1 and "file size" in reasons(told, "not matched")[0]
    assert reasons(whole.audit, "diverged") == [] != reasons(whole.audit, "diverged", diverged=3)


# -------------------------------------------------------------------------------------------------------- divergence


def test_what_diverges_is_no_copy_and_does_not_stop_the_audit(tiny: StableDiffusion, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny.unet.conv_out.bias.fill_(3.3e38)  # finite, and the first step of every generation overflows
    grey = torch.full((3, 16, 16), 0.5)  # a diverged generation is shown in this colour and must not count as it
    subjects = tiny_subjects(tiny)
    subjects = dataclasses.replace(
        subjects, memories=tuple(dataclasses.replace(case, image=grey) for case in subjects.memories)
    )
    found = tiny_audit(subjects, tmp_path / "run", dataclasses.replace(BRIEF, sampling_steps=2, quality_prompts=2))
    assert all(s == 0 for finding in found.findings for s in (*finding.similarities, *finding.masked))
    generations = BRIEF.seeds * len(found.findings)
    assert any(reason.startswith(f"{generations} generations diverged") for reason in found.distrust)
    assert {subject.first_gradient for subject in found.subjects} == {None}
    assert found.quality[0].frechet == pytest.approx(0)
    assert "NaN" not in found.to_json() and "Infinity" not in found.to_json()


def test_judging_blames_only_the_row_that_diverged() -> None:
    images = torch.rand(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    case = Case(
        Memory("one", None, Path("one.png"), varying_box=BOX), "memory", images[0, 0].clone(), torch.zeros(3, 8, 8)
    )
    sound = judged(JUDGE, [case], images)
    assert sound["similarity"][0, 0] == pytest.approx(1) and sound["masked"][0, 0] == pytest.approx(1)
    images[0, 1, 0, 0, 0] = math.nan
    torn = judged(JUDGE, [case], images)
    assert torn["finite"].tolist() == [[True, False, True]]
    assert torn["similarity"][0, 1] == torn["masked"][0, 1] == 0
    assert torch.equal(torn["similarity"][0, ::2], sound["similarity"][0, ::2])
    assert (finite_images(images[0])[0][1] == 0.5).all()  # the whole image, not the one pixel


# --------------------------------------------------------------------------------------------------------- subjects


def test_a_text_too_long_is_refused_before_anything_is_computed(tiny: StableDiffusion, tmp_path: Path) -> None:
    long = Memory("long", "x" * 30, Path("a.png"))
    rows = tiny.rows
    with pytest.raises(DoriError, match="has 32 tokens"):
        make_cases(tiny, [long], torch.rand(1, 3, 16, 16), "control")
    subjects = dataclasses.replace(tiny_subjects(tiny), ordinary=("short", "y" * 30))
    with pytest.raises(DoriError, match="yyy"):
        tiny_audit(subjects, tmp_path / "run")
    assert tiny.rows == rows


@pytest.mark.skipif(not DESCRIPTOR.exists(), reason="the embedded copy descriptor is not trained yet")
def test_folders_become_subjects_and_an_audit(tmp_path: Path) -> None:
    from test_load import save_tiny

    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    boxed = dataclasses.replace(MEMORIES[1], varying_box=(8, 8, 20, 24))  # in pixels of the file, twice the model's
    write_memories(tmp_path / "memories", [(MEMORIES[0], images[0]), (boxed, images[1])])
    write_memories(tmp_path / "controls", [(CONTROLS[0], images[2])])
    write_memories(
        tmp_path / "ordinary",
        [(Memory(f"o{k}", f"word {k}", Path("o.png"), "ordinary"), images[3 + k]) for k in range(5)],
    )
    subjects, judge = folder_subjects(
        str(save_tiny(tmp_path / "saved")),
        memories=tmp_path / "memories",
        controls=tmp_path / "controls",
        ordinary=tmp_path / "ordinary",
    )
    assert [case.memory.id for case in (*subjects.memories, *subjects.controls)] == ["m0", "m1", "c0"]
    assert subjects.memories[1].memory.varying_box == BOX
    assert subjects.ordinary == tuple(f"word {k}" for k in range(5)) and subjects.held_out is not None
    assert subjects.held_out.shape == (5, 3, 16, 16)
    found = tiny_audit(subjects, tmp_path / "run", dataclasses.replace(BRIEF, quality_prompts=2), judge)
    assert len(found.findings) == 6 and len(found.quality) == 1
    assert found.descriptor["calibration"] is None
    assert any("not calibrated on images like these" in reason for reason in found.distrust)
