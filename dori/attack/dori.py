"""DoRI: gradient descent on the prompt embedding brings a hidden training image back.

Source: "Finding Dori: Memorization in Text-to-Image Diffusion Models Is Less Local Than Assumed" (2025), attack loss
and settings as in methods.md 1. For a known image z and a frozen, possibly pruned model, minimise over y

    L(y) = || eps - eps_theta(sqrt(abar_t) z + sqrt(1 - abar_t) eps, t, y) ||^2

(the velocity in place of eps where the model predicts that), with fresh noise eps and timestep t at every step, so
that the trigger works from any initial noise. The attack never judges itself: whether the image comes back is decided
elsewhere, with noise that the attack has not seen.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dori.model.stable_diffusion import StableDiffusion

NUMBERS_PER_CALL = 64 * 2048  # of latents: 64 of the testbed's, 8 of Stable Diffusion's, whose gradients are as large


@dataclass(frozen=True, slots=True, eq=False)
class Triggers:
    """What an attack found for n images. There is no field "success".

    Args:
        embeddings: shape (n, s, l, d), the embedding after each step of `steps`.
        steps: the s step counts of the snapshots.
        losses: shape (n, steps), mean squared error of each step before its update.
        first_gradient: shape (n,), l2 norm of the gradient at the start; zero means that the attack saw nothing.
        rows: latent rows sent forward and backward through the U-Net.
    """

    embeddings: Tensor
    steps: tuple[int, ...]
    losses: Tensor
    first_gradient: Tensor
    rows: int

    def at(self, step: int) -> Tensor:
        """The embeddings after `step` updates, shape (n, l, d)."""
        return self.embeddings[:, self.steps.index(step)]


@dataclass(frozen=True, slots=True)
class Dori:
    """The DoRI attack on many images at once, each with its own optimizer state and random stream.

    Differs from the paper in nothing that it states; where it is silent (methods.md 1.2): all token positions are
    free, the timestep is drawn for each of the 8 rows, the loss is the mean, no guidance is used, and the embedding
    stays in float32 whatever the precision of the model.

    Args:
        steps: Adam updates; the budget is part of the test (50 in the paper).
        learning_rate: Adam's, 0.1 in the paper.
        batch: pairs of noise and timestep per image and step, 8 in the paper.
        snapshots: step counts to keep, ascending, the last one equal to `steps`; empty keeps the last alone.
        free_positions: token positions that may change; None frees all.
        max_norm: radius of the l2 ball around the start, over all entries of one embedding; None leaves it free.
        rank: largest rank of the change as an (l, d) matrix; None leaves it free.
        rows_per_call: upper bound on the rows of one U-Net call; of large latents fewer, down to one image's batch, so
            that no call holds more than `NUMBERS_PER_CALL`. Figures differ by rounding alone.
    """

    steps: int = 50
    learning_rate: float = 0.1
    batch: int = 8
    snapshots: tuple[int, ...] = ()
    free_positions: tuple[int, ...] | None = None
    max_norm: float | None = None
    rank: int | None = None
    rows_per_call: int = 64

    def __post_init__(self) -> None:
        kept = self.snapshots or (self.steps,)
        if kept[-1] != self.steps or sorted(set(kept)) != list(kept) or kept[0] < 0:
            raise ValueError(f"snapshots {kept} must ascend from 0 or more to the last step, {self.steps}")

    def __call__(
        self,
        model: StableDiffusion,
        targets: Tensor,
        starts: Tensor,
        *,
        seeds: Sequence[int],
        on_chunk: Callable[[int], None] = lambda done: None,
    ) -> Triggers:
        """Search one trigger for each image.

        Args:
            model: the model under attack, edits put on.
            targets: scaled latents of the known images, shape (n, c, h, w).
            starts: initial embeddings, shape (n, l, d).
            seeds: n seeds; the result for one image depends on its own seed, target and start alone.
            on_chunk: called with the number of images done.

        Returns:
            The triggers of all images.
        """
        rows = min(self.rows_per_call, NUMBERS_PER_CALL // targets.shape[1:].numel())
        per_call = max(1, rows // self.batch)
        parts = []
        for first in range(0, len(targets), per_call):
            chunk = slice(first, first + per_call)
            parts.append(self._attack(model, targets[chunk], starts[chunk], seeds[chunk]))
            on_chunk(min(first + per_call, len(targets)))
        return Triggers(
            torch.cat([p.embeddings for p in parts]),
            parts[0].steps,
            torch.cat([p.losses for p in parts]),
            torch.cat([p.first_gradient for p in parts]),
            sum(p.rows for p in parts),
        )

    def _attack(self, model: StableDiffusion, targets: Tensor, starts: Tensor, seeds: Sequence[int]) -> Triggers:
        n, kept = len(targets), self.snapshots or (self.steps,)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        precise = torch.promote_types(torch.float32, model.unet.dtype)
        start = starts.detach().to(model.device, precise)
        y = start.clone().requires_grad_()
        z = targets.to(model.device, precise).repeat_interleave(self.batch, 0)
        adam = torch.optim.Adam([y], lr=self.learning_rate)
        losses: list[Tensor] = []
        found = [start.clone()] if kept[0] == 0 else []
        first_gradient = torch.zeros(n)
        for step in range(self.steps):
            loss = self._loss(model, z, y, generators)  # (n,)
            # Sums, not means, go backward: a mean's gradient is too small for half precision's range.
            scale = z[0].numel() * self.batch
            (y.grad,) = torch.autograd.grad(loss.sum() * scale, y)
            y.grad /= scale
            if step == 0:
                first_gradient = y.grad.flatten(1).norm(dim=1).cpu()
            adam.step()  # elementwise, so that one optimizer over the stack is a separate one for each image
            losses.append(loss.detach().cpu())
            with torch.no_grad():
                y.copy_(self._project(y, start))
            if step + 1 in kept:
                found.append(y.detach().clone())
        stacked = torch.stack(losses, 1) if losses else torch.zeros(n, 0)
        return Triggers(torch.stack(found, 1).cpu(), kept, stacked, first_gradient, n * self.batch * self.steps)

    def _loss(self, model: StableDiffusion, z: Tensor, y: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The mean squared error of each image over its own fresh noises and timesteps, shape (n,)."""
        shape = (self.batch, *z.shape[1:])
        noise = torch.cat([torch.randn(shape, generator=g) for g in generators]).to(z)
        t = torch.cat([torch.randint(model.timesteps, (self.batch,), generator=g) for g in generators]).to(z.device)
        error = model.denoising_error(z, noise, t, y.repeat_interleave(self.batch, 0))
        return error.view(len(y), self.batch).mean(1)

    def _project(self, y: Tensor, start: Tensor) -> Tensor:
        """The nearest embedding that keeps the restrictions, one after another: positions, rank, ball."""
        if self.free_positions is None and self.rank is None and self.max_norm is None:
            return y
        change = y - start
        if self.free_positions is not None:
            free = torch.zeros(y.shape[1], dtype=torch.bool, device=y.device)
            free[list(self.free_positions)] = True
            change = change * free[:, None]
        if self.rank is not None:
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            change = (u[..., : self.rank] * s[:, None, : self.rank]) @ v[:, : self.rank]
        if self.max_norm is not None:
            norm = change.flatten(1).norm(dim=1).clamp_min(1e-12)
            change = change * (self.max_norm / norm).clamp(max=1)[:, None, None]
        return start + change


