"""The terms of adversarial fine-tuning's loss, each asked on rows that it draws itself (`dori.erase.adversarial`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from dori.erase.pairs import (
    Forget,
    Pairs,
    denoising_losses,
    even_rows,
    former_losses,
    memory_batch,
    noised,
    ordinary_batch,
    surrogate_pairs,
)
from dori.erase.tuning import RowLosses, Tuned
from dori.model.stable_diffusion import StableDiffusion


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """What the terms of one update draw from.

    Args:
        tuned: the model in training.
        memories: what is erased.
        retain: ordinary pairs.
        triggers: of each start and memory, shape (s, n, l, d).
        visited: positions of the memories that are taught.
        batch: rows of each term.
        prompt_too: teach the plain prompt as well as its triggers.
    """

    tuned: Tuned
    memories: Forget
    retain: Pairs
    triggers: Tensor
    visited: Sequence[int]
    batch: int
    prompt_too: bool

    @property
    def model(self) -> StableDiffusion:
        """The model in training."""
        return self.tuned.model

    def asked(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Memories, as even as possible, and for each one of its triggers, or its prompt, drawn at random.

        A memory without a text has no prompt: asked by the empty one it would be held where it is.
        """
        memories, triggers = self.memories, self.triggers
        which = torch.tensor(list(self.visited))[even_rows(len(self.visited), self.batch, generator)]
        kinds = torch.randint(len(triggers) + self.prompt_too, (self.batch,), generator=generator)
        silent = torch.tensor([memories.texts[i] is None for i in which.tolist()])
        kinds = torch.where(silent, kinds % len(triggers), kinds)
        found = triggers[kinds.clamp(max=len(triggers) - 1), which]
        return which, torch.where((kinds == len(triggers))[:, None, None], memories.embeddings[which].float(), found)


def adversarial(lesson: Lesson, generator: torch.Generator) -> RowLosses:
    """L_Adv: the denoising loss on surrogates under triggers."""
    memories = lesson.memories
    which, embeddings = lesson.asked(generator)
    latents, _ = surrogate_pairs(memories, memories.embeddings, which, generator)
    return denoising_losses(lesson.model, noised(lesson.model, latents, embeddings, generator))


def retain(lesson: Lesson, generator: torch.Generator) -> RowLosses:
    """L_DM: the denoising loss on ordinary pairs."""
    return denoising_losses(lesson.model, ordinary_batch(lesson.model, lesson.retain, lesson.batch, generator))


def unconditional(lesson: Lesson, generator: torch.Generator) -> RowLosses:
    """L_Unc: at the noised memories and under triggers, what the model as it was predicted without a prompt."""
    which, embeddings = lesson.asked(generator)
    batch = noised(lesson.model, lesson.memories.latents[which].float(), embeddings, generator)
    return former_losses(lesson.tuned, batch, lesson.model.encode([""]))


def near(lesson: Lesson, generator: torch.Generator) -> RowLosses:
    """L_Near: near the erased captions, what the model as it was predicted."""
    held = lesson.memories.need_near()
    which = torch.randint(len(held), (lesson.batch,), generator=generator)
    batch = noised(lesson.model, held.latents[which].float(), held.embeddings[which].float(), generator)
    return former_losses(lesson.tuned, batch, batch.embeddings)


def relapse(lesson: Lesson, generator: torch.Generator) -> RowLosses:
    """L_Unc under the plain prompts; to be asked where the weights are those that learned the memories again."""
    batch = memory_batch(lesson.model, lesson.memories, lesson.batch, generator)
    return former_losses(lesson.tuned, batch, lesson.model.encode([""]))


Term = Callable[[Lesson, torch.Generator], RowLosses]
TERMS: Mapping[str, Term] = MappingProxyType(  # in the order in which they draw
    {"adversarial": adversarial, "retain": retain, "unconditional": unconditional, "near": near, "relapse": relapse}
)
