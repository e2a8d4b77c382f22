"""Digits <-> bytes: the packed layout of weights and the side list of outliers.

Everything here is pure numpy on little-endian arrays. docs/format.md says the same in words for other languages.

Legend: S slices, `out` rows, `in` input channels, out_pad = out rounded up to 64, wb bytes per channel of a tile.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]

TILE_ROWS = 256
SMALL_TILE_ROWS = 64
MAX_SLICES = 4
MAX_GAP = 255


def centres(slices: int, zero: bool) -> tuple[int, ...]:
    """Twice the digit that means nothing, slice by slice, coarsest first; [S].

    Without `zero`, 3: a weight of zero lies between the digits 1 and 2, and a level reads the middle of four steps.
    With `zero`, 4 and 2 in turn: one digit of every slice means exactly zero, so that a pruned weight is zero at every
    level; in turn, so that zero lies near the middle of the codes that share a prefix.
    """
    _check_slices(slices)
    return tuple(4 - 2 * (s % 2) if zero else 3 for s in range(slices))


def doubled_centre(centres: tuple[int, ...]) -> int:
    """Twice the code that means a weight of zero: 4^S - 1, or with `zero` 4, 18, 76 or 306."""
    code = 0
    for centre in centres:
        code = 4 * code + centre
    return code


def padded_rows(out: int) -> int:
    """out_pad: rows rounded up to a multiple of 64."""
    return -(-out // SMALL_TILE_ROWS) * SMALL_TILE_ROWS


def packed_shape(out: int, inputs: int, slices: int) -> tuple[int, int]:
    """Shape of a packed weight, [S, in * out_pad / 4]."""
    return slices, inputs * padded_rows(out) // 4


def tiles(out: int) -> list[tuple[int, int]]:
    """(first row, width in rows) of each tile: as many of 256 as fit into out_pad, then tiles of 64."""
    large = padded_rows(out) // TILE_ROWS
    split = large * TILE_ROWS
    return [(row, TILE_ROWS) for row in range(0, split, TILE_ROWS)] + [
        (row, SMALL_TILE_ROWS) for row in range(split, padded_rows(out), SMALL_TILE_ROWS)
    ]


def pack_digits(q: U8, slices: int) -> U8:
    """Pack offset-binary integers into 2-bit slices, one tile at a time.

    Args:
        q: uint8 [out, in], each in [0, 4**slices).
        slices: S, 1 to 4.

    Returns:
        uint8 [S, in * out_pad / 4], bytes ordered slice, channel, tile, byte: a channel of a slice is one contiguous
        run of out_pad / 4 bytes. Padding rows are zero digits.
    """
    _check_slices(slices)
    if q.dtype != np.uint8 or q.ndim != 2:
        raise ValueError(f"digits must be uint8 [out, in], not {q.dtype} {q.shape}")
    if slices < MAX_SLICES and q.size and int(q.max()) >= 4**slices:
        raise ValueError(f"a digit integer of {int(q.max())} does not fit {slices} slices")
    out, inputs = q.shape
    packed: U8 = np.empty(packed_shape(out, inputs, slices), np.uint8)
    for first, width in tiles(out):
        rows = np.ascontiguousarray(q[first : first + width])
        if len(rows) < width:
            rows = np.concatenate([rows, np.zeros((width - len(rows), inputs), np.uint8)])
        quarters = rows.reshape(4, width // 4, inputs)
        for s in range(slices):
            shift = 2 * (slices - 1 - s)
            digits = (quarters >> shift) & 3
            tile = digits[0] | (digits[1] << 2) | (digits[2] << 4) | (digits[3] << 6)
            packed[s].reshape(inputs, -1)[:, first // 4 : (first + width) // 4] = tile.T
    return packed


def digit_planes(packed: U8, out: int, inputs: int) -> U8:
    """The base-4 digits of a packed weight, uint8 [S, out, in], coarsest first, each in 0..3."""
    slices = _check_packed(packed, out, inputs)
    planes: U8 = np.empty((slices, out, inputs), np.uint8)
    for first, width in tiles(out):
        used = min(width, out - first)
        for s in range(slices):
            planes[s, first : first + used] = _tile_digits(packed[s], first, width, inputs)[:used]
    return planes


def unpack_digits(packed: U8, out: int, inputs: int, slices: int) -> U8:
    """Inverse of `pack_digits`: uint8 [out, in] in [0, 4**slices)."""
    if _check_packed(packed, out, inputs) != slices:
        raise ValueError(f"packed weight has {len(packed)} slices, not {slices}")
    q: U8 = np.zeros((out, inputs), np.uint8)
    for first, width in tiles(out):
        used = min(width, out - first)
        rows = q[first : first + used]
        for s in range(slices):
            rows <<= 2
            rows |= _tile_digits(packed[s], first, width, inputs)[:used]
    return q


def padding_is_zero(packed: U8, out: int, inputs: int) -> bool:
    """True if every digit of the rows out..out_pad-1 is zero. They lie in the last tile, so this reads little."""
    _check_packed(packed, out, inputs)
    first, width = tiles(out)[-1]
    unused = out - first
    if unused == width:
        return True
    padding = (np.arange(width) >= unused).reshape(4, width // 4)
    bits = np.array([[3], [12], [48], [192]], np.uint8)
    mask = np.bitwise_or.reduce(np.where(padding, bits, np.uint8(0)), axis=0)
    tile = packed.reshape(len(packed), inputs, -1)[:, :, first // 4 :]
    columns = np.flatnonzero(mask)
    return not np.any(tile[:, :, columns[0] : columns[-1] + 1] & mask[columns[0] : columns[-1] + 1])


def pack_outliers(
    rows: NDArray[np.integer], cols: NDArray[np.integer], values: NDArray[np.float16], out: int
) -> tuple[NDArray[np.uint32], U8, U8, NDArray[np.float16]]:
    """Sort outlier weights by tile, column and row, and code their columns as gaps.

    Args:
        rows, cols: [n] output row and input channel of each outlier; no pair twice.
        values: float16 [n], finite. An entry of value zero says nothing and is dropped (zero marks fillers).
        out: rows of the layer.

    Returns:
        ptr uint32 [tiles + 1], row uint8 [m], gap uint8 [m], value float16 [m]; m >= n counts fillers.
    """
    values = np.asarray(values, np.float16)
    keep = values != 0
    rows_, cols_, values = np.asarray(rows, np.int64)[keep], np.asarray(cols, np.int64)[keep], values[keep]
    if rows_.size and (rows_.min() < 0 or rows_.max() >= out or cols_.min() < 0):
        raise ValueError("an outlier's row or column is out of range")
    if not np.isfinite(values).all():
        raise ValueError("an outlier is not finite in float16")
    starts = np.array([first for first, _ in tiles(out)], np.int64)
    tile = np.searchsorted(starts, rows_, side="right") - 1
    order = np.lexsort((rows_, cols_, tile))
    rows_, cols_, values, tile = rows_[order], cols_[order], values[order], tile[order]
    same_tile = np.concatenate([[False], tile[1:] == tile[:-1]])[: len(tile)]
    previous = np.where(same_tile, np.concatenate([[0], cols_[:-1]])[: len(cols_)], 0)
    gap = cols_ - previous
    if np.any(same_tile & (gap == 0) & (rows_ == np.concatenate([[-1], rows_[:-1]])[: len(rows_)])):
        raise ValueError("the same outlier is listed twice")
    # A real entry carries a gap of 0..255; each filler before it carries 255.
    fillers = np.maximum(gap - 1, 0) // MAX_GAP
    position = np.cumsum(fillers + 1) - 1
    total = int(position[-1]) + 1 if len(position) else 0
    row_out: U8 = np.zeros(total, np.uint8)
    gap_out: U8 = np.full(total, MAX_GAP, np.uint8)
    value_out = np.zeros(total, np.float16)
    row_out[position] = rows_ - starts[tile]
    gap_out[position] = gap - MAX_GAP * fillers
    value_out[position] = values
    counts = np.bincount(tile, weights=fillers + 1, minlength=len(starts)).astype(np.int64)
    ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
    return ptr, row_out, gap_out, value_out


def outlier_positions(
    ptr: NDArray[np.uint32], row: U8, gap: U8, out: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(tile, row of the layer, column) int64 [m] of every stored entry, fillers included. `ptr` must be monotone."""
    starts = np.array([first for first, _ in tiles(out)], np.int64)
    bounds = ptr.astype(np.int64)
    tile = np.repeat(np.arange(len(starts)), np.diff(bounds))
    run = np.concatenate([[0], np.cumsum(gap, dtype=np.int64)])
    return tile, starts[tile] + row, run[1:] - run[bounds[:-1]][tile]


