#!/usr/bin/env python3
"""Graded linear layers on a GPU (Triton) against dense bf16 and dense int4, one token. Needs an NVIDIA GPU and Triton.

    python benchmarks/gpu.py --model qwen2.5-1.5b --bits 1,2,3,4

Layers have a real model's shapes and random digits and inputs: only sizes and the share that is read matter for time.
bf16 is torch's own product (cuBLAS); int4 is torch's own too (`_weight_int4pack_mm`, groups of up to 128 weights), the
one gpt-fast and torchao use. Every engine has as many copies of its layer as it takes to fill the cache several times
over, all calls of one round are one CUDA graph, and the engines' rounds are interleaved. Reported: medians in
microseconds for one call, GB/s of what lowtide reads, ratios (above 1: lowtide is faster). Products are checked first.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import common
import numpy as np

from lowtide.errors import LowtideError
from lowtide.format import codec
from lowtide.format.groups import GroupTensors, LinearTensors

#: Model -> group -> (input channels, rows of each member).
MODELS: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {
    "smollm2-135m": {
        "qkv": (576, (576, 192, 192)),
        "o": (576, (576,)),
        "gate_up": (576, (1536, 1536)),
        "down": (1536, (576,)),
    },
    "qwen2.5-1.5b": {
        "qkv": (1536, (1536, 256, 256)),
        "o": (1536, (1536,)),
        "gate_up": (1536, (8960, 8960)),
        "down": (8960, (1536,)),
    },
    "llama-3.1-8b": {
        "qkv": (4096, (4096, 1024, 1024)),
        "o": (4096, (4096,)),
        "gate_up": (4096, (14336, 14336)),
        "down": (14336, (4096,)),
    },
}
SLICES = 3
OUTLIER_SHARE = 0.002
CACHES = 4  # copies hold this many times the GPU's cache
MOST_COPIES = 256
CHUNKS, BLOCK_BYTES, BLOCK_ENTRIES, WARPS = (32, 64, 128), (64, 128, 256), (8, 16, 32), (2, 4, 8)


def random_group(inputs: int, outs: tuple[int, ...], slices: int = SLICES, seed: int = 0) -> GroupTensors:
    """A group of the given shape: random digits, two exact channels, some outliers."""
    rng = np.random.default_rng(seed)
    exact = np.array([0, inputs // 2], np.int32)
    keep = np.isin(np.arange(inputs), exact, invert=True)
    linears = []
    for i, out in enumerate(outs):
        cells = np.unique(rng.integers(0, out * inputs, int(out * inputs * OUTLIER_SHARE)))
        cells = cells[keep[cells % inputs]]
        values = rng.uniform(1, 3, len(cells)).astype(np.float16)
        outliers = codec.pack_outliers(cells // inputs, cells % inputs, values, out)
        digits = rng.integers(0, 4**slices, (out, inputs), dtype=np.uint8)
        scale, bias = np.full(out, 0.02, np.float16), rng.normal(0, 1, out).astype(np.float16)
        columns = rng.normal(0, 1, (len(exact), out)).astype(np.float16)
        packed = codec.pack_digits(digits, slices)
        linears.append(LinearTensors(f"member{i}", packed, scale, bias, columns, *outliers, out))
    return GroupTensors(
        name="layers.0.random",
        in_features=inputs,
        slices=slices,
        mean=np.zeros(inputs, np.float16),
        col_scale=np.ones(inputs, np.float16),
        importance=(rng.uniform(0.5, 2, inputs) * keep).astype(np.float16),
        shrink=np.ones(slices, np.float32),
        exact_channels=exact,
        thresholds=np.zeros((1, 1, slices), np.float32),
        linears=linears,
    )


def thresholds_for(bits: float, score: np.ndarray, slices: int = SLICES) -> np.ndarray:
    """Thresholds f32 [S], a factor 4 apart, at which channels with these scores read `bits` in the mean."""
    steps = 4.0 ** np.arange(slices)
    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        read = 2 * (score[:, None] > 2.0**middle * steps).sum() / len(score)
        low, high = (middle, high) if read > bits else (low, middle)
    return np.asarray(2.0**high * steps, np.float32)


def the_gpu() -> dict[str, Any]:
    """Name, processors and cache of the GPU; LowtideError where there is none, or no torch or Triton to use it."""
    try:
        import torch
        import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise LowtideError(f"this benchmark needs {error.name}: pip install {error.name}") from None
    if not torch.cuda.is_available():
        raise LowtideError("this benchmark needs an NVIDIA GPU that torch can use, and there is none here")
    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "processors": found.multi_processor_count,
        "cache_bytes": found.L2_cache_size,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def int4_engine(weight: Any, x: Any) -> tuple[Callable[[], Any], Any, int]:
    """The int4 product of bf16 weight [out, in] with x [1, in] on the GPU.

    Returns:
        make (packs a new copy and gives its product as a function without arguments), the weights it stands for in
        f32, and the bytes of a copy.
    """
    import torch

    out, inputs = weight.shape
    size = next((s for s in (128, 64, 32) if inputs % s == 0), None)
    if size is None or out % 8:
        raise LowtideError(f"int4 needs input channels in multiples of 32 and rows of 8, not [{out}, {inputs}]")
    grouped = weight.float().view(out, -1, size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-6).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    steps = (grouped - zero.float()[..., None]) / scale.float()[..., None] + 8
    q = steps.round().clamp(0, 15)
    meant = ((q - 8) * scale.float()[..., None] + zero.float()[..., None]).view(out, inputs)
    code = q.view(out, inputs).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack((code[:, ::2] << 4 | code[:, 1::2]).contiguous(), 8)
    scales = torch.stack([scale.t(), zero.t()], -1).contiguous()

    def make() -> Callable[[], Any]:
        mine, my_scales = packed.clone(), scales.clone()
        return lambda: torch._weight_int4pack_mm(x, mine, size, my_scales)

    return make, meant, packed.numel() * packed.element_size() + scales.numel() * scales.element_size()


def bf16_engine(weight: Any, x: Any) -> tuple[Callable[[], Any], int]:
    """The dense product of bf16 weight [out, in] with x [1, in]: make as in `int4_engine`, bytes of a copy."""
    import torch

    def make() -> Callable[[], Any]:
        mine = weight.clone()
        return lambda: torch.nn.functional.linear(x, mine)

    return make, weight.numel() * 2


def round_of(make: Callable[[], Callable[[], Any]], bytes_of_copy: int, cache: int) -> Callable[[], float]:
    """A function that calls every copy once, as one CUDA graph, and gives the microseconds of one call."""
    import torch

    copies = max(2, min(MOST_COPIES, -(-CACHES * cache // bytes_of_copy)))
    calls = [make() for _ in range(copies)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles and allocates, which a graph must not
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def run() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        assert calls  # the graph holds addresses, not tensors
        return float(begin.elapsed_time(end) * 1000 / copies)

    return run


def medians(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Microseconds of each engine: median of interleaved rounds, after two that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name in list(runs) if i % 2 else list(runs)[::-1]:
            times[name].append(runs[name]())
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def same(got: Any, want: Any, tolerance: float, what: str) -> None:
    """LowtideError if the two differ by more than `tolerance` of the largest value."""
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    if not error <= tolerance:
        raise LowtideError(f"{what}: off by {error:.2g} of the largest output; its time would mean nothing")


def best_tuning(group: GroupTensors, x: Any, thresholds: Any, cache: int) -> Any:
    """The fastest of the tunings, one field after the other."""
    from lowtide.integrations.triton import GradedGroup, Tuning

    best, shortest = Tuning(), float("inf")
    fields = {"block_bytes": BLOCK_BYTES, "block_entries": BLOCK_ENTRIES, "warps": WARPS, "chunk": CHUNKS}
    for field, values in fields.items():
        for value in values:
            tuning = dataclasses.replace(best, **{field: value})
            layer = GradedGroup(group, x.device, backend="triton", tuning=tuning)
            run = round_of(graded_maker(layer, x, thresholds), _bytes(layer, x, thresholds), cache)
            time = medians({"": run}, 5)[""]
            if time < shortest:
                best, shortest = tuning, time
    return best


def _bytes(layer: Any, x: Any, thresholds: Any) -> int:
    return int(layer.bytes_read(layer.levels(x, thresholds)))


def graded_maker(layer: Any, x: Any, thresholds: Any) -> Callable[[], Callable[[], Any]]:
    """make as in `int4_engine`, for a GradedGroup."""

    def make() -> Callable[[], Any]:
        mine = copy.deepcopy(layer)
        return lambda: mine(x, thresholds)

    return make


def measure_group(
    name: str, shape: tuple[int, tuple[int, ...]], options: argparse.Namespace, cache: int
) -> list[dict[str, Any]]:
    """One row for each budget."""
    import torch

    from lowtide.integrations.triton import GradedGroup

    inputs, outs = shape
    group = random_group(inputs, outs)
    x = torch.from_numpy(np.random.default_rng(1).normal(0, 1, inputs).astype(np.float32)).cuda()
    score = np.abs(x.cpu().numpy()) * group.importance.astype(np.float32)
    narrow = x.bfloat16()[None]
    weight = torch.from_numpy(np.concatenate([group.dequantise(i, SLICES) for i in range(len(outs))])).cuda().bfloat16()
    dense, dense_bytes = bf16_engine(weight, narrow)
    four, meant, four_bytes = int4_engine(weight, narrow)
    same(four()()[0], narrow[0].float() @ meant.t(), 0.02, f"int4 {name}")
    others = {"bf16": round_of(dense, dense_bytes, cache), "int4": round_of(four, four_bytes, cache)}
    plain = GradedGroup(group, "cuda", backend="torch")
    tuning = None
    if options.tune:
        tuning = best_tuning(group, x, torch.from_numpy(thresholds_for(3, score)).cuda(), cache)
    layer = GradedGroup(group, "cuda", backend="triton", tuning=tuning)
    rows = []
    for bits in options.bits:
        thresholds = torch.from_numpy(thresholds_for(bits, score)).cuda()
        same(torch.cat(layer(x, thresholds)), torch.cat(plain(x, thresholds)), 1e-4, f"lowtide {name} at {bits} bits")
        read = _bytes(layer, x, thresholds)
        run = round_of(graded_maker(layer, x, thresholds), read, cache)
        times = medians({"lowtide": run, **others}, options.rounds)
        levels = layer.levels(x, thresholds)
        row = {"group": name, "in": inputs, "out": sum(outs), "bits": 2 * float(levels.float().mean())}
        row |= {"asked_bits": bits, "bytes_read": read, "gb_per_s": read / times["lowtide"] / 1e3, "us": times}
        rows.append(row | {"tuning": vars(tuning) if tuning else None})
    return rows


def whole_layers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sum over all groups for each budget, as further rows."""
    sums = []
    for bits in dict.fromkeys(row["asked_bits"] for row in rows):
        mine = [row for row in rows if row["asked_bits"] == bits]
        weights = [row["in"] * row["out"] for row in mine]
        us = {name: sum(row["us"][name] for row in mine) for name in mine[0]["us"]}
        read = sum(row["bytes_read"] for row in mine)
        mean = sum(row["bits"] * w for row, w in zip(mine, weights, strict=True)) / sum(weights)
        row = {"group": "layer", "in": None, "out": None, "bits": mean, "asked_bits": bits, "bytes_read": read}
        sums.append(row | {"gb_per_s": read / us["lowtide"] / 1e3, "us": us, "tuning": None})
    return sums


