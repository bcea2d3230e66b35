"""A delta leaves no trace, roundings are what they say, and the loop that moves weights keeps its promises."""

import json
from pathlib import Path

import published
import pytest
import torch
from conftest import tiny_parts
from diffusers import StableDiffusionPipeline
from erasing import draw, forget, retain, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from dori.edit import load_edit
from dori.erase.delta import CannotErase, WeightDelta, difference
from dori.erase.ordinary import OrdinaryTraining
from dori.erase.pairs import denoising_losses, noised
from dori.erase.rounding import half, int8, rounded
from dori.erase.tuning import Tuner, chosen, tuning
from dori.erase.write import save_model, unet_names
from dori.errors import DoriError
from dori.model.load import load_model, model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run


def delta(model: StableDiffusion, seed: int = 0) -> WeightDelta:
    """A random change of two weights."""
    names = [name for name, _ in model.unet.named_parameters()][:2]
    shapes = dict(model.unet.named_parameters())
    return WeightDelta(
        "mine",
        {name: 0.1 * draw(*shapes[name].shape, seed=seed + i) for i, name in enumerate(names)},
        {"steps": 3, "log": [0.5]},
    )


def test_a_delta_is_added_and_taken_off_bit_for_bit_also_after_an_exception(tiny: StableDiffusion) -> None:
    edit, before = delta(tiny), model_fingerprint(tiny)
    expected = {key: dict(tiny.unet.named_parameters())[key].clone() + value for key, value in edit.deltas.items()}
    with edit.applied(tiny):
        inside = dict(tiny.unet.named_parameters())
        assert all(torch.equal(inside[key], value) for key, value in expected.items())
        assert model_fingerprint(tiny) != before
    assert model_fingerprint(tiny) == before
    with pytest.raises(RuntimeError, match="stop"), edit.applied(tiny):
        raise RuntimeError("stop")
    assert model_fingerprint(tiny) == before


def test_a_delta_is_rounded_once_on_a_half_precision_model(tiny: StableDiffusion) -> None:
    edit = delta(tiny)
    tiny.unet.half()
    key = next(iter(edit.deltas))
    base = dict(tiny.unet.named_parameters())[key].clone()
    with edit.applied(tiny):
        assert torch.equal(dict(tiny.unet.named_parameters())[key], (base.float() + edit.deltas[key]).half())


def test_a_delta_survives_its_file(tiny: StableDiffusion, tmp_path: Path) -> None:
    edit = delta(tiny)
    edit.save(tmp_path / "a.safetensors")
    edit.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_edit(tmp_path / "a.safetensors")
    assert isinstance(loaded, WeightDelta)
    assert (loaded.name, loaded.details, loaded.fingerprint) == (edit.name, edit.details, edit.fingerprint)
    assert loaded.size == edit.size == sum(value.numel() for value in edit.deltas.values())
    flat = torch.cat([value.flatten() for value in edit.deltas.values()]).double()
    assert loaded.norm == pytest.approx(float(flat.norm()), rel=1e-12)


def test_what_does_not_fit_is_refused_in_one_sentence(tiny: StableDiffusion, tmp_path: Path) -> None:
    key = next(iter(delta(tiny).deltas))
    for bad in ({"nowhere": torch.ones(2)}, {key: torch.ones(1, 1)}):
        with pytest.raises(DoriError, match="does not fit"), WeightDelta("bad", bad).applied(tiny):
            pass
    for header in ({"kind": "weight_delta"}, {"edit": "{"}, {"edit": json.dumps([1])}):
        save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata=header)
        with pytest.raises(DoriError, match="edit"):
            load_edit(tmp_path / "x.safetensors")
    base = {"w": torch.zeros(2)}
    with pytest.raises(DoriError, match="diverged"):
        difference("bad", tiny, base, {"w": torch.tensor([0.0, torch.nan])}, {})
    assert difference("none", tiny, base, {"w": torch.zeros(2)}, {}).deltas == {}


def test_roundings_are_the_nearest_numbers(tiny: StableDiffusion) -> None:
    w = draw(5, 3, 2, 2, seed=0)
    assert torch.equal(half(w), w.to(torch.float16).to(torch.float32))
    found = int8(w)
    for row, rounded_row in zip(w, found, strict=True):
        grid = torch.arange(-127, 128) * (row.abs().max() / 127)
        nearest = grid[(row.reshape(-1, 1) - grid).abs().argmin(1)].view(row.shape)
        assert torch.allclose(rounded_row, nearest, rtol=1e-6, atol=0)
    assert torch.equal(int8(w[:, 0, 0, 0]), w[:, 0, 0, 0]) and torch.equal(int8(torch.zeros(2, 2)), torch.zeros(2, 2))
    before = weights(tiny)
    with rounded(tiny, "int8"):
        inside = weights(tiny)
    assert all(torch.equal(inside[name], int8(value)) for name, value in before.items())
    assert all(torch.equal(value, before[name]) for name, value in weights(tiny).items())


