"""Copies and look-alikes of the testbed's scenes: what a copy descriptor learns from and is calibrated on.

A copy looks as a diffusion model's would: objects up to a pixel off, through the VAE and back, colours and contrast
a little off, slightly blurred or cut. A look-alike, the hard negative, shares with an image everything but one thing:
the same objects on the same background at other places, other objects at the same places on the same background, or
the same objects at the same places on another background.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dori.testbed.scenes import SIDE_PX, Placed, Scene, draw, free_scene, kinds

RoundTrip = Callable[[Tensor], Tensor]
SIBLINGS = 3
GROUP = 1 + 3 * SIBLINGS
DRIFT_PX = 1.0
# Stream of random numbers: training and measuring never see the same scene, whatever their seeds.
TRAINING, HELD_OUT = 0, 1


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Images with one copy each, in groups of `GROUP` look-alikes.

    Args:
        images: shape (n, 3, H, W), bytes.
        copies: row i is a copy of image i; same shape, bytes.
        negatives: shape (m, 2): image row and copy row of pairs that are no copies but share all but one thing.
    """

    images: Tensor
    copies: Tensor
    negatives: Tensor


def _moved(scene: Scene, rng: np.random.Generator, earlier: Sequence[Scene]) -> Scene:
    """The scene with its objects at other places, far from where the earlier scenes have them."""
    best, best_distance = scene, -1.0
    for _ in range(40):
        placed: list[Placed] = []
        for thing in scene.objects:
            x, y = rng.uniform(thing.size_px / 2, SIDE_PX - thing.size_px / 2, 2)
            placed.append(dataclasses.replace(thing, x_px=float(x), y_px=float(y)))
        if any(
            math.hypot(p.x_px - q.x_px, p.y_px - q.y_px) < 0.375 * (p.size_px + q.size_px)
            for p, q in itertools.combinations(placed, 2)
        ):
            continue
        candidate = dataclasses.replace(scene, objects=tuple(placed))
        distance = min(displacement_px(candidate, other) for other in earlier)
        if distance > best_distance:
            best, best_distance = candidate, distance
    return best


def displacement_px(a: Scene, b: Scene) -> float:
    """Mean distance in pixels between the places of corresponding objects."""
    return float(
        np.mean([math.hypot(p.x_px - q.x_px, p.y_px - q.y_px) for p, q in zip(a.objects, b.objects, strict=True)])
    )


def look_alikes(scene: Scene, rng: np.random.Generator) -> tuple[tuple[Scene, ...], ...]:
    """Three families of scenes that share all but places, objects or background; each starts with the scene itself.

    Any two scenes of one family are hard negatives of one another.
    """
    moved = [scene]
    for _ in range(SIBLINGS):
        moved.append(_moved(scene, rng, moved))
    used = {placed.kind for placed in scene.objects}
    free = rng.permutation([kind for kind in range(len(kinds())) if kind not in used])
    shares = np.array_split(free, SIBLINGS)
    swapped = [
        dataclasses.replace(
            scene,
            objects=tuple(
                dataclasses.replace(placed, kind=int(kind)) for placed, kind in zip(scene.objects, share, strict=False)
            ),
        )
        for share in shares
    ]
    others = [dataclasses.replace(free_scene(rng), objects=scene.objects) for _ in range(SIBLINGS)]
    return tuple(moved), (scene, *swapped), (scene, *others)


