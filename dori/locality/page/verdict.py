"""Each analysis in a sentence or two, made from the numbers by the rules that the page prints."""

import math
from dataclasses import dataclass

from dori.locality.causal import cross_test, enough
from dori.locality.embeddings import gaussian_distance
from dori.locality.page.summary import activity_ratio, dose_relations, measure, methods, over_memories, overlap, said
from dori.locality.patching import NONE, SOURCE
from dori.locality.probes import BALL, BETWEEN, OUTWARD
from dori.locality.records import MEMORIZED, ORDINARY, OTHER_NOISES, SIMULATED, STARTS, TRIGGERS, WHOLE, Cross, Locality
from dori.stats import Estimate

RULES = (
    "Only attacks whose image comes back under fresh seeds (median similarity above the threshold) count as triggers; "
    "with fewer than two of a memory nothing is compared for it.",
    "Intervals are 95 % bootstrap intervals over memories; with fewer than 5 memories the value stands alone.",
    "Embedding space: the moves are said to have no common direction where less than 0.1 of their mean square is "
    "common, mostly one direction from 0.5 on, and a common part between. Gaussian starts are far apart by "
    "construction, so distances between triggers decide nothing.",
    "Region: triggers are connected by straight lines where at least half of the middle points replicate, and more "
    "than on lines to ordinary prompts; otherwise lines say nothing.",
    "Activations: closer or farther than different memorized prompts where the mean ratio of D lies below 0.9 or above "
    "1.1 (with its interval, if there is one), else about as far.",
    "Weights: between the reference (the highest of different memorized prompts, ordinary prompts and random masks of "
    "equal size) and the ceiling (the same trigger under other noise seeds), agreement is not local up to a tenth of "
    "the way, local from nine tenths on, partly local between. Where ceiling and reference are less than 0.05 apart, "
    "nothing can be told. Where some masks are empty, pairs of two empty ones are left out of this comparison.",
    "Causal test: local if at most a tenth of other triggers and fresh attacks succeed under a mask; not local if more "
    "than half do; partly local between.",
    "Ground truth: a mask finds the memory where it covers at least twice its density of the planted change, and the "
    "change between twins less.",
)


@dataclass(frozen=True, slots=True)
class Said:
    """What an analysis says: the verdict in few words, and sentences with its figures."""

    title: str
    sentences: tuple[str, ...]


def headline(found: Locality) -> str:
    """The page's first sentence: what the weights say, method by method, and on how many memories that rests."""
    words = [f"{method}: {_weight_word(found, method)}" for method in methods(found)]
    return "Where does a memory live? " + "; ".join(words) + "." if words else "Nothing was compared."


def done(found: Locality) -> str:
    """On what the page rests."""
    attacks, triggers = (sum(getattr(s, name) for s in found.subjects) for name in ("attacks", "triggers"))
    share = f"{triggers / attacks:.2f}" if attacks else "none"
    return (
        f"{len(found.subjects)} of {found.planned} planned memories are analysed. {triggers} of {attacks} attacks "
        f"replicate with fresh seeds ({share}); only these count as triggers."
    )


# --------------------------------------------------------------------------------------------------- embedding space


def embedding(found: Locality) -> Said:
    """Distances, moves and the region that replicates."""
    common, other = measure(found, "common share of the moves"), measure(found, "shared with moves to other images")
    if math.isnan(common.value):
        return Said("Too few triggers", ("No memory has two triggers, so nothing can be said.",))
    word = (
        "no common direction"
        if common.value < 0.1
        else "mostly one direction"
        if common.value >= 0.5
        else "a common part, no common place"
    )
    entries = math.prod(found.settings["embedding_shape"])
    sentences = [
        f"Triggers of one image lie {said(measure(found, 'between triggers'), 1)} apart, their starts "
        f"{said(measure(found, 'between their starts'), 1)}, ordinary prompts "
        f"{said(measure(found, 'between ordinary prompts'), 1)}, different memorized prompts "
        f"{said(measure(found, 'between memorized prompts'), 1)}. Gaussian starts are {gaussian_distance(entries):.1f} "
        "apart by construction, so this says little.",
        f"The attack moves a start by {said(measure(found, 'moved'), 1)}; "
        f"{said(measure(found, 'nearest start is the own'))} of the triggers remain nearest to their own start.",
        f"With the starts taken out, {said(common)} of the moves is common to the triggers of an image (0 independent, "
        "1 the same move)"
        + (
            "."
            if math.isnan(other.value)
            else f", and {said(other)} to moves towards other images from the same starts."
        ),
    ]
    return Said(f"The moves have {word}", (*sentences, *_region(found)))


