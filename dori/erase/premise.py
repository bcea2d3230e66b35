"""The premise of L_Unc in a proof: whether memories are known without a prompt, before and after.

The yardstick is the denoising error under the empty prompt, image by image with the same noises: of memories on a
model, less that on models that never saw them, less the same difference for controls, which takes off what sets the
models apart on any image.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats

from dori.audit.judge import Case, pixels_sha256
from dori.cost import Rows
from dori.erase.battery import State
from dori.erase.outcomes import by_group
from dori.erase.unprompted import NOISES, unprompted_errors
from dori.findings import Group
from dori.run import Run, cell_key
from dori.stats import Estimate


@dataclass(frozen=True, slots=True)
class Unprompted:
    """One image's mean denoising error under the empty prompt in one state; null where it is not finite."""

    state: str
    id: str
    group: Group
    error: float | None


def unprompted_key(state: State) -> str:
    """The cell of a state."""
    return cell_key("unprompted", state.name)


def unprompted_rows(cases: Sequence[Case]) -> Rows:
    """The cost of one state."""
    return Rows(NOISES * len(cases))


def unprompted_in(
    run: Run, state: State, cases: Sequence[Case], fingerprints: Mapping[str, str], *, seed: int
) -> list[Unprompted]:
    """Every image's error in a state, as a cell of the run."""
    latents = torch.stack([case.latent for case in cases])
    images = pixels_sha256(torch.stack([case.image for case in cases]))
    inputs = state.made_of(fingerprints) | {"seed": seed, "images": images}

    def compute() -> dict[str, Any]:
        errors = unprompted_errors(state.model, latents, seed=seed).tolist()
        return {"errors": [round(error, 6) if math.isfinite(error) else None for error in errors]}

    with state.applied():
        errors = run.once_record(unprompted_key(state), inputs, compute)["errors"]
    return [
        Unprompted(state.name, case.memory.id, case.group, error) for case, error in zip(cases, errors, strict=True)
    ]


def unprompted_contrast(found: Sequence[Unprompted], state: str, twins: Sequence[str]) -> Estimate:
    """Memories less controls, each image less itself on the twins where there are some; Welch's 95 % interval.

    Negative: in this state the memories are known without a prompt. `n` counts the memories.
    """
    errors = {
        name: {one.id: one.error for one in found if one.state == name and one.error is not None}
        for name in (state, *twins)
    }
    groups = {one.id: one.group for one in found}
    memories, controls = by_group(errors[state], [errors[twin] for twin in twins], groups)
    if not memories or not controls:
        return Estimate(math.nan, math.nan, math.nan, len(memories))
    value = sum(memories) / len(memories) - sum(controls) / len(controls)
    if min(len(memories), len(controls)) < 2:
        return Estimate(value, math.nan, math.nan, len(memories))
    low, high = stats.ttest_ind(memories, controls, equal_var=False).confidence_interval(0.95)
    return Estimate(value, float(low), float(high), len(memories))
