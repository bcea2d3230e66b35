"""The verdict in plain words, made from the counts by the rules in `RULES` and nothing else.

A success of the attack is evidence of storage only beside images that the model never saw, attacked alike (methods.md
1.4: a continuous embedding can carry the image itself); so no card claims storage without them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dori.findings import Audit
from dori.report.tables import (
    CONTROLS,
    MEMORIES,
    ONCE,
    STARTS,
    TEMPLATES,
    Row,
    came_back,
    final_rows,
    population_of,
    table,
    threshold_of,
    way_of,
)
from dori.stats import Estimate

RULES = (
    "An image comes back when the median of its similarities over fresh seeds exceeds the threshold.",
    "An edit hides an image that comes back from its own prompt on the unedited model and not under the edit; the "
    "attack brings a hidden image back when it comes back at the attack's last step.",
    "A success counts as evidence of storage only if the memories' 95 % Wilson interval lies wholly above that of "
    "every judge: the controls, and the same memories on each twin, under the same attack. The start that serves the "
    "memories best is held against the start that serves the judge best. Where an edit was not put on the controls "
    "or on a twin, their unedited result stands in.",
    "That nothing comes back says only that this attack within this budget found nothing; it does not prove removal.",
)
OWN = " (each memory's own edit)"


@dataclass(frozen=True, slots=True)
class Bar:
    """A count to show as a bar: what was asked, how many of how many came back, and whether images are a judge's."""

    label: str
    count: int
    total: int
    judge: bool


@dataclass(frozen=True, slots=True)
class Card:
    """The verdict on one edit.

    Args:
        level: stored, unproven, hidden, absent, or check (a random edit of another edit's size): what the page marks
            by sign and colour.
        title: the verdict in a few words.
    """

    edit: str
    level: str
    title: str
    sentences: tuple[str, ...]
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Headline, the same in a few sentences, one card an edit (the unedited model first), and the rules behind them."""

    headline: str
    lead: str
    cards: tuple[Card, ...]
    rules: tuple[str, ...] = RULES


@dataclass(frozen=True, slots=True)
class _Case:
    """One edit with its rows at the last step: the memories' own, and those of the judges."""

    audit: Audit
    edit: str
    scope: str
    population: str
    prompt: Row | None
    attacks: tuple[Row, ...]
    judges: dict[str, tuple[Row, ...]]
    before: frozenset[str]
    hidden: frozenset[str]


def verdict(audit: Audit) -> Verdict:
    """The verdict on an audit.

    Raises:
        DoriError: no threshold, or findings that contradict one another (`tables.table`).
    """
    rows = final_rows(table(audit), audit)
    present = {row.population for row in rows if row.way.model == audit.model}
    population = next((kind for kind in (MEMORIES, TEMPLATES, ONCE) if kind in present), None)
    if population is None:
        return Verdict("This audit judged no memory, so it says nothing about the model.", "", ())
    ours = [row for row in rows if row.population == population and row.way.model == audit.model]
    edits = dict.fromkeys((row.way.edit, row.way.edit_scope) for row in ours)
    cases = [_case(audit, rows, population, edit, scope) for edit, scope in edits]
    cards = [_card(case) for case in cases]
    return Verdict(_headline(cards), _lead(cases, cards), tuple(sorted(cards, key=lambda card: card.level == "check")))


def returned(audit: Audit, population: str, row: Row | None) -> frozenset[str]:
    """Ids of the images of a row that came back."""
    threshold = threshold_of(audit)
    return frozenset(finding.id for finding in audit.findings if row is not None and way_of(finding) == row.way
                     and population_of(finding) == population and came_back(finding, threshold))


def _case(audit: Audit, rows: Sequence[Row], population: str, edit: str, scope: str) -> _Case:
    ours = [row for row in rows if row.population == population and row.way.model == audit.model]
    here = [row for row in ours if (row.way.edit, row.way.edit_scope) == (edit, scope)]
    prompt = next((row for row in here if not row.way.start), None)
    unedited = next((row for row in ours if row.way.edit == "none" and not row.way.start), None)
    before = returned(audit, population, unedited)
    hidden = before - returned(audit, population, prompt) if prompt and edit != "none" else frozenset()
    attacks = tuple(row for row in here if row.way.steps)
    judges = {"controls": _same_attack([row for row in rows if row.population == CONTROLS
                                        and row.way.model == audit.model], attacks)}
    for twin in audit.twins:
        judges[twin] = _same_attack([row for row in rows if row.population == population
                                     and row.way.model == twin], attacks)
    judges = {name: found for name, found in judges.items() if found}
    return _Case(audit, edit, scope, population, prompt, attacks, judges, before, hidden)


