#!/usr/bin/env python3
"""Speed of lowtide against llama.cpp at equal quality, from the first token to the last, in one interleaved run.

    python benchmarks/speed.py smollm2.lowtide:smollm2-f16.gguf:Q4_K_M qwen.lowtide:qwen-f16.gguf:Q4_K_M,Q3_K_M \\
        --kl-text wiki.test.txt --windows 2 --match --llama-python ~/llama/bin/python

A model is ARTIFACT:GGUF:TYPES[:KL.json], the GGUF in F16 (the same weights; llama.cpp makes its types from it, kept in
--work), the types llama.cpp's, with "+fa" for flash attention (Q4_K_M+fa). Both engines decode the same tokens of real
text one at a time, logits for each, in processes of their own that take turns; lowtide with its budget controller
running. KL comes from KL.json, a result of quality.py, or from --kl-text: the same windows and F16 model for both.
With --match the lowest budget that is as good as each type is added to --bits.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import common
import decode
import peers
import speed_measure
import speed_report
from speed_kl import FromFile, Measured, quality_of
from speed_measure import Subject, blocks_of, measure_block

from lowtide.errors import LowtideError
from lowtide.format.reader import Artifact, open_artifact
from lowtide.kernels.native import available_isas
from lowtide.runtime.budget import parse_bits, parse_head
from lowtide.runtime.model import load_tokenizer

QUICK = "smol"
"""--quick takes the models with this in their name (the first, if none has)."""


def numbers(text: str) -> list[int]:
    """A list of positive numbers, ascending, for argparse."""
    found = sorted({int(n) for n in text.split(",")})
    if not found or found[0] < 1:
        raise argparse.ArgumentTypeError("give positive numbers, separated by commas")
    return found


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", metavar="ARTIFACT:GGUF:TYPES[:KL.json]")
    add("--bits", default="2.5,3,3.5,4", help='budgets; "dense" reads everything')
    add("--match", action="store_true", help="add the lowest budget that is as good as each type; needs KL")
    add("--policy", help="mask rule that the artifacts store; their first by default")
    add("--head", default="once", help="how lowtide reads the output head, as for `lowtide generate`")
    add("--cache-bits", type=int, default=16, help="bits of lowtide's keys and values, 16 or 8; llama.cpp has 16")
    add("--kl-text", help="held-out text; without it and KL.json the KL column is empty")
    add("--windows", type=int, default=2)
    add("--window", type=int, default=512)
    add("--threads", type=numbers, default=[1, 2], help="thread counts; contexts and prompts take the highest")
    add("--contexts", type=numbers, default=[16, 512, 1024], help="tokens already in the cache")
    add("--isas", default="avx2,portable", help="further instruction sets; empty for none")
    add("--text", action="append", default=[], metavar="FILE", help="decode these instead of the built-in prompts")
    add("--tokens", type=int, default=64, help="tokens decoded in a round")
    add("--rounds", type=int, default=11)
    add("--prefill", type=int, default=512, help="tokens of the prefill test")
    add("--prefill-rounds", type=int, default=5)
    add("--starts", type=int, default=5, help="warm starts of each setting")
    add("--cold-starts", type=int, default=3, help="starts from disk, and unverified ones")
    add("--halve", default="4,2", help="budgets whose decode times without the head are compared")
    add("--pause", type=float, default=0.2, help="seconds of rest between runs")
    add("--llama-python", help="interpreter that has llama-cpp-python; this one by default")
    add("--work", type=Path, default=Path("build/benchmarks"), help="where made files are kept")
    add("--label", help="name of the results file; the models' by default")
    add("--quick", action="store_true", help="SmolLM2 alone, few rounds: a trial run")
    add("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.prefill_rounds, options.starts, options.cold_starts = 3, 2, 2, 1
        options.contexts, options.tokens, options.isas = options.contexts[:1], 16, ""
    for name in ("rounds", "tokens", "prefill", "prefill_rounds", "starts"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be 1 or more")
    options.isas = [i for i in options.isas.split(",") if i]
    return options


def check(options: argparse.Namespace) -> None:
    """Everything that can be refused before anything is measured; parses budgets in place.

    Raises:
        LowtideError: budgets, --head, instruction sets or --match without KL.
    """
    budgets = [parse_bits(b) for b in options.bits.split(",")]
    options.bits = ["dense" if b is None else b for b in budgets]
    halves = [parse_bits(b) for b in options.halve.split(",")]
    if len(halves) != 2 or None in halves:
        raise LowtideError("--halve: give two budgets, e.g. 4,2")
    options.halve = halves
    parse_head(options.head)
    have = available_isas()
    for isa in options.isas:
        if isa not in have:
            raise LowtideError(f"--isas {isa}: not available on this machine; it has {', '.join(have)}")
    if options.match and not options.kl_text and any(m.count(":") < 3 for m in options.models):
        raise LowtideError("--match: needs the KL of every model; give --kl-text or KL.json")


def parts_of(model: str) -> tuple[Path, Path, list[str], str | None]:
    """ARTIFACT:GGUF:TYPES[:KL.json] taken apart.

    Raises:
        LowtideError: it has other parts, or the GGUF is not there or not F16.
    """
    parts = model.split(":")
    if len(parts) not in (3, 4) or not all(parts):
        raise LowtideError(f"{model}: give ARTIFACT:GGUF:TYPES, e.g. smollm2.lowtide:smollm2-f16.gguf:Q4_K_M")
    if not Path(parts[1]).is_file():
        raise LowtideError(f"{parts[1]}: no such file")
    if not peers.is_f16_gguf(parts[1]):
        raise LowtideError(f"{parts[1]}: is quantised already; give the F16 model, llama.cpp makes its types from it")
    return Path(parts[0]), Path(parts[1]), parts[2].split(","), parts[3] if len(parts) == 4 else None


def texts_of(artifact: Artifact, options: argparse.Namespace) -> dict[str, list[int]]:
    """Token ids of each prompt, repeated until they last for every context."""
    tokenizer = load_tokenizer(artifact)
    if options.text:
        sources = {Path(p).stem: read(p) for p in options.text}
    else:
        sources = {"prose": decode.TEXT, "code": inspect.getsource(argparse)}
    length = max(options.prefill, options.contexts[-1] + options.tokens)
    if length > artifact.config.max_position:
        raise LowtideError(f"--contexts: {length} tokens, the model holds {artifact.config.max_position}; ask for less")
    found = {}
    for name, text in sources.items():
        ids = tokenizer.encode(text[: 16 * length], special=False)
        found[name] = (ids * (length // max(len(ids), 1) + 1))[:length]
        if not ids:
            raise LowtideError(f"--text: {name} holds no tokens")
    return found


def read(path: str) -> str:
    """A text file.

    Raises:
        LowtideError: it cannot be read.
    """
    from lowtide.eval.text import read_text

    return read_text(path)


def measure_model(model: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All rows and blocks of one model."""
    path, source, kinds, kl_file = parts_of(model)
    artifact = open_artifact(path)
    policy = options.policy or artifact.manifest.policies[0]

    def path_of(kind: str) -> Path:
        with peers.Worker("llama", options.llama_python) as worker:
            wanted = {"gguf": str(source), "type": kind, "work": options.work, "threads": options.threads[-1]}
            return decode.quantised(argparse.Namespace(**wanted), worker)

    texts = texts_of(artifact, options)
    files = {kind: path_of(kind) for kind in dict.fromkeys(k.partition("+")[0] for k in kinds)}
    quality: FromFile | Measured | None = None
    if kl_file and options.head != "once":
        raise LowtideError("--head: KL.json has the figures of a head read once; measure with --kl-text")
    if kl_file:
        quality = FromFile(kl_file, policy)
    elif options.kl_text:
        quality = Measured(artifact, source, options, files.__getitem__)
    budgets, kl = quality_of(quality, options.bits, kinds, options.match)
    start = load_tokenizer(artifact).encode(speed_measure.START_TEXT)
    subject = Subject(path.stem, artifact.config, path, files, kinds, budgets, texts, start)
    del quality, artifact  # as long as this process maps the files, no start is cold
    gc.collect()
    rows, blocks = [], []
    best = os.environ.get("LOWTIDE_ISA") or available_isas()[0]
    for block in blocks_of(options, best, list(texts)):
        found, about = measure_block(subject, block, options)
        rows += [speed_report.ordered(r | {"kl": kl[r["setting"].partition("+")[0]]}) for r in found]
        blocks.append(about)
    return rows, blocks


