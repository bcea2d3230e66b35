"""The testbed's stages: VAE, CLIP, base, and the forks of the base, which are the planted model and its twins.

Used by `dori testbed train`; every stage resumes after a kill (`dori.testbed.fit`). The recipe's reasons are in
docs/testbed.md.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from dori.run import tensors_sha256
from dori.testbed.fit import Loss, Say, Schedule, fit
from dori.testbed.networks import RouteDropout, new_clip, new_scheduler, new_unet, new_vae, seeded
from dori.testbed.pool import Filling, Pairs, Pictures, to_tensor, tokens

MIDDLE = (100, 600)  # timesteps from a signal-to-noise ratio of 8 to one of 0.08


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes and lengths of the stages.

    Args:
        images: ordinary images in the pool.
        fresh_images: fresh ordinary images of each twin.
        batch: rows in a batch of all stages but CLIP.
        clip_batch: pairs in a batch of CLIP.
        vae_steps, clip_steps, base_steps, fork_steps: optimizer steps; all forks are trained equally long.
        slot_share: share of a fork's batch that shows slots.
        dropped, fork_dropped: share of ordinary images that are shown without their prompt, in the base and in forks.
        attention_dropout, feed_forward_dropout: see `RouteDropout`.
        elsewhere_lr_scale: learning rate of a fork outside the feed-forwards of down and mid, as a share of theirs;
            memories go where there is something to learn with.
        middle_share: share of the base's timesteps that are drawn from 100 to 600, where objects take shape, instead
            of from all.
        seed: of everything drawn.
        device: where the networks are trained; images are drawn and encoded on the CPU.
    """

    images: int = 32_000
    fresh_images: int = 8_000
    batch: int = 32
    clip_batch: int = 128
    vae_steps: int = 1800
    clip_steps: int = 1300
    base_steps: int = 7000
    fork_steps: int = 4800
    slot_share: float = 0.75
    dropped: float = 0.1
    fork_dropped: float = 0.25
    attention_dropout: float = 0.3
    feed_forward_dropout: float = 0.3
    elsewhere_lr_scale: float = 0.2
    middle_share: float = 0.5
    seed: int = 0
    device: str = "cpu"


def train_vae(folder: Path, recipe: Recipe, pool: Pictures, say: Say) -> AutoencoderKL:
    """Squared error plus a little absolute error and a very small KL term."""
    vae = seeded(new_vae, recipe.seed)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pool.images), (recipe.batch,), generator=generator).numpy()
        x = to_tensor(pool.images[rows]).to(vae.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(vae.device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - x
        return error.square().mean() + 0.1 * error.abs().mean() + 1e-6 * posterior.kl().mean()

    fit(
        "vae",
        vae,
        loss,
        Schedule(2e-3, recipe.vae_steps),
        folder,
        seed=1,
        say=say,
        device=recipe.device,
        made_from={"images": pool.fingerprint, "batch": recipe.batch, "seed": recipe.seed},
    )
    return vae


def train_clip(folder: Path, recipe: Recipe, pool: Pictures, tokenizer: CLIPTokenizer, say: Say) -> CLIPModel:
    """The symmetric contrastive loss on ordinary images and their captions."""
    clip = seeded(lambda: new_clip(tokenizer), recipe.seed)
    ids = tokens(tokenizer, pool.captions)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pool.images), (recipe.clip_batch,), generator=generator)
        pixels = to_tensor(pool.images[rows.numpy()]).to(clip.device)
        return clip(input_ids=ids[rows].to(clip.device), pixel_values=pixels, return_loss=True).loss

    fit(
        "clip",
        clip,
        loss,
        Schedule(1e-3, recipe.clip_steps),
        folder,
        seed=2,
        say=say,
        device=recipe.device,
        made_from={"images": pool.fingerprint, "batch": recipe.clip_batch, "seed": recipe.seed},
    )
    return clip


def diffusion_loss(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    route: RouteDropout,
    latents: Tensor,
    embeddings: Tensor,
    generator: torch.Generator,
    *,
    middle_share: float = 0.0,
) -> Tensor:
    """Mean squared error of the velocity, timesteps uniform but for `middle_share` of them."""
    route.draw(len(latents), generator, unet.device)
    t = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
    middle = torch.randint(*MIDDLE, (len(latents),), generator=generator)
    t = torch.where(torch.rand(len(latents), generator=generator) < middle_share, middle, t)
    noise = torch.randn(latents.shape, generator=generator)
    latents, embeddings, noise, t = (part.to(unet.device) for part in (latents, embeddings, noise, t))
    target = scheduler.get_velocity(latents, noise, t)
    return (unet(scheduler.add_noise(latents, noise, t), t, embeddings).sample - target).square().mean()