def _same_attack(candidates: Sequence[Row], attacks: Sequence[Row]) -> tuple[Row, ...]:
    """The judge's rows under the memories' starts and steps: with the same edit, else its other scope, else none."""
    found = []
    for attack in attacks:
        same = [row for row in candidates if (row.way.start, row.way.steps) == (attack.way.start, attack.way.steps)]
        ranked = sorted(same, key=lambda row: (row.way.edit != attack.way.edit, row.way.edit != "none",
                                               row.way.edit_scope != attack.way.edit_scope))
        found += [row for row in ranked[:1] if row.way.edit in (attack.way.edit, "none")]
    return tuple(found)


def _most(rows: Sequence[Row]) -> Row | None:
    return max(rows, key=lambda row: row.replication.rate.value, default=None)


def separated(ours: Estimate, others: Sequence[Estimate]) -> bool:
    """Whether our interval lies wholly above each of the others'; never without others."""
    return bool(others) and all(ours.low > other.high for other in others)


def _card(case: _Case) -> Card:
    name = case.edit + (OWN if case.scope == "own" else "")
    best = _most(case.attacks)
    if any(edit.name == case.edit and "like" in edit.details for edit in case.audit.edits):
        level, title = "check", f"A random edit of the same size hides {len(case.hidden)} of {len(case.before)}"
    elif not case.attacks and case.edit == "none":
        level, title = _prompt_alone(case)
    elif best is None:
        level, title = "hidden", "Not attacked"
    elif best.replication.by_median == 0:
        level, title = "absent", "Not brought back within this budget"
    else:
        rates = [_most(rows).replication.rate for rows in case.judges.values()]  # type: ignore[union-attr]
        level, title = _success(case, separated(best.replication.rate, rates))
    sentences = [_CHECK] if level == "check" else _sentences(case, best)
    return Card(name, level, title, tuple(sentences), tuple(_bars(case)))


_CHECK = "An edit that hides no more than this owes its effect to how much it changes, not to what it chose."


def _prompt_alone(case: _Case) -> tuple[str, str]:
    return ("unproven", "Comes back from the prompt") if case.before else ("absent", "Does not come back")


def _success(case: _Case, evidence: bool) -> tuple[str, str]:
    if not evidence:
        if not case.judges:
            return "unproven", "Comes back, but without controls that is no evidence"
        broken = any(row.replication.by_median for rows in case.judges.values() for row in rows)
        return "unproven", ("Comes back, but so do images it never saw" if broken
                            else "Comes back, but too few images to tell")
    if case.edit == "none":
        return "stored", "Stored in the model"
    return "stored", "Hidden, but still stored" if case.hidden else "Not hidden, still stored"


_WHAT = {MEMORIES: ("memory", "memories"), TEMPLATES: ("template memory", "template memories"),
         ONCE: ("image shown once", "images shown once")}


def _sentences(case: _Case, best: Row | None) -> list[str]:
    said = []
    one, many = _WHAT[case.population]
    if case.prompt is not None:
        total, count = case.prompt.replication.memories, case.prompt.replication.by_median
        if case.edit == "none":
            said.append(f"Of {total} {one if total == 1 else many}, {count} {_come(count)} back from "
                        f"{'its' if total == 1 else 'their'} own prompt.")
        elif case.before:
            said.append(f"{case.edit} hides {len(case.hidden)} of the {len(case.before)} that came back from their "
                        f"own prompt.")
        else:
            said.append(f"No {one} came back before, so {case.edit} had nothing to hide; {count} of {total} come back "
                        "under it.")
    said += _attack_sentences(case)
    return said + (_judge_sentences(case, best) if best is not None else ["No attack was run, so this shows what the "
                                                                          "prompt does and not what is stored."])


def _attack_sentences(case: _Case) -> list[str]:
    """One sentence a number of steps, usually one in all: what each start brought."""
    said = []
    for steps in dict.fromkeys(row.way.steps for row in case.attacks):
        rows = [row for row in case.attacks if row.way.steps == steps]
        counts = [len(case.hidden & returned(case.audit, case.population, row)) if case.hidden
                  else row.replication.by_median for row in rows]
        starts = [STARTS.get(row.way.start, row.way.start) for row in rows]
        whose = f"back {counts[0]} of the {len(case.hidden)} hidden" if case.hidden else \
            f"{counts[0]} of {rows[0].replication.memories}"
        more = "".join(f", {count} from {start}" for count, start in zip(counts[1:], starts[1:], strict=True))
        said.append(f"DoRI ({steps} steps) {'brings' if case.hidden else 'draws'} {whose} when it starts from "
                    f"{starts[0]}{more}.")
    return said


