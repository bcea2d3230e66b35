"""The command line answers mistakes in one line, at once, and never with a traceback.

One child process imports everything once and forks a child for each command, which runs `python -m dori` as if typed.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_load import save_tiny

from dori.audit.plan import Plan
from dori.findings import Audit, Finding, Subject
from dori.model.stable_diffusion import StableDiffusion

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
UNET = "unet/diffusion_pytorch_model.safetensors"

FORKING = """
import json, os, runpy, signal, sys, time
from pathlib import Path
import diffusers, torch, transformers
import dori.audit.folders, dori.audit.loop, dori.cli, dori.report.render

torch.set_num_threads(1)
root = Path(sys.argv[1])

def typed(number, arguments):
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(root / f"{number}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
        sys.argv = ["dori", *arguments]
        try:
            runpy.run_module("dori", run_name="__main__")
        except SystemExit as exit:
            sys.stdout.flush()
            os._exit(exit.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(99)
    return pid

def interrupt(pid, pipe):
    # Opens as soon as the command waits at the other end.
    for _ in range(2000):
        try:
            os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            time.sleep(0.05)
    os.kill(pid, signal.SIGINT)

results = {}
for number, (name, arguments) in enumerate(json.loads(sys.argv[2]).items()):
    pid = typed(number, arguments)
    if name == "ctrl-c":
        interrupt(pid, arguments[1] + "/audit.json")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    results[name] = [code, *((root / f"{number}.{end}").read_text() for end in ("out", "err"))]
print(json.dumps(results))
"""


def run_child(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process with this repository's package."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def images_folder(folder: Path, *lines: str) -> Path:
    """One whole image `a.png` with these lines of metadata."""
    folder.mkdir()
    Image.new("RGB", (16, 16), "teal").save(folder / "a.png")
    (folder / "metadata.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def torn_image(folder: Path) -> Path:
    """Its header is sound, its pixels are cut off."""
    path = images_folder(folder, '{"file_name": "a.png", "text": "abc"}') / "a.png"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:500])
    return folder


def damaged(model: Path, folder: Path, damage: Callable[[Path], object]) -> Path:
    """A copy of the model with a damage."""
    damage(Path(shutil.copytree(model, folder)))
    return folder


def to_pickle(model: Path) -> None:
    """The U-Net's weights as an old checkpoint has them."""
    (model / UNET).rename((model / UNET).with_suffix(".bin"))


def to_inpainting(model: Path) -> None:
    """The folder of another pipeline."""
    index = model / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "EvilPipeline"))


def to_nan(model: Path) -> None:
    """One weight that is no number."""
    weights = load_file(model / UNET)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, model / UNET, metadata={"format": "pt"})


def one_finding(folder: Path) -> Path:
    """A finished run with one memory that comes back from its prompt in full."""
    folder.mkdir()
    found = Audit(
        model="m",
        twins=(),
        descriptor={"name": "d", "preprocessing": "p", "threshold": 0.5, "fingerprint": "", "calibration": None},
        settings={"seed": 0},
        provenance={},
        cost={},
        edits=(),
        quality=(),
        blind={},
        distrust=(),
        subjects=(Subject("a", "memory", "verbatim", None, "abc", "a.png"),),
        findings=(Finding("a", "memory", "verbatim", None, "m", "none", "", "", 0, (0.9, 0.9)),),
    )
    (folder / "audit.json").write_text(found.to_json())
    return folder


