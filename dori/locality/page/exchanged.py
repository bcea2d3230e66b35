"""What exchanged weights say: which kinds the memory's image is lost with, and what it outlasts.

Rules: `dori.locality.page.verdict`.
"""

import math
from collections.abc import Mapping, Sequence

from dori.locality.page.intervened import HALF, doubt, each, patch_shares, patched
from dori.locality.page.observed import scope
from dori.locality.page.summary import Said, ends, excess_shares, left_out, over_memories, said
from dori.locality.patching import NECESSARY, SUFFICIENT, TOGETHER
from dori.locality.records import ENOUGH, Locality
from dori.locality.transplants import CONTROL, part_of
from dori.stats import Estimate

LARGE, OUTLASTED = 0.1, 0.2  # of the change that is much; of the gap that is hardly missed


def change_shares(found: Locality) -> dict[str, float]:
    """Which share of the planted change lies in what changes places together, largest first."""
    shares: dict[str, float] = {}
    for group, share in excess_shares(found, "kind").items():
        shares[part_of(group)] = shares.get(part_of(group), 0.0) + share
    return dict(sorted(shares.items(), key=lambda one: -one[1]))


def kept_between(found: Locality, name: str) -> Estimate:
    """How alike a twin's images stay to its own with another twin's weights, for the memories whose images are told of.

    Neither holds a memory: what is lost there any other weights may lose.
    """
    counted = {p.memory for p in found.transplants if p.share is not None}
    return over_memories(p.kept for p in patched(found.transplants, CONTROL, name) if p.memory in counted)


def transplants(found: Locality) -> Said:
    """The kinds of weights with which the memory's image is lost, and those that it outlasts though they changed."""
    if not found.transplants:
        older = "These records are older than the exchange of weights." * bool(found.patches)
        return Said("Not run", (left_out(found, "patch_seeds") or older or "It needs a twin, and a memory's prompt.",))
    shares = {direction: _shares(found, direction) for direction in (NECESSARY, SUFFICIENT)}
    taken, brought = (patch_shares(found.transplants, direction) for direction in shares)
    if not taken or not brought:
        return Said("Cannot be told", ("The planted model hardly draws the memories more alike than its twin does.",))
    change = change_shares(found)
    losing = _carrying(taken, shares[NECESSARY])
    kinds = {_kind(name) for name in losing if not name.startswith(TOGETHER)}
    losing = [name for name in losing if name.removeprefix(TOGETHER) not in kinds]  # a whole is told if no part is
    outlasted = [
        name
        for name, share in change.items()
        if share >= LARGE and max(shares[NECESSARY].get(name, [math.inf])) < OUTLASTED
    ]
    bringing = _carrying(brought, shares[SUFFICIENT])
    mixed = [
        name
        for name in taken
        if not name.startswith(TOGETHER) and name not in losing and max(shares[NECESSARY][name]) >= HALF
    ]
    counted = ", ".join(f"{name} ({_lost(shares[NECESSARY][name])})" for name in mixed)
    much = "they differ much from the twin's" if _one_twin(found) else "planting changed them much"
    title = "; ".join(
        (
            "with the twin's weights lost by " + (_named(found, NECESSARY, losing) or "no kind alone"),
            *([f"in some memories by {counted}"] if mixed else []),
            *([f"each alone outlasted, though {much}: {', '.join(outlasted)}"] if outlasted else []),
            "brought into the twin by " + (_named(found, SUFFICIENT, bringing) or "no kind alone"),
        )
    )
    large = (name for name, share in change.items() if share >= LARGE and name in taken)
    told = dict.fromkeys([*losing, *mixed, *large])
    most = max(brought, key=lambda name: brought[name].value)
    losses = "; ".join(_taken(found, name, taken[name], change) for name in told)
    sentences = (
        "Each memory is drawn from its own prompt. With the twin's weights of one kind in it the planted model loses "
        f"so much of the gap between the models: {losses}; "
        f"the planted weights of one kind bring into the twin at most {said(brought[most])} ({most}).",
        _control(found, list(told)),
        "What outlasts the exchange does so alone, for its own prompt: together with others, or against new attacks, "
        "it may not. What is lost need not be stored there: kinds were trained with one another."
        + " The share of the change is that of model and twin: what any training changes is in it."
        * _one_twin(found),
    )
    memories = len({p.memory for p in found.transplants if p.share is not None})
    title = f"{scope(memories)}{title}"
    return Said(title[0].upper() + title[1:], tuple(sentence for sentence in sentences if sentence))


def _shares(found: Locality, direction: str) -> dict[str, list[float]]:
    """Shares of the gap memory by memory, by set."""
    shares: dict[str, list[float]] = {}
    for p in found.transplants:
        if p.direction == direction and p.share is not None:
            shares.setdefault(p.layers, []).append(p.share)
    return shares


def _carrying(estimates: Mapping[str, Estimate], shares: Mapping[str, Sequence[float]]) -> list[str]:
    """Sets that make half of the gap: with the whole interval, or, where there is none, in every memory."""
    return [
        name
        for name, estimate in estimates.items()
        if (ends(estimate)[0] if estimate.n >= ENOUGH else min(shares[name])) >= HALF
    ]


def _lost(shares: Sequence[float]) -> str:
    return f"{sum(share >= HALF for share in shares)} of {len(shares)}"


def _kind(part: str) -> str:
    return part.rpartition(", ")[0]


def _named(found: Locality, direction: str, names: Sequence[str]) -> str:
    return ", ".join(f"{name}{doubt(found.transplants, direction, name)}" for name in names)


def _one_twin(found: Locality) -> bool:
    return any(c.floor is None for c in found.changes)


def _taken(found: Locality, name: str, estimate: Estimate, change: Mapping[str, float]) -> str:
    holds = f", {change[name]:.2f} of the change" if name in change else ""
    return f"{name} {said(estimate)}{each([p.share for p in patched(found.transplants, NECESSARY, name)])}{holds}"


def _control(found: Locality, names: Sequence[str]) -> str:
    """The same exchange where no memory is."""
    kept = {name: kept_between(found, name) for name in names}
    told = ", ".join(f"{name} {said(estimate)}" for name, estimate in kept.items() if estimate.n)
    if not told:
        return "How much of any image such an exchange loses is not known: that takes a second twin."
    return (
        "Between the twins, which hold no memory, the same exchange leaves images alike to those before it by: "
        f"{told}. Where that is low any image is lost so, and a lost memory says nothing of where it was."
    )
