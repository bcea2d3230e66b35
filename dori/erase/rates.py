"""Who comes back, as cells of a table: certificate and tables say it in the same columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dori.erase.outcomes import (
    ATTACK,
    PROMPT,
    RELEARN,
    RELEARN_LORA,
    Outcome,
    areas,
    attack_steps,
    back,
    relearning_steps,
)
from dori.erase.protocol import LORA_LONGER
from dori.erase.verdict import PUBLISHED_STEPS
from dori.findings import Group
from dori.stats import Estimate

DASH = "–"


@dataclass(frozen=True, slots=True)
class Line:
    """A table's row: its heading and its cells, as text."""

    heading: str
    cells: tuple[str, ...]


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
        *(["the same through a LoRA"] if by_lora(outcomes) else []),
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
            *([_relearned(outcomes, state, group, unreached, RELEARN_LORA)] if by_lora(outcomes) else []),
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


def by_lora(outcomes: Sequence[Outcome]) -> bool:
    """Whether images were relearned through a LoRA too."""
    return any(o.way == RELEARN_LORA for o in outcomes)


def _relearned(outcomes: Sequence[Outcome], state: str, group: Group, unreached: int, way: str = RELEARN) -> str:
    own = [o for o in outcomes if o.group == group]
    unreached *= LORA_LONGER if way == RELEARN_LORA else 1
    values = list(relearning_steps(own, state, unreached=unreached, way=way).values())
    if not values:
        return DASH
    never = sum(value >= unreached for value in values)
    return f"{np.median(values):g}" + (f" ({never} of {len(values)} never)" if never else "")
