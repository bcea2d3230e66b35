"""What the paper's three analyses say: embedding space, activations, weights. Rules: `dori.locality.page.verdict`."""

import math

from dori.locality.embeddings import gaussian_distance
from dori.locality.page.layer_ids import layer_id
from dori.locality.page.summary import (
    ALONE,
    EMPTY,
    HALF_EMPTY,
    REFERENCES,
    SITES,
    Said,
    activity_ratio,
    banded,
    empty_share,
    ends,
    layers,
    measure,
    methods,
    over_memories,
    overlap,
    own_share,
    said,
    way,
)
from dori.locality.probes import BALL, BETWEEN, OUTWARD
from dori.locality.records import (
    AGAIN,
    APART,
    ENOUGH,
    MEMORIZED,
    ORDINARY,
    OTHER_IMAGES,
    OTHER_NOISES,
    OTHERS_APART,
    RANDOM,
    SAME_APART,
    SAME_STARTS,
    SIMULATED,
    STARTS,
    TRIGGERS,
    WHOLE,
    Locality,
    Search,
)
from dori.locality.triggers import ORDER
from dori.stats import Estimate, wilson

NONE_REPLICATE = Said("Too few triggers", ("No memory has two triggers, so nothing is compared.",))
COMMON, NEAR, PLACE = (0.1, 0.5), (0.9, 1.1), (0.1, 0.9)  # the cuts of the rules
CONVERGED = 0.5  # share of the searches; below, a verdict says that they were cut short
NAMES = {"gaussian": "from N(0, I)", "foreign": "from other prompts"}
UNFINISHED = "of sets that are not fully refined, since most searches met their cap"
MORE = 0.05  # of IoU, by which a layer is named
SAME = 0.01  # of IoU; two agreements that differ by less are called the same
ALL_APART = (APART, OTHERS_APART, SAME_APART)
LEVELS = {OTHERS_APART: "triggers of different images", SIMULATED: "random masks of equal size"}


def scope(memories: int) -> str:
    """In how many memories a verdict was reached, where they are too few for an interval; ends with a blank."""
    if not 0 < memories < ENOUGH:
        return ""
    return "in one memory " if memories == 1 else f"in {memories} memories "


def embedding(found: Locality) -> Said:
    """Distances, moves and the region that replicates."""
    common, own = measure(found, "common share of the moves"), own_share(found)
    if math.isnan(common.value):
        return NONE_REPLICATE
    word = scope(own.n) + banded(own, COMMON, ("little is common", "a part is common", "mostly one direction"))
    if math.isnan(own.value):
        word = f"cannot be told, {ALONE}"
    entries = math.prod(found.settings["embedding_shape"])
    sentences = [
        f"Triggers of one image lie {said(measure(found, 'between triggers'), 1)} apart, their starts "
        f"{said(measure(found, 'between their starts'), 1)}, ordinary prompts "
        f"{said(measure(found, 'between ordinary prompts'), 1)}, different memorized prompts "
        f"{said(measure(found, 'between memorized prompts'), 1)}. Gaussian starts are {gaussian_distance(entries):.1f} "
        "apart by construction, so these distances decide nothing.",
        f"The attack moves a start by {said(measure(found, 'moved'), 1)}; "
        f"{said(measure(found, 'nearest start is the own'))} of the triggers remain nearest to their own start (had "
        f"each been moved as another one was, {said(measure(found, 'the same, moves exchanged'))}).",
        f"With the starts taken out, {said(common)} of the moves is common to the triggers of an image (0 independent, "
        "1 the same move)" + _own(found, own),
    ]
    return Said(f"The moves of triggers: {word}", (*sentences, *_lines(found), *_balls(found)))


def _own(found: Locality, own: Estimate) -> str:
    """How much of that is the image's, from starts that two images have in common; by kind of start too."""
    if math.isnan(own.value):
        return f"; whether moves to any image share as much stays open, since {ALONE}.{_ceiling(found)}"
    same, other = measure(found, "common share, same starts"), measure(found, "shared with moves to other images")
    kinds = {start: own_share(found, start) for start in ORDER[1:]}
    by_kind = ", ".join(f"{NAMES[start]} {said(one)}" for start, one in kinds.items() if one.n)
    return (
        f". From the same starts moves towards one image share {said(same)}, towards different images {said(other)}: "
        f"{said(own)} is the image's own{f' ({by_kind})' if by_kind else ''}.{_ceiling(found)}"
    )


