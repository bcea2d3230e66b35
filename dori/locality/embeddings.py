"""Locality in embedding space: how triggers of one image lie to each other, to their starts and to ordinary prompts.

Source: methods.md 4.1 (DoRI paper: mean pairwise l2 distance, t-SNE of 100 starts and their triggers). Gaussian starts
are sqrt(2 l d) apart by construction, so a distance between triggers alone says nothing; the functions below therefore
also look at the moves y - y0 that the attack made, in which the starts are taken out, and at straight lines and balls.
Embeddings are plain tensors (or NumPy arrays) of shape (n, l, d); distances are l2 over all l d entries, in float64.
All functions raise `DoriError` for what does not fit: too few, unequal shapes, not finite where a number must be.
"""

import math
from collections.abc import Sequence

import torch
from sklearn.manifold import TSNE
from torch import Tensor

from dori.errors import DoriError
from dori.locality import given
from dori.locality.given import Array

EXCHANGES = 10


def _flat(embeddings: Array, name: str = "embeddings", *, least: int = 0, finite: bool = False) -> Tensor:
    return given.rows(embeddings, name, least=least, finite=finite).detach().cpu().double().flatten(1)


def _both(first: Array, second: Array, names: str) -> tuple[Tensor, Tensor]:
    """Two sets of embeddings of one shape, flat; `names` are both arguments', such as "starts and ends"."""
    one, two = (given.rows(part, name) for part, name in zip((first, second), names.split(" and "), strict=True))
    given.alike(one, two, names)
    return _flat(one), _flat(two)


def pair_distances(embeddings: Array) -> Tensor:
    """l2 distances of all n (n - 1) / 2 pairs of embeddings (n, l, d), float64."""
    return torch.pdist(_flat(embeddings))


def moved(starts: Array, ends: Array) -> Tensor:
    """|y - y0|, how far each embedding moved, shape (n,), float64; both (n, l, d)."""
    before, after = _both(starts, ends, "starts and ends")
    return (after - before).norm(dim=1)


def gaussian_distance(entries: int) -> float:
    """Expected distance of two independent N(0, I) vectors with that many entries: 2 G((k + 1)/2) / G(k/2)."""
    if entries < 1:
        raise DoriError(f"entries is {entries}; give the number of entries of an embedding, l times d")
    return 2 * math.exp(math.lgamma((entries + 1) / 2) - math.lgamma(entries / 2))


def common_share(moves: Array) -> float:
    """Which share of the moves' mean square is a move common to all.

    Mean inner product of two different moves over their mean square norm. Moves of independent directions give 0 (in
    expectation, so that small negative values occur), equal moves 1. Unlike a distance between the ends it does not
    contain the starts.

    Args:
        moves: shape (n, l, d) or (n, k), n >= 2.

    Returns:
        The share, at most 1; NaN if nothing moved or n < 2.
    """
    moves = given.rows(moves, "moves")
    return shared_share(moves, moves)


def shared_share(first: Array, second: Array) -> float:
    """`common_share` between moves towards two images: what is common whatever the image.

    Mean inner product <a_i, b_j> over i != j, over the root of the product of both mean squares. Moves that began at
    one start are no pair, as they are none in `common_share`, so that the two differ by the image alone.

    Args:
        first: moves towards one image, shape (n, l, d), n >= 2.
        second: moves towards another image from the same starts, likewise.

    Returns:
        The share, at most 1; NaN if nothing moved or n < 2.
    """
    a, b = _both(first, second, "first and second")
    n = len(a)
    size = math.sqrt(float(a.square().sum()) * float(b.square().sum()))
    if n < 2 or size == 0:
        return math.nan
    return float((a.sum(0) * b.sum(0)).sum() - (a * b).sum()) / (n - 1) / size


