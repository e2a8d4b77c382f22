"""Other coders for the same integers: each takes q uint8 [out, in] of every tensor and says bytes and seconds.

All are lossless here, and every result is decoded and compared. NNCodec gets int32 tensors around zero, which it codes
without quantising (integer data units, DeepCABAC with its parameter search, row skipping); its package wants a training
framework on import, of which coding uses nothing: what is not installed is replaced by empty modules.
"""

from __future__ import annotations

import importlib
import importlib.util
import lzma
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
FRAMEWORK = ("torchvision", "cv2", "ptflops", "torchmetrics", "pandas", "sklearn", "h5py", "click", "tqdm", "flwr")
SMALLEST = 2.0**-24
"""float16"""


@dataclass(frozen=True)
class Coded:
    """What one coder made of all tensors."""

    size_bytes: float
    encode_s: float
    decode_s: float


class _Empty(ModuleType):
    """A module whose every attribute is an empty stand-in."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


class _EmptyFinder:
    """Finds an empty module for any part of the framework that is not installed."""

    def __init__(self, missing: set[str]) -> None:
        self.missing = missing

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.missing:
            return importlib.util.spec_from_loader(name, self)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _import_nncodec() -> Any:
    if importlib.util.find_spec("nncodec") is None:
        return None
    missing = {name for name in FRAMEWORK if importlib.util.find_spec(name) is None}
    sys.meta_path.append(_EmptyFinder(missing))
    return importlib.import_module("nncodec.nn")


def nncodec(tensors: list[U8], middle: int) -> Coded | None:
    """NNCodec (ISO/IEC 15938-17) through its Python API, all tensors in one bitstream. None: not installed."""
    package = _import_nncodec()
    if package is None:
        return None
    model = {f"t{n}": q.astype(np.int32) - middle for n, q in enumerate(tensors)}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        stream = package.encode(model, {"results": str(Path(folder)), "verbose": False, "use_dq": False})
        middle_time = time.perf_counter()
        found = package.decode(stream)
        end = time.perf_counter()
    _same(found.values(), model.values())
    return Coded(len(stream), middle_time - start, end - middle_time)


def constriction_tensor(tensors: list[U8], middle: int) -> Coded | None:
    """constriction's ANS coder with one categorical model for each tensor, its probabilities as float16 beside it."""
    if importlib.util.find_spec("constriction") is None:
        return None
    import constriction

    models = constriction.stream.model
    size = encode_s = decode_s = 0.0
    for q in tensors:
        counts = np.bincount(q.ravel(), minlength=int(q.max()) + 1)
        stored = np.where(counts, np.maximum(counts / q.size, SMALLEST), 0).astype(np.float16)
        share = stored.astype(np.float32) / stored.sum(dtype=np.float32)
        symbols = q.ravel().astype(np.int32)
        start = time.perf_counter()
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(symbols, models.Categorical(share, perfect=False))
        words = coder.get_compressed()
        between = time.perf_counter()
        found = constriction.stream.stack.AnsCoder(words).decode(models.Categorical(share, perfect=False), q.size)
        decode_s += time.perf_counter() - between
        encode_s += between - start
        _same([found], [symbols])
        size += words.nbytes + stored.nbytes
    return Coded(size, encode_s, decode_s)


def constriction_row(tensors: list[U8], middle: int) -> Coded | None:
    """constriction's range coder with a Laplace model for each row, its scale as float16 beside it."""
    if importlib.util.find_spec("constriction") is None:
        return None
    import constriction

    queue = constriction.stream.queue
    size = encode_s = decode_s = 0.0
    for q in tensors:
        w = q.astype(np.int32) - middle
        low, high = int(w.min()), max(int(w.max()), int(w.min()) + 1)
        family = constriction.stream.model.QuantizedLaplace(low, high)
        scale = np.abs(w).mean(1).clip(0.05).astype(np.float16)
        means, scales = np.zeros(w.size), np.repeat(scale.astype(np.float64), w.shape[1])
        start = time.perf_counter()
        coder = queue.RangeEncoder()
        coder.encode(w.ravel(), family, means, scales)
        words = coder.get_compressed()
        between = time.perf_counter()
        found = queue.RangeDecoder(words).decode(family, means, scales)
        decode_s += time.perf_counter() - between
        encode_s += between - start
        _same([found], [w.ravel()])
        size += words.nbytes + scale.nbytes
    return Coded(size, encode_s, decode_s)


def zstd19(tensors: list[U8], middle: int) -> Coded | None:
    """zstd at level 19 on one byte a weight."""
    if importlib.util.find_spec("zstandard") is None:
        return None
    import zstandard

    encoder, decoder = zstandard.ZstdCompressor(level=19), zstandard.ZstdDecompressor()
    return _bytes(tensors, encoder.compress, decoder.decompress)


def lzma_(tensors: list[U8], middle: int) -> Coded | None:
    """xz at its default level on one byte a weight."""
    return _bytes(tensors, lzma.compress, lzma.decompress)


def _bytes(tensors: list[U8], encode: Callable[[bytes], bytes], decode: Callable[[bytes], bytes]) -> Coded:
    plain = b"".join(q.tobytes() for q in tensors)
    start = time.perf_counter()
    packed = encode(plain)
    between = time.perf_counter()
    found = decode(packed)
    end = time.perf_counter()
    if found != plain:
        raise AssertionError("a general compressor lost something")
    return Coded(len(packed), between - start, end - between)


def _same(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


PEERS = {
    "nncodec": nncodec,
    "constriction-tensor": constriction_tensor,
    "constriction-row": constriction_row,
    "zstd-19": zstd19,
    "lzma": lzma_,
}