# --------------------------------------------------------------------------------------------------------- writing out


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the tiny scheduler's settings are old
def test_an_erased_model_opens_as_a_diffusers_folder(tiny: StableDiffusion, tmp_path: Path) -> None:
    edit = delta(tiny)
    with edit.applied(tiny):
        save_model(tiny, tmp_path / "out", source="tiny")
        expected = weights(tiny)
    opened = load_model(str(tmp_path / "out"))
    assert all(torch.equal(value, expected[name]) for name, value in weights(opened).items())
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    with pytest.raises(DoriError, match="exists"):
        save_model(tiny, tmp_path / "out", source="tiny")
    with pytest.raises(DoriError, match="single file"):
        save_model(tiny, tmp_path / "out.safetensors", source="tiny")


def test_a_full_disk_leaves_no_half_a_model(tiny: StableDiffusion, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = 2 * sum(weight.numel() for weight in tiny.unet.parameters())  # half of the U-Net's bytes
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(DoriError, match="out cannot be written.*free some space"):
            save_model(tiny, tmp_path / "out", source="tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*out*"))


def test_a_single_file_keeps_its_layout(tiny: StableDiffusion, tmp_path: Path) -> None:
    parameters = dict(tiny.unet.named_parameters())
    names = published.unet_names(parameters)
    tensors = {key: parameters[name].detach().half().contiguous() for key, name in names.items()}
    tensors["first_stage_model.x"] = torch.ones(2)
    save_file(tensors, tmp_path / "in.safetensors", metadata={"author": "someone"})
    assert unet_names(tensors, dict(tiny.unet.config)) == names
    with delta(tiny).applied(tiny):
        rounded = save_model(tiny, tmp_path / "out.safetensors", source=str(tmp_path / "in.safetensors"))
        assert rounded  # the model is in float32, the file it came from in half precision
        expected = weights(tiny)
    written = load_file(tmp_path / "out.safetensors")
    assert written.keys() == tensors.keys() and torch.equal(written["first_stage_model.x"], torch.ones(2))
    assert all(torch.equal(written[key], expected[name].half()) for key, name in names.items())


# ------------------------------------------------------------------------------------------------------ moving weights


def test_what_a_killed_save_left_does_not_stop_the_run_around_it(
    tiny: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(tiny.tokenizer), "save_pretrained", die)
        with pytest.raises(KeyboardInterrupt):
            save_model(tiny, out / "model", source="somewhere")
    assert [path.is_dir() for path in out.iterdir()] == [True]
    with Run(out, modules=()).locked():  # as the same command does, with the model inside its folder
        save_model(tiny, out / "model", source="somewhere")
    assert {path.name for path in out.iterdir()} - {"lock"} == {"model"}


def batch_losses(model: StableDiffusion):  # noqa: ANN201
    """Losses of six fixed rows."""
    batch = noised(
        model, draw(6, *model.latent_shape, seed=3), model.encode(list("abcdef")), torch.Generator().manual_seed(4)
    )
    return denoising_losses(model, batch), batch


