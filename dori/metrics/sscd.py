"""SSCD, the copy descriptor of the literature (Pizzi et al., CVPR 2022), from weights that the user has.

A ResNet-50 whose pooling is GeM with p = 3 and whose last layer maps to 512 dimensions, of unit norm. The weights
(`sscd_disc_mixup` and its siblings of the same shape) are published as pickles and not shipped here. `convert` reads
such a file once, without running any code in it, and writes safetensors; `load_sscd` runs the network on
transformers' ResNet. The tensor names are those of torchvision's form: `backbone.conv1.weight` to
`backbone.fc.bias`.
"""

import hashlib
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional
from transformers import ResNetConfig, ResNetModel

from dori.errors import READER_ERRORS, DoriError
from dori.metrics.preprocessing import preprocessing as named_preprocessing
from dori.metrics.similarity import Descriptor
from dori.run import write_bytes
from dori.tensor_file import read_tensors

KIND = "sscd-resnet50"
DEPTHS = (3, 4, 6, 3)
WIDTHS = (256, 512, 1024, 2048)
DIMENSIONS = 512
GEM_POWER = 3.0
# Most papers call a cosine above 0.7 a replication; SSCD's authors report 90 % precision at 0.75 (methods.md 6.2).
PUBLISHED_THRESHOLD = 0.7
NAME = re.compile(r"sscd_[a-z0-9_]{1,40}")
# What torch's reader of state dicts raises on a file that is none.
BROKEN = (pickle.UnpicklingError, EOFError, *READER_ERRORS)
_NORM = ("weight", "bias", "running_mean", "running_var")


def _layers() -> Iterator[tuple[str, str, str]]:
    """Each convolution: its prefix in transformers, its torchvision name and that of its batch norm."""
    yield "embedder.embedder", "conv1", "bn1"
    for stage, depth in enumerate(DEPTHS):
        for block in range(depth):
            theirs, ours = f"layer{stage + 1}.{block}", f"encoder.stages.{stage}.layers.{block}"
            for index in range(3):
                yield f"{ours}.layer.{index}", f"{theirs}.conv{index + 1}", f"{theirs}.bn{index + 1}"
            if block == 0:
                yield f"{ours}.shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1"


def key_map() -> dict[str, str]:
    """Name in transformers' ResNetModel to name in the published state dict, without the last layer."""
    names = {}
    for ours, convolution, norm in _layers():
        names[f"{ours}.convolution.weight"] = f"backbone.{convolution}.weight"
        names |= {f"{ours}.normalization.{part}": f"backbone.{norm}.{part}" for part in _NORM}
    return names


