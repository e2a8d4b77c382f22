"""`lowtide generate`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from lowtide.cli.options import (
    Artifact,
    Bits,
    CacheBits,
    Context,
    Isa,
    Json,
    MaxTokens,
    Multiplier,
    Policy,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from lowtide.runtime.model import GenerationStats


def generate(
    artifact: Artifact,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_tokens: MaxTokens = 128,
    bits: Bits = "3",
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    policy: Policy = None,
    threads: Threads = None,
    isa: Isa = None,
    context: Context = None,
    cache_bits: CacheBits = 16,
    importance_multiplier: Multiplier = 0.0,
    json: Json = False,
) -> None:
    """Continue a text, token by token.

    Figures go to stderr.

    \b
    Examples:
      lowtide generate smollm2.lowtide --prompt "The tide is" --bits 3
      lowtide generate smollm2.lowtide -p "Once upon a time" -n 64 --temperature 0.8 --top-p 0.95 --seed 1
    """
    from lowtide.cli.output import print_json
    from lowtide.runtime.budget import parse_bits
    from lowtide.runtime.model import load

    budget = parse_bits(bits)
    with load(artifact, threads, isa, context, cache_bits, importance_multiplier) as model:
        pieces = model.generate(prompt, max_tokens, budget, temperature, top_k, top_p, seed, policy)
        if json:
            text = "".join(pieces)
            stats = model.stats
            figures = {"text": text, "bits": "dense" if budget is None else budget, **asdict(stats)}
            print_json({**figures, "decode_tps": stats.decode_tps, "prefill_tps": stats.prefill_tps})
            return
        sys.stdout.write(prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        print(summary(model.stats), file=sys.stderr)


def summary(stats: GenerationStats) -> str:
    """One line of figures about a generation."""
    return (
        f"[{stats.tokens} tokens, {stats.decode_tps:.1f} tokens/s, {stats.bits_read_body:.2f} bits read per weight, "
        f"{stats.bytes_read / 1e6:.1f} MB per token; prompt {stats.prompt_tokens} tokens at {stats.prefill_tps:.1f}/s]"
    )