def _ceiling(found: Locality) -> str:
    """What a move shares with itself: of more nothing could be asked."""
    again, common = measure(found, AGAIN), measure(found, "common share of the moves, gaussian")
    if math.isnan(again.value):
        return ""
    low = " No moves could be called mostly one direction." if again.value < COMMON[1] else ""
    return (
        f" From N(0, I) two moves share {said(common)}, and one move shares {said(again)} with itself, attacked again "
        f"under other noise: the ceiling.{low}"
    )


def rate(found: Locality, kind: str, at: float) -> Estimate:
    """Share of the probed points of one kind and place that replicate, over memories: points of one hang together."""
    return over_memories(p.successes / p.n for p in found.probes if p.kind == kind and p.at == at and p.n)


def _points(found: Locality, kind: str) -> Estimate:
    """The share of all points half way that replicate, with the interval that independent points would give."""
    rows = [(p.successes, p.n) for p in found.probes if p.kind == kind and p.at == 0.5]
    successes, points = (sum(column) for column in zip(*rows, strict=True))
    return wilson(successes, points)


def _lines(found: Locality) -> list[str]:
    middle, outward = (rate(found, kind, 0.5) for kind in (BETWEEN, OUTWARD))
    if not middle.n or not outward.n:
        return []
    (low, high), (outward_low, outward_high) = ends(middle), ends(outward)
    if high < 0.5:
        word = "triggers are not connected by straight lines"
    elif outward_low > 0.5:
        word = "the region is so large that lines say nothing"
    elif middle.value >= 0.5 and low > outward_high:
        word = "triggers are connected by straight lines"
    else:
        word = "whether straight lines connect triggers cannot be told"
    points, away = _points(found, BETWEEN), _points(found, OUTWARD)
    return [
        f"Half way between two triggers {said(middle)} replicate ({_counted(points)}), half way to an ordinary prompt "
        f"{said(outward)} ({_counted(away)}): {word}. Were all points independent, they alone would give 95 % "
        f"intervals of {points.low:.2f} to {points.high:.2f} and {away.low:.2f} to {away.high:.2f}; but lines of one "
        "memory, which share triggers, hang together, so these are too narrow and decide nothing."
    ]


def _counted(share: Estimate) -> str:
    return f"{round(share.value * share.n)} of {share.n} points"


def _balls(found: Locality) -> list[str]:
    radii = sorted({probe.at for probe in found.probes if probe.kind == BALL})
    rates = [rate(found, BALL, radius) for radius in radii]
    inside = next((k for k, one in enumerate(rates) if one.value < 0.5), len(radii))
    if not radii:
        return []

    def counted(radius: float) -> str:
        rows = [(p.successes, p.n) for p in found.probes if (p.kind, p.at) == (BALL, radius)]
        return f"{radius:g}: {sum(s for s, _ in rows)} of {sum(n for _, n in rows)}"

    if inside == 0:
        reach = f"at no radius that was tried ({counted(radii[0])}"
    elif inside == len(radii):
        reach = f"at every radius that was tried ({counted(radii[-1])}"
    else:
        reach = f"up to a radius of {radii[inside - 1]:g} ({counted(radii[inside - 1])}; {counted(radii[inside])}"
    return [
        f"In random directions from a trigger at least half of the points replicate {reach}), in median distances "
        "between ordinary prompts."
    ]


def _by_image(ratio: Estimate, word: str) -> str:
    """D of one image against that of different ones; nothing after a run's first memory."""
    if math.isnan(ratio.value):
        return f"what the image adds {word}."
    return f"D of triggers of one image is {said(ratio)} times that of different images from the same starts: {word}."


