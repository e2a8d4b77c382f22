"""The KV cache of the reference engine: float16, or int8 with a scale for each head and position."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


class CachedRows:
    """Keys or values of one layer.

    Attributes:
        data: f16 or i8 [positions, K, hd].
        scale: f32 [positions, K] for i8, None for f16.
    """

    def __init__(self, kv_heads: int, head_dim: int, bits: int) -> None:
        """bits: 16 or 8."""
        self.data: NDArray[Any] = np.empty((0, kv_heads, head_dim), np.float16 if bits == 16 else np.int8)
        self.scale: F32 | None = None if bits == 16 else np.empty((0, kv_heads), np.float32)

    def __len__(self) -> int:
        return len(self.data)

    def store(self, pos: int, new: F32) -> None:
        """Put f32 [n, K, hd] at position pos and drop what lay behind it; rounds to nearest, ties to even."""
        if self.scale is None:
            self.data = np.concatenate([self.data[:pos], new.astype(np.float16)])
            return
        m = np.abs(new).max(axis=-1)
        with np.errstate(divide="ignore"):
            inverse = np.where(m > 0, np.float32(127) / m, np.float32(0))
        self.data = np.concatenate([self.data[:pos], np.rint(new * inverse[..., None]).astype(np.int8)])
        self.scale = np.concatenate([self.scale[:pos], m / np.float32(127)])
