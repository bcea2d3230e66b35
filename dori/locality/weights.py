"""Locality in weights: A_l(Y), how much the masks that a method gives for the embeddings of a set agree.

Source: methods.md 4.3. With M_l(y) the weights of layer l that the method would prune for y,

    A_l(Y) = mean over pairs i < j of |M_l(y_i) n M_l(y_j)| / |M_l(y_i) u M_l(y_j)|,    IoU := 1 if both are empty.

The rule for empty sets is the paper's. Since a method that selects nothing then agrees perfectly, the mean without such
pairs stands beside it, with their share. What masks of equal size share by chance is known in closed form.
Masks are boolean tensors or NumPy arrays; `DoriError` says of anything else what to give.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from dori.errors import DoriError
from dori.locality import given
from dori.locality.given import Array

COLUMNS = 1 << 20
PAIRS = 300  # of which the closed form is taken: their sizes differ little
SPAN = 12.0  # standard deviations of the hypergeometric distribution that are summed


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of the masks of one layer.

    Args:
        published: mean IoU over all pairs, two empty masks counting 1; NaN without pairs.
        without_empty: mean IoU over the pairs in which at least one mask is not empty; NaN if there is none.
        empty_share: share of the pairs in which both are empty.
        size: mean number of pruned weights.
        pairs: number of pairs.
    """

    published: float
    without_empty: float
    empty_share: float
    size: float
    pairs: int


def _masks(masks: Array, name: str = "masks") -> Tensor:
    """Masks (n, ...) as booleans (n, w)."""
    return given.booleans(masks, name).flatten(1)


def overlaps(first: Array, second: Array) -> tuple[Tensor, Tensor]:
    """|M_i n N_j| and |M_i u N_j| of boolean masks (n, ...) and (m, ...), each (n, m), float64, exact.

    Raises:
        DoriError: no booleans, or masks of different layers.
    """
    first, second = _masks(first, "first"), _masks(second, "second")
    if first.shape[1] != second.shape[1]:
        raise DoriError(
            f"masks of {first.shape[1]} and of {second.shape[1]} weights have no overlap; give masks of one layer"
        )
    both = torch.zeros(len(first), len(second), dtype=torch.float64)
    for part, other in zip(first.split(COLUMNS, dim=1), second.split(COLUMNS, dim=1), strict=True):
        both += (part.float() @ other.float().T).double()  # float32 counts exactly up to 2^24
    sizes, others = (masks.sum(1, dtype=torch.float64) for masks in (first, second))
    return both, sizes[:, None] + others[None] - both


def agreement(masks: Array) -> Agreement:
    """A_l(Y) of the boolean masks of one layer, shape (n, ...).

    Raises:
        DoriError: the masks are no booleans.
    """
    return agreement_within([given.booleans(masks, "masks")])


def agreement_within(groups: Sequence[Array]) -> Agreement:
    """As `agreement`, over the pairs within each group of masks (the same embedding under several seeds).

    Raises:
        DoriError: no group, or one that holds no booleans.
    """
    masks, parts = [_masks(group, "a group of masks") for group in groups], []
    if not masks:
        raise DoriError("groups is empty; give at least one group of masks, booleans (n, ...)")
    for group in masks:
        both, either = overlaps(group, group)
        first, second = torch.triu_indices(len(group), len(group), 1)
        parts.append((both[first, second], either[first, second]))
    both, either = (torch.cat(kind) for kind in zip(*parts, strict=True))
    sizes = torch.cat([group.sum(1) for group in masks])
    return _mean(both, either, float(sizes.double().mean()))


def agreement_across(halves: Sequence[Sequence[Sequence[Array]]], pairs: Array) -> Agreement:
    """As `agreement`, over pairs of a mask of one group and one of another; several layers together are one mask.

    Layers are counted one by one, so that the masks of a large model are never laid beside each other.

    Args:
        halves: two groups each, by layer: boolean masks (n, ...), and (m, ...) of the same layers. The pairs of all
            halves together count.
        pairs: which pairs of each half, booleans (n, m).

    Raises:
        DoriError: nothing to compare, no booleans, or groups that do not fit each other or the pairs.
    """
    both, either, sizes = list[Tensor](), list[Tensor](), list[Tensor]()
    for half in halves:
        first, second = _layers(half)
        chosen = given.pairs_of(pairs, len(first[0]), len(second[0]))
        counted = [overlaps(a, b) for a, b in zip(first, second, strict=True)]
        shared, joined = (torch.stack(tables).sum(0)[chosen] for tables in zip(*counted, strict=True))
        both.append(shared)
        either.append(joined)
        sizes += [torch.stack([mask.sum(1) for mask in group]).sum(0) for group in (first, second)]
    if not both:
        raise DoriError("halves is empty; give at least two groups of masks, layer by layer")
    return _mean(torch.cat(both), torch.cat(either), float(torch.cat(sizes).double().mean()))


