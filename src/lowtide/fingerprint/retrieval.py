"""A retrieval structure: bits for every key of a set, at a few per cent more than those bits; random bits for others.

Keys are hashed into chunks of about 2048 stored bits. Bit b of a key is the sum (xor) of some of 64 neighbouring bits
of its chunk, chosen by a hash of (key, b); `lowtide.fingerprint.ribbon` finds the bits that make all sums right.
Values may have different lengths (Hreinsson, Kroyer and Pagh 2009; Genuzio and Vigna 2018): each bit of a value is an
equation of its own, so a longer value costs its length and nothing for others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowtide.fingerprint.hashing import GOLDEN, U64, mix, mix_int, parity
from lowtide.fingerprint.ribbon import BAND, Equations, solve

CHUNK_BITS = 2048
"""Stored bits of a chunk on average: smaller ones cost more for their directory, larger ones are seldom solvable."""
MAX_CHUNK = (1 << 16) - 1
MAX_LENGTH = 60
SEEDS = 256
SPARE, SPARE_STEP = 0.009, 0.003
"""Variables beyond the equations, as parts of their number: at the first attempt, and more at each later one."""
_BATCH = 1 << 22
"""Equations solved at a time: memory, about 60 bytes each."""
_SIDE_BY_SIDE = 192
"""Systems that cost hardly more time than one."""


@dataclass(frozen=True)
class Retrieval:
    """The structure, ready to be asked. Arrays may lie in a memory-mapped file.

    seed: of all hashes; lengths: u16 [chunks], bits of each chunk; seeds: u8 [chunks]; words: u64 [ceil(bits / 64)],
    the chunks' bits one after another, lowest bit first.
    """

    seed: int
    lengths: NDArray[np.uint16]
    seeds: NDArray[np.uint8]
    words: U64

    def __post_init__(self) -> None:
        ends = np.cumsum(self.lengths.astype(np.int64))
        object.__setattr__(self, "_starts", ends - self.lengths)

    def lookup(self, hashes: U64) -> Lookup:
        """Begin to ask for keys, given by their hashes u64 [n]."""
        chunk = chunk_of(hashes, len(self.lengths))
        starts: NDArray[np.int64] = self._starts  # type: ignore[attr-defined]
        spans = self.lengths[chunk].astype(np.int64) - (BAND - 1)
        return Lookup(self.words, salted(hashes, self.seeds[chunk], self.seed), starts[chunk], spans)


@dataclass
class Lookup:
    """Keys being asked for: words, the structure's; salted: u64 [n]; starts, spans: i64 [n], of the keys' chunks."""

    words: U64
    salted: U64
    starts: NDArray[np.int64]
    spans: NDArray[np.int64]

    def bit(self, which: int) -> NDArray[np.uint8]:
        """Bit `which` of every key's value; u8 [n]."""
        start, band, veil = row(self.salted, np.uint64(which), self.spans)
        first = start + self.starts
        word, shift = first >> 6, (first & 63).astype(np.uint64)
        above = self.words[np.minimum(word + 1, len(self.words) - 1)]
        # the second shift in two steps: a shift by 64 is undefined
        window = (self.words[word] >> shift) | ((above << np.uint64(1)) << (np.uint64(63) - shift))
        return parity(window & band) ^ veil

    def keep(self, which: NDArray[np.bool_]) -> Lookup:
        """The lookup of some of the keys."""
        return Lookup(self.words, self.salted[which], self.starts[which], self.spans[which])


def chunk_of(hashes: U64, chunks: int) -> NDArray[np.int64]:
    """The chunk of each hash, from its upper 32 bits; i64 [n]."""
    return (((hashes >> np.uint64(32)) * np.uint64(chunks)) >> np.uint64(32)).astype(np.int64)


def salted(hashes: U64, seeds: NDArray[np.uint8], seed: int) -> U64:
    """Hashes under the structure's seed and that of each key's chunk."""
    table = mix(np.arange(SEEDS, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(mix_int(seed)))
    return hashes ^ table[seeds]


def row(
    keys: U64, which: np.uint64 | U64, spans: NDArray[np.int64]
) -> tuple[NDArray[np.int64], U64, NDArray[np.uint8]]:
    """The row of bit `which` of salted keys: start (i64 [n], below span), band (u64 [n], odd), and a random bit u8 [n]
    that veils the value, so that strangers get random bits even where all values are alike."""
    with np.errstate(over="ignore"):
        band = mix(keys + (which + np.uint64(1)) * np.uint64(GOLDEN))
    more = mix(band)
    start = ((more >> np.uint64(32)) * spans.astype(np.uint64)) >> np.uint64(32)
    return start.astype(np.int64), band | np.uint64(1), (more & np.uint64(1)).astype(np.uint8)


def build(hashes: U64, values: U64, lengths: NDArray[np.int64], seed: int) -> Retrieval:
    """The structure that gives each key its value.

    Args:
        hashes: u64 [n], all different.
        values: u64 [n], bit b of the value in bit b.
        lengths: i64 [n], bits of each value, 0 to MAX_LENGTH.
        seed: makes another structure of the same keys.
    """
    chunks = max(1, round(int(lengths.sum()) / CHUNK_BITS))
    chunk = chunk_of(hashes, chunks)
    order = np.argsort(chunk, kind="stable")
    keys = _Keys(chunk[order], hashes[order], values[order], lengths[order])
    ends = np.cumsum(np.bincount(keys.chunk, weights=keys.length, minlength=chunks)).astype(np.int64)
    sizes, seeds, parts = [], [], []
    first = 0
    while first < chunks:
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _BATCH, "right")))
        inside = slice(*np.searchsorted(keys.chunk, [first, last]))
        size, used, bits = _solve_batch(keys.part(inside, first), last - first, seed)
        sizes.append(size)
        seeds.append(used)
        parts.append(bits)
        first = last
    packed = np.packbits(np.concatenate(parts), bitorder="little")
    words = np.frombuffer(packed.tobytes() + bytes(-len(packed) % 8), "<u8").astype(np.uint64)
    return Retrieval(seed, np.concatenate(sizes).astype(np.uint16), np.concatenate(seeds), words)


