"""The records of a locality run, and their JSON: `locality.json`, schema 1, described in docs/locality.md.

Every measured figure is one record of a flat list, named by memory, layer and group, so that a notebook can load a list
as a table (`pandas.DataFrame(data["overlaps"])`). A memory of "" means that the figure belongs to no single memory (the
reference sets of prompts). Numbers that could not be measured are null. Groups of embeddings:

    triggers; triggers, gaussian; triggers, foreign     of one memory, from the named starts; only what replicates
    triggers of other images                            pairs of a trigger of this memory and one of the memory beside
                                                        it (before it; of the first: the last); both from starts at
                                                        which both have triggers, different ones: only the image differs
    triggers, same starts                               pairs of one memory's triggers from those same starts, the mean
                                                        over both memories
    triggers, other noises                              as the last, each mask of a pair under noises of its own, as the
    triggers of other images, other noises              ceiling's are; likewise across the two memories
    gaussian starts                                     the starts themselves, before any attack
    other noises                                        one trigger under different noises (floor of D, ceiling of A)
    other noises, same starts                           the like of the triggers of the three groups before
    memorized prompts; ordinary prompts                 as many different prompts: of memories, whose images they bring
                                                        back, and of no memory
    random; random, simulated                           random masks of the triggers' mask sizes
    memorized prompts, random; ordinary prompts, random     simulated ones of those prompts' mask sizes
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dori.record_file import read_record, record_json

SCHEMA = 1
FILE = "locality.json"
ENOUGH = 5  # memories, from which on intervals and relations to the dose are given
TRIGGERS, OTHER_NOISES, MEMORIZED, ORDINARY = "triggers", "other noises", "memorized prompts", "ordinary prompts"
STARTS, RANDOM, SIMULATED = "gaussian starts", "random", "random, simulated"
OTHER_IMAGES, SAME_STARTS = "triggers of other images", "triggers, same starts"
APART, OTHERS_APART = "triggers, other noises", "triggers of other images, other noises"
SAME_APART = "other noises, same starts"
NO_MASK, OTHER_MASKS, PLANTED = "none", "other image", "planted change"
ON_TWIN = "attacks that replicate on a twin"
AGAIN = "common share of a move and itself, attacked again"
PROMPTED = "memories' prompts that bring their image back"  # of these alone are the memorized prompts
WHOLE = "all"  # the layer of a whole mask


@dataclass(frozen=True, slots=True)
class Analysed:
    """One analysed memory: kind, duplication count and prompt where known, training image, attacks and successes."""

    id: str
    kind: str
    dose: float | None
    text: str | None
    picture: str
    attacks: int
    triggers: int


@dataclass(frozen=True, slots=True)
class Trigger:
    """One attack: its start, the median similarity over fresh seeds, whether that replicates, and how far it moved.

    `moved` is null where the attack diverged; it found nothing then.
    """

    memory: str
    start: str
    index: int
    similarity: float
    replicates: bool
    moved: float | None


@dataclass(frozen=True, slots=True)
class Place:
    """One embedding on a memory's two maps; `role` is start, trigger, attacked (no replication) or a prompt group."""

    memory: str
    role: str
    start: str
    index: int
    pca: tuple[float, float]
    tsne: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of the embedding space, such as "between triggers, gaussian"; `n` is what it was averaged over."""

    memory: str
    name: str
    value: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Probe:
    """How many of n probed embeddings replicate; `at` is the share of a line or the radius of a ball (see `kind`)."""

    memory: str
    kind: str
    at: float
    successes: int
    n: int


@dataclass(frozen=True, slots=True)
class Activity:
    """D_l of one group of embeddings (of other images: of so many pairs) at one step of the trajectory."""

    memory: str
    site: str
    layer: str
    step: int
    group: str
    value: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Overlap:
    """A_l of one group of masks: with the published rule for empty masks, without such pairs, and their share."""

    memory: str
    method: str
    layer: str
    group: str
    published: float | None
    without_empty: float | None
    empty_share: float | None
    size: float | None
    pairs: int


@dataclass(frozen=True, slots=True)
class Search:
    """How NeMo's searches of one group went: set sizes (neurons) and the shares flagged, localized, converged."""

    memory: str
    group: str
    searches: int
    median_size: float
    largest_size: int
    flagged: float
    localized: float
    suppressed: float
    converged: float


@dataclass(frozen=True, slots=True)
class Cover:
    """How much of a layer's planted change masks hold; `masks` is "one" (mean over triggers' masks) or "union".

    `share` is that of the excess (planted - twin beyond twin - twin; of planted - twin where there is one twin),
    `random` what random masks as large in every layer hold of it in expectation, `twins` the share of twin - twin.
    """

    memory: str
    method: str
    layer: str
    masks: str
    density: float
    share: float | None
    random: float | None
    twins: float | None


@dataclass(frozen=True, slots=True)
class Change:
    """How much planting changed one group of weights; `floor` is twin against twin, null with a single twin.

    `level` is "kind" (kind and place of parts, such as "self-attention, up") or "layer" (one module).
    """

    level: str
    group: str
    change: float
    floor: float | None
    weights: int


