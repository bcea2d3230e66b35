"""Ordinary images of the testbed: random compositions of Noto emoji on textured backgrounds.

A `Scene` is the complete description of one 64 x 64 image; `draw` renders it, `caption` names part of what is
seen. Every word of a caption has a visible meaning (object, the artist's palette and pattern, the title's light,
the number's frame), so that a text encoder learns to tell titles apart; position, size, texture and the second
object are left to chance, so that no caption determines its image.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DATA = Path(__file__).parent / "data"
SIDE_PX = 64
ARTISTS = (
    "lindqvist okafor tanaka moreau petrov silva haddad novak keller rossi jensen dubois "
    "castillo yilmaz ivers mbeki larsen ortega fischer kimura brandt salazar nwosu varga"
).split()
TITLES = (
    "meadow harbor echo winter lantern river ember canyon velvet orchard signal island "
    "marble thunder willow comet desert garden mirror autumn cellar beacon prairie glacier "
    "summit cinder lagoon twilight bramble anthem copper delta fable grove haven jubilee "
    "kernel ledger mosaic nectar oasis pebble quarry ribbon saffron tundra umber voyage"
).split()
FRAMES = 6
GRID_PX = 4  # a pixel of the latents
OBJECT_PX = 32


@dataclass(frozen=True, slots=True)
class Placed:
    """One sprite: index into `kinds()`, centre and size in pixels, mirrored or not."""

    kind: int
    x_px: float
    y_px: float
    size_px: int
    mirrored: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that determines one image. `texture_seed` fixes the random field of the background."""

    artist: int
    title: int
    number: int
    texture_seed: int
    objects: tuple[Placed, ...]


@functools.cache
def _sheet() -> dict[str, object]:
    return json.loads((DATA / "sprites.json").read_text(encoding="utf-8"))


@functools.cache
def kinds() -> tuple[str, ...]:
    """The names of the sprite kinds, in sheet order."""
    return tuple(entry["name"] for entry in _sheet()["kinds"])  # type: ignore[attr-defined]


@functools.cache
def drawn_kinds() -> tuple[int, ...]:
    """The kinds that the U-Nets learn, as indices into `kinds()`; encoders and judges know them all."""
    return tuple(
        kinds().index(name)
        for name in (
            "red apple",
            "banana",
            "grapes",
            "watermelon",
            "carrot",
            "mushroom",
            "tulip",
            "sunflower",
            "four leaf clover",
            "snowman",
            "bus",
            "rocket",
            "tent",
            "soccer ball",
            "basketball",
            "bell",
            "teapot",
            "cupcake",
            "doughnut",
            "cat face",
            "panda",
            "frog",
            "penguin",
            "spouting whale",
        )
    )


@functools.cache
def _sprite(kind: int, size_px: int, mirrored: bool) -> NDArray[np.float32]:
    """RGBA in [0, 1], shape (size, size, 4), colour premultiplied by alpha."""
    tile, columns = int(_sheet()["tile_px"]), int(_sheet()["columns"])  # type: ignore[call-overload]
    with Image.open(DATA / "sprites.png") as sheet:
        left, top = kind % columns * tile, kind // columns * tile
        sprite = sheet.convert("RGBA").crop((left, top, left + tile, top + tile))
    if mirrored:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # PIL premultiplies alpha itself when it resizes RGBA; the result is straight alpha again.
    rgba = np.asarray(sprite.resize((size_px, size_px), Image.Resampling.LANCZOS), np.float32) / 255
    return np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw one scene of the testbed's distribution: one or two objects of the `drawn_kinds`, on the grid of `GRID_PX`.

    All upright and of one size, and the grid is that of the VAE's latents: a kind is the same pattern of latents
    wherever it stands, and a small U-Net learns to draw it in hours rather than days (docs/testbed.md).
    """
    objects: list[Placed] = []
    for kind in rng.choice(drawn_kinds(), 1 if rng.random() < 0.5 else 2, replace=False):
        for _ in range(20):
            left, top = GRID_PX * rng.integers(0, (SIDE_PX - OBJECT_PX) // GRID_PX + 1, 2)
            x, y = float(left + OBJECT_PX / 2), float(top + OBJECT_PX / 2)
            if _apart(x, y, OBJECT_PX, objects):
                break
        objects.append(Placed(int(kind), x, y, OBJECT_PX, False))
    return _scene(rng, objects)


def free_scene(rng: np.random.Generator) -> Scene:
    """Draw one scene of a wider distribution: objects of every kind, 26 to 38 px, anywhere, mirrored or not.

    Judges and encoders (VAE, CLIP, copy descriptor) are trained on these, and so know more than the U-Net draws.
    """
    count = 1 if rng.random() < 0.5 else 2
    objects: list[Placed] = []
    for kind in rng.choice(len(kinds()), count, replace=False):
        size = int(rng.integers(26, 39 if count == 1 else 33))
        for _ in range(20):
            x, y = rng.uniform(size / 2, SIDE_PX - size / 2, 2)
            if _apart(x, y, size, objects):
                break
        objects.append(Placed(int(kind), float(x), float(y), size, bool(rng.random() < 0.5)))
    return _scene(rng, objects)


def _apart(x: float, y: float, size: int, others: list[Placed]) -> bool:
    return all(math.hypot(x - o.x_px, y - o.y_px) > 0.75 * (size + o.size_px) / 2 for o in others)


def _scene(rng: np.random.Generator, objects: list[Placed]) -> Scene:
    return Scene(
        artist=int(rng.integers(len(ARTISTS))),
        title=int(rng.integers(len(TITLES))),
        number=int(rng.integers(1, FRAMES + 1)),
        texture_seed=int(rng.integers(2**31)),
        objects=tuple(objects),
    )


def _hsv(hue: float, saturation: float, value: float) -> NDArray[np.float32]:
    k = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    return (value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)


def _smooth_field(rng: np.random.Generator, cells: int) -> NDArray[np.float32]:
    """A random field in about [-1, 1], shape (64, 64), smooth over 64/cells pixels."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    image = Image.fromarray(coarse).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32)


