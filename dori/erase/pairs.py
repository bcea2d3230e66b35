"""What erasers are given, and the batches and losses that they share.

L_DM of methods.md 5.1 is `denoising_losses` on a batch of ordinary pairs; L_Adv is the same on surrogates and triggers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dori.erase.delta import CannotErase
from dori.erase.tuning import RowLosses, Tuned
from dori.model.stable_diffusion import StableDiffusion
from dori.processes import Processes
from dori.sampling import named_seed

NO_SIGNAL = 1e-6  # abar_t below any schedule's but 0
PROMPT_DROPOUT = 0.1  # as in the training of Stable Diffusion: keeps the unconditional half alive


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Images with their prompts, on the CPU.

    Args:
        latents: scaled latents, shape (n, c, h, w).
        embeddings: prompt embeddings, shape (n, l, d).
        source: names what they were made from, pixels and texts; latents differ in the last bit between machines.
    """

    latents: Tensor
    embeddings: Tensor
    source: str

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True, slots=True, eq=False)
class Forget:
    """The memories to erase, as tensors on the CPU.

    Args:
        ids: their ids.
        texts: their prompts; None where there is none.
        latents: scaled latents, shape (n, c, h, w).
        embeddings: prompt embeddings, shape (n, l, d); the empty prompt's where there is no text.
        surrogates: for each memory, latents (k, c, h, w) of images with the prompt's meaning that are no copies;
            k = 0 where none could be made, or none was asked for.
        anchors: for each memory, a shortened form of its prompt from which the model draws no memory; None where each
            form shows one, or none was asked for.
        ordinary: prompts that belong to no memory.
        source: names what latents and embeddings were made from, as in `Pairs`.
        near: what the model draws from neighbours of the prompts, without copies; None where nobody asked for it.
    """

    ids: tuple[str, ...]
    texts: tuple[str | None, ...]
    latents: Tensor
    embeddings: Tensor
    surrogates: tuple[Tensor, ...]
    anchors: tuple[str | None, ...]
    ordinary: tuple[str, ...]
    source: str
    near: Pairs | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def need_texts(self, eraser: str) -> None:
        """Refuse memories without a prompt.

        Raises:
            CannotErase: a memory has none; the message names it.
        """
        self._need(
            (text is not None for text in self.texts),
            f"{eraser} acts on prompts, and memory {{memory}} has no text; give it one in metadata.jsonl, or take the "
            "eraser adversarial",
        )

    def need_surrogates(self, eraser: str) -> None:
        """Refuse memories without surrogates.

        Raises:
            CannotErase: a memory has none; the message names it.
        """
        self._need(
            (len(images) > 0 for images in self.surrogates),
            f"{eraser} needs images with the meaning of memory {{memory}} that are no copies, and none could be made: "
            "the mitigated model and all shortened prompts, even the empty one, draw images too like a memory; leave "
            "it out, or take an eraser that needs none, such as adversarial",
        )

    def need_anchors(self, eraser: str) -> list[str]:
        """Every memory's anchor.

        Raises:
            CannotErase: a memory has none; the message names it.
        """
        self._need(
            (anchor is not None for anchor in self.anchors),
            f"{eraser} needs a shortened prompt of memory {{memory}} from which the model draws no memory, and even "
            "the empty one shows one; leave it out, or take an eraser that needs none, such as adversarial",
        )
        return [anchor for anchor in self.anchors if anchor is not None]

    def _need(self, there: Iterable[bool], sentence: str) -> None:
        """Refuse the first memory that has not what is needed, in a sentence with `{memory}` in its place."""
        for one, has in zip(self.ids, there, strict=True):
            if not has:
                raise CannotErase(sentence.format(memory=repr(one)))

    def need_near(self) -> "Pairs":
        """What L_Near holds.

        Raises:
            CannotErase: there is nothing.
        """
        if self.near is None:
            raise CannotErase(
                "near_weight holds neighbours of the captions, and none were drawn; give them, or leave it out"
            )
        if not len(self.near):
            raise CannotErase(
                "near_weight holds neighbours of the captions, and there is none that shows no memory; leave it out"
            )
        return self.near


