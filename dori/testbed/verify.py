"""`dori testbed verify`: measures what the testbed promises, in about 45 minutes of one core.

Everything heavy is a cell of the run's folder, so that a killed verify goes on where it was. Generations are made
with the settings of the quick audit. The twins and the base are judges only: no edit is ever computed on them.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dori.audit.checks import blind_scores
from dori.audit.judge import Case, pixels_sha256
from dori.audit.plan import quick
from dori.edit import WeightMask
from dori.errors import DoriError
from dori.metrics.copy_descriptor import load_copy_descriptor
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import DOWN_MID, Place, Site, StableDiffusion
from dori.run import Run, canonical_sha256, cell_key, tensors_sha256
from dori.sampling import named_seed
from dori.stats import bootstrap
from dori.testbed import Checkpoint, objects, promises
from dori.testbed.bench import Bench, Material, encoded, open_material, texts
from dori.testbed.folder import TWINS, load_testbed
from dori.testbed.promises import Row, Similarities, to_text
from dori.testbed.scenes import drawn_kinds
from dori.testbed.subjects import DESCRIPTOR, ordinary_pairs
from dori.testbed.trials import EDITED_SEEDS, Trial, nemo_trials, prompted, trial_costs, wanda_trials

__all__ = ["to_text", "verify"]

HELD_OUT_IMAGES = 256
EDITED_PROMPTS = 48  # ordinary prompts asked under an edit
IMAGES_SEED = 3  # of ordinary images; another than those of the prompts
ZEROED: dict[str, Site] = {"value projections": "attention_value", "feed-forward second linears": "feed_forward"}
GROUPS: dict[str, tuple[Place, ...]] = {"down and mid": DOWN_MID, "up": ("up",)}


def verify(run: Run) -> list[Row]:
    """Measure every promise of the testbed.

    Args:
        run: the folder that remembers; the caller holds its lock.

    Returns:
        One row a promise: {"promise", "value", "interval", "goal", "reached", "detail"}, see `dori.testbed.promises`.

    Raises:
        DoriError: the planted model or the copy descriptor is not there.
    """
    bench = Bench(run, replace(quick(), memories=None, controls=None), load_copy_descriptor(DESCRIPTOR))
    model = load_testbed("planted")
    material = open_material(model, bench.plan.calibration_prompts)
    run.plan("verify", _planned(bench, material))
    rows = [vae_row(bench, model)]
    verbatim = bench.asked("planted", model, material.verbatim)
    strong = {case.memory.id: verbatim[case.memory.id] for case in material.strong}
    doses = sorted({int(case.memory.dose or 0) for case in material.verbatim})
    by_dose = {
        dose: {case.memory.id: verbatim[case.memory.id] for case in material.verbatim if case.memory.dose == dose}
        for dose in doses
    }
    rows.append(promises.dose_row(by_dose, bench.descriptor.threshold))
    ordinary = bench.images("ordinary", model, model.encode(material.prompts), made_from=list(material.prompts))
    rows += _stranger_rows(bench, model, material, ordinary)
    rows += [twin_row(bench, twin, material) for twin in TWINS]
    rows.append(_attack_row(bench, material))
    rows += zeroed_rows(bench, model, material.strong, strong)
    network, accuracy = _classifier(bench, model)
    rows += _mitigation_rows(bench, model, material, network, ordinary)
    found = objects.finds(network, ordinary, prompted(material.prompts)).numpy()
    rows.append(promises.objects_row(found, accuracy=accuracy, classes=len(drawn_kinds()), shown=objects.SHOWN, seed=0))
    rows += promises.blind_rows(
        blind_scores(model, material.verbatim, material.controls),
        sizes=(len(material.verbatim), len(material.controls)),
    )
    return [*rows, promises.descriptor_row(bench.descriptor)]


def _planned(bench: Bench, material: Material) -> dict[str, int]:
    """The cells that are sure to come; what the mitigations' settings add depends on what they reach."""
    counts = {
        "planted": len(material.verbatim),
        "ordinary": len(material.prompts),
        "control": len(material.controls),
        "attacked": len(material.attacked),
    }
    counts |= {twin: len(material.verbatim) for twin in TWINS if _open(twin)}
    counts |= {_zeroed_name(site, group): len(material.strong) for site in ZEROED for group in GROUPS}
    costs = trial_costs(bench, len(material.swept))
    for name, count in counts.items():
        costs |= bench.costs(name, count)
    attack = bench.plan.attack
    # A backward pass costs as much again as a forward pass and a bit.
    costs |= {
        cell_key("triggers", part[0].memory.id): round(2.4 * len(part) * attack.steps * attack.batch)
        for part in _chunks(material.attacked)
    }
    return costs | {"objects": 20_000}  # about two minutes, in U-Net rows


