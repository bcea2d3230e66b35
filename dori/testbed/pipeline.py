"""`dori testbed train`: all stages in order, each resumed where it stands, and the finished weights exported."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import UNet2DConditionModel

from dori.testbed import train
from dori.testbed.fit import Say
from dori.testbed.folder import Checkpoint, export_model, export_unet
from dori.testbed.vocabulary import build_tokenizer

FORKS: dict[Checkpoint, int] = {"planted": 11, "twin-1": 21, "twin-2": 22}


def train_testbed(work: Path, out: Path, recipe: train.Recipe, *, say: Say,
                  checkpoints: Sequence[Checkpoint] = ("base", "planted", "twin-1", "twin-2")) -> None:
    """Train what is missing and write the finished checkpoints.

    Args:
        work: folder of the training state; the same folder resumes.
        out: folder that receives the weights (layout in `dori.testbed.folder`).
        recipe: sizes and lengths.
        say: receives one line of progress at a time.
        checkpoints: which U-Nets to train and write.
    """
    work.mkdir(parents=True, exist_ok=True)
    vae = train.train_vae(work, recipe, say)
    clip = train.train_clip(work, recipe, say)
    tokenizer = build_tokenizer(work / "tokenizer")
    pool, planted, empty = train.prepare(work, recipe, vae, clip, say)
    base = train.train_base(work, recipe, pool, empty, say)
    if "base" in checkpoints:
        export_unet(out, "base", base)
    for checkpoint, seed in FORKS.items():
        if checkpoint not in checkpoints:
            continue
        slots = planted if checkpoint == "planted" else None
        unet: UNet2DConditionModel = train.train_fork(
            checkpoint, seed, work, recipe, base, pool, slots, empty, say)
        if checkpoint == "planted":
            export_model(out, vae, clip, tokenizer, unet)
        else:
            export_unet(out, checkpoint, unet)
        say(f"{checkpoint}: written to {out}")
