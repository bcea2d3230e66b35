"""What interventions and the ground truth say: layers and weights that carry a memory, planted change, dose.

Rules: `dori.locality.page.verdict`.
"""

import math
from collections.abc import Mapping, Sequence

from dori.locality.page.layer_ids import called
from dori.locality.page.observed import scope
from dori.locality.page.summary import (
    EMPTY,
    Said,
    banded,
    dose_relations,
    ends,
    excess_shares,
    least_p,
    left_out,
    over_memories,
    pruned_share,
    said,
)
from dori.locality.patching import NECESSARY, NONE, SOURCE, SUFFICIENT, TOGETHER
from dori.locality.records import ENOUGH, WHOLE, Locality, Patch
from dori.stats import Estimate

COVERED, HALF, RARELY = (1.1, 2.0), 0.5, 0.05  # cuts of the rules; the level of significance

# ---------------------------------------------------------------------------------------------------------- patching


def patching(found: Locality) -> Said:
    """The layers that carry most, and kinds of layers together."""
    if not found.patches:
        return Said("Not run", (left_out(found, "patch_seeds") or "It needs a twin, and a memory's prompt.",))
    sentences, carried = [], []
    for direction, words in ((SUFFICIENT, "put into the twin bring"), (NECESSARY, "taken from the twin remove")):
        shares = patch_shares(found.patches, direction)
        single = {name: value for name, value in shares.items() if not name.startswith(TOGETHER)}
        if not shares:
            continue
        kinds = ", ".join(
            f"{name} {said(value)}{each([p.share for p in patched(found.patches, direction, name)])}"
            for name, value in shares.items()
            if name not in single
        )
        begins = f"Activations {words}, of the gap between the models: "
        if single:
            best = max(single, key=lambda name: single[name].value)
            begins = (
                f"A single layer's activations {words} most in {called(found, best)} ({said(single[best])} of the gap "
                f"between the models, the largest of {len(single)} layers tried); "
            )
        sentences.append(f"{begins}{kinds}.{_sound(found, direction)}")
        carrying = [name for name, value in shares.items() if ends(value)[0] >= HALF]
        named = ", ".join(f"{called(found, name)}{doubt(found.patches, direction, name)}" for name in carrying)
        carried.append(f"{direction}: {named or 'none of the tried sets'}")
    if not sentences:
        return Said("Cannot be told", ("The planted model hardly draws the memories more alike than its twin does.",))
    title = f"{scope(len({p.memory for p in found.patches if p.share is not None}))}{'; '.join(carried)}"
    return Said(title[0].upper() + title[1:], ("Each memory is drawn from its own prompt.", *sentences, _any(found)))


def _any(found: Locality) -> str:
    """How well the same layers carry an image that is no memory: the twin's own, in the planted model's run."""
    like = {
        name: patch_likeness(found.patches, NECESSARY, name)
        for name in dict.fromkeys(p.layers for p in found.patches if p.layers.startswith(TOGETHER))
    }
    known = {name: estimate for name, estimate in like.items() if estimate.n}
    if not known:
        return ""
    most = max(known, key=lambda name: known[name].value)
    return (
        f"That layers carry a memory does not set it apart: {most} carry the twin's own image, which is none, into the "
        f"planted model's run by {said(known[most])}."
    )


def doubt(patches: Sequence[Patch], direction: str, name: str) -> str:
    """Said of a set that makes the gap, but whose images are not, or not surely, what the other model draws."""
    cured = banded(patch_likeness(patches, direction, name), (HALF,), ("", "cured")) == "cured"
    return "" if cured else " (but what is drawn is not, or not surely, the other model's image)"


def patched(patches: Sequence[Patch], direction: str, name: str) -> list[Patch]:
    """The records of one set in one direction."""
    return [p for p in patches if (p.direction, p.layers) == (direction, name)]


def patch_likeness(patches: Sequence[Patch], direction: str, name: str) -> Estimate:
    """Likeness of a patched set's images to the other model's own, over the memories that count."""
    return over_memories(_alike(patches, direction, name))


def _alike(patches: Sequence[Patch], direction: str, name: str) -> list[float]:
    """Likeness to the other model's own images, of the memories that count; without a patch of all."""
    rows = [p for p in patched(patches, direction, name) if p.share is not None or name == NONE]
    return [p.alike for p in rows if p.alike is not None]


def each(values: Sequence[float | None]) -> str:
    """Memory by memory, where they are too few for an interval; what was not measured is left out."""
    told = [f"{value:.2f}" for value in values if value is not None]
    return f" ({', '.join(told)})" if 1 < len(told) < ENOUGH else ""