def chosen(options: argparse.Namespace) -> list[str]:
    """The models to measure."""
    models: list[str] = options.models
    if not options.quick:
        return models
    return [m for m in models if QUICK in Path(m.partition(":")[0]).name.lower()] or models[:1]


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(argv)
    rows, blocks = [], []
    load_before = os.getloadavg()[0]
    try:
        check(options)
        for model in chosen(options):
            parts_of(model)  # a mistake in the last must not cost the first one's hour
        for model in chosen(options):
            found, about = measure_model(model, options)
            rows += found
            blocks += about
    except LowtideError as error:
        print(f"speed: error: {error}", file=sys.stderr)
        return 2
    names = list(dict.fromkeys(r["model"] for r in rows))
    settings = (
        "tokens",
        "rounds",
        "prefill",
        "prefill_rounds",
        "starts",
        "cold_starts",
        "windows",
        "window",
        "cache_bits",
        "head",
    )
    figures = {
        "model": ", ".join(names),
        "settings": {name: getattr(options, name) for name in settings}
        | {"kl_text": Path(options.kl_text).name if options.kl_text else None, "load_before": load_before},
        "ratios": speed_report.ratios(rows),
        "blocks": blocks,
        "rows": rows,
    }
    result = common.report(figures, llama_cpp_python=blocks[0]["llama_cpp_python"])
    text = speed_report.text(result)
    name = f"speed-{options.label or '-'.join(names)}" + ("-quick" if options.quick else "")
    saved = common.save(name, result, text)
    print(json.dumps(result, indent=2) if options.json else f"{text}\n\n{saved}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
