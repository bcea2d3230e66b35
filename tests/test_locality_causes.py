"""What a locality page says of interventions and of the ground truth: pruning, patching, planted weights."""

import dataclasses
from statistics import fmean

import pytest
from synthetic_locality import FEED, cross, price, records

from dori.locality.page import intervened, pruned, taken_back, verdict
from dori.locality.records import NO_MASK, OTHER_MASKS, PLANTED, RANDOM, TRIGGERS, WHOLE, Change, Cross, Joined


def causal(*crosses: Cross) -> str:
    """The title of the causal test."""
    return pruned.causal(dataclasses.replace(records(), crosses=crosses, joined=())).title


OTHERS = cross(OTHER_MASKS, own=0.9, others=0.9, fresh=0.9)
BARE, RESISTS = cross(NO_MASK, own=0.9, others=0.9, fresh=0.9), cross(RANDOM, own=0.9, others=0.9, fresh=0.9)


def wide(one: Cross) -> Cross:
    """Three times the triggers, and three times the masks where each is one's own."""
    times = 3 if one.masks == TRIGGERS else 1
    again, replay = (tuple(row * 3 for row in table) * times for table in (one.again, one.replay))
    return dataclasses.replace(
        one, starts=one.starts * 3, again=again, replay=replay, fresh=one.fresh * times, sizes=one.sizes * times
    )


def test_the_causal_verdict_needs_masks_that_stop_what_random_ones_do_not() -> None:
    hidden = cross(TRIGGERS, own=0.1, others=0.1, fresh=0.1)
    stays = cross(TRIGGERS, own=0.1, others=0.9, fresh=0.9)
    assert causal(BARE, stays, RESISTS) == "Wanda: not local"
    # 6 masks: none of them lets anything pass, which bounds the share at 0.39; that is not below a quarter.
    assert causal(BARE, hidden, RESISTS) == "Wanda: cannot be told"
    # Three times the masks on the same triggers bound it no closer, on three times the triggers they do.
    rows = dataclasses.replace(hidden, again=hidden.again * 3, replay=hidden.replay * 3, sizes=(5,) * 18)
    rows = dataclasses.replace(rows, fresh=hidden.fresh * 3)
    assert causal(BARE, rows, RESISTS, OTHERS) == "Wanda: cannot be told"
    bare, many, resists, others = (wide(one) for one in (BARE, hidden, RESISTS, OTHERS))
    assert causal(bare, many, resists, others) == "Wanda: local"
    assert "random masks" in causal(bare, many, wide(cross(RANDOM, own=0.1, others=0.1, fresh=0.1)))
    assert "without a mask" in causal(wide(cross(NO_MASK, own=0.1, others=0.1, fresh=0.1)), many, resists)
    assert "every mask is empty" in causal(bare, dataclasses.replace(many, sizes=(0,) * 18), resists)
    # Any trigger's mask, of whatever image, would have done the same.
    alike = wide(cross(OTHER_MASKS, own=0.1, others=0.1, fresh=0.1))
    assert causal(bare, many, resists, alike).endswith("masks of another image's triggers stop about as many")
    no = "no masks of another image's triggers to compare with"
    assert no in causal(bare, many, resists)
    assert no in causal(bare, many, resists, dataclasses.replace(others, sizes=(0,) * 8))  # they prune nothing
    # Half of the masks let all pass: a share up to 0.74, of which eight masks that stop nothing can just not tell.
    some = dataclasses.replace(
        many, again=many.again[:9] + wide(stays).again[:9], fresh=many.fresh[:9] + wide(stays).fresh[:9]
    )
    assert causal(bare, some, resists, others) == "Wanda: cannot be told, there are too few random masks as large"


