"""Ground truth of the testbed: where planting changed the weights, and how much of that a mask covers.

The planted model and its twin went on from one base; the twin saw ordinary images in the memories' places. The excess
of a set of weights is what planting changed beyond what any other training would,

    excess(S) = mean over twins of sum over S of (P - T_k)^2 - mean over pairs of twins of sum over S of (T_k - T_m)^2,

and a mask's coverage of a layer is the share of the layer's excess that lies in the mask; a random mask of equal size
covers its own density in expectation. Twins judge masks here; no method sees them.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from dori.model.stable_diffusion import EVERYWHERE, StableDiffusion

Energies = dict[str, Tensor]


def energy(parameter: str, pairs: Sequence[tuple[StableDiffusion, StableDiffusion]]) -> Tensor:
    """Squared difference of one U-Net parameter, the mean over pairs of models of one shape, float64 on the CPU."""
    parts = (
        # First to the CPU: not every device has float64.
        a.unet.get_parameter(parameter).detach().cpu().double()
        - b.unet.get_parameter(parameter).detach().cpu().double()
        for a, b in pairs
    )
    return torch.stack([part.square() for part in parts]).mean(0)


def changes(
    planted: StableDiffusion, twins: Sequence[StableDiffusion], parameters: Collection[str] | None = None
) -> tuple[Energies, Energies | None]:
    """Planted minus twin, and twin minus twin (None with fewer than two twins), each the mean over all pairs.

    Args:
        planted: the analysed model.
        twins: models of its shape that never saw the memories, at least one.
        parameters: of the U-Net; None takes all, which for a large model are many times its size in float64.
    """
    names = [name for name, _ in planted.unet.named_parameters()] if parameters is None else list(parameters)
    to_twins, between = [(planted, twin) for twin in twins], list(combinations(twins, 2))
    change = {name: energy(name, to_twins) for name in names}
    return change, {name: energy(name, between) for name in names} if between else None


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


def every_change(
    planted: StableDiffusion, twins: Sequence[StableDiffusion], *, kept: Collection[str]
) -> tuple[tuple[Excess, ...], Energies, Energies | None]:
    """The excess of every parameter, and `changes` of those to be kept; one parameter is looked at at a time."""
    parts: list[Excess] = []
    change, floor = dict[str, Tensor](), dict[str, Tensor]()
    for name, _ in planted.unet.named_parameters():
        here, below = changes(planted, twins, (name,))
        parts += excess_by(str, here, below)
        if name in kept:
            change |= here
            floor |= below or {}
    return tuple(parts), change, floor if len(twins) > 1 else None


def excess_by(group: Callable[[str], str], change: Energies, floor: Energies | None) -> tuple[Excess, ...]:
    """The excess of every group of parameters (`group_of` or `layer_of`), largest first."""
    return gathered(
        group,
        [
            Excess(name, float(part.sum()), None if floor is None else float(floor[name].sum()), part.numel())
            for name, part in change.items()
        ],
    )


def gathered(group: Callable[[str], str], parts: Sequence[Excess]) -> tuple[Excess, ...]:
    """Parameters' excesses summed by group, largest first."""
    groups: dict[str, list[Excess]] = {}
    for part in parts:
        groups.setdefault(group(part.name), []).append(part)
    found = [
        Excess(
            name,
            sum(part.change for part in members),
            None if members[0].floor is None else sum(part.floor or 0.0 for part in members),
            sum(part.weights for part in members),
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


def best_masks(energy: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of these sizes that hold the most of the change in every layer: of whole rows if these are."""
    found = {}
    for name, mask in masks.items():
        rows = mask.flatten(1)
        whole = bool((rows.all(1) == rows.any(1)).all())
        values = energy[name].flatten(1).sum(1) if whole else energy[name].flatten()
        count = int(rows.any(1).sum()) if whole else int(mask.sum())
        best = torch.zeros(len(values), dtype=torch.bool)
        best[values.topk(count).indices] = True
        found[name] = best[:, None].expand_as(rows).reshape(mask.shape) if whole else best.view(mask.shape)
    return found


def density(masks: Mapping[str, Tensor]) -> float:
    """Share of the weights of the masked layers that the mask holds."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
