"""Thresholds by measurement: copies against look-alikes that the descriptor has never seen.

The threshold lies where at most one look-alike in a thousand passes. Look-alikes are hard negatives by design
(`dori.metrics.copy_pairs`), so on unrelated images the false positive rate is lower. Similarity blind to a box has a
threshold of its own (`calibrate_masked`), from pairs of which both images are painted alike. `compare_descriptors`
sets several descriptors before the same pairs, so that the choice among them is a measurement too.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dori.errors import DoriError
from dori.metrics.copy_pairs import GROUP, HELD_OUT, SIBLINGS, Pairs, RoundTrip, make_pairs, to_float
from dori.metrics.similarity import Box, Calibration, Descriptor, cosine, paint
from dori.stats import area_under_roc, threshold_at_fpr, tpr_at_fpr

NEGATIVES_PER_GROUP = 3 * SIBLINGS * (SIBLINGS + 1)
BOX_SHARE = (26 / 64, 38 / 64)  # of an image's side: the sizes of the testbed's objects
# Look-alikes whose difference lies within the box are no strangers but the same template: at least this share of the
# image must differ by this much outside it (an object covers a sixth of the image or more).
DIFFERENT_SHARE, DIFFERENT_BY = 0.1, 0.1


def _pixels(images: Tensor) -> Tensor:
    x = functional.interpolate(images, (32, 32), mode="bilinear", antialias=True, align_corners=False).flatten(1)
    return x - x.mean(dim=1, keepdim=True)


# The judge of the testbed's feasibility run, with the threshold used there: a weak baseline.
PIXEL_CORRELATION = Descriptor(
    "pixel-correlation-32", "32 x 32, bilinear with antialiasing, mean subtracted", _pixels, threshold=0.7
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One descriptor on the common pairs.

    Args:
        name: of the descriptor.
        true_positive_rate: share of copies above the threshold that 0.1 % of the look-alikes exceed.
        auroc: copies against look-alikes.
        recall_at_1: share of copies whose nearest image, among all and all look-alikes, is their own original.
    """

    name: str
    true_positive_rate: float
    auroc: float
    recall_at_1: float


def _describe(descriptor: Descriptor, images: Tensor) -> Tensor:
    return torch.cat([descriptor(to_float(part)) for part in images.split(256)]).cpu()


def _scores(pairs: Pairs, images: Tensor, copies: Tensor) -> tuple[np.ndarray, np.ndarray]:
    left, right = pairs.negatives.unbind(dim=1)
    return cosine(images, copies).double().numpy(), cosine(images[left], copies[right]).double().numpy()


def _calibrated(same: np.ndarray, other: np.ndarray, fpr: float, measured_on: str) -> tuple[float, Calibration]:
    threshold = threshold_at_fpr(other, fpr)
    return threshold, Calibration(
        false_positive_rate=float((other > threshold).mean()),
        true_positive_rate=float((same > threshold).mean()),
        negative_pairs=len(other),
        positive_pairs=len(same),
        measured_on=measured_on,
    )


def calibrate(
    descriptor: Descriptor, round_trip: RoundTrip, *, seed: int, negatives: int = 100_000, fpr: float = 0.001
) -> Descriptor:
    """The descriptor with the thresholds that a share `fpr` of held-out look-alikes exceeds, whole and masked.

    Args:
        descriptor: the judge.
        round_trip: images in [0, 1], shape (n, 3, 64, 64), through the VAE and back.
        seed: of the pairs; they are never those of the training.
        negatives: number of look-alike pairs, at least; they come in groups of 36 from ten images.
        fpr: the false positive rate to keep.
    """
    groups = math.ceil(negatives / NEGATIVES_PER_GROUP)
    pairs = make_pairs(groups, round_trip, seed=seed, stream=HELD_OUT)
    same, other = _scores(pairs, _describe(descriptor, pairs.images), _describe(descriptor, pairs.copies))
    what = (
        f"{groups} held-out groups of {GROUP} look-alike scenes of the testbed, their copies through a VAE with "
        f"drift of place, colour and sharpness, seed {seed}"
    )
    threshold, measured = _calibrated(same, other, fpr, what)
    found = dataclasses.replace(descriptor, threshold=threshold, calibration=measured)
    boxes = random_boxes(pairs.images, seed=seed)
    strangers = pairs.negatives[differ_outside(pairs, boxes)]
    return calibrate_masked(
        found,
        pairs.images,
        boxes,
        copies=pairs.copies,
        strangers=pairs.copies,
        pairs=strangers,
        fpr=fpr,
        measured_on=f"{what}, a random box of {BOX_SHARE[0]:.0%} to {BOX_SHARE[1]:.0%} "
        "of the side painted over; pairs that differ within it left out",
    )


