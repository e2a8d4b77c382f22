"""Contexts, frequency tables and their bytes."""

import math

import numpy as np
import pytest

from lowtide.errors import LowtideError
from lowtide.format import entropy
from lowtide.format.entropy import Tables


def laplace(slices, out=90, inputs=70, scale=None, seed=0):
    """Integers uint8 [out, in] whose spread varies by row and column."""
    rng = np.random.default_rng(seed)
    spread = np.exp(0.5 * rng.normal(size=(out, 1)) + 0.5 * rng.normal(size=inputs))
    w = rng.laplace(size=(out, inputs)) * spread * (4.0**slices / 24 if scale is None else scale)
    return np.clip(np.rint(w) + 4**slices // 2, 0, 4**slices - 1).astype(np.uint8)


def counts_of(q, slices):
    rows, columns = entropy.classes(q, slices)
    counts = np.zeros((entropy.CONTEXTS, 4**slices), np.int64)
    np.add.at(counts, (entropy.contexts(rows, columns).ravel(), q.ravel()), 1)
    return counts


def test_classes_find_rows_and_columns_of_a_product():
    rng = np.random.default_rng(1)
    r, c = 2.0 ** rng.integers(-2, 3, 200), 2.0 ** rng.integers(-1, 2, 300)
    w = rng.laplace(size=(200, 300)) * r[:, None] * c * 3
    q = np.clip(np.rint(w) + 128, 0, 255).astype(np.uint8)
    rows, columns = entropy.classes(q, 4)
    for found, wanted in ((rows, r), (columns, c)):
        offset = found - 4 * np.log2(wanted)
        assert np.abs(offset - np.median(offset)).max() <= 2
    # A mean distance of 3 * r * c steps is the context UNIT_CONTEXT + 4 log2 of it.
    expected = entropy.UNIT_CONTEXT + 4 * np.log2(3 * r[:, None] * c)
    assert np.abs(entropy.contexts(rows, columns) - np.clip(expected, 0, entropy.CONTEXTS - 1)).mean() < 1


def test_empty_rows_and_columns_are_class_zero_and_context_zero():
    q = laplace(3)
    q[7], q[:, 5] = 32, 32
    rows, columns = entropy.classes(q, 3)
    assert rows[7] == 0 and columns[5] == 0 and rows[6] > 0 and columns[4] > 0
    assert (entropy.contexts(rows, columns)[7] == 0).all()
    rows, columns = entropy.classes(np.full((3, 4), 32, np.uint8), 3)
    assert not rows.any() and not columns.any()


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_tables_are_frequencies_that_cover_what_was_counted(slices):
    hist = counts_of(laplace(slices), slices)
    tables = Tables.fit(hist, slices)
    for counts, frequency in zip(entropy.digit_counts(hist, slices), tables.frequencies, strict=True):
        assert (frequency.sum(-1) == entropy.TOTAL).all() and (frequency >= 0).all()
        assert (frequency[counts > 0] > 0).all()
    for frequency, packed in zip(tables.frequencies, tables.packed, strict=True):
        starts = packed[..., None] >> np.array([0, 16, 32, 48], np.uint64) & np.uint64(0xFFFF)
        np.testing.assert_array_equal(np.diff(starts.astype(np.int64), prepend=0), frequency)


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_tables_cost_little_above_the_entropy(slices):
    hist = counts_of(laplace(slices, 400, 500), slices) * 50
    tables = Tables.fit(hist, slices)
    bits, weights = entropy.empirical_bits(hist)
    assert weights == hist.sum()
    assert bits <= tables.entropy_bits(hist) <= 1.0005 * bits
    assert 8 * len(tables.to_bytes()) < 0.001 * bits


def test_few_counts_make_small_tables():
    few, many = (Tables.fit(counts_of(laplace(3), 3) * times, 3).to_bytes() for times in (1, 10000))
    assert len(few) < 0.5 * len(many)


def test_empirical_entropy_of_known_counts():
    hist = np.zeros((entropy.CONTEXTS, 4), np.int64)
    hist[3], hist[9, :2] = [8, 4, 2, 2], [5, 5]
    bits, weights = entropy.empirical_bits(hist)
    assert (bits, weights) == (16 * 1.75 + 10, 26)


def test_a_digit_never_seen_among_many_has_no_finite_cost():
    hist = np.zeros((entropy.CONTEXTS, 4), np.int64)
    hist[20, 1:3] = 10**6
    tables = Tables.fit(hist, 1)
    assert tables.entropy_bits(hist) == 2 * 10**6
    hist[20, 0] = 1
    assert math.isinf(tables.entropy_bits(hist))


def test_extreme_counts_keep_every_digit():
    hist = np.zeros((entropy.CONTEXTS, 256), np.int64)
    hist[0] = 1
    hist[0, 128] = hist[47, 0] = 10**12
    hist[47, 255] = 1
    assert math.isfinite(Tables.fit(hist, 4).entropy_bits(hist))


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_table_bytes_round_trip(slices):
    for hist in (counts_of(laplace(slices), slices), np.zeros((entropy.CONTEXTS, 4**slices), np.int64)):
        tables = Tables.fit(hist, slices)
        data = tables.to_bytes()
        again = Tables.from_bytes(memoryview(data), slices, "t")
        np.testing.assert_array_equal(again.angles, tables.angles)
        assert again.to_bytes() == data


def test_table_bytes_that_are_written_out():
    """The example of docs/entropy.md: context 24 with angles 128, 130 and 125."""
    assert Tables.from_bytes(bytes([1, 24, 24, 0b10010000, 0b11100000]), 1, "t").angles[24].tolist() == [128, 130, 125]


def damaged(data):
    yield "empty", b""
    yield "head only", data[:3]
    yield "other slices", bytes([3]) + data[1:]
    yield "contexts out of range", data[:2] + bytes([48]) + data[3:]
    yield "contexts swapped", data[:1] + bytes([data[2] + 1]) + data[2:]
    yield "cut", data[:-1]
    yield "longer", data + b"\0"
    yield "zeros", data[:3] + bytes(len(data) - 3)
    yield "angle out of range", data[:3] + bytes([0, 0, 1, 255]) + data[7:]


def test_damaged_table_bytes_are_refused():
    data = Tables.fit(counts_of(laplace(2), 2), 2).to_bytes()
    for name, bad in damaged(data):
        with pytest.raises(LowtideError, match="^model.bin: .*get the file again"):
            Tables.from_bytes(bad, 2, "model.bin")
            pytest.fail(name)


def test_random_table_bytes_are_refused_or_safe():
    rng = np.random.default_rng(5)
    for _ in range(300):
        data = bytes([2, 20, 20 + rng.integers(0, 3)]) + rng.bytes(int(rng.integers(1, 40)))
        try:
            tables = Tables.from_bytes(data, 2, "t")
        except LowtideError:
            continue
        assert all((f.sum(-1) == entropy.TOTAL).all() and (f >= 0).all() for f in tables.frequencies)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="does not fit 2 slices"):
        entropy.classes(np.full((2, 2), 16, np.uint8), 2)
    with pytest.raises(ValueError, match="uint8"):
        entropy.classes(np.zeros((2, 2), np.int64), 2)
    with pytest.raises(ValueError, match="slices must be 1 to 4"):
        entropy.classes(np.zeros((2, 2), np.uint8), 5)
    with pytest.raises(ValueError, match="counts must have shape"):
        Tables.fit(np.zeros((2, 4), np.int64), 1)
