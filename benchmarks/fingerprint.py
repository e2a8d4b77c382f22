#!/usr/bin/env python3
"""The fingerprint codec against the exact one (mask and values in one adaptive entropy code) on the same integers.

    python benchmarks/fingerprint.py stories15M --layers smol-twin.gguf:15.mlp.down_proj

Every linear layer of the decoder is pruned by Wanda's rule, |w| times the root mean square of its input, row by row, to
each density; survivors are rounded to multiples of 0.35 times their root mean square. Both codecs then store these same
weights. "error" is the fingerprint codec's setting, the expected energy of false positives over that of the stored
weights; "fingerprint, exact" lists all false positives of error 1 as corrections. Bits are per
weight of the dense tensor and count whole files; the exact codec's count streams, tables and classes. The output error
is that of W x, in parts of its energy, inputs uncorrelated. KL is to the dense model, whole body coded, on text sampled
from the model itself with another seed than the one that gave the inputs.

Where the codec of fewest bits changes ("crossover") is interpolated in log error between the settings measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.arch import GROUPS, group_specs
from lowtide.compress.dense import DenseModel, decoder_block, rope_tables
from lowtide.compress.sources import Source, open_source
from lowtide.eval.metrics import kl_divergence, log_softmax
from lowtide.fingerprint import CodeOptions, TensorOptions, TensorReport, decode_tensor, encode_tensor
from lowtide.fingerprint.store import ABSENT
from lowtide.fingerprint.tensor import refit_table
from lowtide.format import entropy
from lowtide.kernels import entropy as coder

F32 = NDArray[np.float32]
DENSITIES = (0.5, 0.3, 0.1, 0.05)
STEP = 0.35
ERRORS = (0.01, 0.1, 0.5)
BODY_ERROR = 0.01
EXACT_ERRORS = (1.0,)
MODEL_ID = "0" * 64
COLUMNS = ("tensors", "density", "codec", "bits per weight", "entropy", "false", "false energy", "output error", "KL")


@dataclass
class Layer:
    """One linear layer: weight f32 [out, in] dense, second f32 [in] (mean squared inputs), integers i64 [out, in] of
    the pruned and rounded weight, in steps of `step`."""

    name: str
    weight: F32
    second: F32
    integers: NDArray[np.int64]
    step: float

    @property
    def coded(self) -> F32:
        """What both codecs store, f32 [out, in]."""
        return (self.integers * np.float32(self.step)).astype(np.float32)

    def output_error(self, decoded: F32) -> tuple[float, float]:
        """(energy of the error of W x, energy of W x)."""
        error = ((decoded - self.weight).astype(np.float64) ** 2).sum(0) @ self.second
        return float(error), float((self.weight.astype(np.float64) ** 2).sum(0) @ self.second)


def make_layer(name: str, weight: F32, second: F32, density: float) -> Layer:
    """Prune and round."""
    score = np.abs(weight) * np.sqrt(second)
    kept = max(1, round(density * weight.shape[1]))
    threshold = np.partition(score, -kept, axis=1)[:, -kept]
    pruned = np.where(score >= threshold[:, None], weight, 0)
    step = STEP * float(np.sqrt((pruned[pruned != 0].astype(np.float64) ** 2).mean()))
    return Layer(name, weight, second, np.clip(np.rint(pruned / step), -31, 31).astype(np.int64), step)


def exact_bits(layers: list[Layer]) -> tuple[float, float]:
    """Bits of the layers in the exact code: (coded, with tables and classes; empirical entropy in its contexts)."""
    slices = 3
    middle = 4**slices // 2
    hist = np.zeros((entropy.CONTEXTS, 4**slices), np.int64)
    prepared = []
    for layer in layers:
        q = (layer.integers + middle).astype(np.uint8)
        rows, columns = entropy.classes(q, slices)
        hist += coder.histogram(q, rows, columns, slices)
        prepared.append((q, rows, columns))
    tables = entropy.Tables.fit(hist, slices)
    size = len(tables.to_bytes())
    size += sum(len(part) for q, rows, columns in prepared for part in coder.encode(q, rows, columns, tables))
    vectors = [v for _, rows, columns in prepared for v in (rows, columns)]
    size += len(coder.encode_classes(vectors, [0, 1] * len(layers)))
    return 8.0 * size, entropy.empirical_bits(hist)[0]


def fingerprint(layer: Layer, error: float, corrections: float = 0.0) -> tuple[F32, TensorReport]:
    """The layer through the codec."""
    options = TensorOptions(step=layer.step, code=CodeOptions(error=error), corrections=corrections)
    store, report = encode_tensor(layer.coded, model_id=MODEL_ID, name=layer.name, options=options)
    return decode_tensor(store, model_id=MODEL_ID, name=layer.name), report


def refitted(layer: Layer, decoded: F32) -> F32:
    """The layer with its table fitted again, to the dense weights, as TensorOptions.refit does it."""
    values, found = np.unique(decoded, return_inverse=True)
    symbols = np.where(values == 0, ABSENT, np.arange(len(values)))[found.ravel()]
    cost = np.broadcast_to(layer.second.astype(np.float64), layer.weight.shape).ravel()
    fitted = refit_table(values[:, None].astype(np.float32), symbols, layer.weight.ravel(), cost)
    return np.append(fitted[:, 0], np.float32(0))[symbols].reshape(layer.weight.shape)


def row(label: str, density: float, codec: str, layers: list[Layer], decoded: list[F32], **more: Any) -> dict[str, Any]:
    """One row of the result: what a codec makes of some layers."""
    errors = np.array([layer.output_error(d) for layer, d in zip(layers, decoded, strict=True)]).sum(0)
    weights = sum(layer.weight.size for layer in layers)
    stored = sum(int((layer.integers != 0).sum()) for layer in layers)
    base = {"tensors": label, "density": density, "stored": stored / weights, "codec": codec, "weights": weights}
    return base | {"output_error": errors[0] / errors[1]} | more


def fingerprint_row(
    label: str, density: float, layers: list[Layer], error: float, codec: str, **how: Any
) -> tuple[dict[str, Any], list[F32]]:
    """The row of a fingerprint setting, and the decoded layers."""
    results = [fingerprint(layer, error, **how) for layer in layers]
    reports = [report for _, report in results]
    decoded = [d for d, _ in results]
    weights = sum(r.weights for r in reports)
    squares = [float((layer.coded.astype(np.float64) ** 2).sum()) for layer in layers]
    figures = {
        "error": error,
        "bits_per_weight": 8 * sum(r.file_bytes for r in reports) / weights,
        "coded_bits": 8 * sum(r.file_bytes for r in reports),
        "false_positives": sum(r.false_positives for r in reports),
        "corrected": sum(r.corrected for r in reports),
        "false_energy": sum(r.false_energy * s for r, s in zip(reports, squares, strict=True)) / sum(squares),
    }
    return row(label, density, codec, layers, decoded, **figures), decoded


def tensor_rows(label: str, density: float, layers: list[Layer], errors: tuple[float, ...]) -> list[dict[str, Any]]:
    """All settings on a few layers."""
    coded, plain = exact_bits(layers)
    weights = sum(layer.weight.size for layer in layers)
    exact = {"bits_per_weight": coded / weights, "coded_bits": coded, "entropy_bits": plain, "false_positives": 0}
    rows = [row(label, density, "exact", layers, [layer.coded for layer in layers], **exact, false_energy=0.0)]
    for error in errors:
        rows.append(fingerprint_row(label, density, layers, error, f"fingerprint, error {error:g}")[0])
        common.note(f"{label}, density {density}, error {error:g}: {rows[-1]['bits_per_weight']:.3f} bits per weight")
    corrected = [
        fingerprint_row(label, density, layers, e, "fingerprint, exact", corrections=1)[0] for e in EXACT_ERRORS
    ]
    return [*rows, min(corrected, key=lambda r: r["bits_per_weight"])]


def crossover(rows: list[dict[str, Any]]) -> float | None:
    """False energy at which the fingerprint codec needs as many bits as the exact one; extrapolated along the last two
    settings if all need more."""
    exact = next(r for r in rows if r["codec"] == "exact")["bits_per_weight"]
    points = sorted(
        (np.log(r["false_energy"]), r["bits_per_weight"]) for r in rows if "error" in r and r["false_energy"]
    )
    if len(points) < 2:
        return None
    lines = list(zip(points, points[1:], strict=False))
    (x0, y0), (x1, y1) = next((line for line in lines if line[0][1] >= exact >= line[1][1]), lines[-1])
    return float(np.exp(x0 + (exact - y0) * (x1 - x0) / (y1 - y0)))


@dataclass
class Replaced:
    """A Source some of whose tensors are others."""

    source: Source
    tensors: dict[str, F32]

    def __post_init__(self) -> None:
        self.name, self.config, self.has = self.source.name, self.source.config, self.source.has
        self.stored, self.tokenizer_files = self.source.stored, self.source.tokenizer_files
        self.fingerprint = self.source.fingerprint

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, or what stands for it."""
        return torch.from_numpy(self.tensors[name]) if name in self.tensors else self.source.tensor(name)


