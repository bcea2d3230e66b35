"""What every mitigation promises: a mask of the model's own weights, deterministic, and a model left as it was."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dori.edit import WeightMask, load_edit
from dori.errors import DoriError
from dori.mitigate.nemo import Nemo
from dori.mitigate.random_mask import random_neurons, random_weights
from dori.mitigate.wanda import Wanda
from dori.model.stable_diffusion import StableDiffusion

Method = Callable[[StableDiffusion, Tensor, int], WeightMask]


def memorizing(model: StableDiffusion) -> StableDiffusion:
    """Let the text outweigh the noise, through the down and mid blocks alone, so that NeMo has something to find."""
    for layer in model.layers("attention_value", ("down", "mid")).values():
        layer.weight.mul_(10)
    for layer in model.layers("attention_value", ("up",)).values():
        layer.weight.zero_()
    model.unet.conv_in.weight.mul_(0.003)
    model.unet.conv_out.weight.mul_(1000)
    return model


def nemo(**settings: object) -> Method:
    """NeMo with a low threshold, under which the memorizing model's prompts count as memorized."""
    method = Nemo(noises=3, **settings)

    def run(model: StableDiffusion, embedding: Tensor, seed: int) -> WeightMask:
        calibration = method.calibrate(model, model.encode(["a", "b", "cc"]), seed=0)
        return method(model, embedding, dataclasses.replace(calibration, tau=0.3), seed=seed)

    return run


def wanda(**settings: object) -> Method:
    """Wanda over three calls."""
    method = Wanda(counted_steps=3, **settings)
    return lambda model, embedding, seed: method(model, embedding, seed=seed)


def neurons_like(model: StableDiffusion, embedding: Tensor, seed: int) -> WeightMask:
    """Random neurons in the number of NeMo's."""
    return random_neurons(model, nemo()(model, embedding, 0), seed=seed)


def weights_like(model: StableDiffusion, embedding: Tensor, seed: int) -> WeightMask:
    """Random weights in the number of Wanda's."""
    return random_weights(model, wanda()(model, embedding, 0), seed=seed)


