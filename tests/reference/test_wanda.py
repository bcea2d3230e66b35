"""Wanda's score and mask against plain Python loops in float64, on activations captured from ordinary sampling."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dori.errors import DoriError
from dori.mitigate.noise_difference import detection_noise
from dori.mitigate.wanda import Wanda, column_norms, mask_from_norms
from dori.model.stable_diffusion import EVERYWHERE, StableDiffusion
from dori.sampling import sample


def captured(
    model: StableDiffusion, embeddings: Tensor, *, seed: int, steps: int = 50, guidance_scale: float = 7.5
) -> dict[str, list[Tensor]]:
    """What every feed-forward hands to its second linear at each call of `sample`: (2 n, tokens, 4d) a call."""
    seen: dict[str, list[Tensor]] = {name: [] for name in model.layers("feed_forward", EVERYWHERE)}
    modules = dict(model.unet.named_modules())
    handles = [
        modules[name.removesuffix("2") + "1"].register_forward_hook(  # the dropout before it
            lambda _module, _inputs, output, name=name: seen[name].append(output.double())
        )
        for name in seen
    ]
    sample(
        model,
        embeddings,
        detection_noise(model, len(embeddings), seed=seed),
        steps=steps,
        guidance_scale=guidance_scale,
    )
    for handle in handles:
        handle.remove()
    return seen


def slow_norms(inputs: list[Tensor], calls: int) -> list[list[float]]:
    """A_j for each of the first calls, row by row and column by column."""
    result = []
    for call in inputs[:calls]:
        energy = [0.0] * call.shape[-1]
        for row in call.flatten(0, 1).tolist():
            length = math.sqrt(sum(value**2 for value in row))
            for j, value in enumerate(row):
                energy[j] += (value / length) ** 2 if length else 0.0
        result.append([math.sqrt(e) for e in energy])
    return result


def slow_mask(weight: Tensor, target: list[list[float]], base: list[list[float]] | None, top: int) -> list[list[bool]]:
    """The mask of one layer, entry by entry."""
    rows = weight.double().abs().tolist()
    mask = [[False] * len(rows[0]) for _ in rows]
    for t, norms in enumerate(target):
        for i, row in enumerate(rows):
            scores = [w * a for w, a in zip(row, norms, strict=True)]
            for j in sorted(range(len(scores)), key=lambda j: -scores[j])[:top]:
                mask[i][j] |= base is None or scores[j] > row[j] * base[t][j]
    return mask


@pytest.mark.parametrize("rows_per_call", [2, 128])
def test_column_norms_equal_the_definition_on_the_sampling_loop(tiny: StableDiffusion, rows_per_call: int) -> None:
    embeddings = tiny.encode(["a", "b c", "dd"])
    norms = column_norms(tiny, embeddings, seed=4, counted_steps=2, places=EVERYWHERE, rows_per_call=rows_per_call)
    inputs = captured(tiny, embeddings, seed=4)
    assert list(norms) == list(inputs)
    for name, calls in inputs.items():
        assert norms[name].dtype == torch.float64
        torch.testing.assert_close(
            norms[name], torch.tensor(slow_norms(calls, 2), dtype=torch.float64), atol=1e-4, rtol=1e-4
        )
        rows = calls[0].shape[0] * calls[0].shape[1]
        assert norms[name].square().sum(1).tolist() == pytest.approx([rows, rows], rel=1e-5)  # sum_j A_j^2 = rows


def test_value_projections_see_the_prompt_and_the_empty_one_at_every_call(tiny: StableDiffusion) -> None:
    """Their inputs are text, so A_j has a closed form, and an edit is one of `attn2.to_v`."""
    prompts = tiny.encode(["a", "b c"])
    norms = column_norms(tiny, prompts, seed=4, counted_steps=2, site="attention_value")
    assert list(norms) == list(tiny.layers("attention_value"))
    rows = torch.cat([tiny.encode(["", ""]), prompts]).double().flatten(0, 1)
    expected = (rows / rows.norm(dim=1, keepdim=True)).square().sum(0).sqrt()
    for found in norms.values():
        torch.testing.assert_close(found, expected.expand(2, -1), atol=1e-5, rtol=1e-5)
    edit = Wanda(sparsity=0.2, site="attention_value", counted_steps=2)(tiny, prompts, seed=4)
    assert set(edit.masks) == {f"{name}.weight" for name in tiny.layers("attention_value")} and edit.size


@pytest.mark.parametrize(
    ("sparsity", "selection", "at_least_one"),
    [(0.01, "top_and_above_base", True), (0.1, "top_and_above_base", False), (0.1, "top", True)],
)
def test_mask_equals_the_definition(tiny: StableDiffusion, sparsity: float, selection: str, at_least_one: bool) -> None:
    wanda = Wanda(sparsity=sparsity, selection=selection, at_least_one=at_least_one, counted_steps=2)
    prompts = tiny.encode(["a", "b c"])
    edit = wanda(tiny, prompts, seed=1)
    target, base = captured(tiny, prompts, seed=1), captured(tiny, tiny.encode(["", ""]), seed=1)
    parameters = dict(tiny.unet.named_parameters())
    assert set(edit.masks) == {f"{name}.weight" for name in tiny.layers("feed_forward")}
    for key, mask in edit.masks.items():
        name, weight = key.removesuffix(".weight"), parameters[key]
        top = max(math.floor(sparsity * weight.shape[1]), int(at_least_one))
        slow = slow_mask(
            weight, slow_norms(target[name], 2), slow_norms(base[name], 2) if selection != "top" else None, top
        )
        assert mask.tolist() == slow and mask.any()
        assert edit.details["top_per_row"][name] == top
        assert edit.details["densities"][key] == pytest.approx(float(mask.float().mean()))


def test_mask_by_hand(tiny: StableDiffusion) -> None:
    # |W| is 1 but for one large entry. Call 0: column 2 is the largest everywhere and above the base. Call 1:
    # column 3 is the largest but not above the base, so it joins nowhere, and the large entry wins its row.
    name, layer = next(iter(tiny.layers("feed_forward").items()))
    layer.weight.fill_(1.0)
    layer.weight[0, 1] = -10.0
    columns = layer.in_features
    target, base = torch.full((2, columns), 0.5), torch.full((2, columns), 0.4)
    target[0, 2], target[1, 3], base[1, 3] = 8.0, 0.9, 0.95
    edit = mask_from_norms(tiny, {name: target}, {name: base}, sparsity=1 / columns, name="by hand")
    expected = torch.zeros_like(layer.weight, dtype=torch.bool)
    expected[:, 2] = True
    expected[0, 1] = True
    assert torch.equal(edit.masks[f"{name}.weight"], expected) and edit.name == "by hand"


def test_zero_rows_count_for_nothing(tiny: StableDiffusion) -> None:
    name, _ = next(iter(tiny.layers("feed_forward").items()))
    projection = dict(tiny.unet.named_modules())[name.removesuffix("2") + "0"].proj
    projection.weight.zero_()
    projection.bias.zero_()
    norms = column_norms(tiny, tiny.encode(["a"]), seed=0, counted_steps=1)
    assert torch.equal(norms[name], torch.zeros_like(norms[name]))


def test_narrow_layers_lose_one_weight_a_row_or_none(tiny: StableDiffusion) -> None:
    # The fixture's layers have 32 and 64 inputs, of which 1 % floors to none.
    prompts = tiny.encode(["a"])
    assert Wanda(counted_steps=1, at_least_one=False)(tiny, prompts, seed=0).size == 0
    rows = sum(layer.out_features for layer in tiny.layers("feed_forward").values())
    assert Wanda(counted_steps=1, selection="top")(tiny, prompts, seed=0).size == rows


def test_sparsity_sweep_needs_one_trajectory_and_nests(tiny: StableDiffusion) -> None:
    wanda, prompts = Wanda(counted_steps=3), tiny.encode(["a", "b"])
    target = wanda.column_norms(tiny, prompts, seed=0)
    base = wanda.column_norms(tiny, tiny.encode(["", ""]), seed=0)
    spent = tiny.rows
    edits = [mask_from_norms(tiny, target, base, sparsity=s, name="sweep") for s in (0.05, 0.1, 0.3, 1.0)]
    assert tiny.rows == spent == 2 * 3 * 2 * 2  # two runs, three calls, two halves, two prompts
    for small, large in pairwise(edits):
        assert small.size < large.size
        assert all(bool((large.masks[key] >= mask).all()) for key, mask in small.masks.items())
    direct = Wanda(counted_steps=3, sparsity=0.1)(tiny, prompts, seed=0)
    assert all(torch.equal(direct.masks[key], mask) for key, mask in edits[1].masks.items())


def test_pooled_energy_is_the_sum_of_the_prompts_own(tiny: StableDiffusion) -> None:
    # Prompt 0 starts from the same noise alone and in company; the rest is prompt 1's.
    pair, settings = tiny.encode(["a", "b"]), {"seed": 3, "counted_steps": 2}
    both, first = column_norms(tiny, pair, **settings), column_norms(tiny, pair[:1], **settings)
    for name in both:
        rest = both[name].square() - first[name].square()
        assert bool((rest > 0).all())
        assert rest.sum(1).tolist() == pytest.approx(first[name].square().sum(1).tolist(), rel=1e-5)
    again = column_norms(tiny, torch.cat([pair[:1], tiny.encode(["zzz"])]), **settings)
    assert any(not torch.allclose(again[name], both[name]) for name in both)


def test_settings_of_the_trajectory_matter(tiny: StableDiffusion) -> None:
    prompts = tiny.encode(["abc"])
    norms = [
        column_norms(tiny, prompts, seed=0, counted_steps=2, **other)
        for other in ({}, {"guidance_scale": 1.0}, {"steps": 5})
    ]
    name = next(iter(norms[0]))
    assert torch.equal(norms[0][name][0], norms[1][name][0])  # guidance acts from the second call on
    assert not torch.equal(norms[0][name][1], norms[1][name][1])
    assert not torch.equal(norms[0][name][0], norms[2][name][0])  # another first timestep


def test_bad_settings_are_refused(tiny: StableDiffusion) -> None:
    target = column_norms(tiny, tiny.encode(["a"]), seed=0, counted_steps=1)
    for sparsity in (0.0, 1.5, -0.1):
        with pytest.raises(DoriError, match="above 0 and up to 1"):
            mask_from_norms(tiny, target, None, sparsity=sparsity, name="x")
    with pytest.raises(DoriError, match="do not fit"):
        mask_from_norms(tiny, {"nowhere.ff.net.2": torch.ones(1, 32)}, None, sparsity=0.1, name="x")
