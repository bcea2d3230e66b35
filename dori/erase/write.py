"""Write a model out as other tools read it: a diffusers folder, or the single file that it came from with new weights.

Only the U-Net differs from the model that was opened; every other part is written as it is.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from dori.errors import DoriError
from dori.model.load import NOT_LOADED, PARTS, SCHEDULERS
from dori.model.stable_diffusion import StableDiffusion
from dori.run import PARTIAL, write_bytes, write_json
from dori.tensor_file import read_tensors

UNET = "model.diffusion_model."


def check_target(target: Path, *, source: str) -> None:
    """Refuse a place where `save_model` could not write, before anything is computed.

    Args:
        target: a folder to make, or a `.safetensors` file if the model was opened from one.
        source: where the model was opened from: a folder, a hub id or a `.safetensors` file.

    Raises:
        DoriError: the target exists, or a single file is asked of a model that was opened from a folder.
    """
    if target.exists():
        raise DoriError(f"{target} exists; name a place that does not, so that no model is overwritten")
    if target.suffix == ".safetensors" and not (Path(source).suffix == ".safetensors" and Path(source).is_file()):
        raise DoriError(
            f"{target} would be a single file, and the model was opened from {source!r}; name a folder to write, or "
            "give the model as a .safetensors file"
        )


def save_model(model: StableDiffusion, target: Path, *, source: str) -> bool:
    """Write the model as it is now, edits put on; a single file's weights in the precision that they had there.

    Args:
        model: the model.
        target: as in `check_target`.
        source: as in `check_target`.

    Returns:
        Whether weights were rounded, so that the file's are not quite the model's.

    Raises:
        DoriError: as `check_target`, or the place cannot be written.
    """
    check_target(target, source=source)
    if target.suffix == ".safetensors":
        return _save_file(model, target, Path(source))
    _save_folder(model, target)
    return False


def _save_folder(model: StableDiffusion, target: Path) -> None:
    # Part by part: the pipeline's own save would first "correct" the scheduler's settings.
    kind = str(model.scheduler_config.get("_class_name", "DDIMScheduler"))
    scheduler = getattr(diffusers, kind if kind in SCHEDULERS else "DDIMScheduler").from_config(model.scheduler_config)
    parts = {
        "unet": model.unet,
        "vae": model.vae,
        "text_encoder": model.text_encoder,
        "tokenizer": model.tokenizer,
        "scheduler": scheduler,
    }
    index: dict[str, object] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "requires_safety_checker": False,
    }
    index |= {name: [PARTS[name][0], type(part).__name__] for name, part in parts.items()}
    index |= {name: [None, None] for name in NOT_LOADED}
    partial = target.with_name(f".{target.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, part in parts.items():
            part.save_pretrained(partial / name)
        write_json(partial / "model_index.json", index)
        partial.replace(target)
    except (OSError, SafetensorError) as error:  # a full disk reaches the writer of weights as the latter
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DoriError(f"{target} cannot be written ({reason}); free some space or name another place") from None


def _save_file(model: StableDiffusion, target: Path, source: Path) -> bool:
    header, tensors = read_tensors(source, what="the model that was erased", mend="restore it")
    weights, rounded = model.unet.state_dict(), False
    for key, name in unet_names(tensors, dict(model.unet.config)).items():
        rounded |= tensors[key].element_size() < weights[name].element_size()
        tensors[key] = weights[name].detach().to("cpu", tensors[key].dtype).reshape(tensors[key].shape).contiguous()
    write_bytes(target, save(tensors, metadata=header))
    return rounded


def unet_names(checkpoint: Mapping[str, Tensor], config: Mapping[str, object]) -> dict[str, str]:
    """Name of each U-Net weight in a single file (SD's own layout) to its name in diffusers.

    Found by sending numbered markers through diffusers' own conversion, so that the two cannot disagree.
    """
    names = [key for key in checkpoint if key.startswith(UNET)]
    markers = {key: torch.tensor(index) for index, key in enumerate(names)}
    converted = convert_ldm_unet_checkpoint(markers, config)
    return {names[int(marker)]: name for name, marker in converted.items()}
