"""The entropy coder in plain numpy: the specification that csrc/entropy.cpp matches byte for byte. Slow; for tests.

rANS after J. Duda, "Asymmetric numeral systems" (arXiv:1311.2540), states interleaved after F. Giesen, "Interleaved
entropy coders" (arXiv:1402.3392). Row i of a channel belongs to lane i mod the number of lanes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.format.entropy import PROB_BITS, TOTAL, Tables, contexts, copied_rows, read_copied_rows

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]

LANES = 16
"""States of a chunk and slice, at most; with few words fewer: 8, 4, 2 or 1."""
BYTES_PER_STATE = 800
LENGTH_BITS = 29
LOW = 1 << 16
CHUNK_WEIGHTS = 1 << 20


def chunk_channels(out: int, inputs: int) -> int:
    """Channels of every chunk but the last: at most CHUNK_WEIGHTS weights, at least one channel, evenly shared."""
    count = -(-inputs // max(1, CHUNK_WEIGHTS // out))
    return -(-inputs // count)


def chunks(out: int, inputs: int) -> list[tuple[int, int]]:
    """(first channel, channel after the last) of each chunk."""
    width = chunk_channels(out, inputs)
    return [(first, min(first + width, inputs)) for first in range(0, inputs, width)]


def encode(q: U8, row_class: U8, col_class: U8, tables: Tables) -> list[bytes]:
    """As `lowtide.kernels.entropy.encode`."""
    stored, copies = copied_rows(q)
    context = contexts(row_class[stored], col_class).astype(np.int64)
    known = [q[stored].astype(np.int64) >> 2 * (tables.slices - 1 - s) for s in range(tables.slices)]
    spans = chunks(*context.shape)
    coded = [_encode_chunk([k[:, a:b] for k in known], context[:, a:b], tables.frequencies) for a, b in spans]
    streams = []
    for s in range(tables.slices):
        parts = [chunk[s] for chunk in coded]
        head = np.array([len(parts), *(entry for entry, _ in parts)], "<u4").tobytes()
        streams.append(head + b"".join(data for _, data in parts))
    streams[0] = copies + streams[0]
    return streams


def _steps(shape: tuple[int, ...], lanes: int) -> Iterator[tuple[int, slice]]:
    """(channel, rows) of each step of up to `lanes` weights, in the order of decoding."""
    out, channels = shape
    for channel in range(channels):
        for first in range(0, out, lanes):
            yield channel, slice(first, min(first + lanes, out))


def _encode_chunk(known: list[I64], context: I64, frequencies: list[I64]) -> list[tuple[int, bytes]]:
    """(entry in the stream's head, states and words) of every slice. known int64 [out, channels] for each: the digits
    up to it as one integer, the last one to be coded."""
    lanes, data = LANES, [_encode_lanes(k, context, f, LANES) for k, f in zip(known, frequencies, strict=True)]
    while lanes > 1 and sum(len(d) - 4 * LANES for d in data) < lanes * len(data) * BYTES_PER_STATE:
        lanes //= 2
    if lanes < LANES:
        data = [_encode_lanes(k, context, f, lanes) for k, f in zip(known, frequencies, strict=True)]
    return [(len(d) | (lanes.bit_length() - 1) << LENGTH_BITS, d) for d in data]


def _encode_lanes(known: I64, context: I64, frequencies: I64, lanes: int) -> bytes:
    state = np.full(lanes, LOW, np.int64)
    words: list[int] = []
    for channel, rows in reversed(list(_steps(known.shape, lanes))):
        prefix, digit = known[rows, channel] >> 2, known[rows, channel] & 3
        table = frequencies[context[rows, channel], prefix]
        frequency = np.take_along_axis(table, digit[:, None], 1)[:, 0]
        start = np.take_along_axis(table.cumsum(1) - table, digit[:, None], 1)[:, 0]
        if (frequency == 0).any():
            raise LowtideError("an integer has no frequency in its table; fit the tables to all matrices they code")
        x = state[: len(digit)]
        full = x >= frequency << (32 - PROB_BITS)
        words += (x[full] & 0xFFFF).tolist()[::-1]
        x = np.where(full, x >> 16, x)
        state[: len(digit)] = (x // frequency << PROB_BITS) + x % frequency + start
    return state.astype("<u4").tobytes() + np.array(words[::-1], "<u2").tobytes()


def decode_q(
    streams: Sequence[bytes],
    row_class: U8,
    col_class: U8,
    tables: Tables,
    out: int,
    inputs: int,
    where: str = "graded weights",
) -> U8:
    """As `lowtide.kernels.entropy.decode_q`."""
    stored, source, used = read_copied_rows(streams[0], out, where)
    context = contexts(row_class[stored], col_class).astype(np.int64)
    known = np.zeros(context.shape, np.int64)
    spans = chunks(*context.shape)
    for s, stream in enumerate([streams[0][used:], *streams[1:]]):
        parts = _split(stream, len(spans))
        if parts is None or not all(
            _decode_chunk(lanes, part, known[:, a:b], context[:, a:b], tables.frequencies[s])
            for (lanes, part), (a, b) in zip(parts, spans, strict=True)
        ):
            raise LowtideError(f"{where}: the coded weights are damaged; get the file again")
    return (known[source] << 2 * (tables.slices - len(streams))).astype(np.uint8)


def _split(stream: bytes, count: int) -> list[tuple[int, bytes]] | None:
    """(lanes, states and words) of the chunks of one slice's stream, or None where its head does not fit."""
    if len(stream) < 4 + 4 * count:
        return None
    head = np.frombuffer(stream, "<u4", 1 + count).astype(np.int64)
    lengths, doublings = head[1:] & ((1 << LENGTH_BITS) - 1), head[1:] >> LENGTH_BITS
    cuts = 4 + 4 * count + np.concatenate([[0], np.cumsum(lengths)])
    if head[0] != count or cuts[-1] != len(stream) or (1 << doublings > LANES).any():
        return None
    return [(1 << int(n), stream[a:b]) for n, a, b in zip(doublings, cuts, cuts[1:], strict=False)]


def _decode_chunk(lanes: int, data: bytes, known: I64, context: I64, frequencies: I64) -> bool:
    """Appends the slice's digits to known int64 [out, channels]; False where the data do not fit."""
    if len(data) < 4 * lanes or len(data) % 2:
        return False
    state = np.frombuffer(data, "<u4", lanes).astype(np.int64)
    words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.int64)
    if (state < LOW).any():
        return False
    at = 0
    for channel, rows in _steps(known.shape, lanes):
        table = frequencies[context[rows, channel], known[rows, channel]]
        x, ends = state[: len(table)], table.cumsum(1)
        slot = x & (TOTAL - 1)
        digit = (slot[:, None] >= ends[:, :3]).sum(1)
        frequency = np.take_along_axis(table, digit[:, None], 1)[:, 0]
        start = np.take_along_axis(ends - table, digit[:, None], 1)[:, 0]
        x = frequency * (x >> PROB_BITS) + slot - start
        refill = x < LOW
        taken = words[at : at + int(refill.sum())]
        if len(taken) < refill.sum():
            return False
        x[refill] = x[refill] << 16 | taken
        at += len(taken)
        state[: len(table)] = x
        known[rows, channel] = known[rows, channel] << 2 | digit
    return at == len(words) and bool((state == LOW).all())
