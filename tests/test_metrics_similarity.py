"""Promises of the judges: descriptors, masked similarity, diversity, replication."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dori.errors import DoriError
from dori.metrics.diversity import pairwise_similarity
from dori.metrics.replication import replication
from dori.metrics.similarity import Descriptor, cosine, masked_similarity, paint, similarity

PIXELS = Descriptor("pixels", "none", lambda images: images.flatten(1) - 0.5, threshold=0.7)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Uniform numbers in [0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_descriptor_returns_unit_rows_that_ignore_their_neighbours() -> None:
    images = noise(70, 3, 8, 8)
    described = PIXELS(images)
    torch.testing.assert_close(described.norm(dim=1), torch.ones(70))
    torch.testing.assert_close(described[65:66], PIXELS(images[65:66]))


@pytest.mark.parametrize(
    "images",
    [
        noise(3, 8, 8),
        noise(2, 8, 8, 3),
        noise(1, 3, 8, 8) * 2,
        noise(1, 3, 8, 8) - 0.5,
        torch.full((1, 3, 8, 8), math.nan),
    ],
)
def test_descriptor_refuses_what_is_no_image(images: Tensor) -> None:
    with pytest.raises(DoriError, match="pixels describes images"):
        PIXELS(images)


def test_cosine_is_the_closed_form_and_broadcasts() -> None:
    a, b = noise(4, 6).double() - 0.5, noise(3, 6, seed=1).double() - 0.5
    table = cosine(a[:, None], b)
    for i in range(4):
        for j in range(3):
            assert table[i, j].item() == pytest.approx(
                float(a[i] @ b[j]) / math.dist(a[i], a[i] * 0) / math.dist(b[j], b[j] * 0)
            )


def test_similarity_is_the_mid_point_median_over_references() -> None:
    images, references = noise(3, 3, 8, 8), noise(4, 3, 8, 8, seed=1)
    table = cosine(PIXELS(images)[:, None], PIXELS(references)).numpy()
    np.testing.assert_allclose(similarity(PIXELS, images, references), np.median(table, axis=1), atol=1e-6)
    torch.testing.assert_close(similarity(PIXELS, images, images[:1])[0], torch.tensor(1.0))


def test_masked_similarity_sees_nothing_in_the_box_and_everything_outside() -> None:
    reference, box = noise(3, 16, 16), (4, 2, 12, 9)
    inside, outside = reference[None].clone(), reference[None].clone()
    inside[..., 2:9, 4:12] = noise(3, 7, 8, seed=3)
    outside[..., 9:, :] = noise(3, 7, 16, seed=4)
    assert masked_similarity(PIXELS, inside, reference, box).item() == pytest.approx(1, abs=1e-5)
    assert similarity(PIXELS, inside, reference[None]).item() < 0.9
    assert masked_similarity(PIXELS, outside, reference, box).item() < 0.9


def test_masked_similarity_does_not_depend_on_what_the_reference_shows_in_the_box() -> None:
    reference, image, box = noise(3, 16, 16), noise(1, 3, 16, 16, seed=1), (4, 2, 12, 9)
    other = reference.clone()
    other[:, 2:9, 4:12] = noise(3, 7, 8, seed=5)
    torch.testing.assert_close(
        masked_similarity(PIXELS, image, reference, box), masked_similarity(PIXELS, image, other, box)
    )


def test_masked_similarity_cuts_a_box_at_the_border() -> None:
    reference = noise(3, 16, 16)
    image = reference[None].clone()
    image[..., :4, :4] = 0
    assert masked_similarity(PIXELS, image, reference, (-3, -3, 4, 4)).item() == pytest.approx(1, abs=1e-5)


def test_paint_fills_each_box_with_the_mean_of_its_own_reference_outside_it() -> None:
    images, references = noise(3, 3, 8, 10), noise(3, 3, 8, 10, seed=1)
    boxes = [(1, 2, 4, 7), (-3, 0, 2, 20), (6, 5, 10, 8)]
    painted = paint(images, references, boxes)
    for row, (left, top, right, bottom) in enumerate(boxes):
        hidden = np.zeros((8, 10), bool)
        hidden[max(0, top) : bottom, max(0, left) : right] = True
        for channel in range(3):
            mean = references[row, channel].numpy().astype(np.float64)[~hidden].mean()
            np.testing.assert_allclose(painted[row, channel].numpy()[hidden], mean, rtol=1e-5)
            np.testing.assert_array_equal(painted[row, channel].numpy()[~hidden], images[row, channel].numpy()[~hidden])
    white = torch.ones(1, 3, 64, 64)
    assert paint(white, white, [(3, 3, 30, 31)]).max() <= 1


@pytest.mark.parametrize("box", [(0, 0, 16, 16), (3, 3, 3, 9), (-4, -4, -1, -1), (20, 0, 30, 9)])
def test_masked_similarity_refuses_a_box_that_covers_all_or_nothing(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(DoriError, match="covers all or nothing"):
        masked_similarity(PIXELS, noise(1, 3, 16, 16), noise(3, 16, 16), box)
    with pytest.raises(DoriError, match="resize the reference"):
        masked_similarity(PIXELS, noise(1, 3, 8, 8), noise(3, 16, 16), (1, 1, 2, 2))


def test_pairwise_similarity_is_the_median_of_all_pairs() -> None:
    for n in (2, 4, 5, 10):  # 4 generations have 6 pairs: the mid-point, not the lower middle
        descriptors = noise(n, 6, seed=n).double() - 0.5
        pairs = [float(cosine(descriptors[i], descriptors[j])) for i in range(n) for j in range(i)]
        assert pairwise_similarity(descriptors) == pytest.approx(float(np.median(pairs)), abs=1e-12)
    with pytest.raises(DoriError, match="fewer than two"):
        pairwise_similarity(noise(1, 6))


def test_replication_counts_by_hand() -> None:
    found = replication({"a": [0.9, 0.8, 0.1], "b": [0.9, 0.2, 0.1], "c": [0.7, 0.7], "d": [0.6, 0.9]}, 0.7)
    assert (found.memories, found.by_median, found.by_maximum) == (4, 2, 3)  # c only equals the threshold
    assert (found.images, found.images_replicated) == (10, 4)
    assert found.rate.value == 0.5
    assert found.rate.low < 0.5 < found.rate.high
    assert found.rate_by_maximum.value == 0.75
    assert found.shares == pytest.approx((2 / 3, 1 / 3, 0, 1 / 2))
    assert found.image_rate.value == pytest.approx(0.375)


def test_replication_with_a_threshold_for_each_memory() -> None:
    found = replication({"a": [0.8, 0.8], "b": [0.8, 0.8]}, {"a": 0.7, "b": 0.9})
    assert (found.by_median, found.images_replicated, found.shares) == (1, 2, (1.0, 0.0))
    with pytest.raises(DoriError, match="no threshold yet"):
        replication({"a": [0.8]}, {"a": math.nan})


def test_the_share_of_images_has_an_interval_over_memories_not_over_seeds() -> None:
    draws = np.random.default_rng(0)
    truth, covered, n, seeds = 0.4, [], 40, 10
    for _ in range(60):  # the seeds of a memory agree: 400 generations know no more than 40 memories
        back = draws.random(n) < truth
        rate = replication({str(k): [0.9 * bool(b)] * seeds for k, b in enumerate(back)}, 0.7).image_rate
        covered.append(rate.low <= truth <= rate.high)
        assert rate.n == n
    assert np.mean(covered) > 0.85
    none = replication({str(k): [0.1] * seeds for k in range(8)}, 0.7).image_rate
    assert (none.value, none.low, none.high) == (0, 0, pytest.approx(0.324, abs=1e-3))  # Wilson of 0 of 8
    equal = replication({str(k): [0.1, 0.9] for k in range(4)}, 0.7).image_rate
    assert equal.low < equal.value == 0.5 < equal.high


def test_replication_refuses_what_cannot_be_counted() -> None:
    with pytest.raises(DoriError, match="no threshold yet"):
        replication({"a": [0.9]}, math.nan)
    for values in ([], [math.nan]):
        with pytest.raises(DoriError, match="'a' has no similarities"):
            replication({"a": values}, 0.7)
    assert replication({}, 0.7).rate.n == 0
