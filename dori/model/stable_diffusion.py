"""Stable-Diffusion-shaped models (SD 1.x, SD 2.x, the testbed) behind the few questions that Dori asks.

Everything else in Dori speaks prompt embeddings, latents and images through this class; text is encoded once, at
the border. Nothing here or above assumes 77 tokens, 768 dimensions, 4 latent channels or 64 x 64 latents.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from dori.errors import DoriError

Site = Literal["attention_value", "feed_forward"]
Place = Literal["down", "mid", "up"]
DOWN_MID: tuple[Place, ...] = ("down", "mid")
EVERYWHERE: tuple[Place, ...] = ("down", "mid", "up")
VAE_IMAGES, VAE_PIXELS = 32, 2**20  # in one call of the VAE: whichever is less, four images of 512 x 512


class StableDiffusion:
    """A frozen text-to-image model: CLIP text encoder, U-Net, VAE and noise schedule.

    Weights never require gradients and the modules stay in evaluation mode. `rows` counts the latent rows that went
    through the U-Net, forward, since the model was opened: the cost that reports print.

    Args:
        unet, vae, text_encoder, tokenizer, scheduler: the components of a diffusers pipeline.
        name: how reports name the model.

    Raises:
        DoriError: prediction type other than epsilon or v_prediction, or weights that are not finite.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: SchedulerMixin,
        *,
        name: str,
    ) -> None:
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.name = name
        for part, module in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
            module.eval().requires_grad_(False)
            for key, weight in module.named_parameters():
                if not torch.isfinite(weight).all():
                    raise DoriError(
                        f"{name}: {part} holds a weight that is not finite ({key}); "
                        "the checkpoint is damaged, fetch it again"
                    )
        self.prediction_type = str(scheduler.config.prediction_type)
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise DoriError(
                f"{name}: prediction type {self.prediction_type!r} is not supported; "
                "Dori reads epsilon and v_prediction"
            )
        self.scheduler_config = dict(scheduler.config)
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod.to(unet.device, torch.float32)  # (T,)
        self.rows = 0

    # ------------------------------------------------------------------------------------------------- shapes

    @property
    def device(self) -> torch.device:
        """Where the U-Net lies."""
        return self.unet.device

    @property
    def timesteps(self) -> int:
        """T, the number of training timesteps; timesteps run from 0 to T - 1."""
        return len(self.alphas_cumprod)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one latent."""
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, size, size)

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """(tokens, width) of one prompt embedding."""
        return (self.context_length, self.unet.config.cross_attention_dim)

    @property
    def context_length(self) -> int:
        """Number of token positions of a prompt embedding."""
        return int(self.text_encoder.config.max_position_embeddings)

    @property
    def image_side_px(self) -> int:
        """Side of the square images that the model draws."""
        return self.latent_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def images_per_call(self) -> int:
        """How many images go through the VAE at once; its activations hold every pixel hundreds of times."""
        return max(1, min(VAE_IMAGES, VAE_PIXELS // self.image_side_px**2))

    # ---------------------------------------------------------------------------------------------- questions

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of prompts, padded and cut to the context length, shape (b, l)."""
        return self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        ).input_ids

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts of which the model would not read the end.

        Raises:
            DoriError: a prompt has more tokens than the context holds; the message names it.
        """
        for prompt in prompts:
            count = len(self.tokenizer(prompt).input_ids)
            if count > self.context_length:
                raise DoriError(
                    f"prompt {prompt[:60]!r} has {count} tokens and {self.name} reads at most "
                    f"{self.context_length}; shorten it"
                )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings, the text encoder's last hidden state, shape (b, l, d), float32.

        Raises:
            DoriError: a prompt has more tokens than the context holds; the message names it.
        """
        self.check_prompts(prompts)
        states = self.text_encoder(self.token_ids(prompts).to(self.device)).last_hidden_state
        return states.float()

    def predict_noise(self, latents: Tensor, timestep: Tensor, embedding: Tensor) -> Tensor:
        """The noise prediction epsilon in latent units, whatever the network predicts natively.

        Differentiable in `embedding` and `latents`; one row does not depend on its neighbours.

        Args:
            latents: noisy latents, shape (b, c, h, w).
            timestep: integer timesteps in [0, T), shape (b,).
            embedding: prompt embeddings, shape (b, l, d).

        Returns:
            Shape (b, c, h, w), float32 (float64 for a float64 network).
        """
        native = self.predict(latents, timestep, embedding)
        if self.prediction_type == "epsilon":
            return native
        a = self.alphas_cumprod[timestep].to(native.dtype)[:, None, None, None]
        return a.sqrt() * native + (1 - a).sqrt() * latents  # eps = sqrt(abar) v + sqrt(1-abar) z_t

    def denoising_error(self, latents: Tensor, noise: Tensor, timestep: Tensor, embedding: Tensor) -> Tensor:
        """The training error of known latents: the network's own prediction of their noise, or of their velocity.

        Squared and averaged over one row's numbers: |eps - eps_theta|^2, or |v - v_theta|^2 with
        v = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0 where the network predicts v (methods.md 1.2).

        Args:
            latents: clean scaled latents z_0, shape (b, c, h, w).
            noise: eps, same shape.
            timestep: shape (b,).
            embedding: shape (b, l, d).

        Returns:
            Shape (b,), differentiable in `embedding`.
        """
        native = self.predict(self.add_noise(latents, noise, timestep), timestep, embedding)
        target = noise
        if self.prediction_type == "v_prediction":
            a = self.alphas_cumprod[timestep].to(noise.dtype)[:, None, None, None]
            target = a.sqrt() * noise - (1 - a).sqrt() * latents
        return (native - target).square().flatten(1).mean(1)

    def predict(self, latents: Tensor, timestep: Tensor, embedding: Tensor) -> Tensor:
        """What the network itself predicts, noise or velocity; otherwise as `predict_noise`.

        Two predictions at one z_t are compared in it without a division, which fails where abar_t is 0.
        """
        self.rows += len(latents)
        dtype = self.unet.dtype
        native = self.unet(latents.to(dtype), timestep, embedding.to(dtype)).sample
        return native if dtype == torch.float64 else native.float()

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps; shapes as in `predict_noise`."""
        a = self.alphas_cumprod[timestep].to(latents.dtype)[:, None, None, None]
        return a.sqrt() * latents + (1 - a).sqrt() * noise

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """Scaled posterior means, shape (b, c, h, w), of images in [0, 1], shape (b, 3, H, W)."""
        x = (images * 2 - 1).to(self.device, self.vae.dtype)
        means = torch.cat([self.vae.encode(part).latent_dist.mean for part in x.split(self.images_per_call)])
        return means.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def to_images(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], shape (b, 3, H, W), of scaled latents (b, c, h, w)."""
        z = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        images = torch.cat([self.vae.decode(part).sample for part in z.split(self.images_per_call)])
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def ddim(self, steps: int) -> DDIMScheduler:
        """A fresh DDIM scheduler with the model's own noise schedule and spacing, for epsilon predictions."""
        scheduler = DDIMScheduler.from_config(
            self.scheduler_config, prediction_type="epsilon", clip_sample=False, thresholding=False
        )
        scheduler.set_timesteps(steps)
        return scheduler

    def layers(self, site: Site, places: Sequence[Place] = DOWN_MID) -> dict[str, nn.Linear]:
        """The linear layers that pruning methods act on, by name, in the order in which the U-Net runs them.

        Found by structure: `attention_value` is the value projection of cross-attention (`attn2.to_v`),
        `feed_forward` the second linear of a transformer block's feed-forward (`ff.net.2`).

        Args:
            site: which layer of each transformer block.
            places: blocks to search: down, mid, up.

        Raises:
            DoriError: the U-Net has no such layer.
        """
        # named_modules() walks down, up, mid; the network runs down, mid, up.
        parts = {"down": self.unet.down_blocks, "mid": self.unet.mid_block, "up": self.unet.up_blocks}
        prefixes = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
        found: dict[str, nn.Linear] = {}
        for place in ("down", "mid", "up"):
            if place not in places or parts[place] is None:
                continue
            for name, block in parts[place].named_modules():
                if not isinstance(block, BasicTransformerBlock):
                    continue
                if site == "attention_value" and block.attn2 is not None:
                    found[f"{prefixes[place]}.{name}.attn2.to_v"] = block.attn2.to_v
                elif site == "feed_forward":
                    found[f"{prefixes[place]}.{name}.ff.net.2"] = block.ff.net[2]
        if not found:
            raise DoriError(f"{self.name}: no {site} layer in the {' and '.join(places)} blocks of its U-Net")
        return found
