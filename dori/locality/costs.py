"""What a locality run will cost, by arithmetic, before anything runs: U-Net rows of every cell.

Upper bounds: every prompt and attack is taken to replicate, and NeMo's refinement to use all that it may.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dori.audit.quality import quality_cells, quality_key
from dori.cost import Rows, Speed, drawn, forecast
from dori.locality.activations import activation_rows
from dori.locality.causal import union_sizes
from dori.locality.patching import NECESSARY, SUFFICIENT
from dori.locality.records import NO_MASK, OTHER_MASKS, PLANTED, RANDOM, TRIGGERS
from dori.locality.transplants import CONTROL
from dori.locality.undone import AT_RANDOM, MOST_CHANGED
from dori.mitigate.nemo import Nemo
from dori.run import cell_key

QUALITY = "price"  # on ordinary prompts; an audit in the same folder has quality cells of its own
if TYPE_CHECKING:
    from dori.locality.plan import Causal, Plan


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the subjects make of a plan.

    Args:
        memories: ids of the analysed memories, and whether each has a prompt.
        prompted: ids of the memories that the memorized prompts should bring back.
        memorized, ordinary: embeddings of the two reference sets, as many as there may be.
        foreign: foreign starts that there are.
        calibration: prompts of NeMo's calibration.
        patch_sets: sets of layers that are patched together.
        weight_sets: sets of weights that change places together.
        twins: models that never saw the memories.
        quality: prompts that tell what masks cost.
        held_out: whether there are ordinary images to compare with; otherwise the model's own serve.
    """

    memories: tuple[tuple[str, bool], ...]
    prompted: tuple[str, ...]
    memorized: int
    ordinary: int
    foreign: int
    calibration: int
    patch_sets: int
    weight_sets: int
    twins: int
    quality: int
    held_out: bool


def drawing(plan: "Plan", images: int) -> Rows:
    """Guided generations."""
    return drawn(images, sampling_steps=plan.sampling_steps, guidance_scale=plan.guidance_scale)


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


