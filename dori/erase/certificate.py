"""The certificate: one self-contained page that says what was erased, how it was judged, and what speaks against it.

A pure function of `proof.json`: no model, no script, no outside request, every text escaped; it shows no image and no
prompt, only ids and hashes. Frame and style are the audit report's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dori.erase.outcomes import Outcome
from dori.erase.premise import Unprompted, unprompted_contrast
from dori.erase.rates import DASH, Line, rates, ways
from dori.erase.verdict import ERASED, ORDINARY, ORIGINAL, RULES, figures
from dori.report.nested import sheet
from dori.report.page import page
from dori.stats import Estimate

WORDS = {
    "removed": "The memories behave as on a model that never saw them.",
    "weakened": "Fewer memories come back than before; it is not shown that they behave like unseen images.",
    "hidden": "Less than half as many memories come back from their prompts as before, and at least half as many under "
    "an attack on the embedding.",
    "untouched": "At least half as many memories come back as before.",
    "unproven": "No memory came back from the original model that a twin does not give too, so nothing can be said.",
}
ALONE = (
    "All intervals are over these images: another model, another twin or another run of the erasure may differ by more."
)
SIGNS = {"removed": "✓", "weakened": "◐", "hidden": "◌", "untouched": "✗", "unproven": "?"}


def outcomes_of(record: Mapping[str, Any]) -> list[Outcome]:
    """The outcomes of a stored proof."""
    return [Outcome(**{**one, "similarities": tuple(one["similarities"])}) for one in record["outcomes"]]


def render(record: Mapping[str, Any]) -> str:
    """The certificate as HTML.

    Args:
        record: what `proof.json` holds.
    """
    outcomes, name = outcomes_of(record), record["verdict"]["name"]
    relearning = record["protocol"]["relearning"]
    based = record.get("base") is not None  # records of before have none
    unreached = relearning["steps"] + relearning["check_every"] if relearning else 0
    return page(
        "erase/certificate.html",
        record=record,
        name=name,
        sign=SIGNS[name],
        words=WORDS[name],
        rules=RULES,
        split=_split(record),
        judge=_judge(record),
        ways=ways(outcomes),
        lines={group: rates(outcomes, group, unreached=unreached) for group in ("memory", "control")},
        tests=[_test(one) for one in record["verdict"]["tests"]],
        damage=[_damage(one, based=based) for one in record["damage"]],
        based=based,
        scale=_scale(record["damage"]),
        drift=_drift(record),
        near=_near(record["damage"]),
        eraser=sheet(record["eraser"]["settings"]),
        protocol=sheet(record["protocol"]),
        descriptor=sheet(record["descriptor"]),
        provenance=sheet(record["provenance"]),
        cost=_cost(record),
        unprompted=_unprompted(record),
    )


def _test(one: Mapping[str, Any]) -> Line:
    e = one["found"]
    difference, low, high, margin = figures(one["of"], e["difference"], e["low"], e["high"], e["margin"])
    shown = "equivalent" if e["shown"] else "different" if e["excluded"] else "not shown"
    shown += "" if e["spread"] else ", all images alike"
    return Line(
        f"{one['state']}: {one['quantity']}",
        (
            difference,
            f"{low} to {high}",
            f"{margin} times either way" if one["of"] == "ratio" else f"±{margin}",
            f"{e['p']:.3g}",
            f"{e['counts'][0]} and {e['counts'][1]}",
            shown,
        ),
    )


def _damage(row: Mapping[str, Any], *, based: bool) -> Line:
    names = (
        *("frechet", "kernel", "alignment", "to_original", *(["to_base"] if based else []), "held_out_loss"),
        *("neighbour_frechet", "neighbour_kernel", "neighbour_alignment", "neighbour_to_original"),
        *(["neighbour_to_base"] if based else []),
    )
    return Line(row["state"], tuple(DASH if row[name] is None else f"{row[name]:.4g}" for name in names))


def _near(damage: Sequence[Mapping[str, Any]]) -> str:
    """How many neighbours were left out, since the original model shows a memory from them."""
    left = max((row.get("neighbours_shown", 0) for row in damage), default=0)
    return f", without {left} from which the original draws something like a memory" if left else ""


def _scale(damage: Sequence[Mapping[str, Any]]) -> str:
    """The erased model's Frechet distance beside that of ordinary training, the scale of "no damage"."""
    found = {row["state"]: row["frechet"] for row in damage}
    if not found.get(ORDINARY) or ERASED not in found:
        return ""
    change = 100 * (found[ERASED] / found[ORDINARY] - 1)
    return (
        f"On ordinary prompts the erased model's Frechet distance lies {abs(change):.1f} % "
        f"{'above' if change >= 0 else 'below'} that of ordinary training for as many updates."
    )


