"""Three memories, their surrogates and ordinary pairs of a tiny model, for the tests of erasers."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dori.audit.judge import Case
from dori.audit.loop import make_cases
from dori.erase.pairs import Forget, Pairs
from dori.memory import Memory
from dori.metrics.similarity import Descriptor
from dori.model.stable_diffusion import StableDiffusion

TEXTS = ("abc", "de fg", "hi jk lm")


def draw(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def forget(model: StableDiffusion, *, surrogates: int = 2, texts: tuple[str | None, ...] = TEXTS) -> Forget:
    """Three memories with latents of unit variance."""
    shape, n = model.latent_shape, len(texts)
    return Forget(
        tuple(f"m{i}" for i in range(n)),
        texts,
        draw(n, *shape, seed=1),
        model.encode([text or "" for text in texts]),
        tuple(draw(surrogates, *shape, seed=10 + i) for i in range(n)),
        model.encode(["", "de", "hi"])[:n],
        ("x", "yy", "z"),
        "drawn",
    )


def retain(model: StableDiffusion) -> Pairs:
    """Eight ordinary pairs."""
    return Pairs(draw(8, *model.latent_shape, seed=2), model.encode([f"word {i}" for i in range(8)]), "drawn")


def colours(images: Tensor) -> Tensor:
    """The pixel correlation of 4 x 4 thumbnails."""
    x = functional.adaptive_avg_pool2d(images, 4).flatten(1)
    return x - x.mean(dim=1, keepdim=True)


DESCRIPTOR = Descriptor("pixel-correlation-4", "4 x 4, mean subtracted", colours, threshold=0.7)


def cases(model: StableDiffusion, count: int = 3, group: str = "memory", seed: int = 7) -> tuple[Case, ...]:
    """Random images with texts."""
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    kind = "verbatim" if group == "memory" else "control"
    memories = [Memory(f"{group}-{i}", f"{group[0]} {i}", Path(f"{group}{i}.png"), kind) for i in range(count)]
    return make_cases(model, memories, images, group)


def weights(model: StableDiffusion) -> dict[str, Tensor]:
    """A copy of the U-Net's weights."""
    return {name: value.detach().clone() for name, value in model.unet.named_parameters()}