def _layers(half: Sequence[Sequence[Array]]) -> list[list[Tensor]]:
    """Two groups of masks, each by layer, as booleans (n, w)."""
    groups = [[_masks(mask, "a layer of a group") for mask in group] for group in half]
    if len(groups) != 2 or not groups[0] or len(groups[0]) != len(groups[1]):
        raise DoriError(
            f"a half has groups of {' and '.join(str(len(group)) for group in groups) or 'no'} layers; "
            "give two groups, each with the same layers"
        )
    for group in groups:
        if len({len(mask) for mask in group}) > 1:
            raise DoriError(f"a group has {[len(mask) for mask in group]} masks by layer; give one mask of each layer")
    return groups


def _mean(both: Tensor, either: Tensor, size: float) -> Agreement:
    pairs, full = len(both), either > 0
    if pairs == 0:
        return Agreement(math.nan, math.nan, math.nan, size, 0)
    iou = torch.where(full, both / either.clamp_min(1), 1.0)
    without = float(iou[full].mean()) if full.any() else math.nan
    return Agreement(float(iou.mean()), without, float((~full).double().mean()), size, pairs)


def random_agreement(first: int, second: int, weights: int) -> float:
    """Expected IoU of two independent, uniformly random masks of given sizes among so many weights.

    E[k / (a + b - k)] with k hypergeometric; for one density q it is close to q / (2 - q). Two empty masks have 1.

    Args:
        first: number a of pruned weights, 0 to `weights`.
        second: number b, likewise.
        weights: all weights of the layer.

    Raises:
        DoriError: sizes that no mask of the layer has.
    """
    whole = all(isinstance(number, Integral) for number in (first, second, weights))
    if not whole or not 0 <= min(first, second) <= max(first, second) <= weights:
        raise DoriError(
            f"masks of {first} and {second} weights among {weights} are impossible; give whole numbers from 0 to all"
        )
    if first + second == 0:
        return 1.0
    middle = first * second / weights
    variance = middle * (weights - first) * (weights - second) / weights / max(1, weights - 1)
    width = SPAN * math.sqrt(variance) + 1
    k = np.arange(
        max(0, first + second - weights, math.floor(middle - width)), min(first, second, math.ceil(middle + width)) + 1
    )
    return float((stats.hypergeom(weights, first, second).pmf(k) * k / (first + second - k)).sum())


def random_level(masks: Array, *, without_empty: bool = False) -> float:
    """Closed form of A_l for random masks of the same sizes as these (n, ...); NaN without pairs.

    Over all pairs, or `PAIRS` of them, evenly spread, where there are more; if so wished over those alone of which not
    both masks are empty.

    Raises:
        DoriError: the masks are no booleans.
    """
    flat = _masks(masks)
    sizes = flat.sum(1)
    first, second = torch.triu_indices(len(sizes), len(sizes), 1)
    if without_empty:
        full = sizes[first] + sizes[second] > 0
        first, second = first[full], second[full]
    chosen = torch.linspace(0, len(first) - 1, min(PAIRS, len(first))).round().long()
    pairs = zip(sizes[first[chosen]].tolist(), sizes[second[chosen]].tolist(), strict=True)
    levels = [random_agreement(a, b, flat.shape[1]) for a, b in pairs]
    return sum(levels) / len(levels) if levels else math.nan


def random_like(masks: Array, *, seed: int) -> Tensor:
    """Random masks of the same sizes as these (n, ...), drawn independently: the closed form, simulated.

    Raises:
        DoriError: the masks are no booleans.
    """
    masks = given.booleans(masks, "masks")
    generator = torch.Generator().manual_seed(seed)
    flat = torch.zeros_like(masks.flatten(1))
    for row, size in zip(flat, masks.flatten(1).sum(1).tolist(), strict=True):
        row[torch.randperm(len(row), generator=generator)[:size]] = True
    return flat.view(masks.shape)
