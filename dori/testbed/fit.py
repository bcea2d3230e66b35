"""One training loop for everything that the testbed trains: resumable, with averaged weights.

The state lies in one safetensors file, and the random numbers of a step depend on the stage's seed and the step alone,
so a resumed run draws what the uninterrupted one would have drawn. The file says what the training was made from, and
no other training goes on from it.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dori.errors import DoriError
from dori.run import write_bytes

Loss = Callable[[int, torch.Generator], Tensor]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Cosine learning rate with linear warm-up."""

    lr: float
    steps: int
    warmup: int = 100

    def __call__(self, step: int) -> float:
        """The learning rate of `step` in [0, steps)."""
        ramp = min(1.0, (step + 1) / self.warmup)
        return self.lr * ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


def _save_state(
    path: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer, metadata: dict[str, str]
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
    write_bytes(path, save({name: value.cpu().contiguous() for name, value in tensors.items()}, metadata=metadata))


def _load_state(
    path: Path,
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    made_from: Mapping[str, object],
) -> int:
    with safe_open(path, "pt") as file:
        stored = json.loads((file.metadata() or {}).get("made_from", "{}"))
        other = sorted(key for key in stored.keys() | made_from.keys() if stored.get(key) != made_from.get(key))
        if other:
            raise DoriError(
                f"{path} belongs to a training with other settings ({', '.join(other)}); "
                "delete it to train anew, or give another --work folder"
            )
        names = list(file.keys())
        model.load_state_dict({n[6:]: file.get_tensor(n) for n in names if n.startswith("model.")})
        for name in ema:
            ema[name] = file.get_tensor(f"ema.{name}").to(ema[name].device)
        state: dict[int, dict[str, Tensor]] = {}
        for name in names:
            if name.startswith("adam."):
                _, index, field = name.split(".")
                state.setdefault(int(index), {})[field] = file.get_tensor(name)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return int(file.metadata()["step"])


def _optimizer(model: nn.Module, slow: Callable[[str], float], rate: float) -> torch.optim.AdamW:
    """AdamW with one group for each scale of the learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(slow(name), []).append(parameter)
    scaled = [{"params": parameters, "scale": scale} for scale, parameters in groups.items()]
    return torch.optim.AdamW(scaled, lr=rate, weight_decay=0.01, fused=True)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """One clipped update; returns the loss."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def fit(
    stage: str,
    model: nn.Module,
    loss: Loss,
    schedule: Schedule,
    folder: Path,
    *,
    seed: int,
    say: Say,
    made_from: Mapping[str, object],
    slow: Callable[[str], float] = lambda name: 1.0,
    ema_decay: float = 0.998,
    save_every: int = 200,
    device: str = "cpu",
) -> None:
    """Minimise `loss(step, generator)` over the model's parameters; leave the averaged weights in the model.

    Args:
        stage: name of the training.
        model: the network.
        loss: of one step, from the step's own generator.
        schedule: learning rate and length.
        folder: holds `stage.state.safetensors`, from which a killed training goes on.
        seed: of the steps' generators.
        say: receives one line of progress at a time.
        made_from: JSON-able; everything else that determines the result.
        slow: scale of a parameter's learning rate, by its name.
        ema_decay: of the averaged weights.
        save_every: steps between two savings.
        device: where the model is trained; it comes back to the CPU. Random numbers are drawn on the CPU everywhere.

    Raises:
        DoriError: the folder's state was made from something else, or cannot be written.
    """
    state_file = folder / f"{stage}.state.safetensors"
    made_from = json.loads(json.dumps({"schedule": asdict(schedule), "step_seed": seed, **made_from}))
    model.to(device)
    optimizer = _optimizer(model, slow, schedule.lr)
    ema = {name: value.detach().clone() for name, value in model.named_parameters()}
    first = _load_state(state_file, model, ema, optimizer, made_from) if state_file.exists() else 0
    model.train()
    began, shown = time.monotonic(), 0.0
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step) * group["scale"]
        value = _step(model, optimizer, loss(step, torch.Generator().manual_seed(seed * 1_000_003 + step)))
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), list(model.parameters()), 1 - decay)
        shown = value if step == first else 0.98 * shown + 0.02 * value
        done = step + 1
        if done % 50 == 0:
            left = (time.monotonic() - began) / (done - first) * (schedule.steps - done)
            say(f"{stage}: step {done}/{schedule.steps}, loss {shown:.4f}, {left / 60:.1f} min left")
        if done % save_every == 0 or done == schedule.steps:
            about = {"step": str(done), "made_from": json.dumps(made_from, sort_keys=True)}
            _save_state(state_file, model, ema, optimizer, about)
    model.load_state_dict(ema, strict=False)  # buffers have no average
    model.to("cpu").eval()