@dataclass
class _Keys:
    """Keys sorted by chunk; fields as in `build`."""

    chunk: NDArray[np.int64]
    hash: U64
    value: U64
    length: NDArray[np.int64]

    def part(self, which: slice, first: int) -> _Keys:
        """A run of them, chunks counted from `first`."""
        return _Keys(self.chunk[which] - first, self.hash[which], self.value[which], self.length[which])

    def of_chunks(self, wanted: NDArray[np.int64], chunks: int) -> _Keys:
        """The keys of some chunks, which are numbered anew."""
        number = np.full(chunks, -1)
        number[wanted] = np.arange(len(wanted))
        keep = number[self.chunk] >= 0
        return _Keys(number[self.chunk[keep]], self.hash[keep], self.value[keep], self.length[keep])


def _solve_batch(keys: _Keys, chunks: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint8]]:
    """Sizes i64 [chunks], seeds u8 [chunks] and bits u8 [sum of sizes] of some chunks."""
    need = np.bincount(keys.chunk, weights=keys.length, minlength=chunks).astype(np.int64)
    sizes, seeds = np.zeros(chunks, np.int64), np.zeros(chunks, np.uint8)
    bits: list[NDArray[np.uint8]] = [np.zeros(0, np.uint8)] * chunks
    left, attempt = np.arange(chunks), 0
    while attempt < SEEDS:
        # a few chunks take as long as many: then several seeds are tried side by side, and the first that does is kept
        copies = min(SEEDS - attempt, 8, max(1, _SIDE_BY_SIDE // len(left)))
        which = np.tile(left, copies)
        tried = attempt + np.repeat(np.arange(copies), len(left))
        # spare variables: few at first, since a retry costs time and a variable costs space for ever
        size = np.maximum(need[which] + 4 + (need[which] * (SPARE + SPARE_STEP * tried)).astype(np.int64), BAND)
        if size.max() > MAX_CHUNK:
            raise AssertionError("a chunk outgrew its directory entry")
        solution, failed = _attempt(keys.of_chunks(left, chunks), copies, size, tried, seed)
        solved, first = np.unique(which[~failed], return_index=True)
        for i in np.flatnonzero(~failed)[first]:
            bits[which[i]], sizes[which[i]], seeds[which[i]] = solution[i, : size[i]], size[i], tried[i]
        left = np.setdiff1d(left, solved)
        attempt += copies
        if not len(left):
            return sizes, seeds, np.concatenate(bits)
    raise AssertionError("a chunk has no solution under any seed: two keys have the same hash")


def _attempt(
    keys: _Keys, copies: int, sizes: NDArray[np.int64], tried: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Try the chunks of `keys` in several copies, under the seeds `tried` i64 [copies * chunks]; as `ribbon.solve`."""
    which_key = np.repeat(np.arange(len(keys.length)), keys.length)
    bit = np.arange(len(which_key)) - np.repeat(np.cumsum(keys.length) - keys.length, keys.length)
    value = ((keys.value[which_key] >> bit.astype(np.uint64)) & np.uint64(1)).astype(np.uint8)
    which_key, bit, value = np.tile(which_key, copies), np.tile(bit, copies), np.tile(value, copies)
    chunks = len(sizes) // copies
    system = keys.chunk[which_key] + np.repeat(np.arange(copies) * chunks, len(bit) // copies)
    hashed = salted(keys.hash[which_key], tried[system].astype(np.uint8), seed)
    start, band, veil = row(hashed, bit.astype(np.uint64), sizes[system] - (BAND - 1))
    order = np.argsort(start * len(sizes) + system, kind="stable")
    equations = Equations(system[order], start[order], band[order], (value ^ veil)[order])
    return solve(equations, sizes, mix_int(seed + int(tried[0])))
