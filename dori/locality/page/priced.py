"""What it costs on ordinary prompts to change a model's weights, in words and as one figure."""

from collections.abc import Iterable, Sequence
from statistics import median

from dori.locality.records import Price, Undone

DISTANCES = "kernel distance ± its spread over halves of the images, Fréchet, likeness with 95 % interval"


def distances(rows: Sequence[Price | Undone]) -> str:
    """Medians of the three figures that `DISTANCES` names, and of their spreads where these are known."""
    names = ("kernel", "frechet", "to_unedited", "kernel_std", "to_unedited_low", "to_unedited_high")
    kernel, frechet, likeness, spread, low, high = (_middle(getattr(row, name) for row in rows) for name in names)
    kernel += f" ± {spread}" if spread != "–" else ""
    likeness += f" ({low} to {high})" if low != "–" else ""
    return f"{kernel} / {frechet} / {likeness}"


def _middle(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.3g}" if known else "–"


def dearness(price: Price, bare: Price) -> float | None:
    """How many times further from the references the images of ordinary prompts lie than without a mask.

    By whichever distance grows more: Fréchet's, most of which is the small sample's bias, and the kernel distance,
    which has none but vanishes where the unedited model's own images are the reference.
    """
    pairs = [(price.frechet, bare.frechet)] + [(price.kernel, bare.kernel)] * price.held_out
    found = [after / before for after, before in pairs if after is not None and before is not None and before > 0]
    return max(found) if found else None
