"""The erasure's own cells: surrogates, edits and the times that they took."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dori.attack.dori import Dori
from dori.audit.edits import wanda_name
from dori.audit.judge import Case, Judge, pixels_sha256
from dori.cost import Rows, drawn
from dori.edit import Edit
from dori.erase.adversarial import AdversarialErasure
from dori.erase.concept_ablation import ConceptAblation
from dori.erase.decide import limit
from dori.erase.delta import CannotErase, WeightDelta
from dori.erase.erasers import Eraser
from dori.erase.material import Material
from dori.erase.neighbours import SEEDS, drawn_neighbours, neighbours
from dori.erase.pairs import Forget, Pairs, Work
from dori.erase.plan import Plan
from dori.erase.surrogates import anchor_prompts
from dori.erase.watch import Watch
from dori.errors import DoriError
from dori.run import Run, canonical_sha256, cell_key, tensors_sha256
from dori.sampling import Sampling, named_seed

SURROGATES = "surrogates"  # first part of their cells' names
NEAR = "neighbours"  # the cell of what their captions draw
ANCHORS = "anchors"  # the cell of which shortened prompts show no memory
DRAWN = {NEAR: "taught neighbours", ANCHORS: "anchors"}  # streams of their noises


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """Where edits are made and kept.

    Args:
        material: what is erased.
        plan: how.
        judge: filters surrogates and watches.
        run: the folder that remembers.
        work: processes and progress.
        fingerprint: of the model.
    """

    material: Material
    plan: Plan
    judge: Judge
    run: Run
    work: Work
    fingerprint: str

    def alone(self) -> "Bench":
        """The same for one process."""
        return dataclasses.replace(self, work=Work(say=self.work.say))

    def beside_first(self) -> "Bench":
        """This process with the first one's cells, which it reads and adds to: their folder is the same for all."""
        if self.work.processes.first:
            return self
        run = Run(self.work.states or self.run.folder, device=self.run.device, modules=self.run.modules)
        return dataclasses.replace(self, run=run)

    def forget(self, methods: Iterable[Eraser]) -> Forget:
        """The memories as tensors, with what these erasers learn from beside: surrogates, anchors, neighbours."""
        methods = list(methods)
        model, cases = self.material.subjects.model, self._cases
        texts, source = tuple(case.memory.text for case in cases), canonical_sha256(self._base())
        none = torch.zeros(0, *model.latent_shape)
        return Forget(
            tuple(case.memory.id for case in cases),
            texts,
            torch.stack([case.latent for case in cases]),
            model.encode([text or "" for text in texts]).cpu(),
            self._surrogates(source) if _need_surrogates(methods) else (none,) * len(cases),
            self._anchors(source) if _need_anchors(methods) else (None,) * len(cases),
            self.material.prompts.erasing,
            source,
            self._near(source) if _need_neighbours(methods) else None,
        )

    def _anchors(self, source: str) -> tuple[str | None, ...]:
        """Each memory's longest anchor prompt from which the model draws no memory: a cell of the first process."""
        texts, device = self._anchor_texts(), self.material.subjects.model.device
        seen = torch.zeros(len(texts))
        if self.work.processes.first:
            seen = self._drawn(ANCHORS, source, texts)["unlike"].float()
        unlike = self.work.processes.of_first(seen.to(device)).tolist()
        shown = {text for text, kept in zip(texts, unlike, strict=True) if not kept}
        forms = [anchor_prompts(case.memory.text) for case in self._cases]
        chosen = tuple(next((text for text in own if text not in shown), None) for own in forms)
        whole, none = sum(text == own[0] for own, text in zip(forms, chosen, strict=True)), chosen.count(None)
        self.work.say(f"anchors: half of the prompt for {whole}, less for {len(forms) - whole - none}, none for {none}")
        return chosen

    def _anchor_texts(self) -> tuple[str, ...]:
        """All forms that may be an anchor."""
        return tuple(dict.fromkeys(form for case in self._cases for form in anchor_prompts(case.memory.text)))

    def _near(self, source: str) -> Pairs:
        """What the model draws from neighbours of the captions, without copies: a cell of the first process."""
        model, texts, processes = self.material.subjects.model, self.taught_neighbours(), self.work.processes
        stored = self._drawn(NEAR, source, texts) if processes.first else {}
        if stored:
            self.work.say(f"{int(stored['unlike'].sum())} of {len(texts)} neighbours of the captions show no memory")
        found = [
            processes.every(
                {0: stored[name].to(model.device)} if stored else {},
                1,
                like=torch.zeros(0, *shape, device=model.device),
            )[0].cpu()
            for name, shape in (("latents", model.latent_shape), ("embeddings", model.embedding_shape))
        ]
        return Pairs(found[0], found[1], canonical_sha256(self._drawn_inputs(source, texts)))

    def _drawn(self, key: str, source: str, texts: tuple[str, ...]) -> dict[str, Tensor]:
        """Which prompts show no memory (`unlike`), and what the model draws from those, as a cell."""

        def compute() -> dict[str, Tensor]:
            search = self.plan.surrogates
            drawn = drawn_neighbours(
                self.material.subjects.model,
                texts,
                self._cases,
                self.judge.descriptor,
                below=search.below_target,
                sampling=Sampling(search.sampling_steps, search.guidance_scale),
                seed=named_seed(DRAWN[key], self.plan.seed),
            )
            latents, embeddings = drawn.kept()
            return {"unlike": drawn.unlike, "latents": latents, "embeddings": embeddings}

        return self.run.once_tensors(key, self._drawn_inputs(source, texts), compute)

    def _drawn_inputs(self, source: str, texts: tuple[str, ...]) -> dict[str, object]:
        search = self.plan.surrogates
        return {"memories": source, "texts": texts, "search": search, "judge": self._judged_by()}

    def judged_neighbours(self) -> tuple[str, ...]:
        """Neighbours of the captions in the damage table."""
        return self._neighbours(self.material.prompts.quality, self.plan.neighbours, self.plan.seed)

    def taught_neighbours(self) -> tuple[str, ...]:
        """Those that an erasure may hold: none of the damage table's."""
        words, seed = self.material.prompts.erasing, named_seed("taught neighbours", self.plan.seed)
        return self._neighbours(words, self.plan.taught_neighbours, seed, self.judged_neighbours())

    def _neighbours(
        self, words: Sequence[str], each: int, seed: int, apart_from: Sequence[str] = ()
    ) -> tuple[str, ...]:
        texts = [case.memory.text for case in self._cases if case.memory.text]
        return neighbours(self.material.subjects.model, texts, words, each=each, seed=seed, apart_from=apart_from)

    def _surrogates(self, source: str) -> tuple[Tensor, ...]:
        """Latents of each memory's surrogates; each memory is a cell, so that a killed search goes on with the next.

        Each process searches for its share of the memories that the first one does not have yet, and the first one
        keeps what all found: another number of processes may go on.
        """
        inputs = {
            "memories": source,  # all of them: the mitigations hide them together, and none may be copied
            "search": self.plan.surrogates,
            "mitigations": self.plan.mitigations,
            "judge": self._judged_by(),
        }
        shared = cache(self._mitigations), cache(self._references)  # made once, and not at all if all is stored
        keys, model, processes = list(self.surrogate_costs()), self.material.subjects.model, self.work.processes

        def cell(row: int, compute: Callable[[], dict[str, Tensor]]) -> Tensor:
            return self.run.once_tensors(keys[row], {**inputs, "memory": row}, compute)["latents"].to(model.device)

        several = processes.count > 1
        held = [
            several and processes.first and self.run.holds(key, {**inputs, "memory": row})
            for row, key in enumerate(keys)
        ]
        (anywhere,) = processes.sum([torch.tensor(held, device=model.device, dtype=torch.float32)])
        wanted = [row for row, there in enumerate(anywhere.tolist()) if not there]
        mine = [wanted[k] for k in processes.share(len(wanted)).tolist()] + [
            row for row, there in enumerate(held) if there
        ]
        found = {row: cell(row, partial(self._search_for, row, *shared)) for row in mine}
        like = torch.zeros(0, *model.latent_shape, device=model.device)
        every = processes.every(found, len(keys), like=like)
        if several and processes.first:
            every = [cell(row, partial(dict, latents=latents)) for row, latents in enumerate(every)]
        return tuple(latents.cpu() for latents in every)

    def _search_for(
        self, row: int, mitigations: Callable[[], Sequence[Edit]], references: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """The surrogates of the memory of this position."""
        case, described = self._cases[row], references()
        found = self.plan.surrogates(
            self.material.subjects.model,
            case,
            mitigations(),
            self.judge.descriptor,
            others=torch.cat([described[:row], described[row + 1 :]]),
            seed=self._surrogate_seed,
        )
        least = "" if len(found.latents) else f" (the least similar {found.nearest:.2f})"
        self.work.say(f"surrogates of {case.memory.id}: {len(found.latents)}{least}")
        return {"latents": found.latents}

    def _mitigations(self) -> list[Edit]:
        """Edits that hide all memories that have a text, in the order of trying."""
        model = self.material.subjects.model
        asked = [case.memory.text for case in self._cases if case.memory.text is not None]
        return [
            dataclasses.replace(wanda(model, model.encode(asked), seed=self._surrogate_seed), name=wanda_name(wanda))
            for wanda in self.plan.mitigations
            if asked
        ]

    def _references(self) -> Tensor:
        """The memories' descriptors, shape (n, d)."""
        return self.judge.descriptor(torch.stack([case.image for case in self._cases])).cpu()

    @property
    def _surrogate_seed(self) -> int:
        return named_seed("surrogates", self.plan.seed)

    def edit(self, name: str, method: Eraser, forget: Forget, *, on: WeightDelta | None = None) -> WeightDelta:
        """An erasure as a cell; in several processes, all compute it if the first one does not have it.

        Args:
            name: of the cell.
            method: the eraser.
            forget: the memories.
            on: an edit that is put on first.
        """
        inputs = {
            **self._base(),
            "eraser": method,
            "class": type(method).__name__,
            "on": on.fingerprint if on else "",
            "judge": self._judged_by() if isinstance(method, AdversarialErasure) else "",
            "surrogates": tensors_sha256({str(i): kept for i, kept in enumerate(forget.surrogates)})
            if method.needs_surrogates
            else "",
            "anchors": forget.anchors if _need_anchors([method]) else (),
            "near": forget.near.source if forget.near and _need_neighbours([method]) else "",
            "retain": self.material.retain.source,
        }
        processes, asked = self.work.processes, False
        took: float | None = None
        # Named by all that it depends on: an erasure with other inputs or other code begins anew.
        made_from = canonical_sha256({"inputs": inputs, "made_by": self.run.made_by})[:12]
        state = (self.work.states or self.run.folder) / f"{cell_key(name)}.{made_from}.state.safetensors"

        def compute() -> dict[str, Tensor]:
            nonlocal asked, took
            asked, resumed = True, state.exists()
            processes.sum([torch.ones(1, device=self.material.subjects.model.device)])
            began = time.monotonic()
            try:
                made = self._make(method, forget, on, state)
            except CannotErase:  # from a diverged state nothing goes on
                state.unlink(missing_ok=True)
                raise
            # Of an erasure that was interrupted only the last part is known, which is not its time.
            took = None if resumed else round(time.monotonic() - began, 1)
            return _packed(made)

        if not processes.first:  # it helps if the first one computes, and reads what that one keeps
            (wanted,) = processes.sum([torch.zeros(1, device=self.material.subjects.model.device)])
            if float(wanted):
                self._make(method, forget, on, state)
            processes.wait()
            return _unpacked(self.beside_first().run.once_tensors(cell_key("edit", name), inputs, _unseen))
        stored = self.run.once_tensors(cell_key("edit", name), inputs, compute)
        state.unlink(missing_ok=True)  # several times as large as the model, and the cell is kept
        if asked:
            self.run.once_record(cell_key("seconds", name), inputs, lambda: {"seconds": took})
        else:
            processes.sum([torch.zeros(1, device=self.material.subjects.model.device)])
        processes.wait()
        return _unpacked(stored)

    def seconds(self, name: str) -> float | None:
        """How long the edit took when it was computed in one go; None where that is not known."""
        path = self.run.folder / "cells" / f"{cell_key('seconds', name)}.json"
        try:
            return float(json.loads(path.read_bytes())["record"]["seconds"])
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def _make(self, method: Eraser, forget: Forget, on: WeightDelta | None, state: Path) -> WeightDelta:
        model, seed = self.material.subjects.model, named_seed("erase", self.plan.seed)
        work = dataclasses.replace(self.work, checkpoint=state)
        with (on or WeightDelta("none", {})).applied(model):
            if isinstance(method, AdversarialErasure):
                made = method(model, forget, self.material.retain, seed=seed, work=work, watch=self._watch(method))
            else:
                made = method(model, forget, self.material.retain, seed=seed, work=work)
        return made

    def _watch(self, method: AdversarialErasure) -> Watch | None:
        if not self.plan.watch_seeds or not (method.check_every or method.safe_every > 1):
            return None
        p = self.plan.protocol
        return Watch(
            self.judge.descriptor, self._cases, p.sampling_steps, p.guidance_scale, self.plan.watch_seeds, Dori()
        )

    def surrogate_costs(self) -> dict[str, Rows]:
        """The cells of the search for surrogates in the memories' order, with their cost, at most.

        The mitigations' own rows, guided and with empty prompts, are spread over the memories for which they are made.
        """
        mitigations = self.plan.mitigations
        pruned = Rows(sum(4 * wanda.counted_steps for wanda in mitigations))
        each = self.plan.surrogates.rows(1, len(mitigations)) + pruned
        return {cell_key(SURROGATES, case.memory.id): each for case in self._cases}

    def drawn_costs(self, methods: Iterable[Eraser]) -> dict[str, Rows]:
        """The cells of what these erasers learn from beside the memories, with their cost, at most."""
        methods, search = list(methods), self.plan.surrogates
        found = self.surrogate_costs() if _need_surrogates(methods) else {}
        asked = {NEAR: self.taught_neighbours()} if _need_neighbours(methods) else {}
        asked |= {ANCHORS: self._anchor_texts()} if _need_anchors(methods) else {}
        return found | {
            key: drawn(SEEDS * len(texts), sampling_steps=search.sampling_steps, guidance_scale=search.guidance_scale)
            for key, texts in asked.items()
        }

    def drawn_rows(self, methods: Iterable[Eraser]) -> Rows:
        """At most so many U-Net rows of `drawn_costs`, the surrogates' mitigations included."""
        return sum(self.drawn_costs(methods).values(), Rows())

    def edit_rows(self, method: Eraser) -> Rows:
        """At most so many U-Net rows of an erasure."""
        memories = len(self.material.subjects.memories)
        if isinstance(method, AdversarialErasure):
            return method.rows(memories, self._watch(method))
        return method.rows(memories)

    def _judged_by(self) -> dict[str, object]:
        """Descriptor and thresholds, on which surrogates and the watch depend."""
        return {**self.judge.record(), "limits": [limit(self.judge.descriptor, case) for case in self._cases]}

    @property
    def _cases(self) -> tuple[Case, ...]:
        return self.material.subjects.memories

    def _base(self) -> dict[str, Any]:
        cases = self.material.subjects.memories
        return {
            "model": self.fingerprint,
            "ids": [case.memory.id for case in cases],
            "texts": [case.memory.text for case in cases],
            "seed": self.plan.seed,
            "images": pixels_sha256(torch.stack([case.image for case in cases])),
            "prompts": self.material.prompts.erasing,
        }


def _need_surrogates(methods: Iterable[Eraser]) -> bool:
    """Whether surrogates are needed at all."""
    return any(method.needs_surrogates for method in methods)


def _need_anchors(methods: Iterable[Eraser]) -> bool:
    """Whether anchor prompts are needed at all."""
    return any(isinstance(method, ConceptAblation) and method.target == "model" for method in methods)


def _need_neighbours(methods: Iterable[Eraser]) -> bool:
    """Whether neighbours of the captions are held at all."""
    return any(isinstance(method, AdversarialErasure) and method.near_weight != 0 for method in methods)


def _unseen() -> dict[str, Tensor]:
    """Where a process looks for what the first one has stored.

    Raises:
        DoriError: always.
    """
    raise DoriError(
        "a process does not find the edit that the first one has stored, or it was made from other inputs; give --out "
        "in a folder that all share, and start all processes with the same code, libraries and kind of device"
    )


def _packed(edit: WeightDelta) -> dict[str, Tensor]:
    header = json.dumps({"name": edit.name, "details": edit.details}, sort_keys=True, allow_nan=False)
    return {f"delta.{key}": value for key, value in edit.deltas.items()} | {
        "header": torch.frombuffer(bytearray(header.encode()), dtype=torch.uint8)
    }


def _unpacked(stored: Mapping[str, Tensor]) -> WeightDelta:
    header = json.loads(bytes(stored["header"].tolist()))
    deltas = {key.removeprefix("delta."): value for key, value in stored.items() if key != "header"}
    return WeightDelta(header["name"], deltas, header["details"])
