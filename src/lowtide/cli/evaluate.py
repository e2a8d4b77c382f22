"""`lowtide eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.options import (
    Artifact,
    BitsList,
    CacheBits,
    Head,
    Isa,
    Json,
    Multiplier,
    Policy,
    Threads,
    parse_bits_list,
)


def evaluate(
    artifact: Artifact,
    reference: Annotated[str, typer.Option(help="The model it was made from.", metavar="MODEL")],
    text: Annotated[Path, typer.Option(help="Held-out text, UTF-8.", metavar="FILE")],
    windows: Annotated[int, typer.Option(help="Windows at most, from the start of the text.")] = 4,
    window: Annotated[int, typer.Option(help="Tokens of each window.")] = 512,
    bits: BitsList = "2.5,3,3.5",
    bos: Annotated[bool, typer.Option("--bos", help="Begin every window with the begin-of-sequence token.")] = False,
    policy: Policy = None,
    head: Head = "once",
    threads: Threads = None,
    isa: Isa = None,
    cache_bits: CacheBits = 16,
    importance_multiplier: Multiplier = 0.0,
    json: Json = False,
) -> None:
    """Measure quality: KL to the dense model, perplexity, bits read.

    Every token of every window runs under its own masks, as it does when text is generated.

    \b
    Examples:
      lowtide eval smollm2.lowtide --reference demo:smollm2 --text wiki.test.txt
      lowtide eval smollm2.lowtide --reference demo:smollm2 --text wiki.test.txt --bits 2.5,3,3.5,4,dense --json
    """
    import sys

    from lowtide.cli.output import bits_label, print_json, print_table
    from lowtide.eval import evaluate as measure
    from lowtide.runtime.budget import parse_head

    result = measure(
        artifact,
        reference,
        text,
        windows=windows,
        window=window,
        bits=parse_bits_list(bits),
        policy=policy,
        head=parse_head(head),
        threads=threads,
        isa=isa,
        cache_bits=cache_bits,
        bos=bos,
        importance_multiplier=importance_multiplier,
        progress=sys.stderr.isatty(),
    )
    if json:
        print_json(result)
        return
    print_table(
        ("bits", "read, body", "read, all", "KL (nats)", "perplexity"),
        (
            (
                bits_label(p["bits"]),
                f"{p['bits_read_body']:.3f}",
                f"{p['bits_read_total']:.3f}",
                f"{p['kl']:.4f}",
                f"{p['ppl']:.3f}",
            )
            for p in result["points"]
        ),
    )
    print(
        f"dense perplexity {result['dense_ppl']:.3f} over {result['windows']} windows of {result['window']} tokens; "
        f"{result['file_bytes'] / 1e6:.1f} MB on disk, {result['file_bits_per_weight']:.3f} bits per weight"
    )
