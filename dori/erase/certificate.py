"""The certificate: one self-contained page that says what was erased, how it was judged, and what speaks against it.

A pure function of `proof.json`: no model, no script, no outside request, every text escaped; it shows no image and no
prompt, only ids and hashes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dori.erase.outcomes import ATTACK, PROMPT, RELEARN, Outcome, areas, attack_steps, back, relearning_steps
from dori.erase.verdict import PUBLISHED_STEPS, RULES
from dori.findings import Group
from dori.report.page import page
from dori.stats import Estimate

WORDS = {
    "removed": "The memories behave as on a model that never saw them.",
    "weakened": "The memories are harder to bring back than before; nothing shows that they behave like unseen images.",
    "hidden": "The prompts no longer bring the memories back, and an attack on the embedding does.",
    "untouched": "The memories come back as before.",
    "unproven": "Nothing came back from the original model, so nothing can be said.",
}
SIGNS = {"removed": "✓", "weakened": "◐", "hidden": "◌", "untouched": "✗", "unproven": "?"}
DASH = "–"


@dataclass(frozen=True, slots=True)
class Line:
    """A table's row: its heading and its cells, as text."""

    heading: str
    cells: tuple[str, ...]


def outcomes_of(record: Mapping[str, Any]) -> list[Outcome]:
    """The outcomes of a stored proof."""
    return [Outcome(**{**one, "similarities": tuple(one["similarities"])}) for one in record["outcomes"]]


def render(record: Mapping[str, Any]) -> str:
    """The certificate as HTML.

    Args:
        record: what `proof.json` holds.
    """
    outcomes, name = outcomes_of(record), record["verdict"]["name"]
    relearning = record["protocol"]["relearning"]
    unreached = relearning["steps"] + relearning["check_every"] if relearning else 0
    return page(
        "erase/certificate.html",
        record=record,
        name=name,
        sign=SIGNS[name],
        words=WORDS[name],
        rules=RULES,
        split=_split(record),
        judge=_judge(record),
        ways=ways(outcomes),
        lines={group: rates(outcomes, group, unreached=unreached) for group in ("memory", "control")},
        tests=[_test(one) for one in record["verdict"]["tests"]],
        damage=[_damage(one) for one in record["damage"]],
        settings=_settings(record),
        cost=_cost(record),
    )


# ------------------------------------------------------------------------------------------------------------ tables

STARTS = {"prompt": "the prompt", "gaussian": "noise", "foreign": "other prompts"}


def _starts(outcomes: Sequence[Outcome]) -> list[str]:
    """Where attacks began, if they began at several places, which then have columns of their own."""
    found = [start for start in STARTS if any(o.way == ATTACK and o.start == start for o in outcomes)]
    return found if len(found) > 1 else []