def unpack_outliers(
    ptr: NDArray[np.uint32], row: U8, gap: U8, value: NDArray[np.float16], out: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float16]]:
    """Inverse of `pack_outliers`: rows int64 [n], cols int64 [n], values float16 [n] in stored order, no fillers."""
    _, rows, cols = outlier_positions(ptr, row, gap, out)
    keep = value != 0
    return rows[keep], cols[keep], value[keep]


def _tile_digits(plane: U8, first: int, width: int, inputs: int) -> U8:
    """Digits uint8 [width, in] of one tile of one slice's bytes [in * out_pad / 4]."""
    tile = np.ascontiguousarray(plane.reshape(inputs, -1)[:, first // 4 : (first + width) // 4].T)
    digits: U8 = np.concatenate([(tile >> shift) & 3 for shift in (0, 2, 4, 6)])
    return digits


def _check_slices(slices: int) -> None:
    if not 1 <= slices <= MAX_SLICES:
        raise ValueError(f"slices must be 1 to {MAX_SLICES}, not {slices}")


def _check_packed(packed: U8, out: int, inputs: int) -> int:
    """The number of slices of a packed weight whose dtype and shape fit."""
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape != packed_shape(out, inputs, len(packed)):
        raise ValueError(f"packed weight is {packed.dtype} {packed.shape}, not uint8 for [{out}, {inputs}]")
    _check_slices(len(packed))
    return len(packed)
