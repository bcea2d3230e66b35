"""The causal test of one memory: its triggers, and fresh attacks, under masks of single triggers and under joined ones.

No mask, random masks as large in every layer, and masks of another image's triggers meet the same attacks with the same
noises: without them nobody could say whether a mask stopped a trigger, whether the place of what it prunes had anything
to do with it, or whether any trigger's mask, of whatever image, would have done the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dori.audit.judge import Case
from dori.audit.quality import ordinary_quality
from dori.edit import WeightMask, no_edit
from dori.findings import Quality
from dori.locality.bench import Bench, Source
from dori.locality.causal import joined
from dori.locality.costs import QUALITY, crossing, drawing
from dori.locality.plan import Causal
from dori.locality.records import NO_MASK, OTHER_MASKS, RANDOM, TRIGGERS, Cross, Joined, known
from dori.locality.triggers import gaussian_source
from dori.mitigate.random_mask import random_neurons, random_weights
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
        prompts: ordinary prompts that tell what joined masks cost.
        held_out: ordinary images for the quality distances, or None.
    """

    bench: Bench
    case: Case
    causal: Causal
    triggers: Source
    starts: tuple[str, ...]
    prompts: tuple[str, ...]
    held_out: Tensor | None

    def without_mask(self) -> tuple[Cross, Joined]:
        """What the same attacks do to the whole model."""
        (quality,) = self._quality([no_edit()]) or (None,)
        drawn = len(self.prompts) * (1 if self.held_out is not None else 2)  # a second time as the reference
        self.bench.count(QUALITY, drawing(self.bench.plan, drawn if quality else 0))
        return self._cross("", NO_MASK, [no_edit()]), self._join("", NO_MASK, 0, no_edit(), quality)

    def single(self, method: str, edits: Sequence[WeightMask], others: Sequence[WeightMask]) -> list[Cross]:
        """All triggers as they are and attacked again, and fresh attacks: under each trigger's mask, and others."""
        full = [edit for edit in edits if edit.size]
        like = [full[row] for row in choose(len(full), self.causal.random)]
        random = [self._random(method, edit, row) for row, edit in enumerate(like)]
        kinds = ((TRIGGERS, edits), (OTHER_MASKS, others), (RANDOM, random))
        return [self._cross(method, masks, given) for masks, given in kinds if given]

    def united(self, method: str, edits: Sequence[WeightMask]) -> list[Joined]:
        """Fresh attacks under the union of 1, 2, 4, ... masks and under random masks as large; what unions cost."""
        unions = joined(edits, f"{self.case.memory.id} {method}")
        quality = {row.edit: row for row in self._quality([no_edit(), *unions.values()])[1:]}
        self.bench.count(QUALITY, drawing(self.bench.plan, sum(row.prompts for row in quality.values())))
        records = []
        for number, union in unions.items():
            records.append(self._join(method, TRIGGERS, number, union, quality.get(union.name)))
            if self.causal.random:
                records.append(self._join(method, RANDOM, number, self._random(method, union, -number), None))
        return records

    def _random(self, method: str, like: WeightMask, number: int) -> WeightMask:
        seed = named_seed("locality random mask", self.bench.plan.seed, self.case.memory.id, method, number)
        return (random_neurons if method == "NeMo" else random_weights)(self.bench.model, like, seed=seed)

    def _cross(self, method: str, masks: str, edits: Sequence[WeightMask]) -> Cross:
        memory, fresh = self.case.memory.id, self._fresh(range(self.causal.fresh))
        tables = [
            self._under(cell_key("causal", memory, method, masks, str(row)), edit, self.triggers, fresh)
            for row, edit in enumerate(edits)
        ]
        medians = [tuple(_medians(table[name]) for table in tables) for name in ("replay", "again", "fresh")]
        return Cross(memory, method, masks, self.starts, tuple(edit.size for edit in edits), *medians)

    def _join(self, method: str, masks: str, number: int, edit: WeightMask, quality: Quality | None) -> Joined:
        memory, causal = self.case.memory.id, self.causal
        fresh = self._fresh(range(causal.fresh, causal.fresh + causal.joined_fresh))
        found = self._under(
            cell_key("joined", memory, method, masks, str(number)), edit, gaussian_source(self.bench, []), fresh
        )
        total = sum(mask.numel() for mask in edit.masks.values())
        return Joined(
            memory,
            method,
            masks,
            number,
            round(edit.size / total, 6) if total else 0.0,
            int(self.bench.replicates(found["fresh"]).sum()),
            len(fresh),
            known(quality.frechet) if quality else None,
            quality.alignment if quality else None,
        )

    def _fresh(self, numbers: range) -> Source:
        """Gaussian starts that no trigger of the run began from."""
        seeds = [
            named_seed("locality fresh start", self.bench.plan.seed, self.case.memory.id, number) for number in numbers
        ]
        return gaussian_source(self.bench, seeds)

    def _under(self, key: str, edit: WeightMask, triggers: Source, fresh: Source) -> dict[str, Tensor]:
        """Similarities under one mask: `replay` of the triggers, `again` and `fresh` after new attacks; each (n, s)."""
        bench, case, plan = self.bench, self.case, self.bench.plan
        starts = torch.cat([triggers.y, fresh.y])
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

        return bench.tensors(key, inputs, crossing(plan, len(triggers), len(fresh)), compute)

    def _quality(self, edits: Sequence[WeightMask]) -> tuple[Quality, ...]:
        """What edits cost on ordinary prompts, the first one being none."""
        bench = self.bench
        return ordinary_quality(
            bench.model,
            bench.plan.judging(),
            bench.judge,
            bench.run,
            edits=edits,
            prompts=self.prompts,
            base={"model": bench.fingerprint, "judge": bench.judged_by},
            held_out=self.held_out,
            stage=QUALITY,
        )


def _medians(similarity: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in similarity.double().quantile(0.5, dim=1).tolist())
