"""Open a model from a diffusers folder, a hub id or one .safetensors file, without running anything it brings.

Nothing is looked up by a name that the checkpoint supplies: `model_index.json` is compared with literal tables, and
each part is opened by the class that Dori expects. Weights are read from safetensors only; there is no way back to
pickles (anchors.md B: CVE-2025-32434, CVE-2026-24747, and CVE-2026-44513, which got past `trust_remote_code`).
The safety checker and the feature extractor are not loaded.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from dori.errors import READER_ERRORS, DoriError
from dori.model.stable_diffusion import StableDiffusion
from dori.run import canonical_sha256, tensors_sha256

# Pipeline class, as model_index.json names it -> adapter.
ADAPTERS: dict[str, Callable[..., StableDiffusion]] = {"StableDiffusionPipeline": StableDiffusion}
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
# Part -> library and the classes that may stand there.
PARTS = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "scheduler": ("diffusers", SCHEDULERS),
}
NOT_LOADED = ("safety_checker", "feature_extractor", "image_encoder")
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
JSON_BYTES = 50_000_000
# What diffusers, transformers and their readers raise on a hostile or torn file.
LIBRARY_ERRORS = (*READER_ERRORS, SafetensorError)
CONVERT = (
    "convert it once, on a machine where you trust the file, with diffusers' "
    "pipeline.save_pretrained(folder, safe_serialization=True)"
)


def load_model(spec: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusion:
    """Open a model: the U-Net in `dtype`, text encoder and VAE in float32.

    Args:
        spec: a diffusers folder (read without network), a hub id "owner/name", or a `.safetensors` file of a whole
            SD 1.x or 2.x pipeline (diffusers then needs its configuration from the hub's cache or the hub; the weights
            do not tell 2.0 and 2.x-base from 2.1, whose velocity prediction and 768 pixels are taken: give a folder).
        device: a torch device, such as "cpu" or "cuda:0".
        dtype: of the U-Net.

    Raises:
        DoriError: nothing there, a pipeline that Dori does not read, code or pickles in the checkpoint, parts that
            are missing, torn, not finite or do not fit each other, no such device.
    """
    target = usable_device(device)
    path = Path(spec)
    if path.suffix in PICKLES:
        raise DoriError(f"{spec} may hold a pickle, which can run code; {CONVERT}")
    if path.is_file():
        parts = _read_single_file(path)
    elif spec.strip() and path.is_dir():
        parts = _read_folder(path, spec)
    elif HUB_ID.fullmatch(spec):
        parts = _read_folder(_download(spec), spec)
    else:
        raise DoriError(
            f"there is no model at {spec!r}; give a diffusers folder, a .safetensors file or a hub id like owner/name"
        )
    _check_fit(spec, parts)
    for name in WEIGHTS:
        # torch's own `to`: diffusers' override warns of float32 modules that these classes do not have.
        nn.Module.to(parts[name], target, dtype if name == "unet" else torch.float32)
    return ADAPTERS["StableDiffusionPipeline"](**parts, name=spec)


def model_fingerprint(model: StableDiffusion) -> str:
    """SHA-256 over the weights (names, shapes, types, bytes) and the settings that change what the model answers.

    It depends on what is loaded, not on the file it came from; a U-Net in another dtype is another model.
    """
    modules = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    parts: dict[str, Any] = {name: tensors_sha256(module.state_dict()) for name, module in modules.items()}
    parts |= {f"{name}.config": plain_config(module.config) for name, module in modules.items()}
    parts["scheduler.config"] = plain_config(model.scheduler_config)
    parts["alphas_cumprod"] = tensors_sha256({"alphas_cumprod": model.alphas_cumprod})
    parts["vocabulary"] = model.tokenizer.get_vocab()
    return canonical_sha256(parts)


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration without what does not change the answers: paths, versions, and the type of stored weights."""
    fields = config if isinstance(config, Mapping) else config.to_dict()
    plain = {str(key): plain_config(value) if isinstance(value, Mapping) else value for key, value in fields.items()}
    left_out = ("architectures", "dtype", "torch_dtype", "transformers_version")
    return {key: value for key, value in plain.items() if not key.startswith("_") and key not in left_out}


# ------------------------------------------------------------------------------------------------------- folders


def _read_folder(folder: Path, spec: str) -> dict[str, Any]:
    index = _vet_index(_json(folder / "model_index.json", spec), spec)
    for part in PARTS:
        _vet_part(folder, part, spec)
    opened = {
        "unet": _open_weights(UNet2DConditionModel, folder, "unet", spec),
        "vae": _open_weights(AutoencoderKL, folder, "vae", spec),
        "text_encoder": _open_weights(CLIPTextModel, folder, "text_encoder", spec),
    }
    for part, kind in (("tokenizer", CLIPTokenizer), ("scheduler", getattr(diffusers, index["scheduler"][1]))):
        try:
            opened[part] = kind.from_pretrained(str(folder / part), local_files_only=True)
        except LIBRARY_ERRORS as error:
            raise _damaged(spec, part, error) from None
    return opened