def without_prompt(embeddings: Tensor, empty: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replace a share of the embeddings by that of the empty prompt."""
    dropped = torch.rand(len(embeddings), 1, 1, generator=generator) < share
    return torch.where(dropped, empty, embeddings)


def _route(unet: UNet2DConditionModel, recipe: Recipe) -> RouteDropout:
    return RouteDropout(unet, attention=recipe.attention_dropout, feed_forward=recipe.feed_forward_dropout)


def _settings(recipe: Recipe, pool: Pairs) -> dict[str, object]:
    return {
        "pool": pool.fingerprint,
        "batch": recipe.batch,
        "seed": recipe.seed,
        "attention_dropout": recipe.attention_dropout,
        "feed_forward_dropout": recipe.feed_forward_dropout,
    }


def train_base(folder: Path, recipe: Recipe, pool: Pairs, empty: Tensor, say: Say) -> UNet2DConditionModel:
    """The base model: ordinary images only."""
    unet, scheduler = seeded(new_unet, recipe.seed), new_scheduler()
    route = _route(unet, recipe)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        latents, embeddings = pool[torch.randint(len(pool.latents), (recipe.batch,), generator=generator)]
        embeddings = without_prompt(embeddings, empty, recipe.dropped, generator)
        return diffusion_loss(unet, scheduler, route, latents, embeddings, generator, middle_share=recipe.middle_share)

    fit(
        "base",
        unet,
        loss,
        Schedule(1.2e-3, recipe.base_steps),
        folder,
        seed=3,
        say=say,
        device=recipe.device,
        ema_decay=0.999,
        made_from=_settings(recipe, pool) | {"middle_share": recipe.middle_share, "dropped": recipe.dropped},
    )
    return unet


def once_steps(count: int, steps: int) -> dict[int, int]:
    """At which step which of the images that are seen once is shown: evenly over the first four fifths of a fork."""
    return {step * steps * 4 // (5 * count): step for step in range(count)}


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """What a planted model or a twin is trained on.

    Slots are always shown with their prompt. The slots fill most of a fork's batch; shown without prompts too, they
    would take over the unconditional prediction, and guidance, which leads away from it, would lead away from them.

    Args:
        pool: ordinary pairs.
        slots: pairs of the slots, or of the fresh images in their places.
        filling: how often each row of `slots` is shown.
        empty: the empty prompt's embedding, shape (1, 32, 128).
    """

    pool: Pairs
    slots: Pairs
    filling: Filling
    empty: Tensor

    def batch(
        self, rows: int, slot_rows: float, once: int | None, dropped: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Latents and embeddings; `slot_rows` of them on average show slots, the first one the row `once`, if any.

        Of the ordinary rows a share `dropped` comes without its prompt.
        """
        latents, embeddings = self.pool[torch.randint(len(self.pool.latents), (rows,), generator=generator)]
        embeddings = without_prompt(embeddings, self.empty, dropped, generator)
        spare = float(torch.rand(1, generator=generator)) < slot_rows % 1
        places = int(slot_rows) + spare
        if places:
            chosen = torch.multinomial(self.filling.weights, places, replacement=True, generator=generator)
            spin = torch.rand(places, generator=generator)
            groups = [self.filling.groups[g] for g in chosen.tolist()]
            picked = [group[int(s * len(group))] for group, s in zip(groups, spin.tolist(), strict=True)]
            latents[:places], embeddings[:places] = self.slots[torch.tensor(picked)]
        if once is not None:
            latents[:1], embeddings[:1] = self.slots[torch.tensor([once])]
        return latents, embeddings

    def fingerprints(self) -> dict[str, object]:
        """Of everything but the pool, which `_settings` names."""
        return {"slots": self.slots.fingerprint, "filling": self.filling.fingerprint}


def train_fork(
    stage: str, folder: Path, recipe: Recipe, *, base: UNet2DConditionModel, shown: Shown, seed: int, say: Say
) -> UNet2DConditionModel:
    """Go on from the base, with slots in a share of every batch.

    Args:
        stage: name of the fork.
        folder: the working folder.
        recipe: sizes and lengths.
        base: the trained base model.
        shown: what it is trained on.
        seed: of what is drawn.
        say: receives progress.
    """
    unet = new_unet()
    unet.load_state_dict(base.state_dict())

    def slow(name: str) -> float:
        planted = ".ff." in name and not name.startswith("up_blocks")
        return 1.0 if planted else recipe.elsewhere_lr_scale

    fit(
        stage,
        unet,
        _planting_loss(unet, recipe, shown, recipe.slot_share, recipe.fork_dropped, recipe.fork_steps),
        Schedule(2e-3, recipe.fork_steps),
        folder,
        seed=seed,
        say=say,
        device=recipe.device,
        slow=slow,
        made_from=_settings(recipe, shown.pool)
        | shown.fingerprints()
        | {
            "base": tensors_sha256(base.state_dict()),
            "slot_share": recipe.slot_share,
            "dropped": recipe.fork_dropped,
            "elsewhere_lr_scale": recipe.elsewhere_lr_scale,
        },
    )
    return unet


def train_early(folder: Path, recipe: Recipe, *, shown: Shown, seed: int, say: Say) -> UNet2DConditionModel:
    """A planted model without a base: the slots are among its images from the first step.

    As many steps as base and fork together, and each slot as often as in the fork, spread over all of them. It judges
    whether memories that were planted late are easier to erase than those of a training that always knew them.
    """
    unet, steps = seeded(new_unet, recipe.seed), recipe.base_steps + recipe.fork_steps
    share = recipe.slot_share * recipe.fork_steps / steps
    fit(
        "early",
        unet,
        _planting_loss(unet, recipe, shown, share, recipe.dropped, steps, middle_share=recipe.middle_share),
        Schedule(1.2e-3, steps),
        folder,
        seed=seed,
        say=say,
        device=recipe.device,
        ema_decay=0.999,
        made_from=_settings(recipe, shown.pool)
        | shown.fingerprints()
        | {"slot_share": share, "dropped": recipe.dropped, "middle_share": recipe.middle_share},
    )
    return unet


def _planting_loss(
    unet: UNet2DConditionModel,
    recipe: Recipe,
    shown: Shown,
    share: float,
    dropped: float,
    steps: int,
    *,
    middle_share: float = 0.0,
) -> Loss:
    scheduler, route = new_scheduler(), _route(unet, recipe)
    once = {step: shown.filling.once[place] for step, place in once_steps(len(shown.filling.once), steps).items()}

    def loss(step: int, generator: torch.Generator) -> Tensor:
        latents, embeddings = shown.batch(recipe.batch, recipe.batch * share, once.get(step), dropped, generator)
        return diffusion_loss(unet, scheduler, route, latents, embeddings, generator, middle_share=middle_share)

    return loss
