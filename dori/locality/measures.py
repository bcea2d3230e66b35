"""From tensors to records: what each analysis says of one memory or one reference set. No model is needed here."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dori.locality import embeddings as space
from dori.locality import truth
from dori.locality.masks import FACTS, Masks
from dori.locality.records import (
    APART,
    MEMORIZED,
    ORDINARY,
    OTHER_IMAGES,
    OTHER_NOISES,
    OTHERS_APART,
    RANDOM,
    SAME_APART,
    SIMULATED,
    WHOLE,
    Cover,
    Measure,
    Overlap,
    Place,
    Search,
    known,
)
from dori.locality.triggers import ORDER, Found, common_starts
from dori.locality.weights import Agreement, agreement, agreement_across, agreement_within, random_level, random_like
from dori.sampling import named_seed

MAPPED_PROMPTS = 40


def _mean(memory: str, name: str, values: Tensor) -> Measure:
    return Measure(memory, name, known(float(values.mean())) if len(values) else None, len(values))


def prompt_distances(memorized: Tensor, ordinary: Tensor) -> list[Measure]:
    """Mean distances between different prompts; the measures of no single memory."""
    return [
        _mean("", f"between {name}", space.pair_distances(y))
        for name, y in ((MEMORIZED, memorized), (ORDINARY, ordinary))
    ]


def embedding_measures(memory: str, found: Found) -> list[Measure]:
    """Distances of one memory's triggers, of their starts and of their moves."""
    measures = []
    for start in (None, *ORDER[1:]):
        rows, end = found.rows(start), f", {start}" if start else ""
        starts, ends = found.starts[rows], found.ends[rows]
        moves = ends - starts
        measures += [
            _mean(memory, f"between triggers{end}", space.pair_distances(ends)),
            _mean(memory, f"between their starts{end}", space.pair_distances(starts)),
            _mean(memory, f"between their moves{end}", space.pair_distances(moves)),
            _mean(memory, f"moved{end}", space.moved(starts, ends)),
            Measure(memory, f"common share of the moves{end}", known(space.common_share(moves)), len(rows)),
            Measure(memory, f"nearest start is the own{end}", known(space.own_start_share(starts, ends)), len(rows)),
            Measure(memory, f"the same, moves exchanged{end}", known(space.exchanged_share(starts, ends)), len(rows)),
        ]
    prompt = found.rows("prompt")
    measures.append(_mean(memory, "moved, prompt", space.moved(found.starts[prompt], found.ends[prompt])))
    return measures


def shared_measures(every: Mapping[str, Found]) -> list[Measure]:
    """What moves towards each image have in common with those towards the others, from different starts.

    Beside it what they have in common with each other, from the same starts as there: only the image differs.
    """
    return [
        measure
        for memory, found in every.items()
        for start in (None, *ORDER[1:])
        for measure in _shared(memory, found, [other for name, other in every.items() if name != memory], start)
    ]


def _shared(memory: str, found: Found, others: Sequence[Found], start: str | None) -> list[Measure]:
    own, shared, count = list[float](), list[float](), 0
    for other in others:
        mine, theirs = found.rows(start), other.rows(start)
        both = common_starts([found.start(row) for row in mine], [other.start(row) for row in theirs])
        here, there = [mine[k] for k in both[0]], [theirs[k] for k in both[1]]
        if len(here) > 1:
            moves = found.ends[here] - found.starts[here]
            own.append(space.common_share(moves))
            shared.append(space.shared_share(moves, other.ends[there] - other.starts[there]))
            count += len(here)
    end = f", {start}" if start else ""
    return [
        Measure(memory, f"{name}{end}", known(sum(shares) / len(shares) if shares else math.nan), count)
        for name, shares in (("common share, same starts", own), ("shared with moves to other images", shared))
    ]


