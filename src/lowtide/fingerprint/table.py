"""The table of quantised weights, and each weight's index in it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

MAX_TABLE = 1 << 12
_ROUNDS = 60
_BINS = 1 << 12


def lloyd_table(values: F32, size: int, weights: NDArray[np.floating] | None = None) -> tuple[F32, I64]:
    """The table f32 [K, 1], K at most `size`, of least squared error (Lloyd and Max), and indices i64 [n].

    Rounds start from cells whose number goes with the cube root of the density, which is best for many cells (Panter
    and Dite 1951), and end when no cell's boundary moves. Values that fit the table stay as they are.
    weights: above 0, [n], of each value's squared error; 1 by default.
    """
    if not 1 <= size <= MAX_TABLE:
        raise LowtideError(f"table size {size}: must be 1 to {MAX_TABLE}")
    different = np.unique(values)
    if len(different) <= size:
        return different[:, None].astype(np.float32), np.searchsorted(different, values)
    order = np.argsort(values, kind="stable")
    ordered = values[order].astype(np.float64)
    weight = np.ones(len(ordered)) if weights is None else np.asarray(weights, np.float64)[order]
    mass = np.concatenate([[0.0], np.cumsum(weight)])
    sums = np.concatenate([[0.0], np.cumsum(weight * ordered)])
    density, edges = np.histogram(ordered, _BINS, weights=weight)
    share = np.concatenate([[0.0], np.cumsum(np.cbrt(density))])
    inner = np.searchsorted(ordered, np.interp(np.linspace(0, share[-1], size + 1)[1:-1], share, edges))
    cuts = np.unique(np.concatenate([[0], inner, [len(ordered)]]))
    for _ in range(_ROUNDS):
        centres = np.unique((sums[cuts[1:]] - sums[cuts[:-1]]) / (mass[cuts[1:]] - mass[cuts[:-1]]))
        inner = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        fresh = np.unique(np.concatenate([[0], inner, [len(ordered)]]))
        if np.array_equal(fresh, cuts):
            break
        cuts = fresh
    table = np.unique(((sums[cuts[1:]] - sums[cuts[:-1]]) / (mass[cuts[1:]] - mass[cuts[:-1]])).astype(np.float32))
    middle = (table[1:].astype(np.float64) + table[:-1]) / 2
    return table[:, None], np.searchsorted(middle, values.astype(np.float64))


def uniform_table(values: F32, step: float) -> tuple[F32, I64]:
    """Multiples of a step: table f32 [K, 1] of the mean weight of each cell in use, and indices i64 [n]."""
    if not step > 0:
        raise LowtideError(f"step {step}: must be above 0")
    cells = np.rint(values.astype(np.float64) / step)
    different, indices = np.unique(cells, return_inverse=True)
    if len(different) > MAX_TABLE:
        raise LowtideError(f"step {step:g}: gives {len(different)} different weights, at most {MAX_TABLE} are possible")
    sums = np.bincount(indices, weights=values.astype(np.float64), minlength=len(different))
    return (sums / np.bincount(indices, minlength=len(different))).astype(np.float32)[:, None], indices
