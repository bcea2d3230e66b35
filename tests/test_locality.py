"""Each analysis of locality against brute force in float64, closed forms against simulation, rules against cases."""

import copy
import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from dori.edit import WeightMask
from dori.locality.activations import activation_rows, activations, discrepancy, discrepancy_across
from dori.locality.causal import cross_test, enough, joined, union_sizes
from dori.locality.costs import chunks
from dori.locality.embeddings import (
    capped_perplexity,
    common_share,
    exchanged_share,
    gaussian_distance,
    line,
    moved,
    neighbour_map,
    own_start_share,
    pair_distances,
    principal_map,
    repeated_share,
    shared_share,
    sphere,
)
from dori.locality.patching import NECESSARY, SUFFICIENT, patch_sets, patched_samples, share_of_gap
from dori.locality.probes import line_pairs
from dori.locality.truth import (
    best_masks,
    changes,
    coverage,
    density,
    every_change,
    excess_by,
    excess_energies,
    gathered,
    group_of,
    layer_of,
    random_coverage,
)
from dori.locality.weights import (
    agreement,
    agreement_across,
    agreement_within,
    overlaps,
    random_agreement,
    random_level,
    random_like,
)
from dori.model.hooks import hooked
from dori.model.stable_diffusion import EVERYWHERE, StableDiffusion
from dori.sampling import initial_noise, sample
from dori.stats import wilson


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(x: Tensor) -> float:
    """The l2 norm by a loop over all numbers."""
    return math.sqrt(sum(value * value for value in x.flatten().tolist()))


# -------------------------------------------------------------------------------------------------------- embeddings


def test_distances_are_those_of_all_pairs_and_of_each_move() -> None:
    y, starts = draw(5, 3, 4), draw(5, 3, 4, seed=1)
    slow = [norm(a - b) for a, b in itertools.combinations(y, 2)]
    assert pair_distances(y).tolist() == pytest.approx(slow, rel=1e-12)
    assert moved(starts, y).tolist() == pytest.approx([norm(a - b) for a, b in zip(y, starts, strict=True)], rel=1e-12)


def test_gaussian_starts_are_as_far_apart_as_the_closed_form_says() -> None:
    assert gaussian_distance(77 * 768) == pytest.approx(343.9, abs=0.05)  # methods.md 1.2
    assert gaussian_distance(48) == pytest.approx(float(pair_distances(draw(300, 12, 4)).mean()), rel=0.01)


def test_the_common_share_is_the_mean_inner_product_of_different_moves() -> None:
    x = draw(6, 2, 5)
    square = sum(norm(a) ** 2 for a in x) / 6
    inner = [float((a * b).sum()) for a, b in itertools.permutations(x, 2)]
    assert common_share(x) == pytest.approx(sum(inner) / len(inner) / square, rel=1e-12)
    one = draw(1, 2, 5).expand(6, -1, -1)
    assert common_share(one) == pytest.approx(1) and common_share(torch.zeros(3, 2)) != common_share(torch.zeros(3, 2))
    # A common part of half the energy is found whatever else the moves do, and independent moves share nothing.
    assert common_share(draw(1, 40, 50, seed=3) + draw(400, 40, 50)) == pytest.approx(0.5, abs=0.02)
    assert common_share(draw(400, 40, 50)) == pytest.approx(0, abs=0.01)


def test_the_repeated_share_is_that_of_moves_from_one_start() -> None:
    a, b = draw(5, 3, 4, seed=0), draw(5, 3, 4, seed=1)
    inner = sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
    scale = math.sqrt(float(a.double().square().sum()) * float(b.double().square().sum()))
    assert repeated_share(a, b) == pytest.approx(inner / scale, rel=1e-12)
    assert repeated_share(a, a) == pytest.approx(1) and repeated_share(a, -a) == pytest.approx(-1)
    noise = [draw(400, 50, seed=seed) for seed in (2, 3, 4)]  # half of each move is its start's
    assert repeated_share(noise[0] + noise[1], noise[0] + noise[2]) == pytest.approx(0.5, abs=0.03)
    assert math.isnan(repeated_share(a[:0], b[:0])) and math.isnan(repeated_share(0 * a, 0 * b))