@torch.no_grad()
def input_energy(model: DenseModel, ids: torch.Tensor) -> dict[str, F32]:
    """E[x^2] of each body group's inputs, f32 [in]."""
    rope = rope_tables(model.config, 0, ids.shape[1])
    x, found = model.embed(ids), {}
    for index in range(model.config.num_layers):
        block = model.block(index)

        def apply(group: str, inputs: torch.Tensor, index: int = index, block: Any = block) -> torch.Tensor:
            found[f"layers.{index}.{group}"] = inputs.square().mean((0, 1)).numpy()
            return block.apply(group, inputs)

        x = decoder_block(model.config, (block.input_norm, block.post_norm), x, apply, rope)
    return found


def body(source: Source, second: dict[str, F32], density: float) -> Iterator[Layer]:
    """All linear layers of the decoder."""
    for spec in group_specs(source.config):
        for linear in spec.linears if spec.is_body else ():
            weight = source.tensor(f"{linear.name}.weight").numpy()
            yield make_layer(linear.name, weight, second[spec.name], density)


@torch.no_grad()
def mean_kl(source: Source, layers: list[Layer], decoded: list[F32], ids: torch.Tensor) -> float:
    """KL of the dense model to the one with these layers, nats per token."""
    tensors = {f"{layer.name}.weight": d for layer, d in zip(layers, decoded, strict=True)}
    dense, other = DenseModel(source), DenseModel(Replaced(source, tensors))
    total = 0.0
    for window in ids:
        a, b = (log_softmax(m.logits(window[None])[0].numpy()) for m in (dense, other))
        total += float(kl_divergence(a, b).mean())
    return total / len(ids)


