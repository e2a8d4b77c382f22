#!/usr/bin/env python3
"""Coded size and speed of lowtide's exact entropy code against its entropy and against other coders.

    python benchmarks/codec.py models/stories15M --json
    python benchmarks/codec.py smollm2-f16.gguf --layers 4 --rows 8192

Every matrix is rounded to a uniform grid, its step a common factor times the row's rms times the square root of the
column's rms (so rows are alike and columns half so), the factor set for 3, 4 or 5 bits; densities below 1 prune the
smallest magnitudes of each matrix to zero first. All coders get the same integers. "entropy" is the empirical entropy
of the integers given lowtide's contexts, without rows that are copies; its coded bits count streams, frequency tables
and classes. The peers (nncodec, constriction, zstandard) are optional: what is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np
from codec_peers import PEERS, Coded
from numpy.typing import NDArray

from lowtide.arch import group_specs
from lowtide.compress.sources import Source, open_source
from lowtide.errors import LowtideError
from lowtide.format.codec import packed_shape, unpack_digits
from lowtide.format.entropy import CONTEXTS, Tables, classes, empirical_bits
from lowtide.kernels import entropy

U8 = NDArray[np.uint8]
BITS, DENSITIES = (3, 4, 5), (1.0, 0.5, 0.3, 0.1)
DENSITY_BITS = 4
CHUNK_WEIGHTS = 1 << 20
PACKAGES = ("nncodec", "constriction", "zstandard")
COLUMNS = ("case", "codec", "bits/weight", "of entropy", "encode M/s", "decode M/s")


def matrices(source: Source, layers: int, limit: int) -> dict[str, NDArray[np.float32]]:
    """Weights f32 [out, in] by name: of `layers` layers evenly spread and the output head, of which at most `limit`
    rows."""
    wanted = set(
        np.linspace(0, source.config.num_layers - 1, min(layers, source.config.num_layers)).round().astype(int)
    )
    found = {}
    for spec in group_specs(source.config):
        if spec.is_body and int(spec.name.split(".")[1]) not in wanted:
            continue
        for linear in spec.linears:
            found[linear.name] = source.tensor(f"{linear.name}.weight").float().numpy()[:limit]
    return found


def quantise(weight: NDArray[np.float32], bits: int, density: float) -> tuple[U8, int]:
    """(q uint8 [out, in], slices): integers around 4^S / 2."""
    if density < 1:
        keep = np.abs(weight) >= np.quantile(np.abs(weight).ravel()[:: max(1, weight.size >> 20)], 1 - density)
    else:
        keep = np.ones(weight.shape, bool)
    slices = 3 if bits == 3 else 4
    rows = np.sqrt(np.square(weight).mean(1, keepdims=True)).clip(1e-9)
    columns = np.sqrt(np.square(weight).mean(0)).clip(1e-9)
    # A Gaussian of standard deviation s has about 2.05 + log2(s / step) bits.
    step = 2.0 ** (2.05 - bits) * rows * np.sqrt(columns / np.sqrt(np.square(weight).mean()))
    middle = 4**slices // 2
    q = np.clip(np.rint(np.where(keep, weight, 0) / step) + middle, 0, 4**slices - 1)
    return q.astype(np.uint8), slices


def kind_of(name: str) -> str:
    return name.rpartition(".")[2]


def ours(names: list[str], tensors: list[U8], slices: int, threads: int) -> tuple[Coded, dict[str, Any]]:
    """lowtide's code of all tensors: one set of tables for each kind of layer, and what its parts take."""
    kinds = sorted({kind_of(n) for n in names})
    start = time.perf_counter()
    labels = [classes(q, slices) for q in tensors]
    counts = {kind: np.zeros((CONTEXTS, 4**slices), np.int64) for kind in kinds}
    for name, q, label in zip(names, tensors, labels, strict=True):
        counts[kind_of(name)] += entropy.histogram(q, *label, slices)
    table_bytes = {kind: Tables.fit(hist, slices).to_bytes() for kind, hist in counts.items()}
    tables = {kind: Tables.from_bytes(data, slices, kind) for kind, data in table_bytes.items()}
    pairs = list(zip(names, tensors, labels, strict=True))
    streams = [entropy.encode(q, *label, tables[kind_of(name)], threads) for name, q, label in pairs]
    side = [side for label in labels for side in label]
    sides = [2 * kinds.index(kind_of(name)) + n for name in names for n in range(2)]
    class_bytes = entropy.encode_classes(side, sides)
    encoded = time.perf_counter()
    packed = [np.zeros(packed_shape(*q.shape, slices), np.uint8) for q in tensors]
    begin = time.perf_counter()
    found = entropy.decode_classes(class_bytes, [len(s) for s in side], sides, "classes")

    def decode(n: int, threads: int) -> None:
        name, q, _ = pairs[n]
        rows, columns = found[2 * n], found[2 * n + 1]
        entropy.decode(streams[n], rows, columns, tables[kind_of(name)], *q.shape, threads, packed[n])

    # Large matrices share their chunks among the threads, the others are one chunk each.
    small = [n for n, q in enumerate(tensors) if q.size <= CHUNK_WEIGHTS]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda n: decode(n, 1), small))
    for n in set(range(len(pairs))) - set(small):
        decode(n, threads)
    decoded = time.perf_counter()
    for q, digits in zip(tensors, packed, strict=True):
        np.testing.assert_array_equal(unpack_digits(digits, *q.shape, slices), q)
    stream = sum(len(s) for slices_ in streams for s in slices_)
    table = sum(map(len, table_bytes.values()))
    parts = {
        "entropy_bits": sum(empirical_bits(hist)[0] for hist in counts.values()),
        "table_bytes": table,
        "class_bytes": len(class_bytes),
        "stream_bytes": stream,
    }
    return Coded(stream + table + len(class_bytes), encoded - start, decoded - begin), parts


