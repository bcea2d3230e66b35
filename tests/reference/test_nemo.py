"""NeMo against slow references in float64: loops for the similarity, one weight edit at a time for the algorithm."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dori.edit import WeightMask, load_edit
from dori.errors import DoriError
from dori.mitigate.nemo import ROUNDING, Nemo, NeMoCalibration, value_activations
from dori.mitigate.noise_difference import NoiseDifference, SsimWindow, detection_noise, ms_ssim, ssim_window
from dori.model.stable_diffusion import StableDiffusion

DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
SCORES = [
    ("paper", "paper"),
    ("as_released", "paper"),
    ("paper", "prompt_difference"),
    ("as_released", "prompt_difference"),
]


# ------------------------------------------------------------------------------------------ multi-scale SSIM


def pooled(image: np.ndarray) -> np.ndarray:
    """2 x 2 means of (h, w), an odd last row or column dropped."""
    h, w = image.shape[0] // 2, image.shape[1] // 2
    return np.array([[image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for j in range(w)] for i in range(h)])


def slow_ms_ssim(x: np.ndarray, y: np.ndarray, window: SsimWindow, pair_range: bool) -> float:
    """One pair (c, h, w), float64, written from the definition: one window after another, centred variances."""
    centre = (window.side - 1) / 2
    g = np.array(
        [
            [math.exp(-((i - centre) ** 2 + (j - centre) ** 2) / (2 * window.sigma**2)) for j in range(window.side)]
            for i in range(window.side)
        ]
    )
    g /= g.sum()
    result = 1.0
    for scale in range(window.scales):
        if scale:
            x, y = np.stack([pooled(c) for c in x]), np.stack([pooled(c) for c in y])
        extent = max(np.ptp(x), np.ptp(y)) if pair_range else 1.0
        c1, c2 = (0.01 * extent) ** 2, (0.03 * extent) ** 2
        whole, contrast = [], []
        for a, b in zip(x, y, strict=True):
            for i in range(a.shape[0] - window.side + 1):
                for j in range(a.shape[1] - window.side + 1):
                    p, q = a[i : i + window.side, j : j + window.side], b[i : i + window.side, j : j + window.side]
                    mp, mq = (g * p).sum(), (g * q).sum()
                    vp, vq = (g * (p - mp) ** 2).sum(), (g * (q - mq) ** 2).sum()
                    cs = (2 * (g * (p - mp) * (q - mq)).sum() + c2) / (vp + vq + c2)
                    contrast.append(cs)
                    whole.append(cs * (2 * mp * mq + c1) / (mp**2 + mq**2 + c1))
        term = np.mean(whole if scale == window.scales - 1 else contrast)
        result *= max(term, 0.0) ** window.exponent
    return result


@pytest.mark.parametrize("data_range", ["one", "pair"])
@pytest.mark.parametrize("side", [44, 22, 16, 9, 3])
def test_similarity_equals_the_definition_in_float64(side: int, data_range: str) -> None:
    generator = torch.Generator().manual_seed(side)
    x = torch.rand(3, 2, side, side, generator=generator)
    y = 0.5 * x + 0.5 * torch.rand(x.shape, generator=generator)
    y[2] = 1 - x[2]  # anticorrelated: the clipped branch
    window = ssim_window(side, side)
    slow = [
        slow_ms_ssim(a.double().numpy(), b.double().numpy(), window, data_range == "pair")
        for a, b in zip(x, y, strict=True)
    ]
    assert ms_ssim(x, y, window=window, data_range=data_range).tolist() == pytest.approx(slow, abs=2e-5)
    assert slow[2] == 0 or side == 3
    exact = ms_ssim(x.double(), y.double(), window=window, data_range=data_range).tolist()
    assert exact == pytest.approx(slow, abs=1e-10)


def test_similarity_of_constants_is_the_luminance_term_alone() -> None:
    a, b = (torch.full((1, 4, 64, 64), value, dtype=torch.float64) for value in (0.2, 0.6))
    luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert float(ms_ssim(a, b, window=SsimWindow())) == pytest.approx(luminance**0.33, abs=1e-9)


@pytest.mark.parametrize("data_range", ["one", "pair"])
def test_similarity_is_symmetric_one_for_equals_and_blind_to_batch_neighbours(data_range: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 4, 4, 16, 16, generator=generator)
    y[3] *= 7  # a neighbour of another range
    window = ssim_window(16, 16)
    together = ms_ssim(x, y, window=window, data_range=data_range)
    alone = torch.cat([ms_ssim(x[i : i + 1], y[i : i + 1], window=window, data_range=data_range) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together, ms_ssim(y, x, window=window, data_range=data_range))
    torch.testing.assert_close(ms_ssim(x, x, window=window, data_range=data_range), torch.ones(4))


def test_window_is_the_published_one_where_it_fits_and_always_fits() -> None:
    assert ssim_window(64, 64) == ssim_window(44, 80) == SsimWindow(11, 1.5, 3, 0.33)
    assert [(w.side, w.scales) for w in map(ssim_window, (43, 32, 16, 8), (43, 32, 16, 8))] == [
        (11, 2),
        (11, 2),
        (7, 2),
        (3, 2),
    ]
    for side in range(3, 130):
        window = ssim_window(side, side)
        assert window.side % 2 == 1 and side // 2 ** (window.scales - 1) >= window.side
        assert window.exponent * window.scales == pytest.approx(0.99)
    with pytest.raises(DoriError, match="too small"):
        ssim_window(2, 2)


# ---------------------------------------------------------------------------------------- noise differences


def slow_scaled(delta: Tensor, variant: str, least: float) -> Tensor:
    """Min-max scaling of one (c, h, w); 0 where it spans no more than `least`."""
    parts = [delta] if variant == "paper" else list(delta)
    scaled = [(c - c.min()) / (c.max() - c.min()) if float(c.max() - c.min()) > least else c * 0 for c in parts]
    return scaled[0] if variant == "paper" else torch.stack(scaled)


def slow_difference(model: StableDiffusion, noise: Tensor, embedding: Tensor, variant: str, similarity: str) -> Tensor:
    """One scaled difference (c, h, w) of one noise (c, h, w) and embedding (1, l, d), from the definition."""
    t = model.ddim(50).timesteps[0 if variant == "paper" else 1][None]
    eps = model.predict_noise(noise[None], t, embedding)[0]
    null = model.encode([""]).to(embedding)
    other = noise if similarity == "paper" else model.predict_noise(noise[None], t, null)[0]
    return slow_scaled(eps - other, variant, 1e-3 * float(eps.abs().max()))


@pytest.mark.parametrize(("variant", "similarity"), SCORES)
def test_differences_follow_the_definition_row_by_row(tiny: StableDiffusion, variant: str, similarity: str) -> None:
    noise, embedding = detection_noise(tiny, 3, seed=5), tiny.encode(["a", "b", "cc d"])
    difference = NoiseDifference(variant, similarity)
    deltas = difference.differences(tiny, noise, embedding)
    slow = [slow_difference(tiny, n, e[None], variant, similarity) for n, e in zip(noise, embedding, strict=True)]
    torch.testing.assert_close(deltas, torch.stack(slow), atol=2e-5, rtol=0)
    assert difference.timestep(tiny) == (980 if variant == "paper" else 960)
    same = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 2
    assert torch.equal(difference.scaled(same, same), torch.zeros_like(same))
    assert torch.equal(difference.scaled(same + 1e-4 * torch.rand(same.shape), same), torch.zeros_like(same))
    assert float(difference.scaled(same + 1e-2 * torch.rand(same.shape), same).max()) == 1
    assert float(difference(torch.zeros_like(same), torch.zeros_like(same))) == pytest.approx(1)  # silence is alike
    with pytest.raises(DoriError, match="not finite"):
        difference.scaled(same * float("inf"), same)


def test_each_noise_gets_its_largest_similarity_with_another_one() -> None:
    deltas = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    deltas[3] = deltas[1]
    difference = NoiseDifference()
    slow = [max(float(difference(deltas[i : i + 1], deltas[j : j + 1])) for j in range(4) if j != i) for i in range(4)]
    assert difference.between_noises(deltas).tolist() == pytest.approx(slow, abs=1e-6)


def test_more_noises_leave_the_first_ones_as_they_are(tiny: StableDiffusion) -> None:
    assert torch.equal(detection_noise(tiny, 2, seed=3), detection_noise(tiny, 5, seed=3)[:2])
    assert not torch.equal(detection_noise(tiny, 2, seed=3), detection_noise(tiny, 2, seed=4))


# ------------------------------------------------------------------------------------------------- algorithm


def memorizing(model: StableDiffusion, *, output_scale: float = 1.0) -> StableDiffusion:
    """Make the text outweigh the noise, through the down and mid blocks alone, so that all noises look alike."""
    for layer in model.layers("attention_value", ("down", "mid")).values():
        layer.weight.mul_(10)
    for layer in model.layers("attention_value", ("up",)).values():
        layer.weight.zero_()
    model.unet.conv_in.weight.mul_(0.003)
    model.unet.conv_out.weight.mul_(output_scale)
    return model


def mask_of(model: StableDiffusion, chosen: set[tuple[str, int]]) -> WeightMask:
    """The weight edit that zeroes the rows of the neurons (layer, index)."""
    masks = {
        f"{name}.weight": torch.zeros_like(layer.weight, dtype=torch.bool)
        for name, layer in model.layers("attention_value").items()
    }
    for name, index in chosen:
        masks[f"{name}.weight"][index] = True
    return WeightMask("test", masks)


def slow_activations(model: StableDiffusion, embedding: Tensor) -> dict[str, Tensor]:
    """Of one embedding (l, d): the mean over its tokens of each value neuron's absolute activation."""
    layers = model.layers("attention_value")
    return {name: (embedding @ layer.weight.T).abs().mean(0) for name, layer in layers.items()}


