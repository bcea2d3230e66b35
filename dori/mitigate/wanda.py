"""Wanda for memorization: prune the weights that a memorized prompt uses more than the empty prompt.

Source: Chavhan et al. (2024), arXiv 2406.18566, by the code of its first author (ConceptPrune); methods.md 3. Layer:
the second linear of each feed-forward, W of shape (d, 4d), whose inputs have rows h. At each of the first U-Net calls

    S_ij = |W_ij| A_j,   A_j = sqrt(sum over prompts and rows of (h_j / |h|)^2),

and a weight is pruned where S is among the largest of its row i and above S of the empty prompt; the mask is the
union over the calls. The authors' code has other layers as options, of which the value projections of cross-attention
(`site="attention_value"`) are one. `column_norms` costs the trajectory; `mask_from_norms` is free, so that a sweep over
sparsities needs one trajectory:

    target, base = column_norms(model, y, seed=0), column_norms(model, empty, seed=0)
    edits = [mask_from_norms(model, target, base, sparsity=s, name=f"Wanda {s:.0%}") for s in (0.01, 0.05, 0.1)]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dori.edit import WeightMask
from dori.errors import DoriError
from dori.mitigate.noise_difference import detection_noise
from dori.model.hooks import hooked
from dori.model.stable_diffusion import DOWN_MID, Place, Site, StableDiffusion
from dori.sampling import guided_step

Selection = Literal["top_and_above_base", "top"]


def _add_energies(energies: Mapping[str, Tensor], step: int, name: str, inputs: Tensor, _output: Tensor) -> None:
    """Add sum_r (h_rj / |h_r|)^2 of a layer's input, float64, to row `step` of its table."""
    # float before the norm: squares overflow in half precision. normalize() leaves a zero row zero.
    unit = F.normalize(inputs.flatten(0, -2).float(), dim=1)
    energies[name][step] += unit.square().sum(0).double().cpu()


