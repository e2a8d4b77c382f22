"""`lowtide chat`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lowtide.cli.options import (
    Artifact,
    Bits,
    CacheBits,
    Context,
    Head,
    Isa,
    MaxTokens,
    Policy,
    Preload,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
)


def chat(
    artifact: Artifact,
    system: Annotated[str | None, typer.Option(help="System message to begin with.")] = None,
    max_tokens: MaxTokens = 512,
    bits: Bits = "3",
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    seed: Seed = None,
    policy: Policy = None,
    head: Head = "once",
    threads: Threads = None,
    isa: Isa = None,
    context: Context = None,
    cache_bits: CacheBits = 16,
    preload: Preload = False,
) -> None:
    """Talk with the model, one message per line.

    /clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C cuts an answer short.

    \b
    Examples:
      lowtide chat smollm2.lowtide --bits 3.5
      echo "What is a tide?" | lowtide chat smollm2.lowtide --temperature 0
    """
    from lowtide.runtime.budget import parse_bits, parse_head
    from lowtide.runtime.model import load

    budget = parse_bits(bits)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    with load(artifact, threads, isa, context, cache_bits, head=parse_head(head)) as model:
        if preload:
            model.preload(budget, policy)
        while (line := _read_line()) is not None:
            if line == "/clear":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": line})
            answer = ""
            try:
                for piece in model.chat(messages, max_tokens, budget, temperature, top_k, top_p, seed, policy):
                    answer += piece
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            except KeyboardInterrupt:  # cuts this answer short; a second one, at the prompt, leaves
                pass
            print()
            messages.append({"role": "assistant", "content": answer})


def _read_line() -> str | None:
    """The next message; None at /exit and at the end of the input. The prompt shows on a terminal only."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line == "/exit":
            return None
        if line:
            return line
