"""The embedded copy descriptor, for everyone without SSCD's weights. It is not SSCD and does not stand in for it.

A small convolutional network for the testbed's images, trained by SSCD's recipe (`dori.metrics.copy_training`) on
copies that look like a diffusion model's. GeM pooling keeps a coarse grid of places: two pictures of the same
objects at other places are no copies of one another. The file carries its thresholds, for whole images and for
images with a box painted over, and how they were measured; on images unlike the testbed's neither the descriptor nor
the thresholds mean anything.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from dori.errors import DoriError
from dori.metrics.convolutions import initialised, trunk
from dori.metrics.similarity import Calibration, Descriptor
from dori.run import write_bytes
from dori.tensor_file import read_tensors

NAME = "dori-copy-64"
KIND = "copy-descriptor"
PREPROCESSING = "64 x 64, bilinear with antialiasing, aspect ignored, scaled to [-1, 1]"
SIDE_PX = 64
GRID = 4
DIMENSIONS = 256
GEM_POWER = 3.0
# Output channels and stride of each convolution: 64 pixels to a map of 8 x 8.
CONVOLUTIONS = ((32, 2), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1))


class CopyNetwork(nn.Module):
    """Six convolutions, GeM over a 4 x 4 grid, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk(CONVOLUTIONS)
        self.embeddings = nn.Linear(CONVOLUTIONS[-1][0] * GRID**2, DIMENSIONS)

    def forward(self, images: Tensor) -> Tensor:
        """Unit-norm descriptors, shape (n, 256), of images in [0, 1], shape (n, 3, H, W)."""
        images = images.to(self.embeddings.weight.device)
        x = functional.interpolate(images, (SIDE_PX, SIDE_PX), mode="bilinear", antialias=True, align_corners=False)
        x = self.trunk(x * 2 - 1)
        pooled = functional.adaptive_avg_pool2d(x.clamp(min=1e-6) ** GEM_POWER, GRID) ** (1 / GEM_POWER)
        return functional.normalize(self.embeddings(pooled.flatten(1)))


def new_network(seed: int) -> CopyNetwork:
    """The untrained network."""
    return initialised(CopyNetwork, seed)


def as_descriptor(network: CopyNetwork) -> Descriptor:
    """A network as a descriptor without a threshold, to be calibrated."""
    return Descriptor(NAME, PREPROCESSING, network.eval(), math.nan)


def save_copy_descriptor(path: Path, network: CopyNetwork, calibrated: Descriptor, details: Mapping[str, Any]) -> None:
    """Write weights, thresholds and calibrations as safetensors, atomically.

    Args:
        path: file to write.
        network: the trained network.
        calibrated: the same as a descriptor, after calibration.
        details: JSON-able settings of the training, stored beside the weights.

    Raises:
        DoriError: the descriptor is not calibrated.
    """
    if calibrated.calibration is None:
        raise DoriError(f"{path} would hold a descriptor without a threshold; calibrate it first")
    header = {
        "kind": KIND,
        "name": NAME,
        "threshold": repr(calibrated.threshold),
        "calibration": json.dumps(asdict(calibrated.calibration)),
        "details": json.dumps(details),
    }
    if calibrated.masked_calibration is not None:
        header |= {
            "masked_threshold": repr(calibrated.masked_threshold),
            "masked_calibration": json.dumps(asdict(calibrated.masked_calibration)),
        }
    write_bytes(path, save({key: value.contiguous() for key, value in network.state_dict().items()}, header))


def load_copy_descriptor(path: Path, *, device: str = "cpu") -> Descriptor:
    """Read the embedded descriptor.

    Args:
        path: file that `save_copy_descriptor` wrote.
        device: where the network runs.

    Raises:
        DoriError: no such file, or not a copy descriptor of this version.
    """
    mend = "give a descriptor that this version of Dori wrote"
    header, tensors = read_tensors(path, what="a copy descriptor", mend=mend)
    with torch.device("meta"):
        network = CopyNetwork()
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    if header.get("kind") != KIND or {key: value.shape for key, value in tensors.items()} != shapes:
        raise DoriError(f"{path} is no copy descriptor, or one of another shape; {mend}")
    network.load_state_dict(tensors, assign=True)
    network.requires_grad_(False).to(device)
    masked = header.get("masked_calibration")  # files written before there was one have none
    return dataclasses.replace(
        as_descriptor(network),
        fingerprint=hashlib.sha256(path.read_bytes()).hexdigest(),
        threshold=float(header["threshold"]),
        calibration=Calibration(**json.loads(header["calibration"])),
        masked_threshold=float(header.get("masked_threshold", math.nan)),
        masked_calibration=None if masked is None else Calibration(**json.loads(masked)),
    )