def slow_nemo(
    model: StableDiffusion, nemo: Nemo, embedding: Tensor, ordinary: Tensor, tau: float, *, seed: int
) -> tuple[set[tuple[str, int]], dict[str, float]]:
    """The published algorithm in float64, one set, one noise and one weight edit at a time; changes the model."""
    model.unet.double()
    noise, embedding = detection_noise(model, nemo.noises, seed=seed).double(), embedding.double()
    window = ssim_window(*model.latent_shape[1:])

    def deltas(chosen: set[tuple[str, int]]) -> list[Tensor]:
        with mask_of(model, chosen).applied(model):
            return [slow_difference(model, n, embedding, nemo.variant, nemo.similarity) for n in noise]

    def similar(x: Tensor, y: Tensor) -> float:
        return slow_ms_ssim(x.numpy(), y.numpy(), window, nemo.variant == "as_released")

    plain = deltas(set())
    kept = [
        i for i in range(nemo.noises) if max(similar(plain[i], plain[j]) for j in range(nemo.noises) if j != i) > tau
    ]
    if not kept:
        return set(), {}

    def mem(chosen: set[tuple[str, int]]) -> float:
        blocked = deltas(chosen)
        return max(similar(plain[i], blocked[i]) for i in kept)

    activations = slow_activations(model, embedding[0])
    known = [slow_activations(model, one.double()) for one in ordinary]
    mean = {name: sum(one[name] for one in known) / len(known) for name in activations}
    std = {
        name: (sum((one[name] - mean[name]) ** 2 for one in known) / (len(known) - 1)) ** 0.5 for name in activations
    }
    theta, k, tau_ref = nemo.theta_start, 0, tau
    while True:
        chosen = set()
        for name, a in activations.items():
            z = (a - mean[name]).abs() / std[name]
            chosen |= {(name, i) for i in range(len(a)) if z[i] > theta}
            chosen |= {(name, int(i)) for i in a.argsort(descending=True)[:k]}
        m = mem(chosen)
        if m <= tau:
            break
        theta, k = theta - nemo.theta_step, k + 1
        if theta <= nemo.theta_min:
            tau_ref = m
            break
    passes = 0
    for name in reversed(list(activations)):
        group = {neuron for neuron in chosen if neuron[0] == name}
        if group and passes < nemo.max_refinement_passes:
            passes += 1
            chosen -= group if mem(chosen - group) < tau_ref - ROUNDING else set()
    for name in reversed(list(activations)):
        for neuron in sorted(neuron for neuron in chosen if neuron[0] == name):
            if passes < nemo.max_refinement_passes:
                passes += 1
                chosen = chosen - {neuron} if mem(chosen - {neuron}) < tau_ref - ROUNDING else chosen
    everything = {(name, i) for name, a in activations.items() for i in range(len(a))}
    return chosen, {
        "tau_ref": tau_ref,
        "floor": mem(everything),
        "score_after": mem(chosen),
        "judged": passes,
        "kept_noises": len(kept),
        "theta": theta if m <= tau else theta + nemo.theta_step,
    }