@torch.no_grad()
def column_norms(
    model: StableDiffusion,
    embeddings: Tensor,
    *,
    seed: int,
    steps: int = 50,
    counted_steps: int = 10,
    guidance_scale: float = 7.5,
    places: Sequence[Place] = DOWN_MID,
    site: Site = "feed_forward",
    rows_per_call: int = 128,
) -> dict[str, Tensor]:
    """A_j of each layer over the first calls of a guided DDIM trajectory, pooled over the prompts.

    Both halves of the guidance are counted. Prompt i starts from noise i of the seed, so that two sets of as many
    prompts share their noises, and one prompt's share does not depend on the others.

    Args:
        model: the model, edits put on.
        embeddings: prompt embeddings, shape (n, l, d).
        seed: of the initial noises.
        steps: steps of the DDIM trajectory, of which only the first `counted_steps` are made.
        counted_steps: U-Net calls that count.
        guidance_scale: of the trajectory.
        places: blocks whose layers are watched.
        site: which layer of each transformer block.
        rows_per_call: upper bound on the rows of one U-Net call.

    Returns:
        Layer name to shape (counted_steps, inputs of the layer), float64.
    """
    layers = model.layers(site, places)
    energies = {
        name: torch.zeros(counted_steps, layer.in_features, dtype=torch.float64) for name, layer in layers.items()
    }
    noise = detection_noise(model, len(embeddings), seed=seed)
    null, per_part = model.encode([""]), max(1, rows_per_call // 2)
    for x, y in zip(noise.split(per_part), embeddings.to(null).split(per_part), strict=True):
        context = torch.cat([null.expand_as(y), y])
        scheduler = model.ddim(steps)
        for step, t in enumerate(scheduler.timesteps[:counted_steps]):
            with hooked(layers, partial(_add_energies, energies, step)):
                x = guided_step(model, scheduler, x, t, context, guidance_scale)
    return {name: energy.sqrt() for name, energy in energies.items()}


def _pruned(weight: Tensor, target: Tensor, base: Tensor | None, top: int) -> Tensor:
    """Union over the calls of M_t = top entries of each row of S_target, where S_target > S_base; shape (d, 4d)."""
    size = weight.detach().abs().double().cpu()
    mask = torch.zeros(size.shape, dtype=torch.bool)
    for t, norms in enumerate(target):
        score = size * norms
        chosen = torch.zeros_like(mask).scatter_(1, score.topk(top, dim=1).indices, True)
        mask |= chosen if base is None else chosen & (score > size * base[t])
    return mask


def mask_from_norms(
    model: StableDiffusion,
    target: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None,
    *,
    sparsity: float,
    name: str,
    at_least_one: bool = True,
) -> WeightMask:
    """The mask that the column norms of two runs give at one sparsity.

    Args:
        model: the model whose norms these are.
        target: what `column_norms` returned for the prompts to forget.
        base: the same for as many empty prompts under the same seed; None compares with nothing.
        sparsity: share of each row's entries that are candidates at each call, in (0, 1]; int(sparsity 4d) of them.
        name: the edit's name.
        at_least_one: one candidate a row where narrow layers (sparsity 4d < 1) would floor to none.

    Raises:
        DoriError: sparsity out of range, or norms of layers that the model does not have.
    """
    if not 0 < sparsity <= 1:
        raise DoriError(f"Wanda's sparsity is {sparsity}; give a share above 0 and up to 1, such as 0.01")
    parameters = dict(model.unet.named_parameters())
    masks, tops = {}, {}
    for layer, norms in target.items():
        weight = parameters.get(f"{layer}.weight")
        if weight is None or weight.shape[1] != norms.shape[1]:
            raise DoriError(f"Wanda's norms of {layer} do not fit {model.name}; compute them on this model")
        # 0.57 * 100 is 56.999...: the tolerance makes the floor that of the written number.
        tops[layer] = max(int(sparsity * weight.shape[1] + 1e-9), int(at_least_one))
        masks[f"{layer}.weight"] = _pruned(weight, norms, base[layer] if base is not None else None, tops[layer])
    densities = {key: float(mask.double().mean()) for key, mask in masks.items()}
    return WeightMask(name, masks, {"sparsity": sparsity, "top_per_row": tops, "densities": densities})


@dataclass(frozen=True, slots=True)
class Wanda:
    """Prune for one prompt or for several jointly; defaults as in the authors' code for memorization.

    Differs from that code in: down and mid blocks, as in the DoRI paper's figures, instead of all (`places`);
    DDIM instead of PNDM; float32; one noise of its own for each prompt; `at_least_one`.

    Args:
        sparsity: share of each row's entries that are candidates at each call, in (0, 1].
        ddim_steps: steps of the trajectory.
        counted_steps: the first U-Net calls whose masks are united ("tau").
        guidance_scale: of the trajectory.
        places: blocks whose layers are pruned.
        site: which layer of each transformer block; the second linear of the feed-forward as published.
        at_least_one: see `mask_from_norms`; without it a narrow layer is left whole.
        selection: "top" drops the comparison with the empty prompt, and thus the base run: plain Wanda.
        rows_per_call: upper bound on the rows of one U-Net call.
    """

    sparsity: float = 0.01
    ddim_steps: int = 50
    counted_steps: int = 10
    guidance_scale: float = 7.5
    places: tuple[Place, ...] = DOWN_MID
    site: Site = "feed_forward"
    at_least_one: bool = True
    selection: Selection = "top_and_above_base"
    rows_per_call: int = 128

    def column_norms(self, model: StableDiffusion, embeddings: Tensor, *, seed: int) -> dict[str, Tensor]:
        """`column_norms` under these settings."""
        return column_norms(
            model,
            embeddings,
            seed=seed,
            steps=self.ddim_steps,
            counted_steps=self.counted_steps,
            guidance_scale=self.guidance_scale,
            places=self.places,
            site=self.site,
            rows_per_call=self.rows_per_call,
        )

    def __call__(self, model: StableDiffusion, embeddings: Tensor, *, seed: int) -> WeightMask:
        """The joint mask of the embeddings; one embedding gives the mask of one memory.

        `details` hold the settings, the candidates a row, each layer's density after the union (up to counted_steps
        times the sparsity) and the U-Net rows.

        Args:
            model: the model.
            embeddings: prompt embeddings, shape (n, l, d), of prompts or any other.
            seed: of the initial noises, shared by the run with empty prompts.

        Raises:
            DoriError: sparsity out of range.
        """
        rows = model.rows
        target = self.column_norms(model, embeddings, seed=seed)
        base = None
        if self.selection == "top_and_above_base":
            base = self.column_norms(model, model.encode([""]).expand(len(embeddings), -1, -1), seed=seed)
        edit = mask_from_norms(
            model, target, base, sparsity=self.sparsity, name="Wanda", at_least_one=self.at_least_one
        )
        return WeightMask(
            edit.name,
            edit.masks,
            dict(edit.details)
            | {
                "prompts": len(embeddings),
                "selection": self.selection,
                "counted_steps": self.counted_steps,
                "ddim_steps": self.ddim_steps,
                "guidance_scale": self.guidance_scale,
                "seed": seed,
                "rows": model.rows - rows,
            },
        )