def _region(found: Locality) -> list[str]:
    sentences = []
    middle, outward = _rate(found, BETWEEN, 0.5), _rate(found, OUTWARD, 0.5)
    if middle is not None and outward is not None:
        word = (
            "triggers are not connected by straight lines"
            if middle[0] < 0.5 * middle[1]
            else "triggers are connected by straight lines"
            if middle[0] > outward[0]
            else "the region is so large that lines say nothing"
        )
        sentences.append(
            f"Half way between two triggers {middle[0]} of {middle[1]} points replicate, half way to an "
            f"ordinary prompt {outward[0]} of {outward[1]}: {word}."
        )
    radii = sorted({probe.at for probe in found.probes if probe.kind == BALL})
    rates = [rate for radius in radii if (rate := _rate(found, BALL, radius)) is not None]
    if radii:
        inside = 0
        while inside < len(radii) and rates[inside][0] >= 0.5 * rates[inside][1]:
            inside += 1
        reach = f"up to {radii[inside - 1]:g}" if inside else f"at none of the tried radii ({radii[0]:g} and more)"
        sentences.append(
            f"Around a trigger at least half of random directions replicate {reach} of the median "
            "distance between ordinary prompts."
        )
    return sentences


def _rate(found: Locality, kind: str, at: float) -> tuple[int, int] | None:
    rows = [probe for probe in found.probes if probe.kind == kind and probe.at == at]
    return (sum(p.successes for p in rows), sum(p.n for p in rows)) if rows else None


# ---------------------------------------------------------------------------------------------- activations, weights

SITES = {"attention_value": "value projections", "feed_forward": "feed-forward layers"}


def activations(found: Locality) -> Said:
    """Ratios of D, site by site."""
    sentences, words = [], []
    for site, name in SITES.items():
        ratio = activity_ratio(found, site, TRIGGERS, MEMORIZED)
        if math.isnan(ratio.value):
            continue
        word = _nearness(ratio)
        words.append(f"{name} {word} different memorized prompts")
        starts = activity_ratio(found, site, f"{TRIGGERS}, gaussian", STARTS)
        sentences.append(
            f"In the {name} triggers of one image lie {word} different memorized prompts (ratio of D {said(ratio)}; to "
            f"ordinary prompts {said(activity_ratio(found, site, TRIGGERS, ORDINARY))}; Gaussian-started triggers to "
            f"their bare starts {said(starts)}; one trigger under other noises to triggers "
            f"{said(activity_ratio(found, site, OTHER_NOISES, TRIGGERS))})."
        )
    return Said("; ".join(words).capitalize() or "Too few triggers", tuple(sentences))


def _nearness(ratio: Estimate) -> str:
    low, high = (ratio.value, ratio.value) if math.isnan(ratio.low) else (ratio.low, ratio.high)
    return "closer together than" if high < 0.9 else "farther apart than" if low > 1.1 else "about as far apart as"


def weights(found: Locality) -> Said:
    """Agreement of masks, method by method, between reference and ceiling; pairs of two empty masks left out."""
    sentences = []
    for method in methods(found):
        level = {
            group: overlap(found, method, WHOLE, group, without_empty=True)
            for group in (TRIGGERS, OTHER_NOISES, MEMORIZED, ORDINARY, SIMULATED)
        }
        triggers, prompts = level[TRIGGERS], level[MEMORIZED]
        if math.isnan(triggers.value):
            continue
        more = (
            "more than"
            if triggers.value > prompts.value + 0.01
            else "less than"
            if triggers.value < prompts.value - 0.01
            else "as much as"
        )
        sentences.append(
            f"Triggers of one image agree on {method} weights {more} different memorized prompts do ({said(triggers)} "
            f"against {said(prompts)}); ordinary prompts {said(level[ORDINARY])}, random masks of equal size "
            f"{said(level[SIMULATED])}, the same trigger under other seeds {said(level[OTHER_NOISES])}: "
            f"{_weight_word(found, method)}.{_empty(found, method)}"
        )
    sentences += _searches(found)
    title = "; ".join(f"{method}: {_weight_word(found, method)}" for method in methods(found))
    return Said(title if sentences else "Too few triggers", tuple(sentences))