def test_masks_that_do_not_stop_their_own_triggers_show_nothing() -> None:
    nothing = cross(TRIGGERS, own=0.9, others=0.9, fresh=0.9)
    assert causal(BARE, nothing, RESISTS) == "Wanda: cannot be told, the masks do not stop their own triggers"
    # They are stopped as they are, and new attacks succeed even from them: what the paper found.
    hidden = dataclasses.replace(nothing, replay=cross(TRIGGERS, own=0.1, others=0.9, fresh=0.9).replay)
    assert causal(BARE, hidden, RESISTS) == "Wanda: not local"
    # Random masks stop them as well, so it is not the place that counts.
    anything = dataclasses.replace(RESISTS, replay=cross(RANDOM, own=0.1, others=0.1, fresh=0.1).replay)
    told = causal(BARE, hidden, anything)
    assert told == "Wanda: cannot be told, random masks as large stop these triggers as well"


def test_a_mask_that_spoils_the_model_is_not_called_local() -> None:
    crosses = (BARE, cross(TRIGGERS, own=0.1, others=0.1, fresh=0.1), RESISTS, OTHERS)
    found = dataclasses.replace(records(), crosses=tuple(map(wide, crosses)))
    assert pruned.causal(found).title == "Wanda: local"  # 0.6 to 0.7 is no more than twice
    bare, *others = found.prices
    singles = [p for p in others if p.row is not None and p.masks == TRIGGERS]
    dear = [dataclasses.replace(p, kernel=1.3) for p in singles[:2]]  # of three: the median
    spoiled = pruned.causal(dataclasses.replace(found, prices=(bare, *dear, *singles[2:])))
    assert spoiled.title == "Wanda: cannot be told, the masks alone spoil ordinary prompts"
    assert "0.6 / 60 / – without a mask, 1.3 / 60 / 0.8 with one of 3 triggers'" in spoiled.sentences[0]
    # Where the model's own images are the reference the kernel distance of none is nothing to divide by.
    own = [dataclasses.replace(p, held_out=False) for p in dear]
    assert pruned.causal(dataclasses.replace(found, prices=(bare, *own))).title == "Wanda: local"
    steep = [dataclasses.replace(p, held_out=False, frechet=121.0) for p in dear]
    assert "spoil" in pruned.causal(dataclasses.replace(found, prices=(bare, *steep))).title
    for unknown in ((), (bare,), tuple(others)):
        title = pruned.causal(dataclasses.replace(found, prices=unknown)).title
        assert title == "Wanda: cannot be told, it is not known what the masks cost"
    # A ruined model that still draws the memory does not speak for its place.
    stays = cross(TRIGGERS, own=0.1, others=0.9, fresh=0.9)
    assert pruned.causal(dataclasses.replace(found, crosses=(BARE, stays, RESISTS), prices=())).title.endswith(
        "not local"
    )


def test_a_kind_of_attack_that_mostly_fails_without_a_mask_decides_nothing() -> None:
    under = cross(TRIGGERS, own=0.1, others=0.9, fresh=0.9)
    bare = dataclasses.replace(BARE, fresh=((0.9, 0.1) * 20,))
    assert causal(bare, under, RESISTS) == "Wanda: not local"
    neither = dataclasses.replace(bare, again=((0.9, 0.1) * 3,))
    assert causal(neither, under, RESISTS) == "Wanda: cannot be told, most attacks fail without a mask"


def test_each_mask_is_held_against_its_own_fresh_starts() -> None:
    """Mask i has starts 2 i and 2 i + 1; of those that succeed without a mask every second one does under it."""
    bare = dataclasses.replace(BARE, fresh=((0.9, 0.9, 0.9, 0.1) * 10,))
    under = dataclasses.replace(cross(TRIGGERS, own=0.1, others=0.9, fresh=0.9), fresh=((0.9, 0.1), (0.9, 0.1)) * 3)
    found = dataclasses.replace(records(), crosses=(bare, under))
    rows = pruned.scored(found, under, "fresh")
    assert rows == [{0: True, 1: False}, {0: True}] * 3
    assert pruned.tested(found, under).fresh.value == 0.75 and pruned.tested(found, under).fresh.n == 6
    short = dataclasses.replace(found, crosses=(dataclasses.replace(bare, fresh=((0.9,),)), under))
    assert pruned.scored(short, under, "fresh") == [{0: True}, *[{}] * 5]  # as a stranger's file may be


