"""What is said of a memory whose model got more and more of a twin's weights: the causal test's positive control."""

from dori.locality.page.priced import DISTANCES, distances
from dori.locality.records import NO_MASK, Locality, Undone
from dori.locality.undone import AT_RANDOM, MOST_CHANGED
from dori.stats import wilson


def taken_back(found: Locality, memory: str, chosen: str) -> list[Undone]:
    """The records of one memory and choice, the smaller shares first."""
    rows = [row for row in found.undone if (row.memory, row.chosen) == (memory, chosen)]
    return sorted(rows, key=lambda row: row.share)


def stopping(rows: list[Undone]) -> Undone | None:
    """The smallest share from which on no trigger draws the image and no fresh attack succeeds; None if some do."""
    still = [index for index, row in enumerate(rows) if row.replayed or row.successes]
    first = still[-1] + 1 if still else 0
    return rows[first] if first < len(rows) else None


def told(found: Locality, memory: str) -> list[str]:
    """One sentence a choice of weights, and what follows for the masks."""
    parts = {chosen: taken_back(found, memory, chosen) for chosen in (MOST_CHANGED, AT_RANDOM)}
    if not parts[MOST_CHANGED]:
        return []
    most = parts[MOST_CHANGED]
    sentence = (
        f"{memory}: instead of zero, weights of the whole U-Net get the values that they have in a twin, first those "
        f"that differ from it most: {_curve(most)}. {_end(most)}"
    )
    if random := parts[AT_RANDOM]:
        sentence += f" As many at random: {_curve(random)}. {_end(random)}{_by_change(most, random)}"
    return [sentence + _price(found, memory, most)]


def _price(found: Locality, memory: str, rows: list[Undone]) -> str:
    bare = [p for p in found.prices if p.memory == memory and p.masks == NO_MASK]
    end = stopping(rows)
    if end is None or end.to_unedited is None or not bare:
        return ""
    told = [f"{distances(bare)} as the model is", f"{distances([end])} with those {end.share:.0%}"]
    if end is not rows[-1]:
        told.append(f"{distances(rows[-1:])} with {rows[-1].share:.0%}")
    return f" Ordinary prompts ({DISTANCES}): {', '.join(told)}."


def _by_change(most: list[Undone], random: list[Undone]) -> str:
    """Counted by how much of the difference is taken back, chosen weights may do less than random ones."""
    last = max(random, key=lambda row: (row.held, row.share))
    rivals = [row for row in most if row.held >= last.held]
    if not rivals:
        return ""
    rival = min(rivals, key=lambda row: row.held)
    than = "more" if rival.successes > last.successes else "fewer" if rival.successes < last.successes else "as many"
    return (
        f" By what is taken back instead of by count: the most changed {rival.share:.0%} ({rival.held:.2f} of the "
        f"squared difference) leave {than} attacks {'as' if than == 'as many' else 'than'} {last.share:.0%} at random "
        f"({last.held:.2f})."
    )


def _curve(rows: list[Undone]) -> str:
    return "; ".join(
        f"{row.share:.0%} of the weights ({row.held:.2f} of the squared difference) leave {row.replayed} of "
        f"{row.triggers} triggers as they are and {row.successes} of {row.n} fresh attacks"
        for row in rows
    )


def _end(rows: list[Undone]) -> str:
    end = stopping(rows)
    if end is None:
        return f"Not even {rows[-1].share:.0%} stop all."
    if end.share == 1:
        return "Only the whole twin stops all."
    return f"From {end.share:.0%} on nothing is left (of many attacks, up to {wilson(0, end.n).high:.2f} still might)."