def test_gradients_are_those_of_the_mean_loss_whatever_the_parts(tiny: StableDiffusion) -> None:
    losses, batch = batch_losses(tiny)
    with tuning(tiny, Tuner(rows_per_call=2)) as tuned:
        gradient, loss = tuned.gradient(losses, len(batch))
        whole = losses(torch.arange(6)).mean()
        value = float(whole.detach())
        expected = torch.autograd.grad(whole, list(tuned.weights.values()), allow_unused=True)
    assert loss == pytest.approx(value, rel=1e-5)
    for found, reference in zip(gradient, expected, strict=True):
        assert torch.allclose(found, torch.zeros_like(found) if reference is None else reference, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_ends_the_training_before_it_is_logged(value: float, tiny: StableDiffusion) -> None:
    losses, batch = batch_losses(tiny)
    with tuning(tiny, Tuner()) as tuned, pytest.raises(CannotErase, match=r"diverged after 0 updates \(its loss"):
        tuned.gradient(lambda rows: losses(rows) + value, len(batch))


def test_updates_are_adamw_on_the_clipped_gradient(tiny: StableDiffusion) -> None:
    losses, batch = batch_losses(tiny)
    before = weights(tiny)
    settings = Tuner(learning_rate=1e-2, clip=1e-3)
    with tuning(tiny, settings) as tuned:
        gradient, _ = tuned.gradient(losses, len(batch))
        norm = tuned.update(gradient)
        found = weights(tiny)
        edit = tuned.edit("x", {})
    assert norm > settings.clip
    for (name, value), grad in zip(before.items(), gradient, strict=True):
        clipped = grad.double() * settings.clip / norm
        moved = clipped / (clipped.abs() + 1e-8)  # Adam's first step
        expected = value.double() * (1 - 1e-2 * 1e-2) - 1e-2 * moved
        assert torch.allclose(found[name].double(), expected, atol=2e-4)
    with edit.applied(tiny):
        assert all(torch.allclose(value, found[name], rtol=0, atol=1e-7) for name, value in weights(tiny).items())
    assert all(torch.equal(value, before[name]) for name, value in weights(tiny).items())
    assert not any(parameter.requires_grad for parameter in tiny.unet.parameters())


def test_lora_gradients_follow_from_the_weights(tiny: StableDiffusion) -> None:
    losses, batch = batch_losses(tiny)
    with tuning(tiny, Tuner(part="lora", rank=2, alpha=6.0, weight_decay=0.0), seed=1) as tuned:
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in tuned.leaves.items()}
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf += 0.05 * draw(*leaf.shape, seed=len(name))
                tuned.leaves[name].copy_(leaf)
        tuned._push()
        gradient, _ = tuned.gradient(losses, len(batch))
        for name, grad in zip(tuned.base, gradient, strict=True):
            tuned._pull(name, grad)
        parameters = {name: tuned.base[name] + 3.0 * leaves[f"{name}.b"] @ leaves[f"{name}.a"] for name in tuned.base}

        def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return torch.func.functional_call(tiny.unet, parameters, (x, t, y)).sample

        noisy = tiny.add_noise(batch.latents, batch.noise, batch.timestep)
        loss = (network(noisy, batch.timestep, batch.embeddings) - batch.noise).square().mean()
        expected = torch.autograd.grad(loss, list(leaves.values()))
        for name, reference in zip(leaves, expected, strict=True):
            assert torch.allclose(tuned.leaves[name].grad, reference, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("part", ["attention", "cross_attention", "not_cross_attention", "lora"])
def test_only_the_chosen_part_moves(part: str, tiny: StableDiffusion) -> None:
    method = OrdinaryTraining(steps=2, batch=4, tuner=Tuner(learning_rate=1e-3, part=part))  # type: ignore[arg-type]
    moved = set(method(tiny, forget(tiny), retain(tiny), seed=0).deltas)
    wanted = set(chosen(tiny, part))  # type: ignore[arg-type]
    assert moved and moved <= wanted
    assert {".attn2." in name for name in wanted} == {
        "attention": {True, False},
        "cross_attention": {True},
        "not_cross_attention": {False},
        "lora": {True, False},
    }[part]
    if part == "lora":
        with tuning(tiny, method.tuner) as tuned:
            tuned.update([torch.ones_like(weight) for weight in tuned.weights.values()])
            change = (
                tuned.result()["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
                - tuned.base["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
            )
        assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= method.tuner.rank


def test_checkpointing_changes_no_gradient(tiny: StableDiffusion) -> None:
    losses, batch = batch_losses(tiny)
    found = []
    for checkpointing in (False, True):
        with tuning(tiny, Tuner(checkpointing=checkpointing)) as tuned:
            assert tiny.unet.is_gradient_checkpointing == checkpointing
            found.append(tuned.gradient(losses, len(batch))[0])
    assert not tiny.unet.is_gradient_checkpointing
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*found, strict=True))


def test_averaged_weights_are_the_result(tiny: StableDiffusion) -> None:
    name = "conv_in.bias"
    with tuning(tiny, Tuner(learning_rate=1e-2, ema_decay=0.3)) as tuned:
        average = tuned.base[name].double()
        for step in range(1, 4):
            tuned.update([torch.ones_like(weight) for weight in tuned.weights.values()])
            decay = min(0.3, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * tuned.weights[name].detach().double()
        assert torch.allclose(tuned.result()[name].double(), average, atol=1e-6)
        current = tuned.weights[name].detach().clone()
        with tuned.resulting():
            assert torch.equal(tuned.weights[name], tuned.result()[name])
        assert torch.equal(tuned.weights[name], current)


def test_a_half_precision_model_is_not_trained(tiny: StableDiffusion) -> None:
    tiny.unet.half()
    with pytest.raises(DoriError, match="float32"), tuning(tiny, Tuner()):
        pass


def test_other_predictions_open_too(tmp_path: Path) -> None:
    model = StableDiffusion(**tiny_parts(tmp_path, "v_prediction"), name="v")
    edit = OrdinaryTraining(steps=1, batch=2, tuner=Tuner(learning_rate=1e-3))(
        model, forget(model), retain(model), seed=0
    )
    assert edit.size > 0
