"""What an erasure and its proof cost, by arithmetic before anything runs: rows that go through the U-Net, at most."""

from dataclasses import dataclass

from dori.audit.schedule import BACKWARD
from dori.progress import duration

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

    def seconds_s(self, *, forward_per_s: float, both_per_s: float) -> float:
        """Time at so many rows a second, forward and forward with backward to an embedding."""
        return self.forward / forward_per_s + (self.attacked + TRAINED * self.trained) / both_per_s


def drawn(images: int, *, sampling_steps: int, guidance_scale: float) -> Rows:
    """Guided generations."""
    return Rows(images * sampling_steps * (2 if guidance_scale != 1 else 1))


def forecast(rows: Rows, speed: tuple[float, float] | None) -> str:
    """The cost as a line of text.

    Args:
        rows: all that is planned.
        speed: rows a second, forward and forward with backward to an embedding; None if it is not known.
    """
    line = (
        f"planned at most: {rows.forward:,} U-Net rows forward, {rows.attacked:,} forward and backward, "
        f"{rows.trained:,} of training"
    )
    if speed is None:
        return line
    took = duration(rows.seconds_s(forward_per_s=speed[0], both_per_s=speed[1]))
    return f"{line}; about {took} on this machine without what is stored"
