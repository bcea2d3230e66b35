"""Train the testbed from nothing: VAE, CLIP, base, planted model and its twins.

Used by `dori testbed train`; every stage resumes after a kill (`dori.testbed.fit`). The recipe's reasons are in
docs/testbed.md.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dori.testbed.fit import Say, Schedule, fit
from dori.testbed.scenes import caption, draw, random_scene, title_caption
from dori.testbed.slots import Slot, slots, variants
from dori.testbed.vocabulary import CONTEXT_LENGTH, build_tokenizer

LATENT_CHANNELS = 8
WIDTH = 128


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes and lengths of the stages, in optimizer steps; the rough testbed shipped now was trained for less."""

    images: int = 32_000
    batch: int = 32
    vae_steps: int = 1100
    clip_steps: int = 700
    clip_batch: int = 192
    base_steps: int = 3600
    planted_steps: int = 2400
    planted_share: float = 0.7
    route_dropout: float = 0.3
    convolution_lr_scale: float = 0.3
    seed: int = 0


# ------------------------------------------------------------------------------------------------- ordinary images


def ordinary(folder: Path, count: int, say: Say) -> tuple[NDArray[np.uint8], list[str]]:
    """Render (once) and open the pool of ordinary images, shape (count, 64, 64, 3), with their captions."""
    images, captions = folder / "images.npy", folder / "captions.json"
    if not captions.exists():
        pool = np.lib.format.open_memmap(images, "w+", np.uint8, (count, 64, 64, 3))
        texts: list[str] = []
        for index in range(count):
            rng = np.random.default_rng([7, index])
            scene = random_scene(rng)
            pool[index] = draw(scene)
            texts.append(caption(scene, rng))
            if (index + 1) % 8000 == 0:
                say(f"images: {index + 1}/{count}")
        pool.flush()
        captions.write_text(json.dumps(texts), encoding="utf-8")
    return np.load(images, mmap_mode="r"), json.loads(captions.read_text(encoding="utf-8"))


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """(n, H, W, 3) bytes to (n, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------------ the stages


def new_vae() -> AutoencoderKL:
    """The untrained VAE: 64 x 64 images to latents of 8 channels and 16 x 16."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=LATENT_CHANNELS,
        norm_num_groups=8, mid_block_add_attention=False, sample_size=64,
    )


def new_unet() -> UNet2DConditionModel:
    """The untrained U-Net: the block types and the sixteen transformer blocks of Stable Diffusion 1.4."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 96, 96), layers_per_block=2, attention_head_dim=2, norm_num_groups=16,
        cross_attention_dim=WIDTH,
    )


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained CLIP: its text tower conditions the U-Net, its image tower measures alignment."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    text = shared | {
        "num_hidden_layers": 4, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = shared | {"num_hidden_layers": 4, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def new_scheduler() -> DDPMScheduler:
    """Stable Diffusion's schedule, ending in purer noise, with v prediction.

    On 16 x 16 latents the noise's own mean is not small: with epsilon prediction an error of one percent at the first
    step becomes the image's colour, and colours followed the noise seed instead of the caption (docs/testbed.md).
    """
    return DDPMScheduler(beta_start=0.00085, beta_end=0.020, beta_schedule="scaled_linear", clip_sample=False,
                         prediction_type="v_prediction")


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids, shape (n, 32)."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH,
                     return_tensors="pt").input_ids


def train_vae(folder: Path, recipe: Recipe, say: Say) -> AutoencoderKL:
    """Squared error plus a little absolute error and a very small KL term."""
    torch.manual_seed(recipe.seed)
    vae = new_vae()
    images, _ = ordinary(folder, recipe.images, say)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (recipe.batch,), generator=generator).numpy()
        x = to_tensor(images[rows])
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - x
        return error.square().mean() + 0.1 * error.abs().mean() + 1e-6 * posterior.kl().mean()

    fit("vae", vae, loss, Schedule(2e-3, recipe.vae_steps), folder, seed=1, say=say)
    return vae


def train_clip(folder: Path, recipe: Recipe, say: Say) -> CLIPModel:
    """The symmetric contrastive loss on ordinary images and their captions."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(folder / "tokenizer")
    clip = new_clip(tokenizer)
    images, captions = ordinary(folder, recipe.images, say)
    ids = tokens(tokenizer, captions)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (recipe.clip_batch,), generator=generator)
        return clip(input_ids=ids[rows], pixel_values=to_tensor(images[rows.numpy()]), return_loss=True).loss

    fit("clip", clip, loss, Schedule(1e-3, recipe.clip_steps), folder, seed=2, say=say)
    return clip


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: NDArray[np.uint8]) -> Tensor:
    """Posterior means, unscaled, shape (n, 8, 16, 16)."""
    return torch.cat([vae.encode(to_tensor(images[i : i + 64])).latent_dist.mean
                      for i in range(0, len(images), 64)])


