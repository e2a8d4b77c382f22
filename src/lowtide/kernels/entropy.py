"""The door to the native entropy coder (csrc/entropy.cpp). docs/entropy.md has the bytes of its streams."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.format.codec import packed_shape, unpack_digits
from lowtide.format.entropy import (
    BASE,
    CONTEXTS,
    MAX_SLICES,
    Tables,
    check_integers,
    copied_rows,
    read_copied_rows,
)
from lowtide.kernels import library, native

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
Buffer = bytes | memoryview | NDArray[np.uint8]

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p
_NO_FREQUENCY, _NO_MEMORY, _NO_ISA = 100, 101, 102
LENGTH_BITS = 29
"""Of a chunk's entry; above them log2 of its states."""
MOST_STATE_BYTES = 64


@cache
def _library() -> ctypes.CDLL:
    lib = library.library()
    lib.lt_entropy_chunk_channels.restype, lib.lt_entropy_chunk_channels.argtypes = _i64, [_i64, _i64]
    shared: list[Any] = [_i64, _i64, _i64, _pointer, _pointer]
    lib.lt_entropy_histogram.restype = None
    lib.lt_entropy_histogram.argtypes = [_pointer, *shared, _pointer]
    lib.lt_entropy_encode.argtypes = [_pointer, *shared, _pointer, _i64, _pointer, _pointer]
    lib.lt_entropy_decode.argtypes = [_pointer, _pointer, *shared, _pointer, _i64, _i64, _pointer, _pointer]
    lib.lt_entropy_decode.argtypes += [ctypes.c_char_p]
    return lib


def histogram(q: U8, row_class: U8, col_class: U8, slices: int) -> I64:
    """How often each integer occurs in each context: int64 [C, 4^S]. Rows that `encode` copies are not counted again.

    Args:
        q: uint8 [out, in], each below 4^S. row_class: uint8 [out]. col_class: uint8 [in].
    """
    q = _checked(q, row_class, col_class, slices)
    stored, _ = copied_rows(q)
    counts = np.zeros((CONTEXTS, 4**slices), np.int64)
    q, rows, columns = _rows_of(q, stored), row_class[stored], np.ascontiguousarray(col_class)
    _library().lt_entropy_histogram(
        q.ctypes.data, *q.shape, slices, rows.ctypes.data, columns.ctypes.data, counts.ctypes.data
    )
    return counts


