"""What the testbed promises, as rows: each measured figure beside its goal. Pure functions of measurements.

A row is `{"promise", "value", "interval", "goal", "reached", "detail"}`; value and interval are None where nothing
could be measured. Rates are MR of `dori.metrics.replication` with Wilson intervals over memories.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dori.metrics.replication import replication
from dori.metrics.similarity import Descriptor
from dori.stats import Estimate, bootstrap, wilson

Row = dict[str, Any]
Similarities = Mapping[str, Sequence[float]]
HIDDEN, KEPT = 0.10, 0.80  # a mitigation works where MR is at most this, and objects keep this share of their rate


def row(
    promise: str, estimate: Estimate, *, at_least: float = -math.inf, at_most: float = math.inf, detail: str = ""
) -> Row:
    """A figure between two bounds."""
    bounds = [f">= {at_least:g}"] * (at_least > -math.inf) + [f"<= {at_most:g}"] * (at_most < math.inf)
    measured = math.isfinite(estimate.value)
    interval = [round(estimate.low, 6), round(estimate.high, 6)]
    return {
        "promise": promise,
        "value": round(estimate.value, 6) if measured else None,
        "interval": interval if measured and all(map(math.isfinite, interval)) else None,
        "goal": " and ".join(bounds),
        "reached": measured and at_least <= estimate.value <= at_most,
        "detail": detail,
    }


def unmeasured(promise: str, goal: str, why: str) -> Row:
    """A promise that could not be put to the test, and is not kept."""
    return {"promise": promise, "value": None, "interval": None, "goal": goal, "reached": False, "detail": why}


def bare(value: float) -> Estimate:
    """A figure without an interval."""
    return Estimate(value, math.nan, math.nan, 1)


def summary(similarities: Similarities, threshold: float) -> str:
    """A group in words: its MR and its mean similarity."""
    rate = replication(similarities, threshold).rate
    return f"MR {rate.value:.2f} of {rate.n}, mean similarity {mean_similarity(similarities):.2f}"


def mean_similarity(similarities: Similarities) -> float:
    """Mean over memories and seeds; NaN without any."""
    values = [value for own in similarities.values() for value in own]
    return float(np.mean(values)) if values else math.nan


def rate_row(
    promise: str,
    similarities: Similarities,
    threshold: float,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    detail: str = "",
) -> Row:
    """The MR of a group."""
    own = f"{summary(similarities, threshold)}, threshold {threshold:.3f}"
    return row(
        promise,
        replication(similarities, threshold).rate,
        at_least=at_least,
        at_most=at_most,
        detail=f"{own}; {detail}" if detail else own,
    )


def dose_row(by_dose: Mapping[int, Similarities], threshold: float, *, highest: int = 2) -> Row:
    """The MR of the highest doses together; every dose stands in the detail."""
    doses = sorted(by_dose, reverse=True)
    detail = "; ".join(f"dose {dose}: {summary(by_dose[dose], threshold)}" for dose in doses)
    together = {memory: own for dose in doses[:highest] for memory, own in by_dose[dose].items()}
    return row(
        f"MR of verbatim memories of doses {' and '.join(map(str, doses[:highest]))}, by prompt",
        replication(together, threshold).rate,
        at_least=0.95,
        detail=f"{detail}; threshold {threshold:.3f}",
    )


def recall_row(promise: str, before: Similarities, after: Similarities, threshold: float, *, detail: str = "") -> Row:
    """How much of the recall an edit leaves: the larger of the ratios of MR and of mean similarity.

    Kept below one half, both have fallen by more than half.
    """
    rates = [replication(group, threshold).rate.value for group in (before, after)]
    means = [mean_similarity(group) for group in (before, after)]
    if rates[0] == 0 or means[0] <= 0:
        return unmeasured(promise, "< 0.5", "nothing is recalled without the edit")
    left = max(rates[1] / rates[0], means[1] / means[0])
    own = f"before: {summary(before, threshold)}; after: {summary(after, threshold)}"
    return row(promise, bare(left), detail=f"{own}; {detail}" if detail else own) | {
        "goal": "< 0.5",
        "reached": left < 0.5,
    }


@dataclass(frozen=True, slots=True)
class Tried:
    """One setting of a mitigation.

    Args:
        name: of the setting.
        rate: MR of the memories under it.
        objects: share of ordinary images that show their object, over the same share without the edit; None where MR
            was too high to ask.
    """

    name: str
    rate: Estimate
    objects: float | None = None

    @property
    def reached(self) -> bool:
        """Memories hidden and objects kept."""
        return self.rate.value <= HIDDEN and self.objects is not None and self.objects >= KEPT

    def described(self) -> str:
        """The setting in words."""
        kept = "" if self.objects is None else f", objects {100 * self.objects:.0f} %"
        return f"{self.name}: MR {self.rate.value:.2f}{kept}"


def mitigation_row(promise: str, tried: Sequence[Tried], *, detail: str = "") -> Row:
    """The first setting that hides the memories and keeps the objects; if none does, the one with the lowest MR."""
    chosen = next((one for one in tried if one.reached), min(tried, key=lambda one: one.rate.value))
    first = f"first at {chosen.name}" if chosen.reached else f"nowhere; lowest at {chosen.name}"
    own = "; ".join([first, *(one.described() for one in tried)])
    return row(promise, chosen.rate, at_most=HIDDEN, detail=f"{own}; {detail}" if detail else own) | {
        "goal": f"<= {HIDDEN:g} with objects >= {100 * KEPT:.0f} % of before",
        "reached": chosen.reached,
    }


def objects_row(found: np.ndarray, *, accuracy: float, classes: int, shown: int, seed: int) -> Row:
    """Share of ordinary images that show their prompt's object; interval over prompts.

    Args:
        found: booleans, shape (prompts, seeds).
        accuracy: the classifier's own, on held-out compositions.
        classes: number of kinds that are drawn.
        shown: guesses that the classifier has for each image.
        seed: of the bootstrap.
    """
    estimate = bootstrap(found.mean(axis=1), np.mean, seed=seed)
    return row(
        "ordinary prompts whose object is found in the image",
        estimate,
        at_least=0.6,
        detail=(
            f"{found.shape[0]} prompts, {found.shape[1]} images each, among the {shown} likeliest of {classes} kinds; "
            f"chance {shown / classes:.3f}; the classifier finds {accuracy:.3f} of the objects of held-out compositions"
        ),
    )


def blind_rows(scores: Mapping[str, float], *, sizes: tuple[int, int]) -> list[Row]:
    """Scores that look at no model must not tell memories from controls."""
    return [
        row(
            f"AUROC of {name}, memories against controls",
            bare(value),
            at_least=0.4,
            at_most=0.6,
            detail=f"{sizes[0]} verbatim memories, {sizes[1]} controls; 0.5 means matched",
        )
        for name, value in scores.items()
    ]


def descriptor_row(descriptor: Descriptor) -> Row:
    """The judge's own quality, from its calibration."""
    promise, measured = "TPR of the copy descriptor at FPR 0.1 %", descriptor.calibration
    if measured is None:
        return unmeasured(promise, ">= 0.95", "the descriptor was never calibrated")
    copies = measured.positive_pairs
    found = row(
        promise,
        wilson(round(measured.true_positive_rate * copies), copies),
        at_least=0.95,
        detail=(
            f"threshold {descriptor.threshold:.3f}, FPR {measured.false_positive_rate:.5f} "
            f"on {measured.negative_pairs} look-alikes; {measured.measured_on}"
        ),
    )
    return found | {"reached": found["reached"] and measured.false_positive_rate <= 0.001}


def to_text(rows: Sequence[Row]) -> str:
    """The rows as lines for a terminal: kept or not, figure, interval, goal, and the detail below."""
    lines = []
    for one in rows:
        value = "-" if one["value"] is None else f"{one['value']:.3f}"
        interval = "" if one["interval"] is None else " [{:.3f}, {:.3f}]".format(*one["interval"])
        state = "kept  " if one["reached"] else "BROKEN"
        lines += [f"{state}  {one['promise']}: {value}{interval}, goal {one['goal']}", f"        {one['detail']}"]
    kept = sum(bool(one["reached"]) for one in rows)
    return "\n".join([*lines, f"{kept} of {len(rows)} promises kept"])
