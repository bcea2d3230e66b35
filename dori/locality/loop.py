"""The locality run's one loop: reference sets first, then memory by memory, every stage in resumable cells.

The causal tests, each longer than all the rest of its memory, come last, methods and memories in turns, so that the
first tests are of different ones. After each memory, and after each causal test, the records so far are handed over: a
run that is stopped still has a page, and says of how many memories it is made. Further processes make the cells of
memories that are still far off, and the first one finds them.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dori.audit.judge import Case, Judge
from dori.audit.loop import Subjects
from dori.errors import DoriError
from dori.image_file import png_bytes
from dori.locality import measures, stages, truth
from dori.locality.bench import Bench, Source
from dori.locality.costs import Rows, causal_methods, planned
from dori.locality.embeddings import repeated_share
from dori.locality.masks import Maskers, Masks, calibrate, method_names
from dori.locality.plan import Causal, Plan
from dori.locality.probes import probe_balls, probe_lines
from dori.locality.records import (
    AGAIN,
    FILE,
    LISTS,
    MEMORIZED,
    ON_TWIN,
    ORDINARY,
    STARTS,
    TRIGGERS,
    Analysed,
    Change,
    Cross,
    Joined,
    Locality,
    Measure,
    Price,
    known,
    read_locality,
)
from dori.locality.subjects import Sets, choose_sets, keep_memorized, sizes
from dori.locality.trial import Trial
from dori.locality.triggers import (
    ORDER,
    Found,
    Start,
    common_starts,
    find_triggers,
    gaussian_starts,
    repeated,
    replicating_on,
    trigger_records,
)
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import EVERYWHERE
from dori.processes import Processes
from dori.run import Run, cell_key, write_bytes
from dori.sampling import named_seed
from dori.stats import choose


@dataclass(frozen=True, slots=True, eq=False)
class _Analysis:
    """A memory's analysed triggers, where each began, and their masks by method.

    `again` holds the masks of the first of them under every noise seed.
    """

    case: Case
    triggers: Source
    starts: list[Start]
    masks: Mapping[str, Masks]
    again: Mapping[str, list[Masks]]


@dataclass(slots=True, eq=False)
class _Loop:
    """The state of one run: what is fixed, and the records so far.

    `excess` and `floor` are planted minus twin beyond the floor, and twin minus twin, weight by weight in the layers
    that masks lie in.
    """

    bench: Bench
    subjects: Subjects
    sets: Sets
    maskers: Maskers
    cells: Mapping[str, Mapping[str, Rows]]
    fingerprints: Mapping[str, str]
    excess: truth.Energies | None = None
    floor: truth.Energies | None = None
    found: dict[str, Found] = field(default_factory=dict)
    maps: dict[str, dict[str, object]] = field(default_factory=dict)
    first: _Analysis | None = None
    before: _Analysis | None = None
    to_test: list[_Analysis] = field(default_factory=list)
    records: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in LISTS})

    def references(self) -> None:
        """The sets that belong to no memory: distances, D_l and A_l of memorized and ordinary prompts; true changes."""
        records = self.records
        self.sets, replicating = keep_memorized(self.bench, self.sets)
        records["measures"].append(replicating)
        sets = self.sets
        records["measures"] += measures.prompt_distances(sets.memorized.y, sets.ordinary.y)
        for group, y in ((MEMORIZED, sets.memorized), (ORDINARY, sets.ordinary)):
            records["activities"] += stages.discrepancies(self.bench, "", {group: range(len(y))}, y)
            for method in method_names(self.bench.plan):
                masks = self.maskers.of(group.replace(" ", "-"), method, y)
                records["overlaps"] += measures.overlaps("", group, masks)
                records["overlaps"] += measures.random_like_prompts(group, masks, seed=self.bench.plan.seed)
                if method == "NeMo":
                    records["searches"].append(measures.search("", group, masks))
        plan = self.bench.plan
        starts = gaussian_starts(self.bench, range(min(plan.gaussian, plan.set_size)))
        if len(starts) > 1:
            records["activities"] += stages.discrepancies(self.bench, "", {STARTS: range(len(starts))}, starts)
        if self.subjects.twins:
            self._truth()

    def _truth(self) -> None:
        model, twins = self.subjects.model, self.subjects.twins
        masked = {f"{name}.weight" for site in stages.SITES for name in model.layers(site, EVERYWHERE)}
        parts, change, self.floor = truth.every_change(model, twins, kept=masked)
        self.excess = truth.excess_energies(change, self.floor)
        for level, group in (("kind", truth.group_of), ("layer", truth.layer_of)):
            self.records["changes"] += [
                Change(level, one.name, one.change, one.floor, one.weights) for one in truth.gathered(group, parts)
            ]

    def memory(self, case: Case, number: int) -> None:
        """All analyses of one memory but its causal test."""
        plan, memory = self.bench.plan, case.memory.id
        found = find_triggers(self.bench, case, self.sets.foreign)
        self._embedding(case, found)
        rows, analysis = found.spread(plan.set_size), None
        if len(rows) > 1:
            self._activations(memory, found, rows)
            starts = [found.start(row) for row in rows]
            drawn = {method: self._weights(memory, found, rows, method) for method in method_names(self.bench.plan)}
            masks = {method: every for method, (every, _) in drawn.items()}
            again = {method: first for method, (_, first) in drawn.items()}
            analysis = _Analysis(case, found.take(rows), starts, masks, again)
            if self.before is not None:
                self._across(analysis, self.before)
            self.before, self.first = analysis, self.first or analysis
        if self.subjects.twins:
            self._beside_a_twin(case)
        self._show(case, found)
        if analysis is not None and plan.causal is not None and number < plan.causal.memories:
            self.to_test.append(analysis)
        else:
            self.bench.skip(self.cells[memory])

    def close_ring(self) -> None:
        """The first memory beside the last one, so that each has another beside it; two are beside each other."""
        analysed = sum(subject.triggers > 1 for subject in self.records["subjects"])
        if self.first is not None and self.before is not None and analysed > 2:
            self._across(self.first, self.before)

    def _across(self, mine: _Analysis, before: _Analysis) -> None:
        self._activations_across(mine, before)
        self._weights_across(mine, before)

    def _embedding(self, case: Case, found: Found) -> None:
        plan, memory, sets = self.bench.plan, case.memory.id, self.sets
        self.records["triggers"] += trigger_records(memory, found)
        self.records["measures"] += measures.embedding_measures(memory, found)
        if plan.repeats and plan.gaussian:
            moves = repeated(self.bench, case, found)
            self.records["measures"].append(Measure(memory, AGAIN, known(repeated_share(*moves)), len(moves[0])))
        places, self.maps[memory] = measures.maps(
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
        groups = {TRIGGERS: list(range(len(rows)))} | _by_start(found, rows)
        self.records["activities"] += stages.discrepancies(
            self.bench, memory, groups, found.take(rows), found.take(rows[:1])
        )

    def _activations_across(self, mine: _Analysis, before: _Analysis) -> None:
        """Beside another memory; half of the triggers of each, so that no more is held at a time."""
        half = max(1, self.bench.plan.set_size // 2)
        rows, theirs = common_starts(mine.starts[:half], before.starts[:half])
        if len(rows) > 1:
            triggers = mine.triggers.take(rows), before.triggers.take(theirs)
            self.records["activities"] += stages.discrepancies_across(self.bench, mine.case.memory.id, *triggers)

    def _weights_across(self, mine: _Analysis, before: _Analysis) -> None:
        """Beside another memory, by starts that both have: only the image differs."""
        records, few, memory = self.records["overlaps"], self.bench.plan.ceiling, mine.case.memory.id
        for method, masks in mine.masks.items():
            rows, theirs = common_starts(mine.starts, before.starts)
            if len(rows) > 1:
                records += measures.other_image_overlaps(memory, masks.take(rows), before.masks[method].take(theirs))
            rows, theirs = common_starts(mine.starts[:few], before.starts[:few])
            if len(rows) > 1:
                again = [one.take(rows) for one in mine.again[method]]
                records += measures.apart_overlaps(memory, again, [one.take(theirs) for one in before.again[method]])

    def _weights(self, memory: str, found: Found, rows: list[int], method: str) -> tuple[Masks, list[Masks]]:
        """Masks of all, and of the first ones under every noise seed; records what needs no other memory."""
        plan, records = self.bench.plan, self.records
        masks = self.maskers.of(memory, method, found.take(rows))
        records["overlaps"] += measures.overlaps(memory, TRIGGERS, masks)
        for group, members in _by_start(found, rows).items():
            records["overlaps"] += measures.overlaps(memory, group, masks.take(members))
        records["overlaps"] += measures.random_overlaps(memory, masks, seed=plan.seed)
        first = list(range(min(plan.ceiling, len(rows))))
        again = [masks.take(first)] + [
            self.maskers.again(memory, method, found.take([rows[k] for k in first]), noise)
            for noise in range(1, plan.ceiling_seeds)
        ]
        records["overlaps"] += measures.ceiling_overlaps(memory, again)
        if method == "NeMo":
            records["searches"].append(measures.search(memory, TRIGGERS, masks))
        if self.excess is not None:
            records["covers"] += measures.covers(memory, masks, self.excess, self.floor)
        return masks, again

    def ahead(self, processes: Processes) -> None:
        """What a further process does: memories and tests against the first one's order, for their cells alone."""
        plan, cases, last = self.bench.plan, self.sets.cases, None
        if self.subjects.twins:
            self._truth()
        for number, case in processes.towards(list(enumerate(cases))):
            self.before = None  # what stands beside the memory before is left to the first process
            self.memory(case, number)
            last = self.before if number == len(cases) - 1 else last
        self.before = last
        self.to_test.sort(key=lambda one: cases.index(one.case))
        if plan.causal is not None:
            for _ in self.causal_tests(plan.causal, processes):
                pass

    def causal_tests(self, causal: Causal, processes: Processes) -> Iterator[None]:
        """Of the memories that wait for theirs; a stop after each."""
        methods = causal_methods(method_names(self.bench.plan))
        for method, analysis in processes.towards(in_turns(methods, self.to_test)):
            other = next((one for one in (*self.to_test, self.before) if one is not analysis), None)
            self._causal(analysis, other, method, causal)
            yield
        for analysis in self.to_test:
            self.bench.skip(self.cells[analysis.case.memory.id])

    def _causal(self, analysis: _Analysis, other: _Analysis | None, method: str, causal: Causal) -> None:
        chosen = range(min(causal.triggers, len(analysis.triggers)))
        masks, memory = analysis.masks[method], analysis.case.memory
        trial = Trial(
            self.bench,
            analysis.case,
            causal,
            analysis.triggers.take(chosen),
            tuple(name for name, _ in analysis.starts[: len(chosen)]),
            self.sets.quality,
            self.subjects.held_out,
            self.excess,
        )
        if not any(cross.memory == memory.id for cross in self.records["crosses"]):
            cross, joined, prices = trial.without_mask()
            self._note([cross], [joined], prices)
            for twin in self.subjects.twins[:1]:
                self.records["undone"] += trial.undone(twin)
        edits = [masks.edit(self.bench.model, k) for k in chosen]
        others = []
        if other is not None:
            few = choose(min(causal.triggers, len(other.triggers)), causal.other)
            others = [other.masks[method].edit(self.bench.model, k) for k in few]
        crosses, prices = trial.single(method, edits, others)
        self._note(crosses, [], prices)
        seed = named_seed("locality joined", self.bench.plan.seed, memory.id)
        order = torch.randperm(len(analysis.triggers), generator=torch.Generator().manual_seed(seed)).tolist()
        united, prices = trial.united(method, (masks.edit(self.bench.model, k) for k in order), len(order))
        self._note([], united, prices)

    def _note(self, crosses: Sequence[Cross], joined: Sequence[Joined], prices: Sequence[Price]) -> None:
        for name, records in (("crosses", crosses), ("joined", joined), ("prices", prices)):
            self.records[name] += records

    def _beside_a_twin(self, case: Case) -> None:
        plan, twin, memory = self.bench.plan, self.subjects.twins[0], case.memory.id
        beside = dataclasses.replace(self.bench, model=twin, fingerprint=self.fingerprints[twin.name])
        if plan.twin_attacks and plan.gaussian:
            successes, count = replicating_on(beside, case)
            self.records["measures"].append(Measure(memory, ON_TWIN, round(successes / count, 6), count))
        if plan.patch_seeds and case.memory.text is not None:
            twins = [stages.Twin(one, self.fingerprints[one.name]) for one in self.subjects.twins]
            self.records["patches"] += stages.patches(self.bench, case, twins)
            self.records["transplants"] += stages.transplants(self.bench, case, twins)

    def _show(self, case: Case, found: Found) -> None:
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
        descriptor, plan, model, sets = self.bench.judge.descriptor, self.bench.plan, self.bench.model, self.sets
        settings = _settings(plan) | {
            "fingerprints": self.fingerprints,
            "maps": self.maps,
            "prompts": {
                "memorized": len(sets.memorized),
                "ordinary": len(sets.ordinary),
                "foreign starts": len(sets.foreign),
                "NeMo's statistics": len(sets.calibration),
                "quality": len(sets.quality),
            },
            "embedding_shape": list(model.embedding_shape),
            "precision": str(model.unet.dtype).removeprefix("torch."),
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
        shared = {"measures": self.records["measures"] + measures.shared_measures(self.found)}
        lists: dict[str, Any] = {name: tuple(records) for name, records in (self.records | shared).items()}
        return dataclasses.replace(empty, **lists)


def _by_start(found: Found, rows: Sequence[int]) -> dict[str, list[int]]:
    """Positions among the rows of those from one kind of start, where there are two or more."""
    groups = {
        f"{TRIGGERS}, {start}": [k for k, row in enumerate(rows) if found.names[row] == start] for start in ORDER[1:]
    }
    return {group: members for group, members in groups.items() if len(members) > 1}


def in_turns(methods: Sequence[str], analyses: Sequence[_Analysis]) -> list[tuple[str, _Analysis]]:
    """All pairs, so ordered that the first ones differ in both: (a, x), (b, y), (a, y), (b, x)."""
    count = len(analyses)
    return [(method, analyses[(turn + k) % count]) for turn in range(count) for k, method in enumerate(methods)]


def costs(subjects: Subjects, plan: Plan, sets: Sets) -> dict[str, Rows]:
    """U-Net rows of every cell to come, by arithmetic; `dori.locality.costs.by_stage` sums them."""
    return {key: rows for cells in _cells(subjects, plan, sets).values() for key, rows in cells.items()}


def _cells(subjects: Subjects, plan: Plan, sets: Sets) -> dict[str, dict[str, Rows]]:
    return planned(plan, sizes(subjects, sets), method_names(plan))


def _settings(plan: Plan) -> dict[str, Any]:
    """The plan as `locality.json` holds it."""
    return json.loads(json.dumps(dataclasses.asdict(plan)))


def refuse_another(folder: Path, subjects: Subjects, plan: Plan, sets: Sets, fingerprints: Mapping[str, str]) -> None:
    """Refuse a folder in which another locality run has results: its cells would be overwritten, hours perhaps.

    Twins may be added to a run; the first one, with which attacks and patching were made, stays the first.

    Raises:
        DoriError: the folder's `locality.json` is of another model, plan, memories or first twin.
    """
    path = folder / FILE
    try:
        before = read_locality(path)
    except DoriError:  # none, or one that nobody can read
        return
    wanted, known = _settings(plan), before.settings.get("fingerprints", {})
    texts = {case.memory.id: case.memory.text for case in sets.cases}
    differ = [name for name, value in wanted.items() if before.settings.get(name) != value]
    if known.get(before.model) != fingerprints[subjects.model.name]:  # by its weights: a path has many spellings
        differ.insert(0, "model")
    if before.twins and subjects.twins and known.get(before.twins[0]) != fingerprints[subjects.twins[0].name]:
        differ.append("first twin")
    if any(texts.get(one.id, "") != one.text for one in before.subjects):
        differ.append("memories")
    if differ:
        raise DoriError(
            f"{folder} holds another locality run ({', '.join(differ[:5])} differ), and its results would be "
            "overwritten; name another folder with --out"
        )


def says_less(found: Locality, path: Path) -> bool:
    """Whether the records so far are of fewer memories or tests than those in a file, as of an earlier, longer run."""
    try:
        before = read_locality(path)
    except DoriError:  # none, or one that nobody can read
        return False
    return (len(found.subjects), len(found.crosses)) < (len(before.subjects), len(before.crosses))


def locality(
    subjects: Subjects,
    *,
    plan: Plan,
    judge: Judge,
    run: Run,
    say: Callable[[str], None] = lambda line: None,
    after_part: Callable[[Locality], None] = lambda found: None,
    processes: Processes | None = None,
) -> Locality:
    """Run (or resume) a locality analysis.

    Args:
        subjects: an audit's subjects; controls are not used, twins judge.
        plan: the settings.
        judge: whose descriptor decides about replication.
        run: the folder that remembers; the caller holds its lock.
        say: receives one line at a time.
        after_part: receives the records so far after each memory and each causal test.
        processes: of which this is one, all with one folder; None is the only one.

    Returns:
        All records; of a further process what it made, which is no result.

    Raises:
        DoriError: too few prompts, a prompt too long, a folder of another run, or no space left.
    """
    run.device = subjects.model.device.type
    sets = choose_sets(subjects, plan)
    fingerprints = {model.name: model_fingerprint(model) for model in (subjects.model, *subjects.twins)}
    refuse_another(run.folder, subjects, plan, sets, fingerprints)
    bench = Bench(subjects.model, judge, plan, run, fingerprints[subjects.model.name], judge.record())
    cells = _cells(subjects, plan, sets)
    run.plan("locality", {key: rows.weight for part in cells.values() for key, rows in part.items()})
    say("reference sets: NeMo's statistics, memorized and ordinary prompts")
    maskers = Maskers(bench, calibrate(bench, sets.calibration), sets.calibration)
    loop = _Loop(bench, subjects, sets, maskers, cells, fingerprints)
    processes = processes or Processes()
    if not processes.first:
        with torch.no_grad():
            loop.sets, _ = keep_memorized(bench, sets)
        loop.ahead(processes)
        return loop.assembled()
    with torch.no_grad():
        loop.references()
    for number, case in enumerate(sets.cases):
        say(f"memory {number + 1} of {len(sets.cases)}: {case.memory.id}")
        loop.memory(case, number)
        after_part(loop.assembled())
    loop.close_ring()
    after_part(loop.assembled())
    if plan.causal is not None:
        say(f"causal tests of the first {plan.causal.memories}")
        for _ in loop.causal_tests(plan.causal, processes):
            after_part(loop.assembled())
    bench.skip(cells[""])
    return loop.assembled()
