"""What a run costs by arithmetic before anything runs, in rows that go through the U-Net, and how fast a machine is."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dori.model.stable_diffusion import StableDiffusion
from dori.progress import duration

BACKWARD = 2.4  # a row forward and backward to an embedding takes as long as so many rows forward
SMALL, LARGE = 4, 64  # rows of the batches by which a machine's speed is measured
TRAINED = 1.5  # a row whose gradient reaches the weights takes so many times one that reaches the embedding alone


@dataclass(frozen=True, slots=True)
class Rows:
    """U-Net rows: forward alone, forward and backward to an embedding or latent, forward and backward to weights."""

    forward: int = 0
    attacked: int = 0
    trained: int = 0

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(self.forward + other.forward, self.attacked + other.attacked, self.trained + other.trained)

    def __mul__(self, times: int) -> "Rows":
        return Rows(self.forward * times, self.attacked * times, self.trained * times)

    @property
    def count(self) -> int:
        """All rows, as `StableDiffusion.rows` counts them."""
        return self.forward + self.attacked + self.trained

    @property
    def weight(self) -> int:
        """In units of a forward row."""
        return round(self.forward + BACKWARD * (self.attacked + TRAINED * self.trained))

    def seconds_s(self, speed: "Speed") -> float:
        """The time that they take."""
        return self.forward / speed.forward_per_s + (self.attacked + TRAINED * self.trained) / speed.attacked_per_s


@dataclass(frozen=True, slots=True)
class Speed:
    """U-Net rows a second, forward alone, and forward and backward to an embedding."""

    forward_per_s: float
    attacked_per_s: float


def drawn(images: int, *, sampling_steps: int, guidance_scale: float) -> Rows:
    """Guided generations."""
    return Rows(images * sampling_steps * (2 if guidance_scale != 1 else 1))


def forecast(rows: Rows, speed: Speed | None) -> str:
    """The cost as a line of text.

    Args:
        rows: all that is planned.
        speed: of this machine; None if it is not known.
    """
    kinds = {"forward": rows.forward, "forward and backward": rows.attacked, "of training": rows.trained}
    line = "planned at most: U-Net rows " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
    if speed is None:
        return line
    return f"{line}; about {duration(rows.seconds_s(speed))} on this machine without what is stored"


def measured_speed(model: StableDiffusion, *, clock: Callable[[], float] = time.perf_counter) -> Speed | None:
    """Speed on this machine, measured now in large batches or small; None beside a GPU.

    There the measurement's own batch may not fit, and the first finished cells tell the speed. A small batch serves as
    warm-up, which may take a hundred times as long as the pass itself; where it takes a second or more, the measure is
    a small batch too.
    """
    if model.device.type != "cpu":
        return None
    found = []
    for backward in (False, True):
        warm_s = _seconds_s(model, SMALL, clock, backward=backward)
        rows = SMALL if warm_s > 1 else LARGE
        found.append(rows / _seconds_s(model, rows, clock, backward=backward))
    return Speed(*found)


def _seconds_s(model: StableDiffusion, rows: int, clock: Callable[[], float], *, backward: bool) -> float:
    began = clock()
    _pass(model, rows, backward=backward)
    return max(clock() - began, 1e-9)


def _pass(model: StableDiffusion, rows: int, *, backward: bool) -> None:
    latents = torch.randn((rows, *model.latent_shape), generator=torch.Generator().manual_seed(0)).to(model.device)
    timestep = torch.full((rows,), model.timesteps // 2, device=model.device)
    embedding = model.encode([""]).repeat(rows, 1, 1).requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        error = model.denoising_error(latents, latents, timestep, embedding).sum()
        result = torch.autograd.grad(error, embedding)[0] if backward else error
    result.sum().item()  # waits for the device