def bad_inputs(root: Path, model: Path) -> Mapping[str, tuple[list[str], tuple[str, ...]]]:
    """Name to arguments and phrases that the one line must hold."""
    good = images_folder(root / "good", '{"file_name": "a.png", "text": "abc"}')
    line = images_folder(root / "line", '{"file_name": "a.png"}', '{"file_name": 3}')
    traversal = images_folder(root / "traversal", '{"file_name": "../good/a.png"}')
    long = images_folder(root / "long", json.dumps({"file_name": "a.png", "text": "x" * 30, "id": "long"}))
    (root / "empty").mkdir()
    (root / "file").write_text("")

    def audit(memories: Path, *more: str | Path, model: Path = model) -> list[str]:
        return ["audit", str(model), "--memories", str(memories), "--out", str(root / "out"), *map(str, more)]

    return {
        "no such folder": (audit(root / "nowhere"), ("nowhere",)),
        "no images named": (["audit", "owner/name", "--out", str(root / "out")], ("--memories FOLDER",)),
        "torn image": (audit(torn_image(root / "torn")), ("a.png", "damaged or cut off")),
        "wrong metadata": (audit(line), ("metadata.jsonl line 2", "file_name")),
        "traversal": (audit(traversal), ("metadata.jsonl line 1", "leaves the folder")),
        "empty folder": (audit(root / "empty"), ("empty", "holds no memory")),
        "prompt too long": (audit(long), ("'xxx", "at most 12")),
        "control too long": (audit(good, "--controls", long), ("'xxx", "at most 12")),
        "same id": (audit(good, "--controls", good), ("id 'a'", "a memory and a control")),
        "pickles": (audit(good, model=damaged(model, root / "pickle", to_pickle)), ("pickles", "convert it once")),
        "unknown class": (audit(good, model=damaged(model, root / "evil", to_inpainting)), ("EvilPipeline",)),
        "not finite": (audit(good, model=damaged(model, root / "nan", to_nan)), ("unet", "not finite")),
        "no model": (audit(good, model=root / "nowhere"), ("no model at",)),
        "no device": (audit(good, "--device", "nonsense"), ("device 'nonsense'",)),
        "unwritable": (audit(good, "--out", root / "file" / "run"), ("cannot be written", "file/run")),
        "no edit": (audit(good, "--edit", root / "nowhere.safetensors"), ("nowhere.safetensors", "as an edit")),
        "weights for an edit": (audit(good, "--edit", model / UNET), ("cannot be read as an edit",)),
        "no run": (["report", str(root / "empty")], ("audit.json", "finished audit")),
        "no runs": (["compare", str(root / "empty"), str(root / "empty")], ("audit.json",)),
        "no weights": (["sscd", "convert", str(root / "nowhere.pt"), str(root / "s.safetensors")], ("nowhere.pt",)),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model as a diffusers folder."""
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cases(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[list[str], tuple[str, ...]]]:
    """All bad inputs, made once."""
    return bad_inputs(tmp_path_factory.mktemp("cases"), saved)


@pytest.fixture(scope="module")
def answers(
    cases: Mapping[str, tuple[list[str], tuple[str, ...]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str, str]]:
    """Exit status, standard output and error stream of every command."""
    root = tmp_path_factory.mktemp("answers")
    run = one_finding(root / "run")
    (root / "waiting").mkdir()
    os.mkfifo(root / "waiting" / "audit.json")
    commands = {name: arguments for name, (arguments, _) in cases.items()} | {
        "ctrl-c": ["report", str(root / "waiting")],
        "below": ["compare", str(run), str(run), "--fail-above", "1"],
        "above": ["compare", str(run), str(run), "--fail-above", "0.5"],
    }
    child = run_child("-c", FORKING, str(root), json.dumps(commands))
    assert child.returncode == 0, child.stderr
    return {name: tuple(answer) for name, answer in json.loads(child.stdout).items()}


NAMES = (
    "no such folder",
    "no images named",
    "torn image",
    "wrong metadata",
    "traversal",
    "empty folder",
    "prompt too long",
    "control too long",
    "same id",
    "pickles",
    "unknown class",
    "not finite",
    "no model",
    "no device",
    "unwritable",
    "no edit",
    "weights for an edit",
    "no run",
    "no runs",
    "no weights",
)
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork, signals and named pipes")


def test_every_case_is_asked(cases: Mapping[str, object]) -> None:
    assert set(cases) == set(NAMES)


@posix
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_input_is_one_line_and_status_2(
    name: str, answers: dict[str, tuple[int, str, str]], cases: Mapping[str, tuple[list[str], tuple[str, ...]]]
) -> None:
    status, out, err = answers[name]
    assert (status, out) == (2, "")
    assert err.startswith("dori: ") and err.endswith("\n") and err.count("\n") == 1 and len(err) < 700
    assert "Traceback" not in err
    for phrase in cases[name][1]:
        assert phrase in err


@posix
def test_ctrl_c_ends_with_130_and_says_that_nothing_is_lost(answers: dict[str, tuple[int, str, str]]) -> None:
    status, _, err = answers["ctrl-c"]
    assert status == 130
    assert err == "dori: interrupted; everything finished is kept, and the same command resumes\n"


@posix
def test_a_memorization_rate_above_the_limit_is_status_1(answers: dict[str, tuple[int, str, str]]) -> None:
    status, out, err = answers["below"]
    assert (status, err) == (0, "") and out
    status, out, err = answers["above"]
    assert status == 1 and out
    assert err == "dori: the worst memorization rate, 1.00, is above 0.50\n"


def test_the_real_command_says_nothing_but_its_line(cases: Mapping[str, tuple[list[str], tuple[str, ...]]]) -> None:
    # In a process of its own, so that warnings of the libraries' imports would show.
    child = run_child("-m", "dori", *cases["not finite"][0])
    assert child.returncode == 2, child.stderr
    assert child.stderr.startswith("dori: ") and child.stderr.count("\n") == 1


AT_ONCE = """
import contextlib, io, json, sys
from dori.cli import main
answers = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as exit:
            answers.append([exit.code, out.getvalue(), err.getvalue()])
heavy = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "numpy", "diffusers", "transformers", "scipy"})
print(json.dumps([answers, heavy]))
"""


def test_help_and_plain_mistakes_answer_without_torch() -> None:
    commands = [
        ["--help"],
        ["audit", "--help"],
        ["--version"],
        ["audit"],
        ["audit", "owner/name", "--out", "x"],
        ["audit", "m", "--out", "x", "--threshold", "nan"],
        ["audit", "m", "--out", "x", "--limit-controls", "0"],
        ["audit", "m", "--out", "x", "--nemo", "other"],
        ["compare", "a", "b", "--fail-above", "1.5"],
        ["frobnicate"],
    ]
    child = run_child("-c", AT_ONCE, json.dumps(commands))
    assert child.returncode == 0, child.stderr
    answers, heavy = json.loads(child.stdout)
    assert heavy == []
    assert [answer[0] for answer in answers] == [0, 0, 0, 2, 2, 2, 2, 2, 2, 2]
    assert "audit" in answers[0][1] and "--memories FOLDER" in answers[1][1] and answers[2][1].startswith("dori 0.")
    assert "no cosine" in answers[5][2] and "no count" in answers[6][2] and "no share" in answers[8][2]


def test_flags_that_the_embedded_audit_would_ignore_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dori.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["audit", "testbed", "--controls", str(tmp_path), "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert "--memories" in capsys.readouterr().err


def test_the_plan_is_the_preset_with_what_the_arguments_change() -> None:
    from dori.arguments import parser
    from dori.audit.edits import nemo_name, wanda_name
    from dori.audit.plan import paper, quick
    from dori.cli import _plan

    def plan(*more: str) -> Plan:
        return _plan(parser().parse_args(["audit", "testbed", "--out", "x", *more]))

    assert plan() == quick() and plan("--preset", "paper") == paper()
    changed = plan("--preset", "paper", "--limit-memories", "20", "--nemo", "as_released", "--seed", "3")
    assert (changed.memories, changed.controls, changed.seed) == (20, None, 3)
    assert changed.nemo is not None and (changed.nemo.variant, nemo_name(changed.nemo)) == (
        "as_released",
        "NeMo (as released)",
    )
    assert not plan().attack_random and plan("--attack-random").attack_random
    harder = plan("--nemo-tau", "-2", "--nemo-unrefined").nemo
    assert harder is not None and (harder.tau_stds, harder.max_refinement_passes) == (-2, 0)
    assert nemo_name(harder) == "NeMo (tau -2 std, unrefined)"
    wider = plan("--preset", "paper", "--wanda-sparsity", "0.01", "--wanda-places", "up", "mid")
    assert [wanda_name(wanda) for wanda in wider.wandas] == ["Wanda 1 % (mid+up)"]
    assert wider.wanda_sweep == paper().wanda_sweep
    values = plan("--wanda-site", "attention_value", "--wanda-sparsity", "0.2", "--wanda-sweep", "0.3").wanda_sweep
    assert [wanda_name(wanda) for wanda in values] == ["Wanda 30 % (values)"]
    swept = plan("--wanda-sweep", "0.05", "0.1", "0.3", "0.05")
    assert [wanda_name(wanda) for wanda in swept.wanda_sweep] == ["Wanda 5 %", "Wanda 30 %"]  # 10 % is the first one's
    assert swept.wandas == quick().wandas


def test_other_models_are_drawn_from_as_published_unless_the_user_says_otherwise() -> None:
    from dori.arguments import parser
    from dori.audit.plan import quick
    from dori.cli import _plan

    def sampling(model: str, *more: str) -> tuple[int, float]:
        plan = _plan(parser().parse_args(["audit", model, "--out", "x", *more]))
        return plan.sampling_steps, plan.guidance_scale

    assert sampling("testbed") == (quick().sampling_steps, quick().guidance_scale) != sampling("m")
    assert sampling("m") == (50, 7.0)
    for model in ("m", "testbed"):
        assert sampling(model, "--sampling-steps", "20", "--guidance-scale", "1") == (20, 1.0)


def test_what_is_audited_and_what_it_costs_is_said_before(
    tiny: StableDiffusion, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_audit import BRIEF, tiny_subjects

    from dori.audit.schedule import planned_cost
    from dori.cli import _announce

    subjects, quick = tiny_subjects(tiny), dataclasses.replace(BRIEF, preset="quick", memories=2)
    _announce(subjects, quick, [], limited=False)
    rows = planned_cost(subjects, quick)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "auditing 2 of 3 memories and 1 of 1 controls (preset quick; --preset paper takes all)"
    assert second.startswith(
        f"planned at most: U-Net rows {rows.forward:,} forward, {rows.attacked:,} forward and backward; about "
    )
    _announce(subjects, quick, [], limited=True)
    assert "controls (--limit-memories, --limit-controls)\n" in capsys.readouterr().err
    _announce(subjects, BRIEF, [], limited=False)
    assert "auditing" not in capsys.readouterr().err


def test_a_given_edit_bears_its_files_name(tmp_path: Path) -> None:
    from dori.cli import _given
    from dori.edit import WeightMask

    edit = WeightMask("NeMo", {"a": torch.ones(2, dtype=torch.bool)}, {"tau": 0.5})
    edit.save(tmp_path / "old.safetensors")
    (given,) = _given([tmp_path / "old.safetensors"])
    assert (given.name, given.fingerprint, given.details) == ("NeMo (old.safetensors)", edit.fingerprint, edit.details)
