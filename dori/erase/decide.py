"""The similarities that decide whether an image came back, for the erasure's own watch and for its proof alike.

A template is judged blind to the part that varies (`dori.judgement`): otherwise an erasure would count it as gone when
only that part has changed, and a copy of it would pass for a surrogate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dori.audit.judge import Case, Judge, judged
from dori.judgement import rule_by
from dori.metrics.similarity import Descriptor, masked_similarity

PART = 64  # images that are painted and described at a time


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


def deciding_pairs(descriptor: Descriptor, cases: Sequence[Case], images: Tensor) -> Tensor:
    """The similarity that would decide, of every image to every memory.

    The descriptor sees all images once, and once more for each template; in parts, so that memory is bounded.

    Args:
        descriptor: whose cosine decides.
        cases: m memories or controls.
        images: in [0, 1], shape (n, 3, H, W), of the memories' size.

    Returns:
        Shape (n, m).
    """
    references = descriptor(torch.stack([case.image for case in cases])).cpu()
    found = []
    for part in images.split(PART):
        alike = descriptor(part).cpu() @ references.T
        for column, case in enumerate(cases):
            if _masked(descriptor, case) and (box := case.memory.varying_box) is not None:
                alike[:, column] = masked_similarity(descriptor, part, case.image, box).cpu()
        found.append(alike)
    return torch.cat(found)