def repeated_share(first: Array, second: Array) -> float:
    """What a move shares with itself when the attack is made again under other noise: the ceiling of `common_share`.

    Mean inner product <a_i, b_i> over the root of the product of both mean squares.

    Args:
        first: moves, shape (n, l, d), n >= 1.
        second: moves from the same starts towards the same image, row by row.

    Returns:
        The share, at most 1; NaN if nothing moved or there is none.
    """
    a, b = _both(first, second, "first and second")
    size = math.sqrt(float(a.square().sum()) * float(b.square().sum()))
    return float((a * b).sum()) / size if size else math.nan


def own_start_share(starts: Array, ends: Array) -> float:
    """Share of the ends whose nearest start is their own; both (n, l, d).

    1/n where the ends have forgotten their starts; near 1 for any moves that are shorter than starts are apart,
    whatever their direction. `exchanged_share` is the level that tells nothing of the moves.
    """
    before, after = _both(starts, ends, "starts and ends")
    given.rows(after, "ends", finite=True)  # what diverged would be nearest to the first
    if not len(before):
        return math.nan
    nearest = torch.cdist(after, before).argmin(1)
    return float((nearest == torch.arange(len(before))).double().mean())


def exchanged_share(starts: Array, ends: Array) -> float:
    """`own_start_share` with every start moved as another one was: the mean over up to `EXCHANGES` cyclic exchanges.

    NaN for fewer than two.
    """
    starts, ends = given.rows(starts, "starts"), given.rows(ends, "ends")
    given.alike(starts, ends, "starts and ends")
    moves, n = ends - starts, len(starts)
    shifts = range(1, min(n, EXCHANGES + 1))
    shares = [own_start_share(starts, starts + moves.roll(shift, 0)) for shift in shifts]
    return sum(shares) / len(shares) if shares else math.nan


def line(first: Array, second: Array, shares: Sequence[float]) -> Tensor:
    """Points (1 - s) a + s b on the straight line between two embeddings (l, d), shape (len(shares), l, d)."""
    first, second = given.rows(first, "first"), given.rows(second, "second")
    given.alike(first, second, "first and second")
    if not len(shares):
        raise DoriError("shares is empty; give at least one place on the line, such as 0.5")
    return torch.stack([first + share * (second - first) for share in shares])


def sphere(centre: Array, radius: float, *, seed: int, count: int) -> Tensor:
    """Points at one distance from an embedding (l, d), in uniformly random directions, shape (count, l, d)."""
    centre = given.rows(centre, "centre")
    if count < 0 or not radius >= 0:
        raise DoriError(f"a sphere of radius {radius} with {count} points; give a radius and a count of 0 or more")
    noise = torch.randn(count, *centre.shape, generator=torch.Generator().manual_seed(seed))
    unit = noise / noise.flatten(1).norm(dim=1)[:, None, None]
    return centre.cpu() + radius * unit


def principal_map(embeddings: Array) -> tuple[Tensor, tuple[float, float]]:
    """The first two principal components.

    Args:
        embeddings: shape (n, l, d), n >= 3.

    Returns:
        Coordinates (n, 2), float64, the largest of each component positive so that the map has one orientation; and
        which share of the variance each explains.
    """
    x = _flat(embeddings, least=3, finite=True)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    coordinates = u[:, :2] * s[:2]
    coordinates = coordinates * coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True)).sign()
    energy = s.square() / s.square().sum().clamp_min(1e-300)
    return coordinates, (float(energy[0]), float(energy[1]))


def neighbour_map(embeddings: Array, *, perplexity: float, seed: int) -> Tensor:
    """t-SNE in two dimensions, begun from the principal components, shape (n, 2), float64.

    It keeps neighbourhoods and invents distances: gaps and sizes of its clusters mean nothing, hence `principal_map`
    beside it.

    Args:
        embeddings: shape (n, l, d), n >= 3.
        perplexity: effective number of neighbours, cut to (n - 1) / 3 where there are too few points.
        seed: of the optimisation.
    """
    x = _flat(embeddings, least=3, finite=True).numpy()
    if not perplexity > 0:
        raise DoriError(f"perplexity is {perplexity}; give a number of neighbours above 0, such as 30")
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
