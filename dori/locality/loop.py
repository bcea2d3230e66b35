"""The locality run's one loop: reference sets first, then memory by memory, every stage in resumable cells.

After each memory the records so far are handed over, so that a run which is stopped still has a page, with the share
of the memories that it is made from.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dori.audit.judge import Case, Judge
from dori.audit.loop import Subjects
from dori.image_file import png_bytes
from dori.locality import measures, stages, truth
from dori.locality.bench import Bench
from dori.locality.costs import Rows, causal_methods, planned
from dori.locality.embeddings import capped_perplexity
from dori.locality.masks import Maskers, Masks, calibrate, methods_of
from dori.locality.plan import Plan
from dori.locality.probes import probe_balls, probe_lines
from dori.locality.records import LISTS, MEMORIZED, ORDINARY, STARTS, TRIGGERS, Analysed, Change, Locality
from dori.locality.subjects import Sets, choose_sets, sizes
from dori.locality.triggers import ORDER, Found, find_triggers, starts_of, trigger_records
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import EVERYWHERE
from dori.run import Run, cell_key, write_bytes
from dori.sampling import named_seed


@dataclass(slots=True, eq=False)
class _Loop:
    """The state of one run: what is fixed, and the records so far."""

    bench: Bench
    subjects: Subjects
    sets: Sets
    maskers: Maskers
    fingerprints: dict[str, str]
    planted: truth.Energies | None
    floor: truth.Energies | None
    found: dict[str, Found] = field(default_factory=dict)
    explained: dict[str, tuple[float, float]] = field(default_factory=dict)
    records: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in LISTS})

    def references(self) -> None:
        """The sets that belong to no memory: distances, D_l and A_l of memorized and ordinary prompts; true changes."""
        sets, records = self.sets, self.records
        records["measures"] += measures.prompt_distances(sets.memorized.y, sets.ordinary.y)
        for group, y in ((MEMORIZED, sets.memorized), (ORDINARY, sets.ordinary)):
            records["activities"] += stages.discrepancies(self.bench, "", {group: range(len(y))}, y)
            for method in methods_of(self.bench):
                masks = self.maskers.of(group.replace(" ", "-"), method, y)
                records["overlaps"] += measures.overlaps("", group, masks)
                if method == "NeMo":
                    records["searches"].append(measures.search("", group, masks))
        starts = starts_of(self.bench, self.sets.cases[0], sets.foreign)["gaussian"]
        starts = starts.take(range(min(len(starts), self.bench.plan.set_size)))
        if len(starts) > 1:
            records["activities"] += stages.discrepancies(self.bench, "", {STARTS: range(len(starts))}, starts)
        if self.planted is not None:
            records["changes"] += [
                Change(one.name, one.change, one.floor, one.weights)
                for one in truth.excess_by_group(self.planted, self.floor)
            ]

    def memory(self, case: Case, number: int) -> None:
        """All analyses of one memory."""
        plan, memory = self.bench.plan, case.memory.id
        found = find_triggers(self.bench, case, self.sets.foreign)
        self._embedding(case, found)
        rows = found.spread(plan.set_size)
        causal = plan.causal if plan.causal is not None and number < plan.causal.memories else None
        if len(rows) < 2:
            self._skip(memory, causal=causal is not None)
        else:
            self._activations(memory, found, rows)
            for method in methods_of(self.bench):
                masks = self._weights(memory, found, rows, method)
                if causal is not None and method in causal_methods(methods_of(self.bench)):
                    self._causal(case, found, rows, masks)
        if self.subjects.twins and plan.patch_seeds and case.memory.text is not None:
            twin = self.subjects.twins[0]
            self.records["patches"] += stages.patches(self.bench, case, twin, self.fingerprints[twin.name])
        self._finish(case, found)

    def _embedding(self, case: Case, found: Found) -> None:
        plan, memory, sets = self.bench.plan, case.memory.id, self.sets
        self.records["triggers"] += trigger_records(memory, found)
        self.records["measures"] += measures.embedding_measures(memory, found, self.found)
        places, self.explained[memory] = measures.maps(
            memory,
            found,
            sets.memorized.y,
            sets.ordinary.y,
            perplexity=plan.perplexity,
            seed=named_seed("locality map", plan.seed) % 2**32,
        )
        self.records["places"] += places
        self.records["probes"] += probe_lines(self.bench, case, found, sets.ordinary)
        self.records["probes"] += probe_balls(self.bench, case, found, sets.ordinary)
        self.found[memory] = found

    def _activations(self, memory: str, found: Found, rows: list[int]) -> None:
        groups = {TRIGGERS: list(range(len(rows)))}
        groups |= {
            f"{TRIGGERS}, {start}": members
            for start in ORDER[1:]
            if len(members := [k for k, row in enumerate(rows) if found.names[row] == start]) > 1
        }
        self.records["activities"] += stages.discrepancies(
            self.bench, memory, groups, found.take(rows), found.take(rows[:1])
        )

    def _weights(self, memory: str, found: Found, rows: list[int], method: str) -> Masks:
        plan, records = self.bench.plan, self.records
        most = min(len(found.names), plan.set_size)
        masks = self.maskers.of(memory, method, found.take(rows), most=most)
        records["overlaps"] += measures.overlaps(memory, TRIGGERS, masks)
        for start in ORDER[1:]:
            members = [k for k, row in enumerate(rows) if found.names[row] == start]
            if len(members) > 1:
                records["overlaps"] += measures.overlaps(memory, f"{TRIGGERS}, {start}", masks.take(members))
        records["overlaps"] += measures.random_overlaps(memory, masks, seed=named_seed("locality random", plan.seed))
        first = list(range(min(plan.ceiling, len(rows))))
        again = [masks.take(first)] + [
            self.maskers.again(memory, method, found.take([rows[k] for k in first]), noise)
            for noise in range(1, plan.ceiling_seeds)
        ]
        records["overlaps"] += measures.ceiling_overlaps(memory, again)
        if method == "NeMo":
            records["searches"].append(measures.search(memory, TRIGGERS, masks))
        if self.planted is not None:
            records["covers"] += measures.covers(memory, masks, self.planted, self.floor)
        return masks

    def _causal(self, case: Case, found: Found, rows: list[int], masks: Masks) -> None:
        causal = self.bench.plan.causal
        assert causal is not None  # asked only then
        chosen = list(range(min(causal.triggers, len(rows))))
        edits = [masks.edit(self.bench.model, k) for k in chosen]
        picked = [rows[k] for k in chosen]
        self.records["crosses"].append(
            stages.cross(
                self.bench, case, masks.method, edits, found.take(picked), [found.names[row] for row in picked]
            )
        )
        self.records["joined"] += stages.join(
            self.bench, case, masks.method, edits, self.sets.quality, self.subjects.held_out
        )

    def _skip(self, memory: str, *, causal: bool) -> None:
        """Count the cells that a memory without two triggers does not need."""
        progress = self.bench.run.progress
        stages_left = ("activations", "masks", *(("causal", "joined", "quality") if causal else ()))
        for key in progress.costs if progress is not None else ():
            if key.split(".")[0] in stages_left and f".{memory}" in key:
                self.bench.skip(key)

    def _finish(self, case: Case, found: Found) -> None:
        picture = f"pictures/{cell_key('training', case.memory.id)}.png"
        write_bytes(self.bench.run.folder / picture, png_bytes(case.image))
        self.records["subjects"].append(
            Analysed(
                case.memory.id,
                case.memory.kind,
                case.memory.dose,
                case.memory.text,
                picture,
                len(found.names),
                int(found.replicates.sum()),
            )
        )

    def assembled(self) -> Locality:
        """The records so far."""
        descriptor, plan, model = self.bench.judge.descriptor, self.bench.plan, self.bench.model
        points = len(self.found) and 2 * max(len(found.names) for found in self.found.values())
        settings = json.loads(json.dumps(dataclasses.asdict(plan))) | {
            "fingerprints": self.fingerprints,
            "explained_variance": self.explained,
            "perplexity_used": capped_perplexity(plan.perplexity, points) if points else None,
            "memorized_prompts": len(self.sets.memorized),
            "ordinary_prompts": len(self.sets.ordinary),
            "embedding_shape": list(model.embedding_shape),
            "layers": {site: list(model.layers(site, EVERYWHERE)) for site in stages.SITES},
        }
        empty = Locality(
            model=model.name,
            twins=tuple(twin.name for twin in self.subjects.twins),
            descriptor=descriptor.record(),
            settings=settings,
            provenance=self.bench.run.provenance(),
            cost=dict(self.bench.cost),
            planned=len(self.sets.cases),
        )
        lists: dict[str, Any] = {name: tuple(records) for name, records in self.records.items()}
        return dataclasses.replace(empty, **lists)


def costs(subjects: Subjects, plan: Plan, sets: Sets) -> dict[str, Rows]:
    """U-Net rows of every cell to come, by arithmetic; `dori.locality.costs.by_stage` sums them."""
    from dori.audit.edits import wanda_name

    return planned(plan, sizes(subjects, sets), ("NeMo", *map(wanda_name, plan.wandas)))


def locality(
    subjects: Subjects,
    *,
    plan: Plan,
    judge: Judge,
    run: Run,
    say: Callable[[str], None] = lambda line: None,
    after_memory: Callable[[Locality], None] = lambda found: None,
) -> Locality:
    """Run (or resume) a locality analysis.

    Args:
        subjects: an audit's subjects; controls are not used, twins judge.
        plan: the settings.
        judge: whose descriptor decides about replication.
        run: the folder that remembers; the caller holds its lock.
        say: receives one line at a time.
        after_memory: receives the records so far after each memory.

    Returns:
        All records.

    Raises:
        DoriError: too few prompts, a prompt too long, or no space left.
    """
    subjects.model.check_prompts(subjects.ordinary[: plan.ordinary_prompts])
    run.device = subjects.model.device.type
    sets = choose_sets(subjects, plan)
    fingerprints = {model.name: model_fingerprint(model) for model in (subjects.model, *subjects.twins)}
    bench = Bench(subjects.model, judge, plan, run, fingerprints[subjects.model.name])
    run.plan("locality", {key: rows.weight for key, rows in costs(subjects, plan, sets).items()})
    say("reference sets: NeMo's statistics, memorized and ordinary prompts")
    maskers = Maskers(bench, calibrate(bench, sets.calibration), sets.calibration)
    planted, floor = truth.changes(subjects.model, subjects.twins) if subjects.twins else (None, None)
    loop = _Loop(bench, subjects, sets, maskers, fingerprints, planted, floor)
    with torch.no_grad():
        loop.references()
    for number, case in enumerate(sets.cases):
        say(f"memory {number + 1} of {len(sets.cases)}: {case.memory.id}")
        loop.memory(case, number)
        after_memory(loop.assembled())
    return loop.assembled()
