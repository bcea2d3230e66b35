"""The audit distrusts itself: reasons why its figures may not mean what they seem to.

Also the blind baseline: scores that look at no model. Where they already tell memories from controls, so may any
detector or attack, without the model having stored anything.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dori.audit.judge import Case
from dori.findings import Audit, Finding
from dori.image_file import png_bytes
from dori.judgement import Rule, last_step, rule_of
from dori.model.stable_diffusion import StableDiffusion
from dori.stats import area_under_roc

FEW = 20
UNMATCHED = 0.1
FOUND = 0.95


def blind_scores(model: StableDiffusion, memories: Sequence[Case], controls: Sequence[Case]) -> dict[str, float]:
    """AUROC, memories against controls, of file size, VAE error and caption length; 0.5 means matched.

    Empty without controls. Only images whose training could differ are compared: the memories as given.
    """
    if not memories or not controls:
        return {}
    scores = {
        "file size": [_sizes(group) for group in (memories, controls)],
        "VAE error": [_vae_errors(model, group) for group in (memories, controls)],
    }
    if all(case.memory.text is not None for case in (*memories, *controls)):
        scores["caption length"] = [
            [float(len(case.memory.text or "")) for case in group] for group in (memories, controls)
        ]
    return {name: round(area_under_roc(*pair), 6) for name, pair in scores.items()}


def blind_scores_by_kind(
    model: StableDiffusion, memories: Sequence[Case], controls: Sequence[Case]
) -> dict[str, float]:
    """`blind_scores` of all memories, and where they are of several kinds of the verbatim ones alone.

    Those are the memories of which storage is claimed; others, pooled with them, could hide that they are not matched.
    """
    verbatim = [case for case in memories if case.memory.kind == "verbatim"]
    found = blind_scores(model, memories, controls)
    if verbatim and len(verbatim) < len(memories):
        found |= {f"{name}, verbatim": value for name, value in blind_scores(model, verbatim, controls).items()}
    return found


def _sizes(cases: Sequence[Case]) -> list[float]:
    """Bytes of the image as the audit sees it, as PNG: the files themselves may come in different formats."""
    return [float(len(png_bytes(case.image))) for case in cases]


def _vae_errors(model: StableDiffusion, cases: Sequence[Case]) -> list[float]:
    images = torch.stack([case.image for case in cases])
    back = model.to_images(torch.stack([case.latent for case in cases]).to(model.device)).cpu()
    return (back - images).square().flatten(1).mean(1).tolist()


def _final(audit: Audit, group: str, model: str, edit: str) -> list[Finding]:
    """Findings of the attack's last step for all images, from any start."""
    rows = [
        f
        for f in audit.findings
        if f.group == group and f.model == model and f.edit == edit and f.start and f.edit_scope != "own"
    ]
    return [f for f in rows if f.steps == last_step(Counter(f.steps for f in rows))] if rows else []


def _replicated(rows: Sequence[Finding], rule: Rule) -> int:
    return sum(map(rule.came_back, rows))


def with_distrust(audit: Audit, *, diverged: int) -> Audit:
    """The audit with its reasons to distrust, one sentence each; `diverged` generations were not finite."""
    reasons = [*_about_controls(audit), *_about_attack(audit), *_about_edits(audit), *_about_judge(audit)]
    if diverged:
        reasons.append(f"{diverged} generations diverged and were judged as no copy: the rates there are too low.")
    return dataclasses.replace(audit, distrust=tuple(reasons))


