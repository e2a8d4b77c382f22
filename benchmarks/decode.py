#!/usr/bin/env python3
"""Decode speed of lowtide against llama.cpp, interleaved: A B A B ..., each in a process of its own.

    python benchmarks/decode.py smollm2.lowtide smollm2-f16.gguf --bits 3.8 --llama-python ~/llama/bin/python

Both decode the same tokens of real text, one at a time, logits computed for each; lowtide with its budget controller
running. The GGUF is quantised by llama.cpp to --type first (kept in --work) unless it is that type already. Reported:
tokens per second of every round, medians, and the ratio of the medians (above 1: lowtide is faster).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import peers

from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.runtime.budget import parse_bits
from lowtide.runtime.model import load_tokenizer

TEXT = (
    "The harbour lies where the river meets the sea. Twice a day the water comes in and twice a day it leaves, "
    "and the people who live there have learned to do their work by it. When the tide is low the boats rest on "
    "the mud, and the children walk out to look for crabs between the stones. When it is high again the fishermen "
    "leave before sunrise, one after the other, and the town is quiet until they come back in the evening with "
    "what they have caught."
)


def interleave(
    engines: Mapping[str, Callable[[], float]], rounds: int, pause: float, sleep: Callable[[float], None] = time.sleep
) -> dict[str, list[float]]:
    """Runs every engine once for warm-up, then all of them in turn, `rounds` times; tokens per second of each round.

    The order turns round every time (A B, B A, ...), so that none always follows the other; `pause` seconds let
    threads of the engine before go to sleep.
    """
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for run in engines.values():
        run()
    for i in range(rounds):
        order = list(engines) if i % 2 == 0 else list(engines)[::-1]
        for name in order:
            sleep(pause)
            speeds[name].append(engines[name]())
    return speeds


def summary(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, spread and the ratio of medians (first engine over the second)."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    first, second = medians.values()
    return {
        "tokens_per_second": speeds,
        "median": medians,
        "sd": {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in speeds.items()},
        "ratio_of_medians": first / second,
    }


def quantised(options: argparse.Namespace, worker: peers.Worker) -> Path:
    """The GGUF of the wanted type."""
    source = Path(options.gguf)
    if not source.is_file():
        raise LowtideError(f"{source}: no such file")
    if not peers.is_f16_gguf(source):
        return source
    path: Path = options.work / f"{source.stem}.{options.type}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        worker("quantise", source=str(source), path=str(path), kind=options.type, threads=options.threads)
    return path


@dataclass
class Timed:
    """Calling it decodes the text once and gives tokens per second; `last` is the worker's last reply."""

    worker: peers.Worker
    ids: list[int]
    prompt: int
    last: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> float:
        self.last = self.worker("decode", ids=self.ids, prompt=self.prompt)
        return float(self.last["tokens"] / self.last["seconds"])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The interleaved run of all budgets; one entry for each."""
    artifact = open_artifact(options.artifact)
    ids = (load_tokenizer(artifact).encode(TEXT, special=False) * 8)[: options.prompt + options.tokens]
    context = len(ids) + 1
    points = []
    version = ""
    for bits in (parse_bits(b) for b in options.bits.split(",")):
        with peers.Worker("lowtide") as ours, peers.Worker("llama", options.llama_python) as theirs:
            path = quantised(options, theirs)
            mine = ours("open", path=str(options.artifact), threads=options.threads, context=context, bits=bits)
            version = theirs("open", path=str(path), threads=options.threads, context=context)["version"]
            engines = {"lowtide": Timed(ours, ids, options.prompt), "llama.cpp": Timed(theirs, ids, options.prompt)}
            found = summary(interleave(engines, options.rounds, options.pause))
            last = engines["lowtide"].last
        about = {"bits": "dense" if bits is None else bits, "bits_read_body": last["mean_bits"], "isa": mine["isa"]}
        read = {"bytes_read_per_token": last["bytes_read"] / last["tokens"], "peer_file_bytes": path.stat().st_size}
        points.append(about | read | found)
    return {"peer": path.name, "llama_cpp_python": version, "threads": options.threads, "points": points}


def table(points: list[dict[str, Any]]) -> str:
    """The figures for people."""
    columns = (
        "bits",
        "read, body",
        "lowtide tok/s",
        "llama.cpp tok/s",
        "ratio of medians",
        "MB/token",
        "llama.cpp file, MB",
    )
    rows = [
        (
            p["bits"],
            f"{p['bits_read_body']:.3f}",
            *(f"{p['median'][name]:.1f} ± {p['sd'][name]:.1f}" for name in ("lowtide", "llama.cpp")),
            f"{p['ratio_of_medians']:.3f}",
            f"{p['bytes_read_per_token'] / 1e6:.1f}",
            f"{p['peer_file_bytes'] / 1e6:.1f}",
        )
        for p in points
    ]
    return common.markdown(columns, rows)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("gguf", help="F16 GGUF of the same model, or one quantised already")
    parser.add_argument("--bits", default="3.8")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds of rest between runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python; this one by default")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--label", help="name of the results file; the artifact's by default")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 16 tokens")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.tokens = 3, 16
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(argv)
    try:
        figures = measure(options)
    except LowtideError as error:
        print(f"decode: error: {error}", file=sys.stderr)
        return 2
    label = options.label or Path(options.artifact).stem
    settings = {"tokens": options.tokens, "prompt": options.prompt, "rounds": options.rounds}
    result = common.report({"model": label} | settings | figures, llama_cpp_python=figures["llama_cpp_python"])
    path = common.save(f"decode-{label}" + ("-quick" if options.quick else ""), result, table(figures["points"]))
    print(
        json.dumps(result, indent=2)
        if options.json
        else f"{table(figures['points'])}\n\nagainst {figures['peer']}; {path}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
