"""Promises of the embedded descriptor: its pairs, loss, file and calibration. The training itself is only smoked."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dori.errors import DoriError
from dori.metrics.calibration import (
    PIXEL_CORRELATION,
    calibrate,
    calibrate_masked,
    compare_descriptors,
    differ_outside,
    random_boxes,
)
from dori.metrics.copy_descriptor import (
    CopyNetwork,
    as_descriptor,
    load_copy_descriptor,
    new_network,
    save_copy_descriptor,
)
from dori.metrics.copy_pairs import (
    DRIFT_PX,
    GROUP,
    HELD_OUT,
    TRAINING,
    Pairs,
    augment,
    displacement_px,
    drifted,
    look_alikes,
    make_pairs,
    to_float,
)
from dori.metrics.copy_training import CopyRecipe, copy_loss, train_descriptor
from dori.metrics.similarity import Descriptor, masked_similarity
from dori.testbed.scenes import free_scene


def same(images: Tensor) -> Tensor:
    """A VAE that loses nothing."""
    return images


def generator(seed: int = 0) -> torch.Generator:
    """A fresh generator."""
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------- pairs


def test_look_alikes_share_all_but_one_thing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = free_scene(rng)
        moved, swapped, others = look_alikes(scene, rng)
        assert moved[0] == swapped[0] == others[0] == scene
        for a in range(4):
            for b in range(a):
                assert displacement_px(moved[a], moved[b]) > 3 * DRIFT_PX
                assert not {p.kind for p in swapped[a].objects} & {p.kind for p in swapped[b].objects}
                assert others[a].texture_seed != others[b].texture_seed
        assert all(m.texture_seed == scene.texture_seed and m.title == scene.title for m in (*moved, *swapped))
        assert all([p.kind for p in m.objects] == [p.kind for p in scene.objects] for m in moved)
        places = [(p.x_px, p.y_px, p.size_px) for p in scene.objects]
        assert all([(p.x_px, p.y_px, p.size_px) for p in s.objects] == places for s in swapped)
        assert all(o.objects == scene.objects for o in others)


def test_drifted_moves_each_object_by_at_most_its_bound_and_keeps_the_rest() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        scene = free_scene(rng)
        moved = drifted(scene, rng)
        assert 0 < displacement_px(scene, moved) <= DRIFT_PX * math.sqrt(2)
        assert (moved.texture_seed, moved.artist) == (scene.texture_seed, scene.artist)


def test_make_pairs_depends_on_seed_and_stream_and_passes_through_the_vae() -> None:
    first, again = (make_pairs(2, same, seed=3, stream=TRAINING) for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.copies, again.copies)
    assert first.images.shape == (2 * GROUP, 3, 64, 64)
    for other in (make_pairs(2, same, seed=4, stream=TRAINING), make_pairs(2, same, seed=3, stream=HELD_OUT)):
        assert (other.images.float() - first.images.float()).abs().flatten(1).mean(dim=1).min() > 1
    grey = make_pairs(1, lambda images: torch.full_like(images, 0.5), seed=3, stream=TRAINING)
    assert grey.copies.float().std(dim=(1, 2, 3)).max() < 12  # nothing of the image survives such a VAE


def test_negatives_pair_different_images_of_one_group() -> None:
    pairs = make_pairs(2, same, seed=0, stream=TRAINING)
    left, right = pairs.negatives.unbind(dim=1)
    assert len(pairs.negatives) == len(torch.unique(pairs.negatives, dim=0)) == 2 * 36
    assert (left != right).all()
    assert (left // GROUP == right // GROUP).all()


def test_augment_of_strength_zero_changes_nothing_and_more_changes_more() -> None:
    images = to_float(make_pairs(1, same, seed=0, stream=TRAINING).images)
    torch.testing.assert_close(augment(images, torch.zeros(len(images)), generator()), images, atol=1e-4, rtol=0)
    changes = [
        (augment(images, torch.full((len(images),), s), generator()) - images).abs().mean().item()
        for s in (0.3, 1.0, 3.0)
    ]
    assert changes == sorted(changes)
    assert changes[0] > 0.005
    torch.testing.assert_close(
        augment(images, torch.ones(len(images)), generator(5)), augment(images, torch.ones(len(images)), generator(5))
    )


# ----------------------------------------------------------------------------------------------- loss and network


def test_copy_loss_is_the_published_formula_pair_by_pair() -> None:
    n, tau, weight = 5, 0.05, 30.0
    z = torch.nn.functional.normalize(torch.randn(2 * n, 7, generator=generator(), dtype=torch.float64))
    expected = 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        exponents = {j: math.exp(float(z[i] @ z[j]) / tau) for j in range(2 * n) if j != i}
        distances = [math.dist(z[i], z[j]) for j in range(2 * n) if j not in (i, partner)]
        expected += -math.log(exponents[partner] / sum(exponents.values())) - weight * math.log(min(distances))
    found = copy_loss(z[:n], z[n:], temperature=tau, entropy_weight=weight)
    assert found.item() == pytest.approx(expected / (2 * n), rel=1e-9)


def test_network_depends_on_its_seed_alone_and_not_on_neighbours() -> None:
    before = torch.get_rng_state()
    first, again, other = new_network(0), new_network(0), new_network(1)
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.rand(4, 3, 64, 64, generator=generator())
    descriptor = as_descriptor(first)
    assert torch.equal(descriptor(images), as_descriptor(again)(images))
    assert not torch.allclose(descriptor(images), as_descriptor(other)(images), atol=1e-2)
    torch.testing.assert_close(descriptor(images)[2:3], descriptor(images[2:3]), atol=1e-5, rtol=0)
    assert math.isnan(descriptor.threshold)
    assert sum(p.numel() for p in CopyNetwork().parameters()) < 1_000_000


# ------------------------------------------------------------------------------------------ file and calibration


def test_saved_descriptor_comes_back_with_its_threshold(tmp_path: Path) -> None:
    network = new_network(0)
    calibrated = calibrate(as_descriptor(network), same, seed=0, negatives=40)
    save_copy_descriptor(tmp_path / "d.safetensors", network, calibrated, {"steps": 0})
    loaded = load_copy_descriptor(tmp_path / "d.safetensors")
    images = torch.rand(2, 3, 48, 80, generator=generator())  # any size is resized
    assert torch.equal(loaded(images), calibrated(images))
    assert (loaded.threshold, loaded.calibration) == (calibrated.threshold, calibrated.calibration)
    assert (loaded.masked_threshold, loaded.masked_calibration) == (
        calibrated.masked_threshold,
        calibrated.masked_calibration,
    )
    assert loaded.masked_calibration is not None
    assert len(loaded.fingerprint) == 64
    assert "sscd" not in loaded.name.lower()


def test_a_file_from_before_masked_thresholds_loads_without_one(tmp_path: Path) -> None:
    measured = {
        "false_positive_rate": 0.0,
        "true_positive_rate": 1.0,
        "negative_pairs": 3,
        "positive_pairs": 2,
        "measured_on": "pairs",
    }
    header = {
        "kind": "copy-descriptor",
        "name": "dori-copy-64",
        "threshold": "0.61",
        "details": "{}",
        "calibration": json.dumps(measured),
    }
    save_file(new_network(0).state_dict(), tmp_path / "old.safetensors", metadata=header)
    old = load_copy_descriptor(tmp_path / "old.safetensors")
    assert old.threshold == 0.61
    assert math.isnan(old.masked_threshold)
    assert old.masked_calibration is None
    assert old.record() == {
        "name": "dori-copy-64",
        "preprocessing": old.preprocessing,
        "fingerprint": old.fingerprint,
        "threshold": 0.61,
        "calibration": measured,
        "masked_threshold": None,
        "masked_calibration": None,
    }


def test_files_that_are_no_descriptor_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("nothing")
    for name in ("text.safetensors", "absent.safetensors"):
        with pytest.raises(DoriError, match="give a descriptor"):
            load_copy_descriptor(tmp_path / name)
    with pytest.raises(DoriError, match="calibrate it first"):
        save_copy_descriptor(tmp_path / "d.safetensors", new_network(0), as_descriptor(new_network(0)), {})


def test_calibrate_keeps_the_false_positive_rate_on_its_pairs() -> None:
    calibrated = calibrate(PIXEL_CORRELATION, same, seed=0, negatives=200, fpr=0.05)
    measured = calibrated.calibration
    assert measured is not None
    assert (measured.negative_pairs, measured.positive_pairs) == (216, 60)
    assert 0.04 < measured.false_positive_rate <= 0.05
    pairs = make_pairs(6, same, seed=0, stream=HELD_OUT)
    images, copies = PIXEL_CORRELATION(to_float(pairs.images)), PIXEL_CORRELATION(to_float(pairs.copies))
    table = images @ copies.T
    left, right = pairs.negatives.unbind(dim=1)
    assert (table[left, right] > calibrated.threshold).float().mean().item() == pytest.approx(
        measured.false_positive_rate
    )
    assert (table.diagonal() > calibrated.threshold).float().mean().item() == pytest.approx(measured.true_positive_rate)


def test_the_masked_threshold_keeps_its_rate_on_pairs_painted_as_masked_similarity_does() -> None:
    calibrated = calibrate(PIXEL_CORRELATION, same, seed=0, negatives=100, fpr=0.05)
    measured, pairs = calibrated.masked_calibration, make_pairs(3, same, seed=0, stream=HELD_OUT)
    assert measured is not None
    boxes, images, copies = random_boxes(pairs.images, seed=0), to_float(pairs.images), to_float(pairs.copies)
    assert all(26 <= r - left == b - t <= 38 and 0 <= left < r <= 64 and 0 <= t < b <= 64 for left, t, r, b in boxes)
    assert len(set(boxes)) > 20

    def similarity(image: int, copy: int) -> float:
        return float(masked_similarity(PIXEL_CORRELATION, copies[copy : copy + 1], images[image], boxes[image]))

    kept = pairs.negatives[differ_outside(pairs, boxes)].tolist()
    other, known = [similarity(*pair) for pair in kept], [similarity(row, row) for row in range(len(images))]
    assert (measured.negative_pairs, measured.positive_pairs) == (len(kept), 30)
    assert 60 < len(kept) <= 108
    threshold = calibrated.masked_threshold
    assert threshold == pytest.approx(sorted(other)[-1 - math.floor(0.05 * len(kept))], abs=1e-5)
    assert measured.false_positive_rate == pytest.approx(math.floor(0.05 * len(kept)) / len(kept))
    assert measured.true_positive_rate == pytest.approx(np.mean([value > threshold for value in known]), abs=0.04)


def test_pairs_that_differ_within_the_box_alone_are_no_strangers() -> None:
    image = to_float(make_pairs(1, same, seed=0, stream=HELD_OUT).images)[:1]
    within, beyond = image.clone(), image.clone()
    within[..., 8:40, 8:40] = 1 - within[..., 8:40, 8:40]
    beyond[..., 32:64, 8:40] = 1 - beyond[..., 32:64, 8:40]
    images = (torch.cat([image, within, beyond]) * 255).round().to(torch.uint8)
    pairs = Pairs(images, images, torch.tensor([[0, 1], [0, 2], [1, 0], [1, 2], [2, 1]]))
    assert differ_outside(pairs, [(8, 8, 40, 40)] * 3).tolist() == [False, True, False, True, True]
    assert differ_outside(pairs, [(7, 31, 41, 64)] * 3).tolist() == [True, False, True, True, True]


def test_a_masked_threshold_comes_from_anybodys_controls() -> None:
    references, controls = (
        torch.rand(2, 3, 20, 24, generator=generator()),
        torch.rand(5, 3, 20, 24, generator=generator(1)),
    )
    boxes, every = [(0, 0, 12, 10), (5, 5, 20, 20)], torch.cartesian_prod(torch.arange(2), torch.arange(5))
    found = calibrate_masked(
        PIXEL_CORRELATION,
        references,
        boxes,
        copies=references,
        strangers=controls,
        pairs=every,
        measured_on="two templates against five controls",
    )
    values = [
        float(masked_similarity(PIXEL_CORRELATION, controls[k : k + 1], references[i], boxes[i]))
        for i, k in every.tolist()
    ]
    assert found.masked_threshold == pytest.approx(max(values), abs=1e-5)
    assert found.masked_calibration is not None
    assert found.masked_calibration.measured_on == "two templates against five controls"
    assert found.masked_calibration.true_positive_rate == 1
    assert found.threshold == PIXEL_CORRELATION.threshold
    with pytest.raises(DoriError, match="there are none"):
        calibrate_masked(
            PIXEL_CORRELATION, references, boxes, copies=references, strangers=controls, pairs=every[:0], measured_on=""
        )


def test_pixel_correlation_is_the_correlation_coefficient() -> None:
    images = torch.rand(2, 3, 32, 32, generator=generator())
    table = PIXEL_CORRELATION(images) @ PIXEL_CORRELATION(images).T
    np.testing.assert_allclose(table, np.corrcoef(images.flatten(1)), atol=1e-5)


def test_compare_descriptors_tells_a_judge_from_a_blind_one() -> None:
    blind = Descriptor("blind", "none", lambda images: torch.ones(len(images), 4), threshold=0.5)
    pixels, guess = compare_descriptors([PIXEL_CORRELATION, blind], same, seed=1, groups=4)
    assert (guess.true_positive_rate, guess.auroc) == (0.0, 0.5)
    assert guess.recall_at_1 == 1 / 40  # the first image wins every tie
    assert pixels.auroc > 0.7
    assert pixels.recall_at_1 > 0.5


def test_training_is_deterministic_and_writes_a_calibrated_file(tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = CopyRecipe(groups=3, batch_groups=2, steps=5, negatives=40)
    trained = train_descriptor(tmp_path / "run", same, recipe=recipe, say=lines.append)
    assert trained.calibration is not None
    assert trained.calibration.negative_pairs == 72
    assert (tmp_path / "run" / "copy_descriptor.safetensors").exists()
    assert len(lines) >= 2
    images = torch.rand(2, 3, 64, 64, generator=generator())
    assert not torch.allclose(trained(images), as_descriptor(new_network(0))(images), atol=1e-4)
    again = train_descriptor(tmp_path / "other", same, recipe=recipe)
    assert torch.equal(trained(images), again(images))