def _about_controls(audit: Audit) -> list[str]:
    rule = rule_of(audit)
    memories = [s for s in audit.subjects if s.group == "memory"]
    controls = [s for s in audit.subjects if s.group == "control"]
    reasons = []
    if len(memories) < FEW:
        reasons.append(f"Only {len(memories)} memories were audited: every rate has a wide interval.")
    if not controls:
        alone = (
            "twins alone tell whether the model or the attack supplied an image."
            if audit.twins
            else "what was found may be shown, but nothing can be said about storage."
        )
        return [*reasons, f"There are no controls: {alone}"]
    if len(controls) < FEW:
        reasons.append(f"Only {len(controls)} controls were audited: that they do not break is weak evidence.")
    for edit in ("none", *(edit.name for edit in audit.edits if edit.name != "none" and edit.scope == "joint")):
        rows = _final(audit, "control", audit.model, edit)
        broken = _replicated(rows, rule)
        if broken:
            under = "" if edit == "none" else f" under {edit}"
            reasons.append(
                f"{broken} of {len(rows)} attacks on controls succeeded{under} too: at this budget the attack can "
                "draw images that the model never saw."
            )
    asked = [f for f in audit.findings if f.group == "control" and f.model == audit.model and not f.start]
    if _replicated(asked, rule):
        reasons.append(
            "A control comes back from its own prompt: it may have been trained on, or the descriptor is too lenient."
        )
    reasons += [
        f"Controls are not matched: {name} alone tells memories from controls (AUROC {value:.2f})."
        for name, value in audit.blind.items()
        if abs(value - 0.5) > UNMATCHED
    ]
    return reasons


def _about_attack(audit: Audit) -> list[str]:
    silent = [s.id for s in audit.subjects if s.first_gradient is not None and s.first_gradient == 0]
    reasons = []
    if silent:
        reasons.append(
            f"The attack had no gradient for {len(silent)} images (first: {silent[0]}): its failure there "
            "means nothing."
        )
    rule = rule_of(audit)
    for twin in audit.twins:
        rows = _final(audit, "memory", twin, "none")
        broken = _replicated(rows, rule)
        if broken:
            reasons.append(f"{broken} of {len(rows)} attacks succeeded on {twin}, which never saw the memories.")
    return reasons


def _about_edits(audit: Audit) -> list[str]:
    """Whom NeMo pruned nothing for, or more than the published search would have."""
    reasons = []
    for edit in audit.edits:
        found = edit.details.get("memories")
        searches = list(found.values()) if edit.scope == "joint" and isinstance(found, Mapping) else []
        flagged = [one for one in searches if one.get("flagged")]
        refined = [one for one in flagged if one.get("judged")]  # some settings do not refine at all
        cut = sum(not one["converged"] for one in refined)
        kept = sum(not one["suppressed"] for one in flagged)
        unflagged = len(searches) - len(flagged)
        for count, of, words in (
            (unflagged, len(searches), "prompts were not taken for memorized, and nothing was pruned for them."),
            (kept, len(flagged), "searches found no set that brings the score down to the threshold."),
            (cut, len(refined), "refinements were cut short: those masks are larger than the published method's."),
        ):
            if count:
                reasons.append(f"{edit.name}: {count} of {of} {words}")
    return reasons


def _about_judge(audit: Audit) -> list[str]:
    name, reasons = audit.descriptor["name"], []
    calibration, masked = audit.descriptor["calibration"], audit.descriptor.get("masked_calibration")
    if calibration is None:
        reasons.append(f"The threshold of {name} was not calibrated on images like these.")
    else:
        reasons += _missed(calibration, "known copies", "replication")
    if any(subject.kind == "template" for subject in audit.subjects):
        if rule_of(audit).masked is None:
            reasons.append(
                "Templates are judged by whole images, since no threshold was measured for images with the "
                "varying part painted over: how much of them is stored is underestimated."
            )
        elif masked is not None:
            reasons += _missed(masked, "known copies with a box painted over", "replication of templates")
    return reasons


def _missed(calibration: Mapping[str, Any], copies: str, what: str) -> list[str]:
    share = calibration["true_positive_rate"]
    return (
        []
        if share >= FOUND
        else [
            f"The descriptor misses {100 * (1 - share):.0f} % of {copies} at its threshold: {what} is underestimated."
        ]
    )
