"""What an erasure costs: ordinary prompts, neighbours of the erased captions, and the loss on held-out pairs.

Each figure stands beside that of ordinary training for the same steps, and of a twin against the model and against the
base that both were trained from, so that "no damage" has a scale. Neighbours (an erased caption with one word
exchanged) are where damage hides; those from which the original model shows a memory are left out, since there a change
is what was wanted.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dori.audit.judge import Case, Judge, cases_sha256, pixels_sha256
from dori.audit.quality import drawn_and_described
from dori.cost import Rows, drawn
from dori.erase.battery import State
from dori.erase.decide import limit
from dori.erase.neighbours import SEEDS, drawn_neighbours
from dori.erase.pairs import Pairs, denoising_errors, noised
from dori.metrics.quality import frechet_distance, kernel_distance
from dori.metrics.similarity import cosine
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run, cell_key
from dori.sampling import Sampling, named_seed

REFERENCE = "damage.reference"  # cell of what all states are compared with
SHOWN = "damage.neighbours"  # cell of which neighbours show a memory


@dataclass(frozen=True, slots=True)
class Damage:
    """One state's quality.

    Args:
        state: name of the state.
        prompts: ordinary prompts drawn from.
        frechet, kernel: distances of their images to held-out ordinary images (or to the original model's images of the
            same prompts under other seeds).
        alignment: median cosine of image and prompt; None without a CLIP.
        to_original: median similarity to the original model's image of the same prompt and seed.
        held_out_loss: mean denoising error on held-out pairs; None if it is not finite.
        neighbours: neighbours drawn from.
        neighbours_shown: further ones that are left out, since the original model draws something like a memory.
        neighbour_frechet, neighbour_kernel: distances of their images to the original model's of the same prompts
            under other seeds.
        neighbour_alignment, neighbour_to_original: likewise.
        to_base, neighbour_to_base: as `to_original`, to the images of the base; None without one.
    """

    state: str
    prompts: int
    frechet: float
    kernel: float
    alignment: float | None
    to_original: float | None
    held_out_loss: float | None
    neighbours: int
    neighbour_frechet: float | None
    neighbour_kernel: float | None
    neighbour_alignment: float | None
    neighbour_to_original: float | None
    neighbours_shown: int = 0
    to_base: float | None = None
    neighbour_to_base: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Gauge:
    """Measures damage.

    Args:
        judge: features, descriptor and alignment.
        run: the folder that remembers.
        ordinary: ordinary prompts, at least two.
        near: neighbours of the erased captions.
        cases: the memories, which no neighbour may show.
        below: similarity to any memory that a neighbour's image may not reach, as a share of the threshold.
        held_out: ordinary images in [0, 1], shape (m, 3, H, W), that no erasure saw; None compares with the original
            model's images under other seeds.
        pairs: held-out pairs for the loss.
        sampling_steps, guidance_scale: of every generation.
        seed: of the noises.
        base: name of the state of the base, "" without one.
    """

    judge: Judge
    run: Run
    ordinary: tuple[str, ...]
    near: tuple[str, ...]
    cases: tuple[Case, ...]
    below: float
    held_out: Tensor | None
    pairs: Pairs
    sampling_steps: int
    guidance_scale: float
    seed: int
    base: str = ""

    def measure(self, states: Sequence[State], fingerprints: Mapping[str, str]) -> tuple[Damage, ...]:
        """One row a state, the original first.

        Args:
            states: the original, then others.
            fingerprints: of their models, by name.
        """
        original = states[0]
        near = self._without_memories(original, self._inputs() | original.made_of(fingerprints))
        rows = dataclasses.replace(self, near=near)._measured(states, fingerprints)
        return tuple(dataclasses.replace(row, neighbours_shown=len(self.near) - len(near)) for row in rows)

    def _measured(self, states: Sequence[State], fingerprints: Mapping[str, str]) -> list[Damage]:
        """The rows, by all neighbours."""
        original, inputs = states[0], self._inputs()
        drawn = [self._drawn_in(state, inputs | state.made_of(fingerprints)) for state in states]
        other = self._references(original, inputs | original.made_of(fingerprints))
        losses = [self._loss_in(state, inputs | state.made_of(fingerprints)) for state in states]
        base = next((found for state, found in zip(states, drawn, strict=True) if state.name == self.base), {})
        return [
            self._row(state, found, original=drawn[0], base=base, reference=other, loss=loss)
            for state, found, loss in zip(states, drawn, losses, strict=True)
        ]

    def _inputs(self) -> dict[str, Any]:
        return {
            "judge": self.judge.record(),
            "sampling": [self.sampling_steps, self.guidance_scale],
            "seed": self.seed,
            "prompts": [self.ordinary, self.near],
        }

    def _without_memories(self, original: State, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """The neighbours from which the original model shows no memory under any of several seeds."""

        def compute() -> dict[str, Tensor]:
            drawn = drawn_neighbours(
                original.model,
                self.near,
                self.cases,
                self.judge.descriptor,
                below=self.below,
                sampling=Sampling(self.sampling_steps, self.guidance_scale),
                seed=named_seed("judged neighbours", self.seed),
            )
            return {"unlike": drawn.unlike}

        if not self.near:
            return ()
        limits = [self.below * limit(self.judge.descriptor, case) for case in self.cases]
        memories = {"memories": cases_sha256(self.cases), "limits": limits}
        with original.applied():
            unlike = self.run.once_tensors(SHOWN, {**inputs, **memories}, compute)["unlike"]
        return tuple(text for text, kept in zip(self.near, unlike.tolist(), strict=True) if kept)

    def _drawn_in(self, state: State, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        with state.applied():
            return self.run.once_tensors(
                cell_key("damage", state.name), inputs, partial(self._both, state.model, "damage")
            )

    def _references(self, original: State, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        held = "" if self.held_out is None else pixels_sha256(self.held_out)

        def compute() -> dict[str, Tensor]:
            found = self._both(original.model, "damage reference")
            if self.held_out is not None:
                found["ordinary.features"] = self.judge.features(self.held_out)
            return found

        with original.applied():
            return self.run.once_tensors(REFERENCE, {**inputs, "held_out": held}, compute)

    def _both(self, model: StableDiffusion, name: str) -> dict[str, Tensor]:
        """Ordinary prompts and neighbours, drawn and described."""
        found = self._described(model, self.ordinary, f"{name} ordinary", "ordinary")
        return found | (self._described(model, self.near, f"{name} near", "near") if len(self.near) > 1 else {})

    def _described(self, model: StableDiffusion, prompts: Sequence[str], name: str, group: str) -> dict[str, Tensor]:
        found = drawn_and_described(
            model,
            self.judge,
            prompts,
            name=name,
            seed=self.seed,
            steps=self.sampling_steps,
            guidance_scale=self.guidance_scale,
        )
        return {f"{group}.{kind}": values for kind, values in found.items()}

    def _loss_in(self, state: State, inputs: Mapping[str, Any]) -> float | None:
        def compute() -> dict[str, Any]:
            batch = noised(
                state.model,
                self.pairs.latents.float(),
                self.pairs.embeddings.float(),
                torch.Generator().manual_seed(named_seed("held-out loss", self.seed)),
            )
            loss = float(denoising_errors(state.model, batch).mean())
            return {"loss": round(loss, 8) if math.isfinite(loss) else None}

        with state.applied():
            record = self.run.once_record(cell_key("loss", state.name), {**inputs, "pairs": self.pairs.source}, compute)
        return record["loss"]

    def _row(
        self,
        state: State,
        found: Mapping[str, Tensor],
        *,
        original: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
        reference: Mapping[str, Tensor],
        loss: float | None,
    ) -> Damage:
        def median(group: str) -> float | None:
            key = f"{group}.alignment"
            return float(found[key].median()) if key in found else None

        def likeness(group: str, other: Mapping[str, Tensor]) -> float | None:
            key = f"{group}.descriptors"
            compared = found is not other and key in found and key in other
            return float(cosine(found[key], other[key]).median()) if compared else None

        def distances(group: str) -> tuple[float, float] | None:
            key, seed = f"{group}.features", named_seed("kernel", self.seed)
            if key not in found:
                return None
            kernel = kernel_distance(found[key], reference[key], seed=seed)
            return frechet_distance(found[key], reference[key]), kernel.value

        ordinary, near = distances("ordinary"), distances("near")
        assert ordinary is not None
        return Damage(
            state=state.name,
            prompts=len(self.ordinary),
            frechet=ordinary[0],
            kernel=ordinary[1],
            alignment=median("ordinary"),
            to_original=likeness("ordinary", original),
            held_out_loss=loss,
            neighbours=len(self.near) if len(self.near) > 1 else 0,
            neighbour_frechet=near and near[0],
            neighbour_kernel=near and near[1],
            neighbour_alignment=median("near"),
            neighbour_to_original=likeness("near", original),
            to_base=likeness("ordinary", base),
            neighbour_to_base=likeness("near", base),
        )

    def costs(self, states: Sequence[State]) -> dict[str, Rows]:
        """Every cell of `measure` with its cost, at most: no neighbour shows a memory."""
        images = len(self.ordinary) + (len(self.near) if len(self.near) > 1 else 0)
        rows = drawn(images, sampling_steps=self.sampling_steps, guidance_scale=self.guidance_scale)
        found = {cell_key("damage", state.name): rows for state in states} | {REFERENCE: rows}
        if self.near:
            seen, scale = SEEDS * len(self.near), self.guidance_scale
            found[SHOWN] = drawn(seen, sampling_steps=self.sampling_steps, guidance_scale=scale)
        return found | {cell_key("loss", state.name): Rows(len(self.pairs)) for state in states}


def spoiled(damage: Sequence[Damage], state: str, sound: Sequence[str]) -> float:
    """How badly a state draws: by its Frechet distance, held-out loss or alignment on ordinary prompts, the worst.

    The first two as multiples of the smallest among states that are sound, and how many times smaller than the largest
    of theirs the alignment is, so that a rate that ruins ordinary training as well excuses nothing; infinite where the
    loss is not finite or the alignment not above 0. Alignment is taken as it is: where a CLIP finds unrelated images
    alike to a prompt too, it falls by less than half whatever happens.
    """
    by_name = {row.state: row for row in damage}
    own, others = by_name[state], [by_name[name] for name in sound]
    loss = math.inf if own.held_out_loss is None else own.held_out_loss
    pairs = (
        (own.frechet, min(row.frechet for row in others)),
        (loss, min(math.inf if row.held_out_loss is None else row.held_out_loss for row in others)),
    )
    found = [value / least if least > 0 else math.inf if value > 0 else 1.0 for value, least in pairs]
    agree = max((row.alignment for row in others if row.alignment is not None), default=0.0)
    if own.alignment is not None and agree > 0:
        found.append(agree / own.alignment if own.alignment > 0 else math.inf)
    return max(found)