def test_the_shared_share_is_that_of_moves_to_two_images_from_different_starts() -> None:
    a, b = draw(4, 3, 2), draw(4, 3, 2, seed=1)
    inner = sum(float((a[i] * b[j]).sum()) for i, j in itertools.permutations(range(4), 2)) / 12
    scale = math.sqrt(sum(norm(x) ** 2 for x in a) / 4 * sum(norm(y) ** 2 for y in b) / 4)
    assert shared_share(a, b) == pytest.approx(inner / scale, rel=1e-12)
    assert shared_share(a, a) == common_share(a) and math.isnan(shared_share(a[:1], b[:1]))
    # A drift of every move, whatever the image, is shared in full; what the image adds is not.
    drift = draw(1, 40, 50, seed=3)
    one, two = (drift + draw(1, 40, 50, seed=seed) + draw(200, 40, 50, seed=10 + seed) for seed in (4, 5))
    assert common_share(one) == pytest.approx(2 / 3, abs=0.03) and shared_share(one, two) == pytest.approx(
        1 / 3, abs=0.03
    )


def test_an_end_belongs_to_its_own_start_only_if_no_other_is_nearer() -> None:
    starts = torch.tensor([[[0.0]], [[10.0]], [[20.0]]])
    assert own_start_share(starts, starts + 4) == 1
    assert exchanged_share(starts, starts + 4) == 1  # equal moves may be exchanged
    far = starts + torch.tensor([[[0.0]], [[0.0]], [[-20.0]]])  # the last one came to the first start
    assert own_start_share(starts, far) == pytest.approx(2 / 3)
    # Exchanged, the long move takes the first start (which stays nearest to itself), then the second one.
    assert exchanged_share(starts, far) == pytest.approx((3 / 3 + 2 / 3) / 2)
    assert own_start_share(starts, torch.tensor([[[1.0]], [[19.0]], [[18.0]]])) == pytest.approx(2 / 3)


def test_lines_and_spheres_are_where_they_should_be() -> None:
    a, b = draw(3, 4).float(), draw(3, 4, seed=1).float()
    points = line(a, b, (0.0, 0.25, 1.0))
    assert torch.allclose(points[0], a) and torch.allclose(points[2], b) and torch.allclose(points[1], 0.75 * a + b / 4)
    shell = sphere(a, 2.5, seed=3, count=200)
    assert (shell - a).flatten(1).norm(dim=1).tolist() == pytest.approx([2.5] * 200, rel=1e-5)
    assert norm((shell - a).mean(0)) < 0.5  # no direction is preferred
    assert torch.equal(shell[:5], sphere(a, 2.5, seed=3, count=200)[:5])


