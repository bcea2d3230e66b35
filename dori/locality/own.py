"""Your own embeddings in a notebook: their masks as one stack, and the causal test on triggers of your own.

A run of `dori locality` makes the same of the triggers that it finds, as resumable cells and beside further controls
(`masks`, `trial`). Here nothing is stored, and any edits meet any triggers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dori.attack.dori import Dori
from dori.attack.starts import gaussian
from dori.audit.judge import drawn, likeness
from dori.edit import Edit, WeightMask
from dori.errors import DoriError
from dori.locality import given
from dori.locality.given import Array
from dori.locality.masks import FACTS, Masks
from dori.metrics.similarity import Descriptor
from dori.model.stable_diffusion import StableDiffusion
from dori.sampling import Sampling, named_seed


def stacked(edits: Sequence[WeightMask], *, neurons: bool = False) -> Masks:
    """Masks of n embeddings, one edit each, beside each other as `weights.agreement` compares them.

    Args:
        edits: of one method on one model, n >= 1.
        neurons: a whole row of a weight counts once, as NeMo's masks are compared; random masks of as many rows are
            another reference than random masks of as many weights.

    Returns:
        By parameter booleans (n, d, w), or (n, d) of neurons.

    Raises:
        DoriError: no edit, edits of different parameters, or neurons of which parts are masked.
    """
    if not edits:
        raise DoriError("edits is empty; give at least one mask")
    shapes = [{name: mask.shape for name, mask in edit.masks.items()} for edit in edits]
    if any(one != shapes[0] for one in shapes) or not shapes[0]:
        raise DoriError("the edits mask different parameters, or none; give masks of one method on one model")
    found = {name: torch.stack([edit.masks[name] for edit in edits]).bool() for name in shapes[0]}
    if neurons:
        for name, mask in found.items():
            if not torch.equal(mask.any(-1), mask.all(-1)):
                raise DoriError(f"the edits mask parts of rows of {name}, not neurons; leave out neurons=True")
        found = {name: mask.all(-1) for name, mask in found.items()}
    return Masks(edits[0].name, found, torch.zeros(0, len(FACTS)))


@dataclass(frozen=True, slots=True, eq=False)
class Crossing:
    """How like the image what triggers and attacks draw is under each of m edits: medians over seeds, float64.

    Args:
        replay: the n triggers as they are, shape (m, n).
        again: after a new attack from each, likewise.
        fresh: after attacks from Gaussian starts, shape (m, f); every edit has starts of its own.
    """

    replay: Tensor
    again: Tensor
    fresh: Tensor


def cross(
    model: StableDiffusion,
    image: Tensor,
    triggers: Array,
    edits: Sequence[Edit],
    *,
    descriptor: Descriptor,
    attack: Dori,
    fresh: int,
    seeds: Sequence[int],
    sampling: Sampling,
    seed: int = 0,
) -> Crossing:
    """The causal test: every trigger, as it is and attacked again, and fresh attacks under every edit.

    Costs m (n + fresh) attacks. Without `no_edit()` and random edits as large (`dori.mitigate.random_mask`) among the
    rows nobody can say what a mask has stopped. `causal.cross_test` makes rates of what exceeds a threshold.

    Args:
        model: the model, without an edit.
        image: the memory in [0, 1], shape (3, H, W), of the size that the model draws.
        triggers: embeddings, shape (n, l, d).
        edits: m of them, such as the masks of some triggers.
        descriptor: whose cosine says how like the memory an image is.
        attack: DoRI.
        fresh: number of attacks from Gaussian starts under each edit.
        seeds: generation seeds, which no attack has seen.
        sampling: of the generations.
        seed: root of the fresh starts and of the noises that attacks meet; trigger j meets the same under every edit.

    Raises:
        DoriError: no edit or no seed, or an image or triggers that do not fit the model.
    """
    y, side = given.embeddings_of(model, triggers, "triggers").detach().cpu().float(), model.image_side_px
    if not edits or not seeds or fresh < 0:
        raise DoriError(
            f"a causal test of {len(edits)} edits, {len(seeds)} seeds and {fresh} fresh attacks; "
            "give at least one edit and one seed, and 0 attacks or more"
        )
    if tuple(image.shape) != (3, side, side):
        raise DoriError(f"image has shape {tuple(image.shape)} and {model.name} draws (3, {side}, {side}); resize it")
    target, tables = model.to_latents(image[None]), []
    for row, edit in enumerate(edits):
        own = [named_seed("cross fresh start", seed, row, k) for k in range(fresh)]
        starts = torch.cat([y, gaussian(model, own)]) if own else y
        noises = [named_seed("cross", seed, k) for k in range(len(y))]
        noises += [named_seed("cross fresh", seed, row, k) for k in range(fresh)]
        with edit.applied(model):
            ends = attack(model, target.expand(len(starts), -1, -1, -1), starts, seeds=noises).at(attack.steps)
            found = similarity_to(image, model, torch.cat([y, ends]), descriptor, seeds=seeds, sampling=sampling)
        tables.append(found.split([len(y), len(y), fresh]))
    return Crossing(*(torch.stack(part) for part in zip(*tables, strict=True)))


def similarity_to(
    image: Tensor,
    model: StableDiffusion,
    embeddings: Tensor,
    descriptor: Descriptor,
    *,
    seeds: Sequence[int],
    sampling: Sampling,
) -> Tensor:
    """How like an image what each embedding draws is: the median over seeds, float64.

    Whether an embedding replicates is told by the descriptor's threshold, as MR is defined. A generation that diverged
    is like nothing.

    Args:
        image: the memory in [0, 1], shape (3, H, W).
        model: the model, edits put on.
        embeddings: shape (n, l, d).
        descriptor: the judge.
        seeds: generation seeds.
        sampling: of the generations.

    Returns:
        Shape (n,), in [-1, 1].
    """
    images = drawn(model, embeddings, seeds, sampling)
    return likeness(descriptor, image, images).double().quantile(0.5, dim=1)
