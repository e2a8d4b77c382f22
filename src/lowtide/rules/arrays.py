"""The few array functions that numpy and torch spell differently, so that rules run on both.

Torch is never imported here: a tensor can only arrive if somebody else imported it.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any  # numpy.ndarray or torch.Tensor


def is_torch(x: Array) -> bool:
    """Whether x is a torch tensor."""
    return type(x).__module__.partition(".")[0] == "torch"


def namespace(x: Array) -> Any:
    """The module whose functions work on x: numpy or torch."""
    return sys.modules["torch"] if is_torch(x) else np


def like(values: Array, x: Array, dtype: str | None = None) -> Array:
    """`values` (array or sequence) as an array of x's kind, on x's device; dtype by name, x's own by default."""
    xp = namespace(x)
    kind = x.dtype if dtype is None else getattr(xp, dtype)
    if is_torch(x):
        return (
            values.to(x.device, kind)
            if is_torch(values)
            else xp.as_tensor(np.asarray(values), device=x.device).to(kind)
        )
    return np.asarray(values, dtype=kind)


def astype(x: Array, dtype: str) -> Array:
    """x converted to the dtype of that name."""
    return x.to(namespace(x).__dict__[dtype]) if is_torch(x) else x.astype(dtype)


def ranks(score: Array) -> Array:
    """Rank along the last axis, 0 for the highest score; of equal scores the lower index comes first."""
    if is_torch(score):
        order = score.sort(dim=-1, descending=True, stable=True).indices
        rank = namespace(score).empty_like(order)
        return rank.scatter_(-1, order, namespace(score).arange(order.shape[-1], device=order.device).expand_as(order))
    order = np.argsort(-score, axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape), axis=-1)
    return rank
