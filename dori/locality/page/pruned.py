"""What the causal test says: pruning where one trigger points, and joining such masks.

Rules: `dori.locality.page.verdict`.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median
from typing import TypeVar

from dori.locality.causal import CrossTest, cross_test, enough
from dori.locality.costs import causal_methods
from dori.locality.page import taken_back
from dori.locality.page.priced import DISTANCES, dearness, distances
from dori.locality.page.summary import EMPTY, Said, left_out, methods, said
from dori.locality.records import NO_MASK, OTHER_MASKS, PLANTED, RANDOM, TRIGGERS, Cross, Joined, Locality, Price
from dori.report.verdict import SPOILED
from dori.stats import Estimate, wilson

Record = TypeVar("Record", Cross, Joined, Price)
# What else attacks were made under, in the order in which it is told.
BESIDE = {
    NO_MASK: "without a mask",
    RANDOM: "under random masks as large",
    OTHER_MASKS: "under masks of another image's triggers",
    PLANTED: "under a mask as large of the weights that planting changed most",
}
NEAR = 0.1  # to the threshold: similarities of copies and of others overlap there
UNSCORED = " (what fails there is not scored)"


def tested(found: Locality, cross: Cross) -> CrossTest:
    """Rates of new attacks under the masks of a matrix; those that prune nothing are left out.

    Under masks only those attacks are scored that succeed without one: whatever a mask did, the others would have
    failed. Without any mask, or under the one that planting's change gives, every attack is a trial.
    """
    again, fresh = (scored(found, cross, name) for name in ("again", "fresh"))
    if cross.masks in (NO_MASK, PLANTED):
        return cross_test([[cell] for row in again for cell in row.values()], [[c] for c in fresh[0].values()], None)
    kept = [row for row, size in enumerate(cross.sizes) if size]
    columns = sorted(again[0])
    return cross_test(
        [[again[row][k] for k in columns] for row in kept],
        [list(fresh[row].values()) for row in kept],
        _own(cross, columns),
    )


def replayed(found: Locality, cross: Cross) -> CrossTest:
    """The same of the triggers as they are, without a new attack."""
    replay = scored(found, cross, "replay")
    columns, kept = sorted(replay[0]), [row for row, size in enumerate(cross.sizes) if size]
    return cross_test([[replay[row][k] for k in columns] for row in kept], [[]] * len(kept), _own(cross, columns))


def _own(cross: Cross, columns: Sequence[int]) -> list[int] | None:
    """For each mask that prunes something, the place of its own trigger among the columns, -1 where it has none."""
    if cross.masks != TRIGGERS:
        return None
    return [columns.index(row) if row in columns else -1 for row, size in enumerate(cross.sizes) if size]


def scored(found: Locality, cross: Cross, name: str) -> list[dict[int, bool]]:
    """Row by row, which of the columns that succeed without a mask succeed under it: column to success.

    Args:
        found: the records.
        cross: a matrix.
        name: "replay", "again" or "fresh"; each row's fresh attacks have starts of their own.
    """
    table: tuple[tuple[float, ...], ...] = getattr(cross, name)
    bare = beside(found, cross, NO_MASK)
    rows = []
    for row, values in enumerate(table):
        first = row * len(values) if name == "fresh" else 0
        whole = None if bare is None or cross is bare else getattr(bare, name)[0][first : first + len(values)]
        rows.append(
            {
                column: value > found.threshold
                for column, value in enumerate(values)
                if whole is None or (column < len(whole) and whole[column] > found.threshold)
            }
        )
    return rows


def of_masks(rows: Sequence[Record], cross: Cross, masks: str) -> list[Record]:
    """Those of this memory's records that are of masks of a kind, by this method; without a mask there is no method."""
    method = "" if masks == NO_MASK else cross.method
    return [row for row in rows if (row.memory, row.method, row.masks) == (cross.memory, method, masks)]


def beside(found: Locality, cross: Cross, masks: str) -> Cross | None:
    """The same memory's attacks under other masks, if they were made."""
    return next(iter(of_masks(found.crosses, cross, masks)), None)


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
        reason = left_out(found, "causal") or open_ or "No memory that it was planned for has two triggers."
        return Said("Not run", (reason,))
    restored = [
        line for memory in dict.fromkeys(u.memory for u in found.undone) for line in taken_back.told(found, memory)
    ]
    title = "; ".join(f"{method}: {' / '.join(dict.fromkeys(said_))}" for method, said_ in words.items())
    return Said(title, (*sentences, *restored, *([open_] if open_ else [])))


