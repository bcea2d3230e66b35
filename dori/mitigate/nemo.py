"""NeMo: the few cross-attention value neurons without which a memorized prompt no longer draws its image.

Source: "Finding NeMo" (Hintersdorf et al., NeurIPS 2024), section 3 and Algorithms 1 to 3, and its code; methods.md 2.
Two stages: `Nemo.calibrate` measures activations and the threshold on ordinary prompts of this very model (a score's
threshold is worth nothing on another model); the call then finds one memory's neurons, as a mask of whole rows of
`attn2.to_v.weight` in the down and mid blocks. Candidates are judged by forward hooks, many in one U-Net call.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dori.edit import WeightMask
from dori.errors import DoriError
from dori.mitigate.noise_difference import NoiseDifference, Similarity, SsimWindow, Variant, detection_noise
from dori.model.hooks import hooked
from dori.model.stable_diffusion import DOWN_MID, Place, StableDiffusion

# A group without any effect leaves the score at tau_ref where the selection failed (tau_ref is then the score
# itself); the last bit of a differently batched call must not decide whether it is dropped.
ROUNDING = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class NeMoCalibration:
    """What ordinary prompts look like to NeMo on one model; statistics and threshold belong together.

    Args:
        mean, std: for each value layer the mean and unbiased standard deviation of its activations, shape (d_l,).
        scores: each prompt's largest similarity between noises, shape (n,).
        tau: threshold of memorization, mean + `Nemo.tau_stds` std of `scores`.
        details: the settings of the score, the number of prompts, the seed; JSON-able.
    """

    mean: Mapping[str, Tensor]
    std: Mapping[str, Tensor]
    scores: Tensor
    tau: float
    details: Mapping[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the details as one flat table, for storage as safetensors."""
        table = {f"mean.{name}": value for name, value in self.mean.items()}
        table |= {f"std.{name}": value for name, value in self.std.items()}
        return table | {"scores": self.scores, "tau": torch.tensor(self.tau, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], details: Mapping[str, Any]) -> "NeMoCalibration":
        """The calibration whose `tensors` and `details` were stored."""
        parts = {
            part: {
                name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")
            }
            for part in ("mean", "std")
        }
        return cls(parts["mean"], parts["std"], tensors["scores"], float(tensors["tau"]), details)


def value_activations(layers: Mapping[str, nn.Linear], embedding: Tensor) -> dict[str, Tensor]:
    """a_i^l(y), the mean over all tokens of |(y W_v^T)_i|, shape (b, d_l) for each layer; no U-Net call is needed."""
    parts = embedding.split(256)  # the values of many prompts are large, their means are not
    return {
        name: torch.cat(
            [F.linear(part.to(layer.weight.dtype), layer.weight).abs().mean(1).float().cpu() for part in parts]
        )
        for name, layer in layers.items()
    }