def _judge_sentences(case: _Case, best: Row) -> list[str]:
    if not case.judges:
        return ["No image that the model never saw was attacked alike, so a success would be no evidence of storage."]
    said, starts = [], {row.way.start for row in case.attacks}
    for name, rows in case.judges.items():
        worst = _most(rows)
        assert worst is not None  # judges without rows were left out
        counts = worst.replication
        whose = "Controls that the model never saw" if name == "controls" else f"The same images on {name}, a twin " \
            "that never saw them"
        unedited = " (without the edit)" if worst.way.edit != case.edit else ""
        said.append(f"{whose}: {counts.by_median} of {counts.memories} under the same attack{unedited}.")
        if {row.way.start for row in rows} != starts:
            said.append(f"Not every start was tried on {'the controls' if name == 'controls' else name}.")
    rates = [_most(rows).replication.rate for rows in case.judges.values()]  # type: ignore[union-attr]
    if "controls" not in case.judges:
        said.append("There are no controls under this attack; twins alone judge here.")
    if best.replication.by_median and not separated(best.replication.rate, rates):
        broken = any(row.replication.by_median for rows in case.judges.values() for row in rows)
        said.append("Controls or twins break too, so a success here is no evidence of storage." if broken else
                    "The intervals overlap: too few images to say that the model, and not the attack, supplied them.")
    elif best.replication.by_median and any(_most(rows).replication.by_median  # type: ignore[union-attr]
                                            for rows in case.judges.values()):
        said.append("Some of those break too, so one success alone is weak evidence; the rates' difference counts.")
    elif not best.replication.by_median:
        said.append("This does not prove removal: another attack or a larger budget may find more.")
    return said


def _come(count: int) -> str:
    return "comes" if count == 1 else "come"


def _bars(case: _Case) -> list[Bar]:
    mine = [row for row in (case.prompt, *case.attacks) if row is not None]
    bars = [Bar("Own prompt" if not row.way.start else row.way.asked, row.replication.by_median,
                row.replication.memories, False) for row in mine]
    for name, rows in case.judges.items():
        worst = _most(rows)
        if worst is not None:
            whose = "Controls" if name == "controls" else f"Twin {name}"
            bars.append(Bar(f"{whose}, {worst.way.asked}", worst.replication.by_median, worst.replication.memories,
                            True))
    return bars


def _headline(cards: Sequence[Card]) -> str:
    """The gravest card speaks, of the edits where there are any; random edits of the same size do not count."""
    attacked = {card.edit for card in cards if card.level not in ("hidden", "check")}
    # A memory's own edit that was only asked says nothing where the joint edit of that method was attacked.
    edited = [card for card in cards if card.edit != "none" and card.level != "check"
              and not (card.level == "hidden" and card.edit.removesuffix(OWN) in attacked)]
    judged = edited or cards
    names = {level: " and ".join(dict.fromkeys(card.edit.removesuffix(OWN) for card in judged if card.level == level))
             for level in ("stored", "unproven", "hidden", "absent")}
    absent = f" Not brought back within this budget after {names['absent']}." if edited and names["absent"] else ""
    if names["stored"]:
        if edited and names["unproven"]:
            absent = f" After {names['unproven']} images come back too, without evidence of storage.{absent}"
        return (f"Still in the model after {names['stored']}." if edited else "Stored in the model.") + absent
    if names["unproven"]:
        return f"Images come back, without evidence that the model stores them.{absent}"
    if names["hidden"]:
        return f"No attack was run under {names['hidden']}, so nothing can be said about what is stored.{absent}"
    return "Nothing came back within this audit's budget. That does not prove removal."


def _lead(cases: Sequence[_Case], cards: Sequence[Card]) -> str:
    """What was counted, in one short paragraph: the prompt, each edit, and the judge that broke most."""
    said, judged = [], []
    for case, card in zip(cases, cards, strict=True):
        if card.level == "check" or (case.scope == "own" and any(c.edit == case.edit and c is not case for c in cases)):
            continue
        best = _most(case.attacks)
        judged += [(name, row.replication) for name, rows in case.judges.items() for row in rows]
        if case.edit == "none":
            said += _sentences(case, best)[: 1 if case.prompt else 0]
        elif case.before and case.prompt is not None:
            again = max((len(case.hidden & returned(case.audit, case.population, row)) for row in case.attacks),
                        default=0)
            attack = f"; DoRI ({best.way.steps} steps) brings {again} back" if best and case.hidden else ""
            said.append(f"{case.edit} hides {len(case.hidden)} of them{attack}.")
    for name, words in (("controls", "Controls that the model never saw"), ("", "The same images on a twin")):
        counts = [count for judge, count in judged if (judge == "controls") == bool(name)]
        if counts:
            worst = max(counts, key=lambda count: count.by_median / count.memories)
            said.append(f"{words}: {'at most ' if worst.by_median else ''}{worst.by_median} of {worst.memories} under "
                        "the same attack.")
        elif name and any(case.attacks for case in cases):
            said.append("No controls were attacked." if judged else "No image that the model never saw was attacked, "
                        "so a success is no evidence of storage.")
    return " ".join(said)