def drifted(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with each object up to `DRIFT_PX` off in each direction."""

    def move(placed: Placed) -> Placed:
        x, y = rng.uniform(-DRIFT_PX, DRIFT_PX, 2)
        half = placed.size_px / 2
        return dataclasses.replace(
            placed,
            x_px=float(np.clip(placed.x_px + x, half, SIDE_PX - half)),
            y_px=float(np.clip(placed.y_px + y, half, SIDE_PX - half)),
        )

    return dataclasses.replace(scene, objects=tuple(move(placed) for placed in scene.objects))


def _bytes(scenes: Sequence[Scene]) -> Tensor:
    return torch.from_numpy(np.stack([draw(scene) for scene in scenes])).permute(0, 3, 1, 2)


def to_float(images: Tensor) -> Tensor:
    """Bytes to floats in [0, 1]."""
    return images.float() / 255


def make_pairs(groups: int, round_trip: RoundTrip, *, seed: int, stream: int) -> Pairs:
    """Draw groups of look-alikes with one copy of each image.

    Args:
        groups: number of groups; each gives `GROUP` images and as many copies, and 36 hard negatives.
        round_trip: images in [0, 1], shape (n, 3, H, W), through the VAE and back.
        seed: of everything drawn.
        stream: `TRAINING` or `HELD_OUT`.
    """
    rng = np.random.default_rng([stream, seed])
    scenes: list[Scene] = []
    negatives: list[tuple[int, int]] = []
    for group in range(groups):
        families = look_alikes(free_scene(rng), rng)
        scenes += [families[0][0], *(scene for family in families for scene in family[1:])]
        for family in range(len(families)):
            first = group * GROUP
            rows = [first, *range(first + 1 + family * SIBLINGS, first + 1 + (family + 1) * SIBLINGS)]
            negatives += itertools.permutations(rows, 2)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    copies = []
    for start in range(0, len(scenes), 64):
        batch = to_float(_bytes([drifted(scene, rng) for scene in scenes[start : start + 64]]))
        with torch.no_grad():
            batch = augment(round_trip(batch).cpu(), torch.ones(len(batch)), generator)
        copies.append((batch * 255).round().to(torch.uint8))
    return Pairs(_bytes(scenes), torch.cat(copies), torch.tensor(negatives))


def augment(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Small changes of colour, place, sharpness and grain; strength 0 leaves an image as it is.

    At strength 1: contrast off by up to 12 %, each colour by up to 6 %, brightness by up to 0.04, zoomed in by up to
    3 %, shifted by up to one pixel in 64, blurred by up to one pixel, noise of 0.01. Beyond strength 2 a rectangle
    is painted over as well, as overlays do.

    Args:
        images: in [0, 1], shape (n, 3, H, W).
        strength: at least 0, shape (n,).
        generator: of all that is drawn.
    """
    n = len(images)

    def uniform(*shape: int) -> Tensor:
        return torch.rand((n, *shape), generator=generator) * 2 - 1

    s = strength[:, None, None, None]
    zoom = 1 - 0.03 * strength * torch.rand(n, generator=generator)
    shift = uniform(2) * ((1 - zoom) + strength / 32)[:, None]
    theta = torch.cat([torch.diag_embed(zoom[:, None].expand(n, 2)), shift[..., None]], dim=2)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    x = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    kernel = torch.tensor([0.06136, 0.24477, 0.38774, 0.24477, 0.06136])  # Gaussian, sigma of one pixel
    soft = functional.conv2d(
        functional.pad(x, (2, 2, 2, 2), mode="replicate"), (kernel[:, None] * kernel).expand(3, 1, 5, 5), groups=3
    )
    x = torch.lerp(x, soft, (s * torch.rand((n, 1, 1, 1), generator=generator)).clamp(max=1))
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - mean) * (1 + 0.12 * s * uniform(1, 1, 1)) + mean
    x = x * (1 + 0.06 * s * uniform(3, 1, 1)) + 0.04 * s * uniform(1, 1, 1)
    x = x + 0.01 * s * torch.randn(x.shape, generator=generator)
    return _overlay(x, strength > 2, generator).clamp(0, 1)


def _overlay(images: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Paint a rectangle of random colour and of at most a sixth of the area over the chosen images."""
    n, _, height, width = images.shape
    colour = torch.rand((n, 3, 1, 1), generator=generator)
    inside = chosen[:, None, None, None]
    for place in (torch.arange(height)[:, None] / height, torch.arange(width)[None] / width):
        side = torch.rand((n, 1, 1, 1), generator=generator) * 0.4
        start = torch.rand((n, 1, 1, 1), generator=generator) * (1 - side)
        inside = inside & (place >= start) & (place < start + side)
    return torch.where(inside, colour, images)
