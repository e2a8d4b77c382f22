"""Several processes that train one network: each takes its share of a step's windows.

Data parallel, by the accelerate library (`accelerate launch`), in the processors' memory (gloo). Every process holds
the whole model and all of Adam's state; gradients are averaged before each step, so all take the same one. One process
needs no library and pays nothing.

The loss is a function of means over the step's tokens, log(mean KL) and max(0, mean bits - target), so the mean of the
processes' own losses would be another one. `level` gives a process's figures the mean over all processes as a value and
leaves the gradient to its own part: with m = (m_1 + .. + m_N) / N, process i computes f'(m) grad m_i, and the mean of
these over the processes is f'(m) grad m, the gradient of f(m). Terms that are means of tokens need nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from lowtide.errors import LowtideError

PATIENCE = timedelta(days=1)
"""How long a process waits for the others: the first may have a model to compress meanwhile."""


class Parallel:
    """This process and the others; by default there are none. `rank` counts from 0, `world` is their number."""

    rank = 0
    world = 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` things in a row this process takes; `count` must be a multiple of `world`."""
        part = count // self.world
        return slice(self.rank * part, (self.rank + 1) * part)

    def reduce_mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over all processes, the same bytes in each; without a gradient."""
        return tensor

    def first(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first process's tensor; the others give one of its shape and dtype."""
        return tensor

    def wait(self) -> None:
        """Go on when all processes are here."""

    def level(self, part: torch.Tensor) -> torch.Tensor:
        """`part` shifted so that its mean is that over all processes; its gradient stays (see the module's text)."""
        if self.world == 1:
            return part
        own = part.detach().mean()
        return part + (self.reduce_mean(own) - own)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over all processes."""
        if self.world > 1:
            for p in parameters:
                if p.grad is not None:
                    p.grad = self.reduce_mean(p.grad)


class _Accelerated(Parallel):
    """By way of the accelerate library."""

    def __init__(self) -> None:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        # What is trained lies in the processor's memory, on a machine with a GPU as well.
        self._accelerator: Any = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes

    def reduce_mean(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._accelerator.reduce(tensor, "mean")

    def first(self, tensor: torch.Tensor) -> torch.Tensor:
        from accelerate.utils import broadcast

        return broadcast(tensor.clone(), 0)

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def join(windows: int) -> Parallel:
    """The processes that a launcher started (it sets WORLD_SIZE); this one alone if there was none.

    Raises:
        LowtideError: accelerate is missing, or a step's windows cannot be shared out evenly.
    """
    count = os.environ.get("WORLD_SIZE", "")
    if not count.isdigit() or int(count) < 2:
        return Parallel()
    if windows % int(count):
        raise LowtideError(f"--windows {windows}: must be a multiple of the {count} processes")
    try:
        return _Accelerated()
    except ModuleNotFoundError as error:
        if error.name != "accelerate":
            raise
        raise LowtideError(
            f"WORLD_SIZE is {count}: several processes need accelerate: pip install 'lowtide[learn]'"
        ) from None
