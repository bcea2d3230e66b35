"""The testbed: a small Stable-Diffusion-shaped model whose memorized images are known.

The checkpoints' names stand here, where the command line finds them without importing what trains or opens them.
"""

from typing import Literal, get_args

Checkpoint = Literal["base", "planted", "twin-1", "twin-2", "early"]
CHECKPOINTS: tuple[Checkpoint, ...] = get_args(Checkpoint)