def ways(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Headings of the cells of `rates`."""
    return (
        "prompt",
        f"DoRI, {PUBLISHED_STEPS} steps",
        *(f"from {STARTS[start]}" for start in _starts(outcomes)),
        "DoRI, all steps",
        "mean similarity over its steps",
        "long DoRI",
        "restricted DoRI",
        "initial latent (position)",
        "steps to relearn",
    )


def rates(outcomes: Sequence[Outcome], group: Group, *, unreached: int) -> list[Line]:
    """For each state the share of a group's images that come back in each way, and the median steps to relearn."""
    lines = []
    for state in dict.fromkeys(o.state for o in outcomes):
        last = attack_steps(outcomes, state)
        cells = [
            _rate(back(outcomes, state, group, PROMPT)),
            _rate(back(outcomes, state, group, ATTACK, at_most=PUBLISHED_STEPS)),
            *(
                _rate(back(outcomes, state, group, ATTACK, start=start, at_most=PUBLISHED_STEPS))
                for start in _starts(outcomes)
            ),
            _rate(back(outcomes, state, group, ATTACK)) + (f" at {last}" if last else ""),
            _area([o for o in outcomes if o.group == group], state),
            *(_rate(back(outcomes, state, group, way)) for way in ("long", "restricted")),
            _latent(outcomes, state, group),
            _relearned(outcomes, state, group, unreached),
        ]
        lines.append(Line(state, tuple(cells)))
    return lines


def _rate(estimate: Estimate) -> str:
    if estimate.n == 0:
        return DASH
    return f"{round(estimate.value * estimate.n)} of {estimate.n} ({estimate.low:.2f} to {estimate.high:.2f})"


def _area(outcomes: Sequence[Outcome], state: str) -> str:
    values = list(areas(outcomes, state).values())
    return f"{np.mean(values):.3f}" if values else DASH


def _latent(outcomes: Sequence[Outcome], state: str, group: Group) -> str:
    own = [o for o in outcomes if (o.state, o.group, o.way) == (state, group, "latent") and o.position is not None]
    if not own:
        return DASH
    positions = [o.position or 0.0 for o in own]
    return f"{sum(o.came_back for o in own)} of {len(own)} ({np.median(positions):.3f})"


def _relearned(outcomes: Sequence[Outcome], state: str, group: Group, unreached: int) -> str:
    own = [o for o in outcomes if o.group == group and o.way == RELEARN]
    values = list(relearning_steps(own, state, unreached=unreached).values())
    if not values:
        return DASH
    never = sum(value >= unreached for value in values)
    return f"{np.median(values):g}" + (f" ({never} of {len(values)} never)" if never else "")


def _test(one: Mapping[str, Any]) -> Line:
    e = one["found"]
    shown = "equivalent" if e["shown"] else "different" if e["excluded"] else "not shown"
    shown += "" if e["spread"] else ", all images alike"
    return Line(
        f"{one['state']}: {one['quantity']}",
        (
            f"{e['difference']:+.3g}",
            f"{e['low']:+.3g} to {e['high']:+.3g}",
            f"±{e['margin']:g}",
            f"{e['p']:.3g}",
            f"{e['counts'][0]} and {e['counts'][1]}",
            shown,
        ),
    )


def _damage(row: Mapping[str, Any]) -> Line:
    names = (
        "frechet",
        "kernel",
        "alignment",
        "to_original",
        "held_out_loss",
        "neighbour_frechet",
        "neighbour_kernel",
        "neighbour_alignment",
        "neighbour_to_original",
    )
    return Line(row["state"], tuple(DASH if row[name] is None else f"{row[name]:.4g}" for name in names))


# ------------------------------------------------------------------------------------------------------------- words


def _split(record: Mapping[str, Any]) -> str:
    return {
        "all": "All given memories were erased and judged.",
        "tune": "These memories are the half on which settings may have been tuned: their figures are no test.",
        "test": "These memories are the half on which nothing was tuned; the settings were frozen before.",
    }[record["split"]]


def _judge(record: Mapping[str, Any]) -> str:
    twins = [twin["name"] for twin in record["twins"]]
    if twins:
        return (
            f"Each image is compared with itself on {' and '.join(twins)}, which never saw the memories; what "
            "fine-tuning does to any image cancels by the same difference for controls."
        )
    if not record["controls"]:
        return "There is neither a model that never saw the memories nor a control: nothing can be called removed."
    blind = ", ".join(f"{name} {value:.2f}" for name, value in record["blind"].items()) or "not measured"
    return (
        "There is no model that never saw the memories: they are compared with controls on the erased model. "
        f"Scores that look at no model tell the two apart with AUROC {blind} (0.5: not at all)."
    )


def _settings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the settings, flat."""

    def flat(value: object, name: str) -> list[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            return [line for key, inner in value.items() for line in flat(inner, f"{name}.{key}")]
        return [(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]

    return [
        *flat(record["eraser"]["settings"], "eraser"),
        *flat(record["protocol"], "protocol"),
        *flat(record["descriptor"], "descriptor"),
    ]


def _cost(record: Mapping[str, Any]) -> str:
    seconds = record["seconds"]
    time = "" if seconds is None else f", {seconds / 60:.1f} minutes"
    return f"{record['eraser']['rows']:,} U-Net rows{time} for the erasure"
