"""The coded form of `model.safetensors`: what an artifact is on disk, smallest first, and how its parts are named.

    lowtide.side          everything but the digits: scales, outliers, thresholds, norms
    lowtide.classes       how large weights are, row by row and column by column: the entropy code's contexts
    lowtide.tables        frequency tables of the entropy code, one set for each kind of layer
    <layer>.weight        slice 0 of every layer, then <layer>.weight.1 of every layer, and so on

Slices come one after another, so a beginning of the file holds the whole model at fewer bits. The codes themselves are
lowtide.format.entropy's (docs/entropy.md); this file knows names, order and the side data's bytes (docs/format.md).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.arch import LinearSpec, ModelConfig, group_specs
from lowtide.errors import LowtideError
from lowtide.format import layout
from lowtide.format.entropy import Tables
from lowtide.format.manifest import Shapes

SIDE, CLASSES, TABLES = "lowtide.side", "lowtide.classes", "lowtide.tables"


def linears(config: ModelConfig) -> list[LinearSpec]:
    """All linear layers in stored order."""
    return [linear for spec in group_specs(config) for linear in spec.linears]


def kind(linear: str) -> str:
    """Layers of one kind share frequency tables: the last part of the name, such as `q_proj`."""
    return linear.rpartition(".")[2]


def kinds(config: ModelConfig) -> list[str]:
    """All kinds, sorted: the order of the tables."""
    return sorted({kind(linear.name) for linear in linears(config)})


def stream_name(linear: str, level: int) -> str:
    """Tensor that holds slice `level` of a layer. Slice 0 has the weight's own name, in a shape no loader takes."""
    return f"{linear}.weight" if level == 0 else f"{linear}.weight.{level}"


def coded_names(config: ModelConfig, slices: int) -> list[str]:
    """Names of the tensors of a coded file in the order in which they lie."""
    streams = [stream_name(linear.name, s) for s in range(slices) for linear in linears(config)]
    return [SIDE, CLASSES, TABLES, *streams]


def image_layout(tensors: Shapes) -> dict[str, layout.TensorSpan]:
    """Where a runtime image has its tensors: as `layout.plan` places them, coming in the order of their names."""
    return layout.plan(dict(sorted(tensors.items())))


def class_vectors(config: ModelConfig) -> tuple[list[int], list[int]]:
    """Lengths and kinds of the class vectors: rows, then columns of each layer; a layer's kind k has the kinds 2 k and
    2 k + 1, which share frequency tables."""
    order = {name: index for index, name in enumerate(kinds(config))}
    layers = linears(config)
    lengths = [n for layer in layers for n in (layer.out_features, layer.in_features)]
    return lengths, [2 * order[kind(layer.name)] + axis for layer in layers for axis in range(2)]


def side_shapes(config: ModelConfig, expected: Shapes) -> Shapes:
    """What the side data hold: every expected tensor but the packed weights."""
    packed = {f"{linear.name}.weight" for linear in linears(config)}
    return {name: entry for name, entry in expected.items() if name not in packed}


def pack_side(shapes: Shapes, tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """The side data's bytes: tensors of one dtype together, first all their first bytes, then all their second ones,
    and so on, so that like stands by like; then deflated (zlib, level 9)."""
    parts = []
    for dtype, names in _by_dtype(shapes).items():
        size = layout.DTYPES[dtype].itemsize
        flat = [np.ascontiguousarray(tensors[n], layout.DTYPES[dtype]).reshape(-1).view(np.uint8) for n in names]
        parts.append(np.concatenate(flat).reshape(-1, size).T.tobytes())
    return zlib.compress(b"".join(parts), 9)


def unpack_side(data: bytes | memoryview, shapes: Shapes, where: str) -> dict[str, NDArray[Any]]:
    """Inverse of `pack_side`.

    Raises:
        LowtideError: the data do not inflate to exactly what is expected.
    """
    total = sum(layout.tensor_bytes(*entry) for entry in shapes.values())
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(data, total + 1)  # no more, whatever the data claim
    except zlib.error:
        raise LowtideError(f"{where}: tensor {SIDE}: does not inflate; get the file again") from None
    if len(raw) != total or not inflate.eof or inflate.unused_data:
        raise LowtideError(f"{where}: tensor {SIDE}: does not hold {total} bytes; get the file again")
    tensors: dict[str, NDArray[Any]] = {}
    start = 0
    for dtype, names in _by_dtype(shapes).items():
        kind_ = layout.DTYPES[dtype]
        size = sum(layout.tensor_bytes(*shapes[name]) for name in names)
        planes = np.frombuffer(raw, np.uint8, size, start).reshape(kind_.itemsize, -1)
        flat = np.ascontiguousarray(planes.T).reshape(-1).view(kind_)
        start, position = start + size, 0
        for name in names:
            shape = shapes[name][1]
            count = int(np.prod(shape, dtype=np.int64))
            tensors[name] = flat[position : position + count].reshape(shape)
            position += count
    return tensors


def _by_dtype(shapes: Shapes) -> dict[str, list[str]]:
    """dtype -> its tensors' names; tensors of one field (mean, row_scale, ...) stand together."""
    found: dict[str, list[str]] = {}
    for name in sorted(shapes, key=lambda n: (n.rpartition(".")[2], n)):
        found.setdefault(shapes[name][0], []).append(name)
    return dict(sorted(found.items()))


def pack_tables(tables: Iterable[Tables]) -> bytes:
    """Tables one after another, each after its length (u32)."""
    parts = [table.to_bytes() for table in tables]
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def unpack_tables(data: bytes | memoryview, config: ModelConfig, slices: int, where: str) -> dict[str, Tables]:
    """Inverse of `pack_tables`: kind -> tables.

    Raises:
        LowtideError: lengths or tables that do not fit.
    """
    found, position, data = {}, 0, bytes(data)
    for name in kinds(config):
        size = int.from_bytes(data[position : position + 4], "little")
        start = position + 4
        if start + size > len(data):
            raise LowtideError(f"{where}: tensor {TABLES}: ends too soon; get the file again")
        found[name] = Tables.from_bytes(data[start : start + size], slices, f"{where}: tensor {TABLES}: {name}")
        position = start + size
    if position != len(data):
        raise LowtideError(f"{where}: tensor {TABLES}: has bytes left over; get the file again")
    return found


def check_spans(config: ModelConfig, slices: int, spans: Mapping[str, layout.TensorSpan], where: str) -> None:
    """A coded file holds exactly its tensors, in order, all of them bytes in a row.

    Raises:
        LowtideError: it does not.
    """
    if list(spans) != coded_names(config, slices):
        raise LowtideError(f"{where}: is not the coded file of this model and {slices} slices")
    for name, span in spans.items():
        if span.dtype != "U8" or len(span.shape) != 1:
            raise LowtideError(f"{where}: tensor {name}: must be U8 with one axis, not {span.dtype} {list(span.shape)}")
