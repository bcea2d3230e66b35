"""Plain words by stated rules: the headline, on what the page rests, and every analysis in its order."""

from collections import Counter
from statistics import fmean

from dori.locality.page import exchanged, intervened, observed, pruned
from dori.locality.page.summary import Said
from dori.locality.records import ON_TWIN, PROMPTED, TRIGGERS, Locality
from dori.locality.triggers import ORDER

RULES = (
    "Only attacks whose image comes back under fresh seeds (median similarity above the threshold) count as triggers; "
    "with fewer than two of a memory nothing is compared for it.",
    "Intervals are 95 % bootstrap intervals over memories; with fewer than 5 memories the value stands alone and "
    "decides, and it is said in how many memories. An interval that crosses the border between two verdicts: "
    "cannot be told.",
    "Without an interval a value within 0.02 of a border is said to lie close to it.",
    "Embedding space: little is common to the moves where less than 0.1 of their mean square is common beyond what "
    "moves to different images from the same starts share (independent moves share nearly nothing, so a small share is "
    "not none), mostly one direction from 0.5 on, and a part is common between. Gaussian starts are far apart by "
    "construction, so distances between triggers decide nothing.",
    "Lines: triggers are not connected where the share of middle points that replicate lies below a half with its "
    "whole interval over memories. Else the region is so large that lines say nothing where that share on lines to "
    "ordinary prompts lies above a half with its whole interval, and triggers are connected where at least half of the "
    "middle points replicate, and more than on lines to ordinary prompts (intervals apart). Else it cannot be told.",
    "Balls: at least half of the points replicate up to the largest radius tried before the first at which their "
    "share, the mean over memories, lies below a half; its interval does not count.",
    "Activations: closer together or farther apart than triggers of different images from the same starts where the "
    "mean ratio of D lies below 0.9 or from 1.1 on, else about as far apart. Each layer and each step counts the same "
    "in that mean, however large its D. Prompts stand beside and do not judge, since Gaussian starts differ from them "
    "before any attack.",
    "Weights: between the higher reference (triggers of different images from the same starts, random masks of equal "
    "size) and the ceiling (the same trigger under other noise seeds), all of masks under different noises, agreement "
    "is not local below a tenth of the way, local from nine tenths on, partly local between. Where ceiling and "
    "reference are less than 0.05 apart, half of the masks are empty (a quarter of the pairs), or no other image has "
    "triggers from the same starts, nothing can be told. Prompts' masks met one noise; they stand beside. Pairs of two "
    "empty masks are left out of this comparison. Where less than half of NeMo's searches ended before their cap, the "
    "verdict says that its sets are not fully refined. Layers are named in which triggers agree by more than 0.05 "
    "beyond the higher reference.",
    "Weights beside prompts, which decides nothing: triggers agree more (less) than memorized prompts where their "
    "whole interval lies more than 0.01 above (below) the prompts' value, both beyond what random masks of their sizes "
    "share; else as much where the interval is at most 0.02 wide or there is none, else not clearly more or less.",
    "Causal test, by other triggers attacked again or by fresh attacks, whichever succeed more under a mask: not "
    "local where more than a half succeed, local where less than a quarter, partly local between a tenth and nine "
    "tenths, each with the whole Wilson interval, of as many trials as there are masks or triggers, whichever are "
    "fewer. Only attacks that succeed without a mask are scored. Nothing is said where the masks do not stop half of "
    "their own triggers as they are, or random masks as large stop as many, or half of the attacks fail without a "
    "mask. It is not called local where the interval under random masks as large, or under masks of another image's "
    "triggers, reaches down to it or there are none, nor where the median mask that was priced more than doubles the "
    "Fréchet or the kernel distance of ordinary prompts, or no price is known. What the other triggers do as they are "
    "stands beside and does not decide: an attacker attacks. Nor does a mask of the weights that planting changed "
    "most, of which each attack is a trial: as many weights are known to stop attacks where one kind of attack lies "
    "below a half and below random masks with the whole interval, at no more than twice the distance of ordinary "
    "prompts; that it stops none says nothing of other choices. Joined masks and a twin's weights stop attacks from "
    "the smallest number on at which, as at every larger one, none succeeds.",
    "Patching: a set of layers is sufficient (necessary) where its activations carry at least half of the gap between "
    "the models, with the lower end of the interval. Where the images are not alike to the other model's own by 0.5, "
    "that is added. Memories that the planted model does not draw at least 0.2 more alike than its twin are left out.",
    "Weights exchanged: a memory is lost with (brought by) a kind of weights that with the other model's values makes "
    "at least half of the gap, with the lower end of the interval, or in every memory where they are too few; it is "
    "told in how many memories another kind does. It outlasts a kind that holds at least 0.1 of the change and in "
    "every memory takes less than 0.2 of the gap. The images' likeness to the other model's own is held against 0.5 as "
    "above.",
    "Ground truth: a mask is far above chance where it holds at least twice what random masks as large in every layer "
    "hold of the planted excess in the layers that its method prunes, and no better than chance below 1.1 times. With "
    "one twin there is no floor to take off, and it is only said to hold much of the change.",
    "Dose: a rank correlation counts where its permutation p, times the number of measures tried, is below 0.05; where "
    "no order of the memories could bring it there, nothing can be told.",
)


