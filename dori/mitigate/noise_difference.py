"""The noise-difference score of NeMo: how alike the first predictions from different initial noises are.

Source: "Finding NeMo" (Hintersdorf et al., NeurIPS 2024), section 3.1 and Algorithm 1, and its code; methods.md 2.2.
A memorized prompt draws the same picture whatever the noise x_T, so its differences

    delta = eps_theta(x_T, t, y) - x_T,   min-max scaled to [0, 1],

resemble one another; the resemblance of two differences is their multi-scale SSIM. `Nemo` uses this module twice: to
tell memorized prompts by the resemblance between noises, and to judge a set of neurons by the resemblance, for the
same noise, between the whole and the blocked network.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dori.errors import DoriError
from dori.model.stable_diffusion import StableDiffusion
from dori.sampling import initial_noise

Variant = Literal["paper", "as_released"]
Similarity = Literal["paper", "prompt_difference"]
K1, K2 = 0.01, 0.03  # SSIM's stabilising constants
# A difference that spans less than this share of the prediction itself counts as none. It may be nothing but rounding,
# and blown up to [0, 1] that would let a machine's choice of kernels decide the score.
LEAST_SPAN = 1e-3


@dataclass(frozen=True, slots=True)
class SsimWindow:
    """Settings of the multi-scale SSIM; the defaults are NeMo's, for 64 x 64 latents.

    Args:
        side: side of the square Gaussian window in latent pixels, odd.
        sigma: standard deviation of the window in latent pixels.
        scales: number of scales, each half as large as the one before.
        exponent: exponent of each scale's term.
    """

    side: int = 11
    sigma: float = 1.5
    scales: int = 3
    exponent: float = 0.33


def ssim_window(height: int, width: int) -> SsimWindow:
    """The published window where it fits, else the nearest one that does.

    Three scales and a window of 11 need a side of 44. Below, the window is the largest odd number up to half the
    side (3 to 11) with sigma in proportion, the scales are as many, up to 3, as hold a whole window, and the
    exponents keep their published sum of 0.99. A 32 x 32 latent is judged by 2 scales and a window of 11, a 16 x 16
    latent by 2 scales and a window of 7. Scores under different windows are not comparable: each has its own tau.

    Raises:
        DoriError: the latent is smaller than 3 x 3.
    """
    smaller = min(height, width)
    if smaller < 3:
        raise DoriError(
            f"latents of {height} x {width} are too small for a structural similarity; NeMo needs at least 3 x 3"
        )
    half = smaller // 2
    side = max(3, min(11, half - 1 + half % 2))
    scales = min(3, 1 + int(math.log2(smaller / side)))
    return SsimWindow(side, 1.5 * side / 11, scales, 0.33 * 3 / scales)


def _gaussian(window: SsimWindow, like: Tensor) -> Tensor:
    """The window's weights for a grouped convolution of five stacked maps, shape (5 c, 1, side, side)."""
    x = torch.arange(window.side, dtype=like.dtype, device=like.device) - (window.side - 1) / 2
    line = torch.exp(-(x / window.sigma).square() / 2)
    line = line / line.sum()
    return torch.outer(line, line).expand(5 * like.shape[1], 1, -1, -1)


