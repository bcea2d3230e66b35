"""Three memories, their surrogates and ordinary pairs of a tiny model, for the tests of erasers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import tiny_parts
from torch import Tensor
from torch.nn import functional

from dori.attack.dori import Dori
from dori.audit.judge import Case, Judge
from dori.audit.loop import make_cases
from dori.audit.schedule import Subjects
from dori.erase.adversarial import AdversarialErasure
from dori.erase.cells import Bench
from dori.erase.latent_attack import LatentAttack
from dori.erase.material import Material, divided
from dori.erase.pairs import Forget, Pairs, Work
from dori.erase.plan import Plan
from dori.erase.protocol import Protocol
from dori.erase.relearn import Relearning
from dori.erase.surrogates import SurrogateSearch
from dori.erase.tuning import Tuner
from dori.memory import Memory
from dori.metrics.similarity import Descriptor
from dori.mitigate.wanda import Wanda
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run

TEXTS = ("abc", "de fg", "hi jk lm")


def draw(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def forget(model: StableDiffusion, *, surrogates: int = 2, texts: tuple[str | None, ...] = TEXTS) -> Forget:
    """Three memories with latents of unit variance."""
    shape, n = model.latent_shape, len(texts)
    return Forget(
        tuple(f"m{i}" for i in range(n)),
        texts,
        draw(n, *shape, seed=1),
        model.encode([text or "" for text in texts]),
        tuple(draw(surrogates, *shape, seed=10 + i) for i in range(n)),
        ("", "de", "hi")[:n],
        ("x", "yy", "z"),
        "drawn",
    )


def retain(model: StableDiffusion) -> Pairs:
    """Eight ordinary pairs."""
    return Pairs(draw(8, *model.latent_shape, seed=2), model.encode([f"word {i}" for i in range(8)]), "drawn")


def colours(images: Tensor) -> Tensor:
    """The pixel correlation of 4 x 4 thumbnails."""
    x = functional.adaptive_avg_pool2d(images, 4).flatten(1)
    return x - x.mean(dim=1, keepdim=True)


DESCRIPTOR = Descriptor("pixel-correlation-4", "4 x 4, mean subtracted", colours, threshold=0.7)


def cases(model: StableDiffusion, count: int = 3, group: str = "memory", seed: int = 7) -> tuple[Case, ...]:
    """Random images with texts."""
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    kind = "verbatim" if group == "memory" else "control"
    memories = [Memory(f"{group}-{i}", f"{group[0]} {i}", Path(f"{group}{i}.png"), kind) for i in range(count)]
    return make_cases(model, memories, images, group)


def weights(model: StableDiffusion) -> dict[str, Tensor]:
    """A copy of the U-Net's weights."""
    return {name: value.detach().clone() for name, value in model.unet.named_parameters()}


FAST = Tuner(learning_rate=1e-3)
PLAN = Plan(
    "tiny",
    adversarial=AdversarialErasure(
        rounds=1, steps_per_round=1, batch=2, attack=Dori(steps=1, batch=1), starts=("prompt",), tuner=FAST
    ),
    mitigations=(Wanda(sparsity=0.2, counted_steps=1, ddim_steps=2),),
    surrogates=SurrogateSearch(wanted=1, tries=2, sampling_steps=1, below_target=1.4),
    protocol=Protocol(
        seeds=1,
        sampling_steps=1,
        attack=Dori(steps=1, batch=1, snapshots=(0, 1)),
        starts=("prompt",),
        long=None,
        restricted=None,
        latent=LatentAttack(steps=1, sampling_steps=1),
        again=Dori(steps=1, batch=1, snapshots=(0, 1)),
        roundings=("int8",),
        harmless_steps=1,
        relearning=Relearning(steps=1, batch=1, check_every=1, tuner=FAST),
    ),
    quality_prompts=4,
    neighbours=1,
    watch_seeds=1,
)
PLAN = dataclasses.replace(
    PLAN, tables=dataclasses.replace(PLAN.protocol, starts=("prompt", "gaussian"), harmless_steps=0, lora_rate=None)
)


def material(model: StableDiffusion, *twins: StableDiffusion) -> Material:
    """Two memories, two controls and a few prompts."""
    subjects = Subjects(model, cases(model, 2), cases(model, 2, "control", seed=8), (), None, twins)
    prompts = divided([f"word {i}" for i in range(12)], subjects, 4)
    pictures = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    pairs = retain(model)
    return Material(subjects, pairs, pairs, pictures, prompts, "test")


def twin_of(folder: Path) -> StableDiffusion:
    """Another model that opens alike."""
    twin = StableDiffusion(**tiny_parts(folder), name="twin <b>")
    with torch.no_grad():
        twin.unet.conv_in.weight.add_(0.1 * draw(*twin.unet.conv_in.weight.shape, seed=0))
    return twin


def bench(folder: Path, given: Material, plan: Plan = PLAN, say: Callable[[str], None] = lambda line: None) -> Bench:
    """What an erasure works on, in a folder of its own."""
    fingerprint = model_fingerprint(given.subjects.model)
    return Bench(given, plan, Judge(DESCRIPTOR), Run(folder, say=say, modules=()), Work(say=say), fingerprint)
