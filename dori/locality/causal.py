"""The causal test: prune what one trigger points at, and attack again from others.

Agreement of masks is a correlation. If a memory lay where trigger i points, pruning M(y_i) would stop every trigger; if
it is everywhere, the mask stops y_i alone. Beyond the paper; pure bookkeeping here, the attacks run in `trial`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dori.edit import WeightMask, union
from dori.stats import Estimate, wilson


@dataclass(frozen=True, slots=True)
class CrossTest:
    """What a matrix "mask i, replication by trigger j" says: shares of attacks that still succeed.

    Args:
        own: a trigger attacked again under its own mask (the diagonal).
        others: under another trigger's.
        fresh: from fresh starts.
    """

    own: Estimate
    others: Estimate
    fresh: Estimate


def cross_test(
    matrix: Sequence[Sequence[bool]], fresh: Sequence[Sequence[bool]], own: Sequence[int] | None
) -> CrossTest:
    """Rates of a matrix of replications (mask i, trigger j) and of fresh attacks under each mask.

    Attacks under one mask hang together, and so do those of one trigger: Wilson's interval counts as many trials as
    there are masks or triggers, whichever are fewer, with the mean share of a mask's attacks that succeed. Each fresh
    attack has a start of its own, so there the masks are counted; rows of one attack each are trials of their own.

    Args:
        matrix: a row a mask.
        fresh: likewise.
        own: for each row the trigger (column) whose mask it is; None for masks of no trigger here.
    """
    columns = list(own) if own is not None else [-1] * len(matrix)
    mine = [[cell for column, cell in enumerate(row) if column == k] for k, row in zip(columns, matrix, strict=True)]
    others = [[cell for column, cell in enumerate(row) if column != k] for k, row in zip(columns, matrix, strict=True)]
    triggers = max(map(len, matrix), default=0)
    return CrossTest(_rate(mine), _rate(others, triggers if triggers > 1 else 0), _rate(fresh))


def _rate(rows: Sequence[Sequence[bool]], triggers: int = 0) -> Estimate:
    shares = [sum(row) / len(row) for row in rows if row]
    trials = min(len(shares), triggers or len(shares))
    return wilson(sum(shares) / len(shares) * trials, trials) if shares else wilson(0, 0)


def union_sizes(masks: int) -> tuple[int, ...]:
    """How many masks are joined at each trial: 1, 2, 4, ... and all."""
    sizes = [2**k for k in range(math.ceil(math.log2(masks)))] if masks > 1 else []
    return (*sizes, masks)


def joined(masks: Iterable[WeightMask], count: int, name: str) -> Iterator[tuple[int, WeightMask]]:
    """The unions of the first 1, 2, 4, ... of `count` masks, and of all, with their number; one is held at a time."""
    whole, sizes = None, set(union_sizes(count))
    for number, mask in enumerate(masks, 1):
        whole = union(f"{name} x {number}", [mask] if whole is None else [whole, mask])
        if number in sizes:
            yield number, whole


def enough(successes: Sequence[int], sizes: Sequence[int]) -> int | None:
    """The smallest number of joined masks from which on no fresh attack succeeded; None if some always did."""
    for index, size in enumerate(sizes):
        if not any(successes[index:]):
            return size
    return None
