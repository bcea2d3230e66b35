"""What interventions and the ground truth say: pruning, patching, planted weights, dose.

Rules: `dori.locality.page.verdict`.
"""

import math
from collections import Counter
from collections.abc import Mapping

from dori.locality.causal import CrossTest, cross_test, enough
from dori.locality.costs import causal_methods
from dori.locality.page.summary import EMPTY, Said, banded, dose_relations, ends, methods, over_memories, said
from dori.locality.patching import NECESSARY, NONE, SOURCE, SUFFICIENT
from dori.locality.records import ENOUGH, NO_MASK, OTHER_MASKS, RANDOM, TRIGGERS, WHOLE, Cross, Joined, Locality
from dori.report.verdict import SPOILED
from dori.stats import Estimate, wilson

COVERED, HALF, RARELY = (1.1, 2.0), 0.5, 0.05  # cuts of the rules; the level of significance
TOGETHER = "all "  # begins the names of layers patched together

# ------------------------------------------------------------------------------------------------------- causal test


def tested(found: Locality, cross: Cross) -> CrossTest:
    """Rates of one matrix; masks that prune nothing are left out, without any mask every attack is a trial.

    Under masks only those attacks are scored that succeed without one: whatever a mask did, the others would have
    failed.
    """
    again, fresh = (
        [[value > found.threshold for value in row] for row in table] for table in (cross.again, cross.fresh)
    )
    if cross.masks == NO_MASK:
        return cross_test([[cell] for row in again for cell in row], [[cell] for row in fresh for cell in row], None)
    bare = _beside(found, cross, "", NO_MASK)
    columns, new = (
        [k for k in range(len(table[0])) if bare is None or getattr(bare, name)[0][k] > found.threshold]
        for name, table in (("again", again), ("fresh", fresh))
    )
    kept = [row for row, size in enumerate(cross.sizes) if size]
    own = [columns.index(row) if row in columns else -1 for row in kept] if cross.masks == TRIGGERS else None
    return cross_test(
        [[again[row][k] for k in columns] for row in kept], [[fresh[row][k] for k in new] for row in kept], own
    )


def _beside(found: Locality, cross: Cross, method: str, masks: str) -> Cross | None:
    """The same memory's attacks under other masks, if they were made."""
    key = (cross.memory, method, masks)
    return next((c for c in found.crosses if (c.memory, c.method, c.masks) == key), None)


def causal(found: Locality) -> Said:
    """What pruning one trigger's weights does to the others, and how many masks it takes."""
    sentences: list[str] = []
    words: dict[str, list[str]] = {}
    for cross in found.crosses:
        if cross.masks == TRIGGERS:
            word, sentence = _pruned(found, cross)
            words.setdefault(cross.method, []).append(word)
            sentences += [sentence, *_joined(found, cross)]
    open_ = _unfinished(found)
    if not sentences:
        reason = _left_out(found, "causal") or open_ or "No memory that it was planned for has two triggers."
        return Said("Not run", (reason,))
    title = "; ".join(f"{method}: {' / '.join(dict.fromkeys(said_))}" for method, said_ in words.items())
    return Said(title, (*sentences, *([open_] if open_ else [])))


def _unfinished(found: Locality) -> str:
    """A sentence if a run was stopped before or within its causal test, else empty."""
    planned = (found.settings.get("causal") or {}).get("memories", 0)
    hopeless = sum(subject.triggers < 2 for subject in found.subjects[:planned])
    wanted = min(planned, found.planned) - hopeless
    tests = Counter(cross.method for cross in found.crosses if cross.masks == TRIGGERS)
    names = causal_methods(tuple(methods(found)))
    if all(tests[name] >= wanted for name in names):
        return ""
    shares = ", ".join(f"{tests[name]} of {wanted} memories with {name}" for name in names)
    return f"The test is not finished: so far {shares}."


def _left_out(found: Locality, setting: str) -> str:
    """A sentence if the plan has no such analysis, else empty."""
    if found.settings.get(setting):
        return ""
    return f"The preset {found.settings.get('preset')} leaves it out; --preset full has it."


