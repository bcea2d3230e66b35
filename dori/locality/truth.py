"""Ground truth of the testbed: where planting changed the weights, and how much of that a mask covers.

The planted model and its twin went on from one base; the twin saw ordinary images in the memories' places. The excess
of a set of weights is what planting changed beyond what any other training would,

    excess(S) = mean over twins of sum over S of (P - T_k)^2 - mean over pairs of twins of sum over S of (T_k - T_m)^2,

and a mask's coverage of a layer is the share of the layer's excess that lies in the mask; a random mask of equal size
covers its own density in expectation. Twins judge masks here; no method sees them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from dori.model.stable_diffusion import EVERYWHERE, StableDiffusion

Energies = dict[str, Tensor]


def energies(first: StableDiffusion, second: StableDiffusion) -> Energies:
    """Squared difference of every U-Net parameter of two models of one shape, float64, by parameter name."""
    other = dict(second.unet.named_parameters())
    return {
        name: (weight.detach().double() - other[name].detach().double()).square().cpu()
        for name, weight in first.unet.named_parameters()
    }


def mean_energies(parts: Sequence[Energies]) -> Energies:
    """The mean of several tables, parameter by parameter."""
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


def changes(planted: StableDiffusion, twins: Sequence[StableDiffusion]) -> tuple[Energies, Energies | None]:
    """Planted minus twin, and twin minus twin (None with fewer than two twins), each the mean over all pairs."""
    floor = [energies(a, b) for a, b in combinations(twins, 2)]
    return mean_energies([energies(planted, twin) for twin in twins]), mean_energies(floor) if floor else None


def excess_energies(change: Energies, floor: Energies | None) -> Energies:
    """Planted minus twin beyond twin minus twin, weight by weight; negative where planting left more alone."""
    return change if floor is None else {name: energy - floor[name] for name, energy in change.items()}


@dataclass(frozen=True, slots=True)
class Excess:
    """The change of one group of parameters.

    Args:
        name: the group.
        change: sum of (planted - twin)^2.
        floor: sum of (twin - twin)^2; None with fewer than two twins.
        weights: number of weights.
    """

    name: str
    change: float
    floor: float | None
    weights: int

    @property
    def excess(self) -> float:
        """Change beyond the floor; may be negative where planting did not touch the group."""
        return self.change - (self.floor or 0.0)


def group_of(parameter: str) -> str:
    """Which kind of part a U-Net parameter belongs to, in words, with its place (down, mid, up or ends)."""
    place = next((word for word in EVERYWHERE if parameter.startswith(word)), "ends")
    if ".attn2.to_v" in parameter:
        kind = "cross-attention values"
    elif ".attn2." in parameter:
        kind = "cross-attention, other"
    elif ".ff.net.2." in parameter:
        kind = "feed-forward second linear"
    elif ".ff." in parameter:
        kind = "feed-forward first linear"
    elif ".attn1." in parameter:
        kind = "self-attention"
    else:
        kind = "convolutions and rest"
    return f"{kind}, {place}"


def layer_of(parameter: str) -> str:
    """The layer whose weight or bias a parameter is."""
    return parameter.rpartition(".")[0]


def excess_by(group: Callable[[str], str], change: Energies, floor: Energies | None) -> tuple[Excess, ...]:
    """The excess of every group of parameters (`group_of` or `layer_of`), largest first."""
    groups: dict[str, list[str]] = {}
    for name in change:
        groups.setdefault(group(name), []).append(name)
    found = [
        Excess(
            name,
            sum(float(change[n].sum()) for n in members),
            None if floor is None else sum(float(floor[n].sum()) for n in members),
            sum(change[n].numel() for n in members),
        )
        for name, members in groups.items()
    ]
    return tuple(sorted(found, key=lambda one: -one.excess))


def coverage(energy: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> float:
    """Share of the masked layers' change (or excess) that lies in the mask; both by parameter name.

    NaN where the layers hold none.
    """
    total = sum(float(energy[name].sum()) for name in masks)
    return sum(float(energy[name][mask].sum()) for name, mask in masks.items()) / total if total > 0 else math.nan


def random_coverage(energy: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> float:
    """The expected `coverage` of random masks as large as these in every layer: its density, in one layer."""
    total = sum(float(energy[name].sum()) for name in masks)
    held = sum(float(energy[name].sum()) * float(mask.double().mean()) for name, mask in masks.items())
    return held / total if total > 0 else math.nan


def density(masks: Mapping[str, Tensor]) -> float:
    """Share of the weights of the masked layers that the mask holds."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
