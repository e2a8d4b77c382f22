"""A fingerprint store: keys to weights, without the keys.

Each key's bits in the retrieval structure are the index of its weight in the table, in a prefix code, and then a
fingerprint of the key. Asking for a key reads the index and compares the fingerprint, bit by bit; a stranger seldom
survives that, and then gets a weight that is not its own (a false positive).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.fingerprint import retrieval
from lowtide.fingerprint.code import F64, I64, Code, code_for, constant_for, uniform_code
from lowtide.fingerprint.hashing import MAX_INT_KEY, U64, fingerprints, hash_ints, hash_texts
from lowtide.fingerprint.retrieval import Lookup, Retrieval

F32 = NDArray[np.float32]
INTS, TEXTS = 0, 1
MAX_COLUMNS = 255
ABSENT = -1


@dataclass(frozen=True)
class CodeOptions:
    """How long fingerprints are, and the seed. Give one of the three; `error` is used if none is given.

    error: expected energy of false positives over the energy of all stored weights (needs the number of strangers);
    constant: c of f = log2(w^2) + c, in bits, w in units of the root mean square weight; bits: the same length for all
    weights; seed: of all hashes, 0 to below 2^63.
    """

    error: float = 0.01
    constant: float | None = None
    bits: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.constant is not None and self.bits is not None:
            raise LowtideError("fingerprint constant and fingerprint bits exclude each other; give one")
        if not 0 < self.error < np.inf:
            raise LowtideError(f"error {self.error}: must be above 0")
        if self.constant is not None and not abs(self.constant) <= 64:
            raise LowtideError(f"constant {self.constant}: must be -64 to 64")
        if self.bits is not None and not 0 <= self.bits <= 32:
            raise LowtideError(f"fingerprint bits {self.bits}: must be 0 to 32")
        if not 0 <= self.seed < 1 << 63:
            raise LowtideError(f"seed {self.seed}: must be 0 to 2^63 - 1")

    def code(self, counts: I64, energy: F64, strangers: float) -> Code:
        """The code for weights that occur `counts` times and do harm `energy`, both [K]."""
        if self.bits is not None:
            return uniform_code(counts, self.bits)
        if self.constant is not None:
            return code_for(counts, energy, self.constant)
        return code_for(counts, energy, constant_for(counts, energy, strangers, self.error))


@dataclass(frozen=True)
class Store:
    """The structure in memory, or mapped from a file.

    kind: INTS (positions below `universe`) or TEXTS (universe 0); count: keys stored; table: f32 [K, columns]; code:
    lengths; bits: the retrieval structure; corrections: i64, ascending, positions known to be false positives;
    meta: what else the file says.
    """

    kind: int
    count: int
    universe: int
    table: F32
    code: Code
    bits: Retrieval
    corrections: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Seed of all hashes."""
        return self.bits.seed

    def symbols(self, hashes: U64) -> NDArray[np.int32]:
        """Table indices of hashed keys [n], ABSENT for strangers; i32 [n]. Corrections are not looked at."""
        return _Match(self.code, hashes, self.bits.lookup(hashes)).run()

    def symbols_of(self, keys: Sequence[str | bytes] | NDArray[Any]) -> NDArray[np.int32]:
        """Table indices of keys: texts, or integers [n] below `universe`; ABSENT for strangers; i32 [n].

        Raises:
            LowtideError: keys of the other kind, not UTF-8, or out of range.
        """
        if self.kind == TEXTS:
            if isinstance(keys, (str, bytes, np.ndarray)):
                raise LowtideError("this store is asked with a list of texts")
            return self.symbols(hash_texts(keys, self.seed))
        asked = check_ints(np.asarray(keys), self.universe)
        found = self.symbols(hash_ints(asked, self.seed))
        if len(self.corrections):
            place = np.minimum(np.searchsorted(self.corrections, asked), len(self.corrections) - 1)
            found[self.corrections[place] == asked] = ABSENT
        return found

    def values_of(self, keys: Sequence[str | bytes] | NDArray[Any]) -> F32:
        """Weights of keys, f32 [n, columns], 0 for strangers. Raises as `symbols_of`."""
        found = self.symbols_of(keys)
        padded = np.concatenate([self.table, np.zeros((1, self.table.shape[1]), np.float32)])
        return padded[found]  # ABSENT is the last row

    def false_rate(self) -> float:
        """Chance that a stranger gets a weight."""
        return float(self.code.match_probability().sum())