METHODS: dict[str, Method] = {
    "nemo": nemo(),
    "nemo_as_released": nemo(variant="as_released"),
    "nemo_prompt_difference": nemo(similarity="prompt_difference"),
    "wanda": wanda(sparsity=0.05),
    "wanda_top": wanda(selection="top"),
    "random_neurons": neurons_like,
    "random_weights": weights_like,
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def equal(a: WeightMask, b: WeightMask) -> bool:
    """Same name and masks."""
    return (
        a.name == b.name
        and a.masks.keys() == b.masks.keys()
        and all(torch.equal(a.masks[key], b.masks[key]) for key in a.masks)
    )


def hooks(model: StableDiffusion) -> int:
    """Number of hooks on the U-Net's modules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.unet.modules())


@every_method
def test_mask_is_boolean_non_empty_and_of_the_models_own_weights(method: Method, tiny: StableDiffusion) -> None:
    edit = method(memorizing(tiny), tiny.encode(["memo"]), 1)
    shapes = {key: weight.shape for key, weight in tiny.unet.named_parameters()}
    assert edit.size > 0
    for key, mask in edit.masks.items():
        assert mask.dtype == torch.bool and mask.shape == shapes[key] and not mask.all()


@every_method
def test_result_depends_on_the_seed_alone(method: Method, tiny: StableDiffusion) -> None:
    model, prompt = memorizing(tiny), tiny.encode(["memo"])
    torch.manual_seed(1)
    first = method(model, prompt, 1)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = method(model, prompt, 1)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    assert equal(first, second) and first.details == second.details


@every_method
def test_raw_embeddings_are_as_good_as_prompts(method: Method, tiny: StableDiffusion) -> None:
    gaussian = torch.randn(1, *tiny.embedding_shape, generator=torch.Generator().manual_seed(0))
    assert method(memorizing(tiny), gaussian, 1).size > 0


@every_method
def test_model_is_left_as_it_was(method: Method, tiny: StableDiffusion) -> None:
    model = memorizing(tiny)
    before = {key: value.clone() for key, value in model.unet.state_dict().items()}
    method(model, model.encode(["memo"]), 1)
    assert hooks(model) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.unet.state_dict().items())


@every_method
@pytest.mark.parametrize("good_calls", [0, 2])  # 0: inside Wanda's hooks, 2: inside NeMo's
def test_model_is_left_as_it_was_when_the_network_fails(method: Method, good_calls: int, tiny: StableDiffusion) -> None:
    model, calls = memorizing(tiny), []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) > good_calls:
            raise RuntimeError("out of memory")

    before = {key: value.clone() for key, value in model.unet.state_dict().items()}
    handle = model.unet.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        method(model, model.encode(["memo"]), 1)
    handle.remove()
    assert hooks(model) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.unet.state_dict().items())


@every_method
def test_edit_survives_saving(method: Method, tiny: StableDiffusion, tmp_path: Path) -> None:
    edit = method(memorizing(tiny), tiny.encode(["memo"]), 1)
    edit.save(tmp_path / "edit.safetensors")
    loaded = load_edit(tmp_path / "edit.safetensors")
    assert equal(loaded, edit)
    assert loaded.details == json.loads(json.dumps(edit.details)) == edit.details


def test_an_edit_is_the_same_bytes_every_time_and_its_hash_sees_the_masks(tmp_path: Path) -> None:
    masks = {"b": torch.tensor([[True, False]]), "a": torch.zeros(2, dtype=torch.bool)}
    first = WeightMask("x", masks, {"k": [1], "a": None})
    again = WeightMask("x", dict(reversed(masks.items())), {"a": None, "k": [1]})
    for name, edit in (("first", first), ("again", again)):
        edit.save(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()
    assert first.fingerprint == again.fingerprint != WeightMask("x", {**masks, "a": torch.ones(2).bool()}).fingerprint


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_text("{}"),
        lambda path: save_file({"a": torch.ones(2)}, path),
        *(
            lambda path, header=header: save_file({"a": torch.ones(2)}, path, metadata={"edit": header})
            for header in (
                "{",
                "[]",
                "3",
                '{"kind": "weight_mask"}',
                '{"kind": "other", "name": "x", "details": {}}',
                '{"kind": "weight_mask", "name": "x", "details": 3}',
            )
        ),
        lambda path: save_file(
            {"a": torch.tensor([float("nan")])},
            path,
            metadata={"edit": '{"kind": "weight_mask", "name": "x", "details": {}}'},
        ),
    ],
)
def test_a_file_that_is_no_edit_is_one_sentence(damage: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    WeightMask("x", {"a": torch.ones(2, dtype=torch.bool)}).save(path)
    damage(path)
    with pytest.raises(DoriError, match="cannot be read as an edit .* give a file that Dori wrote") as caught:
        load_edit(path)
    assert "\n" not in str(caught.value)


def test_an_edit_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DoriError, match="cannot be written"):
        WeightMask("x", {}).save(tmp_path / "file" / "edit.safetensors")


@pytest.mark.parametrize("method", [METHODS["nemo"], METHODS["wanda"]], ids=["nemo", "wanda"])
def test_rows_of_the_network_are_counted(method: Method, tiny: StableDiffusion) -> None:
    model, prompt, seen = memorizing(tiny), tiny.encode(["memo"]), []
    handle = model.unet.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    edit = method(model, prompt, 1)
    handle.remove()
    calibration_rows = 3 * 3 if edit.name == "NeMo" else 0
    assert edit.details["rows"] == sum(seen) - calibration_rows > 0


def test_random_neurons_have_as_many_rows_in_each_layer_and_are_uniform(tiny: StableDiffusion) -> None:
    weights = {f"{name}.weight": layer.weight for name, layer in tiny.layers("attention_value").items()}
    masks = {key: torch.zeros_like(weight, dtype=torch.bool) for key, weight in weights.items()}
    for count, mask in zip((2, 5), masks.values(), strict=True):
        mask[:count] = True
    like = WeightMask("NeMo", masks)
    draws = [random_neurons(tiny, like, seed=seed) for seed in range(300)]
    for count, (key, mask) in zip((2, 5), masks.items(), strict=True):
        stacked = torch.stack([draw.masks[key] for draw in draws])
        assert torch.equal(stacked.any(2), stacked.all(2))
        rows = stacked.all(2).float()  # (300, d)
        assert bool((rows.sum(1) == count).all())
        # Each row's frequency is binomial; 5 standard deviations hold for all 24 rows together.
        share = count / mask.shape[0]
        assert float((rows.mean(0) - share).abs().max()) < 5 * (share * (1 - share) / 300) ** 0.5
    assert not equal(draws[0], draws[1]) and draws[0].name == "random neurons"


def test_random_weights_have_as_many_entries_in_each_layer(tiny: StableDiffusion) -> None:
    like = Wanda(counted_steps=1, sparsity=0.05)(tiny, tiny.encode(["a"]), seed=0)
    draws = [random_weights(tiny, like, seed=seed) for seed in (0, 1)]
    for key, mask in like.masks.items():
        assert all(draw.masks[key].sum() == mask.sum() for draw in draws)
    assert not equal(*draws) and draws[0].name == "random weights"
    reordered = WeightMask(like.name, dict(reversed(like.masks.items())))
    assert equal(random_weights(tiny, reordered, seed=0), draws[0])


def test_random_controls_refuse_what_does_not_fit(tiny: StableDiffusion) -> None:
    single = Wanda(counted_steps=1)(tiny, tiny.encode(["a"]), seed=0)
    with pytest.raises(DoriError, match="use random_weights"):
        random_neurons(tiny, single, seed=0)
    foreign = WeightMask("foreign", {"nowhere.weight": torch.ones(2, 2, dtype=torch.bool)})
    for control in (random_neurons, random_weights):
        with pytest.raises(DoriError, match="does not fit"):
            control(tiny, foreign, seed=0)