def _vet_index(index: dict[str, Any], spec: str) -> dict[str, Any]:
    """`model_index.json`, if it names a pipeline that Dori reads and nothing but the libraries' own classes."""
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in ADAPTERS:
        raise DoriError(f"{spec} is a {kind!r:.80}; Dori reads {', '.join(ADAPTERS)}")
    for name in ("auto_map", "trust_remote_code", "custom_pipeline"):
        if name in index:
            raise DoriError(
                f"{spec} asks for code of its own ({name} in model_index.json), which Dori never runs; "
                "use a checkpoint of plain diffusers and transformers classes"
            )
    for name, entry in index.items():
        if name.startswith("_") or name in NOT_LOADED or not isinstance(entry, list):
            continue
        library, classes = PARTS.get(name, (None, ()))
        if library is None and entry in ([None, None], []):
            continue
        if len(entry) != 2 or entry[0] != library or entry[1] not in classes:
            raise DoriError(
                f"{spec} names {entry!r:.80} as its {name!r:.40} in model_index.json; Dori opens only "
                f"{' or '.join(classes) or 'the parts of a StableDiffusionPipeline'} there"
            )
    for part in PARTS:
        if not isinstance(index.get(part), list):
            raise DoriError(f"{spec} has no {part} in model_index.json; fetch or save the whole pipeline")
    return index


def _vet_part(folder: Path, part: str, spec: str) -> None:
    """Refuse a part that is missing, brings code, is quantised, or has weights in anything but safetensors."""
    _vet_configs(folder, part, spec)
    if part in WEIGHTS:
        _vet_weights(folder / part, WEIGHTS[part], spec)


