"""Moving weights: which ones, by which optimizer, with averaged weights, memory savers and a state that can be stored.

All erasers that train use this loop, so that they differ in their losses alone:

    with tuning(model, Tuner(learning_rate=1e-5)) as tuned:
        for step in range(100):
            gradient, loss = tuned.gradient(row_losses, rows=16)
            tuned.update(gradient)
        edit = tuned.edit("mine", details)

The optimizer moves leaves. For `full` and the attention arms the leaves are the weights themselves; for `lora` they are
the two factors of W = W0 + (alpha / r) B A, whose gradients follow from that of W by the chain rule, without hooks.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from dori.erase.delta import SLOWER, CannotErase, WeightDelta, difference
from dori.model.stable_diffusion import StableDiffusion
from dori.model.weights import weights_kept
from dori.processes import Processes
from dori.sampling import named_seed

Part = Literal["full", "attention", "cross_attention", "not_cross_attention", "lora"]
RowLosses = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Tuner:
    """How weights are moved.

    Args:
        learning_rate: AdamW's.
        weight_decay: AdamW's; it acts on the leaves.
        clip: largest l2 norm of the whole gradient.
        ema_decay: of the averaged weights, which are the result; 0 takes the last weights.
        part: `full` U-Net; all `attention` layers; `cross_attention` alone, or everything else; or `lora`, low-rank
            changes of all attention projections.
        rank: r of the LoRA.
        alpha: the LoRA's scale is alpha / r.
        rows_per_call: rows of one forward and backward pass; larger batches are accumulated.
        checkpointing: trade time for memory by computing activations again in the backward pass.
    """

    learning_rate: float = 1e-5
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema_decay: float = 0.0
    part: Part = "full"
    rank: int = 8
    alpha: float = 8.0
    rows_per_call: int = 64
    checkpointing: bool = False


def chosen(model: StableDiffusion, part: Part) -> list[str]:
    """Names of the weights that a part moves, in the U-Net's order.

    Attention layers are found by structure: `attn1` and `attn2` of each transformer block, `attn2` being
    cross-attention. (A published script selects them by a text that matches nothing; field.md 6.2.)

    Raises:
        CannotErase: the U-Net has no such weight.
    """
    blocks = [name for name, module in model.unet.named_modules() if isinstance(module, BasicTransformerBlock)]
    cross = tuple(f"{block}.attn2." for block in blocks)
    attention = (*(f"{block}.attn1." for block in blocks), *cross)
    names = [name for name, _ in model.unet.named_parameters()]
    found = {
        "full": names,
        "attention": [name for name in names if name.startswith(attention)],
        "cross_attention": [name for name in names if name.startswith(cross)],
        "not_cross_attention": [name for name in names if not name.startswith(cross)],
        "lora": [name for name in names if name.startswith(attention) and name.endswith(".weight")],
    }[part]
    if not found:
        raise CannotErase(f'{model.name} has no weights of the part {part!r}; erase with part "full"')
    return found


@dataclass(slots=True)
class Tuned:
    """A model in training: see `tuning`, which makes it.

    Args:
        model: its weights are the current ones.
        tuner: settings.
        base: the moved weights as they were.
        leaves: what the optimizer moves.
        optimizer: AdamW over the leaves.
        processes: among which the rows are shared.
        average: averaged weights; the weights themselves if there is no averaging.
        steps: updates so far.
    """

    model: StableDiffusion
    tuner: Tuner
    base: Mapping[str, Tensor]
    leaves: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    processes: Processes
    average: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    @property
    def weights(self) -> dict[str, Tensor]:
        """The current weights that move."""
        parameters = dict(self.model.unet.named_parameters())
        return {name: parameters[name] for name in self.base}

    def gradient(self, losses: RowLosses, rows: int) -> tuple[list[Tensor], float]:
        """The gradient of the mean of `losses` over rows, by parts of `rows_per_call` and over all processes.

        Args:
            losses: row indices, shape (k,), to their losses, shape (k,); rows do not depend on one another.
            rows: number of rows.

        Returns:
            One gradient for each weight that moves, and the mean loss.

        Raises:
            CannotErase: the loss is not finite.
        """
        weights = list(self.weights.values())
        total = [torch.zeros_like(weight) for weight in weights]
        loss = torch.zeros((), device=self.model.device)
        share = self.processes.share(rows)
        for part in share.split(self.tuner.rows_per_call) if len(share) else ():
            value = losses(part).sum() / rows
            for kept, grad in zip(total, torch.autograd.grad(value, weights, allow_unused=True), strict=True):
                if grad is not None:
                    kept += grad
            loss += value.detach()
        *total, loss = self.processes.sum([*total, loss])
        if not math.isfinite(float(loss)):  # before it is logged: no number of an edit may be infinite
            raise self._diverged("loss")
        return total, float(loss)

    def update(self, gradient: Sequence[Tensor]) -> float:
        """One AdamW step along a gradient of the weights; returns the gradient's norm before clipping.

        Raises:
            CannotErase: the gradient is not finite, so that every further step would be lost.
        """
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in gradient))
        if not math.isfinite(norm):
            raise self._diverged("gradient")
        scale = min(1.0, self.tuner.clip / (norm + 1e-12))
        for name, grad in zip(self.base, gradient, strict=True):
            self._pull(name, grad * scale)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._push()
        self.steps += 1
        if self.average:
            decay = min(self.tuner.ema_decay, (1 + self.steps) / (10 + self.steps))
            for name, weight in self.weights.items():
                self.average[name].lerp_(weight.detach(), 1 - decay)
        return norm

    def result(self) -> dict[str, Tensor]:
        """The weights to keep: averaged, or the last."""
        return self.average or {name: weight.detach() for name, weight in self.weights.items()}

    def edit(self, name: str, details: Mapping[str, Any]) -> WeightDelta:
        """The result as an edit of the model as it was."""
        return difference(name, self.model, self.base, self.result(), details)

    def resulting(self) -> AbstractContextManager[None]:
        """Put the result on inside the block."""
        return self.showing(self.result())

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Put the weights on as they were before the training, without gradient, inside the block."""
        with self.showing(self.base), torch.no_grad():
            yield

    def moved(self, change: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Add a change to the weights, or to some of them, inside the block."""
        weights = self.weights
        return self.showing({name: weights[name].detach() + part for name, part in change.items()})

    @contextmanager
    def showing(self, numbers: Mapping[str, Tensor]) -> Iterator[None]:
        """Other numbers for weights that move; they change places and are not copied: no second model is kept."""
        weights = {name: weight for name, weight in self.weights.items() if name in numbers}
        own = {name: weight.data for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.data = numbers[name]
            yield
        finally:
            for name, weight in weights.items():
                weight.data = own[name]

    @contextmanager
    def resting(self) -> Iterator[None]:
        """No weight takes a gradient inside the block: attacks then need less time and memory."""
        weights = self.weights.values()
        try:
            for weight in weights:
                weight.requires_grad_(False)
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(True)

    def _diverged(self, what: str) -> CannotErase:
        return CannotErase(
            f"training {self.model.name} diverged after {self.steps} updates (its {what} is not finite); {SLOWER}"
        )

    def _pull(self, name: str, grad: Tensor) -> None:
        """The gradient of a weight to that of its leaves."""
        if self.tuner.part != "lora":
            self.leaves[name].grad = grad
            return
        a, b, scale = self.leaves[f"{name}.a"], self.leaves[f"{name}.b"], self.tuner.alpha / self.tuner.rank
        a.grad, b.grad = scale * b.T @ grad, scale * grad @ a.T

    @torch.no_grad()
    def _push(self) -> None:
        """The leaves to the weights."""
        if self.tuner.part != "lora":
            return
        scale = self.tuner.alpha / self.tuner.rank
        for name, weight in self.weights.items():
            weight.copy_(self.base[name] + scale * self.leaves[f"{name}.b"] @ self.leaves[f"{name}.a"])

    # ------------------------------------------------------------------------------------------------------ state

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, to be stored."""
        tensors = {f"leaf.{name}": leaf.detach().clone() for name, leaf in self.leaves.items()}
        tensors |= {f"average.{name}": value.clone() for name, value in self.average.items()}
        for name, leaf in self.leaves.items():
            tensors |= {
                f"adam.{name}/{key}": torch.as_tensor(value).clone()
                for key, value in self.optimizer.state[leaf].items()
            }
        return tensors | {"steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave, bit for bit."""
        for name, leaf in self.leaves.items():
            leaf.copy_(tensors[f"leaf.{name}"])
            prefix = f"adam.{name}/"
            stored = {
                key.removeprefix(prefix): value.clone() for key, value in tensors.items() if key.startswith(prefix)
            }
            if stored:
                self.optimizer.state[leaf] = {
                    key: value if key == "step" else value.to(leaf) for key, value in stored.items()
                }
        for name in self.average:
            self.average[name].copy_(tensors[f"average.{name}"])
        self.steps = int(tensors["steps"])
        self._push()


@contextmanager
def tuning(
    model: StableDiffusion, tuner: Tuner, *, seed: int = 0, processes: Processes | None = None
) -> Iterator[Tuned]:
    """Let a part of the U-Net's weights move inside the block; afterwards the model is as before, bit for bit.

    Args:
        model: a model in float32 or float64.
        tuner: how.
        seed: of the LoRA's first factors.
        processes: among which rows are shared; None is one.

    Raises:
        CannotErase: a half-precision model, in which small steps are lost, or no such part.
    """
    if model.unet.dtype not in (torch.float32, torch.float64):
        raise CannotErase(
            f"{model.name} is opened in {model.unet.dtype}, in which small steps are lost; erase in "
            "float32 and round the result"
        )
    names = chosen(model, tuner.part)
    with weights_kept(model, names) as base:
        parameters = dict(model.unet.named_parameters())
        flags = [module for module in model.unet.modules() if hasattr(module, "gradient_checkpointing")]
        try:
            for name in names:
                parameters[name].requires_grad_(True)
            if tuner.checkpointing:
                model.unet.enable_gradient_checkpointing()
            yield begun(model, tuner, base, seed=seed, processes=processes or Processes())
        finally:
            for module in flags:
                module.gradient_checkpointing = False
            for name in names:
                parameters[name].grad = None
                parameters[name].requires_grad_(False)


def begun(
    model: StableDiffusion, tuner: Tuner, base: Mapping[str, Tensor], *, seed: int, processes: Processes
) -> Tuned:
    """A training before its first update, of weights that take a gradient already.

    Args:
        model: its weights move.
        tuner: how.
        base: those that move, as they are now; kept.
        seed: of the LoRA's first factors.
        processes: among which rows are shared.
    """
    parameters = dict(model.unet.named_parameters())
    leaves = _factors(base, tuner, seed) if tuner.part == "lora" else {name: parameters[name] for name in base}
    optimizer = torch.optim.AdamW(leaves.values(), lr=tuner.learning_rate, weight_decay=tuner.weight_decay)
    average = {name: value.clone() for name, value in base.items()} if tuner.ema_decay else {}
    return Tuned(model, tuner, base, leaves, optimizer, processes, average)


def _factors(base: Mapping[str, Tensor], tuner: Tuner, seed: int) -> dict[str, Tensor]:
    """A uniform like a linear layer's own start, B zero: at first nothing changes."""
    leaves: dict[str, Tensor] = {}
    for name, weight in base.items():
        generator = torch.Generator().manual_seed(named_seed("lora", seed, name))
        bound = weight.shape[1] ** -0.5
        a = (torch.rand(tuner.rank, weight.shape[1], generator=generator) * 2 - 1) * bound
        leaves[f"{name}.a"] = a.to(weight)
        leaves[f"{name}.b"] = torch.zeros(weight.shape[0], tuner.rank).to(weight)
    return leaves