def _weight_word(found: Locality, method: str) -> str:
    triggers, ceiling, *levels = (
        overlap(found, method, WHOLE, group, without_empty=True).value
        for group in (TRIGGERS, OTHER_NOISES, MEMORIZED, ORDINARY, SIMULATED)
    )
    reference = max((level for level in levels if not math.isnan(level)), default=math.nan)
    if math.isnan(triggers) or math.isnan(ceiling):
        return "too few triggers to tell"
    if not ceiling - reference >= 0.05:
        return "cannot be told, the ceiling is not above the reference"
    way = (triggers - reference) / (ceiling - reference)
    return "not local" if way <= 0.1 else "local" if way >= 0.9 else "partly local"


def _empty(found: Locality, method: str) -> str:
    share = over_memories(
        o.empty_share for o in found.overlaps if (o.method, o.layer, o.group) == (method, WHOLE, TRIGGERS)
    )
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
    rows = [one for one in found.searches if one.group == TRIGGERS]
    if not rows:
        return []
    mean = {
        name: sum(getattr(one, name) for one in rows) / len(rows)
        for name in ("median_size", "flagged", "localized", "converged")
    }
    return [
        f"NeMo takes {mean['flagged']:.2f} of the triggers for memorized and calls {mean['localized']:.2f} "
        f"localized; its sets hold {mean['median_size']:.0f} neurons (median; largest "
        f"{max(one.largest_size for one in rows)}), and {mean['converged']:.2f} of the searches ended before the "
        "cap on refinement. Gaussian-started embeddings lie far outside its statistics."
    ]


# ------------------------------------------------------------------------------------------ causal, patching, truth


def rates(found: Locality, cross: Cross) -> tuple[Estimate, Estimate, Estimate]:
    """Success under a mask of its own trigger attacked again, of other triggers, and of fresh attacks."""
    matrix = [[value > found.threshold for value in row] for row in cross.again]
    test = cross_test(matrix, [[value > found.threshold for value in row] for row in cross.fresh])
    return test.own, test.others, test.fresh


def causal(found: Locality) -> Said:
    """What pruning one trigger's weights does to the others, and how many masks it takes."""
    sentences, words = [], []
    for cross in found.crosses:
        own, others, fresh = rates(found, cross)
        worst = max(one.value for one in (others, fresh) if one.n) if others.n or fresh.n else math.nan
        word = "local" if worst <= 0.1 else "not local" if worst > 0.5 else "partly local"
        words.append(word)
        sentences.append(
            f"{cross.memory}, {cross.method}: with one trigger's weights pruned, {said(own)} of these triggers come "
            f"back when attacked again, {said(others)} of the others and {said(fresh)} of fresh attacks: {word}."
            f"{_empty_masks(cross)}"
        )
        sentences.append(_joined(found, cross))
    return Said("; ".join(dict.fromkeys(words)).capitalize() or "Not run", tuple(sentences))


def _empty_masks(cross: Cross) -> str:
    empty = sum(size == 0 for size in cross.sizes)
    return f" {empty} of the {len(cross.sizes)} masks are empty and prune nothing." if empty else ""


