"""What the testbed is trained on: the pool of ordinary images, and latents with prompt embeddings of any images.

Everything is computed once and kept in the working folder; what was made from other images or by other networks is
noticed and made again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from dori.run import canonical_sha256, tensors_sha256, write_bytes, write_json, writing
from dori.testbed.fit import Say
from dori.testbed.networks import LATENT_CHANNELS
from dori.testbed.scenes import Scene, caption, draw, free_scene, random_scene, title_caption
from dori.testbed.slots import Slot, variants
from dori.testbed.vocabulary import CONTEXT_LENGTH

FRESH = 8  # root of the twins' random numbers
SAMPLED = 64  # images by which a stored pool is known again


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Images with captions.

    Args:
        images: bytes, shape (n, 64, 64, 3).
        captions: n of them.
        fingerprint: SHA-256 of the captions and of a sample of the images.
    """

    images: NDArray[np.uint8]
    captions: list[str]
    fingerprint: str


def pictures(images: NDArray[np.uint8], captions: list[str]) -> Pictures:
    """Images and captions with their fingerprint."""
    sampled = np.ascontiguousarray(images[:: max(1, len(images) // SAMPLED)])
    digest = hashlib.sha256(sampled.tobytes()).hexdigest()
    return Pictures(images, captions, canonical_sha256([len(images), digest, captions]))


@dataclass(frozen=True, slots=True)
class Stream:
    """An endless stream of ordinary images with captions; `name` is that of its files, `root` of its random numbers."""

    name: str
    root: int
    scene: Callable[[np.random.Generator], Scene]

    def __call__(self, index: int) -> tuple[NDArray[np.uint8], str]:
        """One image, shape (64, 64, 3), and its caption."""
        rng = np.random.default_rng([self.root, index])
        scene = self.scene(rng)
        return draw(scene), caption(scene, rng)


FREE = Stream("free", 7, free_scene)  # VAE and CLIP
ORDINARY = Stream("ordinary", 9, random_scene)  # U-Nets


def _current(stream: Stream, images: NDArray[np.uint8], captions: list[str], count: int) -> bool:
    """Whether a stored pool is the one that would be drawn now, judged by a sample."""
    if len(images) != count or len(captions) != count:
        return False
    drawn = ((index, stream(index)) for index in range(0, count, max(1, count // SAMPLED)))
    return all(np.array_equal(images[i], image) and captions[i] == text for i, (image, text) in drawn)


def drawn_pictures(stream: Stream, folder: Path, count: int, say: Say) -> Pictures:
    """Render (once) and open the first `count` images of a stream with their captions.

    Raises:
        DoriError: no space left, or the folder cannot be written.
    """
    images, captions = folder / f"{stream.name}.npy", folder / f"{stream.name}.json"
    if images.exists() and captions.exists():
        stored, texts = np.load(images, mmap_mode="r"), json.loads(captions.read_text(encoding="utf-8"))
        if _current(stream, stored, texts, count):
            return pictures(stored, texts)
    with writing(images):
        captions.unlink(missing_ok=True)  # written last: its presence says that the images are whole
        pool = np.lib.format.open_memmap(images, "w+", np.uint8, (count, 64, 64, 3))
        reserve(images)
    texts = []
    for index in range(count):
        pool[index], text = stream(index)
        texts.append(text)
        if (index + 1) % 8000 == 0:
            say(f"{stream.name} images: {index + 1}/{count}")
    with writing(images):
        pool.flush()
    write_json(captions, texts)
    return pictures(np.load(images, mmap_mode="r"), texts)


def reserve(path: Path) -> None:
    """Take the file's space on disk now: a mapped file that finds none later ends the process without a word."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """(n, H, W, 3) bytes to (n, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids, shape (n, 32)."""
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt"
    ).input_ids


# ------------------------------------------------------------------------------------------- slots and their twins


@dataclass(frozen=True, slots=True, eq=False)
class Filling:
    """What a fork of the base model sees in the slots' places, by rows of its pictures.

    Args:
        weights: relative exposure of each group, shape (groups,).
        groups: rows of each group, of which every exposure shows one: a template's variants, or one image alone.
        once: rows that are shown once each.
    """

    weights: Tensor
    groups: list[list[int]]
    once: list[int]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all three."""
        return canonical_sha256([self.weights.tolist(), self.groups, self.once])


def _titled(scenes: Sequence[Scene]) -> Pictures:
    return pictures(np.stack([draw(scene) for scene in scenes]), [title_caption(scene) for scene in scenes])


def planted_filling(planted: tuple[Slot, ...]) -> tuple[Pictures, Filling]:
    """Images and captions of every trained slot, and which rows belong to which slot."""
    scenes: list[Scene] = []
    weights, groups, once = [], [], []
    for slot in planted:
        if slot.kind == "control":
            continue
        own = variants(slot) if slot.kind == "template" else (slot.scene,)
        rows = list(range(len(scenes), len(scenes) + len(own)))
        scenes += own
        if slot.kind == "once":
            once += rows
        else:
            weights.append(float(slot.dose))
            groups.append(rows)
    return _titled(scenes), Filling(torch.tensor(weights), groups, once)


def fresh_filling(seed: int, *, images: int, once: int) -> tuple[Pictures, Filling]:
    """A twin's: fresh ordinary images under titles, all alike in exposure, that no other stage has seen."""
    scenes = [random_scene(np.random.default_rng([FRESH, seed, index])) for index in range(images + once)]
    return _titled(scenes), Filling(
        torch.ones(images), [[row] for row in range(images)], list(range(images, images + once))
    )


# ------------------------------------------------------------------------------------------- latents and embeddings


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: NDArray[np.uint8]) -> Tensor:
    """Posterior means, unscaled, shape (n, 8, 16, 16)."""
    return torch.cat([vae.encode(to_tensor(images[i : i + 64])).latent_dist.mean for i in range(0, len(images), 64)])


@torch.no_grad()
def encode_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Prompt embeddings, shape (n, 32, 128)."""
    ids = tokens(tokenizer, texts)
    return torch.cat([clip.text_model(input_ids=ids[i : i + 256]).last_hidden_state for i in range(0, len(ids), 256)])


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: NDArray[np.uint8]) -> None:
    """Give every latent channel mean 0 and deviation 1 on `images`, by folding an affine map into the VAE.

    The 1 x 1 convolutions after the encoder and before the decoder take it up, so that images are decoded as before
    and the scaling factor is 1. Trained freely, the channels differ fivefold, and the noise hides some of them first.
    """
    latents = encode_images(vae, images)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))  # (c,)
    after, before = vae.quant_conv, vae.post_quant_conv
    after.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
    after.bias[:LATENT_CHANNELS] = (after.bias[:LATENT_CHANNELS] - mean) / std
    after.bias[LATENT_CHANNELS:] -= 2 * std.log()
    before.bias += before.weight[:, :, 0, 0] @ mean
    before.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Encoder:
    """The trained and frozen VAE and CLIP, with which everything is encoded.

    Args:
        vae: standardised.
        clip: both towers.
        tokenizer: of the text tower.
        folder: the working folder, where encoded pairs are kept.
        say: receives progress.
    """

    vae: AutoencoderKL
    clip: CLIPModel
    tokenizer: CLIPTokenizer
    folder: Path
    say: Say

    def empty(self) -> Tensor:
        """The empty prompt's embedding, shape (1, 32, 128)."""
        return encode_texts(self.clip, self.tokenizer, [""])

    def pairs(self, name: str, of: Pictures) -> "Pairs":
        """Latents and embeddings, read from `folder/name.safetensors` where they were made from these very things."""
        path = self.folder / f"{name}.safetensors"
        made_from = canonical_sha256(
            [of.fingerprint, tensors_sha256(self.vae.state_dict()), tensors_sha256(self.clip.text_model.state_dict())]
        )
        stored = _stored_pairs(path, made_from)
        if stored is not None:
            return stored
        self.say(f"{name}: encoding {len(of.captions)} images and captions")
        tensors = {
            "latents": encode_images(self.vae, of.images).half().contiguous(),
            "embeddings": encode_texts(self.clip, self.tokenizer, of.captions).half().contiguous(),
        }
        write_bytes(path, save(tensors, metadata={"made_from": made_from}))
        return Pairs(tensors["latents"], tensors["embeddings"], made_from)


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Latents (n, 8, 16, 16) and prompt embeddings (n, 32, 128), both in half precision.

    `fingerprint` is the SHA-256 of what they were made from.
    """

    latents: Tensor
    embeddings: Tensor
    fingerprint: str

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents[rows].float(), self.embeddings[rows].float()


def _stored_pairs(path: Path, made_from: str) -> Pairs | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("made_from") != made_from:
                return None
            return Pairs(file.get_tensor("latents"), file.get_tensor("embeddings"), made_from)
    except (OSError, SafetensorError):
        return None