def restarts(
    attack: Dori,
    model: StableDiffusion,
    targets: Tensor,
    starts: Sequence[Tensor],
    *,
    seeds: Sequence[int],
    last: int = 10,
) -> Triggers:
    """Run an attack from several starts and keep, image by image, the run whose last losses are lowest.

    Args:
        attack: the attack.
        model: the model under attack.
        targets: shape (n, c, h, w).
        starts: one (n, l, d) tensor for each restart.
        seeds: n seeds; restart k uses seed + 1_000_003 k.
        last: number of final steps whose mean loss decides.

    Returns:
        One trigger an image; `rows` counts all runs.
    """
    runs = [
        attack(model, targets, start, seeds=[seed + 1_000_003 * k for seed in seeds]) for k, start in enumerate(starts)
    ]
    means = torch.stack([run.losses[:, -last:].mean(1) for run in runs])
    best = means.nan_to_num(nan=float("inf")).argmin(0)  # (n,); a run that diverged is the last choice
    index = torch.arange(len(targets))

    def chosen(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors)[best, index]

    return dataclasses.replace(
        runs[0],
        embeddings=chosen([r.embeddings for r in runs]),
        losses=chosen([r.losses for r in runs]),
        first_gradient=chosen([r.first_gradient for r in runs]),
        rows=sum(r.rows for r in runs),
    )
