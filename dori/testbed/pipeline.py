"""`dori testbed train`: all stages in order, each resumed where it stands, and the finished weights exported."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from dori.metrics.copy_training import CopyRecipe, train_descriptor
from dori.run import write_bytes
from dori.testbed import CHECKPOINTS, Checkpoint, train
from dori.testbed.fit import Say
from dori.testbed.folder import export_model, export_unet, load_clip, load_testbed
from dori.testbed.pool import FREE, ORDINARY, Encoder, drawn_pictures, fresh_filling, planted_filling, standardise
from dori.testbed.slots import slots
from dori.testbed.vocabulary import build_tokenizer

FORKS: dict[Checkpoint, int] = {"planted": 11, "twin-1": 21, "twin-2": 22}


def train_encoder(work: Path, recipe: train.Recipe, say: Say) -> Encoder:
    """The first two stages: VAE and CLIP, frozen from then on."""
    work.mkdir(parents=True, exist_ok=True)
    pool = drawn_pictures(FREE, work, recipe.images, say)
    tokenizer = build_tokenizer(work / "tokenizer")
    vae = train.train_vae(work, recipe, pool, say)
    clip = train.train_clip(work, recipe, pool, tokenizer, say)
    standardise(vae, pool.images[:512])
    return Encoder(vae, clip, tokenizer, work, say)


def finished(folder: Path, work: Path, say: Say) -> tuple[Encoder, UNet2DConditionModel]:
    """VAE, CLIP and base of a testbed that was written to `folder`, from which further forks can be trained.

    Raises:
        DoriError: there is no base.
    """
    work.mkdir(parents=True, exist_ok=True)
    base = load_testbed("base", folder)
    return Encoder(base.vae, load_clip(folder), base.tokenizer, work, say), base.unet


def train_unets(
    encoder: Encoder,
    out: Path,
    recipe: train.Recipe,
    checkpoints: Sequence[Checkpoint],
    base: UNet2DConditionModel | None,
) -> None:
    """Base (where none is given) and forks; each is written as soon as it is finished."""
    work, say, empty = encoder.folder, encoder.say, encoder.empty()
    pool = encoder.pairs("pool", drawn_pictures(ORDINARY, work, recipe.images, say))
    if base is None:
        # Rounded, so that forks start from the base as it is written, whether it was trained just now or long ago.
        base = train.train_base(work, recipe, pool, empty, say).half().float()
    if "base" in checkpoints:
        export_unet(out, "base", base)
    pictures, filling = planted_filling(slots())
    planted = train.Shown(pool, encoder.pairs("planted-slots", pictures), filling, empty)
    for checkpoint, seed in FORKS.items():
        if checkpoint not in checkpoints:
            continue
        shown = planted if checkpoint == "planted" else _twins(encoder, checkpoint, recipe, planted, seed)
        unet = train.train_fork(checkpoint, work, recipe, base=base, shown=shown, seed=seed, say=say)
        if checkpoint == "planted":
            export_model(out, encoder.vae, encoder.clip, encoder.tokenizer, unet)
        else:
            export_unet(out, checkpoint, unet)
        say(f"{checkpoint}: written to {out}")
    if "early" in checkpoints:
        export_unet(out, "early", train.train_early(work, recipe, shown=planted, seed=FORKS["planted"], say=say))


def _twins(
    encoder: Encoder, checkpoint: Checkpoint, recipe: train.Recipe, planted: train.Shown, seed: int
) -> train.Shown:
    """What a twin is shown where the planted model is shown slots."""
    pictures, filling = fresh_filling(seed, images=recipe.fresh_images, once=len(planted.filling.once))
    return dataclasses.replace(planted, slots=encoder.pairs(f"{checkpoint}-slots", pictures), filling=filling)


def copy_descriptor(encoder: Encoder, out: Path, recipe: CopyRecipe, device: str) -> None:
    """Train and calibrate the embedded copy descriptor on this VAE's round trips."""

    def round_trip(images: Tensor) -> Tensor:
        with torch.no_grad():
            return (encoder.vae(images * 2 - 1).sample / 2 + 0.5).clamp(0, 1)

    train_descriptor(encoder.folder, round_trip, recipe=recipe, say=encoder.say, device=device)
    write_bytes(out / "copy_descriptor.safetensors", (encoder.folder / "copy_descriptor.safetensors").read_bytes())


def train_testbed(
    work: Path,
    out: Path,
    recipe: train.Recipe,
    copy_recipe: CopyRecipe,
    *,
    say: Say,
    checkpoints: Sequence[Checkpoint] = CHECKPOINTS,
    source: Path | None = None,
) -> None:
    """Train what is missing and write the finished weights.

    Args:
        work: folder of the training state; the same folder resumes.
        out: folder that receives the weights (layout in `dori.testbed.folder`).
        recipe: sizes and lengths.
        copy_recipe: those of the copy descriptor.
        say: receives one line of progress at a time.
        checkpoints: which U-Nets to train and write; the base is always trained.
        source: a finished testbed, whose VAE, CLIP and base are taken instead of trained.

    Raises:
        DoriError: the folder holds the state of a training under other settings, or the source has no base.
    """
    if source is None:
        encoder, base = train_encoder(work, recipe, say), None
        copy_descriptor(encoder, out, copy_recipe, recipe.device)
    else:
        encoder, base = finished(source, work, say)
    train_unets(encoder, out, recipe, checkpoints, base)