def test_principal_components_are_those_of_the_covariance() -> None:
    x = draw(30, 2, 3) * torch.tensor([5.0, 3.0, 1.0])
    coordinates, explained = principal_map(x)
    centred = x.flatten(1) - x.flatten(1).mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).flip(0)
    assert explained == pytest.approx((values[:2] / values.sum()).tolist(), rel=1e-9)
    assert coordinates.square().sum(0).tolist() == pytest.approx(values[:2].tolist(), rel=1e-9)
    assert torch.equal(principal_map(x)[0], coordinates)
    assert (coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_neighbour_map_keeps_clusters_apart_and_repeats_itself() -> None:
    x = torch.cat([draw(12, 2, 3), draw(12, 2, 3, seed=1) + 40])
    first = neighbour_map(x, perplexity=30, seed=0)
    assert capped_perplexity(30, 24) == pytest.approx(23 / 3)
    nearest = torch.cdist(first, first).fill_diagonal_(math.inf).argmin(1)
    assert ((nearest < 12) == (torch.arange(24) < 12)).all()
    assert torch.equal(first, neighbour_map(x, perplexity=30, seed=0))


def test_pairs_of_a_line_are_different_and_spread() -> None:
    assert line_pairs(4, 99) == [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert len(set(line_pairs(20, 7))) == 7 and line_pairs(1, 5) == line_pairs(0, 5) == []


# ------------------------------------------------------------------------------------------------------- activations


def test_the_discrepancy_is_the_published_sum_over_pairs() -> None:
    f = draw(5, 7, 3)
    slow = 2 / (5 * 4) * sum(norm(f[j] - f[i]) for j in range(5) for i in range(j))
    assert discrepancy(f) == pytest.approx(slow, rel=1e-12)
    assert discrepancy(f[:1].expand(4, -1, -1)) == 0 and math.isnan(discrepancy(f[:1]))


def test_the_discrepancy_across_two_sets_counts_the_chosen_pairs_alone() -> None:
    mine, theirs = draw(3, 7, 3), draw(4, 7, 3) + 1
    pairs = torch.tensor([[i != j for j in range(4)] for i in range(3)])
    slow = [norm(theirs[j] - mine[i]) for i in range(3) for j in range(4) if i != j]
    assert discrepancy_across(mine, theirs, pairs) == pytest.approx(sum(slow) / 9, rel=1e-12)
    assert discrepancy_across(mine, mine, torch.eye(3, dtype=torch.bool)) == 0
    assert math.isnan(discrepancy_across(mine, theirs, torch.zeros_like(pairs)))


def test_activations_are_those_of_one_embedding_alone_along_its_own_trajectory(tiny: StableDiffusion) -> None:
    layers = tiny.layers("attention_value", EVERYWHERE) | tiny.layers("feed_forward", EVERYWHERE)
    y, noise = draw(5, *tiny.embedding_shape).float(), initial_noise(tiny, [3])
    rows = tiny.rows
    found = dict(activations(tiny, layers, y, noise, steps=(0, 2), ddim_steps=4, guidance_scale=3.0, rows_per_call=4))
    assert tiny.rows - rows == activation_rows(5, (0, 2)) and list(found) == [0, 2]
    for name, layer in tiny.layers("attention_value", EVERYWHERE).items():
        for step in (0, 2):
            assert torch.allclose(found[step][name], y @ layer.weight.T, atol=1e-5)  # the embedding alone decides
    scheduler, x, null = tiny.ddim(4), noise, tiny.encode([""])
    seen: list[Tensor] = []
    name = list(tiny.layers("feed_forward", EVERYWHERE))[-1]
    handle = layers[name].register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad():
        for t in scheduler.timesteps[:3]:
            eps, away = (tiny.predict_noise(x, t[None], one) for one in (y[3:4], null))
            x = scheduler.step(away + 3.0 * (eps - away), t, x).prev_sample
    handle.remove()
    assert torch.allclose(found[0][name][3], seen[0][0], atol=1e-4)
    assert torch.allclose(found[2][name][3], seen[4][0], atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- weights


def masks(n: int, *shape: int, share: float = 0.3, seed: int = 0) -> Tensor:
    """Random boolean masks."""
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) < share


def sets(mask: Tensor) -> list[set[int]]:
    """Each mask as a set of positions."""
    return [set(row.flatten().nonzero()[:, 0].tolist()) for row in mask]


def test_agreement_is_the_mean_iou_of_all_pairs_of_sets() -> None:
    m = masks(6, 4, 9)
    slow = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets(m), 2)]
    found = agreement(m)
    assert found.published == pytest.approx(sum(slow) / 15, rel=1e-12) == found.without_empty
    assert found.empty_share == 0 and found.pairs == 15
    assert found.size == pytest.approx(sum(map(len, sets(m))) / 6)
    both, either = overlaps(m.flatten(1), m.flatten(1))
    assert both.tolist() == [[len(a & b) for b in sets(m)] for a in sets(m)]
    assert either.tolist() == [[len(a | b) for b in sets(m)] for a in sets(m)]


def test_two_empty_masks_agree_as_published_and_are_left_out_beside_it() -> None:
    m = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]]).bool()
    found = agreement(m)  # pairs: empty-empty 1, empty-full four times 0, full-full 1/3
    assert found.published == pytest.approx((1 + 1 / 3) / 6) and found.without_empty == pytest.approx(1 / 15)
    assert found.empty_share == pytest.approx(1 / 6)
    empty = agreement(torch.zeros(3, 8).bool())
    assert empty.published == 1 and math.isnan(empty.without_empty) and empty.empty_share == 1
    assert agreement(m[:1]).pairs == 0 and math.isnan(agreement(m[:1]).published)


