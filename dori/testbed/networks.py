"""The testbed's untrained networks: Stable Diffusion 1.x in miniature, and the dropout that gives its blocks work."""

from collections.abc import Callable
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dori.testbed.vocabulary import CONTEXT_LENGTH

LATENT_CHANNELS = 8
WIDTH = 128
Network = TypeVar("Network", bound=nn.Module)


def seeded(make: Callable[[], Network], seed: int) -> Network:
    """The network that `make` builds under `seed`; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # noqa: TID251 (the libraries' constructors take no generator)
        return make()


def new_vae() -> AutoencoderKL:
    """The untrained VAE: 64 x 64 images to latents of 8 channels and 16 x 16."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


def new_unet() -> UNet2DConditionModel:
    """The untrained U-Net: the block types and the sixteen transformer blocks of Stable Diffusion 1.4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=2,
        attention_head_dim=2,
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
    ).to(memory_format=torch.channels_last)  # a tenth faster to train on CPUs


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained CLIP: its text tower conditions the U-Net, its image tower measures alignment."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    text = shared | {
        "num_hidden_layers": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = shared | {"num_hidden_layers": 4, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def new_scheduler() -> DDPMScheduler:
    """Stable Diffusion's schedule, ending in purer noise, with v prediction.

    On 16 x 16 latents the noise's own mean is not small: with epsilon prediction an error of one percent at the first
    step becomes the image's colour, and colours followed the noise seed instead of the caption (docs/testbed.md).
    """
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.020,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
    )


class RouteDropout:
    """Switch off, sample by sample, all cross-attentions or all feed-forwards of the up blocks during training.

    A narrow U-Net left to itself carries its prompts through convolutions and up blocks, and pruning of the down
    and mid blocks, which is what NeMo and Wanda do on Stable Diffusion, then has nothing to prune (docs/testbed.md).
    One coin a sample and kind, so that many samples are trained just as they are used, with everything on.
    """

    def __init__(self, unet: UNet2DConditionModel, *, attention: float, feed_forward: float) -> None:
        self.probabilities = {"attn2": attention, "ff": feed_forward}
        self.kept: dict[str, Tensor] = {}
        for name, module in unet.named_modules():
            kind = name.rpartition(".")[2]
            if name.startswith("up_blocks") and kind in self.probabilities:
                module.register_forward_hook(self._hook(kind))

    def draw(self, rows: int, generator: torch.Generator, device: torch.device) -> None:
        """Toss the coins for the next training step, which takes place on the device."""
        coins = {kind: torch.rand(rows, 1, 1, generator=generator) for kind in self.probabilities}
        self.kept = {kind: (coin >= self.probabilities[kind]).to(device) for kind, coin in coins.items()}

    def _hook(self, kind: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def drop(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            return output * self.kept[kind] if module.training else output

        return drop
