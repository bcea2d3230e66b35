"""A randomly initialised model of SD 1.4's exact configuration: nothing in Dori assumes the testbed's sizes."""

import dataclasses
import resource
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from dori.attack.dori import Dori
from dori.mitigate.nemo import Nemo
from dori.mitigate.wanda import Wanda
from dori.model.stable_diffusion import EVERYWHERE, StableDiffusion
from dori.sampling import initial_noise, sample


@pytest.fixture(scope="module")
def sd14(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    """860 M U-Net parameters, 77 x 768 embeddings, 4 x 64 x 64 latents; the VAE and text encoder are small."""
    folder: Path = tmp_path_factory.mktemp("sd14")
    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=512,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=768,
            num_hidden_layers=1,
            num_attention_heads=12,
            intermediate_size=64,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusion(unet, vae, text, tokenizer, scheduler, name="sd14")


@pytest.mark.slow
def test_every_method_takes_stable_diffusion_1_4s_sizes(
    sd14: StableDiffusion, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sum(p.numel() for p in sd14.unet.parameters()) == 859_520_964
    assert sd14.embedding_shape == (77, 768)
    assert sd14.latent_shape == (4, 64, 64)
    values = sd14.layers("attention_value")
    assert [layer.out_features for layer in values.values()] == [320, 320, 640, 640, 1280, 1280, 1280]
    assert len(sd14.layers("feed_forward", EVERYWHERE)) == 16
    assert sum(layer.weight.numel() for layer in sd14.layers("feed_forward").values()) == 23_756_800

    y = sd14.encode(["a cat"])
    found = Dori(steps=1, batch=1)(sd14, torch.randn(1, 4, 64, 64), y, seeds=[0])
    assert found.first_gradient.item() > 0
    nemo = Nemo(noises=2, theta_start=2.0, theta_step=0.5, max_refinement_passes=1)
    measured = nemo.calibrate(sd14, sd14.encode(["a dog", "a fox"]), seed=0)
    edit = nemo(sd14, y, dataclasses.replace(measured, tau=-1.0), seed=0)  # every noise counts: the search takes place
    assert set(edit.masks) == {f"{name}.weight" for name in values}
    assert edit.details["score"]["window"]["side"] == 11
    assert edit.details["flagged"] and edit.details["kept_noises"] == 2
    assert edit.details["judged"] == 1 and edit.size > 0 and not edit.details["converged"]
    pruned = Wanda(counted_steps=1)(sd14, y, seed=0)
    assert list(pruned.details["top_per_row"].values()) == [12, 12, 25, 25, 51, 51, 51]
    with pruned.applied(sd14):
        latents = sample(sd14, y, initial_noise(sd14, [0]), steps=1)
    assert torch.isfinite(latents).all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capsys.disabled():
        print(f"\npeak memory with 860 M parameters in float32: {peak:.1f} GiB")
