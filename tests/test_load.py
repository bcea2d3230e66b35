"""A model is opened from plain safetensors alone; whatever could run code or is torn is one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, tiny_parts
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dori.errors import DoriError
from dori.model.load import load_model, model_fingerprint
from dori.model.stable_diffusion import StableDiffusion

UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


def save_tiny(folder: Path, **settings: object) -> Path:
    """The tiny random model as a diffusers folder."""
    words = folder / "words"
    words.mkdir(parents=True)
    parts = tiny_parts(words)
    parts["scheduler"] = DDIMScheduler.from_config(parts["scheduler"].config, steps_offset=1)  # pipelines insist on it
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder / "model", **settings)
    return folder / "model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model, not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved tiny model, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refusal(folder: Path | str, **settings: object) -> str:
    """The sentence with which a model is refused."""
    with pytest.raises(DoriError) as caught:
        load_model(str(folder), **settings)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 600
    return sentence


def edit_json(path: Path, **fields: object) -> None:
    """Set fields of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def edit_weights(path: Path, change: Callable[[dict], None]) -> None:
    """Change a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_saved_model_answers_as_before(saved: Path, tiny: StableDiffusion) -> None:
    model = load_model(str(saved))
    embedding = tiny.encode(["a b", ""])
    assert torch.equal(model.encode(["a b", ""]), embedding)
    noise = torch.randn(2, *tiny.latent_shape, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([3, 900])
    assert torch.equal(model.predict_noise(noise, timestep, embedding), tiny.predict_noise(noise, timestep, embedding))
    assert torch.equal(model.to_images(noise), tiny.to_images(noise))
    assert model.name == str(saved) and model.embedding_shape == (CONTEXT, 16)
    assert not any(weight.requires_grad for weight in model.unet.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_only_the_unet_takes_the_dtype(saved: Path, dtype: torch.dtype) -> None:
    model = load_model(str(saved), dtype=dtype)
    assert {weight.dtype for weight in model.unet.parameters()} == {dtype}
    assert {weight.dtype for part in (model.vae, model.text_encoder) for weight in part.parameters()} == {torch.float32}


def test_fingerprints_name_what_is_loaded_and_not_its_file(saved: Path, folder: Path, tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path)
    parts["scheduler"] = DDIMScheduler.from_config(parts["scheduler"].config, steps_offset=1)
    expected = model_fingerprint(StableDiffusion(**parts, name="in memory"))
    assert model_fingerprint(load_model(str(saved))) == model_fingerprint(load_model(str(folder))) == expected
    sharded = save_tiny(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((sharded / "unet").glob("*-of-*.safetensors"))) > 1
    assert model_fingerprint(load_model(str(sharded))) == expected
    found = {expected, model_fingerprint(load_model(str(saved), dtype=torch.bfloat16))}
    for path, name in (
        (UNET, "conv_in.bias"),
        (VAE, "decoder.conv_in.bias"),
        (TEXT, "text_model.final_layer_norm.bias"),
    ):
        tensors = load_file(folder / path)
        key = name if name in tensors else name.removeprefix("text_model.")
        edit_weights(folder / path, lambda tensors, key=key: tensors[key][0].add_(1))
        found.add(model_fingerprint(load_model(str(folder))))
    for change in ({"prediction_type": "v_prediction"}, {"beta_end": 0.013}, {"steps_offset": 0}):
        edit_json(folder / "scheduler" / "scheduler_config.json", **change)
        found.add(model_fingerprint(load_model(str(folder))))
    # Settings of which the weights' shapes say nothing.
    for part, change in (
        ("unet/config.json", {"attention_head_dim": 4}),
        ("unet/config.json", {"norm_eps": 1e-4}),
        ("text_encoder/config.json", {"num_attention_heads": 4}),
        ("vae/config.json", {"scaling_factor": 0.5}),
    ):
        edit_json(folder / part, **change)
        found.add(model_fingerprint(load_model(str(folder))))
    assert len(found) == 12


# What is written into model_index.json, and what the refusal says.
INDEX = {
    "another pipeline": ({"_class_name": "FluxPipeline"}, "is a 'FluxPipeline'; Dori reads StableDiffusionPipeline"),
    "a pipeline of its own": ({"_class_name": ["pipeline", "Evil"]}, "Dori reads StableDiffusionPipeline"),
    "no class": ({"_class_name": None}, "is a None"),
    "a module beside it": ({"unet": ["evil", "UNet2DConditionModel"]}, "'unet' in model_index.json"),
    "another library": ({"unet": ["os", "system"]}, "Dori opens only UNet2DConditionModel"),
    "another class": ({"vae": ["diffusers", "AutoencoderTiny"]}, "Dori opens only AutoencoderKL"),
    "a strange scheduler": ({"scheduler": ["diffusers", "DiffusionPipeline"]}, "Dori opens only DDIMScheduler"),
    "a dotted class": ({"text_encoder": ["transformers", "models.clip.CLIPTextModel"]}, "Dori opens only CLIPTextMod"),
    "another part": ({"extra": ["diffusers", "UNet2DConditionModel"]}, "the parts of a StableDiffusionPipeline"),
    "code by auto_map": ({"auto_map": {"AutoModel": "evil.Evil"}}, "asks for code of its own"),
    "code by trust": ({"trust_remote_code": True}, "asks for code of its own"),
    "code by pipeline": ({"custom_pipeline": "evil"}, "asks for code of its own"),
    "no unet": ({"unet": None}, "has no unet in model_index.json"),
    "an empty unet": ({"unet": [None, None]}, "'unet' in model_index.json"),
    "a torn unet": ({"unet": ["diffusers"]}, "'unet' in model_index.json"),
    "unet a text": ({"unet": "diffusers"}, "has no unet"),
    "unet a tree": ({"unet": [["diffusers"], {"a": 1}]}, "'unet' in model_index.json"),
}


@pytest.mark.parametrize("name", INDEX)
def test_a_pipeline_that_names_anything_else_is_refused(folder: Path, name: str) -> None:
    fields, sentence = INDEX[name]
    edit_json(folder / "model_index.json", **fields)
    assert sentence in refusal(folder)


def test_the_parts_of_published_checkpoints_that_dori_does_not_need_are_left_alone(folder: Path) -> None:
    edit_json(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
        tokenizer=["transformers", "CLIPTokenizerFast"],
        scheduler=["diffusers", "PNDMScheduler"],
    )
    assert load_model(str(folder)).timesteps == 1000


def spoil_index(text: str | bytes) -> Callable[[Path], None]:
    """Replace model_index.json."""
    return lambda folder: (
        (folder / "model_index.json").write_bytes(text if isinstance(text, bytes) else text.encode()) and None
    )


def spoil_pickle(folder: Path) -> None:
    """A checkpoint in the old format only."""
    torch.save(load_file(folder / UNET), (folder / UNET).with_suffix(".bin"))
    (folder / UNET).unlink()


def spoil_shards(name: str) -> Callable[[Path], None]:
    """A shard list that points to another file."""

    def change(folder: Path) -> None:
        torch.save(load_file(folder / UNET), folder / "unet" / "diffusion_pytorch_model.bin")
        shutil.copy(folder / UNET, folder / "other.safetensors")
        (folder / f"{UNET}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / UNET), name)})
        )
        (folder / UNET).unlink()

    return change


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
    "broken index": (spoil_index("{"), "model_index.json is no JSON"),
    "index a list": (spoil_index("[]"), "is no JSON object"),
    "index deep": (spoil_index("[" * 100_000), "is no JSON"),
    "index no text": (spoil_index(b"\xff\xfe"), "is no JSON"),
    "no vae": (lambda folder: shutil.rmtree(folder / "vae"), "has no folder vae"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "has no folder tokenizer"),
    "no words": (
        lambda folder: [path.unlink() for path in (folder / "tokenizer").iterdir()],
        "neither tokenizer.json nor vocab.json",
    ),
    "torn words of the tokenizer": (
        lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text('{"a": 1}'),
        "tokenizer cannot be opened",
    ),
    "no scheduler": (
        lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(),
        "scheduler cannot be opened",
    ),
    "no config": (lambda folder: (folder / "unet" / "config.json").unlink(), "unet cannot be opened"),
    "no weights": (
        lambda folder: (folder / VAE).unlink(),
        "has no vae/diffusion_pytorch_model.safetensors; weights under another name",
    ),
    "pickles only": (spoil_pickle, "can run code; convert it once"),
    "shards are pickles": (spoil_shards("diffusion_pytorch_model.bin"), "that are no safetensors beside it"),
    "shards elsewhere": (spoil_shards("../other.safetensors"), "that are no safetensors beside it"),
    "shards no list": (
        lambda folder: (folder / f"{UNET}.index.json").write_text('{"weight_map": [1]}'),
        "that are no safetensors beside it",
    ),
    "shards missing": (
        spoil_shards("diffusion_pytorch_model-00001-of-00002.safetensors"),
        "has no unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    ),
    "torn weights": (
        lambda folder: (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-9]),
        "unet cannot be opened",
    ),
    "torn text encoder": (lambda folder: (folder / TEXT).write_bytes(b"\xff" * 99), "text_encoder cannot be opened"),
    "git-lfs pointer": (
        lambda folder: (folder / UNET).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "unet cannot be opened",
    ),
    "NaN": (
        lambda folder: edit_weights(folder / UNET, lambda tensors: tensors["conv_in.bias"].fill_(torch.nan)),
        "unet holds a weight that is not finite (conv_in.bias)",
    ),
    "infinity": (
        lambda folder: edit_weights(folder / VAE, lambda tensors: tensors["quant_conv.bias"].fill_(torch.inf)),
        "vae holds a weight that is not finite",
    ),
    "a weight missing": (
        lambda folder: edit_weights(folder / UNET, lambda tensors: tensors.pop("conv_in.bias")),
        "unet lacks 1 weights that its configuration asks for (conv_in.bias)",
    ),
    "a weight too many": (
        lambda folder: edit_weights(folder / UNET, lambda tensors: tensors.update({"extra.weight": torch.ones(1)})),
        "extra.weight",
    ),
    "another shape": (
        lambda folder: edit_weights(folder / UNET, lambda tensors: tensors.update({"conv_in.bias": torch.ones(3)})),
        "conv_in",
    ),
    "text of another width": (
        lambda folder: edit_json(folder / "text_encoder" / "config.json", hidden_size=32),
        "text_encoder",
    ),
    "code in a part": (
        lambda folder: edit_json(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "e.E"}),
        "has auto_map in text_encoder/config.json",
    ),
    "code in the tokenizer": (
        lambda folder: edit_json(
            folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["e.E", None]}
        ),
        "has auto_map in tokenizer/tokenizer_config.json",
    ),
    "quantised": (
        lambda folder: edit_json(folder / "unet" / "config.json", quantization_config={"quant_method": "gguf"}),
        "has quantization_config in unet/config.json",
    ),
    "adapter": (
        lambda folder: (folder / "text_encoder" / "adapter_config.json").write_text(
            '{"base_model_name_or_path": "owner/evil"}'
        ),
        "has an adapter in text_encoder",
    ),
    "unknown prediction": (
        lambda folder: edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="sample"),
        "'sample' is not supported",
    ),
    "size of two": (lambda folder: edit_json(folder / "unet" / "config.json", sample_size=[8, 12]), "sample_size"),
    "absurd config": (
        lambda folder: edit_json(folder / "unet" / "config.json", block_out_channels="x"),
        "unet cannot be opened",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_hostile_folder_is_one_sentence(folder: Path, name: str) -> None:
    damage, sentence = DAMAGES[name]
    damage(folder)
    found = refusal(folder)
    assert sentence in found, found


def test_parts_that_do_not_belong_together_are_refused(saved: Path, tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path)
    for change, sentence in (
        ({"cross_attention_dim": 24}, "gives 16 numbers a token and the U-Net reads 24"),
        ({"in_channels": 7}, "the VAE gives 3 channels, the U-Net reads 7"),
        ({"class_embed_type": "timestep"}, "a further condition"),
    ):
        copy = Path(shutil.copytree(saved, tmp_path / sentence[:12]))
        UNet2DConditionModel.from_config(parts["unet"].config, **change).save_pretrained(copy / "unet")
        assert sentence in refusal(copy)
    copy = Path(shutil.copytree(saved, tmp_path / "words"))
    parts["tokenizer"].add_tokens(["a word too many"])
    parts["tokenizer"].save_pretrained(copy / "tokenizer")
    assert "the tokenizer knows 191 tokens and the text encoder 190" in refusal(copy)


def test_a_spec_that_names_nothing_is_one_sentence(tmp_path: Path, saved: Path) -> None:
    assert "there is no model at" in refusal(tmp_path / "missing")
    assert "there is no model at" in refusal("")
    assert "there is no model at" in refusal("../../x/y")
    assert "can run code; convert it once" in refusal(tmp_path / "model.ckpt")
    assert "has no model_index.json" in refusal(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    assert "is no .safetensors file" in refusal(tmp_path / "a.txt")
    (tmp_path / "a.safetensors").write_text("x")
    assert "is no whole safetensors file" in refusal(tmp_path / "a.safetensors")
    assert "holds no model.diffusion_model.* weights" in refusal(saved / UNET)
    assert "device 'nowhere' cannot be used" in refusal(saved, device="nowhere")
