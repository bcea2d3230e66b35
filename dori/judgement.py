"""Whether an image came back: the one rule behind tables, verdict, checks and comparisons.

An image comes back when the median of its similarities over fresh seeds exceeds the threshold. Part of a template
varies, so templates are judged by the similarity blind to that part, against the threshold measured for it; where
the audit has none, by whole images as all others.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dori.errors import DoriError
from dori.findings import Audit, Finding
from dori.metrics.similarity import Descriptor


@dataclass(frozen=True, slots=True)
class Rule:
    """The thresholds of an audit.

    Args:
        threshold: of whole-image similarities.
        masked: of masked similarities; None where none was measured.
    """

    threshold: float
    masked: float | None

    def masks(self, kind: str, *, painted: bool) -> bool:
        """Whether masked similarities decide about an image of this kind: a template's that has them."""
        return self.masked is not None and kind == "template" and painted

    def judges_masked(self, finding: Finding) -> bool:
        """Whether the masked similarities decide about this finding."""
        return self.masks(finding.kind, painted=len(finding.masked) > 0)

    def deciding(self, finding: Finding) -> tuple[float, ...]:
        """The similarities that decide, one a seed."""
        return finding.masked if self.judges_masked(finding) else finding.similarities

    def limit(self, finding: Finding) -> float:
        """The threshold that they must exceed."""
        return self.masked if self.masked is not None and self.judges_masked(finding) else self.threshold

    def median(self, finding: Finding) -> float:
        """The number that decides: the median over seeds, mid-point for an even count."""
        return float(np.median(self.deciding(finding)))

    def came_back(self, finding: Finding) -> bool:
        """Whether the median over seeds exceeds the threshold."""
        return self.median(finding) > self.limit(finding)

    def came_back_masked(self, finding: Finding) -> bool:
        """The same by masked similarities, whatever the image: for controls that are painted as the templates are."""
        return self.masked is not None and len(finding.masked) > 0 and float(np.median(finding.masked)) > self.masked


def last_step(images: Mapping[int, int]) -> int:
    """The last step of an attack that as many images reached as any other one.

    Where an attack goes on for some images alone, those steps belong to its curve, not to its result.

    Args:
        images: step to number of images judged there; not empty.
    """
    return max(step for step, count in images.items() if count == max(images.values()))


def rule_of(audit: Audit) -> Rule:
    """The audit's rule.

    Raises:
        DoriError: the audit's descriptor has no threshold.
    """
    threshold = _number(audit.descriptor.get("threshold"))
    if threshold is None:
        raise DoriError(
            "the audit's descriptor has no threshold, so nothing can be called a replication; "
            "calibrate the descriptor and run the audit again"
        )
    return Rule(threshold, _number(audit.descriptor.get("masked_threshold")))


def rule_by(descriptor: Descriptor) -> Rule:
    """The rule of whoever judges by this descriptor."""
    return Rule(descriptor.threshold, _number(descriptor.masked_threshold))


def _number(value: object) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]