def _joined(found: Locality, cross: Cross) -> str:
    rows = [j for j in found.joined if (j.memory, j.method) == (cross.memory, cross.method)]
    if not rows:
        return ""
    needed, last = enough([j.successes for j in rows], [j.masks for j in rows]), rows[-1]
    told = {j.masks: j for j in rows}
    if needed is None:
        return (
            f"Even the union of {last.masks} masks ({last.density:.2f} of the layers' weights) leaves "
            f"{last.successes} of {last.n} fresh attacks."
        )
    price, before = told[needed], rows[0]
    cost = (
        ""
        if price.frechet is None or before.frechet is None
        else f", and the Frechet distance of ordinary prompts goes from {before.frechet:.3f} to {price.frechet:.3f}"
    )
    return (
        (
            f"No fresh attack of {last.n} succeeds from {needed} joined masks on ({price.density:.2f} of the layers' "
            f"weights{cost})."
        )
        if needed
        else f"No fresh attack of {last.n} succeeds even without a mask."
    )


def patching(found: Locality) -> Said:
    """The layers that carry most, and all of them together."""
    sentences, gone = [], True
    for direction, words in (("sufficient", "put into the twin bring"), ("necessary", "taken from the twin remove")):
        rows = [
            p
            for p in found.patches
            if p.direction == direction and p.share is not None and p.layers not in (NONE, SOURCE)
        ]
        shares = {
            name: over_memories(p.share for p in rows if p.layers == name)
            for name in dict.fromkeys(p.layers for p in rows)
        }
        single = {name: value for name, value in shares.items() if not name.startswith("all ")}
        if single:
            gone = False
            best = max(single, key=lambda name: single[name].value)
            kinds = ", ".join(f"{name} {said(shares[name])}" for name in shares if name.startswith("all "))
            sentences.append(
                f"Activations {words} most in {best} ({said(single[best])} of the gap between the models); {kinds}."
            )
    return Said(
        "The models hardly differ, or none was compared" if gone else "Which layers carry the memory", tuple(sentences)
    )


def ground_truth(found: Locality) -> Said:
    """Where planting changed the weights, and what the masks hold of it."""
    if not found.changes:
        return Said("No twin", ("Without a model that never saw the memories there is no ground truth.",))
    total = sum(max(0.0, c.change - (c.floor or 0.0)) for c in found.changes)
    parts = [f"{c.group} {max(0.0, c.change - (c.floor or 0.0)) / total:.2f}" for c in found.changes[:4] if total]
    floor = "" if found.changes[0].floor is not None else " There is one twin, so no floor was subtracted."
    beyond = "" if floor else " beyond the twins' own difference"
    sentences = [
        f"Of what planting changed{beyond}, most lies in {', '.join(parts)}.{floor}"
        if parts
        else "Planting changed no more than training on other images does."
    ]
    words = []
    for method in dict.fromkeys(c.method for c in found.covers):
        rows = [c for c in found.covers if (c.method, c.layer, c.masks) == (method, WHOLE, "one")]
        density, planted, twins = (
            over_memories(getattr(c, name) for c in rows) for name in ("density", "planted", "twins")
        )
        between = "" if math.isnan(twins.value) else f"; of the change between twins it holds {said(twins, 3)}"
        finds = planted.value >= 2 * density.value and not twins.value >= planted.value
        words.append(f"{method} {'finds' if finds else 'does not find'} it")
        sentences.append(
            f"A {method} mask of one trigger holds {said(density, 3)} of its layers' weights and "
            f"{said(planted, 3)} of their change by planting (a random mask of its size holds the "
            f"density{between})."
        )
    return Said("; ".join(words) or "The change", tuple(sentences))


def dose(found: Locality) -> Said:
    """Rank correlations with the duplication count."""
    related = dose_relations(found)
    told = [
        f"{one.name}: rank correlation {one.rank:.2f} (permutation p {one.p:.2f}, {len(one.values)} memories)"
        for one in related
        if not math.isnan(one.rank)
    ]
    clear = [one for one in related if one.p < 0.05]
    if not told:
        return Said("Too few memories of different doses", ())
    return Said(
        "Locality changes with the dose" if clear else "No change with the dose can be shown",
        (f"{'; '.join(told)}. {len(told)} measures were tried, so a single small p may be chance.",),
    )


def all_said(found: Locality) -> dict[str, Said]:
    """Every analysis in the page's order."""
    return {
        "embedding": embedding(found),
        "activations": activations(found),
        "weights": weights(found),
        "causal": causal(found),
        "patching": patching(found),
        "truth": ground_truth(found),
        "dose": dose(found),
    }