def body_rows(source: Source, density: float, layers: list[Layer], ids: torch.Tensor, cross: float | None) -> Any:
    """The whole body at a few settings, with its KL."""
    label = "whole body"
    coded, plain = exact_bits(layers)
    weights = sum(layer.weight.size for layer in layers)
    decoded = [layer.coded for layer in layers]
    kl = mean_kl(source, layers, decoded, ids)
    exact = {"bits_per_weight": coded / weights, "coded_bits": coded, "entropy_bits": plain, "false_positives": 0}
    yield row(label, density, "exact", layers, decoded, **exact, false_energy=0.0, kl=kl)
    settings = [(BODY_ERROR, "")] + ([(cross, ", crossover")] if cross else [])
    for error, why in settings:
        found, decoded = fingerprint_row(label, density, layers, error, f"fingerprint, error {error:.2g}{why}")
        yield found | {"kl": mean_kl(source, layers, decoded, ids)}
        common.note(f"{label}, density {density}, error {error:.2g}: {found['bits_per_weight']:.3f} bits per weight")
        if why:
            better = [refitted(layer, d) for layer, d in zip(layers, decoded, strict=True)]
            changed = row(label, density, f"fingerprint, error {error:.2g}{why}, table refitted", layers, better)
            yield found | changed | {"kl": mean_kl(source, layers, better, ids)}


