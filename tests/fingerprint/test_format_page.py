"""docs/fingerprint.md is enough: a reader written from that page alone, in plain Python, agrees with the codec."""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from lowtide.fingerprint import CodeOptions, TensorOptions, build_store, encode_tensor, pack, unpack
from lowtide.fingerprint.hashing import hash_texts
from lowtide.fingerprint.store import TEXTS

MASK = 2**64 - 1
G = 0x9E3779B97F4A7C15


def mix(x):
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def hash_int(key, seed):
    return mix((mix(key + mix(seed) & MASK)) ^ mix(seed + G & MASK))


def hash_text(text, seed):
    return int.from_bytes(
        hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little"
    )


class Page:
    """A store as the page describes it."""

    def __init__(self, data):
        assert data[:8] == b"LTFPRINT"
        assert hashlib.sha256(data[:-32]).digest() == data[-32:]
        fields = struct.unpack("<HBBIQQQIIQ", data[8:56])
        _, self.kind, columns, rows, self.seed, self.keys, self.universe, self.chunks, meta, corrections = fields
        at = 56 + meta
        self.meta = data[56:at]
        self.table = np.frombuffer(data, "<f4", rows * columns, at).reshape(rows, columns)
        at += 4 * rows * columns
        self.index, self.prints = data[at : at + rows], data[at + rows : at + 2 * rows]
        at += 2 * rows
        self.lengths = struct.unpack(f"<{self.chunks}H", data[at : at + 2 * self.chunks])
        self.seeds = data[at + 2 * self.chunks : at + 3 * self.chunks]
        at += 3 * self.chunks
        at += -at % 8
        size = -(-sum(self.lengths) // 64) * 8
        self.bits = int.from_bytes(data[at : at + size], "little")
        self.corrections = self.elias_fano(data[at + size : -32], corrections)
        self.codes = {}
        code, length = -1, 0
        for row in sorted(range(rows), key=lambda r: (self.index[r], r)):
            code, length = (code + 1) << self.index[row] - length, self.index[row]
            self.codes[length, code] = row

    def elias_fano(self, data, number):
        if not number:
            return []
        low = max(0, (self.universe // number).bit_length() - 1)
        whole = int.from_bytes(data, "little")
        upper = whole >> number * low
        places = [p for p in range(number + (self.universe >> low) + 1) if upper >> p & 1]
        return [(p - i << low) + (whole >> i * low & (1 << low) - 1) for i, p in enumerate(places)]

    def row_of(self, h):
        chunk = (h >> 32) * self.chunks >> 32
        z = h ^ mix(self.seeds[chunk] * G + mix(self.seed) & MASK)
        offset, n = sum(self.lengths[:chunk]), self.lengths[chunk]

        def bit(b):
            u = mix(z + (b + 1) * G & MASK)
            v = mix(u)
            start = (v >> 32) * (n - 63) >> 32
            return ((self.bits >> offset + start & (u | 1)).bit_count() + v) & 1

        code, length = 0, 0
        while (length, code) not in self.codes:
            code, length = code * 2 + bit(length), length + 1
        row = self.codes[length, code]
        expected = mix(h ^ 0xD6E8FEB86659FD93)
        if any(bit(length + i) != expected >> i & 1 for i in range(self.prints[row])):
            return -1
        return row


def test_a_tensor_with_corrections():
    rng = np.random.default_rng(3)
    w = rng.standard_normal((30, 40)) * (rng.random((30, 40)) < 0.3)
    options = TensorOptions(code=CodeOptions(error=0.5, seed=11), corrections=0.7)
    data = pack(encode_tensor(w, model_id="0" * 64, name="x", options=options)[0])
    page = Page(data)
    store = unpack(data, "x")
    found = [-1 if k in page.corrections else page.row_of(hash_int(k, 11)) for k in range(1200)]
    assert found == store.symbols_of(np.arange(1200)).tolist()
    assert len(page.corrections) == len(store.corrections) > 5
    assert page.meta.decode() == '{"model_id":"' + "0" * 64 + '","shape":[30,40],"tensor":"x"}'


def test_texts_over_several_chunks():
    names = [f"n\u00e4me {i}" for i in range(900)]
    symbols = np.random.default_rng(0).geometric(0.5, 900).clip(1, 6) - 1
    table = np.arange(12, dtype=np.float32).reshape(6, 2) - 5
    store = build_store(hash_texts(names, 5), symbols, table, CodeOptions(bits=7, seed=5), strangers=1, kind=TEXTS)
    page = Page(pack(store))
    assert page.chunks > 2
    asked = [*names, *(f"stranger {i}" for i in range(900))]
    assert [page.row_of(hash_text(t, 5)) for t in asked] == store.symbols_of(asked).tolist()
    assert np.array_equal(page.table, store.table)
