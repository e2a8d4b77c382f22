"""`lowtide generate`."""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowtide.cli.options import (
    Artifact,
    Bits,
    CacheBits,
    Context,
    Head,
    Isa,
    Json,
    MaxTokens,
    Multiplier,
    Policy,
    Preload,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from lowtide.runtime.course import Completion, GenerationStats


def generate(
    artifact: Artifact,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; may be given several times.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='A prompt a line; if named .jsonl, objects with "prompt" and maybe "seed".'),
    ] = None,
    max_tokens: MaxTokens = 128,
    bits: Bits = "3",
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    policy: Policy = None,
    head: Head = "once",
    threads: Threads = None,
    isa: Isa = None,
    context: Context = None,
    cache_bits: CacheBits = 16,
    importance_multiplier: Multiplier = 0.0,
    parallel: Annotated[int, typer.Option(help="Prompts decoded in turns, each with a KV cache of its own.")] = 4,
    preload: Preload = False,
    json: Json = False,
) -> None:
    """Continue a text, token by token, or several.

    Figures go to stderr. Several texts come in the order of their prompts, an empty line between them; with --json,
    one object a line. Decoding is per sequence: each says, bit for bit, what it says alone, --seed being that of every
    one. Texts that take turns find in the processor's cache what another has just read.

    \b
    Examples:
      lowtide generate smollm2.lowtide --prompt "The tide is" --bits 3
      lowtide generate smollm2.lowtide -p "Once upon a time" -n 64 --temperature 0.8 --top-p 0.95 --seed 1
      lowtide generate smollm2.lowtide --prompts questions.jsonl --parallel 8 --json
    """
    from lowtide.cli.output import print_json
    from lowtide.runtime.budget import parse_bits, parse_head
    from lowtide.runtime.model import load

    budget = parse_bits(bits)
    label = "dense" if budget is None else budget
    texts, seeds = _prompts(prompt or [], prompts, seed)
    with load(artifact, threads, isa, context, cache_bits, importance_multiplier, parse_head(head)) as model:
        if preload:
            model.preload(budget, policy)
        if len(texts) > 1 or prompts:
            many = model.generate_many(texts, max_tokens, budget, temperature, top_k, top_p, seeds, policy, parallel)
            _print_many(many, label, json)
            if not json:
                print(summary(model.stats), file=sys.stderr)
            return
        pieces = model.generate(texts[0], max_tokens, budget, temperature, top_k, top_p, seeds[0], policy)
        if json:
            text = "".join(pieces)
            print_json({"text": text, **_figures(model.stats, label)})
            return
        sys.stdout.write(texts[0])
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        print(summary(model.stats), file=sys.stderr)


def _prompts(given: list[str], file: Path | None, seed: int | None) -> tuple[list[str], list[int | None]]:
    """Texts, those of the command line first, and a seed for each."""
    from lowtide.errors import LowtideError
    from lowtide.runtime.prompts import Prompt, read_prompts

    found = [Prompt(text) for text in given] + (read_prompts(file) if file else [])
    if not found:
        raise LowtideError("nothing to continue: give --prompt TEXT or --prompts FILE")
    return [p.text for p in found], [seed if p.seed is None else p.seed for p in found]


def _print_many(completions: Iterable[Completion], bits: float | str, json: bool) -> None:
    """Each as it comes."""
    for number, done in enumerate(completions):
        if json:
            print(json_.dumps({"prompt": done.prompt, "text": done.text, **_figures(done.stats, bits)}), flush=True)
        else:
            print("\n" * (number > 0) + done.prompt + done.text, flush=True)


def _figures(stats: GenerationStats, bits: float | str) -> dict[str, Any]:
    return {"bits": bits, **asdict(stats), "decode_tps": stats.decode_tps, "prefill_tps": stats.prefill_tps}


def summary(stats: GenerationStats) -> str:
    """One line of figures about a generation."""
    return (
        f"[{stats.tokens} tokens, {stats.decode_tps:.1f} tokens/s, {stats.bits_read_body:.2f} bits read per weight, "
        f"{stats.bytes_read / 1e6:.1f} MB per token; prompt {stats.prompt_tokens} tokens at {stats.prefill_tps:.1f}/s]"
    )
