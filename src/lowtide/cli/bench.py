"""`lowtide bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from lowtide.cli.options import Artifact, BitsList, Head, Isa, Json, Policy, Preload, parse_bits_list


def bench(
    artifact: Artifact,
    bits: BitsList = "2.5,3,3.5",
    prompt_tokens: Annotated[
        int | None, typer.Option("-p", "--prompt-tokens", help="Tokens to prefill. [default: 512, or the context]")
    ] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="Tokens to decode.")] = 128,
    threads: Annotated[int, typer.Option("-t", "--threads", help="Worker threads.")] = 2,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="Measured runs.")] = 5,
    policy: Policy = None,
    head: Head = "once",
    isa: Isa = None,
    preload: Preload = False,
    json: Json = False,
) -> None:
    """Measure prefill and decode speed, as llama-bench does.

    After a warm-up the budgets take turns in each repetition, so a slow spell meets all of them.

    \b
    Examples:
      lowtide bench smollm2.lowtide
      lowtide bench smollm2.lowtide --bits 2.5,3,3.5,dense -p 512 -n 128 -t 2 -r 5 --json
    """
    from lowtide.cli.output import bits_label, print_json, print_table
    from lowtide.runtime.bench import bench as measure
    from lowtide.runtime.budget import parse_head

    result = measure(
        artifact,
        parse_bits_list(bits),
        prompt_tokens,
        max_tokens,
        threads,
        repetitions,
        policy=policy,
        isa=isa,
        preload=preload,
        head=parse_head(head),
    )
    if json:
        print_json(result)
        return
    print_table(
        (
            "bits",
            "read",
            f"decode n={max_tokens} (tok/s)",
            f"prefill p={result['prompt_tokens']} (tok/s)",
            "MB/token",
            "GB/s",
        ),
        (
            (
                bits_label(p["bits"]),
                f"{p['bits_read_body']:.3f}",
                f"{p['decode_tps']:.1f} ± {p['decode_tps_sd']:.1f}",
                f"{p['prefill_tps']:.1f} ± {p['prefill_tps_sd']:.1f}",
                f"{p['bytes_read_per_token'] / 1e6:.2f}",
                f"{p['gb_per_s']:.2f}",
            )
            for p in result["points"]
        ),
    )
    print(
        f"{result['isa']}, {result['threads']} threads, {result['repetitions']} repetitions; "
        f"loaded in {result['load_s']:.2f} s, memory {result['rss_bytes'] / 1e6:.0f} MB, at most "
        f"{result['peak_rss_bytes'] / 1e6:.0f} MB"
    )
