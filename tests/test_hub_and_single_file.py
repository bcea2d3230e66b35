"""Hub ids and checkpoints in one file are opened like folders, without network or pickle.

A hub cache with random tiny models stands in for the hub. One child process has it as its cache, forbids itself the
network, and opens everything; what it found is asked here.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commanding import FEW_STEPS, write_folder
from conftest import CONTEXT, tiny_parts
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from published import renamed, unet_names
from safetensors.torch import load_file, save_file
from test_load import TEXT, UNET, VAE, edit_json, save_tiny
from transformers import CLIPTextConfig, CLIPTextModel

from dori.model.load import load_model, model_fingerprint

ROOT = Path(__file__).parent.parent
COMMIT = "0" * 40
# Where diffusers looks for the configuration of a checkpoint in one file, by its weights.
FIRST, SECOND = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1"

# Opens the models under a watch on the network and on pickles, then audits by the command.
CHILD = """
import contextlib, dataclasses, io, json, sys
events = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "pickle.find_class", "subprocess.Popen"):
        events.append(event)
sys.addaudithook(hook)
from dori.errors import DoriError
from dori.model.load import load_model, model_fingerprint
events.clear()  # of the imports
asked = json.loads(sys.argv[1])
opened, refused = {}, {}
for name, spec in asked["models"].items():
    try:
        model = load_model(spec)
        opened[name] = [model.name, model_fingerprint(model), model.prediction_type, model.embedding_shape]
    except DoriError as error:
        refused[name] = str(error)
watched = list(events)
from dori.attack.dori import Dori
from dori.audit.plan import PRESETS, Plan, Starts
from dori.cli import main
PRESETS["quick"] = lambda: Plan(
    "quick", seeds=1, sampling_steps=1, attack=Dori(steps=1, batch=1), starts=Starts(*[("gaussian",)] * 6), nemo=None,
    wandas=(), calibration_prompts=2, quality_prompts=0,
)
audits = {}
for name, arguments in asked["audits"].items():
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as stopped:
            audits[name] = [stopped.code, said.getvalue()]
online = [event for event in events if event.startswith("socket")]
print(json.dumps({"events": watched + online, "opened": opened, "refused": refused, "audits": audits}))
"""


def in_cache(cache: Path, repository: str, folder: Path, *, weights: bool = True) -> None:
    """Put a folder into a hub cache as if it had been downloaded."""
    place = cache / f"models--{repository.replace('/', '--')}"
    for path in folder.rglob("*"):
        if path.is_file() and (weights or path.suffix != ".safetensors"):
            target = place / "snapshots" / COMMIT / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)


def save_second(folder: Path) -> Path:
    """A tiny model by which diffusers knows Stable Diffusion 2: two layers a block, 1,024 numbers a token, velocity."""
    words = folder / "words"
    words.mkdir(parents=True)
    parts = tiny_parts(words, prediction_type="v_prediction")
    torch.manual_seed(1)
    parts["unet"] = UNet2DConditionModel.from_config(
        parts["unet"].config, layers_per_block=2, cross_attention_dim=1024, use_linear_projection=True
    )
    text = parts["text_encoder"].config.to_dict() | {"hidden_size": 1024, "num_hidden_layers": 1, "hidden_act": "gelu"}
    parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**text))
    parts["scheduler"] = DDIMScheduler.from_config(parts["scheduler"].config, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


# ------------------------------------------------------------------ names of the original Stable Diffusion code

AUTOENCODER = {
    "down_blocks.0.resnets": "down.0.block",
    "down_blocks.1.resnets": "down.1.block",
    "down_blocks.0.downsamplers.0": "down.0.downsample",
    "up_blocks.0.resnets": "up.1.block",
    "up_blocks.1.resnets": "up.0.block",
    "up_blocks.0.upsamplers.0": "up.1.upsample",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn": "attn",
}


def single_file(folder: Path, *, layers: int = 1, second: bool = False) -> dict[str, torch.Tensor]:
    """A tiny model's weights under the names of the original code of SD 1.x, or of SD 2.x with its OpenCLIP."""
    unet = load_file(folder / UNET)
    found = {theirs: unet[ours] for theirs, ours in unet_names(unet, layers=layers).items()}
    dotted = {f"{ours}.": f"{theirs}." for ours, theirs in AUTOENCODER.items()}
    for name, value in load_file(folder / VAE).items():
        found[f"first_stage_model.{renamed(name, dotted)}"] = value
    text = {name.removeprefix("text_model."): value for name, value in load_file(folder / TEXT).items()}
    if second:
        return found | {f"cond_stage_model.model.{name}": value for name, value in open_clip(text).items()}
    return found | {f"cond_stage_model.transformer.text_model.{name}": value for name, value in text.items()}