def maps(
    memory: str, found: Found, memorized: Tensor, ordinary: Tensor, *, perplexity: float, seed: int
) -> tuple[list[Place], dict[str, object]]:
    """Places of starts, attacked embeddings and prompts on both maps, and how the maps were drawn.

    Attacks that diverged ended nowhere and are left out.
    """
    somewhere = torch.isfinite(found.ends).flatten(1).all(1)
    shown = [(MEMORIZED, memorized[:MAPPED_PROMPTS].cpu()), (ORDINARY, ordinary[:MAPPED_PROMPTS].cpu())]
    points = torch.cat([found.starts, found.ends[somewhere], *(y for _, y in shown)])
    pca, explained = space.principal_map(points)
    tsne = space.neighbour_map(points, perplexity=perplexity, seed=seed)
    starts = list(zip(found.names, found.index, strict=True))
    roles = [("start", *start) for start in starts]
    roles += [
        ("trigger" if kept else "attacked", *start)
        for start, kept, there in zip(starts, found.replicates.tolist(), somewhere.tolist(), strict=True)
        if there
    ]
    roles += [(name, "", index) for name, y in shown for index in range(len(y))]
    places = [Place(memory, *role, _pair(a), _pair(b)) for role, a, b in zip(roles, pca, tsne, strict=True)]
    used = space.capped_perplexity(perplexity, len(points))
    return places, {"explained": [round(e, 4) for e in explained], "perplexity": round(used, 2), "seed": seed}


def _pair(point: Tensor) -> tuple[float, float]:
    return round(float(point[0]), 4), round(float(point[1]), 4)


# ----------------------------------------------------------------------------------------------------------- weights


def overlaps(memory: str, group: str, masks: Masks) -> list[Overlap]:
    """A_l of one group, layer by layer and for the whole mask."""
    return [_overlap(memory, masks.method, layer, group, agreement(mask)) for layer, mask in _layers(masks)]


def _layers(masks: Masks) -> list[tuple[str, Tensor]]:
    return [*masks.by_layer.items(), (WHOLE, masks.whole())]


def _overlap(memory: str, method: str, layer: str, group: str, found: Agreement) -> Overlap:
    return Overlap(
        memory,
        method,
        layer,
        group,
        known(found.published),
        known(found.without_empty),
        known(found.empty_share),
        known(found.size),
        found.pairs,
    )


def ceiling_overlaps(memory: str, again: Sequence[Masks]) -> list[Overlap]:
    """A_l between the masks of one trigger under different noise seeds; `again` holds all triggers, seed by seed."""
    return _repeated(memory, OTHER_NOISES, [again])


def _repeated(memory: str, group: str, sets: Sequence[Sequence[Masks]]) -> list[Overlap]:
    """A_l between the masks of one trigger under different noise seeds, over the triggers of all sets."""
    found = []
    for layer, _ in _layers(sets[0][0]):
        by_seed = [[dict(_layers(masks))[layer] for masks in again] for again in sets]
        groups = [torch.stack([masks[row] for masks in one]) for one in by_seed for row in range(len(one[0]))]
        found.append(_overlap(memory, sets[0][0].method, layer, group, agreement_within(groups)))
    return found


def other_image_overlaps(memory: str, mine: Masks, theirs: Masks) -> list[Overlap]:
    """A_l between masks of this memory's triggers and of another's, row by row from the same starts."""
    return _across(memory, OTHER_IMAGES, [(mine, theirs)])


def apart_overlaps(memory: str, mine: Sequence[Masks], theirs: Sequence[Masks]) -> list[Overlap]:
    """A_l under different noises: within either of two memories, between them, and of one trigger with itself.

    Triggers whose masks met one noise may agree by that noise; here all meet different ones. All three figures are of
    the same triggers, so that they differ by nothing else.

    Args:
        memory: the one that `mine` belongs to.
        mine: its triggers' masks under each noise; with fewer than two noises nothing is compared.
        theirs: those of another memory's triggers, row by row from the same starts, likewise.
    """
    noises = [(a, b) for a in range(len(mine)) for b in range(len(mine)) if a != b]
    if not noises:
        return []
    within = [(one[a], one[b]) for one in (mine, theirs) for a, b in noises]
    across = [(mine[a], theirs[b]) for a, b in noises]
    same = _repeated(memory, SAME_APART, [mine, theirs])
    return _across(memory, APART, within) + _across(memory, OTHERS_APART, across) + same


