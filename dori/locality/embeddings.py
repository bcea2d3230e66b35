"""Locality in embedding space: how triggers of one image lie to each other, to their starts and to ordinary prompts.

Source: methods.md 4.1 (DoRI paper: mean pairwise l2 distance, t-SNE of 100 starts and their triggers). Gaussian starts
are sqrt(2 l d) apart by construction, so a distance between triggers alone says nothing; the functions below therefore
also look at the moves y - y0 that the attack made, in which the starts are taken out, and at straight lines and balls.
Embeddings are plain tensors of shape (n, l, d); distances are l2 over all l d entries, in float64.
"""

import math
from collections.abc import Sequence

import torch
from sklearn.manifold import TSNE
from torch import Tensor

EXCHANGES = 10


def _flat(embeddings: Tensor) -> Tensor:
    return embeddings.detach().cpu().double().flatten(1)


def pair_distances(embeddings: Tensor) -> Tensor:
    """l2 distances of all n (n - 1) / 2 pairs of embeddings (n, l, d), float64."""
    return torch.pdist(_flat(embeddings))


def moved(starts: Tensor, ends: Tensor) -> Tensor:
    """|y - y0|, how far each embedding moved, shape (n,), float64."""
    return (_flat(ends) - _flat(starts)).norm(dim=1)


def gaussian_distance(entries: int) -> float:
    """Expected distance of two independent N(0, I) vectors with that many entries: 2 G((k + 1)/2) / G(k/2)."""
    return 2 * math.exp(math.lgamma((entries + 1) / 2) - math.lgamma(entries / 2))


def common_share(moves: Tensor) -> float:
    """Which share of the moves' mean square is a move common to all.

    Mean inner product of two different moves over their mean square norm. Moves of independent directions give 0 (in
    expectation, so that small negative values occur), equal moves 1. Unlike a distance between the ends it does not
    contain the starts.

    Args:
        moves: shape (n, l, d) or (n, k), n >= 2.

    Returns:
        The share, at most 1; NaN if nothing moved or n < 2.
    """
    return shared_share(moves, moves)


def shared_share(first: Tensor, second: Tensor) -> float:
    """`common_share` between moves towards two images: what is common whatever the image.

    Mean inner product <a_i, b_j> over i != j, over the root of the product of both mean squares. Moves that began at
    one start are no pair, as they are none in `common_share`, so that the two differ by the image alone.

    Args:
        first: moves towards one image, shape (n, l, d), n >= 2.
        second: moves towards another image from the same starts, likewise.

    Returns:
        The share, at most 1; NaN if nothing moved or n < 2.
    """
    a, b, n = _flat(first), _flat(second), len(first)
    size = math.sqrt(float(a.square().sum()) * float(b.square().sum()))
    if n < 2 or size == 0:
        return math.nan
    return float((a.sum(0) * b.sum(0)).sum() - (a * b).sum()) / (n - 1) / size


def repeated_share(first: Tensor, second: Tensor) -> float:
    """What a move shares with itself when the attack is made again under other noise: the ceiling of `common_share`.

    Mean inner product <a_i, b_i> over the root of the product of both mean squares.

    Args:
        first: moves, shape (n, l, d), n >= 1.
        second: moves from the same starts towards the same image, row by row.

    Returns:
        The share, at most 1; NaN if nothing moved or there is none.
    """
    a, b = _flat(first), _flat(second)
    size = math.sqrt(float(a.square().sum()) * float(b.square().sum()))
    return float((a * b).sum()) / size if size else math.nan


def own_start_share(starts: Tensor, ends: Tensor) -> float:
    """Share of the ends whose nearest start is their own; both (n, l, d).

    1/n where the ends have forgotten their starts; near 1 for any moves that are shorter than starts are apart,
    whatever their direction. `exchanged_share` is the level that tells nothing of the moves.
    """
    if not len(starts):
        return math.nan
    nearest = torch.cdist(_flat(ends), _flat(starts)).argmin(1)
    return float((nearest == torch.arange(len(starts))).double().mean())


def exchanged_share(starts: Tensor, ends: Tensor) -> float:
    """`own_start_share` with every start moved as another one was: the mean over up to `EXCHANGES` cyclic exchanges.

    NaN for fewer than two.
    """
    moves, n = ends - starts, len(starts)
    shifts = range(1, min(n, EXCHANGES + 1))
    shares = [own_start_share(starts, starts + moves.roll(shift, 0)) for shift in shifts]
    return sum(shares) / len(shares) if shares else math.nan


def line(first: Tensor, second: Tensor, shares: Sequence[float]) -> Tensor:
    """Points (1 - s) a + s b on the straight line between two embeddings (l, d), shape (len(shares), l, d)."""
    return torch.stack([first + share * (second - first) for share in shares])


def sphere(centre: Tensor, radius: float, *, seed: int, count: int) -> Tensor:
    """Points at one distance from an embedding (l, d), in uniformly random directions, shape (count, l, d)."""
    noise = torch.randn(count, *centre.shape, generator=torch.Generator().manual_seed(seed))
    unit = noise / noise.flatten(1).norm(dim=1)[:, None, None]
    return centre.cpu() + radius * unit


def principal_map(embeddings: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """The first two principal components.

    Args:
        embeddings: shape (n, l, d), n >= 3.

    Returns:
        Coordinates (n, 2), float64, the largest of each component positive so that the map has one orientation; and
        which share of the variance each explains.
    """
    x = _flat(embeddings)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    coordinates = u[:, :2] * s[:2]
    coordinates = coordinates * coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True)).sign()
    energy = s.square() / s.square().sum().clamp_min(1e-300)
    return coordinates, (float(energy[0]), float(energy[1]))


def neighbour_map(embeddings: Tensor, *, perplexity: float, seed: int) -> Tensor:
    """t-SNE in two dimensions, begun from the principal components, shape (n, 2), float64.

    It keeps neighbourhoods and invents distances: gaps and sizes of its clusters mean nothing, hence `principal_map`
    beside it.

    Args:
        embeddings: shape (n, l, d), n >= 3.
        perplexity: effective number of neighbours, cut to (n - 1) / 3 where there are too few points.
        seed: of the optimisation.
    """
    x = _flat(embeddings).numpy()
    tsne = TSNE(
        n_components=2,
        perplexity=capped_perplexity(perplexity, len(x)),
        init="pca",
        random_state=seed,
        learning_rate="auto",
    )
    return torch.from_numpy(tsne.fit_transform(x)).double()


def capped_perplexity(perplexity: float, points: int) -> float:
    """The perplexity that t-SNE can have with so many points."""
    return min(perplexity, (points - 1) / 3)