def _drift(record: Mapping[str, Any]) -> str:
    """How far another training of the base goes, beside how far the erasure went."""
    rows = {row["state"]: row for row in record["damage"]}
    twins = [row for twin in record["twins"] if (row := rows[twin["name"]]).get("to_base") is not None]
    if not twins or rows[ERASED]["to_original"] is None:
        return ""
    listed = " and ".join(f"{row['to_base']:.3f} ({row['state']})" for row in twins)
    return (
        f"Images of the same prompts and noises: the erased model's are like the original's by "
        f"{rows[ERASED]['to_original']:.3f} (median similarity), a twin's like those of {record['base']['name']}, from "
        f"which it was trained, by {listed}."
    )


def _split(record: Mapping[str, Any]) -> str:
    return {
        "all": "All given memories were erased and judged.",
        "tune": "These memories are the half on which settings may have been tuned: their figures are no test.",
        "test": "These memories are the half that is set aside for tests; that no setting was chosen by them is the "
        "word of who made this.",
    }[record["split"]]


def _judge(record: Mapping[str, Any]) -> str:
    twins = [twin["name"] for twin in record["twins"]]
    if twins:
        return (
            f"Each image is compared with itself on {' and '.join(twins)}, which never saw the memories, and the "
            "same difference of controls is taken off: what shifts every image by as much cancels (in a ratio: what "
            f"multiplies it by as much). {ALONE}"
        )
    if not record["controls"]:
        return "There is neither a model that never saw the memories nor a control: nothing can be called removed."
    blind = ", ".join(f"{name} {value:.2f}" for name, value in record["blind"].items()) or "not measured"
    return (
        "There is no model that never saw the memories: they are compared with controls on the erased model. "
        f"Scores that look at no model tell the two apart with AUROC {blind} (0.5: not at all). {ALONE}"
    )


def _unprompted(record: Mapping[str, Any]) -> str:
    """Whether the memories are known without a prompt, before and after."""
    found = [Unprompted(**one) for one in record.get("unprompted", [])]
    twins = [twin["name"] for twin in record["twins"]]
    before, after = (unprompted_contrast(found, state, twins) for state in (ORIGINAL, ERASED))
    if math.isnan(before.value) or math.isnan(after.value):
        return ""
    less = ", each image less itself on the twins" if twins else ""
    taught = (
        " Under a trigger the erasure teaches the original's prediction without a prompt, so that what is known there "
        "stays."
        if record["eraser"].get("without_prompt")
        else ""
    )
    return (
        f"Without a prompt the memories' denoising error differs from the controls'{less} by {_spread(before)} on the "
        f"original model and by {_spread(after)} on the erased one (95 % intervals; below zero: known without a "
        f"prompt).{taught}"
    )


def _spread(found: Estimate) -> str:
    interval = "" if math.isnan(found.low) else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.value:+.3f}{interval}"


def _cost(record: Mapping[str, Any]) -> str:
    seconds = record["seconds"]
    time = "" if seconds is None else f", {seconds / 60:.1f} minutes"
    made = record["surrogate_rows"]
    surrogates = f", beside at most {made:,} rows for images that it learned from" if made else ""
    return f"{record['eraser']['rows']:,} U-Net rows{time} for the erasure{surrogates}"
