"""The command line: arguments to dataclasses, one call, one line. The only file that prints.

Nothing heavy is imported before the arguments are read, so that help and mistakes answer at once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dori import __version__
from dori.errors import DoriError

if TYPE_CHECKING:
    from dori.audit.judge import Judge
    from dori.audit.loop import Subjects
    from dori.audit.plan import Plan
    from dori.edit import Edit

AUDIT_HELP = """\
MODEL is `testbed`, a diffusers folder, a hub id (owner/name) or a single .safetensors file. A FOLDER holds images and
a metadata.jsonl with file_name, text and, if you like, id and kind. A killed audit resumes with the same command."""

ERASE_HELP = """\
MODEL is `testbed`, a diffusers folder, a hub id (owner/name) or a single .safetensors file. Without --memories the
testbed's own memories are erased, judged by its twins. The result is an edit (a change of weights) with a certificate.
A killed erasure resumes with the same command; `accelerate launch -m dori erase ...` spreads it over processes."""


def say(line: str) -> None:
    """Progress goes to the error stream; results go to standard output."""
    print(line, file=sys.stderr, flush=True)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; give a number from 0 to 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count; give a whole number from 1")
    return value


def _factor(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no factor; give a number above 0")
    return value


def _cosine(text: str) -> float:
    value = float(text)
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no cosine; give a number from -1 to 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dori", description="Find, break and remove memorized training images in text-to-image models."
    )
    parser.add_argument("--version", action="version", version=f"dori {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    audit = commands.add_parser(
        "audit", help="what of these images is in the model, and what do pruning and DoRI do", description=AUDIT_HELP
    )
    audit.add_argument("model", metavar="MODEL")
    audit.add_argument("--memories", type=Path, metavar="FOLDER", help="images believed to be in the model")
    audit.add_argument("--controls", type=Path, metavar="FOLDER", help="images of the same kind that are not in it")
    audit.add_argument("--ordinary", type=Path, metavar="FOLDER", help="ordinary images with texts, for quality")
    audit.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    audit.add_argument("--preset", choices=("quick", "paper"), default="quick")
    for group in ("memories", "controls"):
        audit.add_argument(
            f"--limit-{group}",
            type=_count,
            metavar="N",
            help=f"audit at most so many {group}, spread over all (default: the preset's)",
        )
    audit.add_argument(
        "--edit",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="audit under this edit too, a file that Dori wrote; may be repeated",
    )
    audit.add_argument("--nemo", choices=("paper", "as_released"), default="paper", help="NeMo's variant")
    audit.add_argument("--seed", type=int, default=0, help="root of all random streams (default 0)")
    audit.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default cpu)")
    audit.add_argument("--half", action="store_true", help="run the U-Net in half precision")
    audit.add_argument(
        "--clip",
        type=Path,
        metavar="FOLDER",
        help="a CLIP as transformers saves it, for alignment and quality (the testbed has its own)",
    )
    audit.add_argument("--sscd", type=Path, metavar="FILE", help="SSCD weights made by `dori sscd convert`")
    audit.add_argument(
        "--sscd-preprocessing", default="skew_320", metavar="NAME", help="skew_320 (default), small_288 or crop_224"
    )
    audit.add_argument(
        "--threshold",
        type=_cosine,
        metavar="COSINE",
        help="similarity that counts as a copy (default: the descriptor's)",
    )
    audit.add_argument("--redact", action="store_true", help="blur the training images in the report")
    audit.add_argument("--fail-above", type=_share, metavar="MR", help="exit with 1 if any MR of memories is higher")

    report = commands.add_parser("report", help="draw the report of a finished run again")
    report.add_argument("run", type=Path, metavar="RUN")
    report.add_argument("--redact", action="store_true", help="blur the training images")

    locality = commands.add_parser(
        "locality", help="where a memory lives, and whether that differs from chance", description=AUDIT_HELP
    )
    locality.add_argument("model", metavar="MODEL")
    locality.add_argument("--memories", type=Path, metavar="FOLDER", help="images believed to be in the model")
    locality.add_argument("--ordinary", type=Path, metavar="FOLDER", help="ordinary images with texts, for reference")
    locality.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    locality.add_argument("--preset", choices=("quick", "full"), default="quick")
    locality.add_argument("--seed", type=int, default=0, help="root of all random streams (default 0)")
    locality.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default cpu)")
    locality.add_argument("--half", action="store_true", help="run the U-Net in half precision")
    locality.add_argument("--sscd", type=Path, metavar="FILE", help="SSCD weights made by `dori sscd convert`")
    locality.add_argument(
        "--sscd-preprocessing", default="skew_320", metavar="NAME", help="skew_320 (default), small_288 or crop_224"
    )
    locality.add_argument(
        "--threshold",
        type=_cosine,
        metavar="COSINE",
        help="similarity that counts as a copy (default: the descriptor's)",
    )
    locality.add_argument("--redact", action="store_true", help="blur the training images on the page")
    locality.set_defaults(controls=None, clip=None)

    _add_erase(commands)

    compare = commands.add_parser("compare", help="what changed between two runs")
    compare.add_argument("before", type=Path, metavar="RUN")
    compare.add_argument("after", type=Path, metavar="RUN")
    compare.add_argument(
        "--fail-above", type=_share, metavar="MR", help="exit with 1 if the second run's worst MR is higher"
    )

    testbed = commands.add_parser("testbed", help="the embedded model with planted memories")
    verbs = testbed.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser("train", help="train it again from nothing; resumes after a kill")
    train.add_argument("--work", type=Path, default=Path("runs/testbed"), metavar="DIR", help="training state")
    train.add_argument("--out", type=Path, metavar="DIR", help="where the weights go (default: the package's data)")
    verify = verbs.add_parser("verify", help="measure what the testbed promises")
    verify.add_argument("--out", type=Path, default=Path("runs/verify"), metavar="DIR")
    export = verbs.add_parser("export", help="write its memories, controls and ordinary images as folders")
    export.add_argument("out", type=Path, metavar="DIR")

    sscd = commands.add_parser("sscd", help="the SSCD copy descriptor")
    convert = sscd.add_subparsers(dest="verb", required=True, metavar="VERB").add_parser(
        "convert", help="convert a state dict of the published weights into safetensors, once"
    )
    convert.add_argument("source", type=Path, metavar="FILE.pt")
    convert.add_argument("target", type=Path, metavar="FILE.safetensors")
    convert.add_argument(
        "--name",
        metavar="NAME",
        help="which weights these are, such as sscd_disc_mixup or sscd_disc_blur (default: the file's name)",
    )
    return parser


def _add_erase(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The arguments of `dori erase`."""
    from dori.erase import ERASERS

    erase = commands.add_parser("erase", help="take images out of a model, and prove it", description=ERASE_HELP)
    erase.add_argument("model", metavar="MODEL")
    erase.add_argument("--memories", type=Path, metavar="FOLDER", help="images to erase")
    erase.add_argument("--retain", type=Path, metavar="FOLDER", help="ordinary images with texts")
    erase.add_argument("--controls", type=Path, metavar="FOLDER", help="images of the same kind that are not in it")
    erase.add_argument(
        "--twin",
        action="append",
        default=[],
        metavar="MODEL",
        help="a model like this one that never saw the memories; judges only; may be repeated",
    )
    erase.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    erase.add_argument("--preset", choices=("quick", "full"), default="quick")
    erase.add_argument("--eraser", choices=ERASERS, default="adversarial")
    erase.add_argument(
        "--table",
        choices=("erasers", "ablations"),
        help="instead of one erasure: every eraser, or every arm of the ablation, under every attack",
    )
    erase.add_argument(
        "--split",
        choices=("all", "tune", "test"),
        default="all",
        help="every other memory, to tune settings on or to test them (default all)",
    )
    erase.add_argument("--limit", type=_count, metavar="N", help="at most so many memories and as many controls")
    erase.add_argument(
        "--rate-scale",
        type=_factor,
        metavar="X",
        help="factor on all learning rates, which are those "
        "published for Stable Diffusion (default 1; 20 for the testbed)",
    )
    erase.add_argument("--seed", type=int, default=0, help="root of all random streams (default 0)")
    erase.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default cpu)")
    erase.add_argument(
        "--save-model",
        type=Path,
        metavar="PATH",
        help="write the erased model too: a folder, or a .safetensors file if MODEL is one",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exit 0, 1 (a limit was exceeded) or 2 (bad input)."""
    arguments = _parser().parse_args(argv)
    commands = {
        "audit": _audit,
        "report": _report,
        "compare": _compare,
        "locality": _locality,
        "erase": _erase,
        "testbed": _testbed,
        "sscd": _sscd,
    }
    try:
        status = commands[arguments.command](arguments)
    except DoriError as error:
        say(f"dori: {error}")
        status = 2
    except KeyboardInterrupt:
        say("dori: interrupted; everything finished is kept, and the same command resumes")
        status = 130
    sys.exit(status)


def _quiet() -> None:
    """Progress bars and advice of the libraries would bury ours."""
    import diffusers
    import torch
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_flush_denormal(True)


def _audit(arguments: argparse.Namespace) -> int:
    if arguments.memories is None:
        if arguments.model != "testbed":
            raise DoriError("an audit needs images to look for; give --memories FOLDER")
        if arguments.controls or arguments.ordinary or arguments.half or arguments.device != "cpu":
            raise DoriError(
                "without --memories the testbed is audited on its own images, in float32 on the CPU; leave "
                "out --controls, --ordinary, --device and --half, or give --memories FOLDER"
            )
    _quiet()  # first: some advice comes while the libraries are imported
    from dori.audit.loop import audit
    from dori.compare import worst_mr
    from dori.report.render import render
    from dori.run import Run, write_text

    plan, given = _plan(arguments), _given(arguments.edit)
    run = Run(arguments.out, say=say)
    with run.locked():
        subjects, judge = _audited(arguments, plan)
        _announce(
            subjects,
            plan,
            [edit.name for edit in given],
            limited=bool(arguments.limit_memories or arguments.limit_controls),
        )
        found = audit(subjects, plan=plan, judge=judge, run=run, given=given, say=say)
        write_text(arguments.out / "audit.json", found.to_json())
        write_text(arguments.out / "report.html", render(found, arguments.out, redact=arguments.redact))
    print(f"report: {arguments.out / 'report.html'}")
    return _over(worst_mr(found), arguments.fail_above)


def _plan(arguments: argparse.Namespace) -> "Plan":
    """The preset with what the arguments change."""
    import dataclasses

    from dori.audit.plan import PRESETS

    plan = PRESETS[arguments.preset]()
    nemo = None if plan.nemo is None else dataclasses.replace(plan.nemo, variant=arguments.nemo)
    return dataclasses.replace(
        plan,
        seed=arguments.seed,
        nemo=nemo,
        memories=arguments.limit_memories or plan.memories,
        controls=arguments.limit_controls or plan.controls,
    )


def _given(files: Sequence[Path]) -> "list[Edit]":
    """Edits from files; the file stands in the name, so that it is not taken for one that this audit computes."""
    import dataclasses

    from dori.edit import load_edit

    loaded = [(path, load_edit(path)) for path in files]
    return [dataclasses.replace(edit, name=f"{edit.name} ({path.name})") for path, edit in loaded]


def _announce(subjects: "Subjects", plan: "Plan", given: Sequence[str], *, limited: bool) -> None:
    """Which part of the images is audited, and what it will cost."""
    from dori.audit.schedule import ATTACK, audited, planned_rows, planned_seconds, speed
    from dori.progress import duration

    some = audited(subjects, plan)
    pairs = [(some.memories, subjects.memories, "memories"), (some.controls, subjects.controls, "controls")]
    if any(len(part) < len(every) for part, every, _ in pairs):
        why = "--limit-memories, --limit-controls" if limited else f"preset {plan.preset}; --preset paper takes all"
        counts = " and ".join(f"{len(part)} of {len(every)} {name}" for part, every, name in pairs)
        say(f"auditing {counts} ({why})")
    rows = planned_rows(subjects, plan, given)
    forward, both = speed(subjects.model)
    say(
        f"planned: {sum(rows.values()) - rows[ATTACK]:,} U-Net rows forward and {rows[ATTACK]:,} forward and backward, "
        f"about {duration(planned_seconds(rows, forward=forward, both=both))} on this machine without what is stored"
    )


def _over(rate: float, limit: float | None) -> int:
    if limit is None or rate <= limit:
        return 0
    say(f"dori: the worst memorization rate, {rate:.2f}, is above {limit:.2f}")
    return 1


def _audited(arguments: argparse.Namespace, plan: "Plan") -> "tuple[Subjects, Judge]":
    """The model, the images and the judge that the arguments name."""
    import dataclasses

    if arguments.model == "testbed" and arguments.memories is None:
        from dori.testbed.subjects import testbed_judge, testbed_subjects

        subjects, judge = testbed_subjects(plan), testbed_judge()
    else:
        from dori.audit.folders import folder_subjects

        subjects, judge = folder_subjects(
            arguments.model,
            memories=arguments.memories,
            controls=arguments.controls,
            ordinary=arguments.ordinary,
            device=arguments.device,
            half=arguments.half,
        )
    if arguments.clip is not None:
        from dori.audit.folders import load_clip

        judge = load_clip(judge, arguments.clip, device=arguments.device)
    if arguments.sscd is not None:
        from dori.metrics.sscd import load_sscd

        judge = dataclasses.replace(
            judge,
            descriptor=load_sscd(arguments.sscd, preprocessing=arguments.sscd_preprocessing, device=arguments.device),
        )
    if arguments.threshold is not None:
        judge = dataclasses.replace(
            judge, descriptor=dataclasses.replace(judge.descriptor, threshold=arguments.threshold, calibration=None)
        )
    return subjects, judge


def _locality(arguments: argparse.Namespace) -> int:
    if arguments.memories is None:
        if arguments.model != "testbed":
            raise DoriError("locality needs images to look for; give --memories FOLDER")
        if arguments.ordinary or arguments.half or arguments.device != "cpu":
            raise DoriError(
                "without --memories the testbed is analysed with its own images, in float32 on the CPU; "
                "leave out --ordinary, --device and --half, or give --memories FOLDER"
            )
    _quiet()
    import dataclasses

    from dori.locality.costs import forecast
    from dori.locality.loop import costs, locality
    from dori.locality.page.render import render
    from dori.locality.plan import PRESETS
    from dori.locality.records import Locality
    from dori.locality.subjects import choose_sets
    from dori.run import Run, write_text

    def write(found: Locality) -> None:
        write_text(arguments.out / "locality.json", found.to_json())
        write_text(arguments.out / "locality.html", render(found, arguments.out, redact=arguments.redact))

    plan = dataclasses.replace(PRESETS[arguments.preset](), seed=arguments.seed)
    run = Run(arguments.out, say=say)
    with run.locked():
        subjects, judge = _audited(arguments, plan.judging())
        say(forecast(costs(subjects, plan, choose_sets(subjects, plan))))
        write(locality(subjects, plan=plan, judge=judge, run=run, say=say, after_memory=write))
    print(f"page: {arguments.out / 'locality.html'}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from dori.findings import read_audit
    from dori.report.render import render
    from dori.run import write_text

    target = arguments.run / "report.html"
    write_text(target, render(read_audit(arguments.run / "audit.json"), arguments.run, redact=arguments.redact))
    print(f"report: {target}")
    return 0


def _erase(arguments: argparse.Namespace) -> int:
    _quiet()
    from dori.erase.command import Request, erase

    lines = erase(
        Request(
            arguments.model,
            arguments.out,
            memories=arguments.memories,
            retain=arguments.retain,
            controls=arguments.controls,
            twins=tuple(arguments.twin),
            preset=arguments.preset,
            eraser=arguments.eraser,
            table=arguments.table,
            split=arguments.split,
            limit=arguments.limit,
            rate_scale=arguments.rate_scale,
            seed=arguments.seed,
            device=arguments.device,
            save_model=arguments.save_model,
        ),
        say,
    )
    for line in lines:
        print(line)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from dori.compare import compare, to_text, worst_mr
    from dori.findings import read_audit

    before, after = (read_audit(folder / "audit.json") for folder in (arguments.before, arguments.after))
    print(to_text(compare(before, after)))
    return _over(worst_mr(after), arguments.fail_above)


def _testbed(arguments: argparse.Namespace) -> int:
    _quiet()
    if arguments.verb == "export":
        from dori.testbed.subjects import export_folders

        export_folders(arguments.out)
        print(f"memories, controls and ordinary images: {arguments.out}")
        return 0
    if arguments.verb == "verify":
        from dori.run import Run, write_json
        from dori.testbed.verify import to_text, verify

        run = Run(arguments.out, say=say)
        with run.locked():
            rows = verify(run)
            write_json(arguments.out / "verify.json", rows)
        print(to_text(rows))
        return 0 if all(row["reached"] for row in rows) else 1
    from dori.metrics.copy_training import CopyRecipe
    from dori.testbed.folder import DATA
    from dori.testbed.pipeline import train_testbed
    from dori.testbed.train import Recipe

    train_testbed(arguments.work, arguments.out or DATA, Recipe(), CopyRecipe(), say=say)
    return 0


def _sscd(arguments: argparse.Namespace) -> int:
    from dori.metrics.sscd import convert

    print(f"sha256 {convert(arguments.source, arguments.target, name=arguments.name)}  {arguments.target}")
    return 0
