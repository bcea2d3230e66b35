"""The proof's measurements: every state of the model, asked in every way, in cells that survive a kill."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dori.attack.dori import Dori
from dori.audit.judge import Case, Judge, pixels_sha256
from dori.audit.plan import Start
from dori.cost import Rows, drawn
from dori.edit import Edit
from dori.erase.decide import deciding, limit
from dori.erase.latent_attack import LatentAttack
from dori.erase.outcomes import ATTACK, PROMPT, RELEARN, Outcome
from dori.erase.protocol import Protocol
from dori.erase.relearn import Relearning
from dori.erase.rounding import rounded
from dori.erase.starts import starting_points
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run, canonical_sha256, cell_key
from dori.sampling import initial_noise, named_seed, sample


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A model as it is judged.

    Args:
        name: how tables name it.
        model: without edits.
        edits: put on one after another.
        rounding: then rounded, by a name in `ROUNDINGS`; "" leaves it.
        whole: asked in every way; otherwise by prompt and by the protocol's `again` from the first start, with as many
            restarts.
        relearned: asked by relearning too.
    """

    name: str
    model: StableDiffusion
    edits: tuple[Edit, ...] = ()
    rounding: str = ""
    whole: bool = True
    relearned: bool = True

    @property
    def pure(self) -> bool:
        """Whether it is no rounded or further trained form: the original, the erased model, a twin."""
        return self.whole or not (self.edits or self.rounding)

    def made_of(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """What a cell measured in this state depends on, from the fingerprints of the models by name."""
        return {
            "model": fingerprints[self.model.name],
            "edits": [edit.fingerprint for edit in self.edits],
            "rounding": self.rounding,
        }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model in this state inside the block."""
        with ExitStack() as stack:
            for edit in self.edits:
                stack.enter_context(edit.applied(self.model))
            if self.rounding:
                stack.enter_context(rounded(self.model, self.rounding))
            yield


@dataclass(frozen=True, slots=True)
class Asking:
    """One way of asking: its name, its attack if it is one of DoRI's, where that begins, and which restart it is."""

    way: str
    attack: Dori | None = None
    start: Start = "prompt"
    restart: int = 0


def askings(protocol: Protocol, state: State) -> list[Asking]:
    """The ways in which a state is asked, relearning apart."""
    found = [Asking(PROMPT)]
    if not state.whole:
        again = (Asking(ATTACK, protocol.again, protocol.starts[0], restart) for restart in range(protocol.restarts))
        return [*found, *again]
    found += [
        Asking(ATTACK, protocol.attack, start, restart)
        for start in protocol.starts
        for restart in range(protocol.restarts)
    ]
    found += [Asking("long", protocol.long)] * (protocol.long is not None)
    found += [Asking("restricted", protocol.restricted)] * (protocol.restricted is not None)
    return found + [Asking("latent")] * (protocol.latent is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Battery:
    """Measures states.

    Args:
        protocol: how.
        judge: whose descriptor decides.
        run: the folder that remembers.
        foreign: prompts of no memory, from which attacks may begin, unknown to the erasure.
        fingerprints: of the models, by name, filled as they are met.
    """

    protocol: Protocol
    judge: Judge
    run: Run
    foreign: tuple[str, ...]
    fingerprints: dict[str, str]

    def measure(self, state: State, cases: Sequence[Case]) -> list[Outcome]:
        """All outcomes of these images in this state."""
        cells = self.cells(state, cases)
        with state.applied():
            return [outcome for ask in cells.values() for outcome in ask()]

    def cells(self, state: State, cases: Sequence[Case]) -> dict[str, Callable[[], list[Outcome]]]:
        """Every cell of `measure` by its name, to be called in this state; the model is without edits here."""
        self.fingerprint(state.model)
        base = state.made_of(self.fingerprints) | {
            "judge": self.judge.record(),
            "seeds": self.protocol.fresh_seeds(),
            "sampling": [self.protocol.sampling_steps, self.protocol.guidance_scale],
        }
        found: dict[str, Callable[[], list[Outcome]]] = {
            self._key(state, asking, chunk): partial(self._ask, state, asking, chunk, base)
            for asking in askings(self.protocol, state)
            for chunk in self._chunks(asking, cases)
        }
        return found | {
            self._relearn_key(state, case, way, k): partial(self._relearn, state, case, way, k, base)
            for way in self._relearnings(state)
            for case in cases
            for k in range(self.protocol.restarts)
        }

    def _relearnings(self, state: State) -> dict[str, Relearning]:
        """In which ways a state is relearned: altered forms in the first one at most."""
        ways = self.protocol.relearnings if state.relearned else {}
        return {way: how for way, how in ways.items() if way == RELEARN or state.pure}

    def fingerprint(self, model: StableDiffusion) -> str:
        """A model's fingerprint, taken when it is first met."""
        if model.name not in self.fingerprints:
            self.fingerprints[model.name] = model_fingerprint(model)
        return self.fingerprints[model.name]

    def costs(self, state: State, cases: Sequence[Case]) -> dict[str, Rows]:
        """Every cell of `measure` with its cost, at most: no image is relearned before the last step."""
        p = self.protocol
        found = {
            self._key(state, asking, chunk): self._asking_rows(asking) * len(chunk)
            for asking in askings(p, state)
            for chunk in self._chunks(asking, cases)
        }
        for way, how in self._relearnings(state).items():
            rows = how.rows() + self._drawn_rows(how.looks * p.seeds)
            found |= {self._relearn_key(state, case, way, k): rows for case in cases for k in range(p.restarts)}
        return found

    def _asking_rows(self, asking: Asking) -> Rows:
        """Cost of one image."""
        p = self.protocol
        if asking.way == "latent" and p.latent is not None:
            return p.latent.rows(guided=p.guidance_scale != 1) + self._drawn_rows(1)
        if asking.attack is None:
            return self._drawn_rows(p.seeds)
        looks = len(asking.attack.snapshots or (0,))
        return Rows(attacked=asking.attack.steps * asking.attack.batch) + self._drawn_rows(looks * p.seeds)

    def _drawn_rows(self, images: int) -> Rows:
        p = self.protocol
        return drawn(images, sampling_steps=p.sampling_steps, guidance_scale=p.guidance_scale)

    # ------------------------------------------------------------------------------------------------------- asking

    def _chunks(self, asking: Asking, cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
        """Images of a cell; those without a text cannot be asked by prompt (attacks on them begin from noise)."""
        if asking.way == PROMPT:
            cases = [case for case in cases if case.memory.text is not None]
        for first in range(0, len(cases), self.protocol.chunk):
            yield cases[first : first + self.protocol.chunk]

    def _key(self, state: State, asking: Asking, cases: Sequence[Case]) -> str:
        return cell_key("proof", state.name, asking.way, asking.start, str(asking.restart), cases[0].memory.id)

    def _relearn_key(self, state: State, case: Case, way: str, restart: int) -> str:
        return cell_key("proof", state.name, way, str(restart), case.memory.id)

    def _ask(self, state: State, asking: Asking, cases: Sequence[Case], base: Mapping[str, Any]) -> list[Outcome]:
        settings: object = self._latent_attack() if asking.way == "latent" else asking.attack
        inputs = {
            **base,
            **self._about(cases),
            "asking": [asking.way, asking.start, asking.restart],
            "settings": settings,
            "seed": self.protocol.seed,
            "foreign": canonical_sha256(self.foreign) if asking.start == "foreign" else "",
        }
        compute = self._latent if asking.way == "latent" else self._embedding
        record = self.run.once_record(
            self._key(state, asking, cases), inputs, lambda: compute(state.model, asking, cases)
        )
        positions = record["positions"] or [None] * len(cases)
        return [
            self._outcome(state, case, asking, steps=int(step), similarities=similarities[row], position=positions[row])
            for step, similarities in record["similarities"].items()
            for row, case in enumerate(cases)
        ]

    def _embedding(self, model: StableDiffusion, asking: Asking, cases: Sequence[Case]) -> dict[str, Any]:
        """Draw from the prompt, or from what DoRI finds at each snapshot."""
        if asking.attack is None:
            found = {0: model.encode([case.memory.text or "" for case in cases])}
        else:
            seeds = self._seeds(asking, cases)
            texts = [case.memory.text for case in cases]
            points = starting_points(model, asking.start, texts=texts, ordinary=self.foreign, seeds=seeds)
            triggers = asking.attack(model, torch.stack([case.latent for case in cases]), points, seeds=seeds)
            found = {step: triggers.at(step) for step in triggers.steps}
        noise = initial_noise(model, self.protocol.fresh_seeds())
        return {
            "similarities": {
                str(step): self._similarities(model, cases, y, noise.repeat(len(cases), 1, 1, 1))
                for step, y in found.items()
            },
            "positions": [],
        }

    def _latent(self, model: StableDiffusion, asking: Asking, cases: Sequence[Case]) -> dict[str, Any]:
        """Search the initial latent and draw from it with the whole sampler: one image each."""
        attack = self._latent_attack()
        assert attack is not None
        y = model.encode([case.memory.text or "" for case in cases])
        found = attack(model, torch.stack([case.latent for case in cases]), y, seeds=self._seeds(asking, cases))
        values = self._similarities(model, cases, y, found.latents.to(model.device, torch.float32))
        positions = [round(position, 6) for position in found.positions.tolist()]
        return {"similarities": {str(attack.steps): values}, "positions": positions}

    def _latent_attack(self) -> LatentAttack | None:
        """Under the guidance under which the found latents are drawn from: otherwise they were sought elsewhere."""
        found = self.protocol.latent
        return found and dataclasses.replace(found, guidance_scale=self.protocol.guidance_scale)

    def _seeds(self, asking: Asking, cases: Sequence[Case]) -> list[int]:
        return [
            named_seed("proof attack", self.protocol.seed, asking.way, asking.start, asking.restart, case.memory.id)
            for case in cases
        ]

    def _similarities(
        self, model: StableDiffusion, cases: Sequence[Case], embeddings: Tensor, noise: Tensor
    ) -> list[list[float]]:
        """The deciding similarities of each case's images, `len(noise) / len(cases)` of them."""
        each = len(noise) // len(cases)
        latents = sample(
            model,
            embeddings.to(model.device).repeat_interleave(each, 0),
            noise,
            steps=self.protocol.sampling_steps,
            guidance_scale=self.protocol.guidance_scale,
        )
        images = model.to_images(latents).cpu().unflatten(0, (len(cases), each))
        return [[round(value, 6) for value in row] for row in deciding(self.judge.descriptor, cases, images).tolist()]

    # ---------------------------------------------------------------------------------------------------- relearning

    def _relearn(self, state: State, case: Case, way: str, restart: int, base: Mapping[str, Any]) -> list[Outcome]:
        how = self.protocol.relearnings[way]
        inputs = {
            **base,
            **self._about([case]),
            "relearning": how,
            "seed": self.protocol.seed,
            "restart": restart,
            "enough": limit(self.judge.descriptor, case),  # it ends the training
        }
        record = self.run.once_record(
            self._relearn_key(state, case, way, restart),
            inputs,
            lambda: self._relearned(state.model, case, how, restart),
        )
        asking = Asking(way, restart=restart)
        return [
            self._outcome(state, case, asking, steps=int(step), similarities=values) for step, values in record.items()
        ]

    def _relearned(self, model: StableDiffusion, case: Case, how: Relearning, restart: int) -> dict[str, Any]:
        y = model.encode([case.memory.text or ""])
        noise, least = initial_noise(model, self.protocol.fresh_seeds()), limit(self.judge.descriptor, case)
        found = how(
            model,
            case.latent,
            y[0].cpu(),
            seed=named_seed("relearn", self.protocol.seed, case.memory.id, restart),
            look=lambda: tuple(self._similarities(model, [case], y, noise)[0]),
            enough=lambda values: float(np.median(values)) > least,
        )
        return {str(step): list(values) for step, values in found.items()}

    # ------------------------------------------------------------------------------------------------------- records

    def _outcome(
        self,
        state: State,
        case: Case,
        asking: Asking,
        *,
        steps: int,
        similarities: Sequence[float],
        position: float | None = None,
    ) -> Outcome:
        return Outcome(
            id=case.memory.id,
            group=case.group,
            state=state.name,
            way=asking.way,
            start=asking.start if asking.attack is not None else "",
            restart=asking.restart,
            steps=steps,
            similarities=tuple(similarities),
            threshold=limit(self.judge.descriptor, case),
            position=position,
        )

    def _about(self, cases: Sequence[Case]) -> dict[str, Any]:
        return {
            "ids": [case.memory.id for case in cases],
            "texts": [case.memory.text for case in cases],
            "boxes": [case.memory.varying_box for case in cases],
            "images": pixels_sha256(torch.stack([case.image for case in cases])),
        }
