#!/usr/bin/env python3
"""Would it pay to store channels in the order of how often they are read? Lines of memory that a token touches.

    python benchmarks/channel_order.py smollm2-f16.gguf smollm2.lowtide --calibration valid.txt --text test.txt --bits 3

A channel's weights of one slice lie in one run of (rows / 4) bytes, and memory is fetched in lines of 64 bytes, so runs
that are read waste less of their first and last line if their neighbours are read as well. Neurons, and the residual
stream as a whole, can be put into another order without changing the function. The order tried here is the best that is
fixed: by how often a channel's slices are read on the calibration text (rule channel-norm). Counted on held-out text:
lines touched per token and slice as stored, in that order, and what the bytes read would fill (the least there can be).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.compress.dense import DenseModel
from lowtide.compress.sources import open_source
from lowtide.compress.text import windows_of_file
from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.learn.graded import GradedModel, budget_tables
from lowtide.learn.ipn import At, Ipn

LINE = 64
COLUMNS = ("matrix", "bytes of a run", "slice", "read", "lines as stored", "in order", "least", "saved")


class Watch(At):
    """The masks of one pass: name -> whether read, bool [S, T, in]."""

    def __init__(self, ipn: Ipn, bits: float) -> None:
        super().__init__(ipn, bits)
        self.read: dict[str, NDArray[np.bool_]] = {}

    def scores(self, name: str, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `lowtide.learn.graded.Masks`."""
        score, theta = super().scores(name, a)
        self.read[name] = torch.stack([score > t for t in theta]).numpy()
        return score, theta


def lines_touched(read: NDArray[np.bool_], run: int) -> float:
    """Lines of memory per token for runs of `run` bytes that lie one after the other; read: bool [T, in]."""
    first = np.arange(read.shape[1]) * run // LINE
    last = (np.arange(read.shape[1]) * run + run - 1) // LINE
    touched = np.zeros((len(read), last[-1] + 1), bool)
    for step in range(int((last - first).max()) + 1):
        here = first + step <= last
        for token in range(len(read)):
            touched[token, (first + step)[here & read[token]]] = True
    return float(touched.sum(1).mean())


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each matrix and slice, means over layers."""
    artifact, dense = open_artifact(options.artifact), DenseModel(open_source(options.model))
    grid, tables = budget_tables(artifact)
    importance = {n: torch.from_numpy(t.astype(np.float32)) for n, t in _importances(artifact).items()}
    ipn = Ipn(importance, grid, tables, parts=("importance",))  # untrained: the rule channel-norm
    model = GradedModel(artifact, dense)
    seen = []
    for file, tokens in ((options.calibration, options.tokens), (options.text, options.tokens // 4)):
        ids = windows_of_file(dense.source, Path(file), windows=1)[:, :tokens]
        watch = Watch(ipn, options.bits)
        with torch.no_grad():
            model.hidden(ids, watch)
        seen.append(watch.read)
    rows: dict[tuple[str, int, int], list[tuple[float, ...]]] = {}
    for layer in range(0, dense.config.num_layers, options.every):
        for kind in ("qkv", "o", "gate_up", "down"):
            name = f"layers.{layer}.{kind}"
            order = np.argsort(-seen[0][name].sum(0).mean(0), kind="stable")
            for linear in artifact.groups[name].linears:
                run, matrix = linear.out_features // 4, linear.name.rpartition(".")[2]
                for index, read in enumerate(seen[1][name]):
                    least = read.sum(1).mean() * run / LINE
                    found = (read.mean(), lines_touched(read, run), lines_touched(read[:, order], run), least)
                    rows.setdefault((matrix, run, index), []).append(tuple(map(float, found)))
    means = {key: np.mean(values, axis=0).tolist() for key, values in rows.items()}
    names = ("read", "lines", "lines_ordered", "lines_least")
    return [
        {"matrix": m, "run_bytes": run, "slice": s} | dict(zip(names, values, strict=True))
        for (m, run, s), values in means.items()
    ]


def _importances(artifact: Any) -> dict[str, NDArray[np.float16]]:
    return {name: group.importance for name, group in artifact.groups.items() if name != "embed"}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model")
    add("artifact")
    add("--calibration", required=True, help="text that the order is made of")
    add("--text", required=True, help="held-out text")
    add("--bits", type=float, default=3.0)
    add("--tokens", type=int, default=512, help="of calibration; a quarter of it is measured")
    add("--every", type=int, default=4, help="layers from one that is counted to the next")
    add("--label", help="name of the results file; the model's by default")
    add("--quick", action="store_true", help="64 tokens: a trial run")
    add("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(argv)
    options.tokens = min(options.tokens, 64) if options.quick else options.tokens
    options.label = options.label or Path(options.model).stem
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(argv)
    try:
        rows = measure(options)
    except LowtideError as error:
        print(f"channel_order: error: {error}", file=sys.stderr)
        return 2
    cells = [
        (
            r["matrix"],
            r["run_bytes"],
            r["slice"],
            f"{r['read']:.2f}",
            f"{r['lines']:.0f}",
            f"{r['lines_ordered']:.0f}",
            f"{r['lines_least']:.0f}",
            f"{1 - r['lines_ordered'] / max(r['lines'], 1e-9):.1%}",
        )
        for r in rows
    ]
    total = sum(r["lines_ordered"] for r in rows) / max(sum(r["lines"] for r in rows), 1e-9)
    table = common.markdown(COLUMNS, cells) + f"\n\nAll of them: {1 - total:.1%} fewer lines in that order."
    name = f"channel-order-{options.label}" + ("-quick" if options.quick else "")
    path = common.save(name, common.report({"model": options.label, "bits": options.bits, "rows": rows}), table)
    print(json.dumps(rows, indent=2) if options.json else f"{table}\n\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
