"""A training of so many updates: its losses, its progress, and its state, from which a killed one goes on.

    course = Course(tuned, 200, work, made_from=origin(method, memories, retain, seed))
    for step in course:                 # from where a killed training was
        ...
        course.log.append(loss)

What a step draws must depend on its number alone; then the same call gives the same weights, killed or not.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from dori.erase.pairs import Forget, Pairs, Work
from dori.erase.tuning import Tuned
from dori.errors import DoriError
from dori.progress import duration
from dori.run import canonical_sha256, write_bytes
from dori.tensor_file import read_tensors

EVERY = 50  # updates between two stored states, and two lines of progress


@dataclass(slots=True)
class Course:
    """The steps of a training, as an iterator of their numbers.

    Args:
        tuned: the model in training.
        count: updates.
        work: checkpoint, processes, progress.
        made_from: all that the weights depend on (`origin`).
        log: losses or other figures, one a step, which the loop appends.
    """

    tuned: Tuned
    count: int
    work: Work
    made_from: str
    log: list[Any] = field(default_factory=list)
    _earlier: int = 0
    _began: int = 0

    def __iter__(self) -> Iterator[int]:
        """Step numbers from the first that is not done.

        Raises:
            DoriError: the checkpoint belongs to another training, or cannot be read.
        """
        self._began, first = self.tuned.model.rows, self._resume()
        began, path = time.monotonic(), self.work.checkpoint
        for step in range(first, self.count):
            yield step
            if (step + 1) % EVERY or step + 1 == self.count:
                continue
            if path is not None and self.work.processes.first:
                store_state(path, self.tuned, {"made_from": self.made_from, "rows": self.rows, "log": self.log})
            left = (time.monotonic() - began) * (self.count - step - 1) / (step + 1 - first)
            self.work.say(f"training: {step + 1} of {self.count} updates, about {duration(left)} left")

    @property
    def rows(self) -> int:
        """Latent rows that went through the U-Net so far, before a kill too."""
        return self._earlier + self.tuned.model.rows - self._began

    def _resume(self) -> int:
        self.work.processes.wait()
        if self.work.checkpoint is None or not self.work.checkpoint.exists():
            return 0
        header, _ = load_state(self.work.checkpoint, self.tuned, self.made_from)
        self.log[:], self._earlier = header["log"], header["rows"]
        return self.tuned.steps


def origin(method: object, memories: Forget, retain: Pairs, seed: int) -> str:
    """Names an erasure's settings and images; the weights that it began from are the caller's to tell apart."""
    return canonical_sha256(
        {
            "eraser": type(method).__name__,
            "method": method,
            "memories": memories.source,
            "retain": retain.source,
            "seed": seed,
        }
    )


def store_state(
    path: Path, tuned: Tuned, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a training's state, with further JSON-able figures and tensors, atomically."""
    every = {f"state.{name}": value.cpu().contiguous() for name, value in tuned.state().items()}
    every |= {name: value.contiguous() for name, value in (tensors or {}).items()}
    write_bytes(path, save(every, metadata={"erasure": json.dumps(header)}))


def load_state(path: Path, tuned: Tuned, made_from: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put a stored state on; returns the figures and all tensors of the file.

    Raises:
        DoriError: the state belongs to another erasure, or the file is damaged.
    """
    texts, tensors = read_tensors(path, what="the state of an erasure", mend="delete it to begin anew")
    header = json.loads(texts.get("erasure", "{}"))
    if header.get("made_from") != made_from:
        raise DoriError(
            f"the state {path} belongs to an erasure with other settings, images or weights; delete it to "
            "begin anew, or name another folder"
        )
    tuned.restore({key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")})
    return header, tensors
