#!/usr/bin/env python3
"""What the engine's options cost in quality: keys and values in 8 bits, and the output head read in two passes.

    python benchmarks/engine_options.py smollm2.lowtide smollm2.gguf --text wiki.test.txt --heads "2,4;2.5,4"

KL to the dense model and perplexity as in `lowtide eval`; read, total counts the head and the embedding's row too. The
cache's bytes are those of one token, all layers. Greedy: tokens whose likeliest successor is another one when the head
is read twice than when it is read once, same text, same cache, same masks of the body.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np

from lowtide.cli.options import parse_bits_list
from lowtide.errors import LowtideError
from lowtide.eval import evaluate
from lowtide.eval.text import token_windows
from lowtide.format.reader import Artifact, open_artifact
from lowtide.kernels.native import Engine
from lowtide.runtime.budget import (
    BudgetController,
    body_side_bits,
    body_weights,
    parse_head,
    policy_params,
)
from lowtide.runtime.model import load_tokenizer

COLUMNS = ("cache", "head", "bits", "read, body", "read, total", "KL", "perplexity", "cache bytes", "greedy changed")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("artifact")
    add("reference", help="the model it was made from")
    add("--text", required=True, help="held-out text file")
    add("--windows", type=int, default=4)
    add("--window", type=int, default=512)
    add("--bits", default="2.5,3", help="budgets in bits read per body weight")
    add("--heads", default="2.5,4", help="OFFSET,MARGIN pairs, separated by semicolons")
    add("--policy", help="mask rule; the artifact's first by default")
    add("--threads", type=int)
    add("--label", help="name of the results file; the artifact's by default")
    add("--quick", action="store_true", help="one window of 128 tokens: a trial run")
    add("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(argv)
    if options.quick:
        options.windows, options.window = 1, min(options.window, 128)
    options.label = options.label or Path(options.artifact).stem
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(argv)
    try:
        rows = measure(options)
    except LowtideError as error:
        print(f"engine_options: error: {error}", file=sys.stderr)
        return 2
    cells = [
        (
            f"{r['cache_bits']} bits",
            r["head"],
            f"{r['bits']:g}",
            f"{r['bits_read_body']:.3f}",
            f"{r['bits_read_total']:.3f}",
            f"{r['kl']:.4f}",
            f"{r['ppl']:.3f}",
            r["cache_bytes"],
            None if r["greedy_changed"] is None else f"{r['greedy_changed']} of {r['tokens']}",
        )
        for r in rows
    ]
    table = common.markdown(COLUMNS, cells)
    name = f"engine-options-{options.label}" + ("-quick" if options.quick else "")
    path = common.save(name, common.report({"model": options.label, "rows": rows}), table)
    print(json.dumps(rows, indent=2) if options.json else f"{table}\n\n{path}")
    return 0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of both options against the defaults."""
    artifact = open_artifact(options.artifact)
    cases = [(16, "once"), (8, "once"), *((16, head.strip()) for head in options.heads.split(";"))]
    heads = {head: parse_head(head) for _, head in cases}  # a wrong one is told now, not after the first case
    budgets = [b for b in parse_bits_list(options.bits) if b is not None]
    rows = []
    for cache_bits, head in cases:
        common.note(f"cache of {cache_bits} bits, head {head}")
        found = evaluate(
            artifact,
            options.reference,
            options.text,
            windows=options.windows,
            window=options.window,
            bits=budgets,
            policy=options.policy,
            threads=options.threads,
            cache_bits=cache_bits,
            head=heads[head],
            progress=False,
        )
        for point in found["points"]:
            changed = None if head == "once" else greedy_changes(artifact, options, point["bits"], heads[head])
            about = {"cache_bits": cache_bits, "head": head, "cache_bytes": cache_bytes(artifact, cache_bits)}
            rows.append(about | point | {"greedy_changed": changed, "tokens": found["windows"] * found["window"]})
    return rows


def cache_bytes(artifact: Artifact, cache_bits: int) -> int:
    """Of one token's keys and values; 8 bits come with a f32 scale for each head."""
    c = artifact.config
    one = c.head_dim * 2 if cache_bits == 16 else c.head_dim + 4
    return 2 * c.num_layers * c.num_kv_heads * one


def greedy_changes(artifact: Artifact, options: argparse.Namespace, bits: float, head: tuple[float, float]) -> int:
    """Tokens of the text after which another token is the likeliest when the head is read so."""
    once = policy_params(artifact, options.policy, bits)
    other = policy_params(artifact, options.policy, bits, head)
    reading = {"head_offset": other.head_offset, "head_margin": other.head_margin}
    controller = BudgetController(once, bits, body_weights(artifact), body_side_bits(artifact, once.rule))
    tokenizer = load_tokenizer(artifact)
    ids = token_windows(
        options.text,
        lambda text: tokenizer.encode(text, special=False),
        options.windows,
        options.window,
        artifact.config.vocab_size,
        None,
    )
    engine, changed = Engine(artifact, threads=options.threads, max_context=options.window), 0
    for row in ids.tolist():
        for position, token in enumerate(row):
            params = controller.params
            thresholds = np.concatenate([params.thresholds[:-1], other.thresholds[-1:]])
            so, _ = engine.decode(token, position, dataclasses.replace(params, thresholds=thresholds, **reading))
            fine, stats = engine.decode(token, position, params)
            changed += int(np.argmax(so) != np.argmax(fine))
            controller.update(stats.body_bits)
    engine.close()
    return changed


if __name__ == "__main__":
    sys.exit(main())