def _channels_kept(layers: Mapping[str, nn.Linear], kept: Tensor) -> AbstractContextManager[None]:
    """Multiply the layers' outputs, row by row, by the columns of `kept` (rows, neurons of all layers).

    The same as zeroing rows of the weight, but another set for each row of the batch. Later groups of rows (the
    unconditional ones) repeat the first.
    """
    own = kept.split([layer.out_features for layer in layers.values()], dim=1)
    columns = dict(zip(layers, own, strict=True))

    def scale(name: str, _inputs: Tensor, output: Tensor) -> Tensor:
        keep = columns[name]
        return output * keep.repeat(len(output) // len(keep), 1)[:, None].to(output)

    return hooked(layers, scale)


@dataclass(frozen=True, slots=True, eq=False)
class _Judge:
    """mem(S) = max over the kept noises n of similarity(delta_n, delta_n with S blocked)."""

    model: StableDiffusion
    layers: Mapping[str, nn.Linear]
    difference: NoiseDifference
    embedding: Tensor  # (1, l, d)
    noise: Tensor  # (n, c, h, w)
    unblocked: Tensor  # (n, c, h, w)
    rows_per_call: int

    @property
    def sets_per_call(self) -> int:
        """How many candidate sets one U-Net call judges."""
        return max(1, self.rows_per_call // len(self.noise))

    @torch.no_grad()
    def __call__(self, blocked: Tensor) -> list[float]:
        """Scores of candidate sets, boolean (m, neurons of all layers)."""
        n, scores = len(self.noise), []
        for sets in blocked.split(self.sets_per_call):
            m = len(sets)
            with _channels_kept(self.layers, (~sets).repeat_interleave(n, 0)):
                deltas = self.difference.differences(
                    self.model, self.noise.repeat(m, 1, 1, 1), self.embedding.expand(m * n, -1, -1)
                )
            similar = self.difference(self.unblocked.repeat(m, 1, 1, 1), deltas)
            scores += similar.view(m, n).amax(1).tolist()
        return scores


def _refine(judge: _Judge, blocked: Tensor, groups: Sequence[Tensor], tau_ref: float) -> Tensor:
    """Greedy and sequential: re-activate one group after another, drop it where the score stays below tau_ref.

    Whether a group is dropped depends on those dropped before it. To judge many in one call, a batch bets that
    each outcome repeats the last one; results up to the first lost bet, that one included, are those of the
    sequential algorithm, the others are thrown away. Won bets double the batch.
    """
    position, ahead, bet = 0, 1, True
    while position < len(groups):
        batch = groups[position : position + ahead]
        candidates, base = [], blocked
        for group in batch:
            candidate = base & ~group
            candidates.append(candidate)
            base = candidate if bet else base
        dropped = [score < tau_ref - ROUNDING for score in judge(torch.stack(candidates))]
        accepted = next((i for i, outcome in enumerate(dropped) if outcome != bet), len(batch) - 1) + 1
        lost = dropped[accepted - 1] != bet
        for group, outcome in zip(batch[:accepted], dropped[:accepted], strict=True):
            blocked = blocked & ~group if outcome else blocked
        position += accepted
        ahead = 1 if lost else min(2 * ahead, judge.sets_per_call)
        bet = bet != lost
    return blocked


@dataclass(frozen=True, slots=True)
class Nemo:
    """Find the memorization neurons of one prompt embedding; the defaults are the paper's.

    Differs from the released code in: sets instead of index lists that may name a neuron twice; activations in
    float32 from the embedding, as in its statistics; no half precision; the data range of `ms_ssim`.

    Args:
        theta_start: first threshold of |a - mean| / std for the initial selection.
        theta_min: the selection gives up when the threshold has sunk to this value, which is not itself tried.
        theta_step: how far the threshold sinks after each failure, while one more neuron of each layer with the
            largest activations joins.
        tau_stds: the threshold tau lies so many standard deviations above the mean score of ordinary prompts. The
            paper also tries -1 and 2 (its tau .288 and .498); a lower one asks the search to hide more.
        noises: number of initial noises.
        ddim_steps: steps of the DDIM grid whose first timestep the score uses.
        variant, similarity, window: see `NoiseDifference`.
        max_refinement_passes: candidate sets that refinement may judge, counted as the sequential algorithm counts
            them; the paper has no such cap. What is left unjudged stays blocked.
        places: blocks whose value layers are searched.
        rows_per_call: upper bound on the rows of one U-Net call ("prompt_difference" doubles it).
    """

    theta_start: float = 5.0
    theta_min: float = 1.0
    theta_step: float = 0.25
    tau_stds: float = 1.0
    noises: int = 10
    ddim_steps: int = 50
    variant: Variant = "paper"
    similarity: Similarity = "paper"
    window: SsimWindow | None = None
    max_refinement_passes: int = 1000
    places: tuple[Place, ...] = DOWN_MID
    rows_per_call: int = 128

    def calibrate(self, model: StableDiffusion, embeddings: Tensor, *, seed: int) -> NeMoCalibration:
        """Activation statistics and the threshold tau from ordinary, never memorized prompts.

        Args:
            model: the model.
            embeddings: prompt embeddings, shape (n, l, d), n >= 2; every prompt meets the same noises.
            seed: of the initial noises.

        Raises:
            DoriError: fewer than two prompts or two noises.
        """
        if len(embeddings) < 2 or self.noises < 2:
            raise DoriError(
                f"NeMo's calibration got {len(embeddings)} prompts and {self.noises} noises; "
                "a spread needs at least two of each"
            )
        difference, embeddings = self._difference(), embeddings.to(model.device)
        noise = detection_noise(model, self.noises, seed=seed)
        scores: list[Tensor] = []
        for part in embeddings.split(max(1, self.rows_per_call // self.noises)):
            deltas = difference.differences(
                model, noise.repeat(len(part), 1, 1, 1), part.repeat_interleave(self.noises, 0)
            )
            scores += [difference.between_noises(own).amax().cpu() for own in deltas.split(self.noises)]
        activations = value_activations(model.layers("attention_value", self.places), embeddings)
        stacked = torch.stack(scores)
        return NeMoCalibration(
            {name: a.mean(0) for name, a in activations.items()},
            {name: a.std(0) for name, a in activations.items()},
            stacked,
            float(stacked.double().mean() + self.tau_stds * stacked.double().std()),
            {"score": self._score_settings(model), "tau_stds": self.tau_stds, "prompts": len(embeddings), "seed": seed},
        )

    def __call__(
        self, model: StableDiffusion, embedding: Tensor, calibration: NeMoCalibration, *, seed: int
    ) -> WeightMask:
        """The mask of one memory's neurons; all False where the prompt is not taken for memorized.

        `details` hold: neurons of each layer; tau, tau_ref (the refinement's threshold) and theta; ceiling (largest
        similarity between noises with nothing blocked; a noise with itself has 1) and floor (everything blocked);
        score_before (= ceiling), score_selected and score_after; flagged (ceiling > tau); localized (flagged, and
        floor <= tau: otherwise no set of these neurons can be shown to hide the image); suppressed (score_after <=
        tau); converged (the cap was not hit); candidates judged and U-Net rows.

        Args:
            model: the model.
            embedding: prompt embedding, shape (1, l, d), of a prompt or any other.
            calibration: of this model under the same settings.
            seed: of the initial noises.

        Raises:
            DoriError: the calibration was made under other settings or for other layers.
        """
        layers = model.layers("attention_value", self.places)
        self._check(model, calibration, layers)
        rows, difference, embedding = model.rows, self._difference(), embedding.to(model.device)
        noise = detection_noise(model, self.noises, seed=seed)
        deltas = difference.differences(model, noise, embedding.expand(self.noises, -1, -1))
        between = difference.between_noises(deltas)
        kept, ceiling = between > calibration.tau, float(between.max())
        details: dict[str, Any] = {
            "tau": calibration.tau,
            "ceiling": ceiling,
            "score_before": ceiling,
            "score_after": ceiling,
            "flagged": bool(kept.any()),
            "kept_noises": int(kept.sum()),
            "localized": False,
            "suppressed": False,
            "converged": True,
            "seed": seed,
            "score": self._score_settings(model),
        }
        blocked = torch.zeros(sum(layer.out_features for layer in layers.values()), dtype=torch.bool)
        if kept.any():
            judge = _Judge(model, layers, difference, embedding, noise[kept], deltas[kept], self.rows_per_call)
            activations = {name: a[0] for name, a in value_activations(layers, embedding).items()}
            blocked, found = self._search(judge, activations, calibration)
            details |= found
        chosen = dict(zip(layers, blocked.split([layer.out_features for layer in layers.values()]), strict=True))
        details |= {
            "neurons": {name: rows_.nonzero()[:, 0].tolist() for name, rows_ in chosen.items()},
            "rows": model.rows - rows,
        }
        masks = {f"{name}.weight": chosen[name][:, None].repeat(1, layer.in_features) for name, layer in layers.items()}
        return WeightMask("NeMo", masks, details)

    def _search(
        self, judge: _Judge, activations: Mapping[str, Tensor], calibration: NeMoCalibration
    ) -> tuple[Tensor, dict[str, Any]]:
        """Selection, then refinement layer by layer and neuron by neuron, from the last layer to the first."""
        tau = calibration.tau
        floor = judge(torch.ones(1, sum(len(a) for a in activations.values()), dtype=torch.bool))[0]
        blocked, found = self._select(judge, activations, calibration)
        tau_ref = found["tau_ref"]
        of_layer = torch.cat([torch.full((len(a),), i) for i, a in enumerate(activations.values())])
        groups = [blocked & (of_layer == i) for i in reversed(range(len(activations)))]
        groups = [group for group in groups if group.any()]
        groups = groups[: self.max_refinement_passes]
        coarse = _refine(judge, blocked, groups, tau_ref)
        left = coarse.nonzero()[:, 0].tolist()
        left.sort(key=lambda i: (-int(of_layer[i]), i))  # last layer first, ascending within
        affordable = left[: self.max_refinement_passes - len(groups)]
        one_each = [F.one_hot(torch.tensor(i), len(coarse)).bool() for i in affordable]
        fine = _refine(judge, coarse, one_each, tau_ref)
        after = judge(fine[None])[0]
        return fine, found | {
            "floor": floor,
            "localized": floor <= tau,
            "score_after": after,
            "suppressed": after <= tau,
            "converged": len(affordable) == len(left),
            "judged": len(groups) + len(one_each),
        }

    def _select(
        self, judge: _Judge, activations: Mapping[str, Tensor], calibration: NeMoCalibration
    ) -> tuple[Tensor, dict[str, Any]]:
        """The initial set: outlying neurons and the k most active of each layer, until the score is <= tau."""
        theta, k = self.theta_start, 0
        while True:
            parts = []
            for name, a in activations.items():
                # |a - mean| > theta std rather than a quotient: a neuron that never varies may have std 0.
                part = (a - calibration.mean[name]).abs() > theta * calibration.std[name]
                part[a.topk(min(k, len(a))).indices] = True
                parts.append(part)
            blocked = torch.cat(parts)
            score = judge(blocked[None])[0]
            lower = theta - self.theta_step
            if score <= calibration.tau or lower <= self.theta_min + 1e-9:
                tau_ref = calibration.tau if score <= calibration.tau else score
                return blocked, {
                    "theta": theta,
                    "k": k,
                    "tau_ref": tau_ref,
                    "score_selected": score,
                    "selected": int(blocked.sum()),
                }
            theta, k = lower, k + 1

    def _difference(self) -> NoiseDifference:
        return NoiseDifference(self.variant, self.similarity, self.ddim_steps, self.window)

    def _score_settings(self, model: StableDiffusion) -> dict[str, Any]:
        return self._difference().settings(model) | {"noises": self.noises}

    def _check(self, model: StableDiffusion, calibration: NeMoCalibration, layers: Mapping[str, nn.Linear]) -> None:
        wanted = {"score": self._score_settings(model), "tau_stds": self.tau_stds}
        given = {name: calibration.details.get(name) for name in wanted}
        if given != wanted:
            raise DoriError(
                f"NeMo's calibration was made with {given} and is used with {wanted}; "
                "calibrate again with these settings"
            )
        widths = {name: (layer.out_features,) for name, layer in layers.items()}
        if {name: tuple(mean.shape) for name, mean in calibration.mean.items()} != widths:
            raise DoriError(
                f"NeMo's calibration does not hold the value layers of {model.name}; "
                "calibrate on this model and these blocks"
            )
