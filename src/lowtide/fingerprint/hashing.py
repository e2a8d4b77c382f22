"""Keys to 64-bit hashes, and hashes to as many more random bits as are needed. Deterministic in the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError

U64 = NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd: steps of it visit all 64-bit numbers, evenly spread."""
_MASK = (1 << 64) - 1
MAX_INT_KEY = 1 << 62


def mix(x: U64) -> U64:
    """A bijection of u64 that leaves no pattern (the finaliser of SplitMix64: Steele, Lea and Flood 2014)."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix_int(x: int) -> int:
    """`mix` of one Python integer."""
    return int(mix(np.array([x & _MASK], np.uint64))[0])


def hash_ints(keys: NDArray[Any], seed: int) -> U64:
    """Integers [n] from 0 to below 2^62 to u64 [n]. Different keys have different hashes."""
    first, second = mix_int(seed), mix_int(seed + GOLDEN)
    return mix(mix(keys.astype(np.uint64) + np.uint64(first)) ^ np.uint64(second))


def hash_texts(texts: Sequence[str | bytes], seed: int) -> U64:
    """Texts, or their UTF-8 bytes, to u64 [n]: BLAKE2b keyed with the seed.

    Raises:
        LowtideError: one is not UTF-8 (or, as str, has no UTF-8 form).
    """
    key = (seed & _MASK).to_bytes(8, "little")
    blake = hashlib.blake2b
    digests = b"".join(blake(utf8(text), digest_size=8, key=key).digest() for text in texts)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def utf8(text: str | bytes) -> bytes:
    """A feature as UTF-8 bytes.

    Raises:
        LowtideError: bytes that are not UTF-8, a str with half a surrogate pair, or something else than text.
    """
    try:
        if isinstance(text, str):
            return text.encode("utf-8")
        if isinstance(text, (bytes, bytearray)):
            bytes(text).decode("utf-8")
            return bytes(text)
    except UnicodeError:
        raise LowtideError(f"feature {text!r:.60}: not UTF-8; decode or re-encode it first") from None
    raise LowtideError(f"feature {text!r:.60}: must be text, not {type(text).__name__}")


def fingerprints(hashes: U64) -> U64:
    """The bits that tell a key from a stranger, 64 for each hash; a fingerprint is the lowest few of them."""
    return mix(hashes ^ np.uint64(0xD6E8FEB86659FD93))


def parity(x: U64) -> NDArray[np.uint8]:
    """1 where the number of set bits is odd; u8 [n]."""
    if hasattr(np, "bitwise_count"):
        odd: NDArray[np.uint8] = np.bitwise_count(x) & np.uint8(1)
        return odd
    for shift in (32, 16, 8, 4, 2, 1):  # numpy before 2.0
        x = x ^ (x >> np.uint64(shift))
    return (x & np.uint64(1)).astype(np.uint8)


def trailing_zeros(x: U64) -> NDArray[np.int64]:
    """Zero bits below the lowest set bit of each number above 0; i64 [n]."""
    lowest = x & (~x + np.uint64(1))
    # a power of two is exact in float64, and so is its exponent
    return np.frexp(lowest.astype(np.float64))[1].astype(np.int64) - 1
