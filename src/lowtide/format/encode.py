"""Coding an artifact's packed tensors: from a spool of what the engine reads to a spool of what the disk holds."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.arch import ModelConfig
from lowtide.format import codec, coded, layout
from lowtide.format.entropy import CONTEXTS, Tables, classes, empirical_bits
from lowtide.format.spool import Spool
from lowtide.kernels import entropy  # the native coder; it needs nothing of this floor but the codec

Report = Callable[[int, int], None]


def encode_spool(
    packed: Spool, target: Path, config: ModelConfig, slices: int, zero: bool, report: Report | None = None
) -> tuple[Spool, dict[str, Any]]:
    """Code every tensor of a model.

    Args:
        packed: all tensors as the engine reads them.
        target: file for the new spool.
        slices: S.
        zero: see `codec.centres`.
        report: called with (layers done, twice the layers).

    Returns:
        The coded tensors, and figures: weights, entropy_bits (conditional entropy of the codes given their contexts),
        coded_bits (streams, tables and classes), layers (name -> density, entropy_bits, coded_bits per weight).
    """
    layers = coded.linears(config)
    middle = codec.doubled_centre(codec.centres(slices, zero)) // 2 if zero else None
    found: list[NDArray[np.uint8]] = []
    counts = {kind: np.zeros((CONTEXTS, 4**slices), np.int64) for kind in coded.kinds(config)}
    figures: dict[str, dict[str, float]] = {}

    def codes(index: int) -> NDArray[np.uint8]:
        layer = layers[index]
        return codec.unpack_digits(packed.read(f"{layer.name}.weight"), layer.out_features, layer.in_features, slices)

    for index, layer in enumerate(layers):
        q = codes(index)
        rows, cols = classes(q, slices, middle)
        found += [rows, cols]
        histogram = entropy.histogram(q, rows, cols, slices)
        counts[coded.kind(layer.name)] += histogram
        density = 1.0 if middle is None else float(np.count_nonzero(q != middle)) / q.size
        figures[layer.name] = {"density": density, "entropy_bits": empirical_bits(histogram)[0] / q.size}
        if report:
            report(index + 1, 2 * len(layers))
    entropy_bits = sum(empirical_bits(table)[0] for table in counts.values())
    tables = {kind: Tables.fit(table, slices) for kind, table in counts.items()}
    result = Spool(target)
    try:
        shapes = coded.side_shapes(config, packed.tensors)
        side = {name: packed.read(name) for name in shapes}
        table_bytes = coded.pack_tables(tables[kind] for kind in coded.kinds(config))
        class_bytes = entropy.encode_classes(found, coded.class_vectors(config)[1])
        result.add(coded.SIDE, np.frombuffer(coded.pack_side(shapes, side), np.uint8))
        result.add(coded.CLASSES, np.frombuffer(class_bytes, np.uint8))
        result.add(coded.TABLES, np.frombuffer(table_bytes, np.uint8))
        bits = 8 * (len(table_bytes) + len(class_bytes))
        for index, layer in enumerate(layers):
            rows, cols = found[2 * index : 2 * index + 2]
            streams = entropy.encode(codes(index), rows, cols, tables[coded.kind(layer.name)], 2)
            for s, stream in enumerate(streams):
                result.add(coded.stream_name(layer.name, s), np.frombuffer(stream, np.uint8))
                bits += 8 * len(stream)
            figures[layer.name]["coded_bits"] = 8 * sum(map(len, streams)) / layer.weights
            if report:
                report(len(layers) + index + 1, 2 * len(layers))
    except BaseException:
        result.close()
        raise
    weights = sum(layer.weights for layer in layers)
    short = {name: {k: round(v, 5) for k, v in values.items()} for name, values in figures.items()}
    return result, {"weights": weights, "entropy_bits": entropy_bits, "coded_bits": bits, "layers": short}


def keep_streams(packed: Spool, target: Path, config: ModelConfig, slices: int, source: Path) -> Spool:
    """The coded tensors of a file whose digits are the same, with other side data: nothing is coded again.

    Args:
        packed: all tensors as the engine reads them; of these only the side data are used.
        target: file for the new spool.
        slices: S.
        source: the coded `model.safetensors`, whole.

    Raises:
        LowtideError: the source is not the coded file of such a model.
    """
    with source.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start, spans = layout.parse_header(data, str(source))
    coded.check_spans(config, slices, spans, str(source))
    shapes = coded.side_shapes(config, packed.tensors)
    side = coded.pack_side(shapes, {name: packed.read(name) for name in shapes})
    result = Spool(target)
    try:
        result.add(coded.SIDE, np.frombuffer(side, np.uint8))
        for name, span in spans.items():
            if name != coded.SIDE:
                result.add(name, np.frombuffer(data[start + span.start : start + span.stop], np.uint8))
    except BaseException:
        result.close()
        raise
    return result
