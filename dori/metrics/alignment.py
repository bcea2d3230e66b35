"""A_CLIP: does an image show what its prompt says (methods.md 6.2: CLIP cosine, higher = better)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, PreTrainedTokenizerBase

from dori.errors import DoriError
from dori.metrics.similarity import cosine

Colour = tuple[float, float, float]
OPENAI_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD: Colour = (0.26862954, 0.26130258, 0.27577711)


@torch.no_grad()
def image_features(model: CLIPModel, images: Tensor, *, mean: Colour = OPENAI_MEAN, std: Colour = OPENAI_STD) -> Tensor:
    """CLIP image features, shape (n, p), float32, of images in [0, 1], shape (n, 3, H, W).

    Images are resized to the model's square (bicubic, antialiased; square generations lose nothing) and normalised.

    Args:
        model: any CLIP in transformers form, in evaluation mode.
        images: the images.
        mean: colour mean with which the model was trained (the testbed's own: 0.5 each).
        std: colour standard deviation likewise (the testbed's own: 0.5 each).
    """
    side = model.config.vision_config.image_size
    found = []
    for part in images.split(64):
        pixels = functional.interpolate(part, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]
        found.append(model.get_image_features(pixel_values=pixels.to(model.device, model.dtype)).pooler_output.float())
    return torch.cat(found)


@torch.no_grad()
def alignment(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    images: Tensor,
    prompts: Sequence[str],
    *,
    mean: Colour = OPENAI_MEAN,
    std: Colour = OPENAI_STD,
) -> Tensor:
    """Cosine of image and text features, pair by pair. Not scaled by 100 or by the model's temperature.

    Prompts longer than the text tower reads are cut, as the published scores do.

    Args:
        model: any CLIP in transformers form, in evaluation mode.
        tokenizer: its tokenizer.
        images: in [0, 1], shape (n, 3, H, W).
        prompts: n prompts.
        mean: as in `image_features`.
        std: as in `image_features`.

    Returns:
        Shape (n,), in [-1, 1].

    Raises:
        DoriError: numbers of images and prompts differ.
    """
    if len(images) != len(prompts):
        raise DoriError(
            f"alignment pairs images with prompts, and there are {len(images)} and {len(prompts)}; "
            "repeat the prompt for each of its images"
        )
    # No attention mask: text is read causally and pooled at the end token, so padding after it changes nothing.
    ids = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        return_tensors="pt",
        max_length=model.config.text_config.max_position_embeddings,
    ).input_ids
    text_features = torch.cat(
        [model.get_text_features(input_ids=part.to(model.device)).pooler_output.float() for part in ids.split(64)]
    )
    return cosine(image_features(model, images, mean=mean, std=std), text_features)
