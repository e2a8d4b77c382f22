"""Tensors on their way into a file: written out as they come, so that memory holds one of them at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.format import layout

CHUNK = 1 << 23


class Spool:
    """A temporary file of tensors in the order in which they came.

    Attributes:
        tensors: name -> (dtype, shape).
        hashes: name -> SHA-256 of the tensor's bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.hashes: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        self._size = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Append a tensor; ValueError if the name is taken or the dtype is not one that artifacts use."""
        if name in self.tensors:
            raise ValueError(f"tensor {name} is added twice")
        code = layout.dtype_code(array.dtype)
        data = np.ascontiguousarray(array, layout.DTYPES[code]).reshape(-1).view(np.uint8).data
        write_all(self._file, data)
        self.tensors[name] = (code, tuple(array.shape))
        self.hashes[name] = hashlib.sha256(data).hexdigest()
        self._starts[name] = self._size
        self._size += len(data)

    def read(self, name: str) -> NDArray[Any]:
        """A tensor again, as a copy in memory."""
        dtype, shape = self.tensors[name]
        size = layout.tensor_bytes(dtype, shape)
        parts = list(self.pieces(name))
        if sum(map(len, parts)) != size:
            raise OSError(f"{self.path.name} was cut short")
        whole = np.frombuffer(bytearray().join(parts), layout.DTYPES[dtype])
        return whole.reshape(shape)

    def pieces(self, name: str) -> Iterable[bytes]:
        """A tensor's bytes in pieces; OSError if the file was cut short."""
        start, left = self._starts[name], layout.tensor_bytes(*self.tensors[name])
        while left:
            piece = os.pread(self._file, min(left, CHUNK), start)
            if not piece:
                raise OSError(f"{self.path.name} was cut short")
            yield piece
            start, left = start + len(piece), left - len(piece)

    def pour(self, spans: dict[str, layout.TensorSpan], sink: Callable[[memoryview], object]) -> None:
        """Hand header and tensors of a safetensors file to `sink`, piece by piece."""
        sink(memoryview(layout.encode_header(spans)))
        for name in spans:
            for piece in self.pieces(name):
                sink(memoryview(piece))

    def close(self) -> None:
        """Close and delete the file; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self.path.unlink(missing_ok=True)


def write_all(target: int, data: memoryview) -> None:
    """os.write may write less than it is given, and never more than 2 GiB."""
    while len(data):
        data = data[os.write(target, data) :]
