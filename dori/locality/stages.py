"""The stages of a locality run that go through the network: activations, the causal test, activation patching."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from dori.audit.judge import Case
from dori.audit.quality import ordinary_quality
from dori.edit import WeightMask, no_edit
from dori.locality.activations import activation_rows, activations, discrepancy
from dori.locality.bench import Bench, Source, encoded
from dori.locality.causal import joined
from dori.locality.costs import Rows, attacking, drawing, other_noises
from dori.locality.patching import NONE, SOURCE, patch_sets, patched_samples, share_of_gap
from dori.locality.records import OTHER_NOISES, Activity, Cross, Joined, Patch, known
from dori.locality.triggers import gaussian_source
from dori.model.stable_diffusion import EVERYWHERE, Site, StableDiffusion
from dori.run import cell_key
from dori.sampling import initial_noise, named_seed

SITES: tuple[Site, ...] = ("attention_value", "feed_forward")

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
    inputs = {
        "source": embeddings.sha256,
        "groups": {n: list(r) for n, r in groups.items()},
        "steps": plan.activation_steps,
        "ddim_steps": plan.sampling_steps,
        "noises": plan.activation_noises,
        "guidance_scale": plan.guidance_scale,
        "seed": plan.seed,
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
    layers = {name: site for site in SITES for name in bench.model.layers(site, EVERYWHERE)}
    counts = {name: len(members) for name, members in groups.items()} | {OTHER_NOISES: other_noises(plan)}
    records = []
    for group in [*groups, *([OTHER_NOISES] if repeated is not None else [])]:
        table = found[group]  # (steps, layers)
        records += [
            Activity(owner, layers[layer], layer, step, group, known(float(table[row, column])), counts[group])
            for row, step in enumerate(plan.activation_steps)
            for column, layer in enumerate(layers)
        ]
    return records


def _discrepancies(
    bench: Bench, groups: Mapping[str, Sequence[int]], embeddings: Tensor, repeated: Tensor | None
) -> dict[str, Tensor]:
    seeds = [named_seed("locality noise", bench.plan.seed, k) for k in range(other_noises(bench.plan))]
    noise = initial_noise(bench.model, seeds)
    runs = [_tables(bench, groups, embeddings, noise[k : k + 1]) for k in range(bench.plan.activation_noises)]
    found = {group: torch.stack([run[group] for run in runs]).mean(0) for group in groups}
    if repeated is not None:
        same = {OTHER_NOISES: range(len(noise))}
        found |= _tables(bench, same, repeated.expand(len(noise), -1, -1), noise)
    return found


def _tables(bench: Bench, groups: Mapping[str, Sequence[int]], embeddings: Tensor, noise: Tensor) -> dict[str, Tensor]:
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
        for group, rows in groups.items():
            values = [discrepancy(seen[name][list(rows)]) for name in layers]
            steps[group].append(torch.tensor(values, dtype=torch.float64))
    return {group: torch.stack(tables) for group, tables in steps.items()}


# ------------------------------------------------------------------------------------------------------- causal test


def cross(
    bench: Bench, case: Case, method: str, edits: Sequence[WeightMask], triggers: Source, starts: Sequence[str]
) -> Cross:
    """Under the mask of every trigger: every trigger as it is, attacked again, and attacks from fresh starts."""
    plan, causal = bench.plan, bench.plan.causal
    assert causal is not None  # the loop asks only then
    fresh = _fresh(bench, case, range(causal.fresh))
    rows = Rows(
        attacking(plan, len(triggers) + len(fresh)).attacked,
        drawing(plan, plan.probe_seeds * (2 * len(triggers) + len(fresh))).forward,
    )
    tables = []
    for row, edit in enumerate(edits):
        key = cell_key("causal", case.memory.id, method, str(row))
        tables.append(_under(bench, key, case, edit, triggers, fresh, rows))
    for row in range(len(edits), causal.triggers):
        bench.skip(cell_key("causal", case.memory.id, method, str(row)))
    return Cross(
        case.memory.id,
        method,
        tuple(starts),
        tuple(edit.size for edit in edits),
        *(tuple(_medians(table[name]) for table in tables) for name in ("replay", "again", "fresh")),
    )


def _medians(similarity: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in similarity.double().quantile(0.5, dim=1).tolist())


def _fresh(bench: Bench, case: Case, numbers: range) -> Source:
    """Gaussian starts that no trigger of the run began from."""
    return gaussian_source(
        bench, [named_seed("locality fresh start", bench.plan.seed, case.memory.id, k) for k in numbers]
    )


def _under(
    bench: Bench, key: str, case: Case, edit: WeightMask, triggers: Source, fresh: Source, rows: Rows
) -> dict[str, Tensor]:
    """Similarities under one mask: `replay` of the triggers, `again` and `fresh` after new attacks; each (n, s)."""
    plan, starts = bench.plan, torch.cat([triggers.y, fresh.y])
    attack_seeds = [named_seed("locality causal", plan.seed, case.memory.id, k) for k in range(len(starts))]
    seeds = plan.fresh_seeds(plan.probe_seeds)
    inputs = bench.judged_inputs(case, triggers, seeds) | {
        "fresh": fresh.sha256,
        "edit": edit.fingerprint,
        "attack": plan.attack,
        "attack_seeds": attack_seeds,
    }

    def compute() -> dict[str, Tensor]:
        with edit.applied(bench.model):
            ends = plan.attack(
                bench.model, case.latent[None].expand(len(starts), -1, -1, -1), starts, seeds=attack_seeds
            ).at(plan.attack.steps)
            similar = bench.similarities(case, torch.cat([triggers.y, ends]), seeds)
        names = ("replay", "again", "fresh")
        return dict(zip(names, similar.split([len(triggers), len(triggers), len(fresh)]), strict=True))

    return bench.tensors(key, inputs, rows, compute)


def join(
    bench: Bench, case: Case, method: str, edits: Sequence[WeightMask], prompts: Sequence[str], held_out: Tensor | None
) -> list[Joined]:
    """Join the masks of 1, 2, 4, ... triggers, attack from fresh starts under each union, and tell its price."""
    plan, causal = bench.plan, bench.plan.causal
    assert causal is not None  # the loop asks only then
    fresh = _fresh(bench, case, range(causal.fresh, causal.fresh + causal.joined_fresh))
    empty = gaussian_source(bench, [])
    rows = Rows(attacking(plan, len(fresh)).attacked, drawing(plan, plan.probe_seeds * len(fresh)).forward)
    unions = joined(edits, f"{case.memory.id} {method}")
    quality = ordinary_quality(
        bench.model,
        plan.judging(),
        bench.judge,
        bench.run,
        edits=(no_edit(), *unions),
        prompts=prompts,
        base={"model": bench.fingerprint, "judge": bench.judge.record()},
        held_out=held_out,
    )
    price = {row.edit: row for row in quality}
    bench.count("quality", drawing(plan, sum(row.prompts for row in quality)))
    records = []
    for edit in (no_edit(), *unions):
        masks = int(edit.name.rsplit(" x ", 1)[1]) if edit.masks else 0
        found = _under(bench, cell_key("joined", case.memory.id, method, str(masks)), case, edit, empty, fresh, rows)
        row = price.get(edit.name)
        total = sum(mask.numel() for mask in edit.masks.values())
        records.append(
            Joined(
                case.memory.id,
                method,
                masks,
                round(edit.size / total, 6) if total else 0.0,
                int(bench.replicates(found["fresh"]).sum()),
                len(fresh),
                known(row.frechet) if row else None,
                row.alignment if row else None,
            )
        )
    return records


# ---------------------------------------------------------------------------------------------------------- patching


def patches(bench: Bench, case: Case, twin: StableDiffusion, twin_fingerprint: str) -> list[Patch]:
    """Sufficiency and necessity of every layer, of each kind of layer and of all, for the memory's own prompt."""
    plan, memory, records = bench.plan, case.memory.id, []
    prompt = encoded(bench.model, [case.memory.text or ""])
    seeds = plan.fresh_seeds(plan.patch_seeds)
    sets = patch_sets(bench.model)
    for direction, source, target in (("sufficient", bench.model, twin), ("necessary", twin, bench.model)):
        inputs = bench.judged_inputs(case, prompt, seeds) | {"twin": twin_fingerprint, "sets": sets}
        rows = drawing(plan, plan.patch_seeds * (len(sets) + 2))
        compute = partial(_patched, bench, case, source=source, target=target, prompt=prompt.y, seeds=seeds)
        table = bench.tensors(cell_key("patching", memory, direction), inputs, rows, compute)
        middle = {name: float(values.double().quantile(0.5)) for name, values in table.items()}
        for name in (NONE, SOURCE, *sets):
            share = share_of_gap(middle[name], middle[NONE], middle[SOURCE])
            records.append(
                Patch(memory, direction, name, round(middle[name], 6), None if share is None else known(share))
            )
    return records


def _patched(
    bench: Bench, case: Case, *, source: StableDiffusion, target: StableDiffusion, prompt: Tensor, seeds: Sequence[int]
) -> dict[str, Tensor]:
    plan, noise = bench.plan, initial_noise(bench.model, seeds)
    names = patch_sets(source)
    latents = patched_samples(
        source, target, prompt, noise, names, steps=plan.sampling_steps, guidance_scale=plan.guidance_scale
    )
    return {name: bench.similar(case, target.to_images(z).cpu()[None])[0] for name, z in latents.items()}