def neurons(edit: WeightMask) -> set[tuple[str, int]]:
    """The neurons that an edit's masks block, whole rows all of them."""
    found = set()
    for key, mask in edit.masks.items():
        assert torch.equal(mask.any(1), mask.all(1))
        found |= {(key.removesuffix(".weight"), int(i)) for i in mask.all(1).nonzero()[:, 0]}
    return found


@pytest.mark.parametrize("rows_per_call", [1, 128])
@pytest.mark.parametrize(
    ("variant", "similarity", "tau", "cap"),
    [
        ("paper", "prompt_difference", 0.3, 1000),
        ("as_released", "prompt_difference", 0.6, 1000),
        ("paper", "paper", 0.3, 1000),
        ("as_released", "paper", 0.9, 1000),
        ("paper", "prompt_difference", 0.3, 4),
        ("paper", "paper", 0.3, 1),
    ],
)
def test_batched_search_equals_the_sequential_algorithm(
    tiny: StableDiffusion, variant: str, similarity: str, tau: float, cap: int, rows_per_call: int
) -> None:
    model = memorizing(tiny, output_scale=1000 if similarity == "paper" else 1)
    nemo = Nemo(
        noises=3, variant=variant, similarity=similarity, max_refinement_passes=cap, rows_per_call=rows_per_call
    )
    ordinary = model.encode(["a", "b", "cc", "dd ee"])
    calibration = dataclasses.replace(nemo.calibrate(model, ordinary, seed=0), tau=tau)
    gaussian = torch.randn(1, *model.embedding_shape, generator=torch.Generator().manual_seed(3))
    edit = nemo(model, gaussian, calibration, seed=0)
    slow, measured = slow_nemo(model, nemo, gaussian, ordinary, tau, seed=0)
    assert slow and neurons(edit) == slow
    assert {name: set(found) for name, found in edit.details["neurons"].items()} == {
        layer: {i for name, i in slow if name == layer} for layer in (DOWN, MID)
    }
    assert {key: edit.details[key] for key in measured} == pytest.approx(measured, abs=1e-4)
    assert edit.details["localized"] == (measured["floor"] <= tau)
    assert edit.details["suppressed"] == (measured["score_after"] <= tau)
    assert edit.details["converged"] == (cap == 1000)


