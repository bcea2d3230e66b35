"""The similarities that decide whether an image came back, for the erasure's own watch and for its proof alike.

A template is judged blind to the part that varies (`dori.judgement`): otherwise an erasure would count it as gone when
only that part has changed, and a copy of it would pass for a surrogate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dori.audit.judge import Case, Judge, judged
from dori.judgement import rule_by
from dori.metrics.similarity import Descriptor


def _masked(descriptor: Descriptor, case: Case) -> bool:
    return rule_by(descriptor).masks(case.memory.kind, painted=case.memory.varying_box is not None)


def limit(descriptor: Descriptor, case: Case) -> float:
    """The threshold that the median of the deciding similarities must exceed."""
    masked = rule_by(descriptor).masked
    return masked if masked is not None and _masked(descriptor, case) else descriptor.threshold


def deciding(descriptor: Descriptor, cases: Sequence[Case], images: Tensor) -> Tensor:
    """Similarity of images to the memories that they were asked for; diverged ones are like nothing.

    Args:
        descriptor: whose cosine decides.
        cases: n images that were asked for.
        images: their generations, shape (n, s, 3, H, W).

    Returns:
        Shape (n, s).
    """
    found = judged(Judge(descriptor), cases, images)
    rows = [found["masked" if _masked(descriptor, case) else "similarity"][row] for row, case in enumerate(cases)]
    return torch.stack(rows)
