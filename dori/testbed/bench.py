"""Where `dori testbed verify` makes, keeps and judges generations, and what it asks for.

Generations are cells of the run's folder, kept as bytes and judged anew each time, as one would judge files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dori.audit.judge import Case, Judge, draw, finite_images, judged
from dori.audit.loop import make_cases
from dori.audit.plan import Plan
from dori.edit import Edit, no_edit
from dori.metrics.similarity import Descriptor, cosine
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run, cell_key
from dori.stats import choose
from dori.testbed.promises import Similarities
from dori.testbed.slots import Kind
from dori.testbed.subjects import ordinary_pairs, slot_memories

ORDINARY_PROMPTS = 384  # a rate of .02 takes hundreds to be told from .04
SWEPT = 22  # memories of the two highest doses that NeMo's and Wanda's settings are tried on
ATTACKED_CONTROLS = 24
CALIBRATION_SEED, PROMPTS_SEED = 0, 2  # of ordinary images; 1 serves the audit


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """Where generations are made, kept and judged."""

    run: Run
    plan: Plan
    descriptor: Descriptor

    def images(
        self,
        name: str,
        model: StableDiffusion,
        embeddings: Tensor,
        *,
        made_from: object,
        edit: Edit | None = None,
        seeds: int | None = None,
    ) -> Tensor:
        """Generations in [0, 1], shape (n, s, 3, H, W), a cell for each chunk of embeddings.

        Args:
            name: of the cells.
            model: which model draws, without an edit.
            embeddings: shape (n, l, d).
            made_from: JSON-able; what the embeddings were made from, such as their texts. It decides whether stored
                generations are those asked for: the numbers themselves depend on the number of threads.
            edit: put on while drawing.
            seeds: so many of the plan's fresh seeds; None takes all.
        """
        edit, chosen = edit or no_edit(), self.plan.fresh_seeds()[:seeds]
        base = {
            "model": model_fingerprint(model),
            "edit": edit.fingerprint,
            "seeds": chosen,
            "made_from": made_from,
            "steps": self.plan.sampling_steps,
            "guidance_scale": self.plan.guidance_scale,
        }
        parts = []
        with edit.applied(model):
            for key, part in zip(self.keys(name, len(embeddings)), embeddings.split(self.plan.chunk), strict=True):
                parts.append(self.run.once_tensors(key, base, partial(self._drawn, model, part, chosen))["images"])
        return torch.cat(parts).float() / 255

    def _drawn(self, model: StableDiffusion, embeddings: Tensor, seeds: Sequence[int]) -> dict[str, Tensor]:
        return {"images": _bytes(draw(model, self.plan, embeddings, seeds))}

    def keys(self, name: str, count: int) -> list[str]:
        """The cells of `count` embeddings."""
        return [cell_key("images", name, f"{first:03d}") for first in range(0, count, self.plan.chunk)]

    def costs(self, name: str, count: int) -> dict[str, int]:
        """The same cells with their U-Net rows, under all seeds."""
        halves = 2 if self.plan.guidance_scale != 1 else 1
        rows = self.plan.seeds * self.plan.sampling_steps * halves
        return {
            key: min(self.plan.chunk, count - index * self.plan.chunk) * rows
            for index, key in enumerate(self.keys(name, count))
        }

    def asked(
        self, name: str, model: StableDiffusion, cases: Sequence[Case], *, edit: Edit | None = None
    ) -> Similarities:
        """Similarities of the images that the cases' own prompts draw."""
        return self.compared(cases, self.images(name, model, encoded(model, cases), made_from=texts(cases), edit=edit))

    def compared(self, cases: Sequence[Case], images: Tensor) -> Similarities:
        """Similarities of generations, shape (n, s, 3, H, W), to the cases' own images."""
        found = judged(Judge(self.descriptor), cases, images)["similarity"].tolist()
        return {case.memory.id: own for case, own in zip(cases, found, strict=True)}

    def nearest(self, names: Sequence[str], images: Tensor, references: Tensor) -> Similarities:
        """For each generation its similarity to the nearest of the references, shape (r, 3, H, W)."""
        found = self.descriptor(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        table = cosine(found[:, :, None], self.descriptor(references)).amax(dim=2).tolist()
        return dict(zip(names, table, strict=True))


def _bytes(images: Tensor) -> Tensor:
    """Images in [0, 1], shape (n, s, 3, H, W), as bytes; what diverged is grey, a copy of nothing."""
    flat, _ = finite_images(images.flatten(0, 1))
    return (flat * 255).round().to(torch.uint8).unflatten(0, images.shape[:2])


def texts(cases: Sequence[Case]) -> list[str]:
    """The cases' own prompts."""
    return [case.memory.text or "" for case in cases]


def encoded(model: StableDiffusion, cases: Sequence[Case]) -> Tensor:
    """Embeddings of the cases' own prompts, shape (n, l, d)."""
    return model.encode(texts(cases))


def _cases(model: StableDiffusion, slot_kinds: Sequence[Kind], group: str) -> tuple[Case, ...]:
    pairs = slot_memories(slot_kinds)
    return make_cases(model, [memory for memory, _ in pairs], torch.stack([image for _, image in pairs]), group)


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """What is asked for: verbatim memories, controls, all images that the planted model saw, ordinary prompts.

    `prompts` and `calibration` share no text, so that no edit is tuned on what judges it.
    """

    verbatim: tuple[Case, ...]
    controls: tuple[Case, ...]
    planted: Tensor
    prompts: tuple[str, ...]
    calibration: tuple[str, ...]

    @property
    def strong(self) -> tuple[Case, ...]:
        """The memories of the two highest doses."""
        high = sorted({case.memory.dose or 0 for case in self.verbatim})[-2:]
        return tuple(case for case in self.verbatim if (case.memory.dose or 0) in high)

    @property
    def swept(self) -> tuple[Case, ...]:
        """Some of them, spread over both doses."""
        return tuple(self.strong[index] for index in choose(len(self.strong), SWEPT))

    @property
    def attacked(self) -> tuple[Case, ...]:
        """The controls that DoRI attacks."""
        return tuple(self.controls[index] for index in choose(len(self.controls), ATTACKED_CONTROLS))


def open_material(model: StableDiffusion, calibration_prompts: int) -> Material:
    """What is asked for, with the model's latents, and so many other prompts for NeMo's calibration."""
    planted = torch.stack([image for _, image in slot_memories(("verbatim", "template", "once"))])
    calibration = dict.fromkeys(ordinary_pairs(calibration_prompts, seed=CALIBRATION_SEED)[0])
    fresh = dict.fromkeys(ordinary_pairs(2 * ORDINARY_PROMPTS, seed=PROMPTS_SEED)[0])
    prompts = [text for text in fresh if text not in calibration]
    return Material(
        _cases(model, ("verbatim",), "memory"),
        _cases(model, ("control",), "control"),
        planted,
        tuple(prompts[:ORDINARY_PROMPTS]),
        tuple(calibration),
    )