def planted(model: StableDiffusion, alive: dict[str, list[int]]) -> StableDiffusion:
    """A memorizing model whose text speaks through the given value neurons alone."""
    memorizing(model)
    blocks = dict(model.unet.named_modules())
    for name in (DOWN, MID):
        weight = blocks[name.removesuffix("to_v") + "to_out.0"].weight
        silent = torch.ones(weight.shape[1], dtype=torch.bool)
        silent[alive[name]] = False
        weight[:, silent] = 0
    return model


def outlying(
    model: StableDiffusion, nemo: Nemo, embedding: Tensor, tau: float, chosen: dict[str, list[int]]
) -> NeMoCalibration:
    """A calibration under which exactly the chosen neurons lie ten standard deviations off."""
    activations = value_activations(model.layers("attention_value"), embedding)
    mean = {name: a[0].clone() for name, a in activations.items()}
    std = {name: torch.ones_like(a[0]) for name, a in activations.items()}
    for name, indices in chosen.items():
        mean[name][indices] -= 10
    ordinary = nemo.calibrate(model, model.encode(["a", "b"]), seed=0)
    return NeMoCalibration(mean, std, ordinary.scores, tau, ordinary.details)


@pytest.mark.parametrize(
    ("alive", "selected", "tau", "expected"),
    [
        ({DOWN: [5], MID: []}, {DOWN: [1, 5, 6], MID: [3]}, 0.05, {DOWN: [5], MID: []}),
        ({DOWN: [], MID: [9]}, {DOWN: [1, 5], MID: [3, 9, 10]}, 0.05, {DOWN: [], MID: [9]}),
        ({DOWN: [4], MID: [5]}, {DOWN: [1, 4], MID: [3, 5]}, 0.05, {DOWN: [4], MID: [5]}),
        ({DOWN: [4], MID: [5]}, {DOWN: [1, 4], MID: [3, 5]}, 0.6, {DOWN: [4], MID: []}),
    ],
)
def test_toy_memory_is_found_in_the_neurons_that_carry_it(
    tiny: StableDiffusion, alive: dict, selected: dict, tau: float, expected: dict
) -> None:
    # Silent neurons change nothing, so refinement frees them; with every living neuron blocked the prompt says
    # nothing, the difference is constant and its similarity to the picture next to zero. Of two living neurons
    # either alone shows between 0.1 and 0.5: below 0.1 both must stay, above 0.5 the last layer is freed first.
    model = planted(tiny, alive)
    nemo = Nemo(noises=3, similarity="prompt_difference")
    prompt = model.encode(["memo"])
    edit = nemo(model, prompt, outlying(model, nemo, prompt, tau, selected), seed=1)
    assert edit.details["neurons"] == expected
    assert edit.details["theta"] == 5.0 and edit.details["k"] == 0
    assert edit.details["flagged"] and edit.details["localized"] and edit.details["suppressed"]
    assert edit.details["floor"] <= tau < edit.details["ceiling"] == edit.details["score_before"]