def table(rows: list[dict[str, Any]]) -> str:
    """The figures for people."""
    columns = ("group", "bits", "against bf16", "against int4", "lowtide us", "bf16 us", "int4 us", "GB/s")
    cells = []
    for row in rows:
        us = row["us"]
        ratios = (f"{us[name] / us['lowtide']:.2f}" for name in ("bf16", "int4"))
        times = (f"{us[name]:.1f}" for name in ("lowtide", "bf16", "int4"))
        cells.append((row["group"], f"{row['bits']:.2f}", *ratios, *times, f"{row['gb_per_s']:.0f}"))
    return common.markdown(columns, cells)


def budgets(text: str) -> list[float]:
    """Bits from a list with commas; argparse tells of errors."""
    found = [float(part) for part in text.split(",")]
    if not all(0 < bits <= 2 * SLICES for bits in found):
        raise ValueError
    return found


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen2.5-1.5b")
    parser.add_argument("--bits", type=budgets, default=[1.0, 2.0, 3.0, 4.0], help=f"above 0, up to {2 * SLICES}")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--tune", action="store_true", help="look for the fastest block sizes of each group first")
    parser.add_argument("--quick", action="store_true", help="5 rounds of SmolLM2's shapes")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if options.quick:
        options.model, options.rounds = "smollm2-135m", 5
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(argv)
    try:
        gpu = the_gpu()
        rows = []
        for name, shape in MODELS[options.model].items():
            common.note(f"{options.model} {name}")
            rows += measure_group(name, shape, options, gpu["cache_bytes"])
    except LowtideError as error:
        print(f"gpu: error: {error}", file=sys.stderr)
        return 2
    rows += whole_layers(rows)
    result = common.report(
        {"model": options.model, **gpu, "rounds": options.rounds, "rows": rows}, triton=gpu["triton"]
    )
    path = common.save(f"gpu-{options.model}" + ("-quick" if options.quick else ""), result, table(rows))
    print(json.dumps(result, indent=2) if options.json else f"{gpu['gpu']}\n\n{table(rows)}\n\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
