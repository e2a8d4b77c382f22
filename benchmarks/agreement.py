#!/usr/bin/env python3
"""Native engine against the numpy reference: the same greedy tokens, and how far the log-probabilities are apart.

    python benchmarks/agreement.py smollm2.lowtide stories15m.lowtide --bits 2.5,3.35,4.35

The reference decodes greedily after a prompt. Every instruction set with 1 and 2 threads then decodes the same tokens
under its own budget controller; it must choose each of them itself. All native runs must give the same bits.
Exit code 1 if a token differs, a log-probability differs by 0.02 or more, or native runs differ from each other.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import common
import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.eval.metrics import log_softmax
from lowtide.format.reader import Artifact, open_artifact
from lowtide.kernels.native import Engine, available_isas
from lowtide.kernels.reference import ReferenceEngine
from lowtide.kernels.types import DecodeStats, PolicyParams
from lowtide.runtime.budget import BudgetController, body_side_bits, body_weights, parse_bits, policy_params
from lowtide.runtime.model import load_tokenizer

F32 = NDArray[np.float32]
LIMIT = 0.02
PROMPT = "Once upon a time there was a harbour where the river met the sea, and twice a day the tide came in."
COLUMNS = (
    "artifact",
    "bits",
    "engine",
    "same tokens",
    "largest |delta log p|",
    "of chosen tokens",
    "same bits read",
    "same as first",
)


class Decoder(Protocol):
    """What both engines have."""

    def decode(
        self, token: int, pos: int, policy: PolicyParams, want_logits: bool = True
    ) -> tuple[F32, DecodeStats]: ...

    def prefill(self, tokens: list[int], pos: int, all_logits: bool = False) -> F32: ...


@dataclass
class Run:
    """Tokens chosen greedily, logits f32 [n + 1, V] before each of them and after the last, body bits of each."""

    tokens: list[int]
    logits: F32
    bits: list[int]


def decode(
    engine: Decoder, artifact: Artifact, bits: float | None, prompt: list[int], count: int, given: list[int] | None
) -> Run:
    """Prefills the prompt and decodes `count` tokens: those given, or the likeliest."""
    params = policy_params(artifact, None, bits)
    controller = BudgetController(params, bits, body_weights(artifact), body_side_bits(artifact))
    logits = [engine.prefill(prompt, 0)]
    chosen, read = [], []
    for i in range(count):
        chosen.append(int(np.argmax(logits[-1])))
        token = chosen[-1] if given is None else given[i]
        after, stats = engine.decode(token, len(prompt) + i, controller.params)
        controller.update(stats.body_bits)
        logits.append(after)
        read.append(stats.body_bits)
    return Run(chosen, np.stack(logits), read)


def compare(reference: Run, run: Run) -> dict[str, Any]:
    """How a native run differs from the reference's."""
    difference = np.abs(log_softmax(run.logits) - log_softmax(reference.logits))
    chosen = difference[np.arange(len(reference.tokens)), reference.tokens]
    differing = [i for i, (a, b) in enumerate(zip(reference.tokens, run.tokens, strict=True)) if a != b]
    return {
        "same_tokens": not differing,
        "first_difference": differing[0] if differing else None,
        "max_delta_logp": float(difference.max()),
        "max_delta_logp_chosen": float(chosen.max()),
        "same_bits_read": reference.bits == run.bits,
    }


def measure(
    artifact: Artifact, name: str, budgets: list[float | None], count: int, threads: list[int]
) -> list[dict[str, Any]]:
    """All budgets, instruction sets and thread counts of one artifact."""
    prompt = load_tokenizer(artifact).encode(PROMPT)[: artifact.config.max_position - count]
    context = len(prompt) + count
    rows = []
    for bits in budgets:
        common.note(f"{name}: reference at {'dense' if bits is None else f'{bits:g}'} bits")
        reference = decode(ReferenceEngine(artifact, max_context=context), artifact, bits, prompt, count, None)
        first: Run | None = None
        for isa in available_isas():
            for n in threads:
                engine = Engine(artifact, threads=n, isa=isa, max_context=context)
                run = decode(engine, artifact, bits, prompt, count, reference.tokens)
                engine.close()
                first = first or run
                same = np.array_equal(first.logits, run.logits)
                about = {"artifact": name, "bits": "dense" if bits is None else bits, "isa": isa, "threads": n}
                rows.append(about | compare(reference, run) | {"same_as_first": same})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The figures for people."""
    yes = {True: "yes", False: "NO"}
    cells = [
        (
            r["artifact"],
            r["bits"],
            f"{r['isa']}, {r['threads']} threads",
            yes[r["same_tokens"]],
            f"{r['max_delta_logp']:.2e}",
            f"{r['max_delta_logp_chosen']:.2e}",
            yes[r["same_bits_read"]],
            yes[r["same_as_first"]],
        )
        for r in rows
    ]
    return common.markdown(COLUMNS, cells)


def passed(rows: list[dict[str, Any]]) -> bool:
    """Whether everything agrees that must."""
    return all(r["same_tokens"] and r["same_as_first"] and r["max_delta_logp"] < LIMIT for r in rows)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("--bits", default="2.5,3.35,4.35")
    parser.add_argument("-n", "--tokens", type=int, default=64)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--quick", action="store_true", help="8 tokens at the first budget")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    try:
        budgets = [parse_bits(b) for b in options.bits.split(",")]
        count = 8 if options.quick else options.tokens
        threads = [int(n) for n in options.threads.split(",")]
        rows = []
        for path in options.artifacts:
            artifact = open_artifact(path)
            rows += measure(artifact, Path(path).stem, budgets[:1] if options.quick else budgets, count, threads)
    except LowtideError as error:
        print(f"agreement: error: {error}", file=sys.stderr)
        return 2
    result = common.report(
        {
            "model": ", ".join(Path(p).stem for p in options.artifacts),
            "tokens": count,
            "passed": passed(rows),
            "rows": rows,
        }
    )
    path = common.save("agreement-quick" if options.quick else "agreement", result, table(rows))
    print(
        json.dumps(result, indent=2)
        if options.json
        else f"{table(rows)}\n\n{'agrees' if passed(rows) else 'DIFFERS'}; {path}"
    )
    return 0 if passed(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
