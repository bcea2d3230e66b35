"""Speed and memory of the testbed's hot paths, as ratios against a named baseline in the same run.

    python benchmarks/speed.py [--repeats 5]

Prints medians and spreads (smallest to largest), and the peak memory of the process that ran both; nothing here is ever
a test. A ratio above 1 means that Dori's path is faster than the baseline.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from dori.allocator import keep_freed_memory
from dori.attack.dori import Dori
from dori.attack.starts import gaussian
from dori.model.stable_diffusion import StableDiffusion
from dori.sampling import initial_noise, sample
from dori.testbed.folder import load_testbed


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Times of `repeats` runs after one that warms up."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return found


def line(name: str, ours: list[float], baseline: list[float], rows: int) -> str:
    """One row of the table: rows a second of both, ratio of medians, spread of the paired ratios."""
    ratios = sorted(b / o for o, b in zip(ours, baseline, strict=True))
    middle = statistics.median(baseline) / statistics.median(ours)
    return (
        f"{name:<58} {rows / statistics.median(ours):8.0f} {rows / statistics.median(baseline):8.0f} "
        f"{middle:6.2f}  [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
    )


def bare_step(model: StableDiffusion, rows: int) -> Callable[[], None]:
    """The U-Net forward and backward to the embedding, and nothing else."""
    latents, t = torch.randn(rows, *model.latent_shape), torch.randint(model.timesteps, (rows,))
    embedding = torch.randn(rows, *model.embedding_shape, requires_grad=True)

    def work() -> None:
        loss = model.unet(latents, t, embedding).sample.square().mean()
        torch.autograd.grad(loss, embedding)

    return work


def attack_against_bare(model: StableDiffusion, repeats: int) -> str:
    """One attack step on 8 images (64 rows) against the bare network on 64 rows."""
    targets, starts = torch.randn(8, *model.latent_shape), gaussian(model, range(8))
    steps = 4
    ours = [s / steps for s in seconds(lambda: Dori(steps=steps)(model, targets, starts, seeds=range(8)), repeats)]
    return line("attack step, 64 rows / bare forward and backward", ours, seconds(bare_step(model, 64), repeats), 64)


def many_against_one(model: StableDiffusion, repeats: int) -> str:
    """Eight images in one batch against eight attacks one after another; the results must agree."""
    targets, starts = torch.randn(8, *model.latent_shape), gaussian(model, range(8))
    attack = Dori(steps=2)

    def alone() -> list[torch.Tensor]:
        return [attack(model, targets[i : i + 1], starts[i : i + 1], seeds=[i]).at(2) for i in range(8)]

    together = attack(model, targets, starts, seeds=range(8)).at(2)
    gap = (together - torch.cat(alone())).abs().median().item()
    ours = seconds(lambda: attack(model, targets, starts, seeds=range(8)), repeats)
    return line(f"attack, 8 images together / one by one (gap {gap:.0e})", ours, seconds(alone, repeats), 8 * 8 * 2)


def sampling(model: StableDiffusion, repeats: int) -> str:
    """Eight seeds with both guidance halves in one call against single rows."""
    embedding, noise = model.encode(["a picture of a fox"] * 8), initial_noise(model, range(8))
    ours = seconds(lambda: sample(model, embedding, noise, steps=4), repeats)
    single = seconds(
        lambda: [sample(model, embedding[i : i + 1], noise[i : i + 1], steps=4, rows_per_call=2) for i in range(8)],
        repeats,
    )
    return line("sampling, 8 seeds and both halves in one call / one by one", ours, single, 8 * 2 * 4)


def memory_kept(model: StableDiffusion, repeats: int) -> str:
    """The bare network with freed memory kept, as in all commands, against glibc's usual allocator; run it first."""
    step = bare_step(model, 64)
    usual = seconds(step, repeats)
    keep_freed_memory()
    return line("bare step, 64 rows, freed memory kept / given back", seconds(step, repeats), usual, 64)


PARTS = {part.__name__: part for part in (memory_kept, attack_against_bare, many_against_one, sampling)}


def measure(name: str, repeats: int) -> None:
    """One comparison in this process, whose peak memory is its own."""
    torch.set_flush_denormal(True)
    if name != memory_kept.__name__:
        keep_freed_memory()
    print(f"{PARTS[name](load_testbed(), repeats)} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:9.0f}")


def main() -> None:
    """Run all comparisons, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--part", choices=PARTS, help="this comparison alone, in this process")
    arguments = parser.parse_args()
    if arguments.part is not None:
        measure(arguments.part, arguments.repeats)
        return
    print(f"testbed, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of {arguments.repeats}")
    print(f"{'':<58} {'rows/s':>8} {'baseline':>8} {'ratio':>6}  [smallest, largest] peak MiB", flush=True)
    for name in PARTS:
        command = [sys.executable, __file__, "--part", name, "--repeats", str(arguments.repeats)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
