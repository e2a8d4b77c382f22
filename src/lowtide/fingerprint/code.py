"""How long a key's code is: a prefix code of the weight's index, then a fingerprint whose length goes by magnitude.

A stranger's bits are random, so it is taken for a key of weight k with probability 2^-(a_k + f_k), a_k being the bits
of k's index and f_k those of its fingerprint. With n_k keys of weight k and M strangers, the bits are
sum_k n_k (a_k + f_k) and the expected squared error is M sum_k e_k 2^-(a_k + f_k), e_k = w_k^2. The lengths that need
the fewest bits for a given error have equal slopes, n_k = lambda e_k 2^-(a_k + f_k), so

    a_k + f_k = log2(e_k / p_k) + c,   p_k = n_k / n,

and, a good index code having a_k = -log2 p_k, f_k = log2(w_k^2) + c: two bits more for each doubling of the weight
(US 10558738, 10970470). Rounding the sum, not f_k, is optimal for whole bits, too: the best length is the last whose
saving M e_k 2^-L / 2 is still worth lambda n_k, a floor of the formula with half a bit or so moved into c.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowtide.fingerprint.hashing import U64

MAX_INDEX_BITS = 24
MAX_FINGERPRINT = 32
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Code:
    """index_bits: u8 [K], a complete prefix code's lengths (0 if K is 1); fingerprint_bits: u8 [K]."""

    index_bits: U8
    fingerprint_bits: U8

    @property
    def total(self) -> I64:
        """Bits of a key of each weight; i64 [K]."""
        return self.index_bits.astype(np.int64) + self.fingerprint_bits

    def match_probability(self) -> F64:
        """Chance that a stranger is taken for a key of each weight; f64 [K]."""
        result: F64 = 0.5 ** self.total.astype(np.float64)
        return result

    def canonical(self) -> Canonical:
        """The prefix code itself."""
        order = np.lexsort((np.arange(len(self.index_bits)), self.index_bits)).astype(np.int64)
        counts = np.bincount(self.index_bits, minlength=MAX_INDEX_BITS + 1)
        first = np.zeros(MAX_INDEX_BITS + 1, np.int64)
        for bits in range(1, MAX_INDEX_BITS + 1):
            first[bits] = (first[bits - 1] + counts[bits - 1]) << 1
        return Canonical(first, counts, np.cumsum(counts) - counts, order)


@dataclass(frozen=True)
class Canonical:
    """A canonical prefix code. Of each length: first code, number of codes, and where its symbols begin in `order`."""

    first: I64
    counts: I64
    begins: I64
    order: I64

    def reversed_codes(self, index_bits: U8) -> U64:
        """The code of each symbol with its first bit lowest; u64 [K]."""
        codes = np.zeros(len(index_bits), np.uint64)
        rank = np.arange(len(index_bits)) - self.begins[index_bits[self.order]]
        plain = self.first[index_bits[self.order]] + rank
        for symbol, code in zip(self.order.tolist(), plain.tolist(), strict=True):
            width = int(index_bits[symbol])
            codes[symbol] = int(f"{code:0{width}b}"[::-1], 2) if width else 0
        return codes


def index_lengths(counts: I64) -> U8:
    """Huffman lengths u8 [K] of symbols that occur `counts` [K] times (each at least once)."""
    weights = np.maximum(counts, 1)
    while True:
        lengths = _huffman(weights)
        if lengths.max() <= MAX_INDEX_BITS:
            return lengths
        weights = (weights + 1) // 2  # flattens the tree until it is shallow enough


def _huffman(weights: I64) -> U8:
    heap = [(int(w), i) for i, w in enumerate(weights)]
    heapq.heapify(heap)
    parent: dict[int, int] = {}
    fresh = len(heap)
    while len(heap) > 1:
        (a, left), (b, right) = heapq.heappop(heap), heapq.heappop(heap)
        parent[left] = parent[right] = fresh
        heapq.heappush(heap, (a + b, fresh))
        fresh += 1
    depth = {heap[0][1]: 0}
    for node in range(fresh - 1, -1, -1):
        if node in parent:
            depth[node] = depth[parent[node]] + 1
    return np.array([min(depth[i], 255) for i in range(len(weights))], np.uint8)


def code_for(counts: I64, energy: F64, constant: float) -> Code:
    """The code of the law above.

    Args:
        counts: i64 [K], keys of each weight, at least 1.
        energy: f64 [K], harm of a stranger being taken for a key of that weight, e.g. the weight's square.
        constant: c, in bits; energies are in units of the keys' mean energy.
    """
    counts = np.maximum(counts, 1)
    index_bits = index_lengths(counts)
    share = counts / counts.sum()
    mean = float((share * energy).sum())
    relative = np.maximum(energy / mean if mean > 0 else np.ones(len(energy)), 1e-30)
    wanted = np.rint(np.log2(relative / share) + constant) - index_bits
    return Code(index_bits, np.clip(wanted, 0, MAX_FINGERPRINT).astype(np.uint8))


def uniform_code(counts: I64, bits: int) -> Code:
    """The same fingerprint for all weights, as Talbot and Brants (2008) have it."""
    index_bits = index_lengths(np.maximum(counts, 1))
    return Code(index_bits, np.full(len(counts), bits, np.uint8))


def constant_for(counts: I64, energy: F64, strangers: float, limit: float) -> float:
    """The smallest c, to a 64th of a bit, whose expected false energy stays below a limit.

    Args:
        counts, energy: as in `code_for`.
        strangers: M, keys asked for that are not stored.
        limit: false energy over the energy of all keys, above 0.
    """
    total = float((counts * energy).sum())
    low, high = -16 * 64, (MAX_FINGERPRINT + MAX_INDEX_BITS) * 64
    while low < high:
        middle = (low + high) // 2
        code = code_for(counts, energy, middle / 64)
        if strangers * float((code.match_probability() * energy).sum()) <= limit * total:
            high = middle
        else:
            low = middle + 1
    return low / 64