def _vet_configs(folder: Path, part: str, spec: str) -> None:
    place = folder / part
    if not place.is_dir():
        raise DoriError(f"{spec} has no folder {part}; fetch or save the whole pipeline")
    for path in sorted(place.glob("*.json")):
        config = _json(path, spec)
        for name in ("auto_map", "trust_remote_code", "quantization_config", "custom_pipeline"):
            if config.get(name):
                raise DoriError(
                    f"{spec} has {name} in {part}/{path.name}, which can bring foreign code; use a plain checkpoint"
                )
    # Without its words the tokenizer opens all the same, and knows nothing.
    if part == "tokenizer" and not any((place / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise DoriError(f"{spec} has neither tokenizer.json nor vocab.json in tokenizer; fetch it again")
    if (place / "adapter_config.json").exists():
        raise DoriError(
            f"{spec} has an adapter in {part} (adapter_config.json), which points to another model; merge it first"
        )


def _vet_weights(place: Path, stem: str, spec: str) -> None:
    index = place / f"{stem}.safetensors.index.json"
    if index.is_file():  # shards: the loaders choose their reader by the ending of the names in here
        shards = _json(index, spec).get("weight_map")
        names = (
            set(shards.values())
            if isinstance(shards, dict) and all(isinstance(shard, str) for shard in shards.values())
            else {""}
        )
        if not all(re.fullmatch(rf"{stem}-\d+-of-\d+\.safetensors", name) for name in names):
            raise DoriError(
                f"{spec} lists weights in {place.name}/{index.name} that are no safetensors beside it; "
                "fetch it again from a source that you trust"
            )
    else:
        names = {f"{stem}.safetensors"}
    missing = sorted(name for name in names if not (place / name).is_file())
    if missing:
        pickled = any(path.suffix in PICKLES for path in place.iterdir())
        mend = (
            f"its weights are pickles, which can run code; {CONVERT}"
            if pickled
            else (
                "weights under another name, pickles and variants such as fp16 are not read, so fetch the safetensors"
            )
        )
        raise DoriError(f"{spec} has no {place.name}/{missing[0]}; {mend}")


def _open_weights(kind: Any, folder: Path, part: str, spec: str) -> Any:
    """One part, if its file fills every weight that its configuration asks for."""
    try:
        module, report = kind.from_pretrained(
            str(folder / part), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except LIBRARY_ERRORS as error:
        raise _damaged(spec, part, error) from None
    wrong = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if wrong:
        raise _lacking(spec, part, wrong)
    if part != "text_encoder" and report["unexpected_keys"]:  # old text encoders carry harmless buffers
        raise DoriError(
            f"{spec}: the file of {part} holds {len(report['unexpected_keys'])} weights that its "
            f"configuration does not know ({sorted(report['unexpected_keys'])[0]}), so it would answer "
            "differently here; fetch a config.json that fits"
        )
    return module


# ----------------------------------------------------------------------------------------------- hub, single file


def _download(repository: str, *, weights: bool = True) -> Path:
    """The vetted parts of a hub repository, from the hub or its cache; pickles and code are not even fetched."""
    patterns = ["model_index.json"]
    for part in PARTS:
        patterns += [f"{part}/*.json", f"{part}/*.txt"]
    for part, stem in WEIGHTS.items():
        if weights:
            patterns += [f"{part}/{stem}.safetensors", f"{part}/{stem}-*-of-*.safetensors"]
    try:
        first = Path(snapshot_download(repository, allow_patterns=patterns[:1]))
        _vet_index(_json(first / "model_index.json", repository), repository)
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:  # a missing cache entry is one of the latter two
        raise DoriError(
            f"{repository!r} is no folder here and could not be fetched from the hub ({_reason(error)}); "
            "check the name and the network, or give a local diffusers folder"
        ) from None


def _read_single_file(path: Path) -> dict[str, Any]:
    """The parts of an SD 1.x or 2.x checkpoint in one file, in the layout of its authors."""
    if path.suffix != ".safetensors":
        raise DoriError(f"{path} is no .safetensors file; give a diffusers folder or a .safetensors file")
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DoriError(f"{path} is no whole safetensors file ({_reason(error)}); fetch it again") from None
    for prefix in ("model.diffusion_model.", "first_stage_model.", "cond_stage_model."):
        if not any(name.startswith(prefix) for name in weights):
            raise DoriError(
                f"{path} holds no {prefix}* weights, so it is no whole SD 1.x or 2.x pipeline; give a "
                "diffusers folder instead"
            )
    # The file brings no configuration: diffusers knows by the weights which published model it is like.
    config = _download(fetch_diffusers_config(weights)["pretrained_model_name_or_path"], weights=False)
    for part in PARTS:
        _vet_configs(config, part, str(path))
    try:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(path), config=str(config), local_files_only=True, safety_checker=None, feature_extractor=None
        )
    except LIBRARY_ERRORS as error:
        raise _damaged(str(path), "the checkpoint", error) from None
    for part in WEIGHTS:
        lacking = [name for name, weight in getattr(pipeline, part).named_parameters() if weight.is_meta]
        if lacking:
            raise _lacking(str(path), part, lacking)
    return {part: getattr(pipeline, part) for part in PARTS}


# --------------------------------------------------------------------------------------------------------- checks


def _check_fit(spec: str, parts: dict[str, Any]) -> None:
    """Refuse parts that are sound by themselves and do not belong together."""
    unet, vae, encoder = parts["unet"].config, parts["vae"].config, parts["text_encoder"].config
    if encoder.hidden_size != unet.cross_attention_dim:
        raise DoriError(
            f"{spec}: the text encoder gives {encoder.hidden_size} numbers a token and the U-Net reads "
            f"{unet.cross_attention_dim}; put together parts of one model"
        )
    if not vae.latent_channels == unet.in_channels == unet.out_channels:
        raise DoriError(
            f"{spec}: the VAE gives {vae.latent_channels} channels, the U-Net reads {unet.in_channels} "
            f"and gives {unet.out_channels}; Dori reads plain text-to-image models, no inpainting or "
            "depth variants"
        )
    if type(unet.sample_size) is not int:
        raise DoriError(
            f"{spec}: the U-Net's sample_size is {unet.sample_size!r:.40}; Dori reads square models, so "
            "write one whole number into unet/config.json"
        )
    for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if unet.get(name) is not None:
            raise DoriError(
                f"{spec}: the U-Net wants a further condition ({name}); Dori reads models that see the prompt alone"
            )
    if len(parts["tokenizer"]) > encoder.vocab_size:
        raise DoriError(
            f"{spec}: the tokenizer knows {len(parts['tokenizer'])} tokens and the text encoder "
            f"{encoder.vocab_size}; put together parts of one model"
        )


def usable_device(name: str) -> torch.device:
    """The device of this name, on which something can be stored.

    Raises:
        DoriError: there is none.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DoriError(f"device {name!r} cannot be used ({_reason(error)}); try cpu or cuda") from None
    return device


def _json(path: Path, spec: str) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise FileNotFoundError
        if path.stat().st_size > JSON_BYTES:
            raise ValueError("too large")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DoriError(
            f"{spec} has no {path.name}, so it is no diffusers folder; give the folder that save_pretrained wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DoriError(f"{path} is no JSON ({_reason(error)}); fetch it again") from None
    if not isinstance(data, dict):
        raise DoriError(f"{path} is no JSON object; fetch it again")
    return data


def _reason(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:120]


def _lacking(spec: str, part: str, names: list[str]) -> DoriError:
    return DoriError(
        f"{spec}: the file of {part} lacks {len(names)} weights that its configuration asks for "
        f"({sorted(names)[0]}); fetch it again"
    )


def _damaged(spec: str, part: str, error: Exception) -> DoriError:
    return DoriError(f"{spec}: {part} cannot be opened ({type(error).__name__}: {_reason(error)}); fetch it again")
