"""Locality in activations: D_l(Y), how differently one layer answers to the embeddings of a set.

Source: methods.md 4.2. With the initial noise fixed and f_l(y) the flattened output (tokens x channels) of layer l,

    D_l(Y) = 2 / (n (n - 1)) * sum over i < j of || f_l(y_i) - f_l(y_j) ||_2.

The paper names neither timestep nor guidance. Here the noise follows the guided DDIM trajectory of its own embedding,
as in generation, and the conditional rows are read at the chosen steps; step 0 is the fixed noise itself, where only
the embedding differs. Value projections see the embedding alone and give the same at every step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dori.errors import DoriError
from dori.locality import given
from dori.locality.given import Array
from dori.model.hooks import hooked
from dori.model.stable_diffusion import StableDiffusion


def _flat(activations: Array, name: str) -> Tensor:
    return given.rows(activations, name).detach().double().flatten(1)


def discrepancy(activations: Array) -> float:
    """D_l(Y) of activations (n, ...): mean l2 distance of all pairs, in float64; NaN for fewer than two.

    Raises:
        DoriError: no tensor or array of that shape.
    """
    return float(torch.pdist(_flat(activations, "activations")).mean())


def discrepancy_across(first: Array, second: Array, pairs: Array) -> float:
    """As `discrepancy`, over pairs of activations of one set (n, ...) and of another (m, ...); NaN without pairs.

    Args:
        first: activations of one layer.
        second: further ones of the same layer.
        pairs: which pairs count, booleans (n, m).

    Raises:
        DoriError: activations of different layers, or pairs that do not fit them.
    """
    mine, theirs = _flat(first, "first"), _flat(second, "second")
    if mine.shape[1] != theirs.shape[1]:
        raise DoriError(
            f"activations of {mine.shape[1]} and of {theirs.shape[1]} entries have no distance; give one layer's"
        )
    pairs = given.pairs_of(pairs, len(mine), len(theirs))
    far = torch.cdist(mine, theirs, compute_mode="donot_use_mm_for_euclid_dist")
    return float(far[pairs].mean())


@contextmanager
def outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside the block, each forward pass leaves the output of every layer in the table."""
    seen: dict[str, Tensor] = {}

    def see(name: str, _rows: Tensor, output: Tensor) -> None:
        seen[name] = output.detach()

    with hooked(layers, see):
        yield seen


def activations(
    model: StableDiffusion,
    layers: Mapping[str, nn.Module],
    embeddings: Array,
    noise: Array,
    *,
    steps: Sequence[int] = (0,),
    ddim_steps: int = 50,
    guidance_scale: float = 7.0,
    rows_per_call: int = 64,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Outputs of layers for each embedding, at chosen steps of the trajectory that begins with given noise.

    One step's outputs are held at a time: n times all entries of all layers, float32 on the CPU.

    Args:
        model: the model, edits put on.
        layers: by name, as `StableDiffusion.layers` gives them.
        embeddings: shape (n, l, d), n >= 1.
        noise: initial noise, (1, c, h, w) shared by all embeddings or (n, c, h, w), one for each.
        steps: positions on the DDIM grid, ascending from 0 or more, all below `ddim_steps`.
        ddim_steps: steps of the grid.
        guidance_scale: of the trajectory between the chosen steps.
        rows_per_call: upper bound on the rows of one U-Net call, 2 or more.

    Yields:
        Step and, by layer, outputs of shape (n, tokens, channels).

    Raises:
        DoriError: at the call, before anything is computed: steps that the grid does not have, no layer or another
            model's, shapes that do not fit the model.
    """
    y, x = given.embeddings_of(model, embeddings, "embeddings"), given.rows(noise, "noise", least=1)
    _check_steps(model, steps, ddim_steps, rows_per_call)
    _check_layers(model, layers)
    if tuple(x.shape[1:]) != model.latent_shape or len(x) not in (1, len(y)):
        raise DoriError(
            f"noise has shape {tuple(x.shape)}; give one row of shape {model.latent_shape} for all embeddings, "
            f"or {len(y)}, one for each"
        )
    return _outputs_at(
        model,
        layers,
        y,
        x,
        steps=steps,
        ddim_steps=ddim_steps,
        guidance_scale=guidance_scale,
        rows_per_call=rows_per_call,
    )


def _check_steps(model: StableDiffusion, steps: Sequence[int], ddim_steps: int, rows_per_call: int) -> None:
    given.ascending(steps)
    if not 1 <= ddim_steps <= model.timesteps:
        raise DoriError(f"ddim_steps is {ddim_steps}; {model.name} has grids of 1 to {model.timesteps} steps")
    if steps[-1] >= ddim_steps:
        raise DoriError(
            f"steps reach {steps[-1]} and the grid of {ddim_steps} steps ends at {ddim_steps - 1}; give earlier ones, "
            "or more ddim_steps"
        )
    if rows_per_call < 2:
        raise DoriError(f"rows_per_call is {rows_per_call}; give 2 or more, since guidance takes two rows")


def _check_layers(model: StableDiffusion, layers: Mapping[str, nn.Module]) -> None:
    own = set(model.unet.modules())
    strange = [name for name, layer in layers.items() if layer not in own]
    if strange or not layers:
        which = f"{strange[0]}, which is no layer of {model.name}'s U-Net" if strange else "no layer"
        raise DoriError(f"layers hold {which}; give some of model.layers(...)")


@torch.no_grad()
def _outputs_at(
    model: StableDiffusion,
    layers: Mapping[str, nn.Module],
    embeddings: Tensor,
    noise: Tensor,
    *,
    steps: Sequence[int],
    ddim_steps: int,
    guidance_scale: float,
    rows_per_call: int,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    scheduler = model.ddim(ddim_steps)
    y, null = embeddings.to(model.device), model.encode([""])
    x = noise.expand(len(y), -1, -1, -1).to(model.device) * scheduler.init_noise_sigma
    for step, t in enumerate(scheduler.timesteps[: steps[-1] + 1]):
        found: dict[str, list[Tensor]] = {name: [] for name in layers}
        latents: list[Tensor] = []
        for part, context in zip(x.split(rows_per_call // 2), y.split(rows_per_call // 2), strict=True):
            times = t.to(x.device).expand(len(part))
            with outputs(layers) as seen:
                eps = model.predict_noise(part, times, context)
                for name in layers:
                    found[name].append(seen[name].float().cpu())
            if step < steps[-1]:
                away = model.predict_noise(part, times, null.expand_as(context))
                latents.append(scheduler.step(away + guidance_scale * (eps - away), t, part).prev_sample)
        if step in steps:
            yield step, {name: torch.cat(parts) for name, parts in found.items()}
        x = torch.cat(latents) if latents else x


def activation_rows(count: int, steps: Sequence[int]) -> int:
    """U-Net rows that `activations` costs for so many embeddings."""
    return count * (2 * steps[-1] + 1)