def test_agreement_within_seeds_pairs_only_masks_of_one_embedding() -> None:
    groups = [masks(3, 20, seed=1), masks(2, 20, seed=2)]
    slow = [len(a & b) / len(a | b) for group in groups for a, b in itertools.combinations(sets(group), 2)]
    found = agreement_within(groups)
    assert found.published == pytest.approx(sum(slow) / 4, rel=1e-12) and found.pairs == 4
    assert agreement_within([groups[0]]).published == agreement(groups[0]).published


def test_agreement_across_pairs_masks_of_two_images_where_their_starts_differ() -> None:
    one, two = masks(3, 20, seed=1), masks(2, 20, seed=2)
    two[1] = False
    one[2] = False
    pairs = torch.tensor([[False, True], [True, False], [True, True]])
    chosen = [(a, b) for i, a in enumerate(sets(one)) for j, b in enumerate(sets(two)) if pairs[i, j]]
    slow = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in chosen]
    found = agreement_across([([one], [two])], pairs)
    assert found.published == pytest.approx(sum(slow) / 4, rel=1e-12) and found.pairs == 4
    assert found.empty_share == 0.25 and found.without_empty == pytest.approx((sum(slow) - 1) / 3)
    twice = agreement_across([([one], [two]), ([one], [~two])], pairs)  # the pairs of both halves count alike
    more = agreement_across([([one], [~two])], pairs)
    assert twice.pairs == 8 and twice.published == pytest.approx((found.published + more.published) / 2)


def test_several_layers_together_are_one_mask() -> None:
    one, two, pairs = masks(3, 20, seed=1), masks(2, 20, seed=2), torch.ones(3, 2, dtype=torch.bool)
    split = [[group[:, :7], group[:, 7:]] for group in (one, two)]
    assert agreement_across([split], pairs) == agreement_across([([one], [two])], pairs)


@pytest.mark.parametrize(("first", "second", "weights"), [(3, 3, 8), (0, 4, 9), (9, 9, 9), (7, 8, 10), (1, 1, 5)])
def test_random_masks_overlap_as_all_subsets_do(first: int, second: int, weights: int) -> None:
    one = set(range(first))  # by symmetry
    slow = [len(one & set(other)) / len(one | set(other)) for other in itertools.combinations(range(weights), second)]
    assert random_agreement(first, second, weights) == pytest.approx(sum(slow) / len(slow), rel=1e-9)


def test_the_closed_form_of_random_masks_is_what_simulation_gives() -> None:
    m = torch.zeros(40, 30, 50).bool()
    generator = random.Random(0)
    for row in m:
        row.view(-1)[: generator.randrange(100, 400)] = True  # sizes differ, all overlap by far more than chance
    simulated = random_like(m, seed=1)
    assert simulated.flatten(1).sum(1).tolist() == m.flatten(1).sum(1).tolist()
    assert random_level(m) == pytest.approx(agreement(simulated).published, rel=0.03)
    assert agreement(m).published > 4 * random_level(m)
    q = 0.1  # for one density close to q / (2 - q) (methods.md 4.3)
    assert random_agreement(10_000, 10_000, 100_000) == pytest.approx(q / (2 - q), rel=1e-3)
    m[:20] = False  # of 780 pairs 190 are of two empty masks, which the published rule counts 1
    some = random_level(m, without_empty=True)
    assert random_level(m) == pytest.approx((190 + 590 * some) / 780, rel=0.02)
    assert random_agreement(0, 0, 10) == 1 and random_agreement(0, 5, 10) == 0


# ------------------------------------------------------------------------------------------------------------- truth


def changed(model: StableDiffusion, names: list[str], size: float) -> StableDiffusion:
    """The model with every weight of some parameters moved by one length up or down."""
    other = copy.copy(model)
    other.unet = copy.deepcopy(model.unet)
    with torch.no_grad():
        for name in names:
            weight = dict(other.unet.named_parameters())[name]
            weight.add_(size * draw(*weight.shape, seed=5).sign())
    return other