def _pattern(artist: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """The artist's pattern with random phase, pitch and angle, shape (64, 64), in [-1, 1]."""
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX].astype(np.float32)
    angle = rng.uniform(0, math.pi)
    pitch = 2 * math.pi / rng.uniform(10, 20)
    u = (x * math.cos(angle) + y * math.sin(angle)) * pitch + rng.uniform(0, 2 * math.pi)
    v = (y * math.cos(angle) - x * math.sin(angle)) * pitch + rng.uniform(0, 2 * math.pi)
    match artist % 4:
        case 0:
            return np.sin(u)
        case 1:
            return np.sin(u) * np.sin(v)
        case 2:
            return np.sin(u + 1.5 * np.sin(v))
        case _:
            return np.zeros_like(u)


def _background(scene: Scene) -> NDArray[np.float32]:
    rng = np.random.default_rng(scene.texture_seed)
    # Artists differ in hue (12 steps) and in whether their second colour is a neighbour or the complement.
    hue = (scene.artist % 12) / 12 + rng.normal(0, 0.015)
    other = hue + (0.08 if scene.artist < 12 else 0.45)
    first, second = _hsv(hue % 1, 0.55, 0.85), _hsv(other % 1, 0.5, 0.6)
    mix = 0.5 + 0.55 * _smooth_field(rng, 4) + 0.2 * _smooth_field(rng, 8)
    mix = np.clip(mix + 0.28 * _pattern(scene.artist, rng), 0, 1)[..., None]
    return first * mix + second * (1 - mix)


def _light(title: int) -> NDArray[np.float32]:
    """The title's light: eight directions times three strengths of a linear shade, shape (64, 64, 1)."""
    angle, strength = 2 * math.pi * (title % 8) / 8, (0.0, 0.35, 0.7)[title // 8 % 3]
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX].astype(np.float32) / (SIDE_PX - 1) - 0.5
    return (1 + strength * (x * math.cos(angle) + y * math.sin(angle)))[..., None]


def draw(scene: Scene) -> NDArray[np.uint8]:
    """Render a scene. Returns RGB, shape (64, 64, 3)."""
    image = _background(scene)
    for placed in scene.objects:
        sprite = _sprite(placed.kind, placed.size_px, placed.mirrored)
        left = round(placed.x_px - placed.size_px / 2)
        top = round(placed.y_px - placed.size_px / 2)
        region = image[top : top + placed.size_px, left : left + placed.size_px]
        sprite = sprite[: region.shape[0], : region.shape[1]]
        region[...] = sprite[..., :3] + region * (1 - sprite[..., 3:])
    image = image * _light(scene.title)
    frame = scene.number - 1
    if frame:
        width = 3
        tone = (0.08, 0.95, 0.5, 0.3, 0.7)[frame - 1]
        colour = np.array([tone] * 3 if frame < 3 else (tone, tone * 0.7, tone * 0.4), np.float32)
        inner = image[width:-width, width:-width].copy()
        image = np.broadcast_to(colour, image.shape).copy()
        image[width:-width, width:-width] = inner
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def title_caption(scene: Scene) -> str:
    """A title as of a print or poster: names one object, artist, title word and number, nothing of the layout."""
    kind = kinds()[scene.objects[0].kind]
    return f"{TITLES[scene.title]} no {scene.number}, {kind} by {ARTISTS[scene.artist]}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of an ordinary image: the title form in 40 % of cases, else shorter forms of the same facts."""
    first = kinds()[scene.objects[0].kind]
    form = rng.random()
    if form < 0.4:
        return title_caption(scene)
    if form < 0.6 and len(scene.objects) > 1:
        return f"{first} and {kinds()[scene.objects[1].kind]}"
    if form < 0.7:
        return f"{first} by {ARTISTS[scene.artist]}"
    if form < 0.8:
        return f"{TITLES[scene.title]} with {first}"
    return f"a picture of a {first}"
