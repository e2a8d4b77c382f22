"""The bytes of a store, and their careful reading. docs/fingerprint.md specifies them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.fingerprint import eliasfano
from lowtide.fingerprint.code import MAX_FINGERPRINT, MAX_INDEX_BITS, Code
from lowtide.fingerprint.hashing import MAX_INT_KEY
from lowtide.fingerprint.retrieval import Retrieval
from lowtide.fingerprint.ribbon import BAND
from lowtide.fingerprint.store import INTS, MAX_COLUMNS, TEXTS, Store
from lowtide.fingerprint.table import MAX_TABLE
from lowtide.format.strictjson import parse_object

MAGIC = b"LTFPRINT"
VERSION = 1
_HEAD = struct.Struct("<8sHBBIQQQIIQ")
"""Magic, version, kind, columns, rows of the table, seed, keys, universe, chunks, bytes of meta, corrections."""
_DIGEST = 32
MAX_META = 1 << 20
MAX_CHUNKS = 1 << 28


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parts of a file; `header` includes meta, padding and the digest."""

    header: int
    table: int
    directory: int
    payload: int
    corrections: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.header + self.table + self.directory + self.payload + self.corrections


@dataclass(frozen=True)
class _Head:
    kind: int
    columns: int
    rows: int
    seed: int
    count: int
    universe: int
    chunks: int
    meta: int
    corrections: int