def test_the_excess_lies_where_the_planted_model_was_changed_and_nowhere_else(tiny: StableDiffusion) -> None:
    value = next(iter(tiny.layers("attention_value"))) + ".weight"
    noisy = "conv_in.weight"
    shapes = dict(tiny.unet.named_parameters())
    planted, first, second = (changed(tiny, names, 0.5) for names in ([value], [noisy], []))
    change, floor = changes(planted, (first, second))
    assert floor is not None
    groups = {one.name: one for one in excess_by(group_of, change, floor)}
    assert group_of(value) == "cross-attention values, down" and group_of(noisy) == "convolutions and rest, ends"
    assert groups[group_of(value)].excess == pytest.approx(0.25 * shapes[value].numel(), rel=1e-5)
    # One twin of two was moved there, so planted - twin shows half of what twin - twin does.
    assert groups[group_of(noisy)].excess == pytest.approx(-0.125 * shapes[noisy].numel(), rel=1e-5)
    others = [one.excess for name, one in groups.items() if name not in (group_of(value), group_of(noisy))]
    assert others == [0] * len(others)
    assert sum(one.weights for one in groups.values()) == sum(p.numel() for p in tiny.unet.parameters())
    assert changes(planted, (first,))[1] is None
    layers = {one.name: one.excess for one in excess_by(layer_of, change, floor)}
    assert layers[layer_of(value)] == pytest.approx(groups[group_of(value)].excess)
    assert sum(layers.values()) == pytest.approx(sum(one.excess for one in groups.values()))
    # One parameter after another gives the same, and keeps the weights of those alone that masks lie in.
    for twins in ((first, second), (first,)):
        parts, kept, below = every_change(planted, twins, kept={value})
        whole, under = changes(planted, twins)
        for group in (group_of, layer_of):
            assert gathered(group, parts) == excess_by(group, whole, under)
        assert set(kept) == {value} and torch.equal(kept[value], whole[value])
        assert (below is None) == (under is None) and (below is None or torch.equal(below[value], under[value]))
    beyond = excess_energies(change, floor)
    assert float(beyond[noisy].sum()) == pytest.approx(layers["conv_in"]) and excess_energies(change, None) is change


def test_a_mask_covers_what_lies_in_it_and_a_random_one_its_density(tiny: StableDiffusion) -> None:
    names = [f"{name}.weight" for name in tiny.layers("feed_forward", EVERYWHERE)]
    energy = {
        name: draw(*dict(tiny.unet.named_parameters())[name].shape, seed=k).square() for k, name in enumerate(names)
    }
    mask = {name: masks(1, *energy[name].shape, share=0.2, seed=k)[0] for k, name in enumerate(names)}
    slow = sum(float(value) for name in names for value in energy[name][mask[name]])
    assert coverage(energy, mask) == pytest.approx(slow / sum(float(energy[name].sum()) for name in names), rel=1e-12)
    draws = [
        coverage(energy, {name: random_like(mask[name][None], seed=seed)[0] for name in names}) for seed in range(200)
    ]
    assert sum(draws) / 200 == pytest.approx(random_coverage(energy, mask), rel=0.03)
    signed = {name: part - 0.5 for name, part in energy.items()}  # an excess may be negative
    best = sum(
        sum(sorted(signed[name].flatten().tolist(), reverse=True)[: int(mask[name].sum())]) for name in names
    ) / sum(float(signed[name].sum()) for name in names)
    chosen = best_masks(signed, mask)
    assert coverage(signed, chosen) == pytest.approx(best) and best > coverage(signed, mask)
    rows = {name: (torch.arange(len(part)) % 5 == 0)[:, None].expand_as(part) for name, part in energy.items()}
    tops = [sorted(energy[name].sum(1).tolist(), reverse=True)[: int(rows[name].any(1).sum())] for name in names]
    assert coverage(energy, best_masks(energy, rows)) == pytest.approx(
        sum(map(sum, tops)) / sum(float(energy[name].sum()) for name in names)
    )
    one = {names[0]: mask[names[0]]}
    assert random_coverage(energy, one) == pytest.approx(density(one))
    nothing, _ = changes(tiny, (tiny,), names)
    assert set(nothing) == set(names)
    assert math.isnan(coverage(nothing, mask)) and math.isnan(random_coverage(nothing, mask))