def test_only_attacks_that_succeed_without_a_mask_are_scored() -> None:
    """Triggers 0 and 3 fail without one: that their attacks fail under a mask says nothing of the mask."""
    fails = tuple(0.1 if j in (0, 3) else 0.9 for j in range(6))
    bare = dataclasses.replace(BARE, again=(fails,))
    under = cross(TRIGGERS, own=0.1, others=0.9, fresh=0.9)
    under = dataclasses.replace(under, again=tuple(tuple(map(min, row, fails)) for row in under.again))
    test = pruned.tested(dataclasses.replace(records(), crosses=(bare, under)), under)
    # Six masks, but four triggers that can tell.
    assert (test.others.value, test.others.n) == (1, 4) and (test.own.value, test.own.n) == (0, 4)


def test_the_causal_sentences_count_what_comes_back_and_what_joining_takes() -> None:
    said_ = pruned.causal(records())
    assert said_.title == "Wanda: not local"
    assert "0.00 [0.00, 0.39] of these triggers" in said_.sentences[0]
    assert (
        "1.00 [0.61, 1.00] of the others" in said_.sentences[0]
        and "Without a mask (what fails there is not scored): 1.00" in said_.sentences[0]
    )
    assert "As they are, without a new attack, 0.00 [0.00, 0.39] and 1.00 [0.61, 1.00] still do" in said_.sentences[0]
    assert "(1.00 [0.61, 1.00] under random masks as large)." in said_.sentences[0]
    assert "from 2 on (0.20 of the layers' weights) none of 8 fresh attacks" in said_.sentences[1]
    assert "even 2 (0.20 of the layers' weights) leave 8 of 8" in said_.sentences[1]  # random masks
    assert "at the price of 1.4 / 60 / 0.8 on ordinary prompts" in said_.sentences[1]
    assert "0.6 / 60 / – without a mask, 0.8 / 60 / 0.8 under random masks as large" in said_.sentences[1]


def test_a_mask_of_the_planted_change_shows_that_there_was_something_to_find() -> None:
    mine, bare = cross(TRIGGERS, own=0.1, others=0.9, fresh=0.9), price(NO_MASK, 0, row=0)
    costs = (bare, price(PLANTED, 1, row=0, kernel=0.9))
    found = dataclasses.replace(records(), crosses=(BARE, mine, RESISTS, OTHERS), prices=costs)
    there, neither = "So there are weights, as many, that many attacks need.", "another might."

    def told(others: float, fresh: float, *instead: Cross, **changes: object) -> str:
        crosses = (*(instead or found.crosses), cross(PLANTED, own=0.1, others=others, fresh=fresh))
        return pruned.causal(dataclasses.replace(found, crosses=crosses, **changes)).sentences[0]

    assert "changed most" not in pruned.causal(found).sentences[0]
    # Six triggers attacked again and two fresh ones: eight trials, of which 0 of 6 leave up to .39 open.
    assert "that planting changed most: 0.00 [0.00, 0.39] and 1.00 [0.34, 1.00]." in told(0.1, 0.9)
    assert ": not local." in told(0.1, 0.9)  # it says what could be had, not where triggers point
    assert there in told(0.1, 0.9) and there in told(0.1, 0.1) and neither not in told(0.1, 0.1)
    assert there not in told(0.9, 0.1)  # two fresh attacks show nothing
    long = cross(PLANTED, own=0.1, others=0.9, fresh=0.9)
    long = dataclasses.replace(long, fresh=((0.9,) * 16,))
    assert neither in pruned.causal(dataclasses.replace(found, crosses=(*found.crosses, long))).sentences[0]
    # Not where random masks stop as many, where it spoils the model, or where nobody knows what it costs.
    weak = cross(RANDOM, own=0.1, others=0.1, fresh=0.9)
    assert there not in told(0.1, 0.9, BARE, mine, weak, OTHERS)
    assert there not in told(0.1, 0.9, prices=(bare, price(PLANTED, 1, row=0, kernel=1.3)))
    assert there not in told(0.1, 0.9, prices=())
    single = tuple(dataclasses.replace(change, floor=None) for change in found.changes)
    assert "With one twin these are also" in told(0.1, 0.9, changes=single)
    joined = tuple(Joined("m0", "Wanda", PLANTED, k, 0.1 * k, 0, 8) for k in (1, 2))
    told = pruned.causal(dataclasses.replace(records(), joined=(*records().joined, *joined))).sentences[1]
    assert "Masks as large of the planted change: from 1 on (0.10 of the layers' weights) none of 8" in told


