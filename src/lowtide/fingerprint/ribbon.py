"""Solving the linear systems of a retrieval structure: banded equations over bits, many small systems in lockstep.

A ribbon system (Dillinger and Walzer, "Ribbon filter: practically smaller than Bloom and Xor", 2021) has equations
whose coefficients lie in a band of 64 bits, so that Gaussian elimination, column by column, has few rows open at a
time. Here each chunk of keys has a system of its own, and numpy takes one column of all systems at a time. Systems
that turn out to have no solution are tried again under another seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowtide.fingerprint.hashing import GOLDEN, U64, mix, parity, trailing_zeros

BAND = 64
"""Bits of a row's band; no system has fewer variables."""
OPEN = 64
"""Rows open at a time, at most: more than a band has bits cannot be independent."""


@dataclass
class Equations:
    """Rows of several systems, sorted by start, then by system.

    system: i64 [n], which system; start: i64 [n], the first variable of the band; band: u64 [n], odd, bit b is the
    coefficient of variable start + b; value: u8 [n], the sum the row must have.
    """

    system: NDArray[np.int64]
    start: NDArray[np.int64]
    band: U64
    value: NDArray[np.uint8]


def solve(equations: Equations, sizes: NDArray[np.int64], noise: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Solve all systems.

    Args:
        equations: the rows; every band ends within its system's variables.
        sizes: i64 [systems], variables of each, at least BAND.
        noise: seed of the bits that free variables get, so that a stranger's row sums to a random bit.

    Returns:
        (u8 [systems, largest size], one variable each, 0 beyond a system's size; bool [systems], True where a system
        has no solution and its variables mean nothing).
    """
    width = int(sizes.max())
    rows, sums, failed = _eliminate(equations, len(sizes), width)
    return _substitute(rows, sums, sizes, noise), failed


@dataclass
class _Open:
    """Rows whose first variable is not decided yet.

    band: u64 [systems, OPEN], bit v % 64 is the coefficient of variable v; value: u8 [systems, OPEN]; used: u64
    [systems], bit p is set where place p is taken; failed: bool [systems]; work: u64 [systems, OPEN]. A row that
    vanishes keeps its place: with the value 0 it was implied by others, with 1 it contradicts them.
    """

    band: U64
    value: NDArray[np.uint8]
    used: U64
    failed: NDArray[np.bool_]
    work: U64

    @classmethod
    def of(cls, systems: int) -> _Open:
        """No rows."""
        band, value = np.zeros((systems, OPEN), np.uint64), np.zeros((systems, OPEN), np.uint8)
        return cls(band, value, np.zeros(systems, np.uint64), np.zeros(systems, np.bool_), np.empty_like(band))

    def add(self, system: NDArray[np.int64], band: U64, value: NDArray[np.uint8]) -> None:
        """Take in rows of different systems."""
        free = ~self.used[system]
        self.failed[system[free == 0]] = True
        place = trailing_zeros(np.where(free == 0, np.uint64(1), free))
        self.used[system] |= np.uint64(1) << place.astype(np.uint64)
        self.band[system, place] = band
        self.value[system, place] = value

    def take(self, column: int) -> tuple[U64, NDArray[np.uint8]]:
        """One row of each system that has the variable `column`, 0 where none has; it is added to the others."""
        # one buffer for all turns: a fresh array of this size would cost more than the work in it
        has = np.right_shift(self.band, np.uint64(column % BAND), out=self.work)
        has &= np.uint64(1)
        bits = has.astype(np.uint8)
        every = np.arange(len(has))
        first = bits.view(np.bool_).argmax(1)
        chosen = bits[every, first]
        band = self.band[every, first] * chosen
        value = self.value[every, first] * chosen
        self.used &= ~(chosen.astype(np.uint64) << first.astype(np.uint64))
        np.negative(has, out=has)  # all ones where there was a one
        has &= band[:, None]
        self.band ^= has
        bits *= value[:, None]
        self.value ^= bits
        return band, value

    def contradictions(self) -> NDArray[np.bool_]:
        """Where a row has no coefficients left and the value 1, or rows found no place; bool [systems]."""
        return self.failed | ((self.band == 0) & (self.value != 0)).any(1)


def _eliminate(equations: Equations, systems: int, width: int) -> tuple[U64, NDArray[np.uint8], NDArray[np.bool_]]:
    """Rows in echelon form: u64 [width, systems] (bit b of row v belongs to variable v + b; 0: v is free), their sums
    u8 [width, systems], and bool [systems], True where a contradiction turned up."""
    rows, sums = np.zeros((width, systems), np.uint64), np.zeros((width, systems), np.uint8)
    state = _Open.of(systems)
    ends = np.cumsum(np.bincount(equations.start, minlength=width))
    begin = 0
    for column in range(width):
        turn = np.uint64(column % BAND)
        back = np.uint64(-column % BAND)
        new = np.arange(begin, ends[column])
        begin = int(ends[column])
        while len(new):  # one row of each system at a time
            system = equations.system[new]
            first = np.ones(len(new), np.bool_)
            first[1:] = system[1:] != system[:-1]
            now, new = new[first], new[~first]
            band = equations.band[now]
            band = (band << turn) | (band >> back) if column % BAND else band
            state.add(equations.system[now], band, equations.value[now])
        band, sums[column] = state.take(column)
        rows[column] = (band >> turn) | (band << back) if column % BAND else band
    return rows, sums, state.contradictions()


def _substitute(rows: U64, sums: NDArray[np.uint8], sizes: NDArray[np.int64], noise: int) -> NDArray[np.uint8]:
    """Back substitution from the last variable to the first; u8 [systems, width]."""
    width, systems = rows.shape
    solution = np.zeros((width, systems), np.uint8)
    free = np.arange(systems, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(noise)
    window = np.zeros(systems, np.uint64)  # bit b is variable place + b
    for place in range(width - 1, -1, -1):
        window = window << np.uint64(1)
        row = rows[place]
        if place % 64 == 63 or place == width - 1:
            free = mix(free + np.uint64(GOLDEN))
        random = ((free >> np.uint64(place % 64)) & np.uint64(1)).astype(np.uint8)
        bit = np.where(row != 0, parity(row & window) ^ sums[place], random)
        bit[sizes <= place] = 0
        window |= bit
        solution[place] = bit
    return np.ascontiguousarray(solution.T)
