"""The relapse: where the weights go when somebody teaches the memories again, sought anew as triggers are.

A trigger attacks through the prompt embedding, relearning through the weights. What fine-tuning against triggers does
to the first it need not do to the second: an image that no embedding reaches may be a few updates away. The relapse is
that attack in training: from the weights as they are the memories are learned for some updates, theta + delta is kept
apart, and the loss is asked there while the step is taken on theta (first order: delta counts as a constant). Not from
the paper; erasing language models against one normalized step of this kind: sharpness-aware unlearning (2502.05374).
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from dori.cost import Rows
from dori.erase.delta import CannotErase
from dori.erase.pairs import Forget, denoising_losses, memory_batch, step_generator
from dori.erase.tuning import Part, Tuned, begun, chosen
from dori.sampling import named_seed


@dataclass(frozen=True, slots=True)
class Relapse:
    """How the memories are learned again.

    Args:
        steps: updates of each relapse, without clip and decay; 0 leaves the weights where they are.
        every: updates of the erasure for which one relapse serves, >= 1; a new round always begins with a new one.
        rate: its learning rate in multiples of the erasure's.
        part: what moves: all weights that the erasure moves, which "full" stands for, or those of another part among
            them. A LoRA begins anew in every relapse; an erasure that moves one itself changes its attention weights.
    """

    steps: int = 10
    every: int = 10
    rate: float = 2.5
    part: Part = "full"

    def rows(self, updates: int, batch: int) -> Rows:
        """U-Net rows of the relapses beside so many updates of one round."""
        return Rows(trained=-(-updates // self.every) * self.steps * batch)

    def __call__(self, tuned: Tuned, memories: Forget, rows: int, *, seed: int, step: int) -> dict[str, Tensor]:
        """How far each weight that moves would go, from the weights as they are, which stay.

        Args:
            tuned: the model in training.
            memories: what is learned again, from its prompts; one without a text from the empty prompt, from which
                the proof relearns it too.
            rows: memories in each update.
            seed: of noises and timesteps.
            step: the erasure's, which names their stream.

        Raises:
            CannotErase: it diverged, or the erasure moves none of its part.
        """
        moving = set(chosen(tuned.model, self.part))
        before = {name: weight.detach() for name, weight in tuned.weights.items() if name in moving}
        if not before:
            raise CannotErase(
                f"the erasure moves the part {tuned.tuner.part!r} of the U-Net, in which no relapse of the part "
                f'{self.part!r} lies; erase with part "full"'
            )
        after = {name: weight.clone() for name, weight in before.items()}  # `showing` leaves the numbers of `before`
        rate = self.rate * tuned.tuner.learning_rate
        tuner = replace(tuned.tuner, part=self.part, learning_rate=rate, weight_decay=0.0, clip=math.inf, ema_decay=0.0)
        with tuned.showing(after):
            own = begun(tuned.model, tuner, before, seed=named_seed("relapse", seed, step), processes=tuned.processes)
            for number in range(self.steps):
                generator = step_generator("relapse", seed, step * self.steps + number)
                batch = memory_batch(tuned.model, memories, rows, generator)
                gradient, _ = own.gradient(denoising_losses(tuned.model, batch), rows)
                own.update(gradient)
        return {name: after[name] - weight for name, weight in before.items()}