def test_memory_outside_the_searched_layers_is_not_called_localized(tiny: StableDiffusion) -> None:
    model = memorizing(tiny)
    for layer in model.layers("attention_value", ("up",)).values():
        layer.weight.normal_(generator=torch.Generator().manual_seed(0))
    for layer in model.layers("attention_value", ("down", "mid")).values():
        layer.weight.mul_(1e-3)
    nemo = Nemo(noises=3, similarity="prompt_difference")
    ordinary = nemo.calibrate(model, model.encode(["a", "b"]), seed=0)
    edit = nemo(model, model.encode(["memo"]), dataclasses.replace(ordinary, tau=0.3), seed=1)
    assert edit.details["flagged"] and edit.details["floor"] > 0.3
    assert not edit.details["localized"] and not edit.details["suppressed"]


def test_unflagged_prompt_gets_the_empty_mask(tiny: StableDiffusion) -> None:
    nemo = Nemo(noises=3)
    ordinary = nemo.calibrate(tiny, tiny.encode(["a", "b"]), seed=0)
    before = tiny.rows
    edit = nemo(tiny, tiny.encode(["memo"]), dataclasses.replace(ordinary, tau=0.99), seed=1)
    assert edit.size == 0 and set(edit.masks) == {f"{DOWN}.weight", f"{MID}.weight"}
    assert not edit.details["flagged"] and not edit.details["localized"] and edit.details["converged"]
    assert edit.details["rows"] == tiny.rows - before == 3