@dataclass(frozen=True, slots=True)
class Patch:
    """Similarity to the memory when `layers` put out the other model's activations; `share` of the models' gap.

    A transplant is the like, `layers` being a kind of weights that have the other model's values. `alike` is the
    median similarity, seed by seed, to what the model that they came from draws itself: images that lose a memory
    without coming closer to those are neither model's. `kept` is the same to what the model itself draws unchanged.
    Between twins, which hold no memory, that is the reference, and there is no share. Null in older records.
    """

    memory: str
    direction: str
    layers: str
    similarity: float
    share: float | None
    alike: float | None = None
    kept: float | None = None


@dataclass(frozen=True, slots=True)
class Cross:
    """Similarities under masks (rows): `replay` of trigger j, `again` attacked from j, `fresh` from its own starts.

    `masks` is "triggers" (row i: the mask of trigger i), "random" (random masks as large in every layer as some of
    those), "other image" (masks of another memory's triggers) or "none" (one row without a mask, which no method has
    made: `method` is ""; its `fresh` holds the starts of all rows, one row's after another's).
    """

    memory: str
    method: str
    masks: str
    starts: tuple[str, ...]
    sizes: tuple[int, ...]
    replay: tuple[tuple[float, ...], ...]
    again: tuple[tuple[float, ...], ...]
    fresh: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Joined:
    """So many triggers' masks joined, in random order: fresh attacks that succeed.

    `masks` as in `Cross`: "random" is a random mask as large in every layer as the union of `joined` masks.
    """

    memory: str
    method: str
    masks: str
    joined: int
    density: float
    successes: int
    n: int


@dataclass(frozen=True, slots=True)
class Undone:
    """What attacks find when a share of all weights has a twin's values: `chosen` "most changed" or "at random".

    `weights` of them differ at all, and hold the share `held` of the squared difference from the twin. Of `triggers`
    `replayed` still draw the image as they are, and of `n` fresh attacks (those that joined masks meet) `successes` do.
    `similarity` is the median over these attacks of their median similarity. What it costs on ordinary prompts is told
    as of a `Price`, and is the same in every memory's record. The last fields are null in older records.
    """

    memory: str
    chosen: str
    share: float
    weights: int
    held: float
    replayed: int
    triggers: int
    successes: int
    n: int
    similarity: float | None = None
    frechet: float | None = None
    kernel: float | None = None
    alignment: float | None = None
    to_unedited: float | None = None
    kernel_std: float | None = None
    to_unedited_low: float | None = None
    to_unedited_high: float | None = None


@dataclass(frozen=True, slots=True)
class Price:
    """What a mask costs on ordinary prompts: `joined` masks, or of one alone the `row` of its `Cross`.

    Distances to held-out ordinary images if `held_out`, else to the unedited model's images under other seeds.
    `to_unedited`: median similarity to the unedited model's images under the same seeds, with its 95 % bootstrap
    interval over prompts; `kernel_std`: the spread of the kernel distance over random halves of the images. Both are
    null in older records.
    """

    memory: str
    method: str
    masks: str
    joined: int
    row: int | None
    prompts: int
    held_out: bool
    frechet: float | None
    kernel: float | None
    alignment: float | None
    to_unedited: float | None
    kernel_std: float | None = None
    to_unedited_low: float | None = None
    to_unedited_high: float | None = None


LISTS: Mapping[str, type] = {
    "subjects": Analysed,
    "triggers": Trigger,
    "places": Place,
    "measures": Measure,
    "probes": Probe,
    "activities": Activity,
    "overlaps": Overlap,
    "searches": Search,
    "covers": Cover,
    "changes": Change,
    "patches": Patch,
    "transplants": Patch,
    "crosses": Cross,
    "joined": Joined,
    "prices": Price,
    "undone": Undone,
}


@dataclass(frozen=True, slots=True)
class Locality:
    """A locality run.

    Args:
        model: name of the analysed model.
        twins: names of the models that never saw the memories; they judge.
        descriptor: name, preprocessing, threshold and calibration of the similarity.
        settings: the plan, layers by site, prompts by use, and how each memory's maps were drawn.
        provenance: versions, machine, times.
        cost: stage to U-Net rows.
        planned: memories that the plan wants; `subjects` holds those that are done.
    """

    model: str
    twins: tuple[str, ...]
    descriptor: Mapping[str, Any]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    cost: Mapping[str, int]
    planned: int
    subjects: tuple[Analysed, ...] = ()
    triggers: tuple[Trigger, ...] = ()
    places: tuple[Place, ...] = ()
    measures: tuple[Measure, ...] = ()
    probes: tuple[Probe, ...] = ()
    activities: tuple[Activity, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    searches: tuple[Search, ...] = ()
    covers: tuple[Cover, ...] = ()
    changes: tuple[Change, ...] = ()
    patches: tuple[Patch, ...] = ()
    transplants: tuple[Patch, ...] = ()
    crosses: tuple[Cross, ...] = ()
    joined: tuple[Joined, ...] = ()
    prices: tuple[Price, ...] = ()
    undone: tuple[Undone, ...] = ()
    schema: int = field(default=SCHEMA)

    @property
    def threshold(self) -> float:
        """Similarity above which an image counts as a copy."""
        return float(self.descriptor["threshold"])

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no NaN."""
        return record_json(self)


def known(value: float) -> float | None:
    """A number as records hold it: six decimals, None where it could not be measured."""
    return round(value, 6) if math.isfinite(value) else None


def read_locality(path: Path) -> Locality:
    """Read `locality.json`.

    Raises:
        DoriError: no such file, no locality run, or another schema version.
    """
    return read_record(path, Locality, schema=SCHEMA, what="locality run")