def _chunks(cases: Sequence[Case], size: int = 8) -> list[Sequence[Case]]:
    return [cases[first : first + size] for first in range(0, len(cases), size)]


def _open(checkpoint: Checkpoint) -> StableDiffusion | None:
    """A checkpoint, or None where it is not shipped."""
    try:
        return load_testbed(checkpoint)
    except DoriError:
        return None


def _psnr(images: Tensor, back: Tensor) -> list[float]:
    """Peak signal-to-noise ratio in dB of each image in [0, 1]; 100 where nothing is lost."""
    return (-10 * (images - back).square().flatten(1).mean(1).clamp(min=1e-10).log10()).tolist()


def vae_row(bench: Bench, model: StableDiffusion, images: Tensor | None = None) -> Row:
    """What the VAE loses of fresh ordinary images (or of those given)."""
    fresh = ordinary_pairs(HELD_OUT_IMAGES, seed=IMAGES_SEED)[1] if images is None else images
    inputs = {"model": model_fingerprint(model), "images": pixels_sha256(fresh)}
    values = bench.run.once_record(
        "vae", inputs, lambda: {"psnr": _psnr(fresh, model.to_images(model.to_latents(fresh)).cpu())}
    )["psnr"]
    return promises.row(
        "PSNR of the VAE on held-out images, in dB",
        bootstrap(values, np.mean, seed=0),
        at_least=25,
        detail=f"mean of {len(values)} fresh images; the worst has {min(values):.1f}",
    )


def _stranger_rows(bench: Bench, model: StableDiffusion, material: Material, ordinary: Tensor) -> list[Row]:
    """Nothing but a memory's own prompt draws a memory."""
    controls = bench.images("control", model, encoded(model, material.controls), made_from=texts(material.controls))
    groups = {
        "ordinary": (list(material.prompts), ordinary),
        "control": ([case.memory.id for case in material.controls], controls),
    }
    return [
        promises.rate_row(
            f"MR of {group} prompts, against the nearest planted image",
            bench.nearest(names, images, material.planted),
            bench.descriptor.threshold,
            at_most=0.02,
            detail=f"nearest of {len(material.planted)} planted images",
        )
        for group, (names, images) in groups.items()
    ]


def twin_row(bench: Bench, twin: Checkpoint, material: Material) -> Row:
    """A twin never saw the memories and must not draw them."""
    promise, model = f"MR of planted prompts on {twin}", _open(twin)
    if model is None:
        return promises.unmeasured(promise, "<= 0.02", "not shipped")
    return promises.rate_row(
        promise, bench.asked(twin, model, material.verbatim), bench.descriptor.threshold, at_most=0.02
    )


def _attack_row(bench: Bench, material: Material) -> Row:
    promise, model = f"MR of DoRI, {bench.plan.attack.steps} steps, on controls of the base", _open("base")
    if model is None:
        return promises.unmeasured(promise, "<= 0.05", "not shipped")
    return attack_row(bench, model, material.attacked, promise)