# ----------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize(("variant", "similarity"), SCORES)
def test_calibration_equals_prompt_by_prompt_statistics(tiny: StableDiffusion, variant: str, similarity: str) -> None:
    nemo, prompts = Nemo(noises=3, variant=variant, similarity=similarity), ["a", "b", "cc", "dd ee"]
    calibration = nemo.calibrate(tiny, tiny.encode(prompts), seed=2)
    noise, difference = detection_noise(tiny, 3, seed=2), NoiseDifference(variant, similarity)
    scores = []
    for prompt in prompts:
        deltas = [slow_difference(tiny, n, tiny.encode([prompt]), variant, similarity) for n in noise]
        scores.append(max(float(difference(deltas[i][None], deltas[j][None])) for i in range(3) for j in range(i)))
    assert calibration.scores.tolist() == pytest.approx(scores, abs=1e-4)
    assert calibration.tau == pytest.approx(np.mean(scores) + np.std(scores, ddof=1), abs=1e-4)
    lower = dataclasses.replace(nemo, tau_stds=-2.0).calibrate(tiny, tiny.encode(prompts), seed=2)
    assert lower.tau == pytest.approx(np.mean(scores) - 2 * np.std(scores, ddof=1), abs=1e-4)
    for name, layer in tiny.layers("attention_value").items():
        rows = [
            [np.mean([abs(float(token @ w)) for token in tiny.encode([p])[0]]) for w in layer.weight] for p in prompts
        ]
        assert calibration.mean[name].tolist() == pytest.approx(np.mean(rows, 0), abs=1e-5)
        assert calibration.std[name].tolist() == pytest.approx(np.std(rows, 0, ddof=1), abs=1e-5)
    assert calibration.details["prompts"] == 4
    assert calibration.details["score"]["window"] == {
        "side": 3,
        "sigma": 1.5 * 3 / 11,
        "scales": 2,
        "exponent": pytest.approx(0.495),
    }


def test_stored_calibration_gives_the_same_mask(tiny: StableDiffusion, tmp_path: Path) -> None:
    model, nemo = memorizing(tiny), Nemo(noises=3, similarity="prompt_difference")
    fresh = dataclasses.replace(nemo.calibrate(model, model.encode(["a", "b"]), seed=0), tau=0.3)
    stored = NeMoCalibration.from_tensors(fresh.tensors(), fresh.details)
    assert stored.tau == fresh.tau and torch.equal(stored.scores, fresh.scores)
    prompt = model.encode(["memo"])
    edit = nemo(model, prompt, fresh, seed=1)
    edit.save(tmp_path / "nemo.safetensors")
    loaded = load_edit(tmp_path / "nemo.safetensors")
    assert edit.size and neurons(loaded) == neurons(edit) == neurons(nemo(model, prompt, stored, seed=1))
    assert loaded.details == edit.details


def test_calibration_of_other_settings_or_layers_is_refused(tiny: StableDiffusion) -> None:
    calibration = Nemo(noises=3).calibrate(tiny, tiny.encode(["a", "b"]), seed=0)
    prompt = tiny.encode(["memo"])
    for other in (
        Nemo(noises=4),
        Nemo(noises=3, tau_stds=-1.0),
        Nemo(noises=3, variant="as_released"),
        Nemo(noises=3, ddim_steps=25),
        Nemo(noises=3, similarity="prompt_difference"),
        Nemo(noises=3, window=SsimWindow(5, 1.0, 1, 1.0)),
    ):
        with pytest.raises(DoriError, match="calibrate again"):
            other(tiny, prompt, calibration, seed=0)
    with pytest.raises(DoriError, match="does not hold the value layers"):
        Nemo(noises=3, places=("down",))(tiny, prompt, calibration, seed=0)
    with pytest.raises(DoriError, match="at least two"):
        Nemo(noises=3).calibrate(tiny, tiny.encode(["a"]), seed=0)
