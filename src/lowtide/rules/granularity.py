"""Masks at four granularities from scores of single weights.

A score matrix [..., out, in] (leading dimensions for tokens) is pooled over the parts of the granularity, compared
with a threshold, and spread back to one mask entry for each weight:

    weight   each weight by itself
    neuron   an output row
    channel  an input column
    block    a stripe of `rows` outputs times `channels` inputs; the last ones may be smaller
"""

from __future__ import annotations

import numpy as np

from lowtide.errors import LowtideError
from lowtide.rules.arrays import Array, is_torch, namespace

GRANULARITIES = ("weight", "neuron", "channel", "block")
POOLS = ("rms", "mean", "max")


def pool(scores: Array, granularity: str, block: tuple[int, int] = (16, 1), how: str = "rms") -> Array:
    """One score for each part: [..., out, in], [..., out, 1], [..., 1, in] or [..., row blocks, channel blocks].

    Args:
        scores: f32 [..., out, in], not negative.
        granularity: one of GRANULARITIES.
        block: rows and channels of a block.
        how: root mean square, mean or maximum over the weights of a part.

    Raises:
        LowtideError: unknown granularity or pooling, or a block without weights.
    """
    _check(granularity, block)
    if how not in POOLS:
        raise LowtideError(f"unknown pooling {how!r}: known are {', '.join(POOLS)}")
    out, channels = scores.shape[-2:]
    if granularity == "weight":
        return scores
    if granularity == "neuron":
        return _reduce(scores, channels, how)[..., None]
    if granularity == "channel":
        return _reduce(scores.swapaxes(-1, -2), out, how)[..., None, :]
    rows, cols = block
    xp = namespace(scores)
    stripes = []
    for r in range(0, out, rows):
        parts = [scores[..., r : r + rows, c : c + cols] for c in range(0, channels, cols)]
        flat = [p.reshape(*p.shape[:-2], p.shape[-2] * p.shape[-1]) for p in parts]
        stripes.append(xp.stack([_reduce(f, f.shape[-1], how) for f in flat], -1))
    return xp.stack(stripes, -2)


def spread(parts: Array, granularity: str, out: int, channels: int, block: tuple[int, int] = (16, 1)) -> Array:
    """The opposite of `pool`: the value of its part for each weight, [..., out, in], any dtype.

    Raises:
        LowtideError: unknown granularity.
    """
    _check(granularity, block)
    rows, cols = {"weight": (1, 1), "neuron": (1, channels), "channel": (out, 1), "block": block}[granularity]
    row = _index(parts, [i // rows for i in range(out)])
    col = _index(parts, [j // cols for j in range(channels)])
    return parts[..., row[:, None], col[None, :]]


def mask(
    scores: Array, threshold: float, granularity: str, block: tuple[int, int] = (16, 1), how: str = "rms"
) -> Array:
    """Boolean mask [..., out, in]: the weights whose part's pooled score is above the threshold."""
    out, channels = scores.shape[-2:]
    return spread(pool(scores, granularity, block, how) > threshold, granularity, out, channels, block)


def _check(granularity: str, block: tuple[int, int]) -> None:
    if granularity not in GRANULARITIES:
        raise LowtideError(f"unknown granularity {granularity!r}: known are {', '.join(GRANULARITIES)}")
    if min(block) < 1:
        raise LowtideError(f"block {block}: rows and channels must be at least 1")


def _reduce(x: Array, n: int, how: str) -> Array:
    """Pooled over the last axis, which has n entries."""
    if how == "max":
        return namespace(x).amax(x, -1)
    return ((x * x).sum(-1) / n) ** 0.5 if how == "rms" else x.sum(-1) / n


def _index(x: Array, values: list[int]) -> Array:
    return namespace(x).as_tensor(values, device=x.device) if is_torch(x) else np.array(values)
