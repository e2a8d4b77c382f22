"""Ascending numbers in few bits (Elias 1974, Fano 1971): log2(range / count) + 2 bits each, about."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError

I64 = NDArray[np.int64]


def low_bits(count: int, limit: int) -> int:
    """Bits of each number that are stored as they are."""
    return max(0, (limit // count).bit_length() - 1) if count else 0


def encode(numbers: I64, limit: int) -> bytes:
    """Strictly ascending numbers from 0 to limit - 1."""
    low = low_bits(len(numbers), limit)
    lower = ((numbers[:, None] >> np.arange(low)) & 1).astype(np.uint8)
    upper = np.zeros(len(numbers) + (limit >> low) + 1, np.uint8)
    upper[(numbers >> low) + np.arange(len(numbers))] = 1
    return np.packbits(np.concatenate([lower.ravel(), upper]), bitorder="little").tobytes()


def encoded_bytes(count: int, limit: int) -> int:
    """Length of what `encode` returns."""
    low = low_bits(count, limit)
    return -(-(count * low + count + (limit >> low) + 1) // 8)


def decode(data: bytes, count: int, limit: int, where: str) -> I64:
    """The numbers, i64 [count].

    Raises:
        LowtideError: not what `encode` could have made.
    """
    low = low_bits(count, limit)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    lower = bits[: count * low].reshape(count, low).astype(np.int64) @ (1 << np.arange(low, dtype=np.int64))
    end = count * low + count + (limit >> low) + 1
    ones = np.flatnonzero(bits[count * low : end])
    if len(data) != encoded_bytes(count, limit) or len(ones) != count or bits[end:].any():
        raise LowtideError(f"{where}: its list of corrections is damaged; make the file again")
    numbers: I64 = ((ones - np.arange(count)) << low) | lower
    if count and (np.any(numbers[1:] <= numbers[:-1]) or numbers[-1] >= limit):
        raise LowtideError(f"{where}: its list of corrections is not in order; make the file again")
    return numbers
