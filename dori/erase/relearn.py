"""Relearning: how many training steps on the image bring it back, against the same steps on an image never seen.

Source: field.md 8 and 12.2 (MemoRa, 2510.03263; here with all weights): a model from which an image was only hidden
learns it again faster than one that never had it. The claim "removed" survives only if both curves agree, in either
direction. One image at a time, and the model is restored after each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from dori.cost import Rows
from dori.erase.delta import CannotErase
from dori.erase.pairs import denoising_losses, noised, step_generator
from dori.erase.tuning import Tuner, tuning
from dori.model.stable_diffusion import StableDiffusion


@dataclass(frozen=True, slots=True)
class Relearning:
    """Fine-tuning on one image.

    Args:
        steps: updates at most.
        batch: pairs of noise and timestep in each.
        check_every: updates between two looks.
        tuner: how weights move.
    """

    steps: int = 60
    batch: int = 8
    check_every: int = 5
    tuner: Tuner = field(default_factory=lambda: Tuner(learning_rate=5e-5))

    @property
    def looks(self) -> int:
        """Looks at most, the one before any step included."""
        return 1 + -(-self.steps // self.check_every)

    def rows(self) -> Rows:
        """At most so many U-Net rows of training; the looks cost as much as they draw."""
        return Rows(trained=self.steps * self.batch)

    def __call__(
        self,
        model: StableDiffusion,
        latent: Tensor,
        embedding: Tensor,
        *,
        seed: int,
        look: Callable[[], tuple[float, ...]],
        enough: Callable[[tuple[float, ...]], bool],
    ) -> dict[int, tuple[float, ...]]:
        """Similarities before any step and at each look, until one is enough or the training diverges.

        Args:
            model: edits put on; left as it was.
            latent: the image, shape (c, h, w).
            embedding: its prompt, shape (l, d).
            seed: of noises and timesteps.
            look: generates from the prompt with the weights as they are and compares, one similarity a seed.
            enough: whether a look ends the training.

        Returns:
            Number of updates to similarities, ascending.
        """
        found = {0: look()}
        with tuning(model, self.tuner, seed=seed) as tuned:
            for step in range(1, self.steps + 1):
                if enough(found[max(found)]):
                    break
                shape = (self.batch, -1, -1, -1)
                batch = noised(
                    model,
                    latent.float().expand(*shape),
                    embedding.float().expand(*shape[:3]),
                    step_generator("relearning", seed, step),
                )
                try:
                    gradient, _ = tuned.gradient(denoising_losses(model, batch), len(batch))
                    tuned.update(gradient)
                except CannotErase:  # a ruined model: the image does not come back on it
                    break
                if step % self.check_every == 0 or step == self.steps:
                    found[step] = look()
        return found
