"""The model behind the exact entropy code: contexts, counts, frequency tables and their bytes. docs/entropy.md.

A weight's context is how large weights of its row and its column are; a digit's table is chosen by the context and the
digits before it. Everything here is pure numpy; lowtide.kernels.entropy codes with it.

Legend: S slices, C contexts, M = 2^14, nodes 4^S - 1: each table of four digits is three binary decisions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError

U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

CONTEXTS = 48
BASE = 40
"""context = row class + column class - BASE, clipped to 0..CONTEXTS - 1."""
STEPS_PER_OCTAVE = 4
UNIT_CONTEXT = 24
"""The context of a mean distance from the middle of one step."""
NEUTRAL = (BASE + UNIT_CONTEXT) // 2
"""Class of a row or column of magnitude one."""
PROB_BITS = 14
TOTAL = 1 << PROB_BITS
ANGLES = 256
"""A decision's probability is sin^2(pi/2 * k / ANGLES): steps that are equally costly wherever they lie."""
MAX_SLICES = 4
ROUNDS = 3
BLOCK_WEIGHTS = 1 << 20
CHANCE = 0.6
"""Half-normal 0.57, exponential 1. Smallest files of stories15M at densities 1, 0.3 and 0.1 (of 0, 0.3, 0.6, 1)."""
TABLE_HEAD = 3
SHORT_ROW = 16
"""Rows shorter than this are coded even where they are copies: saying which they are costs about as much."""


