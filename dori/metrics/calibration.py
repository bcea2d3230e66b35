"""Thresholds by measurement: copies against look-alikes that the descriptor has never seen.

The threshold lies where at most one look-alike in a thousand passes. Look-alikes are hard negatives by design
(`dori.metrics.copy_pairs`), so on unrelated images the false positive rate is lower. `compare_descriptors` sets
several descriptors before the same pairs, so that the choice among them is a measurement too.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dori.metrics.copy_pairs import GROUP, HELD_OUT, SIBLINGS, Pairs, RoundTrip, make_pairs, to_float
from dori.metrics.similarity import Calibration, Descriptor, cosine
from dori.stats import area_under_roc, threshold_at_fpr, tpr_at_fpr

NEGATIVES_PER_GROUP = 3 * SIBLINGS * (SIBLINGS + 1)


def _pixels(images: Tensor) -> Tensor:
    x = functional.interpolate(images, (32, 32), mode="bilinear", antialias=True, align_corners=False).flatten(1)
    return x - x.mean(dim=1, keepdim=True)


# The judge of the testbed's feasibility run, with the threshold used there: a weak baseline.
PIXEL_CORRELATION = Descriptor("pixel-correlation-32", "32 x 32, bilinear with antialiasing, mean subtracted", _pixels,
                               threshold=0.7)


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


def calibrate(descriptor: Descriptor, round_trip: RoundTrip, *, seed: int, negatives: int = 100_000,
              fpr: float = 0.001) -> Descriptor:
    """The descriptor with the threshold that a share `fpr` of held-out look-alikes exceeds.

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
    threshold = threshold_at_fpr(other, fpr)
    measured = Calibration(
        false_positive_rate=float((other > threshold).mean()), true_positive_rate=float((same > threshold).mean()),
        negative_pairs=len(other), positive_pairs=len(same),
        measured_on=f"{groups} held-out groups of {GROUP} look-alike scenes of the testbed, their copies through a "
                    f"VAE with drift of place, colour and sharpness, seed {seed}")
    return dataclasses.replace(descriptor, threshold=threshold, calibration=measured)


def compare_descriptors(descriptors: Sequence[Descriptor], round_trip: RoundTrip, *, seed: int,
                        groups: int = 300) -> tuple[Comparison, ...]:
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
        rows.append(Comparison(descriptor.name, tpr_at_fpr(same, other, fpr=0.001), area_under_roc(same, other),
                               float(hits)))
    return tuple(rows)
