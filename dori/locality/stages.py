"""The stages of a locality run beside its masks: how far activations lie apart, what a twin's and the model's carry."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dori.audit.judge import Case
from dori.locality.activations import activation_rows, activations, discrepancy, discrepancy_across
from dori.locality.bench import Bench, Source, encoded
from dori.locality.costs import Rows, drawing, other_noises
from dori.locality.patching import NECESSARY, NONE, SOURCE, SUFFICIENT, patch_sets, patched_samples, share_of_gap
from dori.locality.records import OTHER_IMAGES, OTHER_NOISES, SAME_STARTS, Activity, Patch, known
from dori.locality.transplants import CONTROL, transplanted_samples, weight_sets
from dori.model.stable_diffusion import EVERYWHERE, Site, StableDiffusion
from dori.run import cell_key
from dori.sampling import initial_noise, named_seed

SITES: tuple[Site, ...] = ("attention_value", "feed_forward")
Samples = Callable[..., dict[str, Tensor]]  # `patched_samples` or `transplanted_samples`
Distances = Mapping[str, Callable[[Tensor], float]]  # by group, the mean distance among one layer's activations


@dataclass(frozen=True, slots=True, eq=False)
class Twin:
    """A model that never saw the memories, and its fingerprint."""

    model: StableDiffusion
    fingerprint: str


# ------------------------------------------------------------------------------------------------------- activations


def discrepancies(
    bench: Bench, owner: str, groups: Mapping[str, Sequence[int]], embeddings: Source, repeated: Source | None = None
) -> list[Activity]:
    """D_l of groups of embeddings, at every chosen step, averaged over the fixed initial noises.

    Args:
        bench: the bench.
        owner: id of a memory, or "" for a reference set, which is then named by its first group.
        groups: name to rows of `embeddings`.
        embeddings: n embeddings.
        repeated: one of them, to run under several noises as the group "other noises".
    """
    plan, key = bench.plan, cell_key("activations", owner or next(iter(groups)).replace(" ", "-"))
    inputs = _inputs(bench) | {
        "source": embeddings.sha256,
        "groups": {n: list(r) for n, r in groups.items()},
        "others": other_noises(plan),
        "repeated": None if repeated is None else repeated.sha256,
    }
    rows = plan.activation_noises * activation_rows(len(embeddings), plan.activation_steps)
    if repeated is not None:
        rows += activation_rows(other_noises(plan), plan.activation_steps)
    found = bench.tensors(
        key,
        inputs,
        Rows(forward=rows),
        lambda: _discrepancies(bench, groups, embeddings.y, None if repeated is None else repeated.y),
    )
    counts = {name: len(members) for name, members in groups.items()}
    counts |= {OTHER_NOISES: other_noises(plan)} if repeated is not None else {}
    return [record for group, n in counts.items() for record in _records(bench, owner, group, found[group], n)]


def discrepancies_across(bench: Bench, owner: str, mine: Source, theirs: Source) -> list[Activity]:
    """D_l over pairs of a trigger of this memory and one of another, and the mean over pairs of either: like with like.

    Args:
        bench: the bench.
        owner: id of the memory.
        mine: n >= 2 of its triggers.
        theirs: as many of another memory's, row by row from the same starts; no pair is from one start.
    """
    inputs = _inputs(bench) | {"mine": mine.sha256, "theirs": theirs.sha256}
    n = len(mine)
    pairs = ~torch.eye(n, dtype=torch.bool)
    groups: Distances = {
        OTHER_IMAGES: lambda seen: discrepancy_across(seen[:n], seen[n:], pairs),
        SAME_STARTS: lambda seen: (discrepancy(seen[:n]) + discrepancy(seen[n:])) / 2,  # one may be the wider
    }
    found = bench.tensors(
        cell_key("activations", owner, "across"),
        inputs,
        Rows(forward=bench.plan.activation_noises * activation_rows(n + len(theirs), bench.plan.activation_steps)),
        lambda: _over_noises(bench, groups, torch.cat([mine.y, theirs.y])),
    )
    counts = {OTHER_IMAGES: n * (n - 1), SAME_STARTS: 2 * n}
    return [record for group, count in counts.items() for record in _records(bench, owner, group, found[group], count)]


def _inputs(bench: Bench) -> dict[str, object]:
    plan = bench.plan
    return {
        "steps": plan.activation_steps,
        "ddim_steps": plan.sampling_steps,
        "noises": plan.activation_noises,
        "guidance_scale": plan.guidance_scale,
        "seed": plan.seed,
    }


def _records(bench: Bench, owner: str, group: str, table: Tensor, n: int) -> list[Activity]:
    """One record for each step and layer of a table (steps, layers)."""
    layers = {name: site for site in SITES for name in bench.model.layers(site, EVERYWHERE)}
    return [
        Activity(owner, layers[layer], layer, step, group, known(float(table[row, column])), n)
        for row, step in enumerate(bench.plan.activation_steps)
        for column, layer in enumerate(layers)
    ]


def _discrepancies(
    bench: Bench, groups: Mapping[str, Sequence[int]], embeddings: Tensor, repeated: Tensor | None
) -> dict[str, Tensor]:
    found = _over_noises(bench, {group: partial(_within, list(rows)) for group, rows in groups.items()}, embeddings)
    if repeated is not None:
        noise = _noise(bench)
        found |= _tables(bench, {OTHER_NOISES: discrepancy}, repeated.expand(len(noise), -1, -1), noise)
    return found


def _within(rows: list[int], seen: Tensor) -> float:
    return discrepancy(seen[rows])


def _noise(bench: Bench) -> Tensor:
    """The fixed initial noises, the first of which D_l is averaged over."""
    seeds = [named_seed("locality noise", bench.plan.seed, k) for k in range(other_noises(bench.plan))]
    return initial_noise(bench.model, seeds)


def _over_noises(bench: Bench, groups: Distances, embeddings: Tensor) -> dict[str, Tensor]:
    noise = _noise(bench)
    runs = [_tables(bench, groups, embeddings, noise[k : k + 1]) for k in range(bench.plan.activation_noises)]
    return {group: torch.stack([run[group] for run in runs]).mean(0) for group in groups}


def _tables(bench: Bench, groups: Distances, embeddings: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """D_l by group, shape (steps, layers), float64."""
    plan, model = bench.plan, bench.model
    layers = {name: layer for site in SITES for name, layer in model.layers(site, EVERYWHERE).items()}
    steps: dict[str, list[Tensor]] = {group: [] for group in groups}
    for _, seen in activations(
        model,
        layers,
        embeddings,
        noise,
        steps=plan.activation_steps,
        ddim_steps=plan.sampling_steps,
        guidance_scale=plan.guidance_scale,
    ):
        for group, distance in groups.items():
            values = [distance(seen[name]) for name in layers]
            steps[group].append(torch.tensor(values, dtype=torch.float64))
    return {group: torch.stack(tables) for group, tables in steps.items()}


# ------------------------------------------------------------------------------------------ patching and transplants


def patches(bench: Bench, case: Case, twins: Sequence[Twin]) -> list[Patch]:
    """Sufficiency and necessity of layers' activations, one by one and kind by kind, for the memory's own prompt."""
    return _carried(bench, case, twins[:1], "patching", patch_sets(bench.model), patched_samples)


def transplants(bench: Bench, case: Case, twins: Sequence[Twin]) -> list[Patch]:
    """The same of weights, kind by kind, and of two twins' exchanged between them."""
    return _carried(bench, case, twins[:2], "transplants", weight_sets(bench.model), transplanted_samples)