def other_layers(specs: list[str], density: float) -> Iterator[tuple[str, list[Layer]]]:
    """Layers of other models, MODEL:BLOCK.PART; their inputs count alike (no text is read)."""
    for spec in specs:
        path, _, name = spec.rpartition(":")
        index, _, part = name.partition(".")
        weight = open_source(path).tensor(f"model.layers.{index}.{part}.weight").numpy()
        label = f"{path.rpartition('/')[2].removesuffix('.gguf')} {name}"
        yield label, [make_layer(f"model.layers.{index}.{part}", weight, np.ones(weight.shape[1], np.float32), density)]


def table(rows: list[dict[str, Any]], crossovers: dict[str, dict[str, float | None]]) -> str:
    """For people."""

    def cells(r: dict[str, Any]) -> tuple[Any, ...]:
        entropy_bits = f"{r['entropy_bits'] / r['weights']:.3f}" if "entropy_bits" in r else None
        kl = f"{r['kl']:.4f}" if "kl" in r else None
        energy = f"{r['false_energy']:.2g}"
        bits = f"{r['bits_per_weight']:.3f}"
        return (
            *(r["tensors"], r["density"], r["codec"], bits, entropy_bits, r["false_positives"], energy),
            *(f"{r['output_error']:.4f}", kl),
        )

    lines = [
        common.markdown(COLUMNS, map(cells, rows)),
        "",
        "False energy at which both codecs need the same bits:",
        "",
    ]
    for label, found in crossovers.items():
        text = ", ".join(f"density {d}: {'none' if e is None else f'{e:.2g}'}" for d, e in found.items())
        lines.append(f"- {label}: {text}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="whose whole body is coded")
    parser.add_argument("--layers", nargs="*", default=[], help="of other models, e.g. smol-twin.gguf:15.mlp.down_proj")
    parser.add_argument("--block", type=int, default=3, help="block whose layers go through all settings")
    parser.add_argument("--quick", action="store_true", help="one density, no KL")
    parser.add_argument("--json", action="store_true", help="print the figures")
    args = parser.parse_args()
    source = open_source(args.model)
    model = DenseModel(source)
    sizes = (1, 64) if args.quick else (8, 256)
    second = input_energy(model, model.sample(*sizes, 0))
    held_out = model.sample(*sizes, 1)
    rows: list[dict[str, Any]] = []
    crossovers: dict[str, dict[str, float | None]] = {}
    for density in DENSITIES[2:3] if args.quick else DENSITIES:
        layers = list(body(source, second, density))
        block = min(args.block, source.config.num_layers - 1)
        members = {f"model.layers.{block}.{m}" for group in GROUPS.values() for m in group}
        chosen = [(f"block {block}", [layer for layer in layers if layer.name in members])]
        for label, some in [*chosen, *other_layers(args.layers, density)]:
            found = tensor_rows(label, density, some, ERRORS)
            crossovers.setdefault(label, {})[str(density)] = crossover(found)
            rows += found
        if not args.quick:
            rows += body_rows(source, density, layers, held_out, crossovers[f"block {block}"][str(density)])
    rows = [r | {"model": source.name} for r in rows]
    result = common.report({"model": source.name, "rows": rows, "crossover": crossovers})
    text = table(rows, crossovers)
    common.save("fingerprint-quick" if args.quick else "fingerprint", result, text)
    print(json.dumps(result, indent=2) if args.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
