"""What a locality run will cost, by arithmetic, before anything runs: U-Net rows of every cell.

Upper bounds: every attack is taken to replicate, and NeMo's refinement to use all that it may.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dori.locality.activations import activation_rows
from dori.locality.causal import union_sizes
from dori.mitigate.nemo import Nemo
from dori.progress import duration
from dori.run import cell_key

if TYPE_CHECKING:
    from dori.locality.plan import Plan

BACKWARD = 2.2  # a row forward and backward takes so many times a forward one
ATTACKED_PER_S, FORWARD_PER_S = 55.0, 120.0  # the testbed on two CPU cores


@dataclass(frozen=True, slots=True)
class Rows:
    """U-Net rows: sent forward and backward, and forward alone."""

    attacked: int = 0
    forward: int = 0

    @property
    def weight(self) -> int:
        """In units of a forward row."""
        return round(BACKWARD * self.attacked) + self.forward

    def seconds_s(self, attacked_per_s: float, forward_per_s: float) -> float:
        """Time at given speeds."""
        return self.attacked / attacked_per_s + self.forward / forward_per_s


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the subjects make of a plan.

    Args:
        memories: ids of the analysed memories, and whether each has a prompt.
        memorized, ordinary: embeddings of the two reference sets.
        foreign: foreign starts that there are.
        calibration: prompts of NeMo's calibration.
        layers: layers that can be patched.
        twins: models that never saw the memories.
    """

    memories: tuple[tuple[str, bool], ...]
    memorized: int
    ordinary: int
    foreign: int
    calibration: int
    layers: int
    twins: int


def drawing(plan: "Plan", images: int) -> Rows:
    """Guided generations."""
    return Rows(forward=images * plan.sampling_steps * (2 if plan.guidance_scale != 1 else 1))


def attacking(plan: "Plan", attacks: int) -> Rows:
    """DoRI attacks."""
    return Rows(attacked=attacks * plan.attack.steps * plan.attack.batch)


def nemo_search(nemo: Nemo) -> int:
    """Most rows that one search may take: detection, floor, selection, refinement, final score."""
    tries = round((nemo.theta_start - nemo.theta_min) / nemo.theta_step)
    return nemo.noises * (1 + 1 + tries + nemo.max_refinement_passes + 1)


def masking(plan: "Plan", method: str, embeddings: int) -> Rows:
    """Masks of so many embeddings by "NeMo" or any Wanda setting."""
    if method == "NeMo":
        return Rows(forward=embeddings * nemo_search(plan.nemo))
    counted = max(wanda.counted_steps for wanda in plan.wandas)
    return Rows(forward=2 * counted * (embeddings + 1))  # the empty prompt is run once a cell