def activations(found: Locality) -> Said:
    """Ratios of D, site by site; judged by triggers of other images, which began at the same starts."""
    sentences, words = [], []
    for site, name in SITES.items():
        image = activity_ratio(found, site, SAME_STARTS, OTHER_IMAGES)
        prompts = activity_ratio(found, site, TRIGGERS, MEMORIZED)
        if math.isnan(prompts.value):
            continue
        word = banded(image, NEAR, ("closer together", "about as far apart", "farther apart"))
        word = f"cannot be told, {ALONE}" if math.isnan(image.value) else word
        words.append(f"{name}: {scope(image.n)}{word}")
        bare = activity_ratio(found, site, STARTS, MEMORIZED)
        starts = activity_ratio(found, site, f"{TRIGGERS}, gaussian", STARTS)
        ordinary = activity_ratio(found, site, TRIGGERS, ORDINARY)
        noises = activity_ratio(found, site, OTHER_NOISES, TRIGGERS)
        by_noise = (
            "Under other noises one trigger has one and the same output by construction: these layers see no noise"
            if site == "attention_value"
            else f"One trigger under other noises has {said(noises)} times the D of triggers"
        )
        sentences.append(
            f"In the {name} {_by_image(image, word)} D is {said(prompts)} times that of different memorized prompts; "
            f"of bare Gaussian starts, before any attack, it is {said(bare)} times that, and of triggers from there "
            f"{said(starts)} times that of their starts. To ordinary prompts the ratio of triggers is "
            f"{said(ordinary)}. {by_noise}."
        )
    if not words:
        return NONE_REPLICATE
    sentences.append("Every ratio is the mean over layers and steps, each counting the same, and then over memories.")
    return Said("Triggers of one image against those of others. " + "; ".join(words).capitalize(), tuple(sentences))


# ----------------------------------------------------------------------------------------------------------- weights


def weights(found: Locality) -> Said:
    """Agreement of masks, method by method, between reference and ceiling; pairs of two empty masks left out."""
    sentences = [_agreement(found, method) for method in methods(found) if _compared(found, method)]
    title = "; ".join(f"{names}: {word}" for names, word in weight_words(found).items())
    return Said(title, (*sentences, *_searches(found))) if sentences else NONE_REPLICATE


def weight_words(found: Locality) -> dict[str, str]:
    """The word on every method's masks, of how many memories; methods of which the same is said are named together."""
    together: dict[str, list[str]] = {}
    for method in methods(found):
        word = f"{scope(way(found, method).estimate.n)}{weight_word(found, method)}"
        together.setdefault(word, []).append(method)
    return {" and ".join(names): word for word, names in together.items()}


def _compared(found: Locality, method: str) -> bool:
    return not math.isnan(overlap(found, method, WHOLE, TRIGGERS).value)


def weight_word(found: Locality, method: str) -> str:
    """Local, partly local, not local, or why that cannot be told."""
    place = way(found, method)
    if place.why_not:
        return f"cannot be told, {place.why_not}"
    word = banded(place.estimate, PLACE, ("not local", "partly local", "local"))
    return f"{word} ({UNFINISHED})" if method == "NeMo" and _cut_short(found) else word


def _cut_short(found: Locality) -> bool:
    """Whether most of NeMo's searches from triggers met the cap, so that their sets are little more than selected."""
    rows = _from_triggers(found)
    return bool(rows) and sum(one.converged for one in rows) / len(rows) < CONVERGED


def _from_triggers(found: Locality) -> list[Search]:
    return [one for one in found.searches if one.group == TRIGGERS]


def _agreement(found: Locality, method: str) -> str:
    level = {
        group: overlap(found, method, WHOLE, group, without_empty=True)
        for group in (TRIGGERS, OTHER_NOISES, OTHER_IMAGES, MEMORIZED, ORDINARY, SIMULATED, *ALL_APART)
    }
    triggers, prompts, place = level[TRIGGERS], level[MEMORIZED], way(found, method)
    if place.why_not == EMPTY:
        return f"{method} selects nothing for any trigger, so all masks agree (1 as published): cannot be told."
    same = level[SAME_APART]
    itself = "" if math.isnan(same.value) else f", one of these triggers with itself by {said(same)}"
    where = (
        ""
        if place.why_not
        else f" Under noises of their own, as the ceiling's are, and from the same starts, triggers agree by "
        f"{said(level[APART])} and those of different images by {said(level[OTHERS_APART])}{itself}: "
        f"{said(place.estimate)} of the way from the higher reference ({LEVELS[place.reference]}) to the ceiling "
        f"(other seeds), over {place.estimate.n} of {len(found.subjects)} memories, those with which another's "
        "triggers from the same starts were compared."
    )
    by_chance = level[SIMULATED], overlap(found, method, WHOLE, f"{MEMORIZED}, {RANDOM}", without_empty=True)
    return (
        f"Triggers of one image agree on {method} weights by {said(triggers)}, "
        f"triggers of different images {said(level[OTHER_IMAGES])}, "
        f"ordinary prompts {said(level[ORDINARY])}, random masks of equal size {said(level[SIMULATED])}, the same "
        f"trigger under other seeds {said(level[OTHER_NOISES])}: {weight_word(found, method)}."
        f"{where}{_where(found, method)} {_beside_prompts(triggers, prompts, by_chance)}{_empty(found, method)}"
    )


