"""The safetensors container, written and read by our own few lines.

Reading validates everything the safetensors library does and what it lets pass (duplicate keys, misalignment), and
leaves the data in place so that tensors can be memory-mapped. Writing chooses an order that aligns tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowtide.errors import LowtideError
from lowtide.format.strictjson import parse_object, short

#: safetensors dtype -> numpy dtype, little-endian; the only ones an artifact uses.
DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}

DATA_ALIGNMENT = 64
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
METADATA = {"format": "lowtide"}


@dataclass(frozen=True)
class TensorSpan:
    """Where a tensor lies: bytes start..stop of the file's data part."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def dtype_code(dtype: np.dtype[Any]) -> str:
    """safetensors name of a numpy dtype; ValueError for one that an artifact does not use."""
    try:
        return _CODES[np.dtype(dtype).newbyteorder("<")]
    except KeyError:
        raise ValueError(f"dtype {dtype} is not stored; use one of {', '.join(DTYPES)}") from None


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Size of a tensor, in Python integers that cannot overflow."""
    size = DTYPES[dtype].itemsize
    for length in shape:
        size *= length
    return size


def plan(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorSpan]:
    """Place tensors one after another, without holes, so that each is aligned.

    Two-dimensional U8 tensors (packed weights) come first, those of a multiple of 64 bytes leading, so those start at a
    multiple of 64; the rest follows by falling element size, so each is aligned to its own elements.
    """

    def rank(item: tuple[str, tuple[str, tuple[int, ...]]]) -> tuple[int, int]:
        dtype, shape = item[1]
        if dtype == "U8" and len(shape) == 2:
            return (0, int(tensor_bytes(dtype, shape) % DATA_ALIGNMENT != 0))
        return (1, -DTYPES[dtype].itemsize)

    return sequence(dict(sorted(tensors.items(), key=rank)))


def sequence(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorSpan]:
    """Place tensors one after another, without holes, in the order given."""
    spans, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        stop = offset + tensor_bytes(dtype, shape)
        spans[name] = TensorSpan(dtype, shape, offset, stop)
        offset = stop
    return spans


def encode_header(spans: dict[str, TensorSpan]) -> bytes:
    """Length prefix and JSON header, padded with spaces so that the data starts at a multiple of 64 bytes."""
    header: dict[str, Any] = {"__metadata__": METADATA}
    for name, span in spans.items():
        header[name] = {"dtype": span.dtype, "shape": list(span.shape), "data_offsets": [span.start, span.stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


FIELDS = {"dtype", "shape", "data_offsets"}


def parse_header(data: memoryview, where: str, whole: bool = True) -> tuple[int, dict[str, TensorSpan]]:
    """Read and check the header of a safetensors file.

    Args:
        data: the whole file.
        where: its name, for errors.
        whole: False for the beginning of a file, whose last tensors may be missing.

    Returns:
        Offset of the data part in the file, and every tensor's span in file order.

    Raises:
        LowtideError: truncated, not JSON, duplicate keys, unknown dtype, sizes that do not multiply out, overlapping,
            leaving holes, misaligned, or not ending with the file.
    """
    if len(data) < 8:
        raise LowtideError(f"{where}: truncated; {len(data)} bytes are too few for a safetensors header")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise LowtideError(f"{where}: header of {length} bytes does not fit the file of {len(data)} bytes")
    text = bytes(data[8 : 8 + length])
    if not text.startswith(b"{"):
        raise LowtideError(f"{where}: header does not start with '{{'")
    header = parse_object(text, f"{where} header")
    if header.pop("__metadata__", None) != METADATA:
        raise LowtideError(f"{where}: header has no __metadata__ that says format lowtide")
    spans = {name: _parse_span(name, entry, where) for name, entry in header.items()}
    ordered = dict(sorted(spans.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_contiguous(ordered, 8 + length, len(data) if whole else None, where)
    return 8 + length, ordered


def _parse_span(name: str, entry: Any, where: str) -> TensorSpan:
    problem = _problem(entry)  # words are made only for what is wrong: a model has thousands of tensors
    if problem:
        raise LowtideError(f"{where}: tensor {short(name)}: {problem}")
    first, last = entry["data_offsets"]
    return TensorSpan(entry["dtype"], tuple(entry["shape"]), first, last)


def _problem(entry: object) -> str | None:
    """What is wrong with a tensor's entry; None if nothing is."""
    if not isinstance(entry, dict) or entry.keys() != FIELDS:
        return "entry must hold dtype, shape and data_offsets and nothing else"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {short(dtype)} is not one of {', '.join(DTYPES)}"
    if not _is_counts(shape) or len(shape) > 3:
        return f"shape {short(shape)} is not a list of up to three counts"
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {short(offsets)} are not two rising counts"
    if offsets[1] - offsets[0] != tensor_bytes(dtype, shape):
        return f"{dtype} {short(shape)} does not take {offsets[1] - offsets[0]} bytes"
    return None


def _check_contiguous(spans: dict[str, TensorSpan], data_start: int, file_bytes: int | None, where: str) -> None:
    position = 0
    for name, span in spans.items():
        if span.start != position:
            problem = "overlaps the one before" if span.start < position else "leaves a hole before it"
            raise LowtideError(f"{where}: tensor {short(name)}: {problem} (starts at {span.start}, not {position})")
        if (data_start + span.start) % DTYPES[span.dtype].itemsize:
            raise LowtideError(f"{where}: tensor {short(name)}: not aligned to its {span.dtype} elements")
        position = span.stop
    if file_bytes is not None and data_start + position != file_bytes:
        raise LowtideError(f"{where}: tensors end at byte {data_start + position}, the file at {file_bytes}")


def _is_counts(value: object) -> bool:
    if type(value) is not list:
        return False
    for item in value:  # noqa: SIM110 - a generator would cost as much again
        if type(item) is not int or not 0 <= item < 1 << 53:
            return False
    return True
