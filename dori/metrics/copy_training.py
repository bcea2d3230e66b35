"""Train the embedded copy descriptor by SSCD's recipe (Pizzi et al., CVPR 2022).

InfoNCE with temperature 0.05, plus weight 30 times the mean of -log of the distance to the nearest descriptor that
is no copy (the Kozachenko-Leonenko estimate of entropy): it spreads the descriptors, so that one threshold serves
all images. Differs from SSCD: the network, the images, AdamW instead of LARS, and the positives, which are what a
diffusion model's copies look like rather than what people do to pictures; no mixed images; mirrored pictures are
no copies.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dori.metrics.calibration import calibrate
from dori.metrics.copy_descriptor import (
    CopyNetwork,
    as_descriptor,
    load_copy_descriptor,
    new_network,
    save_copy_descriptor,
)
from dori.metrics.copy_pairs import GROUP, TRAINING, Pairs, RoundTrip, augment, make_pairs, to_float
from dori.metrics.similarity import Descriptor
from dori.run import tensors_sha256
from dori.testbed.fit import Schedule, fit


@dataclass(frozen=True, slots=True)
class CopyRecipe:
    """Lengths and weights of the training.

    Args:
        groups: look-alike groups of ten images in the pool.
        batch_groups: groups in a batch; a batch holds two views of each image.
        steps: optimizer steps.
        lr: peak learning rate.
        temperature: of InfoNCE.
        entropy_weight: of the nearest-neighbour term.
        strong_share: share of copies that are changed three times as much, with an overlay.
        negatives: look-alike pairs of the calibration, at least.
        seed: of everything drawn.
    """

    groups: int = 4000
    batch_groups: int = 12
    steps: int = 4500
    lr: float = 2e-3
    temperature: float = 0.05
    entropy_weight: float = 30.0
    strong_share: float = 0.25
    negatives: int = 100_000
    seed: int = 0


def copy_loss(first: Tensor, second: Tensor, *, temperature: float = 0.05, entropy_weight: float = 30.0) -> Tensor:
    """InfoNCE plus the entropy term over 2 n unit descriptors, of which row i of one is the copy of row i of the other.

    mean_i [-log(e^(s_ii' / tau) / sum_{j != i} e^(s_ij / tau))] + weight mean_i [-log min_{j no copy of i} |z_i - z_j|]

    Args:
        first: shape (n, d).
        second: shape (n, d).
        temperature: tau.
        entropy_weight: weight.
    """
    z, n = torch.cat([first, second]), len(first)
    similarity = z @ z.T
    rows = torch.arange(2 * n, device=z.device)
    partner = (rows + n) % (2 * n)
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    logits = (similarity / temperature).masked_fill(itself, -torch.inf)
    nearest = similarity.masked_fill(itself | itself[partner], -1).amax(dim=1)
    distance = (2 - 2 * nearest).clamp(min=1e-6).sqrt()
    return functional.cross_entropy(logits, partner) - entropy_weight * distance.log().mean()


def _loss(network: CopyNetwork, pairs: Pairs, recipe: CopyRecipe) -> Callable[[int, torch.Generator], Tensor]:
    groups = len(pairs.images) // GROUP

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randperm(groups, generator=generator)[: recipe.batch_groups]
        rows = (chosen[:, None] * GROUP + torch.arange(GROUP)).flatten()
        # A reference is mostly seen as it is, a generation never.
        plain = torch.randint(2, (len(rows),), generator=generator).float()
        strong = 1 + 2.0 * (torch.rand(len(rows), generator=generator) < recipe.strong_share)
        views = torch.cat(
            [
                augment(to_float(pairs.images[rows]), plain, generator),
                augment(to_float(pairs.copies[rows]), strong, generator),
            ]
        )
        first, second = network(views.to(network.embeddings.weight.device)).chunk(2)
        return copy_loss(first, second, temperature=recipe.temperature, entropy_weight=recipe.entropy_weight)

    return loss


def train_descriptor(
    folder: Path,
    round_trip: RoundTrip,
    *,
    recipe: CopyRecipe | None = None,
    say: Callable[[str], None] = lambda line: None,
    device: str = "cpu",
) -> Descriptor:
    """Train, calibrate on held-out pairs, and write `folder/copy_descriptor.safetensors`.

    Args:
        folder: where the file goes, and the state from which a killed training resumes.
        round_trip: images in [0, 1], shape (n, 3, 64, 64), through the VAE and back; for a model,
            `lambda images: model.to_images(model.to_latents(images))`.
        recipe: lengths and weights; None for the shipped descriptor's.
        say: called with each line of progress.
        device: where the network is trained.

    Returns:
        The descriptor as read back from the file.
    """
    recipe = recipe or CopyRecipe()
    folder.mkdir(parents=True, exist_ok=True)
    say(f"copy descriptor: drawing {recipe.groups * GROUP} images and their copies")
    pairs = make_pairs(recipe.groups, round_trip, seed=recipe.seed, stream=TRAINING)
    network = new_network(recipe.seed)
    fit(
        "copy",
        network,
        _loss(network, pairs, recipe),
        Schedule(recipe.lr, recipe.steps, warmup=50),
        folder,
        seed=recipe.seed,
        say=say,
        device=device,
        made_from={"recipe": asdict(recipe), "pairs": tensors_sha256({"images": pairs.images, "copies": pairs.copies})},
    )
    say(f"copy descriptor: calibrating on {recipe.negatives} pairs")
    calibrated = calibrate(as_descriptor(network), round_trip, seed=recipe.seed, negatives=recipe.negatives)
    path = folder / "copy_descriptor.safetensors"
    save_copy_descriptor(path, network, calibrated, asdict(recipe))
    return load_copy_descriptor(path)