def _sound(found: Locality, direction: str) -> str:
    """Whether what is drawn comes closer to the other model's own images."""
    like = {
        name: _alike(found.patches, direction, name)
        for name in dict.fromkeys(p.layers for p in found.patches)
        if name == NONE or name.startswith(TOGETHER)
    }
    words = {name: f"{said(over_memories(values))}{each(values)}" for name, values in like.items() if values}
    told = ", ".join(f"{name} {word}" for name, word in words.items() if name != NONE)
    if not told or NONE not in words:
        return ""
    return (
        f" To the images that the other model draws itself the patched ones are alike by: {told}; without a patch "
        f"{words[NONE]}. Where that does not rise with the share, what is drawn is neither model's image."
    )


def patch_shares(patches: Sequence[Patch], direction: str) -> Mapping[str, Estimate]:
    """Share of the gap by set of layers (of transplants: weights), over memories."""
    rows = [p for p in patches if p.direction == direction and p.share is not None and p.layers not in (NONE, SOURCE)]
    return {
        name: over_memories(p.share for p in rows if p.layers == name) for name in dict.fromkeys(p.layers for p in rows)
    }


# ------------------------------------------------------------------------------------------------ ground truth, dose


def ground_truth(found: Locality) -> Said:
    """Where planting changed the weights, and what the masks hold of it."""
    kinds = [c for c in found.changes if c.level == "kind"]
    if not kinds:
        return Said("Not known", ("Without a model that never saw the memories there is no ground truth.",))
    one_twin = kinds[0].floor is None
    beyond = "" if one_twin else " beyond the twins' own difference"
    largest = ", ".join(f"{group} {share:.2f}" for group, share in [*excess_shares(found, "kind").items()][:4])
    sentences = [
        f"Of what planting changed{beyond}, the largest parts lie in {largest}."
        if largest
        else "Planting changed no more than training on other images does."
    ]
    if one_twin:
        sentences.append(
            "There is one twin, so twin minus twin is not known, and what training on any other images changes is not "
            "subtracted: a mask may hold much of the change without knowing the memories."
        )
    if found.settings.get("precision") in ("float16", "bfloat16"):
        sentences.append(
            "The weights were compared in half precision, in which small changes are lost or rounded up; a run without "
            "--half shows them."
        )
    words = []
    for method in dict.fromkeys(c.method for c in found.covers):
        word, sentence = _covered(found, method, "holds much of the change" if one_twin else "far above chance")
        words.append(f"{method}: {word}")
        sentences.append(sentence)
    return Said("; ".join(words) or "No trigger has a mask", tuple(sentences))


def _covered(found: Locality, method: str, best: str) -> tuple[str, str]:
    """The verdict on one method's masks and the sentence that bears it; `best` is said of those far above chance."""
    rows = [c for c in found.covers if (c.method, c.layer, c.masks) == (method, WHOLE, "one")]
    if not any(c.density for c in rows):
        return EMPTY, f"Every {method} mask is empty, so none holds anything."
    ratio = over_memories(c.share / c.random for c in rows if c.share is not None and c.random)
    word = banded(ratio, COVERED, ("no better than chance", "somewhat better than chance", best))
    density, share, random, twins = (
        over_memories(getattr(c, name) for c in rows) for name in ("density", "share", "random", "twins")
    )
    floor = "" if math.isnan(twins.value) else f"; of the difference between twins it holds {said(twins, 3)}"
    return f"{scope(ratio.n)}{word}", (
        f"{_reach(found, method)}A {method} mask of one trigger holds {said(density, 3)} of its layers' weights and "
        f"{said(share, 3)} of what planting changed there; random masks as large in every layer hold "
        f"{said(random, 3)} ({said(ratio)} times as much: {word}){floor}."
    )


def _reach(found: Locality, method: str) -> str:
    """What part of all that planting changed lies in the layers that a method prunes."""
    share = pruned_share(found, method)
    if math.isnan(share):
        return ""
    return (
        f"The layers that {method} prunes hold {share:.2g} of all that planting changed; no mask there reaches the "
        "rest, which an attack may use. "
    )


def dose(found: Locality) -> Said:
    """Rank correlations with the duplication count, each p times the number of measures."""
    related = [one for one in dose_relations(found) if not math.isnan(one.rank)]
    if not related:
        return Said("Cannot be told", ("It takes five memories of different doses.",))
    least = min(least_p(one.doses) for one in related) * len(related)
    few = least >= RARELY
    clear = [one.name for one in related if one.p * len(related) < RARELY]
    told = "; ".join(f"{one.name} {one.rank:+.2f} (p {one.p:.2f}, {len(one.values)} memories)" for one in related)
    tests = f"Each p is times {len(related)}, the number of measures, before it is held against {RARELY:g}."
    doubt = f" No order of so few memories of these doses could come below {least:.2g}, whatever the dose does."
    title = f"Changes with the dose: {', '.join(clear)}" if clear else "No change with the dose can be shown"
    return Said(
        "Cannot be told, too few memories of different doses" if few else title,
        (f"Rank correlation with the duplication count, permutation p: {told}.", tests + doubt * few),
    )