def _network() -> ResNetModel:
    """The backbone without memory for its weights."""
    config = ResNetConfig(
        embedding_size=64,
        hidden_sizes=list(WIDTHS),
        depths=list(DEPTHS),
        layer_type="bottleneck",
        hidden_act="relu",
        downsample_in_first_stage=False,
        downsample_in_bottleneck=False,
    )  # torchvision strides in the 3 x 3 convolution
    with torch.device("meta"):
        return ResNetModel(config)


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor that the state dict must hold, and its shape."""
    ours = _network().state_dict()
    shapes = {theirs: tuple(ours[name].shape) for name, theirs in key_map().items()}
    return shapes | {"backbone.fc.weight": (DIMENSIONS, WIDTHS[-1]), "backbone.fc.bias": (DIMENSIONS,)}


def _checked(state: Any, path: Path) -> dict[str, Tensor]:
    wanted = expected_shapes()
    mend = "give the published torchvision form of a 512-dimensional SSCD ResNet-50"
    if not isinstance(state, Mapping):
        raise DoriError(f"{path} holds a {type(state).__name__} and no state dict; {mend}")
    # Batch counters play no part in inference; everything else must be there and nothing beside it.
    state = {key: value for key, value in state.items() if not str(key).endswith("num_batches_tracked")}
    missing, strange = [k for k in wanted if k not in state], [k for k in state if k not in wanted]
    if missing or strange:
        example = f"lacks {missing[0]}" if missing else f"also holds {strange[0]}"
        raise DoriError(f"{path} {example} ({len(missing)} tensors missing, {len(strange)} unknown); {mend}")
    for key, shape in wanted.items():
        value = state[key]
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise DoriError(f"{path}: {key} is {found} where floats of shape {shape} belong; {mend}")
        if not torch.isfinite(value).all():
            raise DoriError(f"{path}: {key} holds a number that is not finite; the file is damaged, fetch it again")
    return {key: state[key].float().contiguous() for key in wanted}


def convert(path_in: Path, path_out: Path, *, name: str | None = None) -> str:
    """Turn the published pickle into safetensors, atomically; no code in the file is run.

    Args:
        path_in: state dict in torchvision's form, as published (`....torchvision.pt`).
        path_out: safetensors file to write.
        name: which weights these are, for reports, beginning with "sscd_"; the siblings have equal shapes, so it cannot
            be checked. None takes the file's name up to its first dot.

    Returns:
        SHA-256 of the file read, in hexadecimal. It is stored in the file written, and reports print it.

    Raises:
        DoriError: the file is missing, is no such state dict, or is a TorchScript archive; a name that is none; the
            target cannot be written.
    """
    try:
        digest = hashlib.sha256(path_in.read_bytes()).hexdigest()
    except OSError as error:
        raise DoriError(f"{path_in} cannot be read ({error.strerror}); give the SSCD file") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says it better
            state = torch.load(path_in, weights_only=True, map_location="cpu")
    except BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise DoriError(
            f"{path_in} is no plain state dict ({reason[:100]}); a TorchScript archive runs code and is "
            "not read, so give the published torchvision form"
        ) from None
    tensors = _checked(state, path_in)
    name = path_in.name.split(".")[0] if name is None else name
    if not NAME.fullmatch(name):
        raise DoriError(
            f"{name!r:.60} names no published SSCD weights; say which they are, such as --name sscd_disc_mixup"
        )
    write_bytes(path_out, save(tensors, metadata={"kind": KIND, "name": name, "source_sha256": digest}))
    return digest


def gem(features: Tensor, power: float = GEM_POWER) -> Tensor:
    """Generalised mean over the last two dimensions: mean(x^p)^(1/p), x at least 1e-6."""
    return features.clamp(min=1e-6).pow(power).mean(dim=(-2, -1)).pow(1 / power)


def load_sscd(path: Path, *, preprocessing: str, device: str = "cpu") -> Descriptor:
    """SSCD as a descriptor.

    Args:
        path: safetensors file that `convert` wrote.
        preprocessing: "small_288", "skew_320" or "crop_224" (see `dori.metrics.preprocessing`); it has no default,
            because figures under different ones do not compare.
        device: where the network runs.

    Raises:
        DoriError: no such file, another file, or no such preprocessing.
    """
    prepare = named_preprocessing(preprocessing)
    header, tensors = read_tensors(path, what="safetensors", mend="convert the SSCD file first")
    if header.get("kind") != KIND:
        raise DoriError(f"{path} holds no converted SSCD weights; convert the SSCD file first")
    tensors = _checked(tensors, path)
    network = _network()
    state = {ours: tensors[theirs] for ours, theirs in key_map().items()}
    state |= {key: torch.tensor(0) for key in network.state_dict() if key.endswith("num_batches_tracked")}
    network.load_state_dict(state, assign=True)
    network.eval().requires_grad_(False).to(device)
    weight, bias = (tensors[f"backbone.fc.{part}"].to(device) for part in ("weight", "bias"))

    def embed(images: Tensor) -> Tensor:
        return functional.linear(gem(network(prepare(images.to(device))).last_hidden_state), weight, bias)

    return Descriptor(
        name=header["name"],
        preprocessing=prepare.name,
        embed=embed,
        threshold=PUBLISHED_THRESHOLD,
        fingerprint=header["source_sha256"],
    )
