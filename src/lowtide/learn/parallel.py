"""Several processes that train one network: each takes its share of a step's windows.

By the accelerate library (`accelerate launch`), in the processors' memory (gloo). Data parallel, every process holds
the whole model and all of Adam's state, and gradients are averaged before each step, so all take the same one. Sharded
(`--use_fsdp --fsdp_version 2`), a process holds its part of the weights (`lowtide.learn.sharded`). One process needs no
library and pays nothing.

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
from lowtide.learn.shards import is_sharded

PATIENCE = timedelta(days=1)
"""How long a process waits for the others: the first may have a model to compress meanwhile."""

ON = ("true", "1", "yes", "y", "on", "t")
"""How accelerate writes yes in the environment."""
_OFF = ("false", "0", "no", "n", "off", "f")
_KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "FSDP_SHARDING_STRATEGY": ("--fsdp_sharding_strategy", ("full_shard", "1")),
    "FSDP_RESHARD_AFTER_FORWARD": ("--fsdp_reshard_after_forward", (*ON, *_OFF)),
    "FSDP_OFFLOAD_PARAMS": ("--fsdp_offload_params", _OFF),
    "FSDP_AUTO_WRAP_POLICY": ("--fsdp_auto_wrap_policy", ("transformer_based_wrap",)),
    "FSDP_FORWARD_PREFETCH": ("--fsdp_forward_prefetch", _OFF),
    "FSDP_ACTIVATION_CHECKPOINTING": ("--fsdp_activation_checkpointing", _OFF),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("--fsdp_activation_checkpointing_offload", _OFF),
    "FSDP_IGNORED_MODULES": ("fsdp_ignored_modules", ("",)),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("--use_parallelism_config", _OFF),
}
"""What accelerate hands on in the environment: the option it comes from, and values that can be had, in small letters.
Options that only concern accelerate's own loading, saving and wrapping are not looked at."""


class Parallel:
    """This process and the others; by default there are none. `rank` counts from 0, `world` is their number.

    mesh: the processes among which weights are shared out, None if each holds all; free: whether gathered weights are
    freed between the passes.
    """

    rank = 0
    world = 1
    mesh: Any = None
    free = True

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
        """Replace every gradient by its mean over all processes. Those of sharded weights are that already."""
        if self.world > 1:
            for p in parameters:
                if p.grad is not None and not is_sharded(p):
                    p.grad = self.reduce_mean(p.grad)


class _Accelerated(Parallel):
    """By way of the accelerate library."""

    def __init__(self, sharded: bool) -> None:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        # What is trained lies in the processor's memory, on a machine with a GPU as well.
        self._accelerator: Any = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        if sharded:
            from torch.distributed.device_mesh import init_device_mesh

            # accelerate's prepare() shards on accelerators only and wants the whole model first, so it only tells how.
            self.mesh = init_device_mesh("cpu", (self.world,))
            self.free = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ON

    def reduce_mean(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._accelerator.reduce(tensor, "mean")

    def first(self, tensor: torch.Tensor) -> torch.Tensor:
        from accelerate.utils import broadcast

        return broadcast(tensor.clone(), 0)

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def join(windows: int, weights: bool = True) -> Parallel:
    """The processes that a launcher started (it sets WORLD_SIZE); this one alone if there was none.

    Args:
        windows: of a step.
        weights: whether there are weights under training, which could be sharded.

    Raises:
        LowtideError: accelerate is missing, a step's windows cannot be shared out evenly, or sharding is asked for in a
            way that is not known here.
    """
    count = os.environ.get("WORLD_SIZE", "")
    if not count.isdigit() or int(count) < 2:
        return Parallel()
    if windows % int(count):
        raise LowtideError(f"--windows {windows}: must be a multiple of the {count} processes")
    sharded = _sharding_asked(weights)
    try:
        return _Accelerated(sharded)
    except ModuleNotFoundError as error:
        if error.name != "accelerate":
            raise
        raise LowtideError(
            f"WORLD_SIZE is {count}: several processes need accelerate: pip install 'lowtide[learn]'"
        ) from None


def _sharding_asked(weights: bool) -> bool:
    """Whether `accelerate launch --use_fsdp` started this process; LowtideError for options that cannot be had."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ON:
        return False
    if not weights:
        raise LowtideError("--use_fsdp: there are no weights under training to shard; launch with --multi_gpu")
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise LowtideError(f"FSDP version {version}: weights are sharded by FSDP2 only; launch with --fsdp_version 2")
    for name, (option, known) in _KNOWN.items():
        value = os.environ.get(name)
        if value is not None and value.lower() not in known:
            raise LowtideError(f"{option} {value}: is not supported; leave it out")
    return True