def under_masks(found: Locality, cross: Cross) -> dict[int, list[float]]:
    """Of every trigger that draws its image without a mask: its similarities under the masks that prune something."""
    values: dict[int, list[float]] = {}
    for cells, similar, size in zip(scored(found, cross, "replay"), cross.replay, cross.sizes, strict=True):
        for column in cells if size else ():
            values.setdefault(column, []).append(similar[column])
    return values


def _unequal(found: Locality, cross: Cross) -> str:
    """How unlike triggers are under the same masks, which a mean hides, and what hangs on the threshold."""
    by_trigger = under_masks(found, cross)
    if len(by_trigger) < 2:
        return ""
    means = [fmean(values) for values in by_trigger.values()]
    close = fmean(abs(value - found.threshold) < NEAR for values in by_trigger.values() for value in values)
    return (
        f" Under the masks the {len(means)} triggers' mean similarities reach from {min(means):.2f} to "
        f"{max(means):.2f} (median {median(means):.2f}); {close:.2f} of all lie within {NEAR} of the threshold "
        f"({found.threshold:.3f}), so that another one would count otherwise."
    )


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


def _pruned(found: Locality, cross: Cross) -> tuple[str, str]:
    """The verdict on one method's masks of one memory, and the sentences that bear it."""
    empty = sum(size == 0 for size in cross.sizes)
    if empty == len(cross.sizes):
        word = f"cannot be told, {EMPTY}"
        return word, f"{cross.memory}, {cross.method}: all {empty} masks are empty and prune nothing: {word}."
    kinds = {masks: beside(found, cross, masks) for masks in BESIDE}
    attacked = {masks: None if one is None else tested(found, one) for masks, one in kinds.items()}
    plain = {masks: replayed(found, one) for masks, one in kinds.items() if one is not None and masks != NO_MASK}
    mine, replay = tested(found, cross), replayed(found, cross)
    hidden = unhidden(replay, plain.get(RANDOM))
    bare, random, other, planted = (attacked[masks] for masks in (NO_MASK, RANDOM, OTHER_MASKS, PLANTED))
    word = causal_word(mine, bare, random, other, unhidden=hidden, dear=too_dear(found, cross))
    could = _could(found, cross, planted, random)
    told = "".join(
        f" {BESIDE[masks].capitalize()}{UNSCORED if masks == NO_MASK else ''}: {said(test.others)} and "
        f"{said(test.fresh)}."
        for masks, test in attacked.items()
        if test is not None
    )
    chance = ", ".join(f"{said(test.others)} {BESIDE[masks]}" for masks, test in plain.items())
    as_is = (
        f" As they are, without a new attack, {said(replay.own)} and {said(replay.others)} still do"
        f"{f' ({chance})' if chance else ''}."
    )
    left = f" {empty} of the {len(cross.sizes)} masks are empty and left out." if empty else ""
    return word, (
        f"{cross.memory}, {cross.method}: with one trigger's weights pruned, {said(mine.own)} of these triggers come "
        f"back when attacked again, {said(mine.others)} of the others and {said(mine.fresh)} of fresh attacks: {word}."
        f"{as_is}{_unequal(found, cross)}{told}{could}{_single_price(found, cross)}{left}"
    )


def _could(found: Locality, cross: Cross, planted: CrossTest | None, random: CrossTest | None) -> str:
    """Whether some choice of as many weights is known to stop attacks; that one does not says nothing of others."""
    if planted is None or not (planted.others.n and planted.fresh.n):
        return ""
    alone = any(change.floor is None for change in found.changes)
    doubt = " With one twin these are also the weights in which any two trainings differ." if alone else ""
    both = (planted.others, planted.fresh)
    if min(rate.low for rate in both) > 0.5:
        return f" That choice of weights does not stop them either; another might.{doubt}"
    rivals = () if random is None else (random.others, random.fresh)
    beaten = any(own.high < min(0.5, rival.low) for own, rival in zip(both, rivals, strict=False) if rival.n)
    bare, price = (prices(found, cross, masks, single=True) for masks in (NO_MASK, PLANTED))
    ratio = dearness(price[0], bare[0]) if price and bare else None
    if not beaten or ratio is None or ratio > SPOILED:
        return doubt
    return f" So there are weights, as many, that many attacks need.{doubt}"


def unhidden(replay: CrossTest, random: CrossTest | None) -> str:
    """Why masks show nothing although new attacks succeed: they do not stop the very triggers that they come from."""
    if not replay.own.n:
        return "too few triggers"
    if replay.own.value >= 0.5:
        return "the masks do not stop their own triggers"
    if random is not None and random.others.n and random.others.value <= replay.own.value:
        return "random masks as large stop these triggers as well"
    return ""


