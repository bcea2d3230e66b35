"""Who is analysed: some memories of an audit's subjects, beside their prompts and ordinary ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

from dori.audit.judge import Case
from dori.audit.loop import Subjects
from dori.errors import DoriError
from dori.locality.bench import Bench, Source, encoded
from dori.locality.costs import Sizes
from dori.locality.patching import patch_sets
from dori.locality.plan import Plan
from dori.locality.records import ENOUGH, PROMPTED, Measure, known
from dori.locality.transplants import weight_sets
from dori.locality.triggers import similarities
from dori.run import cell_key
from dori.stats import by_turns, choose


@dataclass(frozen=True, slots=True, eq=False)
class Sets:
    """The analysed memories and the sets of embeddings that every memory is compared with.

    Args:
        cases: the analysed memories.
        prompted: memories whose prompts are the reference of the paper, if they bring their images back.
        memorized: those prompts, different ones; more than are wanted, since some may bring nothing back.
        ordinary: prompts that belong to no memory.
        foreign: further ones, where attacks begin.
        calibration: further ones, for NeMo's statistics.
        quality: further ones, for what masks cost.
    """

    cases: tuple[Case, ...]
    prompted: tuple[Case, ...]
    memorized: Source
    ordinary: Source
    foreign: Source
    calibration: Source
    quality: tuple[str, ...]


def choose_sets(subjects: Subjects, plan: Plan) -> Sets:
    """Choose from an audit's subjects; verbatim memories where there are any, since MR does not judge templates.

    Reference prompts are different texts, and no ordinary one is a memory's.

    Raises:
        DoriError: no memory, fewer than two memorized prompts, too few ordinary prompts, or one that is too long.
    """
    pool = [case for case in subjects.memories if case.memory.kind == "verbatim"] or list(subjects.memories)
    texts = _texts(pool) if len(_texts(pool)) > 1 else _texts(subjects.memories)
    if len(texts) < 2:
        raise DoriError(
            f"locality compares triggers of one memory with the prompts of others, and the memories have "
            f"{len(texts)} different texts; give a folder with at least two texts in metadata.jsonl"
        )
    ordinary = [text for text in dict.fromkeys(subjects.ordinary) if text not in _texts(subjects.memories)]
    # Foreign starts last, so that fewer attacks leave all other prompts as they are.
    parts = _parts(ordinary, (plan.set_size, plan.calibration_prompts, plan.quality_prompts, plan.foreign))
    subjects.model.check_prompts([text for part in parts for text in part])  # now, not after hours of attacks
    reference, calibration, foreign = (encoded(subjects.model, parts[part]) for part in (0, 1, 3))
    first = choose(len(texts), plan.set_size)
    spare = sorted({*range(len(texts))} - {*first})[: plan.set_size]
    memorized = [texts[index] for index in (*first, *spare)]
    return Sets(
        tuple(_analysed(pool, plan.memories)),
        tuple(case for text in memorized for case in subjects.memories if case.memory.text == text),
        encoded(subjects.model, memorized),
        reference,
        foreign,
        calibration,
        tuple(parts[2]),
    )


def keep_memorized(bench: Bench, sets: Sets) -> tuple[Sets, Measure]:
    """The sets with those memorized prompts alone that bring an image of theirs back, and the share that does.

    A prompt whose image the model does not return is no memorized one, whatever the folder says; further ones are tried
    until there are as many as are wanted. Where fewer than two are found the first ones stay, since nothing could be
    compared, and the share says so.
    """
    wanted, seeds, tried = bench.plan.set_size, bench.plan.fresh_seeds(), dict[str, bool]()
    for case in sets.prompted:
        text = str(case.memory.text)
        if sum(tried.values()) >= wanted and text not in tried:
            break
        similar = similarities(bench, cell_key("memorized", case.memory.id), case, encoded(bench.model, [text]), seeds)
        tried[text] = tried.get(text, False) or bool(bench.replicates(similar)[0])
    replicating = [text for text, back in tried.items() if back]
    share = Measure("", PROMPTED, known(len(replicating) / len(tried)), len(tried))
    kept = replicating if len(replicating) > 1 else list(tried)[:wanted]
    return replace(sets, memorized=encoded(bench.model, kept)), share


def _texts(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(case.memory.text for case in cases if case.memory.text is not None))


def _analysed(pool: Sequence[Case], limit: int) -> list[Case]:
    """Memories spread over the doses; few ones, of which no relation to the dose can be told, the most duplicated.

    One of each dose after another, highest first, so that the memories of a run that is stopped are spread too.
    """
    by_dose = sorted(pool, key=lambda case: -(case.memory.dose or 0))  # stable
    if limit < ENOUGH:
        return by_dose[:limit]
    chosen = [by_dose[index] for index in choose(len(pool), limit)]
    return by_turns(list(same) for _, same in groupby(chosen, key=lambda case: case.memory.dose or 0))


def _parts(prompts: Sequence[str], wanted: Sequence[int]) -> list[list[str]]:
    """Consecutive shares of the prompts, so that no prompt serves two uses; all smaller where there are too few.

    Raises:
        DoriError: there are not even two for each use.
    """
    share = min(1.0, len(prompts) / sum(wanted))
    counts = [min(count, max(2, int(share * count))) for count in wanted]
    if sum(counts) > len(prompts):
        raise DoriError(
            f"locality needs ordinary prompts for its reference set, foreign starts and NeMo's statistics, "
            f"and {len(prompts)} are too few; give more texts with --ordinary"
        )
    ends = list(accumulate(counts))
    return [list(prompts[end - count : end]) for end, count in zip(ends, counts, strict=True)]


def sizes(subjects: Subjects, sets: Sets) -> Sizes:
    """What decides about the cost."""
    return Sizes(
        tuple((case.memory.id, case.memory.text is not None) for case in sets.cases),
        tuple(case.memory.id for case in sets.prompted),
        len(sets.memorized),
        len(sets.ordinary),
        len(sets.foreign),
        len(sets.calibration),
        len(patch_sets(subjects.model)),
        len(weight_sets(subjects.model)),
        len(subjects.twins),
        len(sets.quality),
        subjects.held_out is not None,
    )
