"""How like a reference an image is: copy descriptors, their cosine, and the same blind to a box.

A `Descriptor` carries everything without which its numbers mean nothing: preprocessing, weights, threshold and how
the threshold was measured (field.md section 10: two numbers with different settings may not share a table).
SSCD_Orig and SSCD_Gen of methods.md 6.2 are `similarity` and `cosine` here, with any descriptor.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dori.errors import DoriError

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a threshold was measured.

    Args:
        false_positive_rate: share of the negative pairs above the threshold.
        true_positive_rate: share of the held-out copies above it.
        negative_pairs: number of pairs that are no copies.
        positive_pairs: number of copies.
        measured_on: what the pairs were, in words.
    """

    false_positive_rate: float
    true_positive_rate: float
    negative_pairs: int
    positive_pairs: int
    measured_on: str


@dataclass(frozen=True, slots=True, eq=False)
class Descriptor:
    """A function from images to unit vectors whose cosine says whether one is a copy of the other.

    Args:
        name: how reports name it.
        preprocessing: what happens to an image first, in words.
        embed: images in [0, 1], shape (n, 3, H, W), to vectors (n, d) of any length; row by row.
        threshold: cosine above which a pair counts as a copy; NaN as long as none is known.
        calibration: where the threshold was measured, or None for one taken from the literature.
        fingerprint: SHA-256 of the weights; empty where there are none.
        masked_threshold: the same for `masked_similarity`, whose painted box lifts all values; NaN if none is known.
        masked_calibration: where the masked threshold was measured.
    """

    name: str
    preprocessing: str
    embed: Callable[[Tensor], Tensor]
    threshold: float
    calibration: Calibration | None = None
    fingerprint: str = ""
    masked_threshold: float = math.nan
    masked_calibration: Calibration | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Unit-norm descriptors, shape (n, d), of images in [0, 1], shape (n, 3, H, W).

        Raises:
            DoriError: another shape, or values outside [0, 1].
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise DoriError(
                f"{self.name} describes images of shape (n, 3, H, W), not {tuple(images.shape)}; "
                "put colour first and give a batch"
            )
        if not ((images >= 0) & (images <= 1)).all():
            raise DoriError(
                f"{self.name} describes images in [0, 1], and these reach from {images.min():.3g} to "
                f"{images.max():.3g}; rescale them"
            )
        return functional.normalize(torch.cat([self.embed(part) for part in images.split(64)]))

    def record(self) -> dict[str, Any]:
        """Everything but the function, as `audit.json` keeps it: a threshold that is not known becomes None."""
        return {
            "name": self.name,
            "preprocessing": self.preprocessing,
            "fingerprint": self.fingerprint,
            "threshold": _known(self.threshold),
            "masked_threshold": _known(self.masked_threshold),
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "masked_calibration": None if self.masked_calibration is None else asdict(self.masked_calibration),
        }


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last dimension; the others broadcast, so `cosine(a[:, None], b)` compares all pairs."""
    return (functional.normalize(a, dim=-1) * functional.normalize(b, dim=-1)).sum(-1)


def similarity(descriptor: Descriptor, images: Tensor, references: Tensor) -> Tensor:
    """Similarity of each image to a memory: the median cosine over its references (mid-point for an even count).

    Args:
        descriptor: the judge.
        images: generations in [0, 1], shape (n, 3, H, W).
        references: the memory's training images in [0, 1], shape (r, 3, h, w).

    Returns:
        Shape (n,), in [-1, 1].
    """
    return cosine(descriptor(images)[:, None], descriptor(references)).quantile(0.5, dim=1)


def paint(images: Tensor, references: Tensor, boxes: Sequence[Box]) -> Tensor:
    """The images with a box painted over, in the mean colour of a reference outside that box.

    Args:
        images: shape (n, 3, H, W).
        references: whose colour is taken, row by row; shape (n, 3, H, W).
        boxes: n times left, top, right, bottom in pixels, right and bottom excluded; the part outside is cut off.

    Raises:
        DoriError: a box covers all or nothing.
    """
    height, width = images.shape[-2:]
    left, top, right, bottom = torch.tensor(boxes, device=images.device).T[..., None]
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    hidden = ((y >= top) & (y < bottom))[:, None, :, None] & ((x >= left) & (x < right))[:, None, None, :]
    useless = hidden.flatten(1).all(dim=1) | ~hidden.flatten(1).any(dim=1)
    if useless.any():
        raise DoriError(
            f"box {boxes[int(useless.nonzero()[0])]} covers all or nothing of an image of "
            f"{height, width} pixels; give left, top, right, bottom of the part that varies"
        )
    fill = torch.where(hidden, 0, references).sum(dim=(2, 3), keepdim=True) / (~hidden).sum(dim=(2, 3), keepdim=True)
    return torch.where(hidden, fill.clamp(0, 1), images)  # rounding may carry the mean of a white image beyond 1


def masked_similarity(descriptor: Descriptor, images: Tensor, reference: Tensor, box: Box) -> Tensor:
    """Similarity blind to the part of a template memory that varies.

    The box is painted over in the images and in the reference, everywhere with one colour: the mean of the reference
    outside the box. Whatever was in the box can then neither raise nor lower the result. The painted box itself is
    equal in both, which lifts all similarities, those of strangers included: hold it against a threshold measured on
    strangers painted alike (`Descriptor.masked_threshold`), not against one measured on whole images.

    Args:
        descriptor: the judge.
        images: generations in [0, 1], shape (n, 3, H, W).
        reference: one training image, shape (3, H, W), of the images' size.
        box: as in `paint`.

    Returns:
        Shape (n,), in [-1, 1].

    Raises:
        DoriError: sizes differ, or the box leaves nothing or covers nothing.
    """
    if images.shape[1:] != reference.shape:
        raise DoriError(
            f"a box in pixels needs images of the reference's size {tuple(reference.shape)}, not "
            f"{tuple(images.shape[1:])}; resize the reference and its box first"
        )
    itself = reference[None]
    painted = paint(images, itself.expand_as(images), [box] * len(images))
    return cosine(descriptor(painted), descriptor(paint(itself, itself, [box])))
