"""What it costs on ordinary prompts to change a model's weights, in words and as one figure."""

from collections.abc import Sequence
from statistics import median

from dori.locality.records import Price, Undone

DISTANCES = "kernel distance, Fréchet, likeness"


def distances(rows: Sequence[Price | Undone]) -> str:
    """Medians of the three figures that `DISTANCES` names."""
    columns = [(p.kernel, p.frechet, p.to_unedited) for p in rows]
    known = [[value for value in column if value is not None] for column in zip(*columns, strict=True)]
    return " / ".join(f"{median(values):.3g}" if values else "–" for values in known)


def dearness(price: Price, bare: Price) -> float | None:
    """How many times further from the references the images of ordinary prompts lie than without a mask.

    By whichever distance grows more: Fréchet's, most of which is the small sample's bias, and the kernel distance,
    which has none but vanishes where the unedited model's own images are the reference.
    """
    pairs = [(price.frechet, bare.frechet)] + [(price.kernel, bare.kernel)] * price.held_out
    found = [after / before for after, before in pairs if after is not None and before is not None and before > 0]
    return max(found) if found else None