def measure(model: str, weights: dict[str, Any], bits: int, density: float, options: argparse.Namespace) -> list[Any]:
    """The rows of one case, lowtide's first."""
    names = list(weights)
    coded = [quantise(w, bits, density) for w in weights.values()]
    tensors, slices = [q for q, _ in coded], coded[0][1]
    total, middle = sum(q.size for q in tensors), 4**slices // 2
    zeros = sum(int((q == middle).sum()) for q in tensors) / total
    result, parts = ours(names, tensors, slices, options.threads)
    results: dict[str, Coded | None] = {"lowtide": result}
    if not options.no_peers:
        results |= {name: peer(tensors, middle) for name, peer in PEERS.items()}
    rows = []
    for codec, found in results.items():
        if found is None:
            continue
        row = {
            "model": model,
            "codec": codec,
            "grid_bits": bits,
            "slices": slices,
            "density": density,
            "nonzero": 1 - zeros,
            "weights": total,
            "entropy_bits": parts["entropy_bits"],
            "coded_bits": 8 * found.size_bytes,
            "encode_mweights_s": total / found.encode_s / 1e6,
            "decode_mweights_s": total / found.decode_s / 1e6,
        }
        rows.append(row | (parts if codec == "lowtide" else {}))
        common.note(line(rows[-1]))
    return rows


def line(row: dict[str, Any]) -> str:
    return "  ".join(str(cell) for cell in cells(row))


def cells(row: dict[str, Any]) -> list[Any]:
    return [
        f"{row['grid_bits']} bits, density {row['density']:g}",
        row["codec"],
        f"{row['coded_bits'] / row['weights']:.4f}",
        f"{row['coded_bits'] / row['entropy_bits']:.4f}",
        f"{row['encode_mweights_s']:.1f}",
        f"{row['decode_mweights_s']:.1f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a Hugging Face folder or a GGUF")
    parser.add_argument("--layers", type=int, default=1000, help="layers to code, evenly spread (default: all)")
    parser.add_argument("--rows", type=int, default=1 << 30, help="rows of a matrix at most (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true", help="lowtide's code only")
    parser.add_argument("--quick", action="store_true", help="4 bits, densities 1 and 0.1, one layer")
    parser.add_argument("--name", help="of the results (default: the model's)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    try:
        source = open_source(options.model)
        weights = matrices(source, 1 if options.quick else options.layers, options.rows)
    except LowtideError as error:
        common.note(f"error: {error}")
        return 1
    model = options.name or Path(options.model).stem
    cases = [(bits, 1.0) for bits in BITS] + [(DENSITY_BITS, d) for d in DENSITIES if d < 1]
    rows = []
    for bits, density in [(4, 1.0), (4, 0.1)] if options.quick else cases:
        rows += measure(model, weights, bits, density, options)
    peers = {p: importlib.metadata.version(p) for p in PACKAGES if importlib.util.find_spec(p)}
    result = common.report({"model": model, "threads": options.threads, "rows": rows}, **peers)
    common.save(f"codec-{model}", result, common.markdown(COLUMNS, [cells(r) for r in rows]))
    if options.json:
        print(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
