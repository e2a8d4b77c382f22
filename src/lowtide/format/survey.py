"""What a coded layer looks like: density, step, entropy, the spread of its importance, its mask as a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.format import codec
from lowtide.format.entropy import classes, empirical_bits
from lowtide.format.groups import GroupTensors

U8 = NDArray[np.uint8]
BINS = 8
"""Octaves of the importance histogram: below 2^-3 of the root mean square, .., above 2^3."""


def zero_code(slices: int, zero: bool) -> int | None:
    """The code of a weight of exactly zero; None where there is none."""
    return codec.doubled_centre(codec.centres(slices, zero)) // 2 if zero else None


def code_figures(q: U8, slices: int, zero: bool) -> dict[str, float]:
    """Of the codes of a layer, uint8 [out, in]: density (share that is not zero) and entropy_bits per weight.

    The entropy is conditional on the contexts of the exact coder (docs/entropy.md), without rows that are copies.
    """
    from lowtide.kernels import entropy

    middle = zero_code(slices, zero)
    rows, cols = classes(q, slices, middle)
    bits, _ = empirical_bits(entropy.histogram(q, rows, cols, slices))
    density = 1.0 if middle is None else float(np.count_nonzero(q != middle)) / q.size
    return {"density": density, "entropy_bits": bits / q.size}


def layer_figures(group: GroupTensors, index: int, known: dict[str, float] | None = None) -> dict[str, Any]:
    """Figures of member `index` of a group.

    known: density, entropy_bits and coded_bits as the writer found them; worked out here if they are not given.

    Returns:
        layer, density (outliers and exact columns counted), step (median width of the finest digit), entropy_bits and
        coded_bits per weight (the latter None where unknown), importance_histogram (`BINS` counts of input channels).
    """
    linear = group.linears[index]
    weights = group.in_features * linear.out_features
    if known is None:
        q = codec.unpack_digits(linear.weight, linear.out_features, group.in_features, group.slices)
        known = code_figures(q, group.slices, group.zero)
    beside = (len(linear.outliers()[0]) + len(group.exact_channels) * linear.out_features) / weights
    median = float(np.median(linear.row_scale.astype(np.float64)) * np.median(group.col_scale.astype(np.float64)))
    return {
        "layer": linear.name,
        "weights": weights,
        "density": min(1.0, known["density"] + (beside if group.zero else 0.0)),
        "step": median * 4.0 ** (1 - group.slices),
        "entropy_bits": known["entropy_bits"],
        "coded_bits": known.get("coded_bits"),
        "importance_histogram": importance_histogram(group),
    }


def importance_histogram(group: GroupTensors) -> list[int]:
    """Input channels by the octave of their importance over its root mean square; exact channels are left out."""
    importance = group.importance.astype(np.float64)
    importance = importance[importance > 0]
    if not importance.size:
        return [0] * BINS
    octave = np.floor(np.log2(importance / np.sqrt(np.mean(importance**2)))) + BINS // 2
    return np.bincount(np.clip(octave, 0, BINS - 1).astype(np.int64), minlength=BINS).tolist()


def mask_picture(group: GroupTensors, index: int, size: int = 256) -> U8:
    """The mask of member `index` as a grey picture, uint8 [<= size, <= size]: rows down, input channels across, white
    where every weight of a pixel survives, black where none does. Codes without a zero give the magnitude instead,
    white the largest.
    """
    linear = group.linears[index]
    q = codec.unpack_digits(linear.weight, linear.out_features, group.in_features, group.slices)
    if group.zero:
        values = (q != zero_code(group.slices, True)).astype(np.float32)
        rows, cols, _ = linear.outliers()
        values[rows, cols] = 1
        values[:, group.exact_channels] = 1
    else:
        values = np.abs(q.astype(np.float32) - (4**group.slices - 1) / 2)
    picture = _shrink(_shrink(values, size).T, size).T
    if not group.zero and picture.size and picture.max() > 0:
        picture = picture / picture.max()
    return np.rint(255 * picture).astype(np.uint8)


def _shrink(values: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Means of runs of rows, so that at most `size` are left."""
    count = min(size, len(values))
    starts = np.arange(count) * len(values) // count
    sums = np.add.reduceat(values, starts, axis=0)
    return (sums / np.diff(np.append(starts, len(values)))[:, None]).astype(np.float32)
