"""Twins, trained like the examined model, but without its memories, and the base that all came from. They only judge.

Whoever compares with a twin draws from one latent with both and subtracts one's weights from the other's, so a model
with which that means nothing is refused before anything is computed.
"""

from collections.abc import Sequence

import torch

from dori.errors import DoriError
from dori.model.load import load_model
from dori.model.stable_diffusion import StableDiffusion
from dori.run import tensors_sha256

MEND = "give --twin a model that was trained alike but for the memories"
MEND_BASE = "give --base the model from which it was trained"


def load_twins(
    model: StableDiffusion, specs: Sequence[str], *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[StableDiffusion, ...]:
    """Open the twins of a model, each named by its number and by what was given.

    Args:
        model: the examined model.
        specs: as `load_model` takes them.
        device: where the examined model lies.
        dtype: of its U-Net.

    Raises:
        DoriError: one cannot be opened, or cannot be compared.
    """
    twins = tuple(load_model(spec, device=device, dtype=dtype) for spec in specs)
    for number, twin in enumerate(twins, start=1):
        twin.name = f"twin {number} ({twin.name})"
    refuse_strangers(model, twins)
    return twins


def load_base(
    model: StableDiffusion, spec: str, twins: Sequence[StableDiffusion] = (), *, device: str = "cpu"
) -> StableDiffusion:
    """Open the model from which a model and its twins were trained.

    Args:
        model: the examined model.
        spec: as `load_model` takes it.
        twins: of the model, none of which may be the base.
        device: where the examined model lies.

    Raises:
        DoriError: it cannot be opened, or cannot be compared.
    """
    base = load_model(spec, device=device)
    base.name = f"base ({base.name})"
    refuse_strangers(model, [*twins, base], mend=MEND_BASE)
    return base


def refuse_strangers(model: StableDiffusion, twins: Sequence[StableDiffusion], *, mend: str = MEND) -> None:
    """Refuse a twin, or a base, that cannot be compared with the model, or that is no further model.

    Raises:
        DoriError: latents, embeddings or U-Net of another shape, another VAE, schedule or kind of prediction, or the
            weights of the model itself or of another twin.
    """
    if not twins:
        return
    vae, seen = _vae(model), {_unet(model): f"{model.name} itself"}
    for twin in twins:
        if (twin.latent_shape, twin.embedding_shape) != (model.latent_shape, model.embedding_shape):
            raise DoriError(f"{twin.name} has latents or embeddings of another shape than {model.name}; {mend}")
        if _shapes(twin) != _shapes(model):
            raise DoriError(f"{twin.name} has a U-Net of another shape than {model.name}; {mend}")
        if _vae(twin) != vae:
            raise DoriError(f"{twin.name} has another VAE than {model.name}, so that its latents differ; {mend}")
        if twin.prediction_type != model.prediction_type or not torch.equal(twin.alphas_cumprod, model.alphas_cumprod):
            raise DoriError(
                f"{twin.name} has another noise schedule or kind of prediction than {model.name}, so that its "
                f"trajectories differ; {mend}"
            )
        weights = _unet(twin)
        if weights in seen:
            raise DoriError(f"{twin.name} has the weights of {seen[weights]}; {mend}")
        seen[weights] = twin.name


def _shapes(model: StableDiffusion) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in model.unet.named_parameters()}


def _unet(model: StableDiffusion) -> str:
    return tensors_sha256(model.unet.state_dict())


def _vae(model: StableDiffusion) -> tuple[str, float]:
    return tensors_sha256(model.vae.state_dict()), float(model.vae.config.scaling_factor)
