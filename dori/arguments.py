"""The command line's arguments. Light to import: help and mistakes answer at once."""

import argparse
from pathlib import Path

from dori import __version__
from dori.erase import DEFAULT, ERASERS, TABLES
from dori.testbed import CHECKPOINTS

AUDIT_HELP = """\
MODEL is `testbed`, a diffusers folder, a hub id (owner/name) or a single .safetensors file. A FOLDER holds images and
a metadata.jsonl with file_name, text and, if you like, id and kind. A killed audit resumes with the same command."""

ERASE_HELP = """\
MODEL is `testbed`, a diffusers folder, a hub id (owner/name) or a single .safetensors file. Without --memories the
testbed's own memories are erased, judged by its twins. The result is an edit (a change of weights) with a certificate.
A killed erasure resumes with the same command; `torchrun --nproc_per_node N -m dori erase ...` shares it among N
processes."""


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; give a number from 0 to 1")
    return value


def _sparsity(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no sparsity; give a share above 0 and up to 1, such as 0.01")
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


def _guidance(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is no guidance scale; give a number from 1 (none) to 100")
    return value


def _deviations(text: str) -> float:
    value = float(text)
    if not abs(value) <= 100:
        raise argparse.ArgumentTypeError(f"{text} is no number of standard deviations; give one from -100 to 100")
    return value


def _cosine(text: str) -> float:
    value = float(text)
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no cosine; give a number from -1 to 1")
    return value


def parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    whole = argparse.ArgumentParser(
        prog="dori", description="Find, break and remove memorized training images in text-to-image models."
    )
    whole.add_argument("--version", action="version", version=f"dori {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, description: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=description)

    _audit(command("audit", "what of these images is in the model, and what do pruning and DoRI do", AUDIT_HELP))
    _report(command("report", "draw the page of a finished audit or locality run again"))
    _locality(command("locality", "where a memory lives, and whether that differs from chance", AUDIT_HELP))
    _erase(command("erase", "take images out of a model, and prove it", ERASE_HELP))
    _compare(command("compare", "what changed between two runs"))
    _testbed(command("testbed", "the embedded model with planted memories"))
    _sscd(command("sscd", "the SSCD copy descriptor"))
    return whole


def _model_and_images(command: argparse.ArgumentParser, *, memories: str) -> None:
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--memories", type=Path, metavar="FOLDER", help=memories)


def _twins(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--twin",
        action="append",
        default=[],
        metavar="MODEL",
        help="a model like this one that never saw the memories; judges only; may be repeated",
    )


def _running(command: argparse.ArgumentParser, *presets: str) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    command.add_argument("--preset", choices=presets, default=presets[0])
    command.add_argument("--seed", type=int, default=0, help="root of all random streams (default 0)")
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default cpu)")
    command.add_argument(
        "--sampling-steps",
        type=_count,
        metavar="N",
        help="DDIM steps of each generation (default 50, as published; the testbed's are the preset's)",
    )
    command.add_argument(
        "--guidance-scale",
        type=_guidance,
        metavar="SCALE",
        help="classifier-free guidance of each generation (default 7, as published; the testbed's is 3)",
    )


def _judging(command: argparse.ArgumentParser) -> None:
    command.add_argument("--sscd", type=Path, metavar="FILE", help="SSCD weights made by `dori sscd convert`")
    command.add_argument(
        "--sscd-preprocessing", default="skew_320", metavar="NAME", help="skew_320 (default), small_288 or crop_224"
    )
    command.add_argument(
        "--threshold",
        type=_cosine,
        metavar="COSINE",
        help="similarity that counts as a copy (default: the descriptor's)",
    )


def _clip(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--clip",
        type=Path,
        metavar="FOLDER",
        help="a CLIP as transformers saves it, for alignment and quality (the testbed has its own)",
    )


def _shown(command: argparse.ArgumentParser) -> None:
    command.add_argument("--half", action="store_true", help="run the U-Net in half precision")
    command.add_argument("--redact", action="store_true", help="blur the training images")


def _audit(audit: argparse.ArgumentParser) -> None:
    _model_and_images(audit, memories="images believed to be in the model")
    audit.add_argument("--controls", type=Path, metavar="FOLDER", help="images of the same kind that are not in it")
    audit.add_argument("--ordinary", type=Path, metavar="FOLDER", help="ordinary images with texts, for quality")
    _twins(audit)
    _running(audit, "quick", "paper")
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
    audit.add_argument(
        "--nemo-tau",
        type=_deviations,
        metavar="STDS",
        help="NeMo's threshold, in standard deviations above the mean of ordinary prompts (default 1, as published); "
        "a lower one hides more",
    )
    audit.add_argument(
        "--nemo-unrefined",
        action="store_true",
        help="block NeMo's whole selection, without searching it for neurons that may go on",
    )
    _wanda(audit)
    audit.add_argument(
        "--wanda-sweep",
        type=_sparsity,
        nargs="+",
        metavar="SHARE",
        help="further sparsities of Wanda in the same blocks, asked by prompt alone (default the preset's)",
    )
    audit.add_argument(
        "--attack-random",
        action="store_true",
        help="attack the random edits too, which are otherwise asked by prompt alone",
    )
    _clip(audit)
    _judging(audit)
    _shown(audit)
    audit.add_argument("--fail-above", type=_share, metavar="MR", help="exit with 1 if any MR of memories is higher")


def _report(report: argparse.ArgumentParser) -> None:
    report.add_argument("run", type=Path, metavar="RUN")
    report.add_argument("--redact", action="store_true", help="blur the training images")
    report.add_argument("--strip", type=Path, metavar="PNG", help="write a picture of a few memories of an audit too")
    report.add_argument("--curves", type=Path, metavar="PNG", help="write a picture of an audit's attack curves too")
    report.add_argument("--table", type=Path, metavar="MD", help="write an audit's tables as Markdown too")


def _wanda(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wanda-sparsity",
        type=_sparsity,
        metavar="SHARE",
        help="weights of each row that Wanda takes at most, as a share (default 0.1)",
    )
    parser.add_argument(
        "--wanda-places",
        nargs="+",
        choices=("down", "mid", "up"),
        metavar="PLACE",
        help="its blocks (default down mid)",
    )
    parser.add_argument(
        "--wanda-site",
        choices=("feed_forward", "attention_value"),
        help="its layers: the feed-forwards' second linears as published (default), or the value projections",
    )


def _locality(locality: argparse.ArgumentParser) -> None:
    _model_and_images(locality, memories="images believed to be in the model")
    locality.add_argument("--ordinary", type=Path, metavar="FOLDER", help="ordinary images with texts, for reference")
    _twins(locality)
    _running(locality, "quick", "full")
    locality.add_argument("--limit", type=_count, metavar="N", help="at most so many memories (default the preset's)")
    locality.add_argument(
        "--attacks",
        type=_count,
        metavar="N",
        help="attacks of each memory from noise, and as many from other prompts (default the preset's)",
    )
    locality.add_argument(
        "--patch-seeds",
        type=_count,
        metavar="N",
        help="generation seeds of patching and of exchanged weights, which need a twin (default: quick none, full 4)",
    )
    _wanda(locality)
    _judging(locality)
    _shown(locality)
    locality.set_defaults(controls=None, clip=None)


def _erase(erase: argparse.ArgumentParser) -> None:
    _model_and_images(erase, memories="images to erase")
    erase.add_argument("--retain", type=Path, metavar="FOLDER", help="ordinary images with texts")
    erase.add_argument("--controls", type=Path, metavar="FOLDER", help="images of the same kind that are not in it")
    _twins(erase)
    erase.add_argument(
        "--base",
        metavar="MODEL",
        help="the model from which MODEL and its twins were trained, before the memories: how far a twin went from it "
        "is a scale of damage",
    )
    _running(erase, "quick", "full")
    _clip(erase)
    _judging(erase)
    erase.add_argument("--eraser", choices=ERASERS, default=DEFAULT)
    _tables(erase)
    erase.add_argument(
        "--split",
        choices=("all", "tune", "test"),
        default="all",
        help="every other memory, to tune settings on or to test them (default all)",
    )
    erase.add_argument("--limit", type=_count, metavar="N", help="at most so many memories and as many controls")
    erase.add_argument(
        "--budget",
        type=_count,
        metavar="ROWS",
        help="end an adversarial erasure after the round in which its U-Net rows pass this (default: all its rounds)",
    )
    erase.add_argument(
        "--rate-scale",
        type=_factor,
        metavar="X",
        help="factor on all learning rates, which are those published for Stable Diffusion (default 1; 20 for the "
        "testbed)",
    )
    erase.add_argument(
        "--lora-relearning",
        action="store_true",
        help="relearn the images a second time, through a LoRA, against which no eraser trains (the full preset always "
        "does)",
    )
    erase.add_argument(
        "--save-model",
        type=Path,
        metavar="PATH",
        help="write the erased model too: a folder, or a .safetensors file if MODEL is one",
    )


def _tables(erase: argparse.ArgumentParser) -> None:
    erase.add_argument(
        "--table",
        choices=TABLES,
        help="instead of one erasure: every eraser, every arm of the ablation, or the frontier of removal against "
        "damage, under every attack",
    )
    erase.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="NAME",
        help="make only this row of the table; repeat it for several, which are made in this order",
    )
    erase.add_argument(
        "--take",
        action="append",
        type=Path,
        default=[],
        metavar="TABLE.JSON",
        help="take the rows of this table, made elsewhere of the same images by the same settings, instead of making "
        "them; repeatable",
    )


def _compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("before", type=Path, metavar="RUN")
    compare.add_argument("after", type=Path, metavar="RUN")
    compare.add_argument(
        "--fail-above", type=_share, metavar="MR", help="exit with 1 if the second run's worst MR is higher"
    )


def _testbed(testbed: argparse.ArgumentParser) -> None:
    verbs = testbed.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser("train", help="train it again from nothing; resumes after a kill")
    train.add_argument("--work", type=Path, default=Path("runs/testbed"), metavar="DIR", help="training state")
    train.add_argument("--out", type=Path, metavar="DIR", help="where the weights go (default: the package's data)")
    train.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        help="take VAE, CLIP and base from this testbed, as --out holds one, and train its forks alone",
    )
    train.add_argument(
        "--only",
        nargs="+",
        choices=CHECKPOINTS,
        default=CHECKPOINTS,
        help="which U-Nets to train and write (default: all)",
    )
    train.add_argument("--device", default="cpu", help="where the networks are trained (default cpu)")
    verify = verbs.add_parser("verify", help="measure what the testbed promises")
    verify.add_argument("--out", type=Path, default=Path("runs/verify"), metavar="DIR")
    export = verbs.add_parser("export", help="write its memories, controls and ordinary images as folders")
    export.add_argument("out", type=Path, metavar="DIR")


def _sscd(sscd: argparse.ArgumentParser) -> None:
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
