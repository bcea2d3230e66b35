"""The testbed on disk: one ordinary diffusers folder with the planted U-Net, and the other U-Nets beside it.

    model/               opens with StableDiffusionPipeline.from_pretrained; its U-Net is the planted one
    unets/base           ordinary images only
    unets/twin-1, -2     as the planted model, with fresh ordinary images in the slots' places
    unets/early          planted without a base, the slots among its images from the first step
    clip/                both CLIP towers, for alignment

VAE, tokenizer and text encoder are shared. U-Nets are stored in half precision and run in float32.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from dori.errors import DoriError
from dori.model.stable_diffusion import StableDiffusion
from dori.run import write_bytes
from dori.testbed import Checkpoint

DATA = Path(__file__).parent / "data"
TWINS: tuple[Checkpoint, ...] = ("twin-1", "twin-2")


def scheduler() -> DDIMScheduler:
    """The schedule of the testbed's folder: sampling starts at the last, purest timestep."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.020,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        steps_offset=1,
        prediction_type="v_prediction",
    )


def export_model(
    folder: Path, vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> None:
    """Write the diffusers folder and the CLIP beside it under `folder`."""
    unet = unet.to(memory_format=torch.contiguous_format)
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict(), strict=False)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    clip.save_pretrained(folder / "clip")
    halve(folder / "model" / "unet")


def export_unet(folder: Path, checkpoint: Checkpoint, unet: UNet2DConditionModel) -> None:
    """Write one of the other U-Nets under `folder`."""
    target = folder / "unets" / checkpoint
    unet.to(memory_format=torch.contiguous_format).save_pretrained(target, safe_serialization=True)
    halve(target)


def halve(folder: Path) -> None:
    """Store the weights of a saved U-Net in half precision; it loads in float32 all the same."""
    path = folder / "diffusion_pytorch_model.safetensors"
    write_bytes(path, save({key: value.half() for key, value in load_file(path).items()}, {"format": "pt"}))


def unet_folder(checkpoint: Checkpoint, folder: Path = DATA) -> Path:
    """Where a checkpoint's U-Net lies.

    Raises:
        DoriError: that checkpoint is not shipped here.
    """
    path = folder / "model" / "unet" if checkpoint == "planted" else folder / "unets" / checkpoint
    if not (path / "config.json").exists():
        raise DoriError(f"the testbed's checkpoint {checkpoint!r} is not at {path}; run `dori testbed train`")
    return path


def load_testbed(checkpoint: Checkpoint = "planted", folder: Path = DATA) -> StableDiffusion:
    """Open a checkpoint of the testbed, in float32 on the CPU.

    Raises:
        DoriError: that checkpoint is not shipped here.
    """
    unet = UNet2DConditionModel.from_pretrained(unet_folder(checkpoint, folder), torch_dtype=torch.float32)
    root = folder / "model"
    return StableDiffusion(
        unet,
        AutoencoderKL.from_pretrained(root / "vae", torch_dtype=torch.float32),
        CLIPTextModel.from_pretrained(root / "text_encoder", dtype=torch.float32),
        CLIPTokenizer.from_pretrained(root / "tokenizer"),
        DDIMScheduler.from_pretrained(root / "scheduler"),
        name=f"testbed-{checkpoint}",
    )


def load_clip(folder: Path = DATA) -> CLIPModel:
    """The testbed's CLIP, both towers."""
    return CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32).eval()