def encode(q: U8, row_class: U8, col_class: U8, tables: Tables, threads: int = 1) -> list[bytes]:
    """The slices of one matrix, coarsest first, each a stream that decodes once those before it have.

    Args:
        q: uint8 [out, in], each below 4^S. row_class: uint8 [out]. col_class: uint8 [in].

    Raises:
        LowtideError: an integer that the tables were not fitted to, or not enough memory.
    """
    slices = tables.slices
    q = _checked(q, row_class, col_class, slices)
    stored, copies = copied_rows(q)
    q, rows, columns = _rows_of(q, stored), row_class[stored], np.ascontiguousarray(col_class)
    out, inputs = q.shape
    width = _library().lt_entropy_chunk_channels(out, inputs)
    packed = [np.ascontiguousarray(table) for table in tables.packed]
    table_pointers = _pointers(packed)

    def chunk(index: int) -> list[tuple[int, bytes]]:
        room = 2 * out * min(width, inputs - index * width) + MOST_STATE_BYTES
        buffers = np.empty((slices, room), np.uint8)
        entries = (_i64 * slices)()
        failed = _library().lt_entropy_encode(
            *(q.ctypes.data, out, inputs, slices, rows.ctypes.data, columns.ctypes.data, table_pointers, index),
            *(_pointers(list(buffers)), entries),
        )
        if failed == _NO_FREQUENCY:
            raise LowtideError("an integer has no frequency in its table; fit the tables to all matrices they code")
        if failed:
            raise LowtideError("not enough memory to code a matrix; close something")
        sizes = [entry & ((1 << LENGTH_BITS) - 1) for entry in entries]
        return [(entries[s], buffers[s, : sizes[s]].tobytes()) for s in range(slices)]

    chunks = _each(chunk, -(-inputs // width), threads)
    streams = []
    for s in range(slices):
        head = np.array([len(chunks), *(c[s][0] for c in chunks)], "<u4")
        streams.append((b"" if s else copies) + head.tobytes() + b"".join(c[s][1] for c in chunks))
    return streams


def decode(
    streams: Sequence[Buffer],
    row_class: U8,
    col_class: U8,
    tables: Tables,
    out: int,
    inputs: int,
    threads: int,
    packed_out: U8,
    where: str = "graded weights",
    isa: str | None = None,
) -> None:
    """The first len(streams) slices of one matrix, written in the packed layout of `lowtide.format.codec`.

    Args:
        streams: what `encode` made, the first L of S slices.
        threads: that share the matrix' chunks.
        packed_out: uint8 [S, in * out_pad / 4], contiguous along its last axis; slices L.. become zero.
        where: names the weights in errors.
        isa: instruction set; by default what LOWTIDE_ISA names, else the best.

    Raises:
        LowtideError: a stream that `encode` did not make of such a matrix.
    """
    levels = len(streams)
    if not 1 <= levels <= tables.slices:
        raise ValueError(f"streams must be 1 to {tables.slices}, not {levels}")
    if packed_out.dtype != np.uint8 or packed_out.shape != packed_shape(out, inputs, tables.slices):
        raise ValueError(f"packed_out is {packed_out.dtype} {packed_out.shape}, not uint8 for [{out}, {inputs}]")
    if packed_out.strides[1] != 1 or not packed_out.flags.writeable:
        raise ValueError("packed_out must be writeable, and each slice contiguous")
    _check_classes(row_class, col_class, out, inputs)
    data = [np.frombuffer(stream, np.uint8) for stream in streams]
    stored, source, used = read_copied_rows(data[0], out, where)
    data[0] = data[0][used:]
    rows, columns = row_class[stored], np.ascontiguousarray(col_class)
    sources = source.astype(np.uint32) if len(stored) < out else None
    sizes = (_i64 * levels)(*(len(d) for d in data))
    packed = [np.ascontiguousarray(table) for table in tables.packed]
    pointers = _pointers(data), _pointers(packed), _pointers(list(packed_out))
    wanted = isa or os.environ.get("LOWTIDE_ISA") or None

    def chunk(index: int) -> None:
        failed = _library().lt_entropy_decode(
            *(pointers[0], sizes, levels, len(stored), inputs, rows.ctypes.data, columns.ctypes.data, pointers[1]),
            *(index, out, None if sources is None else sources.ctypes.data, pointers[2]),
            wanted.encode() if wanted else None,
        )
        if failed == _NO_ISA:
            found = ", ".join(native.available_isas())
            raise LowtideError(f"LOWTIDE_ISA={wanted}: not available on this machine; it has {found}")
        if failed == _NO_MEMORY:
            raise LowtideError(f"{where}: not enough memory to decode it; close something")
        if failed:
            raise LowtideError(f"{where}: the coded weights are damaged; get the file again")

    _each(chunk, -(-inputs // _library().lt_entropy_chunk_channels(len(stored), inputs)), threads)
    packed_out[levels:] = 0


def decode_q(
    streams: Sequence[Buffer],
    row_class: U8,
    col_class: U8,
    tables: Tables,
    out: int,
    inputs: int,
    threads: int = 1,
    where: str = "graded weights",
    isa: str | None = None,
) -> U8:
    """As `decode`, but the integers uint8 [out, in]; the digits of slices not given are 0."""
    packed: U8 = np.empty(packed_shape(out, inputs, tables.slices), np.uint8)
    decode(streams, row_class, col_class, tables, out, inputs, threads, packed, where, isa)
    return unpack_digits(packed, out, inputs, tables.slices)


def encode_classes(vectors: Sequence[U8], kinds: Sequence[int]) -> bytes:
    """Class bytes of many matrices in one stream: the same code again, its contexts the vectors' kinds.

    Args:
        vectors: uint8 [n] each. kinds: 0 to CONTEXTS - 1 for each vector; those of one kind share tables.
    """
    values, rows = _joined([np.asarray(v) for v in vectors], kinds)
    if not values.size:
        return b""
    column = np.array([BASE], np.uint8)
    tables = Tables.fit(histogram(values[:, None], rows, column, MAX_SLICES), MAX_SLICES)
    parts = [tables.to_bytes(), *encode(values[:, None], rows, column, tables)]
    return np.array([len(p) for p in parts], "<u4").tobytes() + b"".join(parts)


def decode_classes(data: Buffer, lengths: Sequence[int], kinds: Sequence[int], where: str) -> list[U8]:
    """Inverse of `encode_classes`; lengths are those of the vectors.

    Raises:
        LowtideError: bytes that `encode_classes` did not make of such vectors; it names `where`.
    """
    data = bytes(data)
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if not total and not data:
        return [np.zeros(0, np.uint8) for _ in lengths]
    head = 4 * (1 + MAX_SLICES)
    sizes = np.frombuffer(data[:head], "<u4").astype(np.int64) if len(data) >= head else np.zeros(1, np.int64)
    if not total or head + int(sizes.sum()) != len(data):
        raise LowtideError(f"{where}: the classes of rows and columns have the wrong length; get the file again")
    cuts = head + np.concatenate([[0], np.cumsum(sizes)])
    parts = [data[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    _, rows = _joined([np.zeros(n, np.uint8) for n in lengths], kinds)
    tables = Tables.from_bytes(parts[0], MAX_SLICES, where)
    values = decode_q(parts[1:], rows, np.array([BASE], np.uint8), tables, total, 1, where=where)[:, 0]
    return [values[end - n : end] for end, n in zip(ends, lengths, strict=True)]


def _joined(vectors: list[U8], kinds: Sequence[int]) -> tuple[U8, U8]:
    if any(not 0 <= kind < CONTEXTS for kind in kinds):
        raise ValueError(f"kinds must be 0 to {CONTEXTS - 1}")
    rows = np.repeat(np.array(kinds, np.uint8), [len(v) for v in vectors])
    return np.concatenate([*vectors, np.zeros(0, np.uint8)]), rows


def _checked(q: U8, row_class: U8, col_class: U8, slices: int) -> U8:
    check_integers(q, slices)
    _check_classes(row_class, col_class, *q.shape)
    return np.ascontiguousarray(q)


def _check_classes(row_class: U8, col_class: U8, out: int, inputs: int) -> None:
    if out < 1 or inputs < 1:
        raise ValueError(f"a matrix of {out} rows and {inputs} channels has no code")
    for name, found, length in (("row_class", row_class, out), ("col_class", col_class, inputs)):
        if found.dtype != np.uint8 or found.shape != (length,):
            raise ValueError(f"{name} must be uint8 [{length}], not {found.dtype} {found.shape}")


def _rows_of(q: U8, stored: I64) -> U8:
    return q if len(stored) == len(q) else q[stored]


def _pointers(arrays: Sequence[NDArray[Any]]) -> Any:
    return (_pointer * len(arrays))(*(a.ctypes.data for a in arrays))


def _each(work: Callable[[int], Any], count: int, threads: int) -> list[Any]:
    if min(threads, count) <= 1:
        return [work(n) for n in range(count)]
    with ThreadPoolExecutor(min(threads, count)) as pool:
        return list(pool.map(work, range(count)))
