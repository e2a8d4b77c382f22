#!/usr/bin/env python3
"""What the engine's options cost in quality: keys and values in 8 bits, and the output head read in two passes.

    python benchmarks/options.py smollm2.lowtide smollm2-f16.gguf --text wiki.test.txt --bits 2.5,3 --heads "2,4;2.5,4"

KL to the dense model and perplexity as in `lowtide eval`; read, total counts the head and the embedding's row too. The
cache's bytes are those of one token, all layers. Greedy: tokens whose likeliest successor is another one when the head
is read twice than when it is read once, same text, same cache, same masks of the body.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
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


def main() -> None:
    """See the module's text."""
    options = _options()
    try:
        rows = measure(options)
    except LowtideError as error:
        sys.exit(f"error: {error}")
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
    print(table)
    result = common.report({"model": options.label, "rows": rows})
    print(common.save(f"options-{options.label}", result, table), file=sys.stderr)


def _options() -> argparse.Namespace:
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
    add("--label", default="model", help="name of the results file")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of both options against the defaults."""
    artifact = open_artifact(options.artifact)
    heads = [h.strip() for h in options.heads.split(";")]
    cases = [(16, "once"), (8, "once"), *((16, head) for head in heads)]
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
            head=parse_head(head),
            progress=False,
        )
        for point in found["points"]:
            changed = None if head == "once" else greedy_changes(artifact, options, point["bits"], parse_head(head))
            about = {"cache_bits": cache_bits, "head": head, "cache_bytes": cache_bytes(artifact, cache_bits)}
            rows.append(about | point | {"greedy_changed": changed, "tokens": found["windows"] * found["window"]})
    return rows


def cache_bytes(artifact: Artifact, cache_bits: int) -> int:
    """Of one token's keys and values; 8 bits come with a f32 scale for each head."""
    c = artifact.config
    one = c.head_dim * 2 if cache_bits == 16 else c.head_dim + 4
    return 2 * c.num_layers * c.num_kv_heads * one


def greedy_changes(artifact: Artifact, options: argparse.Namespace, bits: float, head: tuple[float, float]) -> int:
    """Tokens of the text after which another token is the likeliest when the head is read twice."""
    once = policy_params(artifact, options.policy, bits)
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
            twice = dataclasses.replace(params, head_offset=head[0], head_margin=head[1])
            coarse, _ = engine.decode(token, position, twice)
            fine, stats = engine.decode(token, position, params)
            changed += int(np.argmax(coarse) != np.argmax(fine))
            controller.update(stats.body_bits)
    engine.close()
    return changed


if __name__ == "__main__":
    main()