def _across(memory: str, group: str, halves: Sequence[tuple[Masks, Masks]]) -> list[Overlap]:
    """A_l over pairs of a mask of one half and one of the other in different rows, all halves together."""
    first, different = halves[0][0], ~torch.eye(len(halves[0][0]), dtype=torch.bool)
    parts = {layer: (layer,) for layer in first.by_layer} | {WHOLE: tuple(first.by_layer)}
    found = []
    for layer, names in parts.items():
        pairs = [tuple([masks.by_layer[name] for name in names] for masks in half) for half in halves]
        found.append(_overlap(memory, first.method, layer, group, agreement_across(pairs, different)))
    return found


def random_overlaps(memory: str, masks: Masks, *, seed: int) -> list[Overlap]:
    """A_l of random masks of the same sizes, layer by layer: closed form, and once simulated.

    Layers, methods and memories draw from streams of their own; `seed` is their root.
    """
    found = []
    for layer, mask in masks.by_layer.items():
        pairs, size = agreement(mask).pairs, float(mask.flatten(1).sum(1).double().mean())
        level, without = (known(random_level(mask, without_empty=left_out)) for left_out in (False, True))
        found.append(Overlap(memory, masks.method, layer, RANDOM, level, without, None, known(size), pairs))
    return found + overlaps(memory, SIMULATED, _simulated(memory, masks, seed))


def random_like_prompts(group: str, masks: Masks, *, seed: int) -> list[Overlap]:
    """A of random masks as large as a reference set's, whole masks alone: prompts' sets have other sizes."""
    whole = _simulated(group, masks, seed).whole()
    return [_overlap("", masks.method, WHOLE, f"{group}, {RANDOM}", agreement(whole))]


def _simulated(owner: str, masks: Masks, seed: int) -> Masks:
    """Random masks as large as these in every layer."""
    drawn = {
        layer: random_like(mask, seed=named_seed("locality random", seed, owner, masks.method, layer))
        for layer, mask in masks.by_layer.items()
    }
    return Masks(masks.method, drawn, masks.facts)


def search(memory: str, group: str, masks: Masks) -> Search:
    """How NeMo's searches of one group went."""
    size = masks.facts[:, 0]
    shares = dict(zip(FACTS[1:], masks.facts[:, 1:].double().mean(0).tolist(), strict=True))
    return Search(
        memory,
        group,
        len(masks),
        float(size.double().quantile(0.5)),
        int(size.max()),
        **{name: round(share, 6) for name, share in shares.items()},
    )


def covers(memory: str, masks: Masks, excess: truth.Energies, twins: truth.Energies | None) -> list[Cover]:
    """How much of the excess of each layer, and of all, the masks of single triggers and their union hold."""
    found = []
    full = {name: _weights(mask, excess[name]) for name, mask in masks.by_layer.items()}
    kinds = {
        "one": [{name: mask[row] for name, mask in full.items()} for row in range(len(masks))],
        "union": [{name: mask.any(0) for name, mask in full.items()}],
    }
    for kind, edits in kinds.items():
        for layer, names in [*((name, (name,)) for name in full), (WHOLE, tuple(full))]:
            parts = [{name: edit[name] for name in names} for edit in edits]
            found.append(
                Cover(
                    memory,
                    masks.method,
                    layer,
                    kind,
                    round(_over(parts, truth.density), 6),
                    known(_over(parts, lambda part: truth.coverage(excess, part))),
                    known(_over(parts, lambda part: truth.random_coverage(excess, part))),
                    known(_over(parts, lambda part: truth.coverage(twins, part))) if twins else None,
                )
            )
    return found


def _over(parts: Sequence[Mapping[str, Tensor]], measure: Callable[[Mapping[str, Tensor]], float]) -> float:
    return sum(measure(part) for part in parts) / len(parts)


def _weights(mask: Tensor, like: Tensor) -> Tensor:
    """Masks (n, rows) or (n, d, w) as masks of whole weights (n, d, w)."""
    return mask if mask.ndim == 3 else mask[:, :, None].expand(-1, -1, like.shape[1])
