"""What an edit costs: ordinary prompts before and after, against held-out ordinary images (methods.md 6.2)."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from dori.audit.judge import Judge, finite_images, pixels_sha256
from dori.audit.plan import Plan
from dori.edit import Edit
from dori.findings import Quality
from dori.metrics.quality import frechet_distance, kernel_distance
from dori.metrics.similarity import cosine
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run, cell_key
from dori.sampling import initial_noise, named_seed, sample
from dori.stats import bootstrap


def _described(judge: Judge, images: Tensor) -> dict[str, Tensor]:
    return {"descriptors": judge.descriptor(images).cpu(), "features": judge.features(images)}


def drawn_and_described(
    model: StableDiffusion,
    judge: Judge,
    prompts: Sequence[str],
    *,
    name: str,
    seed: int,
    steps: int,
    guidance_scale: float,
) -> dict[str, Tensor]:
    """One generation of each prompt, described.

    Args:
        model: as it stands.
        judge: whose descriptors, features and alignment.
        prompts: n of them.
        name: of the stream of seeds; each prompt has its own.
        seed: root of the stream.
        steps: DDIM steps.
        guidance_scale: of the generations.

    Returns:
        "descriptors" and "features", shape (n, d), and "alignment", shape (n,), if the judge has a CLIP.
    """
    seeds = [named_seed(name, seed, k) for k in range(len(prompts))]
    latents = sample(
        model, model.encode(list(prompts)), initial_noise(model, seeds), steps=steps, guidance_scale=guidance_scale
    )
    images, _ = finite_images(model.to_images(latents).cpu())
    found = _described(judge, images)
    aligned = judge.align(images, prompts)
    return found if aligned is None else found | {"alignment": aligned.cpu()}


HELD_OUT, UNEDITED = "held-out ordinary images", "the unedited model's images of the same prompts under other seeds"


def quality_key(stage: str, edit: str) -> str:
    """The cell of one edit's generations."""
    return cell_key(stage, edit)


def _reference_key(stage: str) -> str:
    return f"{stage}.reference"


def quality_cells(edits: Sequence[str], prompts: int, *, held_out: bool, stage: str = "quality") -> dict[str, int]:
    """Every cell of the quality table with the images that it draws."""
    if prompts < 2:
        return {}
    return {_reference_key(stage): 0 if held_out else prompts} | {quality_key(stage, edit): prompts for edit in edits}


def ordinary_quality(
    model: StableDiffusion,
    plan: Plan,
    judge: Judge,
    run: Run,
    *,
    base: Mapping[str, object],
    edits: Sequence[Edit],
    prompts: Sequence[str],
    held_out: Tensor | None,
    stage: str = "quality",
) -> tuple[Quality, ...]:
    """The quality row of every edit; without two prompts there is none.

    The distances are taken to held-out ordinary images; without any, to the unedited model's generations of the same
    prompts under other seeds.

    Args:
        model: the audited model without an edit.
        plan: sampling settings and seed.
        judge: whose features and alignment.
        run: the folder that remembers.
        base: inputs that all cells share (the fingerprints of the model and, under "judge", of the judge).
        edits: begins with the one that changes nothing.
        prompts: ordinary prompts.
        held_out: images in [0, 1], shape (m, 3, H, W), or None.
        stage: begins the names of the cells; analyses that share a folder need different ones.
    """
    if len(prompts) < 2:
        return ()
    reference, found = _cells(
        model, plan, judge, run, base=base, edits=edits, prompts=prompts, held_out=held_out, stage=stage
    )
    unedited = found[0]["descriptors"]
    rows: list[Quality] = []
    for edit, own in zip(edits, found, strict=True):
        kernel = kernel_distance(own["features"], reference["features"], seed=named_seed("kernel distance", plan.seed))
        likeness = bootstrap(cosine(own["descriptors"], unedited).numpy(), np.median, seed=plan.seed) if rows else None
        rows.append(
            Quality(
                model=model.name,
                edit=edit.name,
                prompts=len(prompts),
                frechet=float(frechet_distance(own["features"], reference["features"])),
                kernel=kernel.value,
                kernel_std=kernel.deviation,
                alignment=float(own["alignment"].median()) if "alignment" in own else None,
                to_unedited=None if likeness is None else likeness.value,
                features=judge.features_name,
                reference=UNEDITED if held_out is None else HELD_OUT,
                references=len(reference["features"]),
                to_unedited_low=None if likeness is None else likeness.low,
                to_unedited_high=None if likeness is None else likeness.high,
            )
        )
    return tuple(rows)


def _cells(
    model: StableDiffusion,
    plan: Plan,
    judge: Judge,
    run: Run,
    *,
    base: Mapping[str, object],
    edits: Sequence[Edit],
    prompts: Sequence[str],
    held_out: Tensor | None,
    stage: str,
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What the rows are made of: the reference, and the generations under every edit, described."""
    shared: dict[str, object] = {
        **base,
        "prompts": list(prompts),
        "steps": plan.sampling_steps,
        "guidance": plan.guidance_scale,
        "seed": plan.seed,
    }

    def draw(name: str) -> dict[str, Tensor]:
        return drawn_and_described(
            model,
            judge,
            prompts,
            name=name,
            seed=plan.seed,
            steps=plan.sampling_steps,
            guidance_scale=plan.guidance_scale,
        )

    if held_out is not None:
        pixels = {"images": pixels_sha256(held_out)}
        reference = run.once_tensors(_reference_key(stage), shared | pixels, lambda: _described(judge, held_out))
    else:
        reference = run.once_tensors(_reference_key(stage), shared, lambda: draw("quality reference"))
    found = []
    for edit in edits:
        with edit.applied(model):
            inputs = shared | {"edit": edit.fingerprint}
            found.append(run.once_tensors(quality_key(stage, edit.name), inputs, lambda: draw("quality")))
    return reference, found