def random_boxes(images: Tensor, *, seed: int) -> list[Box]:
    """A square box of about the size of an object anywhere in each image of shape (n, 3, H, W)."""
    rng = np.random.default_rng([HELD_OUT, seed, 1])
    height, width = images.shape[-2:]
    low, high = (round(share * min(height, width)) for share in BOX_SHARE)
    boxes = []
    for side in rng.integers(low, high + 1, len(images)).tolist():
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        boxes.append((left, top, left + side, top + side))
    return boxes


def differ_outside(pairs: Pairs, boxes: Sequence[Box]) -> Tensor:
    """Which of the negative pairs show different images also outside the first one's box, shape (m,), boolean."""
    different = []
    for rows in pairs.negatives.split(1024):
        left, right = (to_float(pairs.images[column]) for column in rows.unbind(dim=1))
        painted = [paint(images, left, [boxes[row] for row in rows[:, 0]]) for images in (left, right)]
        apart = (painted[0] - painted[1]).abs().amax(dim=1) > DIFFERENT_BY
        different.append(apart.float().mean(dim=(1, 2)) >= DIFFERENT_SHARE)
    return torch.cat(different)


def calibrate_masked(
    descriptor: Descriptor,
    references: Tensor,
    boxes: Sequence[Box],
    *,
    copies: Tensor,
    strangers: Tensor,
    pairs: Tensor,
    measured_on: str,
    fpr: float = 0.001,
) -> Descriptor:
    """The descriptor with the threshold that a share `fpr` of strangers exceeds, painted as `masked_similarity` does.

    Works for anybody's images: references with the boxes of their templates, controls as strangers, all pairs.

    Args:
        descriptor: the judge.
        references: shape (n, 3, H, W), in [0, 1] or bytes.
        boxes: one a reference, as in `dori.metrics.similarity.paint`.
        copies: row i is a copy of reference i, for instance its way through the model's VAE and back; same shape.
        strangers: images that are no copies, shape (k, 3, H, W); any size of k.
        pairs: shape (m, 2): row of a reference and row of a stranger.
        measured_on: what the pairs are, in words.
        fpr: the false positive rate to keep; with m < 1/fpr the threshold is the largest value of a stranger.

    Raises:
        DoriError: no pair, or a box that covers all or nothing of an image.
    """
    if not len(pairs):
        raise DoriError(
            "a masked threshold needs pairs of a reference and a stranger, and there are none; give more "
            "controls, or boxes that leave something to compare"
        )

    def painted(images: Tensor, rows: Tensor, of: Tensor) -> Tensor:
        return torch.cat(
            [
                descriptor(paint(_floats(images[row]), _floats(references[one]), [boxes[k] for k in one]))
                for row, one in zip(rows.split(256), of.split(256), strict=True)
            ]
        ).cpu()

    everyone = torch.arange(len(references))
    ours = painted(references, everyone, everyone)
    same = cosine(painted(copies, everyone, everyone), ours)
    other = cosine(painted(strangers, pairs[:, 1], pairs[:, 0]), ours[pairs[:, 0]])
    threshold, measured = _calibrated(same.double().numpy(), other.double().numpy(), fpr, measured_on)
    return dataclasses.replace(descriptor, masked_threshold=threshold, masked_calibration=measured)


def _floats(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else to_float(images)


def compare_descriptors(
    descriptors: Sequence[Descriptor], round_trip: RoundTrip, *, seed: int, groups: int = 300
) -> tuple[Comparison, ...]:
    """Set descriptors before the same held-out pairs.

    Args:
        descriptors: the judges; their thresholds play no part.
        round_trip: as in `calibrate`.
        seed: of the pairs.
        groups: number of groups; each gives ten copies and 36 look-alike pairs.
    """
    pairs = make_pairs(groups, round_trip, seed=seed, stream=HELD_OUT)
    rows = []
    for descriptor in descriptors:
        images, copies = _describe(descriptor, pairs.images), _describe(descriptor, pairs.copies)
        same, other = _scores(pairs, images, copies)
        nearest = torch.cat([(part @ images.T).argmax(dim=1) for part in copies.split(1024)])
        hits = (nearest == torch.arange(len(copies))).double().mean()
        rows.append(
            Comparison(descriptor.name, tpr_at_fpr(same, other, fpr=0.001), area_under_roc(same, other), float(hits))
        )
    return tuple(rows)