def attack_row(bench: Bench, model: StableDiffusion, cases: Sequence[Case], promise: str) -> Row:
    """The attack must not draw what the model never saw."""
    attack = replace(bench.plan.attack, snapshots=())
    triggers, made_from = [], []
    for part in _chunks(cases):
        seeds = [named_seed("attack", bench.plan.seed, "prompt", case.memory.id) for case in part]
        targets, starts = torch.stack([case.latent for case in part]), encoded(model, part)
        inputs = {
            "model": model_fingerprint(model),
            "attack": attack,
            "seeds": seeds,
            "texts": texts(part),
            "images": pixels_sha256(torch.stack([case.image for case in part])),
        }
        made_from.append(inputs)

        def search(z: Tensor = targets, y: Tensor = starts, own: list[int] = seeds) -> dict[str, Tensor]:
            return {"embeddings": attack(model, z, y, seeds=own).at(attack.steps)}

        triggers.append(bench.run.once_tensors(cell_key("triggers", part[0].memory.id), inputs, search)["embeddings"])
    found = bench.compared(cases, bench.images("attacked", model, torch.cat(triggers), made_from=made_from))
    return promises.rate_row(promise, found, bench.descriptor.threshold, at_most=0.05, detail="from their own prompts")


def _zeroed_name(site: str, group: str) -> str:
    return f"zeroed {site} {group}"


def zeroed(model: StableDiffusion, site: Site, places: Sequence[Place]) -> WeightMask:
    """The edit that zeroes whole layers, weights and biases."""
    names = tuple(f"{layer}." for layer in model.layers(site, places))
    return WeightMask(
        "zeroed",
        {
            key: torch.ones(weight.shape, dtype=torch.bool)
            for key, weight in model.unet.named_parameters()
            if key.startswith(names)
        },
    )


def zeroed_rows(bench: Bench, model: StableDiffusion, cases: Sequence[Case], before: Similarities) -> list[Row]:
    """Recall must hang on the layers that pruning acts on."""
    rows = []
    for label, site in ZEROED.items():
        after = {
            group: bench.asked(_zeroed_name(label, group), model, cases, edit=zeroed(model, site, places))
            for group, places in GROUPS.items()
        }
        up = promises.summary(after["up"], bench.descriptor.threshold)
        rows.append(
            promises.recall_row(
                f"recall left with all {label} of the down and mid blocks zeroed",
                before,
                after["down and mid"],
                bench.descriptor.threshold,
                detail=f"those of the up blocks instead: {up}",
            )
        )
    return rows


def _classifier(bench: Bench, model: StableDiffusion) -> tuple[objects.ObjectNetwork, float]:
    """The trained classifier and its accuracy; its state lies in a folder that bears its inputs' hash."""
    recipe = objects.ObjectRecipe()
    inputs = {"recipe": recipe, "vae": tensors_sha256(model.vae.state_dict())}
    folder = bench.run.folder / f"objects-{canonical_sha256(inputs)[:8]}"

    def round_trip(images: Tensor) -> Tensor:
        return model.to_images(model.to_latents(images))

    def train() -> dict[str, Tensor]:
        network = objects.train_objects(folder, round_trip, recipe=recipe, say=bench.run.say)
        return dict(network.state_dict()) | {
            "accuracy": torch.tensor(objects.accuracy(network, round_trip, recipe=recipe), dtype=torch.float64)
        }

    stored = bench.run.once_tensors("objects", inputs, train)
    accuracy, network = float(stored.pop("accuracy")), objects.new_network(recipe.seed)
    network.load_state_dict(stored)
    return network.eval(), accuracy


def _mitigation_rows(
    bench: Bench, model: StableDiffusion, material: Material, network: objects.ObjectNetwork, ordinary: Tensor
) -> list[Row]:
    prompts = material.prompts[:EDITED_PROMPTS]
    unedited = objects.finds(network, ordinary[: len(prompts), :EDITED_SEEDS], prompted(prompts)).float().mean()
    trial = Trial(bench, model, material.swept, prompts, network, float(unedited))
    detail = f"{len(trial.cases)} memories of the two highest doses"
    tried, found = nemo_trials(trial, material.calibration)
    return [
        promises.mitigation_row("MR under NeMo", tried, detail=f"{detail}; {found}"),
        promises.mitigation_row("MR under Wanda", wanda_trials(trial), detail=detail),
    ]