def _pruned(found: Locality, cross: Cross) -> tuple[str, str]:
    """The verdict on one method's masks of one memory, and the sentence that bears it."""
    bare, random, other = (
        None if control is None else tested(found, control)
        for control in (
            _beside(found, cross, "", NO_MASK),
            _beside(found, cross, cross.method, RANDOM),
            _beside(found, cross, cross.method, OTHER_MASKS),
        )
    )
    mine = tested(found, cross)
    empty = sum(size == 0 for size in cross.sizes)
    if empty == len(cross.sizes):
        word = f"cannot be told, {EMPTY}"
        return word, f"{cross.memory}, {cross.method}: all {empty} masks are empty and prune nothing: {word}."
    price = _single_price(found, cross)
    word = causal_word(mine, bare, random, other, spoils=price is not None and price[1] > SPOILED * price[0])
    beside = "".join(
        f" {name} {said(test.others)} and {said(test.fresh)}{more}."
        for name, test, more in (
            ("Under random masks as large:", random, ""),
            ("Under masks of another image's triggers:", other, ""),
            ("Without a mask:", bare, "; what fails there is not scored"),
        )
        if test is not None
    )
    if price is not None:
        cost = f"from {price[0]:.3f} to {price[1]:.3f}"
        beside += f" The first trigger's mask takes the Fréchet distance of ordinary prompts {cost}."
    left_out = f" {empty} of the {len(cross.sizes)} masks are empty and left out." if empty else ""
    return word, (
        f"{cross.memory}, {cross.method}: with one trigger's weights pruned, {said(mine.own)} of these triggers come "
        f"back when attacked again, {said(mine.others)} of the others and {said(mine.fresh)} of fresh attacks: {word}."
        f"{beside}{left_out}"
    )


def _single_price(found: Locality, cross: Cross) -> tuple[float, float] | None:
    """Fréchet distance of ordinary prompts without a mask, and under the first trigger's; None if that is empty."""
    one = {
        j.joined: j.frechet
        for j in found.joined
        if j.memory == cross.memory
        and (j.method, j.masks) in (("", NO_MASK), (cross.method, TRIGGERS))
        and j.frechet is not None
    }
    return (one[0], one[1]) if {0, 1} <= one.keys() and cross.sizes[0] else None


def causal_word(
    mine: CrossTest, bare: CrossTest | None, random: CrossTest | None, other: CrossTest | None, *, spoils: bool
) -> str:
    """Local, partly local or not, by whichever resists more: other triggers attacked again, or fresh attacks.

    Args:
        mine: under the masks of this memory's triggers.
        bare: without a mask.
        random: under random masks as large.
        other: under masks of another image's triggers.
        spoils: whether the first trigger's mask alone spoils ordinary prompts.
    """
    kinds = [kind for kind in ("others", "fresh") if getattr(mine, kind).n]
    if not kinds:
        fail = bare is not None and max(bare.others.value, bare.fresh.value) <= 0.5
        return f"cannot be told, {'most attacks fail without a mask' if fail else 'too few triggers'}"
    worst = max(kinds, key=lambda kind: getattr(mine, kind).value)
    rate: Estimate = getattr(mine, worst)
    if bare is not None and getattr(bare, worst).value <= 0.5:
        return "cannot be told, most attacks fail without a mask"
    if rate.low > 0.5:
        return "not local"
    word = "local" if rate.high < 0.25 else "partly local" if rate.low > 0.1 and rate.high < 0.9 else ""
    if not word:
        return "cannot be told"
    for control, name in ((random, "random masks as large"), (other, "masks of another image's triggers")):
        stopped: Estimate | None = None if control is None else getattr(control, worst)
        if stopped is None or not stopped.n:
            return f"cannot be told, there are no {name} to compare with"
        if stopped.value <= rate.high:
            return f"cannot be told, {name} stop about as many"
        if stopped.low <= rate.high:
            return f"cannot be told, there are too few {name}"
    return "cannot be told, the first trigger's mask alone spoils ordinary prompts" if spoils else word


def _joined(found: Locality, cross: Cross) -> list[str]:
    rows: dict[str, list[Joined]] = {
        masks: [j for j in found.joined if (j.memory, j.method, j.masks) == (cross.memory, cross.method, masks)]
        for masks in (TRIGGERS, RANDOM)
    }
    bare = [j for j in found.joined if (j.memory, j.masks) == (cross.memory, NO_MASK)]
    if not rows[TRIGGERS] or not any(cross.sizes):
        return []
    if bare and bare[0].successes == 0:
        return [f"No fresh attack of {bare[0].n} succeeds even without a mask, so joining masks shows nothing."]
    sentence = f"{cross.method} masks joined: {_stopped(rows[TRIGGERS])}{_price(rows[TRIGGERS], bare)}."
    return [sentence + (f" Random masks as large: {_stopped(rows[RANDOM])}." if rows[RANDOM] else "")]


def _stopped(rows: list[Joined]) -> str:
    needed, last = enough([j.successes for j in rows], [j.joined for j in rows]), rows[-1]
    if needed is None:
        return (
            f"even {last.joined} ({last.density:.2f} of the layers' weights) leave {last.successes} of {last.n} fresh "
            "attacks"
        )
    density = next(j.density for j in rows if j.joined == needed)
    return (
        f"from {needed} on ({density:.2f} of the layers' weights) none of {last.n} fresh attacks succeeds (of many, up "
        f"to {wilson(0, last.n).high:.2f} still might)"
    )


