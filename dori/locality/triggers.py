"""The triggers of one memory: attacks from many starts, and which of them replicate with fresh seeds.

Starts are the memory's own prompt, N(0, I), and other prompts' embeddings (methods.md 1.1). Gaussian start k and
foreign start k are the same for every memory, so that moves towards different memories from one start compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dori.attack.starts import gaussian
from dori.audit.judge import Case, pixels_sha256
from dori.locality.bench import Bench, Source, copies, encoded
from dori.locality.costs import attacking, chunks, drawing
from dori.locality.embeddings import moved
from dori.locality.records import Trigger, known
from dori.model.stable_diffusion import StableDiffusion
from dori.run import cell_key
from dori.sampling import named_seed
from dori.stats import by_turns

ORDER = ("prompt", "gaussian", "foreign")
Start = tuple[str, int]  # its kind, and its number among those


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """All attacks on one memory.

    Args:
        starts: initial embeddings, shape (n, l, d).
        ends: attacked embeddings, likewise.
        names: start of each.
        index: number of each within its start.
        similarity: similarity under every fresh seed, shape (n, s).
        replicates: which are triggers, booleans (n,); an attack that diverged found none.
        origin: what the ends were made from.
    """

    starts: Tensor
    ends: Tensor
    names: tuple[str, ...]
    index: tuple[int, ...]
    similarity: Tensor
    replicates: Tensor
    origin: dict[str, object]

    def take(self, rows: Sequence[int]) -> Source:
        """Some of the ends."""
        return Source(self.ends, self.origin).take(rows)

    def start(self, row: int) -> Start:
        """Where an attack began; the same for every memory, but for the prompt."""
        return self.names[row], self.index[row]

    def rows(self, start: str | None = None) -> list[int]:
        """Positions of the triggers, of one start or of all; the prompt-started one first."""
        return [
            row
            for row, name in enumerate(self.names)
            if bool(self.replicates[row]) and (start is None or name == start)
        ]

    def spread(self, limit: int) -> list[int]:
        """At most so many triggers: the prompt-started one, then the first of the other starts, by turns."""
        kept = self.rows("prompt")[:limit]
        return kept + by_turns(self.rows(start) for start in ORDER[1:])[: limit - len(kept)]


def common_starts(mine: Sequence[Start], theirs: Sequence[Start]) -> tuple[list[int], list[int]]:
    """Where the starts that two memories share lie among the one's and the other's, row by row.

    A memory's own prompt is no other's start.
    """
    there = {start: row for row, start in enumerate(mine) if start[0] != "prompt"}
    both = [(there[start], row) for row, start in enumerate(theirs) if start in there]
    return [row for row, _ in both], [row for _, row in both]


def gaussian_source(model: StableDiffusion, seeds: Sequence[int]) -> Source:
    """Gaussian starts of given seeds."""
    y = gaussian(model, seeds) if seeds else torch.zeros(0, *model.embedding_shape)
    return Source(y, {"gaussian": list(seeds)})


def numbered_starts(model: StableDiffusion, seed: int, numbers: Sequence[int]) -> Source:
    """The Gaussian starts of these numbers in a run of this seed, the same for every memory."""
    return gaussian_source(model, [named_seed("locality gaussian", seed, k) for k in numbers])


def gaussian_starts(bench: Bench, numbers: Sequence[int]) -> Source:
    """The same in the run at hand."""
    return numbered_starts(bench.model, bench.plan.seed, numbers)


def replicating(similar: Tensor, ends: Tensor, threshold: float) -> Tensor:
    """Which attacks bring the image back, booleans (n,).

    Args:
        similar: shape (n, s).
        ends: shape (n, l, d); one that is not finite, as half precision may give, found nothing.
        threshold: the descriptor's.
    """
    return copies(similar, threshold) & torch.isfinite(ends).flatten(1).all(1)


def starts_of(bench: Bench, case: Case, foreign: Source) -> dict[str, Source]:
    """Initial embeddings by start; a memory without a text has no prompt start."""
    prompt = {} if case.memory.text is None else {"prompt": encoded(bench.model, [case.memory.text])}
    return prompt | {"gaussian": gaussian_starts(bench, range(bench.plan.gaussian)), "foreign": foreign}


def attacked(bench: Bench, key: str, case: Case, starts: Source, seeds: list[int]) -> Source:
    """The embeddings after DoRI from the given starts at one memory, as a cell."""
    attack, targets = bench.plan.attack, case.latent[None].expand(len(starts), -1, -1, -1)
    origin: dict[str, object] = {
        "attack": attack,
        "seeds": seeds,
        "image": pixels_sha256(case.image),
        "starts": starts.sha256,
    }
    found = bench.tensors(
        key,
        origin,
        attacking(bench.plan, len(starts)),
        lambda: {"end": attack(bench.model, targets, starts.y, seeds=seeds).at(attack.steps)},
    )
    return Source(found["end"], origin)


def attack_seeds(bench: Bench, memory: str, start: str, numbers: Sequence[int]) -> list[int]:
    """Seeds of the noise that the attacks from the given starts meet."""
    return [named_seed("locality attack", bench.plan.seed, memory, start, k) for k in numbers]


def replicating_on(twin: Bench, case: Case) -> tuple[int, int]:
    """How many of the first Gaussian-started attacks replicate on a model that never saw the image, and their number.

    Starts and noise are those of the attacks on the analysed model.
    """
    numbers, memory = range(min(twin.plan.twin_attacks, twin.plan.gaussian)), case.memory.id
    starts, seeds = gaussian_starts(twin, numbers), attack_seeds(twin, memory, "gaussian", numbers)
    ends = attacked(twin, cell_key("twin", memory, "triggers"), case, starts, seeds)
    similar = similarities(twin, cell_key("twin", memory, "judged"), case, ends, twin.plan.fresh_seeds())
    return int(twin.replicates(similar).sum()), len(numbers)


def repeated(bench: Bench, case: Case, found: Found) -> tuple[Tensor, Tensor]:
    """Moves of the first Gaussian-started attacks, and of the same made again under other noise, shape (n, l, d) each.

    Those of which both bring the image back.
    """
    numbers, memory = range(min(bench.plan.repeats, bench.plan.gaussian)), case.memory.id
    starts, rows = gaussian_starts(bench, numbers), [found.names.index("gaussian") + k for k in numbers]
    seeds = attack_seeds(bench, memory, "gaussian, again", numbers)
    ends = attacked(bench, cell_key("triggers", memory, "again"), case, starts, seeds)
    similar = similarities(bench, cell_key("judged", memory, "again"), case, ends, bench.plan.fresh_seeds())
    kept = replicating(similar, ends.y, bench.judge.descriptor.threshold) & found.replicates[rows]
    return (found.ends[rows] - starts.y)[kept], (ends.y - starts.y)[kept]


def find_triggers(bench: Bench, case: Case, foreign: Source) -> Found:
    """Attack one memory from every start, chunk by chunk, and judge with fresh seeds."""
    plan, memory = bench.plan, case.memory.id
    names, index, starts, ends, similarity = list[str](), list[int](), [], [], []
    for start, initial in starts_of(bench, case, foreign).items():
        for chunk in chunks(len(initial), plan.chunk):
            place = (memory, start, str(chunk.start))
            seeds = attack_seeds(bench, memory, start, chunk)
            starts.append(initial.take(chunk))
            ends.append(attacked(bench, cell_key("triggers", *place), case, starts[-1], seeds))
            similarity.append(similarities(bench, cell_key("judged", *place), case, ends[-1], plan.fresh_seeds()))
            names += [start] * len(chunk)
            index += list(chunk)
    similar, y = torch.cat(similarity), torch.cat([part.y for part in ends])
    return Found(
        torch.cat([part.y for part in starts]),
        y,
        tuple(names),
        tuple(index),
        similar,
        replicating(similar, y, bench.judge.descriptor.threshold),
        {"parts": [part.sha256 for part in ends]},
    )


def similarities(bench: Bench, key: str, case: Case, source: Source, seeds: list[int]) -> Tensor:
    """`Bench.similarities` as a cell, shape (n, s)."""
    return bench.tensors(
        key,
        bench.judged_inputs(case, source, seeds),
        drawing(bench.plan, len(source) * len(seeds)),
        lambda: {"similarity": bench.similarities(case, source.y, seeds)},
    )["similarity"]


def trigger_records(memory: str, found: Found) -> list[Trigger]:
    """One record an attack."""
    far, middle = moved(found.starts, found.ends), found.similarity.double().quantile(0.5, dim=1)
    return [
        Trigger(memory, name, index, round(float(similar), 6), bool(kept), known(float(distance)))
        for name, index, similar, kept, distance in zip(
            found.names, found.index, middle, found.replicates, far, strict=True
        )
    ]