def test_masks_of_large_layers_are_not_taken_to_know_more_than_chance() -> None:
    """A mask that holds much of a layer with much change holds much of the change: so do random ones as large there."""
    energy = {"a": torch.full((10,), 9.0), "b": torch.full((90,), 0.1)}
    mask = {"a": torch.arange(10) < 5, "b": torch.zeros(90).bool()}
    assert density(mask) == 0.05 and coverage(energy, mask) == pytest.approx(45 / 99)
    assert random_coverage(energy, mask) == pytest.approx(coverage(energy, mask))


# ------------------------------------------------------------------------------------------------- patching, causal


def test_hooks_see_and_replace_inside_their_block_alone(tiny: StableDiffusion) -> None:
    layers = tiny.layers("feed_forward", EVERYWHERE)
    name, layer = next(iter(layers.items()))
    x, seen = torch.ones(1, 2, layer.in_features), []
    with hooked({name: layer}, lambda *seen_by: seen.append(seen_by)):
        plain = layer(x)
    assert seen[0][0] == name and seen[0][1] is x and torch.equal(seen[0][2], plain)
    with pytest.raises(KeyError), hooked(layers, lambda _, inputs, output: output * 0):
        assert (layer(x) == 0).all()
        raise KeyError
    assert torch.equal(layer(x), plain) and not any(one._forward_hooks for one in layers.values())


def test_patching_nothing_changes_nothing_and_patching_own_activations_neither(tiny: StableDiffusion) -> None:
    y, noise = tiny.encode(["abc"]), initial_noise(tiny, [0, 1])
    found = patched_samples(tiny, tiny, y, noise, patch_sets(tiny), steps=3, guidance_scale=2.0)
    alone = sample(tiny, y.expand(2, -1, -1), noise, steps=3, guidance_scale=2.0)
    assert set(found) == {"none", "source", *patch_sets(tiny)}
    for latents in found.values():
        assert torch.allclose(latents, alone, atol=1e-5)


def test_a_patch_carries_exactly_what_its_layer_computes(tiny: StableDiffusion) -> None:
    """Models that differ in one value projection alone: its activations are sufficient, no other layer's are."""
    name = next(iter(tiny.layers("attention_value", EVERYWHERE)))
    twin = changed(tiny, [f"{name}.weight"], 0.3)
    y, noise = tiny.encode(["abc"]), initial_noise(tiny, [0])
    other = list(tiny.layers("feed_forward", EVERYWHERE))[-1]
    found = patched_samples(tiny, twin, y, noise, {name: (name,)}, steps=3, guidance_scale=2.0)
    assert not torch.allclose(found["none"], found["source"], atol=1e-3)
    assert torch.allclose(found[name], found["source"], atol=1e-5)
    # One step: the other layer's activations differ there, so it carries something, but not the whole way.
    partly = patched_samples(tiny, twin, y, noise, {other: (other,)}, steps=1, guidance_scale=2.0)
    gap = (partly["source"] - partly["none"]).norm()
    assert 0 < float((partly[other] - partly["source"]).norm() / gap) < 1


def test_the_four_kinds_together_carry_all_that_they_write(tiny: StableDiffusion) -> None:
    """Models that differ in the four kinds of layers alone: all of them are the source's run, no kind alone is."""
    sets, weights = patch_sets(tiny), tiny.unet.state_dict()
    kinds = ("all values", "all feed-forwards", "all self-attentions", "all convolutions")
    assert sorted(sets["all four kinds"]) == sorted(name for kind in kinds for name in sets[kind])
    blocks = sum(name.endswith(".norm3.weight") for name in weights)
    assert [len(sets[kind]) for kind in kinds[:3]] == [blocks] * 3
    convolved = [name.removesuffix(".weight") for name in weights if ".resnets." in name and ".conv2.weight" in name]
    assert sorted(sets["all convolutions"]) == sorted(convolved)
    twin = changed(tiny, [f"{name}.weight" for name in sets["all four kinds"]], 0.3)
    y, noise = tiny.encode(["abc"]), initial_noise(tiny, [0])
    found = patched_samples(
        tiny, twin, y, noise, {name: sets[name] for name in (*kinds, "all four kinds")}, steps=2, guidance_scale=2.0
    )
    assert torch.allclose(found["all four kinds"], found["source"], atol=1e-5)
    assert not any(torch.allclose(found[kind], found["source"], atol=1e-3) for kind in (*kinds, "none"))