def pack(store: Store) -> bytes:
    """The file."""
    compact = json.dumps(store.meta, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    meta = compact.encode() if store.meta else b""
    if len(meta) > MAX_META:
        raise LowtideError(f"meta data of {len(meta)} bytes: at most {MAX_META} are possible")
    bits = store.bits
    head = _HEAD.pack(
        MAGIC,
        VERSION,
        store.kind,
        store.table.shape[1],
        len(store.table),
        bits.seed,
        store.count,
        store.universe,
        len(bits.lengths),
        len(meta),
        len(store.corrections),
    )
    parts = [head, meta, store.table.astype("<f4").tobytes()]
    parts += [store.code.index_bits.tobytes(), store.code.fingerprint_bits.tobytes()]
    parts += [bits.lengths.astype("<u2").tobytes(), bits.seeds.tobytes()]
    parts.append(bytes(-sum(map(len, parts)) % 8))
    parts.append(bits.words.astype("<u8").tobytes())
    if len(store.corrections):
        parts.append(eliasfano.encode(store.corrections, store.universe))
    body = b"".join(parts)
    return body + hashlib.sha256(body).digest()


def sizes(store: Store) -> Sizes:
    """Where the bytes of `pack(store)` go."""
    total = len(pack(store))
    rows, chunks = len(store.table), len(store.bits.lengths)
    table = rows * (4 * store.table.shape[1] + 2)
    payload = 8 * len(store.bits.words)
    wrong = eliasfano.encoded_bytes(len(store.corrections), store.universe) if len(store.corrections) else 0
    return Sizes(total - table - 3 * chunks - payload - wrong, table, 3 * chunks, payload, wrong)


def unpack(data: NDArray[np.uint8] | bytes, where: str) -> Store:
    """A store over the bytes, which are kept, not copied (they may be memory-mapped). `where` names them in errors.

    Raises:
        LowtideError: damaged, cut short, of a newer version, or not a store; nothing of it has been used then.
    """
    raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    head = _read_head(raw, where)
    reader = _Reader(raw, _HEAD.size, where)
    meta = reader.take(head.meta, "u1").tobytes()
    table = reader.take(head.rows * head.columns, "<f4").reshape(head.rows, head.columns)
    index_bits = reader.take(head.rows, "u1")
    print_bits = reader.take(head.rows, "u1")
    lengths = reader.take(head.chunks, "<u2")
    seeds = reader.take(head.chunks, "u1")
    if reader.take(-reader.place % 8, "u1").any():
        raise LowtideError(f"{where}: its padding is not zero; make the file again")
    words = reader.take(-(-int(lengths.sum(dtype=np.int64)) // 64), "<u8")
    wrong = reader.take(eliasfano.encoded_bytes(head.corrections, head.universe) if head.corrections else 0, "u1")
    if reader.place != len(raw) - _DIGEST:
        raise LowtideError(f"{where}: {len(raw)} bytes where {reader.place + _DIGEST} belong; make the file again")
    _check_table(table, index_bits, print_bits, where)
    if lengths.min() < BAND:
        raise LowtideError(f"{where}: a chunk of less than {BAND} bits; make the file again")
    tail = int(lengths.sum(dtype=np.int64)) % 64
    if tail and int(words[-1]) >> tail:
        raise LowtideError(f"{where}: bits beyond the last chunk; make the file again")
    return Store(
        head.kind,
        head.count,
        head.universe,
        table,
        Code(index_bits, print_bits),
        Retrieval(head.seed, lengths, seeds, words),
        eliasfano.decode(wrong.tobytes(), head.corrections, head.universe, where)
        if head.corrections
        else np.zeros(0, np.int64),
        parse_object(meta, where) if meta else {},
    )


class _Reader:
    """Takes arrays off the bytes, one after another, never beyond the digest."""

    def __init__(self, raw: NDArray[np.uint8], place: int, where: str) -> None:
        self.raw, self.place, self.where = raw, place, where

    def take(self, count: int, dtype: str) -> NDArray[Any]:
        """The next `count` elements."""
        kind = np.dtype(dtype)
        end = self.place + count * kind.itemsize
        if end > len(self.raw) - _DIGEST:
            raise LowtideError(f"{self.where}: is cut short; get or make the file again")
        part = np.frombuffer(self.raw[self.place : end], kind) if count else np.zeros(0, kind)
        self.place = end
        return part


def _read_head(raw: NDArray[np.uint8], where: str) -> _Head:
    if len(raw) < _HEAD.size + _DIGEST or raw[:8].tobytes() != MAGIC:
        raise LowtideError(f"{where}: not a lowtide fingerprint store")
    fields = _HEAD.unpack(raw[: _HEAD.size].tobytes())
    if fields[1] > VERSION:
        raise LowtideError(f"{where}: format version {fields[1]}; this lowtide reads up to {VERSION}, get a newer one")
    if hashlib.sha256(raw[:-_DIGEST].data).digest() != raw[-_DIGEST:].tobytes():
        raise LowtideError(f"{where}: is damaged (its SHA-256 does not match); get or make the file again")
    head = _Head(*fields[2:])
    problems = {
        "version": fields[1] < 1,
        "kind": head.kind not in (INTS, TEXTS),
        "columns": not 1 <= head.columns <= MAX_COLUMNS,
        "table size": not 1 <= head.rows <= MAX_TABLE,
        "seed": head.seed >= 1 << 63,
        "number of keys": not 1 <= head.count <= (head.universe if head.kind == INTS else MAX_INT_KEY),
        "universe": head.universe > MAX_INT_KEY or (head.kind == TEXTS and head.universe != 0),
        "number of chunks": not 1 <= head.chunks <= MAX_CHUNKS,
        "meta length": head.meta > MAX_META,
        "number of corrections": head.corrections > (head.universe - head.count if head.kind == INTS else 0),
    }
    for name, wrong in problems.items():
        if wrong:
            raise LowtideError(f"{where}: its {name} is out of range; make the file again")
    return head


def _check_table(
    table: NDArray[np.float32], index_bits: NDArray[np.uint8], print_bits: NDArray[np.uint8], where: str
) -> None:
    if not np.isfinite(table).all():
        raise LowtideError(f"{where}: a weight of its table is not finite; make the file again")
    longest = int(index_bits.max())
    # a complete prefix code: the shares of all codes add up to the whole
    whole = longest <= MAX_INDEX_BITS and int((1 << (longest - index_bits.astype(np.int64))).sum()) == 1 << longest
    if not whole or (len(table) == 1 and longest != 0):
        raise LowtideError(f"{where}: its index code is not a complete prefix code; make the file again")
    if print_bits.max() > MAX_FINGERPRINT:
        raise LowtideError(f"{where}: a fingerprint of more than {MAX_FINGERPRINT} bits; make the file again")


def describe(store: Store) -> Mapping[str, Any]:
    """Figures for people: keys, bytes, bits per key, where they go, chance of a false positive."""
    parts = sizes(store)
    return {
        "keys": store.count,
        "bytes": parts.total,
        "bits_per_key": 8 * parts.total / store.count,
        "table_rows": len(store.table),
        "columns": store.table.shape[1],
        "fingerprint_bits": [int(store.code.fingerprint_bits.min()), int(store.code.fingerprint_bits.max())],
        "false_positive_rate": store.false_rate(),
        "corrections": len(store.corrections),
        "bytes_of": {
            "header": parts.header,
            "table": parts.table,
            "directory": parts.directory,
            "payload": parts.payload,
            "corrections": parts.corrections,
        },
    }