def _ssim_terms(x: Tensor, y: Tensor, window: SsimWindow, data_range: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean SSIM and mean contrast-structure term of each pair, over channels and uncropped windows, shape (b,)."""
    maps = torch.cat([x, y, x * x, y * y, x * y], 1)
    mean_x, mean_y, xx, yy, xy = F.conv2d(maps, _gaussian(window, x), groups=maps.shape[1]).chunk(5, 1)
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    variances = (xx - mean_x * mean_x).clamp_min(0) + (yy - mean_y * mean_y).clamp_min(0)
    contrast = (2 * (xy - mean_x * mean_y) + c2) / (variances + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    return (luminance * contrast).flatten(1).mean(1), contrast.flatten(1).mean(1)


def ms_ssim(x: Tensor, y: Tensor, *, window: SsimWindow, data_range: Literal["one", "pair"] = "one") -> Tensor:
    """Multi-scale SSIM of pairs: product over scales of relu(cs_s)^e, with the whole SSIM at the last scale.

    Windows that cross the border are left out; 2 x 2 average pooling between scales.

    Args:
        x: first of each pair, shape (b, c, h, w), in [0, 1].
        y: second of each pair, likewise.
        window: see `SsimWindow`.
        data_range: "one" for inputs in [0, 1]; "pair" measures max - min of the pair anew at each scale. The
            released code measures it over the whole batch, so that a score depends on its neighbours; ours never.

    Returns:
        Shape (b,), in [0, 1].
    """
    score = torch.ones(len(x), dtype=x.dtype, device=x.device)
    for scale in range(window.scales):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        extent: Tensor | float = 1.0
        if data_range == "pair":
            spans = [z.flatten(1).amax(1) - z.flatten(1).amin(1) for z in (x, y)]
            extent = torch.maximum(*spans).clamp_min(1e-12)[:, None, None, None]
        whole, contrast = _ssim_terms(x, y, window, extent)
        score = score * (whole if scale == window.scales - 1 else contrast).relu() ** window.exponent
    return score


def detection_noise(model: StableDiffusion, count: int, *, seed: int) -> Tensor:
    """Initial noise for a method's own use, shape (count, c, h, w); more noises leave the first ones as they are.

    The rows' seeds are drawn, so that they do not fall together with the small seeds that evaluations use.
    """
    generator = torch.Generator().manual_seed(seed)
    seeds = [int(torch.randint(2**32, (), generator=generator)) for _ in range(count)]
    return initial_noise(model, seeds)


@dataclass(frozen=True, slots=True)
class NoiseDifference:
    """Scaled noise differences and their similarity.

    Args:
        variant: "paper" scales a difference by its one minimum and maximum and uses the first timestep of the DDIM
            grid; "as_released" scales each channel by its own, uses the second timestep on the unchanged noise, and
            takes the SSIM's data range from the data (see `ms_ssim`).
        similarity: "paper" compares eps(y) - x_T; "prompt_difference" compares eps(y) - eps(""), which leaves out
            what no prompt changes: on small latents that part dominates the paper's difference. Costs two rows.
        steps: steps of the DDIM grid.
        window: settings of the SSIM; None takes `ssim_window` of the latent's size.
    """

    variant: Variant = "paper"
    similarity: Similarity = "paper"
    steps: int = 50
    window: SsimWindow | None = None

    def timestep(self, model: StableDiffusion) -> int:
        """The timestep at which the difference is taken."""
        return int(model.ddim(self.steps).timesteps[0 if self.variant == "paper" else 1])

    def settings(self, model: StableDiffusion) -> dict[str, Any]:
        """Everything that two scores must share to be comparable, JSON-able."""
        window = self.window or ssim_window(*model.latent_shape[1:])
        return {
            "variant": self.variant,
            "similarity": self.similarity,
            "steps": self.steps,
            "timestep": self.timestep(model),
            "window": asdict(window),
        }

    @torch.no_grad()
    def differences(self, model: StableDiffusion, noise: Tensor, embedding: Tensor) -> Tensor:
        """Scaled noise differences, one U-Net call; the null rows of "prompt_difference" come after the others.

        Args:
            model: the model, edits put on.
            noise: initial latents x_T, shape (b, c, h, w).
            embedding: prompt embeddings, shape (b, l, d).

        Returns:
            Shape (b, c, h, w), in [0, 1].
        """
        t = torch.full((len(noise),), self.timestep(model), device=noise.device)
        if self.similarity == "paper":
            return self.scaled(model.predict_noise(noise, t, embedding), noise)
        context = torch.cat([embedding, model.encode([""]).to(embedding).expand_as(embedding)])
        with_prompt, without = model.predict_noise(noise.repeat(2, 1, 1, 1), t.repeat(2), context).chunk(2)
        return self.scaled(with_prompt, without)

    def scaled(self, prediction: Tensor, other: Tensor) -> Tensor:
        """Min-max scaling of `prediction - other` to [0, 1], by row or by a row's channels; see `LEAST_SPAN`.

        Where nothing is heard all is 0, so that two silent differences have similarity 1: a network that answers
        nothing answers every noise alike.

        Raises:
            DoriError: a prediction is not finite.
        """
        delta, dims = prediction - other, (1, 2, 3) if self.variant == "paper" else (2, 3)
        if not torch.isfinite(delta).all():
            raise DoriError(
                "the U-Net predicted noise that is not finite, so noise differences cannot be compared; "
                "check the model's weights, and run it in float32 if it is in half precision"
            )
        low, high = delta.amin(dims, keepdim=True), delta.amax(dims, keepdim=True)
        share = max(LEAST_SPAN, 16 * torch.finfo(prediction.dtype).eps)
        heard = high - low > share * prediction.abs().amax((1, 2, 3), keepdim=True)
        return torch.where(heard, (delta - low) / (high - low).clamp_min(1e-12), 0)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Similarity of pairs of scaled differences (b, c, h, w), shape (b,), in [0, 1]; 1 = identical."""
        window = self.window or ssim_window(*x.shape[2:])
        return ms_ssim(x, y, window=window, data_range="one" if self.variant == "paper" else "pair")

    def between_noises(self, deltas: Tensor) -> Tensor:
        """For each noise the largest similarity with another noise; deltas (n, c, h, w), n >= 2, result (n,)."""
        first, second = torch.triu_indices(len(deltas), len(deltas), 1, device=deltas.device)
        table = deltas.new_zeros(len(deltas), len(deltas))
        table[first, second] = self(deltas[first], deltas[second])
        return torch.maximum(table.amax(0), table.amax(1))
