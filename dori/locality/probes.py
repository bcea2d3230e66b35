"""How large is the region that replicates: along straight lines between triggers, and in balls around them.

Lines to ordinary prompts stand beside lines between triggers: success near the trigger's end alone is what any
neighbourhood gives. Radii are in units of the median distance between ordinary prompts.
"""

import torch
from torch import Tensor

from dori.audit.judge import Case
from dori.locality.bench import Bench, Source
from dori.locality.embeddings import line, pair_distances, sphere
from dori.locality.records import Probe
from dori.locality.triggers import Found, similarities
from dori.run import cell_key
from dori.sampling import named_seed
from dori.stats import choose

BETWEEN, OUTWARD, BALL = "line between triggers", "line to an ordinary prompt", "ball"


def line_pairs(count: int, limit: int) -> list[tuple[int, int]]:
    """At most `limit` pairs of `count` items, evenly spread over all pairs."""
    pairs = [(a, b) for b in range(count) for a in range(b)]
    return [pairs[index] for index in choose(len(pairs), limit)]


def probe_lines(bench: Bench, case: Case, found: Found, ordinary: Source) -> list[Probe]:
    """Success at points of lines between pairs of triggers, and of as many from triggers to ordinary prompts."""
    plan, rows, memory = bench.plan, found.rows(), case.memory.id
    pairs = [(found.ends[rows[a]], found.ends[rows[b]]) for a, b in line_pairs(len(rows), plan.line_pairs)]
    outward = [(first, ordinary.y[index % len(ordinary)]) for index, (first, _) in enumerate(pairs)]
    points = [line(first, second, plan.line_shares) for first, second in (*pairs, *outward)]
    key = cell_key("probes", memory, "lines")
    if not points:
        return []
    source = Source(
        torch.cat(points),
        {
            "triggers": found.take(rows).sha256,
            "ordinary": ordinary.sha256,
            "pairs": plan.line_pairs,
            "shares": plan.line_shares,
        },
    )
    success = _succeed(bench, key, case, source).view(2, len(pairs), len(plan.line_shares))
    return [
        Probe(memory, kind, share, int(success[group, :, column].sum()), len(pairs))
        for group, kind in enumerate((BETWEEN, OUTWARD))
        for column, share in enumerate(plan.line_shares)
    ]


def probe_balls(bench: Bench, case: Case, found: Found, ordinary: Source) -> list[Probe]:
    """Success at random points on spheres around triggers; radii in median distances between ordinary prompts."""
    plan, memory, rows = bench.plan, case.memory.id, found.spread(bench.plan.ball_centres)
    key = cell_key("probes", memory, "balls")
    if not rows:
        return []
    unit = float(pair_distances(ordinary.y).median())
    points = [
        sphere(
            found.ends[row],
            radius * unit,
            count=plan.ball_directions,
            seed=named_seed("locality ball", plan.seed, memory, row, column),
        )
        for row in rows
        for column, radius in enumerate(plan.ball_radii)
    ]
    source = Source(
        torch.cat(points),
        {
            "triggers": found.take(rows).sha256,
            "ordinary": ordinary.sha256,
            "radii": plan.ball_radii,
            "directions": plan.ball_directions,
        },
    )
    success = _succeed(bench, key, case, source).view(len(rows), len(plan.ball_radii), -1)
    return [
        Probe(memory, BALL, radius, int(success[:, column].sum()), success[:, column].numel())
        for column, radius in enumerate(plan.ball_radii)
    ]


def _succeed(bench: Bench, key: str, case: Case, source: Source) -> Tensor:
    return bench.replicates(similarities(bench, key, case, source, bench.plan.fresh_seeds(bench.plan.probe_seeds)))