def test_a_causal_test_that_was_stopped_says_how_far_it_came() -> None:
    found = records()
    planned = dataclasses.replace(found, planned=3, settings=dict(found.settings) | {"causal": {"memories": 2}})
    assert "not finished" not in str(pruned.causal(found).sentences)
    assert pruned.causal(planned).sentences[-1] == ("The test is not finished: so far 1 of 2 memories with Wanda.")
    bare = pruned.causal(dataclasses.replace(planned, crosses=(), joined=()))
    assert bare.title == "Not run" and "0 of 2 memories with Wanda" in bare.sentences[0]
    (first, *others) = found.subjects
    hopeless = dataclasses.replace(planned, subjects=(dataclasses.replace(first, triggers=1), *others))
    assert "not finished" not in str(pruned.causal(hopeless).sentences)  # no test was possible on the second


def test_empty_masks_do_not_count_as_masks() -> None:
    some = dataclasses.replace(cross(TRIGGERS, own=0.1, others=0.1, fresh=0.1), sizes=(0, 5, 5, 5, 5, 5))
    again = ((0.9,) * 6, *some.again[1:])  # an empty mask stops nothing
    test = pruned.tested(records(), dataclasses.replace(some, again=again))
    assert test.others.value == 0 and test.others.n == 5 and test.own.value == 0


def test_patching_names_what_carries_half_of_the_gap() -> None:
    said_ = intervened.patching(records())
    doubt = "all values (but what is drawn is not, or not surely, the other model's image)"
    assert said_.title == f"In one memory sufficient: {doubt}; necessary: {doubt}"
    assert "are alike by: all values 0.30; without a patch 0.30" in said_.sentences[1]
    cured = tuple(dataclasses.replace(p, alike=0.6 if p.direction == "necessary" else 0.4) for p in records().patches)
    title = intervened.patching(dataclasses.replace(records(), patches=cured)).title
    assert title == f"In one memory sufficient: {doubt}; necessary: all values"
    two = (*records().patches, *(dataclasses.replace(p, memory="m1", share=0.1) for p in records().patches))
    assert (
        "all values 0.45 (0.80, 0.10)" in intervened.patching(dataclasses.replace(records(), patches=two)).sentences[1]
    )
    assert "most in the values of layer 1 (0.40 of the gap between the models, the largest of 2" in said_.sentences[1]
    kinds = tuple(p for p in records().patches if not p.layers.endswith(("to_v", "net.2")))
    told = intervened.patching(dataclasses.replace(records(), patches=kinds)).sentences[1]
    assert told.startswith("Activations put into the twin bring, of the gap between the models: all values 0.80")
    one = tuple(dataclasses.replace(p, share=0.7) if p.layers == FEED[1] else p for p in records().patches)
    assert "the feed-forward of layer 2 (" in intervened.patching(dataclasses.replace(records(), patches=one)).title
    hardly = dataclasses.replace(
        records(), patches=tuple(dataclasses.replace(p, share=None) for p in records().patches)
    )
    assert intervened.patching(hardly).title == "Cannot be told"


