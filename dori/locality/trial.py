"""The causal test of one memory: its triggers, and fresh attacks, under masks of single triggers and under joined ones.

No mask, random masks as large in every layer, and masks of another image's triggers meet the same attacks with the same
noises: without them nobody could say whether a mask stopped a trigger, whether the place of what it prunes had anything
to do with it, or whether any trigger's mask, of whatever image, would have done the same. Where there are twins, so
does a mask as large of the weights that planting changed most: a choice of weights that is known to have to do with
the memory. Beside it weights are set to the twin's values instead of zero, more and more of them (`undone`).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dori.audit.judge import Case
from dori.audit.quality import Quality, ordinary_quality, quality_cells
from dori.edit import Edit, WeightMask, no_edit
from dori.locality.bench import Bench, Source
from dori.locality.causal import joined
from dori.locality.costs import QUALITY, crossing, drawing, price_name, taken_back_name, taken_back_parts
from dori.locality.plan import Causal
from dori.locality.records import NO_MASK, OTHER_MASKS, PLANTED, RANDOM, TRIGGERS, Cross, Joined, Price, Undone, known
from dori.locality.triggers import gaussian_source
from dori.locality.truth import Energies, best_masks
from dori.locality.undone import taken_back
from dori.mitigate.random_mask import random_neurons, random_weights
from dori.model.stable_diffusion import StableDiffusion
from dori.run import cell_key
from dori.sampling import named_seed
from dori.stats import choose


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """One memory under test.

    Args:
        bench: the bench.
        case: the memory.
        causal: the settings.
        triggers: its triggers.
        starts: the kind of start of each.
        prompts: ordinary prompts that tell what masks cost.
        held_out: ordinary images for the quality distances, or None.
        excess: what planting changed, weight by weight in the layers that masks lie in; None without a twin.
    """

    bench: Bench
    case: Case
    causal: Causal
    triggers: Source
    starts: tuple[str, ...]
    prompts: tuple[str, ...]
    held_out: Tensor | None
    excess: Energies | None = None

    def without_mask(self) -> tuple[Cross, Joined, list[Price]]:
        """What the same attacks do to the whole model, and what ordinary prompts draw from it."""
        numbers = range(self.causal.fresh_starts)
        cross = self._cross("", NO_MASK, [no_edit()], [numbers])
        return cross, self._join("", NO_MASK, 0, no_edit(), 0), self._prices("", NO_MASK, 0, [(0, no_edit())])

    def undone(self, twin: StableDiffusion) -> list[Undone]:
        """The triggers as they are, and the fresh attacks that joined masks meet, under more and more of the twin."""
        memory, bench, records = self.case.memory.id, self.bench, list[Undone]()
        seed = named_seed("locality taken back", bench.plan.seed)
        parts = taken_back_parts(self.causal)
        for chosen in dict.fromkeys(name for name, _ in parts):
            shares = [share for name, share in parts if name == chosen]
            for part in taken_back(bench.model, twin, shares, chosen=chosen, seed=seed):
                key = cell_key("undone", memory, chosen, f"{part.share:g}")
                found = self._under(key, part.edit, self.triggers, self._joined_numbers(), again=False)
                back = [int(bench.replicates(found[name]).sum()) for name in ("replay", "fresh")]
                counts = back[0], len(self.triggers), back[1], self.causal.joined_fresh
                # the same for every memory, so its name has none
                price = self._quality([dataclasses.replace(part.edit, name=taken_back_name(chosen, part.share))])
                figures = _figures(price[-1]) if price else []
                held, similar = round(part.held, 6), known(float(found["fresh"].double().quantile(0.5, 1).median()))
                records.append(Undone(memory, chosen, part.share, part.edit.size, held, *counts, similar, *figures))
        return records

    def single(
        self, method: str, edits: Sequence[WeightMask], others: Sequence[WeightMask]
    ) -> tuple[list[Cross], list[Price]]:
        """All triggers as they are and attacked again, and fresh attacks: under each trigger's mask, and others."""
        full = [edit for edit in edits if edit.size]
        like = [full[row] for row in choose(len(full), self.causal.random)]
        random = [self._random(method, edit, row) for row, edit in enumerate(like)]
        middle = sorted(full, key=lambda edit: edit.size)[len(full) // 2 :][:1]
        best = [self._planted(edit) for edit in middle if self.excess is not None]
        crosses, prices = list[Cross](), list[Price]()
        for masks, given in ((TRIGGERS, edits), (OTHER_MASKS, others), (RANDOM, random), (PLANTED, best)):
            if not given:
                continue
            few = self.causal.fresh if masks != PLANTED else self.causal.planted_fresh
            own = [range(row * few, (row + 1) * few) for row in range(len(given))]
            crosses.append(self._cross(method, masks, given, own))
            rows = [row for row, edit in enumerate(given) if edit.size]
            chosen = [rows[k] for k in choose(len(rows), self.causal.priced)]
            prices += self._prices(method, masks, 1, [(row, given[row]) for row in chosen])
        return crosses, prices

    def united(self, method: str, edits: Iterable[WeightMask], count: int) -> tuple[list[Joined], list[Price]]:
        """Fresh attacks under the union of 1, 2, 4, ... masks, under random ones and of the change; what all cost."""
        records, prices = list[Joined](), list[Price]()
        for index, (number, union) in enumerate(joined(edits, count, method)):
            given = {TRIGGERS: union}
            if self.causal.random and union.size:
                given[RANDOM] = self._random(method, union, -number)
            if self.excess is not None and union.size:
                given[PLANTED] = self._planted(union)
            for masks, edit in given.items():
                records.append(self._join(method, masks, number, edit, index))
                prices += self._prices(method, masks, number, [(None, edit)], first=index)
        return records, prices

    def _random(self, method: str, like: WeightMask, number: int) -> WeightMask:
        seed = named_seed("locality random mask", self.bench.plan.seed, self.case.memory.id, method, number)
        return (random_neurons if method == "NeMo" else random_weights)(self.bench.model, like, seed=seed)

    def _planted(self, like: WeightMask) -> WeightMask:
        """The weights that planting changed most, as many in every layer."""
        assert self.excess is not None
        return WeightMask(PLANTED, best_masks(self.excess, like.masks))

    def _cross(self, method: str, masks: str, edits: Sequence[WeightMask], fresh: Sequence[range]) -> Cross:
        memory = self.case.memory.id
        tables = [
            self._under(cell_key("causal", memory, method, masks, str(row)), edit, self.triggers, numbers)
            for row, (edit, numbers) in enumerate(zip(edits, fresh, strict=True))
        ]
        medians = [tuple(_medians(table[name]) for table in tables) for name in ("replay", "again", "fresh")]
        return Cross(memory, method, masks, self.starts, tuple(edit.size for edit in edits), *medians)

    def _join(self, method: str, masks: str, number: int, edit: WeightMask, index: int) -> Joined:
        memory, numbers = self.case.memory.id, self._joined_numbers()
        key = cell_key("joined", memory, method, masks, str(index))
        found = self._under(key, edit, gaussian_source(self.bench.model, []), numbers)
        total = sum(mask.numel() for mask in edit.masks.values())
        density = round(edit.size / total, 6) if total else 0.0
        return Joined(
            memory, method, masks, number, density, int(self.bench.replicates(found["fresh"]).sum()), len(numbers)
        )

    def _joined_numbers(self) -> range:
        first = self.causal.fresh_starts
        return range(first, first + self.causal.joined_fresh)

    def _under(self, key: str, edit: Edit, triggers: Source, fresh: range, *, again: bool = True) -> dict[str, Tensor]:
        """Similarities under one edit: `replay` of the triggers, `again` and `fresh` after new attacks; each (n, s).

        Fresh starts and the attacks' noises are named by their numbers, so that every edit meets the same ones. If not
        `again` no trigger is attacked again, and there are no such rows.
        """
        repeated = len(triggers) if again else 0
        bench, case, plan = self.bench, self.case, self.bench.plan
        new = gaussian_source(bench.model, self._named("locality fresh start", fresh))
        starts = torch.cat([triggers.y[:repeated], new.y])
        attack_seeds = [*self._named("locality causal", range(repeated)), *self._named("locality causal, fresh", fresh)]
        seeds = plan.fresh_seeds(self.causal.seeds)
        inputs = bench.judged_inputs(case, triggers, seeds) | {
            "fresh": new.sha256,
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
            return dict(zip(names, similar.split([len(triggers), repeated, len(fresh)]), strict=True))

        rows = crossing(plan, self.causal, len(triggers), len(fresh), again=again)
        return bench.tensors(key, inputs, rows, compute)

    def _named(self, name: str, numbers: range) -> list[int]:
        return [named_seed(name, self.bench.plan.seed, self.case.memory.id, number) for number in numbers]

    def _prices(
        self, method: str, masks: str, number: int, given: Sequence[tuple[int | None, WeightMask]], *, first: int = 0
    ) -> list[Price]:
        """What edits cost on ordinary prompts; none where there are not two prompts.

        Args:
            method: of the masks.
            masks: their kind.
            number: of masks joined in each.
            given: row in its `Cross`, None of joined ones, and edit.
            first: place of the first of them among those of its kind.
        """
        memory, held = self.case.memory.id, self.held_out is not None
        named = [
            dataclasses.replace(edit, name=price_name(memory, method, masks, index, joined=row is None))
            for index, (row, edit) in enumerate(given, first)
            if masks != NO_MASK
        ]
        found = self._quality(named)
        if not found:
            return []
        return [
            Price(memory, method, masks, number, row, own.prompts, held, *_figures(own))
            for (row, _), own in zip(given, found[len(found) - len(given) :], strict=True)
        ]

    def _quality(self, edits: Sequence[Edit]) -> tuple[Quality, ...]:
        """Rows of the whole model and of each edit on ordinary prompts; none where there are not two prompts."""
        bench, every = self.bench, [no_edit(), *edits]
        found = ordinary_quality(
            bench.model,
            bench.plan.judging(),
            bench.judge,
            bench.run,
            edits=every,
            prompts=self.prompts,
            base={"model": bench.fingerprint, "judge": bench.judged_by},
            held_out=self.held_out,
            stage=QUALITY,
        )
        held, names = self.held_out is not None, [edit.name for edit in every]
        for key, images in quality_cells(names, len(self.prompts), held_out=held, stage=QUALITY).items():
            bench.count_shared(key, drawing(bench.plan, images))
        return found


def _figures(row: Quality) -> list[float | None]:
    likeness = row.to_unedited, row.kernel_std, row.to_unedited_low, row.to_unedited_high
    values = (row.frechet, row.kernel, row.alignment, *likeness)
    return [None if value is None else known(value) for value in values]


def _medians(similarity: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in similarity.double().quantile(0.5, dim=1).tolist())