def planned(plan: "Plan", sizes: Sizes, methods: tuple[str, ...]) -> dict[str, dict[str, Rows]]:
    """Every cell with its cost, by memory; "" holds what belongs to none."""
    shared = {cell_key("memorized", memory): drawing(plan, plan.seeds) for memory in sizes.prompted}
    shared |= {"calibration": Rows(forward=sizes.calibration * plan.nemo.noises)}
    for group, count in (
        ("memorized prompts", min(sizes.memorized, plan.set_size)),
        ("ordinary prompts", sizes.ordinary),
    ):
        shared |= dict(_set(plan, methods, group, count))
    shared["activations.gaussian-starts"] = Rows(forward=_activations(plan, min(plan.gaussian, plan.set_size)))
    if plan.causal is not None and sizes.quality > 1:
        whole = quality_cells(["none"], sizes.quality, held_out=sizes.held_out, stage=QUALITY)
        shared |= {key: drawing(plan, images) for key, images in whole.items()}
    cells = {"": shared}
    for index, (memory, has_text) in enumerate(sizes.memories):
        cells[memory] = dict(_memory(plan, sizes, methods, memory, has_text))
        if index or len(sizes.memories) > 2:  # beside the memory before, the first beside the last
            across = _activations(plan, 2 * min(_attacks(plan, sizes, has_text), max(1, plan.set_size // 2)))
            own = cells[memory if index else ""]
            own[cell_key("activations", memory, "across")] = Rows(forward=across)
        if sizes.twins and plan.twin_attacks:
            cells[memory] |= dict(_twin(plan, memory))
        if sizes.twins and plan.patch_seeds and has_text:
            cells[memory] |= dict(_carried(plan, sizes, memory))
        if plan.causal is not None and index < plan.causal.memories:
            cells[memory] |= dict(_causal(plan, sizes, methods, memory, has_text))
    return cells


def _set(plan: "Plan", methods: tuple[str, ...], group: str, count: int) -> Iterator[tuple[str, Rows]]:
    name = group.replace(" ", "-")
    yield f"activations.{name}", Rows(forward=_activations(plan, count))
    for method in methods:
        for chunk in chunks(count, plan.chunk):
            yield cell_key("masks", name, method, str(chunk.start), "0"), masking(plan, method, len(chunk))


def _attacks(plan: "Plan", sizes: Sizes, has_text: bool) -> int:
    return int(has_text) + plan.gaussian + sizes.foreign


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
    if again := min(plan.repeats, plan.gaussian):
        yield cell_key("triggers", memory, "again"), attacking(plan, again)
        yield cell_key("judged", memory, "again"), drawing(plan, plan.seeds * again)
    total = _attacks(plan, sizes, has_text)
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


def _carried(plan: "Plan", sizes: Sizes, memory: str) -> Iterator[tuple[str, Rows]]:
    """Patching and transplants."""
    for stage, sets in (("patching", sizes.patch_sets), ("transplants", sizes.weight_sets)):
        control = (CONTROL,) if stage == "transplants" and sizes.twins > 1 else ()
        for way in (SUFFICIENT, NECESSARY, *control):
            # The target as it is, and the source, stand beside the sets.
            yield cell_key(stage, memory, way), drawing(plan, plan.patch_seeds * (sets + 2))


def _twin(plan: "Plan", memory: str) -> Iterator[tuple[str, Rows]]:
    attacks = min(plan.twin_attacks, plan.gaussian)
    yield cell_key("twin", memory, "triggers"), attacking(plan, attacks)
    yield cell_key("twin", memory, "judged"), drawing(plan, plan.seeds * attacks)


def crossing(plan: "Plan", causal: "Causal", triggers: int, fresh: int, *, again: bool = True) -> Rows:
    """One edit: triggers as they are and, if `again`, attacked again, and fresh attacks."""
    repeated = triggers if again else 0
    return attacking(plan, repeated + fresh) + drawing(plan, causal.seeds * (triggers + repeated + fresh))


def price_name(memory: str, method: str, masks: str, index: int, *, joined: bool) -> str:
    """An edit as its price's cell names it."""
    return f"{memory} {method} {masks} {'joined' if joined else 'single'} {index}"


def _causal(
    plan: "Plan", sizes: Sizes, methods: tuple[str, ...], memory: str, has_text: bool
) -> Iterator[tuple[str, Rows]]:
    causal = plan.causal
    assert causal is not None  # asked only then
    others = causal.other if len(sizes.memories) > 1 else 0
    single, united = (
        crossing(plan, causal, triggers, fresh)
        for triggers, fresh in ((causal.triggers, causal.fresh), (0, causal.joined_fresh))
    )
    analysed = min(plan.set_size, _attacks(plan, sizes, has_text))
    planted = [PLANTED] if sizes.twins else []
    yield cell_key("causal", memory, "", NO_MASK, "0"), crossing(plan, causal, causal.triggers, causal.fresh_starts)
    yield cell_key("joined", memory, "", NO_MASK, "0"), united
    for chosen, share in taken_back_parts(causal) if planted else ():
        yield (
            cell_key("undone", memory, chosen, f"{share:g}"),
            crossing(plan, causal, causal.triggers, causal.joined_fresh, again=False),
        )
        if memory == sizes.memories[0][0]:  # the same for every memory
            yield from _price(plan, sizes, taken_back_name(chosen, share))
    for method in causal_methods(methods):
        for masks, count in ((TRIGGERS, causal.triggers), (RANDOM, causal.random), (OTHER_MASKS, others)):
            for row in range(count):
                yield cell_key("causal", memory, method, masks, str(row)), single
            for index in range(min(count, causal.priced)):
                yield from _price(plan, sizes, price_name(memory, method, masks, index, joined=False))
        if planted:
            yield (
                cell_key("causal", memory, method, PLANTED, "0"),
                crossing(plan, causal, causal.triggers, causal.planted_fresh),
            )
            if causal.priced:
                yield from _price(plan, sizes, price_name(memory, method, PLANTED, 0, joined=False))
        for masks in (TRIGGERS, *([RANDOM] if causal.random else []), *planted):
            for index in range(len(union_sizes(analysed))):
                yield cell_key("joined", memory, method, masks, str(index)), united
                yield from _price(plan, sizes, price_name(memory, method, masks, index, joined=True))


def _price(plan: "Plan", sizes: Sizes, name: str) -> Iterator[tuple[str, Rows]]:
    """What one edit costs on ordinary prompts, where there are two."""
    if sizes.quality > 1:
        yield quality_key(QUALITY, name), drawing(plan, sizes.quality)


def taken_back_name(chosen: str, share: float) -> str:
    """An edit that takes weights back as its price's cell names it."""
    return f"{chosen} {share:g} taken back"


def taken_back_parts(causal: "Causal") -> list[tuple[str, float]]:
    """What is taken back, and how much of it; all weights are no choice, so not twice."""
    random = [share for share in causal.taken_back if share < 1]
    return [(MOST_CHANGED, share) for share in causal.taken_back] + [(AT_RANDOM, share) for share in random]


def causal_methods(methods: tuple[str, ...]) -> tuple[str, ...]:
    """The methods of the causal test: the last (largest) Wanda setting, whose masks always exist, and NeMo."""
    return tuple(dict.fromkeys((*methods[-1:], *methods[:1])))


def by_stage(cells: Mapping[str, Rows]) -> dict[str, Rows]:
    """Costs summed over the first part of the keys."""
    found: dict[str, Rows] = {}
    for key, rows in cells.items():
        stage = key.split(".")[0]
        found[stage] = found.get(stage, Rows()) + rows
    return found


def stage_table(cells: Mapping[str, Rows], speed: Speed | None) -> str:
    """The planned rows of every stage as lines of text, and their sum with the time that it takes."""
    stages = by_stage(cells)
    lines = [f"{'U-Net rows':<12} {'attacked':>10} {'forward':>10}"]
    lines += [f"{name:<12} {rows.attacked:>10,} {rows.forward:>10,}" for name, rows in stages.items()]
    return "\n".join([*lines, forecast(sum(stages.values(), Rows()), speed)])
