"""A made-up audit with small pictures: every population, hostile names and texts, and counts that a hand can check."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dori.findings import Audit, EditInfo, Finding, Quality, Subject

SCRIPT = "<script>alert(1)</script>"
BREAKOUT = '"><img src=x onerror=alert(2)>'
BRACES = "{{ 7 * 7 }}{% raw %}"
STEPS = (0, 1, 10, 25, 50)
THRESHOLD, MASKED_THRESHOLD = 0.6, 0.72
# Median similarity of the eight verbatim memories, by edit, from the prompt and at each of STEPS under the attack.
# Unedited 7 of 8 come back; NeMo hides the 7 and DoRI brings 6 of them back at 50 steps; Wanda: 2.
PROMPT = {
    "none": (0.95, 0.93, 0.91, 0.9, 0.88, 0.8, 0.72, 0.3),
    "NeMo": (0.4, 0.3, 0.35, 0.2, 0.3, 0.25, 0.3, 0.2),
    "Wanda": (0.2, 0.25, 0.15, 0.2, 0.3, 0.2, 0.1, 0.15),
    "random neurons": (0.94, 0.9, 0.9, 0.88, 0.86, 0.8, 0.7, 0.3),
}
FINAL = {
    "none": (0.96, 0.95, 0.93, 0.92, 0.9, 0.85, 0.8, 0.66),
    "NeMo": (0.94, 0.92, 0.9, 0.88, 0.85, 0.8, 0.55, 0.4),
    "Wanda": (0.75, 0.7, 0.55, 0.5, 0.5, 0.45, 0.4, 0.3),
}
CONTROL, CONTROL_FINAL = 0.12, 0.38


def around(median: float, seeds: int = 3) -> tuple[float, ...]:
    """Similarities with this median: the picture's own first, then one lower and one higher."""
    return tuple(round(median + delta, 4) for delta in (0.0, -0.04, 0.03))[:seeds]


