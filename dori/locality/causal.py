"""The causal test: prune what one trigger points at, and attack again from others.

Agreement of masks is a correlation. If a memory lay where trigger i points, pruning M(y_i) would stop every trigger; if
it is everywhere, the mask stops y_i alone. Beyond the paper (issue of the locality analyses); pure bookkeeping here,
the attacks run in `loop`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dori.edit import WeightMask, union
from dori.stats import Estimate, wilson


@dataclass(frozen=True, slots=True)
class CrossTest:
    """What a matrix "mask from trigger i, replication by trigger j" says.

    Args:
        own: share of the masks under which their own trigger still replicates after a new attack (diagonal).
        others: the same for the other triggers.
        fresh: the same for attacks from fresh starts.
    """

    own: Estimate
    others: Estimate
    fresh: Estimate


def cross_test(matrix: Sequence[Sequence[bool]], fresh: Sequence[Sequence[bool]]) -> CrossTest:
    """Rates of a square matrix of replications (mask i, trigger j) and of fresh attacks under each mask."""
    own = [row[index] for index, row in enumerate(matrix)]
    others = [cell for index, row in enumerate(matrix) for column, cell in enumerate(row) if column != index]
    return CrossTest(*(wilson(sum(cells), len(cells)) for cells in (own, others, [c for row in fresh for c in row])))


def union_sizes(masks: int) -> tuple[int, ...]:
    """How many masks are joined at each trial: 1, 2, 4, ... and all."""
    sizes = [2**k for k in range(math.ceil(math.log2(masks)))] if masks > 1 else []
    return (*sizes, masks)


def joined(masks: Sequence[WeightMask], name: str) -> list[WeightMask]:
    """The unions of the first 1, 2, 4, ... masks, and of all."""
    return [union(f"{name} x {size}", masks[:size]) for size in union_sizes(len(masks))]


def enough(successes: Sequence[int], sizes: Sequence[int]) -> int | None:
    """The smallest number of joined masks from which on no fresh attack succeeded; None if some always did."""
    for index, size in enumerate(sizes):
        if not any(successes[index:]):
            return size
    return None
