"""What a model sees of an image without a prompt: the premise of the loss L_Unc, and that loss.

L_Unc (`dori.erase.adversarial`) teaches that under a trigger the noised memory looks as it did without a prompt. That
takes the memory away as far as the model does not know it without one. The yardstick is the denoising error under the
empty prompt, image by image with the same noises: of memories on a model, less that on models that never saw them,
less the same difference for controls, which takes off what sets the models apart on any image.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from dori.audit.judge import Case, pixels_sha256
from dori.cost import Rows
from dori.erase.battery import State
from dori.erase.outcomes import by_group
from dori.erase.pairs import Batch, Forget, Pairs, denoising_errors, noised, step_generator
from dori.erase.tuning import RowLosses, Tuned
from dori.findings import Group
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run, cell_key
from dori.stats import Estimate

NOISES = 8  # of each image


@dataclass(frozen=True, slots=True)
class Unprompted:
    """One image's mean denoising error under the empty prompt in one state; null where it is not finite."""

    state: str
    id: str
    group: Group
    error: float | None


def unprompted_errors(model: StableDiffusion, latents: Tensor, *, seed: int, rows_per_call: int = 64) -> Tensor:
    """Denoising error under the empty prompt, mean over `NOISES` noises and timesteps, shape (n,).

    Args:
        model: the model.
        latents: scaled latents, shape (n, c, h, w).
        seed: of noises and timesteps, which depend on it and on the image's place alone.
        rows_per_call: upper bound on the rows of one U-Net call.
    """
    rows = latents.float().repeat(NOISES, 1, 1, 1)
    null = model.encode([""]).cpu().expand(len(rows), -1, -1)
    batch = noised(model, rows, null, step_generator("without prompt", seed, 1))
    return (
        denoising_errors(model, batch, rows_per_call=rows_per_call).unflatten(0, (NOISES, len(latents))).mean(0).cpu()
    )


def without_prompt(
    model: StableDiffusion, memories: Forget, retain: Pairs, *, seed: int, rows_per_call: int = 64
) -> dict[str, float]:
    """Mean error under the empty prompt of the memories, and of as many ordinary images: what an eraser can know.

    Args:
        model: the model as it was.
        memories: n images.
        retain: ordinary pairs, of which n are drawn.
        seed: of noises and timesteps, the same for both.
        rows_per_call: upper bound on the rows of one U-Net call.
    """
    picked = torch.randint(len(retain), (len(memories),), generator=step_generator("without prompt", seed, 0))
    groups = {"memories": memories.latents, "ordinary": retain.latents[picked]}
    means = {
        name: unprompted_errors(model, latents, seed=seed, rows_per_call=rows_per_call).mean()
        for name, latents in groups.items()
    }
    return {name: round(float(mean), 6) for name, mean in means.items()}


def unconditional_losses(tuned: Tuned, batch: Batch) -> RowLosses:
    """Of each row of L_Unc, the squared distance to what the model as it was predicts without a prompt.

    In the network's own parametrisation, as all training losses.
    """
    model = tuned.model
    noisy, null = model.add_noise(batch.latents, batch.noise, batch.timestep), model.encode([""]).to(batch.embeddings)

    def losses(rows: Tensor) -> Tensor:
        rows = rows.to(noisy.device)
        z, t, y = noisy[rows], batch.timestep[rows], batch.embeddings[rows]
        with tuned.as_before():
            target = model.predict(z, t, null.expand_as(y))
        return (model.predict(z, t, y) - target).square().flatten(1).mean(1)

    return losses


# ---------------------------------------------------------------------------------------------------------- in a proof


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