def open_clip(text: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP's weights as OpenCLIP has them: projections stacked, and what Stable Diffusion 2 leaves out."""
    found = {renamed(name, OPEN_CLIP): value for name, value in text.items() if "_proj." not in name or "out_" in name}
    for name in text:
        if ".q_proj." in name:
            stack = [text[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv"]
            found[renamed(name, OPEN_CLIP).replace("q_proj.", "in_proj_")] = torch.cat(stack)
    width = found["ln_final.weight"].numel()
    # The last of its 24 layers and the head are in the files and in no pipeline.
    return found | {
        "transformer.resblocks.23.ln_1.weight": torch.ones(width),
        "transformer.resblocks.23.attn.in_proj_weight": torch.ones(3 * width, width),
        "text_projection": torch.ones(width, width),
        "logit_scale": torch.ones(()),
    }


# ----------------------------------------------------------------------------------------------------- what was found


@dataclass(frozen=True, slots=True)
class Opened:
    """What the child found, and the fingerprints of the two models read from their folders."""

    found: Mapping[str, Any]
    first: str
    second: str


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Everything opened and audited once."""
    root = tmp_path_factory.mktemp("hub")
    saved, second, cache = save_tiny(root / "first"), save_second(root / "second"), root / "cache"
    in_cache(cache, "owner/tiny", saved)
    in_cache(cache, FIRST, saved, weights=False)
    in_cache(cache, SECOND, second, weights=False)
    in_cache(cache, "owner/half-there", saved, weights=False)
    evil = save_tiny(root / "evil")
    edit_json(evil / "model_index.json", unet=["evil", "UNet2DConditionModel"])
    in_cache(cache, "owner/evil", evil)
    models = {name: name for name in ("owner/tiny", "owner/absent", "owner/half-there", "owner/evil")}
    for name, weights in (("1.x", single_file(saved)), ("2.x", single_file(second, layers=2, second=True))):
        files = {name: weights}
        for part, key in (
            ("unet", "model.diffusion_model.out.2.bias"),
            ("vae", "first_stage_model.decoder.conv_out.bias"),
            ("text", next(key for key in weights if key.endswith(("final_layer_norm.bias", "ln_final.bias")))),
        ):
            files[f"{name} without {part}"] = {one: value for one, value in weights.items() if one != key}
        for file, kept in files.items():
            models[file] = str(root / f"{file}.safetensors")
            save_file({one: value.contiguous() for one, value in kept.items()}, models[file])
    write_folder(root / "memories", ["ab", None], seed=0)
    write_folder(root / "ordinary", ["cd", "ef", "gh"], seed=1)
    audits = {
        spec: ["audit", spec, "--memories", str(root / "memories"), "--ordinary", str(root / "ordinary"), *FEW_STEPS]
        for spec in ("owner/tiny", "owner/absent")
    }
    asked = {
        "models": models,
        "audits": {spec: [*command, "--out", str(root / spec)] for spec, command in audits.items()},
    }
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(asked)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    return Opened(found, *(model_fingerprint(load_model(str(folder))) for folder in (saved, second)))


def test_a_hub_id_and_a_single_file_are_the_model_of_the_folder(opened: Opened) -> None:
    found = opened.found["opened"]
    assert found["owner/tiny"] == ["owner/tiny", opened.first, "epsilon", [CONTEXT, 16]]
    assert found["1.x"][1:] == [opened.first, "epsilon", [CONTEXT, 16]]


def test_a_single_file_of_stable_diffusion_2_is_the_model_of_the_folder(opened: Opened) -> None:
    """Its OpenCLIP is taken apart, and its prediction of velocity comes from the configuration of 2.1."""
    assert opened.found["opened"]["2.x"][1:] == [opened.second, "v_prediction", [CONTEXT, 1024]]


def test_neither_network_nor_pickle_is_touched(opened: Opened) -> None:
    assert opened.found["events"] == []


def test_what_is_not_there_as_a_whole_is_one_sentence(opened: Opened) -> None:
    refused = opened.found["refused"]
    assert all("\n" not in sentence for sentence in refused.values()) and len(refused) == 9
    assert "'owner/absent' is no folder here and could not be fetched" in refused["owner/absent"]
    assert "has no unet/diffusion_pytorch_model.safetensors" in refused["owner/half-there"]
    assert "names ['evil', 'UNet2DConditionModel'] as its 'unet'" in refused["owner/evil"]
    for version in ("1.x", "2.x"):
        for part in ("unet", "vae"):
            assert "the checkpoint cannot be opened" in refused[f"{version} without {part}"]
        assert "text_encoder lacks 1 weights that its configuration asks for" in refused[f"{version} without text"]


def test_an_audit_opens_a_hub_id_and_an_unknown_one_offline_is_status_2(opened: Opened) -> None:
    code, said = opened.found["audits"]["owner/tiny"]
    assert code == 0, said
    code, said = opened.found["audits"]["owner/absent"]
    assert code == 2 and len(said.strip().splitlines()) == 1
    assert said.startswith("dori: 'owner/absent' is no folder here") and "check the name and the network" in said
