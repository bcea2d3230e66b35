"""Made-up records of a locality run: every kind of record, a stranger's names, and figures that a hand can check."""

from dori.locality.records import (
    APART,
    MEMORIZED,
    NO_MASK,
    ON_TWIN,
    ORDINARY,
    OTHER_IMAGES,
    OTHER_MASKS,
    OTHER_NOISES,
    OTHERS_APART,
    PLANTED,
    RANDOM,
    SAME_STARTS,
    SIMULATED,
    STARTS,
    TRIGGERS,
    WHOLE,
    Activity,
    Analysed,
    Change,
    Cover,
    Cross,
    Joined,
    Locality,
    Measure,
    Overlap,
    Patch,
    Place,
    Price,
    Probe,
    Search,
    Trigger,
    Undone,
)
from dori.locality.undone import AT_RANDOM, MOST_CHANGED

EVIL = "<script>alert(1)</script>"
VALUES = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
]
FEED = [layer.replace("attn2.to_v", "ff.net.2") for layer in VALUES]
LEVELS = {
    TRIGGERS: 0.41,
    APART: 0.41,
    OTHER_NOISES: 0.83,
    OTHER_IMAGES: 0.24,
    OTHERS_APART: 0.24,
    MEMORIZED: 0.22,
    ORDINARY: 0.2,
    SIMULATED: 0.05,
    f"{MEMORIZED}, {RANDOM}": 0.02,
}
SHARED = (MEMORIZED, ORDINARY, STARTS, f"{MEMORIZED}, {RANDOM}")
MASKS = 6  # of the causal test


def overlaps(memory: str, levels: dict[str, float], *, empty: float = 0.0) -> list[Overlap]:
    """Whole masks and one layer, every group at its level."""
    layer = f"{FEED[0]}.weight"
    whole = [
        Overlap("" if group in SHARED else memory, "Wanda", where, group, level, level, empty, 9.0, 3)
        for where in (layer, WHOLE)
        for group, level in levels.items()
    ]
    return [*whole, Overlap(memory, "Wanda", layer, RANDOM, levels[SIMULATED], levels[SIMULATED], None, 9.0, 3)]


def cross(masks: str, *, own: float, others: float, fresh: float, memory: str = "m0") -> Cross:
    """A matrix whose cells of one kind are alike."""
    rows = {TRIGGERS: MASKS, RANDOM: 8, OTHER_MASKS: 8, PLANTED: 1, NO_MASK: 1}[masks]
    again = tuple(tuple(own if masks == TRIGGERS and i == j else others for j in range(MASKS)) for i in range(rows))
    starts = ("prompt", *("gaussian", "foreign") * MASKS)[:MASKS]
    method, sizes = ("", (0,)) if masks == NO_MASK else ("Wanda", (5,) * rows)
    new = ((fresh,) * 40,) if masks == NO_MASK else ((fresh,) * 2,) * rows  # every mask has starts of its own
    return Cross(memory, method, masks, starts, sizes, again, again, new)


def price(masks: str, joined: int, *, row: int | None = None, kernel: float = 0.6) -> Price:
    """What a mask of the first memory costs."""
    method = "" if masks == NO_MASK else "Wanda"
    return Price("m0", method, masks, joined, row, 64, True, 60.0, kernel, 0.5, None if masks == NO_MASK else 0.8)


def probes(memory: str) -> list[Probe]:
    """Of 24 points half way between triggers 20 replicate, of those to ordinary prompts 4, and half of a ball's."""
    lines = {"line between triggers": 20, "line to an ordinary prompt": 4}
    return [
        *(Probe(memory, kind, at, wins, 24) for kind, wins in lines.items() for at in (0.25, 0.5, 0.75)),
        *(Probe(memory, "ball", at, wins, 24) for at, wins in ((0.1, 24), (0.5, 12), (1.0, 2))),
    ]