def _where(found: Locality, method: str) -> str:
    """Layers in which triggers of one image agree more than those of different images and random masks do."""
    names = layers(found, method)

    def beyond(name: str) -> float:
        if empty_share(found, method, name).value >= HALF_EMPTY:
            return math.nan
        own, *others = (overlap(found, method, name, group, without_empty=True).value for group in (APART, *REFERENCES))
        return own - max((value for value in others if not math.isnan(value)), default=math.nan)

    gain = {name: beyond(name) for name in names}
    above = sorted((name for name in names if gain[name] > MORE), key=lambda name: -gain[name])
    if all(math.isnan(value) for value in gain.values()):
        return ""
    told = ", ".join(f"layer {layer_id(found, name) or name} +{gain[name]:.2f}" for name in above[:3])
    most = f" (most in {told})" if above else ""
    told_of = sum(not math.isnan(value) for value in gain.values())
    return (
        f" That is more than {MORE:g} beyond the higher reference in {len(above)} of the {told_of} layers in which "
        f"less than half of the masks are empty{most}."
    )


def _beside_prompts(triggers: Estimate, prompts: Estimate, by_chance: tuple[Estimate, Estimate]) -> str:
    """Triggers against prompts, beyond what masks of their sizes share by chance, where that is known."""
    opening = "Triggers"
    if not any(math.isnan(chance.value) for chance in by_chance):
        opening = f"Beyond what random masks of their sizes share ({' and '.join(map(said, by_chance))}) triggers"
        triggers, prompts = _less(triggers, by_chance[0].value), _less(prompts, by_chance[1].value)
    return (
        f"{opening} agree {_against(triggers, prompts)} different memorized prompts do ({said(triggers)} against "
        f"{said(prompts)})."
    )


def _less(estimate: Estimate, chance: float) -> Estimate:
    """What an agreement has beyond chance."""
    return Estimate(estimate.value - chance, estimate.low - chance, estimate.high - chance, estimate.n)


def _against(triggers: Estimate, prompts: Estimate) -> str:
    """More than, less than or as much as; whether, where the interval or a missing figure leaves that open."""
    if math.isnan(triggers.value) or math.isnan(prompts.value):
        return "and cannot be compared with what"
    low, high = ends(triggers)
    if low > prompts.value + SAME:
        return "more than"
    if high < prompts.value - SAME:
        return "less than"
    return "as much as" if high - low <= 2 * SAME else "not clearly more or less than"


def _empty(found: Locality, method: str) -> str:
    share = empty_share(found, method)
    if math.isnan(share.value) or share.value == 0:
        return ""
    triggers, prompts, ceiling = (
        said(overlap(found, method, WHOLE, group)) for group in (TRIGGERS, MEMORIZED, OTHER_NOISES)
    )
    return (
        f" Pairs of two empty masks are left out here, {said(share)} of the triggers' pairs; counted 1 as "
        f"published, the triggers have {triggers}, memorized prompts {prompts}, other seeds {ceiling}."
    )


def _searches(found: Locality) -> list[str]:
    rows = _from_triggers(found)
    if not rows:
        return []
    mean = {
        name: sum(getattr(one, name) for one in rows) / len(rows)
        for name in ("median_size", "flagged", "localized", "suppressed", "converged")
    }
    beside = [one for one in found.searches if one.group in (MEMORIZED, ORDINARY)]
    sizes = "".join(f", {one.group} {one.median_size:.0f}" for one in beside)
    capped = "".join(f", {one.group} {1 - one.converged:.2f}" for one in beside)
    single = ", ".join(f"{one.suppressed:.2f}" for one in rows)
    return [
        f"NeMo takes {mean['flagged']:.2f} of the triggers for memorized and calls {mean['localized']:.2f} "
        f"localized. Its sets hold {mean['median_size']:.0f} neurons in the median{sizes} (largest of a trigger "
        f"{max(one.largest_size for one in rows)}). {mean['suppressed']:.2f} of the searches found a set that "
        f"suppresses the memory{f' ({single} memory by memory)' if 1 < len(rows) < ENOUGH else ''}; the others' sets "
        f"do not hold it. {1 - mean['converged']:.2f} met the cap on refinement{capped}: their sets, where they "
        "suppress, are upper bounds. Gaussian-started embeddings lie far outside its statistics."
    ]
