"""UCE: rewrite cross-attention keys and values in closed form, so that the prompt's tokens read like an anchor's.

Source: Gandikota et al., "Unified Concept Editing in Diffusion Models" (WACV 2024), field.md 6.4. For each key and
value projection W of cross-attention

    W' = (lambda W + sum alpha v* c^T + sum beta W p p^T) (lambda I + sum alpha c c^T + sum beta p p^T)^-1,   v* = W a,

the minimiser of alpha sum |W' c - W a|^2 + beta sum |W' p - W p|^2 + lambda |W' - W|^2: c token vectors to erase, a the
anchor's, p tokens to preserve. lambda .5, one vector a concept (its last word's token), under a second.

Traps: one token vector leaves every other position of the prompt as it was, and those carry the memory too
(`tokens="all"` rewrites each position towards the empty prompt's at the same place, and then all prompts that share the
begin-token vector would move, which is why that position is left out); no gradient ever sees the image.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dori.cost import Rows
from dori.erase.delta import CannotErase, WeightDelta, difference, making
from dori.erase.pairs import Forget, Pairs, Work
from dori.model.stable_diffusion import StableDiffusion


def closed_form(
    weight: Tensor,
    erase: Tensor,
    anchor: Tensor,
    preserve: Tensor,
    *,
    ridge: float,
    erase_scale: float,
    preserve_scale: float,
) -> Tensor:
    """W' of the module's formula, in float64.

    Args:
        weight: W, shape (o, d).
        erase: token vectors c, shape (k, d).
        anchor: token vectors a, shape (k, d).
        preserve: token vectors p, shape (m, d).
        ridge: lambda > 0.
        erase_scale: alpha.
        preserve_scale: beta.
    """
    w, c, a, p = (x.double() for x in (weight, erase, anchor, preserve))
    left = ridge * w + erase_scale * (w @ a.T) @ c + preserve_scale * (w @ p.T) @ p
    right = ridge * torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    right = right + erase_scale * c.T @ c + preserve_scale * p.T @ p
    return torch.linalg.solve(right, left, left=False)


def cross_projections(model: StableDiffusion) -> dict[str, nn.Linear]:
    """Key and value projections of all cross-attention layers, by name.

    Raises:
        CannotErase: the U-Net has none.
    """
    found = {
        name: module
        for name, module in model.unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v")) and isinstance(module, nn.Linear)
    }
    if not found:
        raise CannotErase(f"{model.name} has no cross-attention projections; UCE cannot act on it")
    return found


def last_word(model: StableDiffusion, texts: list[str]) -> Tensor:
    """Position of each text's last token before its end, shape (n,); 1 for an empty text."""
    lengths = [len(model.tokenizer(text).input_ids) for text in texts]
    return torch.tensor([max(1, length - 2) for length in lengths])


@dataclass(frozen=True, slots=True)
class Uce:
    """UCE for the prompts of memories, towards the empty prompt.

    Args:
        tokens: `last` word alone, as published, or `all` positions but the first.
        ridge: lambda.
        erase_scale: alpha.
        preserve_scale: sum of all beta over sum of all alpha / `erase_scale`. At a beta of 1 a few hundred preserved
            vectors, more than the embedding has dimensions, would leave every weight as it is.
        preserved: ordinary prompts whose tokens, at all positions, are preserved, at most.
    """

    needs_surrogates: ClassVar[bool] = False
    tokens: Literal["last", "all"] = "last"
    ridge: float = 0.5
    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    preserved: int = 256

    def rows(self, memories: int) -> Rows:
        """None."""
        return Rows()

    @torch.no_grad()
    def __call__(
        self, model: StableDiffusion, memories: Forget, retain: Pairs, *, seed: int, work: Work | None = None
    ) -> WeightDelta:
        """The edit; nothing is drawn at random, and no image is looked at.

        Raises:
            CannotErase: a memory has no text.
        """
        memories.need_texts("UCE")
        empty = model.encode([""]).cpu().double()[0]
        embeddings = memories.embeddings.double()
        keep = retain.embeddings[: self.preserved].double()
        if self.tokens == "last":
            rows = last_word(model, [text or "" for text in memories.texts])
            erase = embeddings[torch.arange(len(rows)), rows]
            anchor = empty[rows]
        else:
            erase = embeddings[:, 1:].flatten(0, 1)
            anchor = empty[1:].repeat(len(memories), 1)
        preserve = keep.flatten(0, 1)
        base, changed = {}, {}
        for name, layer in cross_projections(model).items():
            key = f"{name}.weight"
            base[key] = layer.weight.detach()
            changed[key] = closed_form(
                layer.weight,
                *(x.to(layer.weight.device) for x in (erase, anchor, preserve)),
                ridge=self.ridge,
                erase_scale=self.erase_scale,
                preserve_scale=self.preserve_scale * len(erase) / max(1, len(preserve)),
            )
        return difference("UCE", model, base, changed, making(self, seed=seed, rows=0, updates=0))