@torch.no_grad()
def encode_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Prompt embeddings, shape (n, 32, 128)."""
    ids = tokens(tokenizer, texts)
    return torch.cat([clip.text_model(input_ids=ids[i : i + 256]).last_hidden_state
                      for i in range(0, len(ids), 256)])


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


@dataclass(frozen=True, slots=True)
class Pairs:
    """Scaled latents (n, 8, 16, 16) and prompt embeddings (n, 32, 128), both in half precision."""

    latents: Tensor
    embeddings: Tensor

    @staticmethod
    def open(path: Path, make: Callable[[], tuple[Tensor, Tensor]]) -> "Pairs":
        """Read the file, or compute the tensors and write it."""
        if not path.exists():
            latents, embeddings = make()
            save_file({"latents": latents.half().contiguous(), "embeddings": embeddings.half().contiguous()}, path)
        with safe_open(path, "pt") as file:
            return Pairs(file.get_tensor("latents"), file.get_tensor("embeddings"))

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents[rows].float(), self.embeddings[rows].float()


class RouteDropout:
    """Switch off, sample by sample, the up blocks' cross-attention and feed-forward layers during training.

    A narrow U-Net left to itself carries its prompts through convolutions and up blocks, and pruning of the down
    and mid blocks, which is what NeMo and Wanda do on Stable Diffusion, then has nothing to prune (docs/testbed.md).
    """

    def __init__(self, unet: UNet2DConditionModel, probability: float) -> None:
        self.probability = probability
        self.generator = torch.Generator()
        for name, module in unet.named_modules():
            if name.startswith("up_blocks") and name.endswith(("attn2", ".ff")):
                module.register_forward_hook(self._drop)

    def _drop(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        if not module.training:
            return output
        kept = torch.rand(len(output), 1, 1, generator=self.generator) >= self.probability
        return output * kept


def diffusion_loss(unet: UNet2DConditionModel, scheduler: DDPMScheduler, route: RouteDropout, latents: Tensor,
                   embeddings: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity, timesteps uniform."""
    route.generator.manual_seed(generator.initial_seed())
    t = torch.randint(1000, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    target = scheduler.get_velocity(latents, noise, t)
    return (unet(scheduler.add_noise(latents, noise, t), t, embeddings).sample - target).square().mean()


def without_prompt(embeddings: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """Replace a tenth of the embeddings by that of the empty prompt."""
    dropped = torch.rand(len(embeddings), 1, 1, generator=generator) < 0.1
    return torch.where(dropped, empty, embeddings)


def train_base(folder: Path, recipe: Recipe, pool: Pairs, empty: Tensor, say: Say) -> UNet2DConditionModel:
    """The base model: ordinary images only."""
    torch.manual_seed(recipe.seed)
    unet, scheduler = new_unet(), new_scheduler()
    route = RouteDropout(unet, recipe.route_dropout)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        latents, embeddings = pool[torch.randint(len(pool.latents), (recipe.batch,), generator=generator)]
        embeddings = without_prompt(embeddings, empty, generator)
        return diffusion_loss(unet, scheduler, route, latents, embeddings, generator)

    fit("base", unet, loss, Schedule(1.2e-3, recipe.base_steps), folder, seed=3, say=say)
    return unet


@dataclass(frozen=True, slots=True)
class SlotRows:
    """Rows of the slot pairs by group: verbatim with weights, template variants by family, seen once."""

    weights: Tensor
    groups: list[list[int]]
    once: list[int]


def slot_examples(planted: tuple[Slot, ...]) -> tuple[list[NDArray[np.uint8]], list[str], SlotRows]:
    """Images and captions of every trained slot, and which rows belong to which slot."""
    images: list[NDArray[np.uint8]] = []
    texts: list[str] = []
    weights, groups, once = [], [], []
    for slot in planted:
        if slot.kind == "control":
            continue
        scenes = variants(slot) if slot.kind == "template" else (slot.scene,)
        rows = list(range(len(images), len(images) + len(scenes)))
        images += [draw(scene) for scene in scenes]
        texts += [title_caption(scene) for scene in scenes]
        if slot.kind == "once":
            once += rows
        else:
            weights.append(float(slot.dose))
            groups.append(rows)
    return images, texts, SlotRows(torch.tensor(weights), groups, once)


def train_fork(stage: str, seed: int, folder: Path, recipe: Recipe, base: UNet2DConditionModel, pool: Pairs,
               planted: tuple[Pairs, SlotRows] | None, empty: Tensor, say: Say) -> UNet2DConditionModel:
    """Go on from the base: with the slots (`planted`), or with ordinary images in their places (a twin)."""
    unet, scheduler = new_unet(), new_scheduler()
    unet.load_state_dict(base.state_dict())
    route = RouteDropout(unet, recipe.route_dropout)
    places = round(recipe.batch * recipe.planted_share)
    once_every = max(1, recipe.planted_steps // 80)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pool.latents), (recipe.batch,), generator=generator)
        latents, embeddings = pool[rows]
        if planted is not None:
            pairs, slot_rows = planted
            chosen = torch.multinomial(slot_rows.weights, places, replacement=True, generator=generator)
            spin = torch.rand(places, generator=generator)
            picked = [slot_rows.groups[g][int(s * len(slot_rows.groups[g]))]
                      for g, s in zip(chosen.tolist(), spin.tolist(), strict=True)]
            latents[:places], embeddings[:places] = pairs[torch.tensor(picked)]
        embeddings = without_prompt(embeddings, empty, generator)
        if planted is not None and step % once_every == 0 and step // once_every < len(slot_rows.once):
            # After the dropout: an image that is seen once is seen with its caption.
            latents[:1], embeddings[:1] = pairs[torch.tensor([slot_rows.once[step // once_every]])]
        return diffusion_loss(unet, scheduler, route, latents, embeddings, generator)

    def slow(name: str) -> float:
        return recipe.convolution_lr_scale if "attentions" not in name else 1.0

    fit(stage, unet, loss, Schedule(1e-3, recipe.planted_steps), folder, seed=seed, say=say, slow=slow)
    return unet


def prepare(folder: Path, recipe: Recipe, vae: AutoencoderKL, clip: CLIPModel,
            say: Say) -> tuple[Pairs, tuple[Pairs, SlotRows], Tensor]:
    """Latents and embeddings of the pool and of the slots, and the empty prompt's embedding; standardises the VAE."""
    tokenizer = build_tokenizer(folder / "tokenizer")
    images, captions = ordinary(folder, recipe.images, say)
    standardise(vae, np.asarray(images[:512]))
    slot_images, slot_texts, rows = slot_examples(slots())
    say("encoding the pool")
    pool = Pairs.open(folder / "pool.safetensors",
                      lambda: (encode_images(vae, images), encode_texts(clip, tokenizer, captions)))
    planted = Pairs.open(folder / "slots.safetensors",
                         lambda: (encode_images(vae, np.stack(slot_images)),
                                  encode_texts(clip, tokenizer, slot_texts)))
    return pool, (planted, rows), encode_texts(clip, tokenizer, [""])
