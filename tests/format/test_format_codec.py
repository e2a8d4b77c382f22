"""Digits and outliers, against a plain loop written from the specification."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide.format import codec

SHAPES = [(1, 1), (3, 5), (64, 4), (65, 7), (130, 3), (255, 2), (256, 3), (257, 2), (300, 41), (576, 2)]


def loop_byte(q: np.ndarray, slices: int, s: int, tile: int, channel: int, byte: int) -> int:
    """The specification, one byte at a time."""
    first, width = codec.tiles(len(q))[tile]
    value = 0
    for part in range(4):
        row = first + byte + part * (width // 4)
        digit = (int(q[row, channel]) >> (2 * (slices - 1 - s))) & 3 if row < len(q) else 0
        value |= digit << (2 * part)
    return value


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
@pytest.mark.parametrize("out,inputs", SHAPES)
def test_pack_is_the_specification(out: int, inputs: int, slices: int) -> None:
    q = np.random.default_rng(out).integers(0, 4**slices, (out, inputs), dtype=np.uint8)
    packed = codec.pack_digits(q, slices)
    expected = [
        [
            loop_byte(q, slices, s, tile, channel, byte)
            for channel in range(inputs)
            for tile, (_, width) in enumerate(codec.tiles(out))
            for byte in range(width // 4)
        ]
        for s in range(slices)
    ]
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(codec.unpack_digits(packed, out, inputs, slices), q)
    planes = codec.digit_planes(packed, out, inputs)
    weights = 4 ** np.arange(slices - 1, -1, -1)
    np.testing.assert_array_equal(np.tensordot(weights, planes.astype(int), 1), q)
    assert codec.padding_is_zero(packed, out, inputs)


def test_pack_takes_any_memory_order() -> None:
    q = np.random.default_rng(1).integers(0, 64, (70, 9), dtype=np.uint8)
    np.testing.assert_array_equal(codec.pack_digits(np.asfortranarray(q), 3), codec.pack_digits(q, 3))
    np.testing.assert_array_equal(codec.pack_digits(q[::2, ::3], 3), codec.pack_digits(q[::2, ::3].copy(), 3))


def test_tiles_are_as_many_of_256_as_fit() -> None:
    assert codec.tiles(48) == [(0, 64)]
    assert codec.tiles(256) == [(0, 256)]
    assert codec.tiles(250) == [(0, 256)]
    assert codec.tiles(192) == [(0, 64), (64, 64), (128, 64)]
    assert codec.tiles(577) == [(0, 256), (256, 256), (512, 64), (576, 64)]


@pytest.mark.parametrize("out,inputs", [(48, 5), (250, 3), (257, 4), (1, 1)])
def test_every_padding_digit_is_seen(out: int, inputs: int) -> None:
    rng = np.random.default_rng(0)
    packed = codec.pack_digits(rng.integers(0, 16, (out, inputs), dtype=np.uint8), 2)
    padded = codec.padded_rows(out)
    full = np.zeros((padded, inputs), np.uint8)
    for row in range(out, padded):
        for channel in {0, inputs - 1}:
            for digit in (1, 2, 4, 8):
                full[row, channel] = digit
                assert not codec.padding_is_zero(packed | codec.pack_digits(full, 2), out, inputs)
                full[row, channel] = 0


@pytest.mark.parametrize("q,slices", [(np.full((2, 2), 16, np.uint8), 2), (np.zeros((2, 2), np.int32), 2)])
def test_pack_refuses_what_does_not_fit(q: np.ndarray, slices: int) -> None:
    with pytest.raises(ValueError, match="fit|uint8"):
        codec.pack_digits(q, slices)


def test_unpack_refuses_another_shape() -> None:
    packed = codec.pack_digits(np.zeros((48, 6), np.uint8), 2)
    with pytest.raises(ValueError, match="not uint8 for"):
        codec.unpack_digits(packed, 65, 6, 2)
    with pytest.raises(ValueError, match="2 slices, not 3"):
        codec.unpack_digits(packed, 48, 6, 3)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 600), st.integers(1, 2000), st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_outliers_round_trip(out: int, inputs: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    picked = rng.choice(out * inputs, min(count, out * inputs), replace=False)
    rows, cols = np.divmod(picked, inputs)
    values = rng.normal(0, 1, len(picked)).astype(np.float16)
    values[values == 0] = 1
    ptr, row, gap, value = codec.pack_outliers(rows, cols, values, out)
    assert [str(a.dtype) for a in (ptr, row, gap, value)] == ["uint32", "uint8", "uint8", "float16"]
    assert len(ptr) == len(codec.tiles(out)) + 1
    got = codec.unpack_outliers(ptr, row, gap, value, out)
    assert sorted(zip(*(a.tolist() for a in got), strict=True)) == sorted(
        zip(rows.tolist(), cols.tolist(), values.tolist(), strict=True)
    )
    # The stored order, decoded by a loop as another reader would.
    entries = []
    for tile, (first, _) in enumerate(codec.tiles(out)):
        column = 0
        for n in range(ptr[tile], ptr[tile + 1]):
            column += int(gap[n])
            if value[n] != 0:
                entries.append((tile, column, first + int(row[n])))
            else:
                assert (row[n], gap[n]) == (0, 255)
    assert entries == sorted(entries)
    assert [e[2] for e in entries] == got[0].tolist() and [e[1] for e in entries] == got[1].tolist()


def test_fillers_bridge_exactly_the_gaps_above_255() -> None:
    for column, gaps in [(255, [255]), (256, [255, 1]), (510, [255, 255]), (511, [255, 255, 1])]:
        ptr, row, gap, value = codec.pack_outliers(np.array([3]), np.array([column]), np.array([2.0], np.float16), 64)
        assert (ptr.tolist(), gap.tolist()) == ([0, len(gaps)], gaps)
        assert row.tolist() == [0] * (len(gaps) - 1) + [3]
        assert value.tolist() == [0.0] * (len(gaps) - 1) + [2.0]


def test_outliers_of_value_zero_are_dropped() -> None:
    ptr, row, _, _ = codec.pack_outliers(np.array([0, 1]), np.array([0, 0]), np.array([0.0, 1.0], np.float16), 64)
    assert (ptr.tolist(), row.tolist()) == ([0, 1], [1])


@pytest.mark.parametrize(
    "rows,cols,values,message",
    [([64], [0], [1.0], "out of range"), ([-1], [0], [1.0], "out of range"), ([0], [-1], [1.0], "out of range"),
     ([0], [0], [np.inf], "not finite"), ([5, 5], [7, 7], [1.0, 2.0], "twice")],
)  # fmt: skip
def test_outliers_that_cannot_be_stored(rows: list[int], cols: list[int], values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec.pack_outliers(np.array(rows), np.array(cols), np.array(values, np.float16), 64)
