"""What an edit costs: ordinary prompts before and after, against held-out ordinary images (methods.md 6.2)."""

from collections.abc import Sequence

from torch import Tensor

from dori.audit.edits import fingerprint
from dori.audit.judge import Judge, finite_images
from dori.audit.plan import Plan
from dori.edit import WeightMask
from dori.findings import Quality
from dori.metrics.quality import frechet_distance, kernel_distance
from dori.metrics.similarity import cosine
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run, cell_key, tensors_sha256
from dori.sampling import initial_noise, named_seed, sample


def _described(judge: Judge, images: Tensor) -> dict[str, Tensor]:
    return {"descriptors": judge.descriptor(images).cpu(), "features": judge.features(images)}


def _drawn(model: StableDiffusion, plan: Plan, judge: Judge, prompts: Sequence[str], name: str) -> dict[str, Tensor]:
    """One generation of each prompt with a seed of its own, described."""
    seeds = [named_seed(name, plan.seed, k) for k in range(len(prompts))]
    latents = sample(model, model.encode(list(prompts)), initial_noise(model, seeds), steps=plan.sampling_steps,
                     guidance_scale=plan.guidance_scale)
    images, _ = finite_images(model.to_images(latents).cpu())
    found = _described(judge, images)
    aligned = judge.align(images, prompts)
    return found if aligned is None else found | {"alignment": aligned.cpu()}


def ordinary_quality(model: StableDiffusion, plan: Plan, judge: Judge, run: Run, model_hash: str,
                     edits: Sequence[WeightMask], ordinary: Sequence[str],
                     held_out: Tensor | None) -> tuple[Quality, ...]:
    """The quality row of every edit; `edits` begins with the one that changes nothing.

    The distances are taken to held-out ordinary images; without any, to the unedited model's generations of the same
    prompts under other seeds.
    """
    prompts = list(ordinary[: plan.quality_prompts])
    if len(prompts) < 2:
        return ()
    base: dict[str, object] = {
        "model": model_hash, "prompts": prompts, "steps": plan.sampling_steps, "guidance": plan.guidance_scale,
        "seed": plan.seed, "descriptor": [judge.descriptor.name, judge.descriptor.fingerprint]}
    if held_out is not None:
        reference = run.once_tensors("quality.reference", base | {"images": tensors_sha256({"x": held_out})},
                                     lambda: _described(judge, held_out))
    else:
        reference = run.once_tensors("quality.reference", base,
                                     lambda: _drawn(model, plan, judge, prompts, "quality reference"))
    rows: list[Quality] = []
    unedited: Tensor | None = None
    for edit in edits:
        with edit.applied(model):
            found = run.once_tensors(cell_key("quality", edit.name), base | {"edit": fingerprint(edit)},
                                     lambda: _drawn(model, plan, judge, prompts, "quality"))
        drift = None if unedited is None else float(cosine(found["descriptors"], unedited).median())
        unedited = found["descriptors"] if unedited is None else unedited
        kernel = kernel_distance(found["features"], reference["features"],
                                 seed=named_seed("kernel distance", plan.seed))
        rows.append(Quality(
            model=model.name, edit=edit.name, prompts=len(prompts),
            frechet=float(frechet_distance(found["features"], reference["features"])), kernel=kernel.value,
            kernel_std=kernel.deviation, alignment=float(found["alignment"].median()) if "alignment" in found else None,
            to_unedited=drift))
    return tuple(rows)


def quality_rows(plan: Plan, rows: Sequence[Quality], held_out: Tensor | None) -> int:
    """U-Net rows that the quality rows cost, the unedited model's other generations included where they were needed."""
    drawn = sum(row.prompts for row in rows) + (rows[0].prompts if rows and held_out is None else 0)
    return drawn * plan.sampling_steps * (2 if plan.guidance_scale != 1 else 1)
