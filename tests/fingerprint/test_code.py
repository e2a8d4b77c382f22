"""The law of lengths, the prefix code, the table of weights, and the list of ascending numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lowtide.errors import LowtideError
from lowtide.fingerprint import eliasfano
from lowtide.fingerprint.code import MAX_INDEX_BITS, code_for, constant_for, index_lengths, uniform_code
from lowtide.fingerprint.store import CodeOptions
from lowtide.fingerprint.table import lloyd_table, uniform_table


def test_fingerprints_grow_by_two_bits_for_each_doubling_of_the_weight():
    weights = 2.0 ** np.arange(-3, 4)
    code = code_for(np.full(7, 100), weights**2, 12.0)
    total = code.total
    assert np.diff(total).tolist() == [2] * 6


def test_lengths_are_the_best_of_all_for_their_false_energy():
    """Against every assignment of lengths to four weights: none has fewer bits and no more false energy."""
    counts, energy = np.array([50, 20, 20, 10]), np.array([0.3, 1.0, 4.0, 20.0])
    for constant in (5.0, 6.3, 7.1):
        code = code_for(counts, energy, constant)
        bits = int((counts * code.total).sum())
        false = float((code.match_probability() * energy).sum())
        for prints in itertools.product(range(12), repeat=4):
            total = code.index_bits.astype(int) + prints
            if (counts * total).sum() < bits:
                assert (0.5 ** total.astype(float) * energy).sum() > false


def test_the_constant_keeps_the_false_energy_below_the_limit():
    rng = np.random.default_rng(0)
    counts, energy = rng.integers(1, 1000, 16), rng.exponential(1, 16)
    for limit in (0.5, 0.01, 1e-4):
        constant = constant_for(counts, energy, 5000.0, limit)
        false = [
            5000 * (code_for(counts, energy, c).match_probability() * energy).sum() for c in (constant, constant - 1)
        ]
        assert false[0] <= limit * (counts * energy).sum() < false[1]


def test_index_codes_are_complete_and_within_a_bit_of_the_entropy():
    counts = np.array([1000, 300, 100, 30, 10, 3, 1])
    lengths = index_lengths(counts)
    assert sum(2.0 ** -lengths.astype(float)) == 1
    share = counts / counts.sum()
    assert (share * lengths).sum() < -(share * np.log2(share)).sum() + 1


def test_index_codes_are_never_deeper_than_the_format_allows():
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = index_lengths(np.array(fibonacci))
    assert lengths.max() <= MAX_INDEX_BITS
    assert sum(2.0 ** -lengths.astype(float)) == 1


def test_one_weight_needs_no_index():
    assert index_lengths(np.array([9])).tolist() == [0]
    assert uniform_code(np.array([9]), 5).total.tolist() == [5]


@pytest.mark.parametrize(
    "options", [{"error": 0}, {"error": float("nan")}, {"constant": 1.0, "bits": 3}, {"bits": 33}, {"seed": -1}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(LowtideError):
        CodeOptions(**options)


def test_a_table_of_least_squares_beats_uniform_steps():
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    table, indices = lloyd_table(values, 16)
    error = np.square(table[indices, 0] - values).mean()
    assert table.shape == (16, 1)
    assert error < 0.0101  # the best of 16 levels for a Gaussian is 0.0095 (Max 1960)
    nearest = np.abs(values[:, None] - table[:, 0]).argmin(1)
    assert np.square(table[nearest, 0] - values).mean() == pytest.approx(error, rel=1e-6)


def test_few_different_values_stay_as_they_are():
    values = np.array([3, -1, 3, 0.5], np.float32)
    table, indices = lloyd_table(values, 4)
    assert (table[indices, 0] == values).all()


def test_weights_draw_the_table():
    values = np.linspace(0, 1, 1000).astype(np.float32)
    even, _ = lloyd_table(values, 4)
    table, _ = lloyd_table(values, 4, np.where(values < 0.2, 1000.0, 1.0))
    assert (even[:, 0] < 0.25).sum() == 1
    assert (table[:, 0] < 0.25).sum() >= 3


def test_uniform_tables_hold_the_mean_of_each_cell():
    values = np.array([0.9, 1.1, 1.3, -2.2], np.float32)
    table, indices = uniform_table(values, 1.0)
    assert table[indices, 0] == pytest.approx([1.1, 1.1, 1.1, -2.2])


@pytest.mark.parametrize(("size", "step"), [(0, None), (4097, None), (None, 0.0), (None, float("nan")), (None, 1e-9)])
def test_impossible_tables_are_refused(size, step):
    values = np.linspace(-1, 1, 9999).astype(np.float32)
    with pytest.raises(LowtideError):
        lloyd_table(values, size) if step is None else uniform_table(values, step)


@pytest.mark.parametrize(("count", "limit"), [(0, 9), (1, 1), (9, 9), (5, 1 << 40), (1000, 5000), (1000, 1 << 20)])
def test_ascending_numbers_come_back(count, limit):
    rng = np.random.default_rng(count)
    numbers = np.sort(rng.choice(limit, count, replace=False)) if limit < 1 << 30 else np.arange(count) * (limit // 6)
    data = eliasfano.encode(numbers.astype(np.int64), limit)
    assert len(data) == eliasfano.encoded_bytes(count, limit)
    assert eliasfano.decode(data, count, limit, "x").tolist() == numbers.tolist()
    assert len(data) * 8 <= count * (2 + np.log2(max(1, limit / max(1, count)))) + 16 + limit // max(1, count)


def test_damaged_numbers_are_refused():
    numbers = np.array([3, 4, 90])
    data = bytearray(eliasfano.encode(numbers, 100))
    refused = 0
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        try:
            assert eliasfano.decode(bytes(data), 3, 100, "x").tolist() != numbers.tolist()
        except LowtideError:
            refused += 1
        data[bit // 8] ^= 1 << bit % 8
    assert refused > len(data) * 2