def picture(folder: Path, name: str, seed: int, *, noise: float = 0.0, side: int = 64) -> str:
    """Write a small smooth picture; equal seeds look alike, `noise` blends it with another."""

    def field(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((side, side), 3)
        pixels = np.asarray(coarse, np.float64)
        pixels[side // 4 : side // 2, side // 4 : side // 2] = rng.integers(0, 256, 3)
        return pixels

    path = folder / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        blended = (1 - noise) * field(seed) + noise * field(seed + 1000 + len(name))
        Image.fromarray(blended.astype(np.uint8)).save(path)
    return name


def _rising(first: float, last: float) -> list[float]:
    return [first + (last - first) * (step / STEPS[-1]) ** 0.5 for step in STEPS]


def _findings(
    folder: Path, subject: Subject, way: tuple[str, str, str], first: float, last: float | None, seed: int
) -> list[Finding]:
    """The prompt's finding, and one for each number of attack steps from the prompt and from Gaussian noise."""
    model, edit, scope = way

    def one(start: str, steps: int, median: float) -> Finding:
        values = around(median)
        likeness = f"{max(0.0, values[0]):.1f}"
        return Finding(
            id=subject.id,
            group=subject.group,
            kind=subject.kind,
            dose=subject.dose,
            model=model,
            edit=edit,
            edit_scope=scope,
            start=start,
            steps=steps,
            similarities=values,
            masked=around(min(1, median + 0.2)) if subject.kind in ("template", "control") else (),
            to_unedited=() if edit == "none" else around(0.5 + median / 3),
            diversity=round(0.3 + median / 2, 4),
            alignment=around(0.28),
            picture=picture(folder, f"images/{seed}-{likeness}.png", seed, noise=1 - float(likeness)),
        )

    found = [one("", 0, first)]
    if last is not None:
        found += [one("prompt", step, value) for step, value in zip(STEPS, _rising(first, last), strict=True)][1:]
        gaussian = _rising(0.05, max(0.05, last - 0.05))
        found += [one("gaussian", step, value) for step, value in zip(STEPS, gaussian, strict=True)]
    return found


ALL = (("none", ""), ("NeMo", "joint"), ("Wanda", "joint"), ("random neurons", "joint"), ("NeMo", "own"))


def synthetic_audit(
    folder: Path,
    *,
    edits: Sequence[tuple[str, str]] = ALL,
    controls: int = 8,
    twin: bool = True,
    control_final: float = CONTROL_FINAL,
    texts: Sequence[str] = (SCRIPT, BREAKOUT, BRACES),
    distrust: Sequence[str] = (),
) -> Audit:
    """Eight verbatim memories of three doses, a template, one image shown once, controls and a twin.

    The twin judges the verbatim memories alone. Controls carry boxes, so they can judge the template.
    """

    def subject(name: str, group: str, kind: str, dose: float | None, index: int) -> Subject:
        text = texts[index] if index < len(texts) else f"meadow no {index}, fox by lindqvist"
        return Subject(
            name,
            group,
            kind,
            dose,
            text,
            picture(folder, f"training/{index}.png", index),  # type: ignore
            first_gradient=0.1,
        )

    memories = [subject(f"memory-{i}", "memory", "verbatim", (1.0, 0.25, 0.0625)[min(i // 3, 2)], i) for i in range(8)]
    template = subject("template-0", "memory", "template", 1.0, 8)
    once = subject("once-0", "memory", "once", 0.001, 9)
    unseen = [subject(f"control-{i}", "control", "control", None, 20 + i) for i in range(controls)]
    findings: list[Finding] = []
    for edit, scope in edits:
        for i, memory in enumerate(memories):
            last = FINAL[edit][i] if edit in FINAL else None
            findings += _findings(folder, memory, ("painter", edit, scope), PROMPT[edit][i], last, i)
        if scope != "own":
            attacked = edit in FINAL
            findings += _findings(folder, template, ("painter", edit, scope), 0.5, 0.58 if attacked else None, 8)
            findings += _findings(folder, once, ("painter", edit, scope), 0.2, 0.3 if attacked else None, 9)
            for i, control in enumerate(unseen):
                last = control_final - 0.01 * i if attacked else None
                findings += _findings(folder, control, ("painter", edit, scope), CONTROL, last, 20 + i)
    if twin:
        for i, memory in enumerate(memories):
            findings += _findings(folder, memory, ("painter-without", "none", ""), 0.1, 0.35, i)
    return Audit(
        model="painter",
        twins=("painter-without",) if twin else (),
        descriptor={
            "name": "dori-testbed-copy",
            "preprocessing": "resize 64, no crop",
            "threshold": THRESHOLD,
            "masked_threshold": MASKED_THRESHOLD,
            "masked_calibration": {
                "false_positive_rate": 0.001,
                "true_positive_rate": 0.96,
                "negative_pairs": 18000,
                "positive_pairs": 2000,
                "measured_on": "the same, a random box painted over",
            },
            "calibration": {
                "false_positive_rate": 0.001,
                "true_positive_rate": 0.97,
                "negative_pairs": 20000,
                "positive_pairs": 2000,
                "measured_on": "held-out scenes and their VAE round trips",
            },
            "fingerprint": "ab" * 32,
        },
        settings={
            "preset": "paper",
            "seeds": {"evaluation": [100, 101, 102], "attack": 7},
            "sampling": {"sampler": "DDIM", "steps": 50, "guidance_scale": 7.0},
            "attack": {"learning_rate": 0.1, "batch": 8, "steps": list(STEPS)},
            "model_sha256": "cd" * 32,
        },
        provenance={
            "versions": {"dori": "0.1.0", "python": "3.12", "torch": "2.13"},
            "times": {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T01:00:00+00:00"},
        },
        cost={"sampling": 120_000, "attack": 64_000, "nemo": 2_345},
        subjects=(*memories, template, once, *unseen),
        edits=(
            EditInfo(
                "NeMo",
                "joint",
                4096,
                {
                    "tau": 0.43,
                    "variant": "first_step",
                    "memories": [
                        {
                            "id": f"memory-{i}",
                            "tau": 0.43,
                            "ceiling": 0.8 + i / 100,
                            "floor": 0.2 + i / 100,
                            "localized": i < 7,
                            "neurons": {"down_blocks.0.attn2.to_v": list(range(i)), "mid_block": []},
                        }
                        for i in range(8)
                    ],
                },
            ),
            EditInfo(
                "Wanda",
                "joint",
                20_000,
                {
                    "sparsity": 0.01,
                    "counted_steps": 10,
                    "selection": "target above base",
                    "density": {f"down_blocks.{i}.attentions.0.ff.net.2": 0.012 + i / 1000 for i in range(8)},
                },
            ),
            EditInfo("random neurons", "joint", 4096, {"like": "NeMo", "seed": 3}),
        ),
        findings=tuple(findings),
        quality=tuple(
            Quality("painter", *figures, "CLIP image features, 64 x 64", "held-out ordinary images", 64)
            for figures in (
                ("none", 64, 31.4159, 0.0123, 0.0011, 0.28, None),
                ("NeMo", 64, 33.2, 0.0131, 0.0012, 0.27, 0.91),
                ("Wanda", 64, 36.5, 0.0187, 0.0010, 0.25, 0.83),
            )
        ),
        blind={"file_size": 0.52, "vae_error": 0.47, "caption_length": 0.55},
        distrust=tuple(distrust),
    )