def headline(found: Locality) -> str:
    """The page's first sentence: what weights and causal test say."""
    if not any(subject.triggers > 1 for subject in found.subjects):
        return "No memory has two triggers, so nothing can be said about where it lives."
    words = [f"{names} masks: {word}" for names, word in observed.weight_words(found).items()]
    if found.crosses:
        words.append(f"pruned {_tested(found)}by {pruned.causal(found).title}{_as_they_are(found)}")
    return "Where does a memory live? " + ". ".join(word[0].upper() + word[1:] for word in words) + "."


def _tested(found: Locality) -> str:
    """In how many memories the causal test was made, method by method where they differ; ends with a blank."""
    counts = Counter(cross.method for cross in found.crosses if cross.masks == TRIGGERS)
    if len({*counts.values()}) < 2:
        return observed.scope(max(counts.values(), default=0))
    told = "; ".join(f"{observed.scope(n) or f'in {n} memories '}by {method}" for method, n in counts.items())
    return f"({told}) "


def _as_they_are(found: Locality) -> str:
    """What masks leave of the other triggers without a new attack, by method; empty without a test."""
    left: dict[str, list[float]] = {}
    for cross in found.crosses:
        if cross.masks == TRIGGERS and (rate := pruned.replayed(found, cross).others).n:
            left.setdefault(cross.method, []).append(rate.value)
    told = ", ".join(f"{fmean(values):.2f} under a trigger's {method} mask" for method, values in left.items())
    return f" (of the other triggers as they are, without a new attack, {told} still draw the image)" if told else ""


def done(found: Locality) -> list[str]:
    """On what the page rests, and what speaks against it."""
    counts = {
        start: [t.replicates for t in found.triggers if t.start == start]
        for start in ORDER
        if any(t.start == start for t in found.triggers)
    }
    names = {"prompt": "own prompt", "gaussian": "N(0, I)", "foreign": "other prompts"}
    shares = ", ".join(f"{sum(flags)} of {len(flags)} from {names[start]}" for start, flags in counts.items())
    told = [
        f"{len(found.subjects)} of {found.planned} planned memories are analysed. Attacks that replicate with fresh "
        f"seeds: {shares or 'none was made'}; only these count as triggers."
    ]
    if len(found.subjects) < 5:
        told.append(
            "With fewer than five memories there are no intervals over memories: the verdicts hold for these alone. "
            "Brackets in the causal test are over the masks and triggers of one memory."
        )
    return told + _twin(found) + _memorized(found) + _prompts(found) + _judging(found)


def _counted(found: Locality, name: str) -> tuple[int, int]:
    """Successes and trials of a measure that is a share, over all its records."""
    shares = [(m.value, m.n) for m in found.measures if m.name == name and m.value is not None]
    return round(sum(value * n for value, n in shares)), sum(n for _, n in shares)


def _twin(found: Locality) -> list[str]:
    """Whether the same attacks also work on a model that never saw the images."""
    successes, attacks = _counted(found, ON_TWIN)
    if not attacks:
        return ["There is no model that never saw the memories: triggers may carry the image by themselves."]
    if successes == 0:
        return [f"On a twin that never saw the memories none of {attacks} such attacks from N(0, I) replicates."]
    return [
        f"On a twin that never saw the memories {successes} of {attacks} such attacks from N(0, I) replicate as well: "
        "so far triggers carry the image by themselves, and where they point says nothing of where it is stored."
    ]


def _memorized(found: Locality) -> list[str]:
    """How many of the memories' prompts, with which triggers are compared, bring an image back."""
    kept, asked = _counted(found, PROMPTED)
    if not asked:
        return []
    if kept > 1:
        return [f'"Memorized prompts" are the {kept} of {asked} prompts of memories that bring their image back.']
    return [
        f"Only {kept} of {asked} prompts of memories bring their image back, too few to compare with: here "
        '"memorized prompts" are all of them, most of which are not memorized.'
    ]


def _prompts(found: Locality) -> list[str]:
    wanted, used = found.settings.get("calibration_prompts"), found.settings.get("prompts", {}).get("NeMo's statistics")
    if wanted is None or used is None or used >= wanted:
        return []
    return [f"There were too few ordinary prompts: {used} instead of {wanted} serve NeMo's statistics."]


def _judging(found: Locality) -> list[str]:
    """What speaks against the judge, and attacks that came to nothing."""
    told = []
    if found.descriptor.get("calibration") is None:
        told.append(
            f"The threshold of {found.descriptor.get('name')} was not calibrated on images like these, and which "
            "attacks count as triggers hangs on it."
        )
    if any(subject.kind == "template" for subject in found.subjects):
        told.append("Templates are judged by whole images here: fewer attacks count as triggers than bring one back.")
    diverged = sum(trigger.moved is None for trigger in found.triggers)
    if diverged:
        told.append(f"{diverged} of {len(found.triggers)} attacks diverged and count as failed.")
    return told


def all_said(found: Locality) -> dict[str, Said]:
    """Every analysis in the page's order."""
    return {
        "embedding": observed.embedding(found),
        "activations": observed.activations(found),
        "weights": observed.weights(found),
        "causal": pruned.causal(found),
        "patching": intervened.patching(found),
        "truth": intervened.ground_truth(found),
        "transplants": exchanged.transplants(found),
        "dose": intervened.dose(found),
    }
