"""A small classifier of the testbed's objects: does a generated image show what its prompt names?

Trained on real compositions that went through the VAE and back, never on generations; it is a measuring instrument
of `dori.testbed.verify` and nothing that is shipped. An image holds one or two objects, so an object counts as found
when its kind is among the two highest logits; blind guessing among the drawn kinds finds 2 in 24.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dori.metrics.convolutions import initialised, trunk
from dori.metrics.copy_pairs import RoundTrip, augment, to_float
from dori.run import tensors_sha256
from dori.testbed.fit import Schedule, fit
from dori.testbed.scenes import draw, kinds, random_scene

SHOWN = 2  # objects that an image holds at most
# Output channels and stride of each convolution: 64 pixels to a map of 8 x 8.
CONVOLUTIONS = ((32, 2), (64, 2), (96, 1), (128, 2))
TRAINING, HELD_OUT = 0, 1


@dataclass(frozen=True, slots=True)
class ObjectRecipe:
    """Lengths of the classifier's training.

    Args:
        images: compositions in the pool.
        batch: images in a batch.
        steps: optimizer steps.
        lr: peak learning rate.
        held_out: fresh compositions on which the accuracy is measured.
        seed: of everything drawn.
    """

    images: int = 6000
    batch: int = 64
    steps: int = 600
    lr: float = 3e-3
    held_out: int = 512
    seed: int = 0


class ObjectNetwork(nn.Module):
    """Convolutions, the strongest response of each channel anywhere, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk(CONVOLUTIONS)
        self.head = nn.Linear(CONVOLUTIONS[-1][0], len(kinds()))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (n, kinds), of images in [0, 1], shape (n, 3, H, W)."""
        return self.head(self.trunk(images * 2 - 1).amax(dim=(2, 3)))


def new_network(seed: int) -> ObjectNetwork:
    """The untrained classifier, which starts from the share of images that show a kind."""
    network = initialised(ObjectNetwork, seed)
    with torch.no_grad():
        network.head.bias.fill_(-math.log(len(kinds()) / 1.5 - 1))  # 1.5 kinds are shown on average
    return network


def compositions(count: int, round_trip: RoundTrip, *, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """Fresh compositions through the VAE and back, and which kinds they show.

    Args:
        count: number of images.
        round_trip: images in [0, 1], shape (n, 3, 64, 64), through the VAE and back.
        seed: of the scenes.
        stream: `TRAINING` or `HELD_OUT`; they share no scene.

    Returns:
        Bytes of shape (count, 3, 64, 64), and booleans of shape (count, number of kinds).
    """
    rng = np.random.default_rng([17, stream, seed])
    scenes = [random_scene(rng) for _ in range(count)]
    shown = torch.zeros(count, len(kinds()), dtype=torch.bool)
    parts = []
    for first in range(0, count, 64):
        batch = scenes[first : first + 64]
        for row, scene in enumerate(batch):
            shown[first + row, [placed.kind for placed in scene.objects]] = True
        images = torch.from_numpy(np.stack([draw(scene) for scene in batch])).permute(0, 3, 1, 2)
        with torch.no_grad():
            parts.append((round_trip(to_float(images)).cpu().clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(parts), shown


def train_objects(
    folder: Path, round_trip: RoundTrip, *, recipe: ObjectRecipe, say: Callable[[str], None] = lambda line: None
) -> ObjectNetwork:
    """Train the classifier, or go on where a killed training stood.

    Args:
        folder: where the training's state lies.
        round_trip: as in `compositions`.
        recipe: lengths.
        say: receives one line of progress at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    say(f"object classifier: drawing {recipe.images} images")
    images, shown = compositions(recipe.images, round_trip, seed=recipe.seed, stream=TRAINING)
    network = new_network(recipe.seed)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (recipe.batch,), generator=generator)
        mirrored = torch.rand(recipe.batch, 1, 1, 1, generator=generator) < 0.5
        batch = to_float(images[rows])
        batch = augment(torch.where(mirrored, batch.flip(3), batch), torch.ones(len(rows)), generator)
        # Summed over kinds: averaged over all, of which one or two are shown, the gradient would be tiny.
        return functional.binary_cross_entropy_with_logits(network(batch), shown[rows].float(), reduction="sum") / len(
            rows
        )

    fit(
        "objects",
        network,
        loss,
        Schedule(recipe.lr, recipe.steps, warmup=50),
        folder,
        seed=recipe.seed,
        say=say,
        ema_decay=0.98,
        made_from={"images": tensors_sha256({"images": images}), "batch": recipe.batch},
    )
    return network


@torch.no_grad()
def highest(network: ObjectNetwork, images: Tensor) -> Tensor:
    """The two likeliest kinds, shape (n, 2), of images in [0, 1], shape (n, 3, 64, 64)."""
    return torch.cat([network(part).topk(SHOWN, dim=1).indices for part in images.split(256)])


def accuracy(network: ObjectNetwork, round_trip: RoundTrip, *, recipe: ObjectRecipe) -> float:
    """Share of the objects of held-out compositions that are found."""
    images, shown = compositions(recipe.held_out, round_trip, seed=recipe.seed, stream=HELD_OUT)
    guessed = torch.zeros_like(shown).scatter_(1, highest(network, to_float(images)), True)
    return float((guessed & shown).sum() / shown.sum())


def finds(network: ObjectNetwork, images: Tensor, prompted: Sequence[int]) -> Tensor:
    """Whether each image shows the kind that its prompt names.

    Args:
        network: the classifier.
        images: generations in [0, 1], shape (n, s, 3, 64, 64): n prompts, s seeds.
        prompted: the kind that each prompt names.

    Returns:
        Booleans, shape (n, s).
    """
    likeliest = highest(network, images.flatten(0, 1)).unflatten(0, images.shape[:2])
    return (likeliest == torch.tensor(list(prompted))[:, None, None]).any(dim=2)


def prompted_kind(text: str) -> int | None:
    """The kind that a caption names first; None if it names none."""
    found = [
        (match.start(), kind)
        for kind, name in enumerate(kinds())
        if (match := re.search(rf"\b{re.escape(name)}\b", text))
    ]
    return min(found)[1] if found else None
