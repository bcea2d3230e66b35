"""The image preprocessings under which SSCD figures were published; their numbers may not share a table.

Published code resizes PIL images, that is, with antialiasing and rounding to bytes; here floats are resized with
antialiasing and not rounded, a difference below one grey level. Sources: methods.md 6.2, field.md section 10.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from dori.errors import DoriError

Colour = tuple[float, float, float]
IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)
HALF: Colour = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize, cut, normalise.

    Args:
        name: how it is chosen and reported.
        source: who published figures with it.
        resize: an int scales the short side to it and keeps the aspect; a pair is (height, width), aspect ignored.
        crop: side of the centre crop in pixels, or None.
        mean: subtracted from each colour.
        std: divides each colour.
        interpolation: filter of the resize.
    """

    name: str
    source: str
    resize: int | tuple[int, int]
    crop: int | None
    mean: Colour
    std: Colour
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __call__(self, images: Tensor) -> Tensor:
        """Network input of images in [0, 1], shape (n, 3, H, W)."""
        x = functional.interpolate(
            images, self._size(images), mode=self.interpolation, antialias=True, align_corners=False
        ).clamp(0, 1)
        if self.crop is not None:
            top, left = (round((length - self.crop) / 2) for length in x.shape[2:])
            x = x[..., top : top + self.crop, left : left + self.crop]
        mean, std = (torch.tensor(c, dtype=x.dtype, device=x.device)[:, None, None] for c in (self.mean, self.std))
        return (x - mean) / std

    def _size(self, images: Tensor) -> tuple[int, int]:
        if not isinstance(self.resize, int):
            return self.resize
        height, width = images.shape[2:]
        short = min(height, width)
        return self.resize * height // short, self.resize * width // short


SMALL_288 = Preprocessing(
    "small_288",
    "SSCD authors (Pizzi et al., CVPR 2022), recommended: short side 288",
    288,
    None,
    IMAGENET_MEAN,
    IMAGENET_STD,
)
SKEW_320 = Preprocessing(
    "skew_320",
    "NeMo (and SSCD authors' second choice): 320 x 320, aspect ignored",
    (320, 320),
    None,
    IMAGENET_MEAN,
    IMAGENET_STD,
)
CROP_224 = Preprocessing(
    "crop_224",
    "Wen et al. and Chavhan et al., there with the weights sscd_disc_large: "
    "short side 256, centre crop 224, mean and std 0.5",
    256,
    224,
    HALF,
    HALF,
)
PREPROCESSINGS = {p.name: p for p in (SMALL_288, SKEW_320, CROP_224)}


def preprocessing(name: str) -> Preprocessing:
    """The named preprocessing.

    Raises:
        DoriError: no such name; the message lists them.
    """
    if name not in PREPROCESSINGS:
        raise DoriError(f"there is no SSCD preprocessing {name!r}; choose one of {', '.join(PREPROCESSINGS)}")
    return PREPROCESSINGS[name]