def classes(q: U8, slices: int, middle: int | None = None) -> tuple[U8, U8]:
    """Classes of rows and columns, in quarter octaves of their mean distance from the middle, by default 4^S / 2.

    Fits |q - middle| ~ r_i * c_j as Laplace scales: alternately r_i = mean_j(|q_ij - middle| / c_j) and
    c_j = mean_i(|q_ij - middle| / r_i). Empty rows and columns are class 0. What is chance in the others is taken out,
    or else coding the classes would cost more than they save.

    Args:
        q: uint8 [out, in], each below 4^S.

    Returns:
        uint8 [out] and uint8 [in].
    """
    check_integers(q, slices)
    out, inputs = q.shape
    centre = np.float32(4**slices // 2 if middle is None else middle)
    rows, columns = np.ones(out, np.float32), np.ones(inputs, np.float32)
    row_used, col_used = np.zeros(out, np.int64), np.zeros(inputs, np.int64)
    step = max(1, BLOCK_WEIGHTS // inputs)
    for _ in range(ROUNDS):
        inverse = _inverse(columns) / np.float32(max(1, int(np.count_nonzero(columns))))
        sums = np.zeros(inputs, np.float64)
        col_used[:] = 0
        for first in range(0, out, step):
            distance = np.abs(q[first : first + step].astype(np.float32) - centre)
            rows[first : first + step] = distance @ inverse
            sums += _inverse(rows[first : first + step]) @ distance
            row_used[first : first + step] = np.count_nonzero(distance, axis=1)
            col_used += np.count_nonzero(distance, axis=0)
        columns = (sums / max(1, int(np.count_nonzero(rows)))).astype(np.float32)
        some = columns[columns > 0]
        if some.size:
            mean = np.exp(np.log(some, dtype=np.float64).mean()).astype(np.float32)
            columns, rows = columns / mean, rows * mean
    return _class_of(rows, row_used), _class_of(columns, col_used)


def _inverse(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.divide(np.float32(1), values, out=np.zeros_like(values), where=values > 0)


def _class_of(values: NDArray[np.float32], used: I64) -> U8:
    """Classes of mean distances, each of a row or column of which `used` weights are not in the middle.

    Such a mean has a relative variance of about CHANCE / used; each logarithm is drawn to the mean of all as much as
    the share of this in their spread says (empirical Bayes).
    """
    some = values > 0
    found = np.zeros(len(values), np.uint8)
    if some.any():
        octaves = np.log2(values[some], dtype=np.float64)
        noise = CHANCE / used[some] / math.log(2) ** 2
        spread = max(float(octaves.var() - noise.mean()), 0.0)
        mean = octaves.mean()
        octaves = mean + (octaves - mean) * (spread / (spread + noise))
        found[some] = np.clip(np.rint(STEPS_PER_OCTAVE * octaves) + NEUTRAL, 1, 255)
    return found


def contexts(row_class: U8, col_class: U8) -> U8:
    """The context of every weight, uint8 [out, in] below CONTEXTS."""
    total = row_class.astype(np.int16)[:, None] + col_class.astype(np.int16) - BASE
    return np.clip(total, 0, CONTEXTS - 1).astype(np.uint8)


def copied_rows(q: U8) -> tuple[I64, bytes]:
    """Rows to code, int64 [n], and the bytes that say which rows are copies of them (4 if none are).

    Vocabularies have many rows that were never trained and round to the same integers.
    """
    if q.shape[1] < SHORT_ROW:
        return np.arange(len(q)), bytes(4)
    place: dict[bytes, int] = {}
    source = np.array([place.setdefault(row.tobytes(), len(place)) for row in q], np.int64)
    first = np.concatenate([[True], source[1:] > np.maximum.accumulate(source)[:-1]])
    copies = source[~first]
    head = np.array([len(copies)], "<u4").tobytes()
    if not len(copies):
        return np.flatnonzero(first), head
    width = max(1, (len(place) - 1).bit_length())
    digits = (copies[:, None] >> np.arange(width) & 1).astype(np.uint8)
    return np.flatnonzero(first), head + np.packbits(first).tobytes() + np.packbits(digits).tobytes()


def read_copied_rows(data: bytes | memoryview | U8, out: int, where: str) -> tuple[I64, I64, int]:
    """(rows that are coded int64 [n], for each row its place among them int64 [out], bytes used) from the beginning of
    the stream of slice 0.

    Raises:
        LowtideError: bytes that `copied_rows` would not have made; it names `where`.
    """
    damaged = LowtideError(f"{where}: the coded weights are damaged; get the file again")
    view: U8 = np.frombuffer(data, np.uint8)
    count = int.from_bytes(view[:4].tobytes(), "little")
    if len(view) < 4 or count >= out:
        raise damaged
    if not count:
        return np.arange(out), np.arange(out), 4
    width, mask = max(1, (out - count - 1).bit_length()), 4 + -(-out // 8)
    end = mask + -(-count * width // 8)
    if len(view) < end:
        raise damaged
    first = np.unpackbits(view[4:mask])[:out].astype(bool)
    digits = np.unpackbits(view[mask:end])[: count * width].reshape(count, width)
    source = np.cumsum(first) - 1
    copies = (digits.astype(np.int64) << np.arange(width)).sum(1)
    if np.count_nonzero(first) != out - count or (copies > source[~first]).any():
        raise damaged
    source[~first] = copies
    return np.flatnonzero(first), source, end


def check_integers(q: U8, slices: int) -> None:
    """ValueError unless q is uint8 [out, in], not empty, and fits into the slices."""
    if not 1 <= slices <= MAX_SLICES:
        raise ValueError(f"slices must be 1 to {MAX_SLICES}, not {slices}")
    if q.dtype != np.uint8 or q.ndim != 2 or not q.size:
        raise ValueError(f"graded integers must be uint8 [out, in], not {q.dtype} {q.shape}")
    if slices < MAX_SLICES and int(q.max()) >= 4**slices:
        raise ValueError(f"an integer of {int(q.max())} does not fit {slices} slices")


def digit_counts(hist: I64, slices: int) -> list[I64]:
    """For every slice s, how often each digit follows each prefix: int64 [C, 4^s, 4]."""
    if hist.shape != (CONTEXTS, 4**slices):
        raise ValueError(f"counts must have shape {(CONTEXTS, 4**slices)}, not {hist.shape}")
    return [hist.reshape(CONTEXTS, 4**s, 4, -1).sum(-1) for s in range(slices)]


def empirical_bits(hist: I64) -> tuple[float, int]:
    """Conditional entropy of the counted integers given their contexts: (bits in all, weights).

    Args:
        hist: int64 [C, 4^S].
    """
    counts = hist.astype(np.float64)
    of_context = counts.sum(1, keepdims=True)
    share = np.divide(counts, of_context, out=np.ones_like(counts), where=counts > 0)
    return float(-(counts * np.log2(share)).sum()), int(hist.sum())


def _grid() -> I64:
    """Frequency of each angle: M * sin^2, exactly 0 and M at the ends only. No value lies within 0.001 of a tie."""
    values = [round(TOTAL * math.sin(math.pi / 2 * k / ANGLES) ** 2) for k in range(ANGLES + 1)]
    inner = np.clip(np.array(values[1:-1], np.int64), 1, TOTAL - 1)
    return np.concatenate([[0], inner, [TOTAL]])


GRID = _grid()


@dataclass(frozen=True, eq=False)
class Tables:
    """Frequency tables of one set of layers.

    angles: int64 [C, 4^S - 1] in 0..ANGLES, three for each table: of digit >= 2, of 1 among {0, 1}, of 3 among {2, 3};
    tables ordered by slice, then prefix. first, last: contexts stored, those outside repeat the nearest.
    """

    slices: int
    first: int
    last: int
    angles: I64

    @classmethod
    def fit(cls, hist: I64, slices: int) -> Tables:
        """Tables for the counts int64 [C, 4^S]: the angles that make data and tables smallest, chosen context by
        context. What was never counted gets no frequency where it costs nothing to say so, so that the code covers
        what was counted and no more.
        """
        counts = digit_counts(hist, slices)
        seen = np.flatnonzero(hist.sum(1))
        first, last = (int(seen[0]), int(seen[-1])) if seen.size else (0, 0)
        pairs = np.concatenate([_decisions(c).reshape(CONTEXTS, -1, 2) for c in counts], 1)
        angles = np.empty((CONTEXTS, 4**slices - 1), np.int64)
        previous = np.full(4**slices - 1, ANGLES // 2)
        for context in range(first, last + 1):
            previous = _best_angles(pairs[context], previous)
            angles[context] = previous
        angles[:first], angles[last:] = angles[first], angles[last]
        return cls(slices, first, last, angles)

    @cached_property
    def frequencies(self) -> list[I64]:
        """For every slice s int64 [C, 4^s, 4], each four adding up to M; 0 only where a side is ruled out."""
        found, at = [], 0
        for s in range(self.slices):
            width = 3 * 4**s
            found.append(_frequencies(self.angles[:, at : at + width].reshape(CONTEXTS, 4**s, 3)))
            at += width
        return found

    @cached_property
    def packed(self) -> list[U64]:
        """For every slice s uint64 [C, 4^s]: where digits 1, 2, 3 start and M, 16 bits each, digit 1 lowest."""
        shifts = np.array([0, 16, 32, 48], np.uint64)
        return [np.bitwise_or.reduce(f.cumsum(-1).astype(np.uint64) << shifts, axis=-1) for f in self.frequencies]

    def entropy_bits(self, hist: I64) -> float:
        """Bits that integers so counted take under these tables; infinite where one of them has no frequency."""
        bits = 0.0
        for counts, frequency in zip(digit_counts(hist, self.slices), self.frequencies, strict=True):
            used = counts > 0
            if (frequency[used] == 0).any():
                return math.inf
            bits += float((counts[used] * (PROB_BITS - np.log2(frequency[used]))).sum())
        return bits

    def to_bytes(self) -> bytes:
        """slices, first and last context, then each angle's difference to the context before it, as docs/entropy.md."""
        stored = self.angles[self.first : self.last + 1]
        before = np.concatenate([np.full((1, stored.shape[1]), ANGLES // 2), stored[:-1]])
        difference = (stored - before).T.ravel()
        codes = np.where(difference > 0, 2 * difference, 1 - 2 * difference)
        text = "".join("0" * (int(c).bit_length() - 1) + f"{int(c):b}" for c in codes)
        text += "0" * (-len(text) % 8)
        return bytes([self.slices, self.first, self.last]) + int(text, 2).to_bytes(len(text) // 8, "big")

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, slices: int, where: str) -> Tables:
        """Inverse of `to_bytes`.

        Raises:
            LowtideError: bytes that `to_bytes` would not have made; it names `where`.
        """
        data = bytes(data)
        if len(data) <= TABLE_HEAD or data[0] != slices or not data[1] <= data[2] < CONTEXTS:
            raise LowtideError(f"{where}: not the frequency tables of {slices} slices; get the file again")
        first, last, nodes = data[1], data[2], 4**slices - 1
        text = "".join(f"{byte:08b}" for byte in data[TABLE_HEAD:])
        values, at = [], 0
        for _ in range(nodes * (last - first + 1)):
            start = text.find("1", at)
            end = 2 * start - at + 1
            if start < 0 or end > len(text):
                raise LowtideError(f"{where}: frequency tables end too soon; get the file again")
            value, at = int(text[start:end], 2), end
            values.append(value // 2 if value % 2 == 0 else -(value // 2))
        stored = ANGLES // 2 + np.array(values, object).reshape(nodes, -1).T.cumsum(0)
        if "1" in text[at:] or len(text) - at >= 8 or stored.min() < 0 or stored.max() > ANGLES:
            raise LowtideError(f"{where}: frequency tables are out of range; get the file again")
        angles = np.empty((CONTEXTS, nodes), np.int64)
        angles[first : last + 1] = stored
        angles[:first], angles[last:] = angles[first], angles[last]
        return cls(slices, first, last, angles)


def _decisions(counts: I64) -> I64:
    """Counts [..., 4] of digits to counts [..., 3, 2] of the three decisions' two sides, the higher digit last."""
    c0, c1, c2, c3 = np.moveaxis(counts, -1, 0)
    sides: Any = [[c0 + c1, c2 + c3], [c0, c1], [c2, c3]]
    return np.moveaxis(np.array(sides), (0, 1), (-2, -1))


def _best_angles(pairs: I64, previous: I64) -> I64:
    """For each node the angle of fewest bits: its counts [nodes, 2] under it, and its difference to `previous`."""
    with np.errstate(divide="ignore"):
        cost = np.stack([PROB_BITS - np.log2(TOTAL - GRID), PROB_BITS - np.log2(GRID)])
    bits = np.zeros((len(pairs), ANGLES + 1))
    for side in range(2):
        used = pairs[:, side] > 0
        bits[used] += pairs[used, side, None] * cost[side]
    difference = np.arange(ANGLES + 1) - previous[:, None]
    code = np.where(difference > 0, 2 * difference, 1 - 2 * difference)
    return (bits + 2 * np.floor(np.log2(code)) + 1).argmin(1)


def _frequencies(angles: I64) -> I64:
    """Frequencies [..., 4] of digits from angles [..., 3]: both sides of a decision inside (0, 1) get at least 1."""
    inside = (angles > 0) & (angles < ANGLES)
    need = 1 + inside[..., 1:].astype(np.int64)
    high = np.where(
        inside[..., 0], np.clip(GRID[angles[..., 0]], need[..., 1], TOTAL - need[..., 0]), GRID[angles[..., 0]]
    )
    found = []
    for side, mass in enumerate((TOTAL - high, high)):
        part = (mass * GRID[angles[..., 1 + side]] + TOTAL // 2) >> PROB_BITS
        part = np.where(inside[..., 1 + side] & (mass > 0), np.clip(part, 1, np.maximum(mass - 1, 1)), part)
        found += [mass - part, part]
    return np.stack(found, -1)