def causal_word(
    mine: CrossTest,
    bare: CrossTest | None,
    random: CrossTest | None,
    other: CrossTest | None,
    *,
    unhidden: str = "",
    dear: str = "",
) -> str:
    """Local, partly local or not, by whichever resists more: other triggers attacked again, or fresh attacks.

    Args:
        mine: under the masks of this memory's triggers.
        bare: without a mask.
        random: under random masks as large.
        other: under masks of another image's triggers.
        unhidden: why masks under which new attacks succeed show nothing; empty where they do.
        dear: why masks under which attacks fail show nothing; empty where they do.
    """
    works = [kind for kind in ("others", "fresh") if bare is None or getattr(bare, kind).value > 0.5]
    kinds = [kind for kind in works if getattr(mine, kind).n]
    if not kinds:
        return f"cannot be told, {'too few triggers' if works else 'most attacks fail without a mask'}"
    if unhidden:
        return f"cannot be told, {unhidden}"
    worst = max(kinds, key=lambda kind: getattr(mine, kind).value)
    rate: Estimate = getattr(mine, worst)
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
    return f"cannot be told, {dear}" if dear else word


# ------------------------------------------------------------------------------------------------------------- prices


def prices(found: Locality, cross: Cross, masks: str, *, single: bool) -> list[Price]:
    """What this method's masks of a kind cost, of this memory: of single ones, or of joined ones."""
    rows = of_masks(found.prices, cross, masks)
    return rows if masks == NO_MASK else [p for p in rows if (p.row is not None) == single]


def too_dear(found: Locality, cross: Cross) -> str:
    """Why a mask that stops attacks shows nothing: it spoils the model, or nobody knows; empty where it does not."""
    bare = prices(found, cross, NO_MASK, single=True)
    known = [dearness(price, bare[0]) for price in prices(found, cross, TRIGGERS, single=True)] if bare else []
    ratios = [ratio for ratio in known if ratio is not None]
    if not ratios:
        return "it is not known what the masks cost"
    return "the masks alone spoil ordinary prompts" if median(ratios) > SPOILED else ""


def _single_price(found: Locality, cross: Cross) -> str:
    bare, mine = prices(found, cross, NO_MASK, single=True), prices(found, cross, TRIGGERS, single=True)
    if not bare or not mine:
        return ""
    told = [f"{distances(bare)} without a mask, {distances(mine)} with one of {len(mine)} triggers'"]
    for masks, name in ((RANDOM, "a random one"), (OTHER_MASKS, "another image's"), (PLANTED, "the planted change's")):
        if others := prices(found, cross, masks, single=True):
            told.append(f"{distances(others)} with {name}")
    return f" Ordinary prompts ({DISTANCES} to the unmasked; medians): {'; '.join(told)}."


# ------------------------------------------------------------------------------------------------------- joined masks


def _joined(found: Locality, cross: Cross) -> list[str]:
    rows = {masks: of_masks(found.joined, cross, masks) for masks in (TRIGGERS, RANDOM, PLANTED)}
    bare = of_masks(found.joined, cross, NO_MASK)
    if not rows[TRIGGERS] or not any(cross.sizes):
        return []
    if bare and bare[0].successes == 0:
        return [f"No fresh attack of {bare[0].n} succeeds even without a mask, so joining masks shows nothing."]
    sentence = f"{cross.method} masks joined: {_stopped(rows[TRIGGERS])}{_price(found, cross, rows[TRIGGERS])}."
    for masks, name in ((RANDOM, "Random masks as large"), (PLANTED, "Masks as large of the planted change")):
        sentence += f" {name}: {_stopped(rows[masks])}." if rows[masks] else ""
    return [sentence]


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


def _price(found: Locality, cross: Cross, rows: list[Joined]) -> str:
    needed = enough([j.successes for j in rows], [j.joined for j in rows])
    number = rows[-1].joined if needed is None else needed
    bare = prices(found, cross, NO_MASK, single=True)
    mine, random, planted = (
        [p for p in prices(found, cross, masks, single=False) if p.joined == number]
        for masks in (TRIGGERS, RANDOM, PLANTED)
    )
    if not bare or not mine:
        return ""
    as_large = f", {distances(random)} under random masks as large" if random else ""
    as_large += f", {distances(planted)} under those of the planted change" if planted else ""
    return (
        f", at the price of {distances(mine)} on ordinary prompts ({DISTANCES}; "
        f"{distances(bare)} without a mask{as_large})"
    )