def _carried(
    bench: Bench, case: Case, twins: Sequence[Twin], stage: str, sets: Mapping[str, Sequence[str]], samples: Samples
) -> list[Patch]:
    plan, memory, records = bench.plan, case.memory.id, []
    prompt = encoded(bench.model, [case.memory.text or ""])
    seeds = plan.fresh_seeds(plan.patch_seeds)
    twin, *others = (one.model for one in twins)
    pairs = [(SUFFICIENT, bench.model, twin), (NECESSARY, twin, bench.model)]
    for direction, source, target in [*pairs, *((CONTROL, other, twin) for other in others)]:
        judging = [one.fingerprint for one in (twins if direction == CONTROL else twins[:1])]
        inputs = bench.judged_inputs(case, prompt, seeds) | {"twins": judging, "sets": sets}
        rows = drawing(plan, plan.patch_seeds * (len(sets) + 2))
        draw = partial(samples, source, target, prompt.y)
        compute = partial(_likenesses, bench, case, draw, target, seeds=seeds, sets=sets)
        table = bench.tensors(cell_key(stage, memory, direction), inputs, rows, compute)
        like, alike, kept = (
            {name: float(values[row].double().quantile(0.5)) for name, values in table.items()} for row in range(3)
        )
        for name in (NONE, SOURCE, *sets):
            share = share_of_gap(like[name], like[NONE], like[SOURCE], direction) if direction != CONTROL else None
            records.append(
                Patch(
                    memory,
                    direction,
                    name,
                    round(like[name], 6),
                    None if share is None else known(share),
                    round(alike[name], 6),
                    round(kept[name], 6),
                )
            )
    return records


def _likenesses(
    bench: Bench,
    case: Case,
    draw: Samples,
    target: StableDiffusion,
    *,
    seeds: Sequence[int],
    sets: Mapping[str, Sequence[str]],
) -> dict[str, Tensor]:
    """Similarities to the memory, to the source's own images and to the target's, shape (3, s), by set."""
    plan = bench.plan
    latents = draw(
        initial_noise(bench.model, seeds),
        sets,
        steps=plan.sampling_steps,
        guidance_scale=plan.guidance_scale,
        null=bench.model.encode([""]),  # both halves from one text encoder, in either direction
    )
    images = {name: target.to_images(z).cpu() for name, z in latents.items()}  # the models share one VAE
    return {
        name: torch.stack(
            [bench.similar(case, drawn[None])[0], bench.alike(drawn, images[SOURCE]), bench.alike(drawn, images[NONE])]
        )
        for name, drawn in images.items()
    }
