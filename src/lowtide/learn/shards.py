"""Tensors of which a process may hold a part: rows, where weights are sharded (`lowtide.learn.sharded`).

Nothing here imports torch.distributed: one process neither needs it nor waits for its import.
"""

from __future__ import annotations

from typing import Any

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of it only (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def own(tensor: torch.Tensor) -> torch.Tensor:
    """This process's rows, which share memory with the tensor; all of them if it is not sharded. No gradient."""
    held: Any = tensor.detach()
    found: torch.Tensor = held.to_local() if is_sharded(tensor) else held
    return found


def like(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A tensor sharded like `tensor` of which `rows` is this process's part."""
    found = torch.zeros_like(tensor.detach())
    own(found).copy_(rows)
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows, from every process that has some: all processes must ask. No gradient."""
    held: Any = tensor.detach()
    found: torch.Tensor = held.full_tensor() if is_sharded(tensor) else held
    return found


def rows_of(count: int, rank: int, world: int) -> range:
    """Which of `count` rows process `rank` of `world` holds: runs of equal length, the last ones shorter or empty."""
    part = -(-count // world)
    return range(min(rank * part, count), min((rank + 1) * part, count))
