"""Image quality as a distance between two sets of features: Frechet (FID) and kernel (KID) distance.

Any features will do (Inception for FID, CLIP for CLIP-FID); a figure names its features and both counts, because
the Frechet distance falls with the number of images. Sources: Heusel et al., NeurIPS 2017; Binkowski et al.,
ICLR 2018; settings of methods.md 6.2.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dori.errors import DoriError


class KernelDistance(NamedTuple):
    """Mean and standard deviation of the kernel distance over random subsets."""

    value: float
    deviation: float


def _features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise DoriError(
            f"two sets of features of shape (n, d), n >= 2, are compared, not {tuple(a.shape)} and "
            f"{tuple(b.shape)}; describe both with the same model"
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise DoriError("a feature is not a finite number; look for damaged images in both sets")
    return a.detach().cpu().double(), b.detach().cpu().double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), covariances with n - 1, in float64.

    The last trace is the nuclear norm of A B^T, where S_a = A^T A: no square root of a matrix is taken, so the result
    stays real and finite when there are fewer images than dimensions, where a root of S_a S_b turns complex.

    Args:
        a: features, shape (n, d).
        b: features, shape (m, d).

    Raises:
        DoriError: shapes do not fit, fewer than two rows, or numbers that are not finite.
    """
    a, b = _features(a, b)
    root_a, root_b = _root(a), _root(b)
    cross = torch.linalg.matrix_norm(root_a @ root_b.T, "nuc")
    shift = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return max(0.0, float(shift + root_a.square().sum() + root_b.square().sum() - 2 * cross))


def _root(x: Tensor) -> Tensor:
    """A matrix with at most d rows whose A^T A is the covariance of x."""
    centred = (x - x.mean(dim=0)) / (len(x) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred


def _squared_mmd(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The unbiased estimate with k(x, y) = (x.y / d + 1)^3; may be negative."""
    n, m, d = len(x), len(y), x.shape[1]
    xx, yy, xy = ((p @ q.T / d + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def kernel_distance(a: Tensor, b: Tensor, *, seed: int, subsets: int = 100, subset_size: int = 1000) -> KernelDistance:
    """KID: the unbiased squared maximum mean discrepancy with the cubic kernel, averaged over random subsets.

    Unbiased: its expectation is zero for two samples of one distribution, whatever their size, and a single value
    may be negative. The deviation is the spread over subsets, not an error of the mean: subsets share images.

    Args:
        a: features, shape (n, d).
        b: features, shape (m, d).
        seed: of the subsets.
        subsets: number of subsets.
        subset_size: rows of each set in a subset, drawn without replacement; at most what the smaller set has.
            Where that is all of both, the value is theirs and the deviation that of subsets of half of them, which
            vary more than the whole does (0 below four rows).

    Raises:
        DoriError: as `frechet_distance`.
    """
    x, y = (features.numpy() for features in _features(a, b))
    size = min(subset_size, len(x), len(y))
    whole = size == len(x) == len(y)
    size = size // 2 if whole else size
    if size < 2:
        return KernelDistance(_squared_mmd(x, y), 0.0)
    rng = np.random.default_rng(seed)
    values = [
        _squared_mmd(x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)])
        for _ in range(subsets)
    ]
    return KernelDistance(_squared_mmd(x, y) if whole else float(np.mean(values)), float(np.std(values)))
