"""How much of what planting changed must be taken back until no attack succeeds: the causal test's positive control.

A weight at zero is no change taken back, so even a mask that holds most of what planting changed may leave the memory
where it was. Here weights get the values that they have in a twin: first those that differ from it most, and beside
them as many at random. At a share of 1 the model is the twin. Twins judge here; no method sees them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dori.erase.delta import WeightDelta, difference
from dori.model.stable_diffusion import StableDiffusion

MOST_CHANGED, AT_RANDOM = "most changed", "at random"


@dataclass(frozen=True, slots=True, eq=False)
class TakenBack:
    """A part of the U-Net's weights with a twin's values.

    Args:
        share: of all weights that were chosen.
        held: share of the squared difference from the twin that lies in them.
        edit: puts them in.
    """

    share: float
    held: float
    edit: WeightDelta


def taken_back(
    model: StableDiffusion, twin: StableDiffusion, shares: Sequence[float], *, chosen: str, seed: int
) -> Iterator[TakenBack]:
    """The model with the twin's values in growing parts of its weights, one part at a time.

    Needs memory of about five times the U-Net's weights in float32. Weights that tie at the border are all taken.

    Args:
        model: the analysed model.
        twin: one of its shape that never saw the memories.
        shares: parts of all U-Net weights, in (0, 1]; of one choice the larger part holds the smaller one.
        chosen: "most changed" over the whole U-Net, or "at random".
        seed: of the random choice.
    """
    before, after = ({name: _precise(value) for name, value in one.unet.named_parameters()} for one in (model, twin))
    squares = torch.cat([(after[name] - value).flatten() for name, value in before.items()]).square_()
    scores = squares
    if chosen == AT_RANDOM:
        scores = torch.rand(len(squares), generator=torch.Generator().manual_seed(seed))
    whole = float(squares.sum(dtype=torch.float64))
    for share in shares:
        count = max(1, round(share * len(scores)))
        taken = scores >= scores.kthvalue(len(scores) - count + 1).values
        held = float(squares[taken].sum(dtype=torch.float64)) / whole if whole else 0.0
        parts = taken.split([value.numel() for value in before.values()])
        mixed = {
            name: torch.where(part.view(value.shape), after[name], value)
            for (name, value), part in zip(before.items(), parts, strict=True)
        }
        yield TakenBack(share, held, difference(f"{chosen}, {share:g} taken back", model, before, mixed, {}))


def _precise(weight: Tensor) -> Tensor:
    return weight.detach().cpu().float()
