"""The retrieval structure: every key gets its bits, strangers random ones, and little more than the bits is stored."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from lowtide.fingerprint import hashing, retrieval, ribbon
from lowtide.fingerprint.hashing import hash_ints, hash_texts, mix, parity, trailing_zeros


def make(count, longest=16, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest + 1, count)
    return hash_ints(np.arange(count) * 7, seed), rng.integers(0, 1 << 60, count, dtype=np.uint64), lengths


def stored_bits(structure):
    return 64 * len(structure.words) + 24 * len(structure.lengths)


@pytest.mark.parametrize("count", [0, 1, 2, 33, 700, 9000])
def test_every_key_gets_its_bits(count):
    hashes, values, lengths = make(count)
    lookup = retrieval.build(hashes, values, lengths, 5).lookup(hashes)
    for bit in range(16):
        asked = lengths > bit
        assert (lookup.bit(bit)[asked] == ((values >> np.uint64(bit)) & np.uint64(1))[asked]).all()


def test_overhead_is_a_few_per_cent():
    hashes, values, lengths = make(9000)
    assert stored_bits(retrieval.build(hashes, values, lengths, 5)) < 1.04 * lengths.sum()


def test_strangers_get_random_bits():
    hashes, values, lengths = make(9000)
    lookup = retrieval.build(hashes, values & np.uint64(0), lengths, 5).lookup(hash_ints(np.arange(20000) * 7 + 1, 0))
    bits = np.stack([lookup.bit(b) for b in range(8)])
    assert np.abs(bits.mean(1) - 0.5).max() < 0.02  # 5 standard deviations
    assert np.abs(np.corrcoef(bits) - np.eye(8)).max() < 0.04


def test_equal_seeds_give_equal_bytes_and_others_do_not():
    hashes, values, lengths = make(300)
    one, two, other = (retrieval.build(hashes, values, lengths, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.words, two.words)
    assert np.array_equal(one.seeds, two.seeds)
    assert not np.array_equal(one.words[: len(other.words)], other.words[: len(one.words)])


def test_two_keys_of_one_hash_are_found_out():
    hashes, values, lengths = make(40)
    hashes[3], values[3], lengths[3], lengths[4] = hashes[4], ~values[4], 12, 12
    with pytest.raises(AssertionError, match="same hash"):
        retrieval.build(hashes, values, lengths, 5)


def brute_force(band, start, value, size):
    """Whether a system over GF(2) has a solution, by elimination of whole rows (Python integers)."""
    pivots: dict[int, tuple[int, int]] = {}
    for b, s, v in zip(band.tolist(), start.tolist(), value.tolist(), strict=True):
        row, total = b << s, v
        while row:
            low = (row & -row).bit_length() - 1
            if low not in pivots:
                pivots[low] = row, total
                break
            row, total = row ^ pivots[low][0], total ^ pivots[low][1]
        else:
            if total:
                return False
    return True


@pytest.mark.parametrize("load", [0.9, 0.99, 1.01, 1.2])
def test_systems_are_solved_exactly_when_they_can_be(load):
    rng = np.random.default_rng(int(load * 100))
    systems, size = 40, 96
    count = int(load * size)
    system = np.repeat(np.arange(systems), count)
    start = rng.integers(0, size - ribbon.BAND + 1, systems * count)
    band = rng.integers(0, 1 << 63, systems * count, dtype=np.uint64) * np.uint64(2) | np.uint64(1)
    value = rng.integers(0, 2, systems * count, dtype=np.uint8)
    order = np.lexsort((system, start))
    rows = ribbon.Equations(system[order], start[order], band[order], value[order])
    solution, failed = ribbon.solve(rows, np.full(systems, size), 3)
    for i in range(systems):
        mine = system == i
        possible = brute_force(band[mine], start[mine], value[mine], size)
        # more rows open at once than there are places count as a failure, too
        assert failed[i] or possible
        if load < 1:
            assert failed[i] == (not possible)
        if not failed[i]:
            bits = sum(int(b) << place for place, b in enumerate(solution[i]))
            sums = [
                ((bits >> s) & b).bit_count() & 1
                for s, b in zip(start[mine].tolist(), band[mine].tolist(), strict=True)
            ]
            assert sums == value[mine].tolist()


def test_hashes_of_integers_are_different_and_depend_on_the_seed():
    keys = np.arange(100000)
    assert len(np.unique(hash_ints(keys, 0))) == len(keys)
    assert not (hash_ints(keys, 0) == hash_ints(keys, 1)).any()


def test_hashes_stay_what_they_are():
    """Files depend on them: a change here is a new format version."""
    assert mix(np.array([hashing.GOLDEN], np.uint64)).tolist() == [0xE220A8397B1DCDAF]  # SplitMix64's first of seed 0
    assert hash_ints(np.array([0, 1]), 7).tolist() == [0x2C52BF72D690D3DC, 0x917041D0D109D91E]
    digest = hashlib.blake2b("\u00e9b\u00e9".encode(), digest_size=8, key=(7).to_bytes(8, "little")).digest()
    assert hash_texts(["tide", "\u00e9b\u00e9"], 7).tolist() == [0x6AE7F29E871758CD, int.from_bytes(digest, "little")]


def test_bits_are_counted_as_before_numpy_2(monkeypatch):
    x = mix(np.arange(1000, dtype=np.uint64))
    expected = [v.bit_count() & 1 for v in x.tolist()]
    assert parity(x).tolist() == expected
    monkeypatch.delattr(hashing.np, "bitwise_count", raising=False)
    assert parity(x).tolist() == expected


def test_trailing_zeros():
    powers = np.uint64(1) << np.arange(64, dtype=np.uint64)
    assert trailing_zeros(powers).tolist() == list(range(64))
    assert trailing_zeros(powers | np.uint64(1 << 63)).tolist() == list(range(64))
