"""Frechet and kernel distance against closed forms and brute force; alignment against CLIP's own logits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from dori.errors import DoriError
from dori.metrics.alignment import OPENAI_MEAN, OPENAI_STD, alignment
from dori.metrics.quality import frechet_distance, kernel_distance


def gaussian(n: int, d: int, seed: int) -> Tensor:
    """Standard normal rows in float64."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(n: int, mean: Tensor, std: Tensor, seed: int) -> Tensor:
    """Rows whose sample mean is `mean` and whose sample covariance is exactly diag(std^2)."""
    x = gaussian(n, len(mean), seed)
    x -= x.mean(dim=0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return white * std + mean


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    mean, std = gaussian(2, 5, 0), gaussian(2, 5, 1).abs() + 0.1
    expected = (mean[0] - mean[1]).square().sum() + (std[0] - std[1]).square().sum()
    found = frechet_distance(exact(50, mean[0], std[0], 2), exact(60, mean[1], std[1], 3))
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_agrees_with_the_general_square_root() -> None:
    a, b = gaussian(40, 6, 0) @ gaussian(6, 6, 1), gaussian(30, 6, 2) @ gaussian(6, 6, 3) + 1
    s, t = np.cov(a.numpy().T), np.cov(b.numpy().T)
    roots = np.sqrt(np.linalg.eigvals(s @ t).astype(complex)).real.sum()
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(s) + np.trace(t) - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_exact_with_fewer_images_than_dimensions() -> None:
    a = gaussian(8, 40, 0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, a + 2) == pytest.approx(160, rel=1e-6)
    assert frechet_distance(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(
        4 * float(torch.cov(a.T).trace()), rel=1e-6
    )  # covariances s and 9 s: (3 - 1)^2 tr s


def test_frechet_distance_is_symmetric_and_reads_float32() -> None:
    a, b = gaussian(20, 7, 0), gaussian(9, 7, 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(frechet_distance(a, b), rel=1e-5)


def brute_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD, pair by pair."""

    def kernel(p: np.ndarray, q: np.ndarray) -> float:
        return float(p @ q / len(p) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(p, q) for p in x for q in y) / (n * m)


def test_kernel_distance_of_whole_sets_is_brute_force() -> None:
    a, b = gaussian(9, 4, 0), gaussian(9, 4, 1) + 0.3
    found = kernel_distance(a, b, seed=0, subsets=3, subset_size=9)
    assert found.value == pytest.approx(brute_mmd(a.numpy(), b.numpy()), rel=1e-9)
    # Every subset would be the whole: the spread is that of halves, which is nothing where there are none.
    halves = kernel_distance(a, b, seed=0, subsets=3, subset_size=4)
    assert found.deviation == pytest.approx(halves.deviation) and found.deviation > 0
    few = kernel_distance(a[:3], b[:3], seed=0)
    assert few.value == pytest.approx(brute_mmd(a[:3].numpy(), b[:3].numpy()), rel=1e-9) and few.deviation == 0


def test_kernel_distance_is_unbiased_and_sees_a_difference() -> None:
    same = [
        kernel_distance(gaussian(30, 4, 2 * i), gaussian(30, 4, 2 * i + 1), seed=0, subsets=1).value for i in range(200)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)
    assert min(same) < 0
    apart = kernel_distance(gaussian(60, 4, 0), gaussian(60, 4, 1) + 1, seed=0, subsets=20, subset_size=30)
    assert apart.value > 10 * apart.deviation / np.sqrt(20) > 0
    assert kernel_distance(gaussian(60, 4, 0), gaussian(60, 4, 1), seed=0, subset_size=10) == kernel_distance(
        gaussian(60, 4, 0), gaussian(60, 4, 1), seed=0, subset_size=10
    )


@pytest.mark.parametrize("b", [gaussian(5, 3, 0), gaussian(1, 4, 0), gaussian(5, 4, 0) / 0])
def test_quality_refuses_features_that_cannot_be_compared(b: Tensor) -> None:
    with pytest.raises(DoriError):
        frechet_distance(gaussian(5, 4, 1), b)
    with pytest.raises(DoriError):
        kernel_distance(gaussian(5, 4, 1), b, seed=0)


@pytest.fixture
def clip(tmp_path: Path) -> tuple:
    """A tiny random CLIP of 16 x 16 images."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(tmp_path)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = shared | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 12,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config=shared | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    return CLIPModel(config).eval(), tokenizer


def test_alignment_is_the_diagonal_of_clips_own_logits(clip: tuple) -> None:
    model, tokenizer = clip
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "dog", "a much longer prompt than the context holds"]
    mean, std = (torch.tensor(c)[:, None, None] for c in (OPENAI_MEAN, OPENAI_STD))
    inputs = tokenizer(prompts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=(images - mean) / std, **inputs).logits_per_image
    expected = logits.diagonal() / model.logit_scale.exp().detach()
    found = alignment(model, tokenizer, images, prompts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    other = alignment(model, tokenizer, images, prompts, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert not torch.allclose(found, other, atol=1e-3)
    torch.testing.assert_close(alignment(model, tokenizer, images[1:2], prompts[1:2]), found[1:2])


def test_alignment_refuses_unpaired_prompts(clip: tuple) -> None:
    with pytest.raises(DoriError, match="repeat the prompt"):
        alignment(*clip, torch.rand(2, 3, 16, 16), ["a cat"])