def _silent(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Where and how an eraser works.

    Args:
        checkpoint: file for the state of a long erasure, from which a killed one goes on; None keeps none.
        states: folder of such files, the same for all processes; None takes the run's.
        processes: among which rows are shared.
        say: receives one line at a time.
    """

    checkpoint: Path | None = None
    states: Path | None = None
    processes: Processes = field(default_factory=Processes)
    say: Callable[[str], None] = _silent


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows to train on: clean latents (b, c, h, w), embeddings (b, l, d), noise like the latents, timesteps (b,)."""

    latents: Tensor
    embeddings: Tensor
    noise: Tensor
    timestep: Tensor

    def __len__(self) -> int:
        return len(self.latents)


def step_generator(eraser: str, seed: int, step: int) -> torch.Generator:
    """The random stream of one step: it depends on nothing but its name, so that a resumed training draws alike."""
    return torch.Generator().manual_seed(named_seed("erase", eraser, seed, step))


def noised(
    model: StableDiffusion,
    latents: Tensor,
    embeddings: Tensor,
    generator: torch.Generator,
    *,
    timesteps: tuple[int, int] | None = None,
) -> Batch:
    """A batch with fresh noise and timesteps, drawn on the CPU and moved to the model.

    Args:
        model: whose device and schedule.
        latents: shape (b, c, h, w).
        embeddings: shape (b, l, d).
        generator: of noise and timesteps.
        timesteps: first and one past the last; None takes all of the schedule.
    """
    low, high = timesteps or (0, model.timesteps)
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.randint(low, high, (len(latents),), generator=generator)
    kind = model.unet.dtype
    return Batch(
        latents.to(model.device, kind),
        embeddings.to(model.device, kind),
        noise.to(model.device, kind),
        t.to(model.device),
    )


def ordinary_batch(model: StableDiffusion, retain: Pairs, rows: int, generator: torch.Generator) -> Batch:
    """`rows` ordinary pairs drawn with replacement, a tenth of the prompts empty."""
    picked = torch.randint(len(retain), (rows,), generator=generator)
    dropped = torch.rand(rows, 1, 1, generator=generator) < PROMPT_DROPOUT
    null = model.encode([""]).cpu()
    embeddings = torch.where(dropped, null, retain.embeddings[picked].float())
    return noised(model, retain.latents[picked].float(), embeddings, generator)


def surrogate_pairs(
    forget: Forget, embeddings: Tensor, which: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """For each chosen memory one of its surrogates, drawn at random, with an embedding.

    Args:
        forget: the memories.
        embeddings: one for each memory, shape (n, l, d).
        which: indices of memories, shape (b,).
        generator: of the draws.

    Returns:
        Latents (b, c, h, w) and embeddings (b, l, d).
    """
    spins = torch.rand(len(which), generator=generator)
    latents = [
        forget.surrogates[i][int(s * len(forget.surrogates[i]))]
        for i, s in zip(which.tolist(), spins.tolist(), strict=True)
    ]
    return torch.stack(latents).float(), embeddings[which].float()


def even_rows(count: int, rows: int, generator: torch.Generator) -> Tensor:
    """Indices below `count`, `rows` of them: as even as possible, in random order, shape (rows,)."""
    rounds = -(-rows // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:rows]


def memory_batch(model: StableDiffusion, forget: Forget, rows: int, generator: torch.Generator) -> Batch:
    """`rows` memories with their prompts, as even as possible."""
    which = even_rows(len(forget), rows, generator)
    return noised(model, forget.latents[which].float(), forget.embeddings[which].float(), generator)


def denoising_losses(model: StableDiffusion, batch: Batch) -> RowLosses:
    """Each row's denoising error, in the model's own parametrisation."""

    def losses(rows: Tensor) -> Tensor:
        rows = rows.to(batch.latents.device)
        return model.denoising_error(
            batch.latents[rows], batch.noise[rows], batch.timestep[rows], batch.embeddings[rows]
        )

    return losses


def former_losses(tuned: Tuned, batch: Batch, under: Tensor) -> RowLosses:
    """Each row's squared distance to what the model as it was predicts there under another embedding, or the same.

    In the network's own parametrisation, as all training losses.

    Args:
        tuned: the model in training.
        batch: clean latents with the embeddings that are taught.
        under: embeddings of the target, shape (b, l, d) or (1, l, d).
    """
    model = tuned.model
    noisy = model.add_noise(batch.latents, batch.noise, batch.timestep)
    under = under.to(batch.embeddings).expand_as(batch.embeddings)

    def losses(rows: Tensor) -> Tensor:
        rows = rows.to(noisy.device)
        z, t = noisy[rows], batch.timestep[rows]
        with tuned.as_before():
            target = model.predict(z, t, under[rows])
        return (model.predict(z, t, batch.embeddings[rows]) - target).square().flatten(1).mean(1)

    return losses


def denoising_errors(model: StableDiffusion, batch: Batch, *, rows_per_call: int = 64) -> Tensor:
    """Every row's denoising error without gradient, shape (b,), at most so many rows a U-Net call."""
    losses = denoising_losses(model, batch)
    with torch.no_grad():
        return torch.cat([losses(part) for part in torch.arange(len(batch)).split(rows_per_call)])


def prediction_losses(
    model: StableDiffusion, noisy: Tensor, timestep: Tensor, embeddings: Tensor, target: Tensor
) -> RowLosses:
    """Each row's squared distance of the noise prediction to a given noise, in the model's own parametrisation.

    |v - v'|^2 = |eps - eps'|^2 / abar_t for predictions at the same z_t, so a velocity model's rows are divided by
    abar_t: otherwise the purest timesteps, where a velocity's weight in eps vanishes, would teach it nothing. Where
    abar_t is 0 (a schedule of zero terminal SNR) eps says nothing of the velocity, and the row's loss is 0.

    Args:
        model: the model in training.
        noisy: z_t, shape (b, c, h, w).
        timestep: shape (b,).
        embeddings: shape (b, l, d).
        target: the noise to predict, shape (b, c, h, w).
    """

    def losses(rows: Tensor) -> Tensor:
        rows = rows.to(noisy.device)
        predicted = model.predict_noise(noisy[rows], timestep[rows], embeddings[rows])
        error = (predicted - target[rows]).square().flatten(1).mean(1)
        if model.prediction_type == "v_prediction":
            error = error / model.alphas_cumprod[timestep[rows]].to(error.dtype).clamp_min(NO_SIGNAL)
        return error

    return losses