def _price(rows: list[Joined], bare: list[Joined]) -> str:
    needed = enough([j.successes for j in rows], [j.joined for j in rows])
    priced = next((j for j in rows if j.joined == needed), rows[-1])
    if priced.frechet is None or not bare or bare[0].frechet is None:
        return ""
    return (
        f", at the price of a Fréchet distance of {priced.frechet:.3f} on ordinary prompts ({bare[0].frechet:.3f} "
        "without a mask)"
    )


# ---------------------------------------------------------------------------------------------------------- patching


def patching(found: Locality) -> Said:
    """The layers that carry most, and kinds of layers together."""
    if not found.patches:
        return Said("Not run", (_left_out(found, "patch_seeds") or "It needs a twin, and a memory's prompt.",))
    sentences, carried = [], []
    for direction, words in ((SUFFICIENT, "put into the twin bring"), (NECESSARY, "taken from the twin remove")):
        shares = patch_shares(found, direction)
        single = {name: value for name, value in shares.items() if not name.startswith(TOGETHER)}
        if not single:
            continue
        best = max(single, key=lambda name: single[name].value)
        kinds = ", ".join(
            f"{name} {said(value)}{_each(found, direction, name)}"
            for name, value in shares.items()
            if name not in single
        )
        sentences.append(
            f"A single layer's activations {words} most in {best} ({said(single[best])} of the gap between the models, "
            f"the largest of {len(single)} layers tried); {kinds}.{_sound(found, direction)}"
        )
        carrying = [name for name, value in shares.items() if ends(value)[0] >= HALF]
        carried.append(f"{direction}: {', '.join(carrying) or 'none of the tried sets'}")
    if not sentences:
        return Said("Cannot be told", ("The planted model hardly draws the memories more alike than its twin does.",))
    return Said("; ".join(carried).capitalize(), tuple(sentences))


def _each(found: Locality, direction: str, name: str) -> str:
    """Memory by memory, where they are too few for an interval."""
    shares = [p.share for p in found.patches if (p.direction, p.layers) == (direction, name) and p.share is not None]
    return f" ({', '.join(f'{share:.2f}' for share in shares)})" if 1 < len(shares) < ENOUGH else ""


def _sound(found: Locality, direction: str) -> str:
    """Whether what is drawn comes closer to the other model's own images, or is merely ruined."""
    like = {
        name: over_memories(p.alike for p in found.patches if (p.direction, p.layers) == (direction, name))
        for name in dict.fromkeys(p.layers for p in found.patches)
        if name == NONE or name.startswith(TOGETHER)
    }
    told = ", ".join(f"{name} {said(one)}" for name, one in like.items() if name != NONE and one.n)
    if not told or NONE not in like:
        return ""
    return (
        f" To the images that the other model draws itself the patched ones are alike by: {told}; without a patch "
        f"{said(like[NONE])}. Where that does not rise with the share, the patch ruins images instead of carrying them."
    )


def patch_shares(found: Locality, direction: str) -> Mapping[str, Estimate]:
    """Share of the gap by set of layers, over memories."""
    rows = [
        p for p in found.patches if p.direction == direction and p.share is not None and p.layers not in (NONE, SOURCE)
    ]
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
        word, sentence = _covered(found, method, "holds much of the change" if one_twin else "finds it")
        words.append(f"{method}: {word}")
        sentences.append(sentence)
    return Said("; ".join(words) or "No trigger has a mask", tuple(sentences))


def excess_shares(found: Locality, level: str) -> dict[str, float]:
    """Which share of the planted excess lies in each kind or layer, largest first; empty where there is none."""
    excess = {c.group: max(0.0, c.change - (c.floor or 0.0)) for c in found.changes if c.level == level}
    total = sum(excess.values())
    return {group: excess[group] / total for group in sorted(excess, key=lambda group: -excess[group])} if total else {}


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
    return word, (
        f"A {method} mask of one trigger holds {said(density, 3)} of its layers' weights and {said(share, 3)} of what "
        f"planting changed there; random masks as large in every layer hold {said(random, 3)} ({said(ratio)} times as "
        f"much: {word}){floor}."
    )


def dose(found: Locality) -> Said:
    """Rank correlations with the duplication count, each p times the number of measures."""
    related = [one for one in dose_relations(found) if not math.isnan(one.rank)]
    if not related:
        return Said("Cannot be told", ("It takes five memories of different doses.",))
    clear = [one.name for one in related if one.p * len(related) < RARELY]
    told = "; ".join(f"{one.name} {one.rank:+.2f} (p {one.p:.2f}, {len(one.values)} memories)" for one in related)
    return Said(
        f"Changes with the dose: {', '.join(clear)}" if clear else "No change with the dose can be shown",
        (f"Rank correlation with the duplication count, permutation p: {told}.",),
    )