def check_ints(keys: NDArray[Any], universe: int) -> I64:
    """Integer keys as i64 [n].

    Raises:
        LowtideError: not integers, not one axis, or outside 0 to universe - 1.
    """
    if keys.ndim != 1 or not (np.issubdtype(keys.dtype, np.integer) or keys.size == 0):
        raise LowtideError(f"positions must be integers [n], not {keys.dtype} {list(keys.shape)}")
    if keys.size and (int(keys.min()) < 0 or int(keys.max()) >= universe):
        raise LowtideError(f"a position is outside 0 to {universe - 1}")
    return keys.astype(np.int64)


def build_store(
    hashes: U64,
    symbols: NDArray[Any],
    table: F32,
    options: CodeOptions,
    *,
    strangers: float,
    kind: int,
    universe: int = 0,
    energy: F64 | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Store:
    """A store of hashed keys.

    Args:
        hashes: u64 [n], all different, n at least 1, by hash_ints or hash_texts under options.seed.
        symbols: integers [n], each key's row of the table.
        table: f32 [K, columns]; rows that no key has are dropped.
        strangers: how many other keys will be asked for (for options.error).
        energy: f64 [K], harm of a false positive of each row; the squared norm of the row by default.

    Raises:
        LowtideError: no keys, too many columns, numbers that are not finite, or a universe too large.
    """
    if not len(hashes):
        raise LowtideError("nothing to store: there are no keys (or all weights are zero)")
    if not 1 <= table.shape[1] <= MAX_COLUMNS:
        raise LowtideError(f"{table.shape[1]} values for each key: 1 to {MAX_COLUMNS} are possible")
    if not np.isfinite(table).all():
        raise LowtideError("a weight is not a finite number")
    if universe > MAX_INT_KEY:
        raise LowtideError(f"{universe} positions are too many")
    counts = np.bincount(symbols, minlength=len(table))
    used = counts > 0
    number = np.cumsum(used) - 1
    symbols = number[symbols]
    table, counts = table[used], counts[used]
    harm = table.astype(np.float64).__pow__(2).sum(1) if energy is None else energy[used]
    code = options.code(counts, harm, strangers)
    index = code.canonical().reversed_codes(code.index_bits)[symbols]
    width = code.fingerprint_bits.astype(np.uint64)[symbols]
    mask = (np.uint64(1) << width) - np.uint64(1)
    values = index | ((fingerprints(hashes) & mask) << code.index_bits.astype(np.uint64)[symbols])
    bits = retrieval.build(hashes, values, code.total[symbols], options.seed)
    return Store(kind, len(hashes), universe, table.astype(np.float32), code, bits, meta=dict(meta or {}))


class _Match:
    """Keys on their way through the code: first the index, bit by bit, then the fingerprint."""

    def __init__(self, code: Code, hashes: U64, lookup: Lookup) -> None:
        self.code = code
        self.canonical = code.canonical()
        self.result = np.full(len(hashes), ABSENT, np.int32)
        self.lookup = lookup
        self.which = np.arange(len(hashes))
        self.prints = fingerprints(hashes)
        self.symbol = np.full(len(hashes), ABSENT, np.int64)
        self.read = np.zeros(len(hashes), np.int64)  # the index code read so far

    def run(self) -> NDArray[np.int32]:
        """The symbols; i32 [n]."""
        self._resolve(0)
        for which in range(int(self.code.total.max())):
            if not len(self.which):
                break
            bit = self.lookup.bit(which)
            known = self.symbol >= 0
            place = which - self.code.index_bits.astype(np.int64)[self.symbol]
            expected = (self.prints >> np.where(known, place, 0).astype(np.uint64)) & np.uint64(1)
            self.read = self.read * 2 + bit
            self._keep(~known | (bit == expected))
            self._resolve(which + 1)
        return self.result

    def _resolve(self, bits: int) -> None:
        """Look up index codes that end after `bits` bits, and put away the keys whose code ends there."""
        if bits < len(self.canonical.counts) and self.canonical.counts[bits]:
            place = self.read - self.canonical.first[bits]
            ends = (self.symbol < 0) & (place >= 0) & (place < self.canonical.counts[bits])
            self.symbol[ends] = self.canonical.order[self.canonical.begins[bits] + place[ends]]
        done = (self.symbol >= 0) & (self.code.total[self.symbol] == bits)
        if done.any():
            self.result[self.which[done]] = self.symbol[done]
            self._keep(~done)

    def _keep(self, wanted: NDArray[np.bool_]) -> None:
        if wanted.all():
            return
        self.lookup = self.lookup.keep(wanted)
        self.which, self.prints = self.which[wanted], self.prints[wanted]
        self.symbol, self.read = self.symbol[wanted], self.read[wanted]