def records(memories: int = 2, levels: dict[str, float] | None = None, *, empty: float = 0.0) -> Locality:
    """Records of every kind; memory k has dose k + 1."""
    ids = [f"m{k}" for k in range(memories)]
    names = [
        "between triggers",
        "between their starts",
        "moved",
        "nearest start is the own",
        "common share of the moves",
        "between triggers, gaussian",
    ]
    return Locality(
        model=EVIL,
        twins=("twin",),
        descriptor={"name": "d", "threshold": 0.5},
        provenance={"versions": {}},
        settings={
            "preset": "full",
            "causal": {"memories": 1},
            "patch_seeds": 2,
            "maps": {one: {"explained": [0.5, 0.25], "perplexity": 3.3, "seed": 7} for one in ids},
            "embedding_shape": [4, 8],
            "layers": {"attention_value": VALUES, "feed_forward": FEED},
            "calibration_prompts": 48,
            "prompts": {"NeMo's statistics": 48},
        },
        cost={"triggers, forward": 10},
        planned=memories + 1,
        subjects=tuple(
            Analysed(one, "verbatim", float(k + 1), EVIL, f"pictures/{one}.png", 4, 3) for k, one in enumerate(ids)
        ),
        triggers=tuple(Trigger(one, "gaussian", k, 0.7, k < 3, 2.0) for one in ids for k in range(4)),
        places=tuple(
            Place(one, role, "gaussian", k, (k, 1.0 + len(role)), (0.5, k))
            for one in ids
            for k in range(2)
            for role in ("start", "trigger", MEMORIZED, ORDINARY)
        ),
        measures=(
            *(Measure(one, name, 0.05 * (k + 1), 3) for k, one in enumerate(ids) for name in names),
            *(Measure(one, "shared with moves to other images", 0.02, 3) for one in ids[1:]),
            *(Measure(one, "common share, same starts", 0.05 * (k + 1), 3) for k, one in enumerate(ids) if k),
            *(Measure(one, "the same, moves exchanged", 0.04, 3) for one in ids),
            *(Measure(one, ON_TWIN, 0.0, 5) for one in ids),
            Measure("", "between ordinary prompts", 9.0, 3),
            Measure("", "between memorized prompts", 8.0, 3),
        ),
        probes=tuple(probe for one in ids for probe in probes(one)),
        activities=tuple(
            Activity("" if group in SHARED else one, site, layer, step, group, value, 3)
            for site, layers in (("attention_value", VALUES), ("feed_forward", FEED))
            for layer in layers
            for step in (0, 5)
            for one in ids
            for group, value in (
                (TRIGGERS, 6.0),
                (MEMORIZED, 10.0),
                (ORDINARY, 5.0),
                (STARTS, 8.0),
                (OTHER_NOISES, 1.0),
                (OTHER_IMAGES, 8.0),
                (SAME_STARTS, 4.0),
            )
        ),
        overlaps=tuple(dict.fromkeys(row for one in ids for row in overlaps(one, levels or LEVELS, empty=empty))),
        searches=(Search("m0", TRIGGERS, 3, 7.0, 9, 1.0, 0.5, 0.5, 0.25),),
        covers=tuple(
            Cover(one, "Wanda", layer, kind, 0.1, 0.3, 0.12, 0.1)
            for one in ids
            for layer in (f"{FEED[0]}.weight", WHOLE)
            for kind in ("one", "union")
        ),
        changes=(
            Change("kind", "cross-attention values, down", 3.0, 1.0, 10),
            Change("kind", "self-attention, up", 1.0, 1.0, 10),
            Change("layer", VALUES[0], 3.0, 1.0, 10),
        ),
        patches=tuple(
            Patch("m0", way, name, 0.6, share, 0.3)
            for way in ("sufficient", "necessary")
            for name, share in (("none", 0.0), ("source", 1.0), (VALUES[0], 0.4), (FEED[1], 0.2), ("all values", 0.8))
        ),
        crosses=(
            cross(NO_MASK, own=0.9, others=0.9, fresh=0.8),
            cross(TRIGGERS, own=0.2, others=0.7, fresh=0.6),
            cross(RANDOM, own=0.8, others=0.8, fresh=0.8),
        ),
        joined=(
            Joined("m0", "", NO_MASK, 0, 0.0, 8, 8),
            *(Joined("m0", "Wanda", TRIGGERS, k, 0.1 * k, 4 - 2 * k, 8) for k in (1, 2)),
            *(Joined("m0", "Wanda", RANDOM, k, 0.1 * k, 8, 8) for k in (1, 2)),
        ),
        undone=(
            Undone("m0", MOST_CHANGED, 0.01, 50, 0.4, 5, 6, 3, 8),
            Undone("m0", MOST_CHANGED, 0.1, 500, 0.7, 0, 6, 0, 8, 0.1, 41.0, 0.5, 0.6, 0.3),
            Undone("m0", MOST_CHANGED, 1.0, 5000, 1.0, 0, 6, 0, 8, 0.1, 42.0, 0.6, 0.6, 0.2),
            Undone("m0", AT_RANDOM, 0.01, 50, 0.01, 6, 6, 8, 8),
            Undone("m0", AT_RANDOM, 0.1, 500, 0.1, 6, 6, 0, 8),
        ),
        prices=(
            price(NO_MASK, 0, row=0),
            *(price(TRIGGERS, 1, row=row, kernel=0.7) for row in (0, 2, 5)),
            *(price(RANDOM, 1, row=row, kernel=0.65) for row in (0, 2, 5)),
            *(price(TRIGGERS, k, kernel=0.6 + 0.4 * k) for k in (1, 2)),
            *(price(RANDOM, k, kernel=0.6 + 0.1 * k) for k in (1, 2)),
        ),
    )