def test_ground_truth_is_held_against_random_masks_as_large_in_every_layer() -> None:
    said_ = intervened.ground_truth(records())
    assert "values, down 1.00" in said_.sentences[0]
    assert said_.title == "Wanda: in 2 memories far above chance"  # 0.3 against 0.12
    assert "2.50 times as much" in said_.sentences[1]
    weak = tuple(dataclasses.replace(c, random=0.25) for c in records().covers)
    assert intervened.ground_truth(dataclasses.replace(records(), covers=weak)).title.endswith(
        "somewhat better than chance"
    )
    # With one twin there is no floor, and no mask is said to have found the memory.
    single = tuple(dataclasses.replace(c, floor=None) for c in records().changes)
    alone = intervened.ground_truth(
        dataclasses.replace(
            records(), changes=single, covers=tuple(dataclasses.replace(c, twins=None) for c in records().covers)
        )
    )
    assert alone.title == "Wanda: in 2 memories holds much of the change"
    assert "twin minus twin is not known" in alone.sentences[1]
    assert "difference between twins" not in alone.sentences[2]
    unknown = tuple(dataclasses.replace(c, share=None, random=None) for c in weak)
    assert intervened.ground_truth(dataclasses.replace(records(), covers=unknown)).title == "Wanda: not measured"


def test_how_unlike_triggers_are_under_masks_is_told_beside_the_mean() -> None:
    """Of six triggers the first survives every mask, its own too, the second those of the last four alone."""
    low, high = 0.1, 0.9
    replay = tuple(tuple(high if j == 0 or (j == 1 and i > 1) else low for j in range(6)) for i in range(6))
    under = dataclasses.replace(cross(TRIGGERS, own=low, others=low, fresh=high), replay=replay)
    found = dataclasses.replace(records(), crosses=(BARE, under, RESISTS))
    means = sorted(fmean(values) for values in pruned.under_masks(found, under).values())
    assert means == pytest.approx([0.1, 0.1, 0.1, 0.1, (4 * 0.9 + 2 * 0.1) / 6, 0.9])
    told = "Under the masks the 6 triggers' mean similarities reach from 0.10 to 0.90 (median 0.10); 0.00 of all lie"
    assert told in pruned.causal(found).sentences[0]
    left = "(of the other triggers as they are, without a new attack, 0.30 under a trigger's Wanda mask still draw"
    assert left in verdict.headline(found)


def test_what_no_mask_reaches_is_said() -> None:
    found = records()
    name = next(o.layer for o in found.overlaps if o.layer != WHOLE).removesuffix(".weight")
    kinds = tuple(c for c in found.changes if c.level == "kind")
    inside, outside = (Change("layer", layer, 3.0 * k, 1.0 * k, 10) for layer, k in ((name, 1), ("elsewhere", 4)))
    known = dataclasses.replace(found, changes=(*kinds, inside, outside))
    told = "The layers that Wanda prunes hold 0.2 of all that planting changed; no mask there reaches the rest"
    assert told in intervened.ground_truth(known).sentences[-1]
    assert told[:20] not in intervened.ground_truth(dataclasses.replace(found, changes=kinds)).sentences[-1]


def test_what_a_twins_weights_stop_is_told_share_by_share() -> None:
    told = pruned.causal(records()).sentences[-1]
    most, random = told.split("As many at random: ")
    assert "1% of the weights (0.40 of the squared difference) leave 5 of 6 triggers as they are and 3 of 8" in most
    assert "From 10% on nothing is left (of many attacks, up to 0.32 still might)." in most
    assert "10% of the weights (0.10 of the squared difference) leave 6 of 6 triggers" in random
    assert "Not even 10% stop all." in random  # no fresh attack succeeds, but the triggers still do
    assert told.endswith(": 0.6 / 60 / – as the model is, 0.5 / 41 / 0.3 with those 10%, 0.6 / 42 / 0.2 with 100%.")
    assert "By what is taken back instead of by count: the most changed 1% (0.40 of" in random


def test_one_success_at_a_larger_share_takes_back_what_a_smaller_one_showed() -> None:
    rows = taken_back.taken_back(records(), "m0", "most changed")
    assert taken_back.stopping(rows) is rows[1]
    late = [*rows[:2], dataclasses.replace(rows[2], successes=1)]
    assert taken_back.stopping(late) is None
    assert taken_back.stopping([rows[0], dataclasses.replace(rows[1], replayed=1), rows[2]]) is rows[2]
