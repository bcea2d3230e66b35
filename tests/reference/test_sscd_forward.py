"""SSCD's forward pass against an independent one in float64, and the files that must be refused.

The weights are random numbers in the published form, so nothing here is SSCD; the arithmetic is.
"""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from dori.errors import DoriError
from dori.metrics.preprocessing import CROP_224, PREPROCESSINGS, SKEW_320, SMALL_288
from dori.metrics.sscd import convert, load_sscd

State = dict[str, Tensor]


def published_form(seed: int = 0) -> State:
    """Random weights with the names and shapes of torchvision's ResNet-50, written out from its architecture."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def convolution(name: str, norm: str, out: int, into: int, side: int) -> None:
        scale = math.sqrt(2 / (into * side * side))
        state[f"{name}.weight"] = torch.randn(out, into, side, side, generator=generator) * scale
        state[f"{norm}.weight"] = torch.rand(out, generator=generator) * 0.5 + 0.5
        state[f"{norm}.bias"] = torch.randn(out, generator=generator) * 0.1
        state[f"{norm}.running_mean"] = torch.randn(out, generator=generator) * 0.1
        state[f"{norm}.running_var"] = torch.rand(out, generator=generator) + 0.5
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    convolution("backbone.conv1", "backbone.bn1", 64, 3, 7)
    into = 64
    for stage, (depth, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(depth):
            p = f"backbone.layer{stage}.{block}"
            convolution(f"{p}.conv1", f"{p}.bn1", width, into, 1)
            convolution(f"{p}.conv2", f"{p}.bn2", width, width, 3)
            convolution(f"{p}.conv3", f"{p}.bn3", 4 * width, width, 1)
            if block == 0:
                convolution(f"{p}.downsample.0", f"{p}.downsample.1", 4 * width, into, 1)
            into = 4 * width
    state["backbone.fc.weight"] = torch.randn(512, 2048, generator=generator) / math.sqrt(2048)
    state["backbone.fc.bias"] = torch.randn(512, generator=generator) * 0.1
    return state


def reference_forward(state: State, x: Tensor) -> Tensor:
    """The network in float64 from functional calls on the published names alone."""
    state = {key: value.double() for key, value in state.items()}

    def layer(x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        weight = state[f"backbone.{name}.weight"]
        x = functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var = (state[f"backbone.{norm}.running_{k}"][:, None, None] for k in ("mean", "var"))
        x = (x - mean) / (var + 1e-5).sqrt()
        return x * state[f"backbone.{norm}.weight"][:, None, None] + state[f"backbone.{norm}.bias"][:, None, None]

    x = functional.max_pool2d(layer(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
    for stage, depth in enumerate((3, 4, 6, 3), start=1):
        for block in range(depth):
            p, stride = f"layer{stage}.{block}", 2 if block == 0 and stage > 1 else 1
            y = layer(x, f"{p}.conv1", f"{p}.bn1").relu()
            y = layer(y, f"{p}.conv2", f"{p}.bn2", stride).relu()
            y = layer(y, f"{p}.conv3", f"{p}.bn3")
            shortcut = layer(x, f"{p}.downsample.0", f"{p}.downsample.1", stride) if block == 0 else x
            x = (y + shortcut).relu()
    pooled = (x.clamp(min=1e-6) ** 3).flatten(2).mean(dim=2) ** (1 / 3)
    y = pooled @ state["backbone.fc.weight"].T + state["backbone.fc.bias"]
    return y / y.square().sum(dim=1, keepdim=True).sqrt()


@pytest.fixture(scope="module")
def state() -> State:
    """One set of random weights."""
    return published_form()


def stored(state: object, folder: Path) -> Path:
    """The object as a pickle, as SSCD is published."""
    path = folder / "sscd_disc_mixup.torchvision.pt"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["small_288", "skew_320", "crop_224"])
def test_load_sscd_is_the_published_network(name: str, state: State, tmp_path: Path) -> None:
    convert(stored(state, tmp_path), tmp_path / "sscd.safetensors")
    descriptor = load_sscd(tmp_path / "sscd.safetensors", preprocessing=name)
    images = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(1))
    found = descriptor(images)
    expected = reference_forward(state, PREPROCESSINGS[name](images.double()))
    assert found.shape == (1, 512)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)
    assert descriptor.preprocessing == name


def test_convert_records_the_hash_of_the_file_it_read(state: State, tmp_path: Path) -> None:
    source, target = stored(state, tmp_path), tmp_path / "sscd.safetensors"
    digest = convert(source, target, name="sscd_disc_blur")
    assert digest == hashlib.sha256(source.read_bytes()).hexdigest()
    descriptor = load_sscd(target, preprocessing="skew_320")
    assert (descriptor.name, descriptor.fingerprint) == ("sscd_disc_blur", digest)
    with safe_open(target, "pt") as file:
        assert torch.equal(file.get_tensor("backbone.fc.weight"), state["backbone.fc.weight"])
    assert [p.name for p in tmp_path.glob("*.partial")] == []


def test_the_name_is_the_files_or_given_and_never_made_up(state: State, tmp_path: Path) -> None:
    target, source = tmp_path / "sscd.safetensors", stored(state, tmp_path)
    convert(source, target)
    with safe_open(target, "pt") as file:
        assert (file.metadata() or {})["name"] == "sscd_disc_mixup"
    target.unlink()
    unnamed = source.rename(tmp_path / "weights.pt")
    for name in (None, "mixup", "sscd_", "sscd_<b>"):
        with pytest.raises(DoriError, match="names no published SSCD weights; .* --name"):
            convert(unnamed, target, name=name)
    assert not target.exists()


def test_a_place_that_cannot_be_written_is_one_sentence(state: State, tmp_path: Path) -> None:
    source = stored(state, tmp_path)
    with pytest.raises(DoriError, match="cannot be written"):
        convert(source, source / "sscd.safetensors")


def refused(file: Path, match: str) -> None:
    """`convert` raises one sentence and writes nothing."""
    with pytest.raises(DoriError, match=match) as caught:
        convert(file, file.with_suffix(".safetensors"))
    assert "\n" not in str(caught.value)
    assert not file.with_suffix(".safetensors").exists()


def test_convert_refuses_other_names_and_shapes(state: State, tmp_path: Path) -> None:
    state = {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}  # small files
    without = {key: value for key, value in state.items() if key != "backbone.layer3.5.conv2.weight"}
    refused(stored(without, tmp_path), "lacks backbone.layer3.5.conv2.weight")
    refused(stored(state | {"backbone.extra": torch.zeros(1)}, tmp_path), "also holds backbone.extra")
    refused(stored(state | {"backbone.fc.bias": torch.zeros(1024)}, tmp_path), r"backbone.fc.bias is \(1024,\)")
    refused(stored(state | {"backbone.fc.bias": "zeros"}, tmp_path), "backbone.fc.bias is str")
    refused(stored(state | {"backbone.fc.bias": torch.full((512,), math.nan)}, tmp_path), "not finite")
    refused(stored({key.removeprefix("backbone."): v for key, v in state.items()}, tmp_path), "lacks backbone.conv1")
    refused(stored([1, 2], tmp_path), "holds a list and no state dict")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_convert_refuses_files_that_would_run_code(tmp_path: Path) -> None:
    traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    torch.jit.save(traced, tmp_path / "script.pt")
    refused(tmp_path / "script.pt", "is no plain state dict")
    refused(stored(nn.Linear(2, 2), tmp_path), "is no plain state dict")
    (tmp_path / "text.pt").write_text("no weights here")
    refused(tmp_path / "text.pt", "is no plain state dict")
    refused(tmp_path / "absent.pt", "cannot be read")


def test_load_sscd_refuses_other_files_and_names(tmp_path: Path) -> None:
    stored({}, tmp_path)
    with pytest.raises(DoriError, match="small_288, skew_320, crop_224"):
        load_sscd(tmp_path / "weights.pt", preprocessing="center")
    with pytest.raises(DoriError, match="convert the SSCD file first"):
        load_sscd(tmp_path / "weights.pt", preprocessing="skew_320")
    with pytest.raises(DoriError, match="convert the SSCD file first"):
        load_sscd(tmp_path / "absent.safetensors", preprocessing="skew_320")


def test_preprocessings_have_their_published_sizes() -> None:
    images = torch.rand(1, 3, 100, 150, generator=torch.Generator().manual_seed(0))
    assert SMALL_288(images).shape == (1, 3, 288, 432)
    assert SKEW_320(images).shape == (1, 3, 320, 320)
    assert CROP_224(images).shape == (1, 3, 224, 224)
    white = torch.ones(1, 3, 64, 64)
    torch.testing.assert_close(CROP_224(white), torch.ones(1, 3, 224, 224))
    expected = ((1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]))[:, None, None]
    torch.testing.assert_close(SKEW_320(white), expected.expand(1, 3, 320, 320))


def test_crop_takes_the_centre() -> None:
    ramp = torch.linspace(0, 1, 256).expand(1, 3, 256, 256)  # resize to 256 changes nothing
    torch.testing.assert_close(CROP_224(ramp), ramp[..., 16:240, 16:240] * 2 - 1)
