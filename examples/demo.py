"""`make demo`: compress a real model, measure it at five budgets, let it write at two of them, draw the curve.

Everything here is the public Python API; the commands it stands for are printed as it goes. What it makes lies
in demo/. The text it is measured on, examples/harbour.txt, was written for this project.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import lowtide
from lowtide.cli.compress import progress_bar
from lowtide.cli.output import bits_label, print_table
from lowtide.eval import write_html, write_png
from lowtide.kernels.native import default_threads

MODEL = "demo:smollm2"
TEXT = Path(__file__).with_name("harbour.txt")
OUT = Path("demo")
ARTIFACT = OUT / "smollm2.lowtide"
BUDGETS = (2.5, 3.0, 3.5, 4.0, None)
WRITE_AT = (2.5, 4.0)
PROMPT = "The best way to learn how the tide works is"


def main() -> None:
    started = time.monotonic()
    OUT.mkdir(exist_ok=True)
    compress()
    points = measure()
    for bits in WRITE_AT:
        write(bits)
    draw(points)
    print(f"\ndone in {time.monotonic() - started:.0f} s")


def step(command: str) -> None:
    print(f"\n$ {command}", flush=True)


def compress() -> None:
    """The artifact, unless an earlier run left it."""
    step(f"lowtide compress {MODEL} {ARTIFACT}")
    if ARTIFACT.exists():
        print(f"{ARTIFACT} is there already: delete it to compress again")
        return
    with progress_bar() as progress:
        figures = lowtide.compress(MODEL, ARTIFACT, progress=progress)
    print(
        f"{figures['weights'] / 1e6:.1f} M weights in {figures['file_bytes'] / 1e6:.1f} MB: "
        f"{figures['file_bits_per_weight']:.2f} bits per weight, {figures['seconds']:.0f} s"
    )


def measure() -> list[dict[str, float]]:
    """Quality and speed at every budget: prints the table, keeps it in demo/results.json."""
    labels = ",".join(map(bits_label, BUDGETS))
    threads = default_threads()
    step(f"lowtide eval {ARTIFACT} --reference {MODEL} --text {os.path.relpath(TEXT)} --bits {labels}")
    quality = lowtide.evaluate(ARTIFACT, MODEL, TEXT, bits=BUDGETS)
    step(f"lowtide bench {ARTIFACT} --bits {labels} -p 256 -n 64 -t {threads} -r 3")
    speed = lowtide.bench(ARTIFACT, BUDGETS, prompt_tokens=256, max_tokens=64, threads=threads, repetitions=3)
    points = [q | s for q, s in zip(quality["points"], speed["points"], strict=True)]
    (OUT / "results.json").write_text(json.dumps({"quality": quality, "speed": speed}, indent=2) + "\n")
    print_table(
        ("bits", "read, body", "read, all", "KL (nats)", "perplexity", "tokens/s", "MB/token"),
        (
            (
                bits_label(p["bits"]),
                f"{p['bits_read_body']:.3f}",
                f"{p['bits_read_total']:.3f}",
                f"{p['kl']:.4f}",
                f"{p['ppl']:.2f}",
                f"{p['decode_tps']:.0f} ± {p['decode_tps_sd']:.0f}",
                f"{p['bytes_read_per_token'] / 1e6:.1f}",
            )
            for p in points
        ),
    )
    print(f"perplexity of the dense model: {quality['dense_ppl']:.2f}; engine: {speed['isa']}, {threads} threads")
    return quality["points"]


def write(bits: float) -> None:
    """The same beginning continued at one budget."""
    step(f'lowtide generate {ARTIFACT} --prompt "{PROMPT}" -n 64 --bits {bits:g}')
    with lowtide.load(ARTIFACT) as model:
        print(PROMPT, end="")
        for piece in model.generate(PROMPT, max_tokens=64, bits=bits):
            print(piece, end="", flush=True)
        print(f"\n[{model.stats.bits_read_body:.2f} bits read per weight, {model.stats.decode_tps:.0f} tokens/s]")


def draw(points: list[dict[str, float]]) -> None:
    """KL against bits read, as a picture and as a page that needs nothing else."""
    title = "SmolLM2-135M: one artifact, five budgets"
    curves = {"lowtide, channel-norm": points}
    write_png(curves, OUT / "kl.png", title)
    write_html(curves, OUT / "kl.html", title)
    print(f"\nthe curve: {OUT / 'kl.png'} and {OUT / 'kl.html'}; the figures: {OUT / 'results.json'}")


if __name__ == "__main__":
    main()
