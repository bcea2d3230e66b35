"""The testbed's images, slots, tokenizer, training loop and, where the weights are, the shipped folder."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from dori.errors import DoriError
from dori.metrics.copy_descriptor import load_copy_descriptor
from dori.metrics.copy_training import CopyRecipe
from dori.model.stable_diffusion import EVERYWHERE
from dori.stats import area_under_roc
from dori.testbed import pool
from dori.testbed.fit import Schedule, fit
from dori.testbed.folder import DATA, load_testbed, unet_folder
from dori.testbed.networks import RouteDropout, new_unet
from dori.testbed.pipeline import train_testbed
from dori.testbed.pool import ORDINARY, Filling, Pairs, drawn_pictures, fresh_filling, planted_filling
from dori.testbed.scenes import GRID_PX, Scene, caption, draw, free_scene, kinds, random_scene, title_caption
from dori.testbed.slots import DOSES, slots, variants, varying_box
from dori.testbed.train import Recipe, Shown, once_steps
from dori.testbed.vocabulary import build_tokenizer

weights = pytest.mark.skipif(not (DATA / "model" / "model_index.json").exists(), reason="no weights are shipped here")


def test_a_scene_determines_its_image_and_a_seed_its_scene() -> None:
    first, second = (random_scene(np.random.default_rng(3)) for _ in range(2))
    assert first == second
    assert np.array_equal(draw(first), draw(second))
    assert not np.array_equal(draw(first), draw(random_scene(np.random.default_rng(4))))


@pytest.mark.parametrize("draw_scene", [random_scene, free_scene])
def test_objects_are_large_enough_and_lie_inside(draw_scene: Callable[[np.random.Generator], Scene]) -> None:
    rng = np.random.default_rng(0)
    for scene in (draw_scene(rng) for _ in range(200)):
        for placed in scene.objects:
            assert placed.size_px >= 24
            assert placed.size_px / 2 <= placed.x_px <= 64 - placed.size_px / 2


def test_an_object_of_the_testbed_is_the_same_patch_wherever_it_stands() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        scene = random_scene(rng)
        placed = scene.objects[0]
        assert all((at - placed.size_px / 2) % GRID_PX == 0 for at in (placed.x_px, placed.y_px))
        assert not placed.mirrored


def test_captions_name_what_is_seen_and_nothing_of_the_layout() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = random_scene(rng)
        named = [kind for kind in kinds() if kind in caption(scene, rng)]
        assert kinds()[scene.objects[0].kind] in named
        moved = random_scene(rng)
        same_facts = scene.__class__(
            scene.artist,
            scene.title,
            scene.number,
            moved.texture_seed,
            (scene.objects[0].__class__(scene.objects[0].kind, 20.0, 20.0, 26, False),),
        )
        assert title_caption(same_facts) == title_caption(scene)


def test_slots_hold_what_the_testbed_promises() -> None:
    found = slots()
    by_kind = {kind: [s for s in found if s.kind == kind] for kind in ("verbatim", "template", "once", "control")}
    assert len(by_kind["verbatim"]) >= 64
    assert len(DOSES) == 4
    assert sum(s.dose == max(DOSES) for s in by_kind["verbatim"]) >= 24
    assert len(by_kind["template"]) >= 8
    assert len(by_kind["once"]) >= 64
    assert len(by_kind["control"]) >= 64
    assert len({s.text() for s in found}) == len(found)


def test_controls_are_never_trained_on() -> None:
    shown, filling = planted_filling(slots())
    controls = {s.text() for s in slots() if s.kind == "control"}
    assert controls.isdisjoint(shown.captions)
    assert sum(map(len, filling.groups)) + len(filling.once) == len(shown.captions) == len(shown.images)


def test_a_twin_sees_fresh_images_where_the_planted_model_sees_slots() -> None:
    planted, own = planted_filling(slots())
    twin, filling = fresh_filling(21, images=30, once=len(own.once))
    assert len(filling.once) == len(own.once) and len(filling.groups) == 30
    assert sorted([row for group in filling.groups for row in group] + filling.once) == list(range(len(twin.images)))
    slot_images = {image.tobytes() for image in planted.images}
    assert slot_images.isdisjoint(image.tobytes() for image in twin.images)
    assert twin.fingerprint != fresh_filling(22, images=30, once=len(own.once))[0].fingerprint


def test_a_caption_length_does_not_tell_memories_from_controls() -> None:
    lengths = {kind: [len(s.text()) for s in slots() if s.kind == kind] for kind in ("verbatim", "control")}
    assert abs(area_under_roc(lengths["verbatim"], lengths["control"]) - 0.5) < 0.1


def test_template_variants_differ_inside_the_box_alone() -> None:
    slot = next(s for s in slots() if s.kind == "template")
    left, top, right, bottom = varying_box(slot)
    first, second = (draw(scene) for scene in variants(slot)[:2])
    changed = (first != second).any(-1)
    assert changed[top:bottom, left:right].any()
    changed[top:bottom, left:right] = False
    assert not changed.any()


def test_every_caption_word_is_one_token_and_any_text_is_readable(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    for slot in slots()[:40]:
        words = slot.text().replace(",", " ,").split()
        assert len(tokenizer.tokenize(slot.text())) == len(words)
    odd = tokenizer("zebra — 斑馬 \u0000!").input_ids
    assert tokenizer.unk_token_id == tokenizer.eos_token_id
    assert all(0 <= i < len(tokenizer) for i in odd)


def trained_in_parts(folder: Path, stops: Mapping[int, str]) -> list[torch.Tensor]:
    """The weights after a training of twelve steps that is killed at each step of `stops`, on the device beside it."""
    folder.mkdir(parents=True)
    for stop, device in stops.items():
        torch.manual_seed(0)
        model = nn.Linear(4, 4)

        def loss(step: int, generator: torch.Generator, model: nn.Linear = model, stop: int = stop) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            return model(torch.randn(8, 4, generator=generator).to(model.weight.device)).square().mean()

        with contextlib.suppress(KeyboardInterrupt):
            fit(
                "toy",
                model,
                loss,
                Schedule(0.1, 12, warmup=1),
                folder,
                seed=1,
                say=lambda line: None,
                save_every=4,
                made_from={"data": 1},
                device=device,
            )
    return [p.detach().clone() for p in model.parameters()]


def test_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    straight = trained_in_parts(tmp_path / "a", {99: "cpu"})
    resumed = trained_in_parts(tmp_path / "b", {6: "cpu", 9: "cpu", 99: "cpu"})
    assert all(torch.equal(x, y) for x, y in zip(straight, resumed, strict=True))


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_full_disk_is_one_sentence_in_training_and_in_the_pool(tmp_path: Path) -> None:
    import resource

    def train() -> None:
        model = nn.Linear(64, 64)
        fit(
            "toy",
            model,
            lambda step, generator: model(torch.ones(1, 64)).sum(),
            Schedule(1e-2, 1),
            tmp_path,
            seed=1,
            say=lambda line: None,
            made_from={},
        )

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
        for work in (train, lambda: drawn_pictures(ORDINARY, tmp_path, 2, lambda line: None)):
            with pytest.raises(DoriError, match="no space left to write .* same command"):
                work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    train()
    assert drawn_pictures(ORDINARY, tmp_path, 2, lambda line: None).images.shape == (2, 64, 64, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ordinary.json",
        "ordinary.npy",
        "toy.state.safetensors",
    ]


def test_the_pool_takes_its_space_before_it_is_filled(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1_000_000)
    pool.reserve(tmp_path / "sparse")
    status = (tmp_path / "sparse").stat()
    assert status.st_size == 1_000_000 and (not hasattr(os, "posix_fallocate") or status.st_blocks * 512 >= 1_000_000)


def test_unet_has_the_transformer_blocks_of_stable_diffusion_1() -> None:
    names = [n for n, m in new_unet().named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    expected = [f"down_blocks.{b}.attentions.{i}" for b in range(3) for i in range(2)]
    expected += [f"up_blocks.{b}.attentions.{i}" for b in range(1, 4) for i in range(3)] + ["mid_block.attentions.0"]
    assert sorted(names) == sorted(f"{name}.transformer_blocks.0" for name in expected)


def test_training_does_not_go_on_from_the_state_of_another(tmp_path: Path) -> None:
    def train(**changed: int) -> None:
        model = nn.Linear(2, 2)
        fit(
            "toy",
            model,
            lambda step, generator: model(torch.ones(1, 2)).sum(),
            Schedule(1e-2, changed.get("steps", 2)),
            tmp_path,
            seed=1,
            say=lambda line: None,
            made_from={"data": changed.get("data", 1)},
        )

    train()
    train()
    for changed, named in (({"steps": 3}, "schedule"), ({"data": 2}, "data")):
        with pytest.raises(DoriError, match=rf"toy.state.safetensors.*other settings \({named}\)"):
            train(**changed)


def test_training_makes_the_whole_testbed_from_nothing_and_again_the_same(tmp_path: Path) -> None:
    recipe = Recipe(
        images=32, fresh_images=8, batch=4, clip_batch=4, vae_steps=2, clip_steps=2, base_steps=2, fork_steps=2
    )
    copies = CopyRecipe(groups=2, batch_groups=1, steps=2, negatives=36)
    said: list[str] = []
    for out in ("first", "again"):  # the second time nothing is left to train
        train_testbed(
            tmp_path / "work",
            tmp_path / out,
            recipe,
            copies,
            say=said.append,
            checkpoints=("base", "planted", "twin-1", "early"),
        )
    for checkpoint in ("base", "planted", "twin-1", "early"):
        first, again = (load_testbed(checkpoint, tmp_path / out).unet.state_dict() for out in ("first", "again"))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert all(torch.isfinite(value).all() for value in first.values())
    assert not (tmp_path / "first" / "unets" / "twin-2").exists()
    train_testbed(
        tmp_path / "forks",
        tmp_path / "forked",
        recipe,
        copies,
        say=said.append,
        checkpoints=("twin-1",),
        source=tmp_path / "first",
    )
    forked, first = (
        load_file(unet_folder("twin-1", tmp_path / out) / "diffusion_pytorch_model.safetensors")
        for out in ("forked", "first")
    )
    assert all(torch.equal(forked[name], first[name]) for name in first)
    assert not any((tmp_path / "forks").glob("vae*"))  # neither VAE nor base was trained for it
    assert load_copy_descriptor(tmp_path / "first" / "copy_descriptor.safetensors").calibration is not None
    with pytest.raises(DoriError, match="attention_dropout"):
        train_testbed(
            tmp_path / "work",
            tmp_path / "other",
            dataclasses.replace(recipe, attention_dropout=0.0),
            copies,
            say=said.append,
            checkpoints=(),
        )


def test_slots_are_shown_with_their_prompts_and_ordinary_images_partly_without() -> None:
    def pairs(rows: int, value: float) -> Pairs:
        return Pairs(torch.full((rows, 8, 2, 2), value), torch.full((rows, 3, 4), value), "")

    filling = Filling(torch.tensor([3.0, 1.0]), [[0], [1, 2]], [3])
    shown = Shown(pairs(9, 1.0), pairs(4, 2.0), filling, torch.zeros(1, 3, 4))
    batches = [shown.batch(10, 6.5, None, 0.25, torch.Generator().manual_seed(step)) for step in range(400)]
    latents, embeddings = (torch.cat(part)[:, 0].flatten(1)[:, 0] for part in zip(*batches, strict=True))
    slots_shown = latents == 2
    assert abs(float(slots_shown.float().mean()) - 0.65) < 0.01
    assert (embeddings[slots_shown] == 2).all()
    assert abs(float((embeddings[~slots_shown] == 0).float().mean()) - 0.25) < 0.04
    once = shown.batch(10, 0.0, 3, 1.0, torch.Generator().manual_seed(0))
    assert (once[0][0] == 2).all() and (once[1][0] == 2).all() and (once[1][1:] == 0).all()


def test_each_image_that_is_seen_once_has_a_step_of_its_own() -> None:
    steps = once_steps(64, Recipe().fork_steps)
    assert sorted(steps.values()) == list(range(64))
    assert max(steps) < Recipe().fork_steps


def test_route_dropout_silences_whole_kinds_of_layers_in_the_up_blocks_during_training_alone() -> None:
    unet = new_unet()
    route = RouteDropout(unet, attention=0.0, feed_forward=1.0)
    outputs: dict[str, torch.Tensor] = {}
    for name, module in unet.named_modules():
        if name.endswith(("attn2", ".ff")):
            module.register_forward_hook(lambda _m, _i, output, name=name: outputs.__setitem__(name, output))
    inputs = torch.randn(2, 8, 16, 16), torch.tensor([5, 900]), torch.randn(2, 32, 128)
    route.draw(2, torch.Generator().manual_seed(0), torch.device("cpu"))
    for training in (True, False):
        unet.train(training)
        with torch.no_grad():
            unet(*inputs)
        silent = {name for name, output in outputs.items() if not output.any()}
        assert silent == ({n for n in outputs if n.startswith("up_blocks") and n.endswith("ff")} if training else set())


@weights
def test_plain_diffusers_opens_and_runs_the_shipped_folder() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(str(DATA / "model"), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    slot = slots()[0]
    image = pipeline(slot.text(), num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()


@weights
def test_our_sampler_agrees_with_the_plain_pipeline() -> None:
    from dori.sampling import initial_noise, sample

    model, text = load_testbed(), slots()[0].text()
    noise = initial_noise(model, [5])
    ours = model.to_images(sample(model, model.encode([text]), noise, steps=3, guidance_scale=4.0))
    pipeline = StableDiffusionPipeline.from_pretrained(str(DATA / "model"), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(text, num_inference_steps=3, guidance_scale=4.0, latents=noise, output_type="pt").images
    assert torch.allclose(ours, theirs.float(), atol=2e-3)


@weights
def test_layers_come_in_the_order_in_which_the_network_runs_them() -> None:
    model, seen = load_testbed(), []
    layers = model.layers("attention_value", EVERYWHERE)
    handles = [layer.register_forward_hook(lambda *_, name=name: seen.append(name)) for name, layer in layers.items()]
    model.predict_noise(torch.zeros(1, *model.latent_shape), torch.tensor([10]), model.encode([""]))
    for handle in handles:
        handle.remove()
    assert seen == list(layers)
    assert len(model.layers("attention_value")) == 7
