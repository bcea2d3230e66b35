"""One process or several, by Accelerate's state: in a training all draw the same batch, and each works on its rows.

Started plainly, there is one process and nothing is exchanged; started by `torchrun` (or `accelerate launch`, which
starts several only where there are GPUs), gradients and triggers are summed over processes, so that the result does not
depend on their number (but for rounding). What is only measured is made of cells of one folder: each process makes
some, and the first one reads them all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

Item = TypeVar("Item")
PATIENCE = timedelta(days=30)  # the first process may draw for hours before others are needed


@dataclass(frozen=True, slots=True)
class Processes:
    """Which of how many processes this is.

    Args:
        index: from 0; process 0 writes the results.
        count: number of processes.
        local: index among those of this machine.
    """

    index: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes the results."""
        return self.index == 0

    def device(self, given: str) -> str:
        """Where this process works: each on a GPU of its own, unless one was named."""
        return f"cuda:{self.local}" if given == "cuda" and self.count > 1 else given

    def share(self, rows: int) -> Tensor:
        """Indices of this process's rows; the shares of all processes are disjoint and cover [0, rows)."""
        return torch.arange(rows)[self.index :: self.count]  # none where there are more processes than rows

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors summed over all processes."""
        if self.count == 1:
            return list(tensors)
        return [reduce(tensor.contiguous(), reduction="sum") for tensor in tensors]

    def of_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor in all: what was drawn or rounded otherwise must not lead them apart."""
        return tensor if self.count == 1 else self.sum([tensor if self.first else torch.zeros_like(tensor)])[0]

    def every(self, mine: Mapping[int, Tensor], count: int, *, like: Tensor) -> list[Tensor]:
        """The tensors 0 to `count` - 1, of which each process has its share, in all of them.

        Args:
            mine: number to tensor, shapes (k, ...), alike but for k.
            count: of all.
            like: an empty one, shape (0, ...), for a process that has none.
        """
        (lengths,) = self.sum([like.new_tensor([len(mine[row]) if row in mine else 0 for row in range(count)])])
        whole = like.new_zeros(count, int(lengths.max()), *like.shape[1:])
        for row, tensor in mine.items():
            whole[row, : len(tensor)] = tensor
        (whole,) = self.sum([whole])
        return [rows[: int(length)] for rows, length in zip(whole, lengths, strict=True)]

    def shares(self, costs: Mapping[str, int], *, beside: int) -> list[list[str]]:
        """What each process computes: the costliest goes to whoever has least so far; each in the given order.

        Args:
            costs: of every cell.
            beside: cost of what the first process computes alone, after its share.
        """
        loads, taken = [beside] + [0] * (self.count - 1), dict[str, int]()
        for key in sorted(costs, key=lambda key: -costs[key]):
            taken[key] = loads.index(min(loads))
            loads[taken[key]] += costs[key]
        return [[key for key in costs if taken[key] == index] for index in range(self.count)]

    def in_turn(self, costs: Mapping[str, int], *, beside: int) -> tuple[list[str], list[str]]:
        """This process's cells, and those with which it goes on then, where all read and write one folder.

        The first one goes on with the shares of the others, each from its end, so that none waits for another and only
        the cell at which they meet is made twice.
        """
        shares = self.shares(costs, beside=beside)
        others = shares[1:] if self.first else []
        return shares[self.index], [key for other in others for key in reversed(other)]

    def towards(self, items: Sequence[Item]) -> list[Item]:
        """The items in this process's order: the first one goes forward, all others back from the end of their part.

        So they meet, and where they meet what is there is not made again; whoever followed another in one direction
        would make anew all that the other one makes.
        """
        end = len(items) * (self.index + 1) // self.count
        return list(items) if self.first else list(reversed(items[:end]))

    def wait(self) -> None:
        """Return when every process is here."""
        if self.count > 1:
            PartialState().wait_for_everyone()


def started(*, device: str) -> Processes:
    """The processes as this command was started.

    Args:
        device: where the model lies; "cpu" keeps Accelerate off any GPU.
    """
    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes, max(0, state.local_process_index))