def chunks(count: int, size: int) -> list[range]:
    """Consecutive ranges of at most `size` of `count` items."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def planned(plan: "Plan", sizes: Sizes, methods: tuple[str, ...]) -> dict[str, Rows]:
    """Every cell with its cost."""
    cells = {"calibration": Rows(forward=sizes.calibration * plan.nemo.noises)}
    for group, count in (("memorized prompts", sizes.memorized), ("ordinary prompts", sizes.ordinary)):
        cells |= dict(_set(plan, methods, group, count))
    cells["activations.gaussian-starts"] = Rows(forward=_activations(plan, min(plan.gaussian, plan.set_size)))
    for index, (memory, has_text) in enumerate(sizes.memories):
        cells |= dict(_memory(plan, sizes, methods, memory, has_text))
        if sizes.twins and plan.patch_seeds and has_text:
            cells |= {cell_key("patching", memory, way): _patching(plan, sizes) for way in ("sufficient", "necessary")}
        if plan.causal is not None and index < plan.causal.memories:
            cells |= dict(_causal(plan, methods, memory))
    return cells


def _set(plan: "Plan", methods: tuple[str, ...], group: str, count: int) -> Iterator[tuple[str, Rows]]:
    name = group.replace(" ", "-")
    yield f"activations.{name}", Rows(forward=_activations(plan, count))
    for method in methods:
        for chunk in chunks(count, plan.chunk):
            yield cell_key("masks", name, method, str(chunk.start), "0"), masking(plan, method, len(chunk))


def _activations(plan: "Plan", count: int) -> int:
    return plan.activation_noises * activation_rows(count, plan.activation_steps)


def _memory(
    plan: "Plan", sizes: Sizes, methods: tuple[str, ...], memory: str, has_text: bool
) -> Iterator[tuple[str, Rows]]:
    attacks = {"prompt": int(has_text), "gaussian": plan.gaussian, "foreign": sizes.foreign}
    for start, count in attacks.items():
        for chunk in chunks(count, plan.chunk):
            yield cell_key("triggers", memory, start, str(chunk.start)), attacking(plan, len(chunk))
            yield cell_key("judged", memory, start, str(chunk.start)), drawing(plan, plan.seeds * len(chunk))
    total = sum(attacks.values())
    lines = 2 * plan.line_pairs * len(plan.line_shares)
    balls = plan.ball_centres * plan.ball_directions * len(plan.ball_radii)
    yield cell_key("probes", memory, "lines"), drawing(plan, plan.probe_seeds * lines)
    yield cell_key("probes", memory, "balls"), drawing(plan, plan.probe_seeds * balls)
    kept = min(total, plan.set_size)
    yield (
        cell_key("activations", memory),
        Rows(forward=_activations(plan, kept) + activation_rows(other_noises(plan), plan.activation_steps)),
    )
    for method in methods:
        for chunk in chunks(kept, plan.chunk):
            yield cell_key("masks", memory, method, str(chunk.start), "0"), masking(plan, method, len(chunk))
        for seed in range(1, plan.ceiling_seeds):
            yield cell_key("masks", memory, method, "ceiling", str(seed)), masking(plan, method, plan.ceiling)


def other_noises(plan: "Plan") -> int:
    """Noises of the group "other noises"."""
    return max(4, plan.activation_noises)


def _patching(plan: "Plan", sizes: Sizes) -> Rows:
    runs = sizes.layers + 3 + 2  # kinds of layers; the target without a patch, and the source
    return drawing(plan, plan.patch_seeds * runs)


def _causal(plan: "Plan", methods: tuple[str, ...], memory: str) -> Iterator[tuple[str, Rows]]:
    causal = plan.causal
    assert causal is not None  # asked only then
    for method in causal_methods(methods):
        for row in range(causal.triggers):
            attacks = causal.triggers + causal.fresh
            yield (
                cell_key("causal", memory, method, str(row)),
                Rows(
                    attacking(plan, attacks).attacked,
                    drawing(plan, plan.probe_seeds * (attacks + causal.triggers)).forward,
                ),
            )
        for size in (0, *union_sizes(causal.triggers)):
            yield (
                cell_key("joined", memory, method, str(size)),
                Rows(
                    attacking(plan, causal.joined_fresh).attacked,
                    drawing(plan, plan.probe_seeds * causal.joined_fresh).forward,
                ),
            )
            edit = f"{memory} {method} x {size}" if size else "none"
            yield cell_key("quality", edit), drawing(plan, causal.quality_prompts)


def causal_methods(methods: tuple[str, ...]) -> tuple[str, ...]:
    """The methods of the causal test: NeMo, and the last (largest) Wanda setting."""
    return tuple(dict.fromkeys((methods[0], methods[-1])))


def by_stage(cells: dict[str, Rows]) -> dict[str, Rows]:
    """Costs summed over the first part of the keys."""
    found: dict[str, Rows] = {}
    for key, rows in cells.items():
        stage = key.split(".")[0]
        before = found.get(stage, Rows())
        found[stage] = Rows(before.attacked + rows.attacked, before.forward + rows.forward)
    return found


def forecast(cells: dict[str, Rows]) -> str:
    """The planned rows of every stage as lines of text, with the time that they take on two CPU cores."""
    stages = by_stage(cells)
    every = list(stages.values())
    stages["total"] = Rows(sum(rows.attacked for rows in every), sum(rows.forward for rows in every))
    lines = [
        f"{name:<12} {rows.attacked:>10,} {rows.forward:>10,}  "
        f"{duration(rows.seconds_s(ATTACKED_PER_S, FORWARD_PER_S))}"
        for name, rows in stages.items()
    ]
    return "\n".join(
        (f"{'U-Net rows':<12} {'attacked':>10} {'forward':>10}  at most, on two CPU cores on the testbed", *lines)
    )