def test_both_halves_of_the_guidance_come_from_one_text_encoder(tiny: StableDiffusion) -> None:
    """A twin's own empty prompt would make its run differ by more than its weights."""
    twin = copy.copy(tiny)
    twin.text_encoder = copy.deepcopy(tiny.text_encoder)
    with torch.no_grad():
        next(twin.text_encoder.parameters()).mul_(3)
    y, null, noise = tiny.encode(["abc"]), tiny.encode([""]), initial_noise(tiny, [0])
    assert not torch.allclose(twin.encode([""]), null)
    found = patched_samples(twin, tiny, y, noise, {}, steps=2, guidance_scale=3.0, null=null)
    assert torch.allclose(found["source"], found["none"], atol=1e-5)
    assert torch.allclose(found["none"], sample(tiny, y, noise, steps=2, guidance_scale=3.0), atol=1e-5)


def test_the_share_of_the_gap_counts_from_the_target_to_the_source() -> None:
    assert share_of_gap(0.5, 0.1, 0.9, SUFFICIENT) == pytest.approx(0.5)
    assert share_of_gap(0.7, 0.9, 0.1, NECESSARY) == pytest.approx(0.25)
    assert share_of_gap(0.5, 0.5, 0.6, SUFFICIENT) is None  # the models hardly differ
    assert share_of_gap(0.5, 0.9, 0.1, SUFFICIENT) is None  # the twin draws the memory, not the planted model
    assert share_of_gap(0.5, 0.1, 0.9, NECESSARY) is None


def test_the_cross_test_tells_the_diagonal_from_the_rest_and_counts_masks() -> None:
    matrix, fresh = [[False, True, True], [True, False, True], [True, True, True]], [[True], [False], [True]]
    found = cross_test(matrix, fresh, [0, 1, 2])
    assert (found.own.value, found.own.n) == (pytest.approx(1 / 3), 3)
    assert (found.others.value, found.others.n) == (1, 3) and found.fresh.value == pytest.approx(2 / 3)
    # Six attacks under three masks bound the rate no better than three trials do.
    assert found.others.low == pytest.approx(wilson(3, 3).low)
    assert cross_test(matrix[1:], fresh[1:], [1, 2]).own.value == pytest.approx(1 / 2)
    everything = cross_test(matrix, fresh, None)
    assert everything.own.n == 0 and everything.others.value == pytest.approx(7 / 9)


def test_masks_are_joined_in_doubling_numbers_until_nothing_comes_back() -> None:
    assert union_sizes(16) == (1, 2, 4, 8, 16) and union_sizes(5) == (1, 2, 4, 5) and union_sizes(1) == (1,)
    single = [WeightMask("m", {"w": torch.arange(8) == k}) for k in range(5)]
    unions = dict(joined(iter(single), 5, "m"))
    assert {size: edit.size for size, edit in unions.items()} == {1: 1, 2: 2, 4: 4, 5: 5} and unions[4].name == "m x 4"
    assert all(torch.equal(edit.masks["w"], torch.arange(8) < size) for size, edit in unions.items())
    assert enough([3, 1, 0, 0], (1, 2, 4, 5)) == 4 and enough([0, 1, 0, 0], (1, 2, 4, 5)) == 4
    assert enough([3, 1, 1, 1], (1, 2, 4, 5)) is None and enough([0, 0, 0, 0], (1, 2, 4, 5)) == 1


def test_chunks_hold_everything_once() -> None:
    assert [k for chunk in chunks(23, 10) for k in chunk] == list(range(23)) and chunks(0, 5) == []
