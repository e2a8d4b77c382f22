#!/usr/bin/env python3
"""Where the bytes and the microseconds of a token go, in one artifact at one budget.

    python benchmarks/where.py smollm2.lowtide --bits 2.94 --head 2.5,4 --cache-bits 8 --threads 1,2 --contexts 64,512

Bytes are the engine's count, group by group. Time is sampled with Linux's `perf` while the engine decodes (see
rule_cost.py for how, and for what it needs): processor time of all threads by function, so a share of `waiting` is
threads that have nothing to do. What the product and the outliers take includes their waiting for memory, which is most
of it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import rule_cost
from rule_cost import TEXT, listing, watched

from lowtide.errors import LowtideError
from lowtide.format.reader import Artifact, open_artifact
from lowtide.kernels.native import Engine
from lowtide.runtime.budget import BudgetController, body_side_bits, body_weights, parse_head, policy_params
from lowtide.runtime.model import load_tokenizer

PARTS = {
    "product": r"lowtide.*::(\w+_tile|digits|tiles|partial|combine|in_order|ask)\b",
    "scales, outliers": r"lowtide.*::(write_tiles|scale_and_correct|outliers\w*|Engine::share_entries)\b",
    "masks": rf"lowtide.*::({rule_cost.MASKS}|offsets|Engine::(product|guess|choose|thresholds_of|leading|refine))\b|"
    rf"lowtide.*::Passes::next\b|{rule_cost.PARTS['copies'].pattern}",
    "network": rule_cost.PARTS["network"].pattern,
    "attention": r"lowtide.*::(attend\w*|attention|softmax|store_kv|rope|Engine::(attend|rotate))\b",
    "norms, gates": r"lowtide.*::(rmsnorm|swiglu|embed)\b",
    "waiting": r"lowtide::Pool::|\W*_*sched_yield",
}
"""Functions of each part, as perf names them; what matches none is the interpreter's."""
OTHER = "other"
KINDS = {"qkv": "q, k, v", "o": "o", "gate_up": "gate, up", "down": "down"}
TIME = ("threads", "in cache", "tokens/s", *PARTS, OTHER)
BYTES = ("part", "KB/token", "share")


def parts_of(report: str) -> dict[str, float]:
    """Shares of the parts in a listing of `perf report`, lines `period;samples;symbol`."""
    found = dict.fromkeys((*PARTS, OTHER), 0)
    for line in report.splitlines():
        fields = [part.strip() for part in line.split(";", 2)]
        if len(fields) == 3 and fields[0].isdigit():
            symbol = fields[2].removeprefix("[.]").strip()
            found[next((n for n, p in PARTS.items() if re.match(p, symbol)), OTHER)] += int(fields[0])
    total = sum(found.values())
    if not total:
        raise LowtideError(f"perf saw nothing of this process: {rule_cost.NEED}")
    if not found["product"]:
        raise LowtideError("perf names no function of the engine: build it with cmake, name it in LOWTIDE_LIBRARY")
    return {name: value / total for name, value in found.items()}


class Watched:
    """The engine at one thread count, decoding the same tokens again and again."""

    def __init__(self, options: argparse.Namespace, threads: int, ids: Sequence[int]) -> None:
        self.options, self.ids, self.threads = options, ids, threads
        self.artifact = open_artifact(options.artifact)
        room = max(options.contexts) + options.tokens
        self.engine = Engine(self.artifact, threads=threads, max_context=room, cache_bits=options.cache_bits)
        params = policy_params(self.artifact, options.policy, options.bits, parse_head(options.head))
        side = body_side_bits(self.artifact, params.rule)
        self.controller = BudgetController(params, options.bits, body_weights(self.artifact), side)

    def once(self, context: int) -> tuple[float, float]:
        """Seconds of `tokens` tokens behind `context` others, and the bytes that each read on average."""
        began, count, read = time.perf_counter(), self.options.tokens, 0
        for place in range(context, context + count):
            _, stats = self.engine.decode(self.ids[place], place, self.controller.params)
            self.controller.update(stats.body_bits)
            read += stats.bytes_read
        return time.perf_counter() - began, read / count

    def bytes(self, context: int) -> dict[str, float]:
        """Bytes of a token by part, mean of the same tokens."""
        count = self.options.tokens
        groups, head, total = np.zeros(len(KINDS)), 0.0, 0.0
        for place in range(context, context + count):
            _, stats = self.engine.decode(self.ids[place], place, self.controller.params)
            body = self.engine.group_bits()[:-1]
            groups += body.reshape(-1, len(KINDS)).sum(0) / (8 * count)
            head += stats.head_bits / (8 * count)
            total += stats.bytes_read / count
        always, outliers = side_bytes(self.artifact, self.controller.params.rule)
        found = {f"slices of {kind}": float(n) - a for kind, n, a in zip(KINDS.values(), groups, always, strict=True)}
        found |= {"outliers": outliers, "scales, means, network": sum(always) - outliers}
        found["output head, embedding row"] = head
        return found | {"keys and values": total - sum(found.values())}

    def row(self, context: int) -> dict[str, Any]:
        """Shares of time, tokens per second and bytes at a context."""
        self.engine.prefill(list(self.ids[:context]), 0)
        self.once(context)
        with tempfile.TemporaryDirectory() as folder:
            file, seconds, tokens = Path(folder) / "perf.data", 0.0, 0
            with watched(self.options.event, self.options.frequency, file):
                while seconds < self.options.seconds:
                    taken, read = self.once(context)
                    seconds, tokens = seconds + taken, tokens + self.options.tokens
            shares = parts_of(listing(file))
        about = {"threads": self.threads, "context": context, "isa": self.engine.isa, "tps": tokens / seconds}
        return about | {"bytes_per_token": read, "time": shares}


def side_bytes(artifact: Artifact, rule: str) -> tuple[list[float], float]:
    """Bytes read whatever the mask is: of every kind of group, all of it; and of outliers, which are among them."""
    always, outliers = dict.fromkeys(KINDS, 0.0), 0.0
    for name, group in artifact.groups.items():
        if name in ("head", "embed"):
            continue
        always[name.rpartition(".")[2]] += group.side_bytes(rule == "ipn")
        for linear in group.linears:
            outliers += sum(getattr(linear, field).nbytes for field in vars(linear) if field.startswith("outlier_"))
    return list(always.values()), outliers


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("artifact", type=Path)
    add("--policy", help="stored mask rule; the artifact's first by default")
    add("--bits", type=float, default=3.0)
    add("--head", default="once", help="as for `lowtide generate`")
    add("--cache-bits", type=int, default=16, choices=(8, 16))
    add("--threads", default="1,2")
    add("--contexts", default="64,512", help="tokens in the cache")
    add("--tokens", type=int, default=64)
    add("--seconds", type=float, default=3.0, help="of sampling for each row")
    add("--frequency", type=int, default=4000, help="samples per second")
    add("--event", default="cycles:u", help="perf's event; cpu-clock:u where there are no counters")
    add("--text", type=Path, default=TEXT, help="text that is decoded, again and again if it is short")
    add("--label", help="name of the results file; the artifact's by default")
    add("--quick", action="store_true", help="a tenth of the time, one context")
    add("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(argv)
    options.threads = [int(part) for part in options.threads.split(",")]
    options.contexts = [int(part) for part in options.contexts.split(",")]
    if options.quick:
        options.seconds, options.contexts, options.tokens = options.seconds / 10, options.contexts[:1], 16
    return options


def tables(rows: list[dict[str, Any]], divided: dict[str, float], context: int) -> str:
    """Both tables for people."""
    times = [
        (r["threads"], r["context"], f"{r['tps']:.0f}", *(f"{100 * r['time'][n]:.1f} %" for n in (*PARTS, OTHER)))
        for r in rows
    ]
    total = sum(divided.values())
    parts = [(name, f"{value / 1e3:.0f}", f"{100 * value / total:.1f} %") for name, value in divided.items()]
    parts.append(("all", f"{total / 1e3:.0f}", "100 %"))
    return (
        f"## Processor time of all threads\n\n{common.markdown(TIME, times)}\n\n"
        f"## Bytes behind {context} tokens\n\n{common.markdown(BYTES, parts)}"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(argv)
    try:
        artifact = open_artifact(options.artifact)
        length = max(options.contexts) + options.tokens
        ids = load_tokenizer(artifact).encode(options.text.read_text(encoding="utf-8"))
        ids = (ids * (length // len(ids) + 1))[:length]
        rows: list[dict[str, Any]] = []
        divided: dict[str, float] = {}
        for threads in options.threads:
            case = Watched(options, threads, ids)
            for context in options.contexts:
                common.note(f"{threads} threads, {context} tokens in the cache")
                rows.append(case.row(context))
            if threads == options.threads[-1]:
                divided = case.bytes(options.contexts[-1])
            case.engine.close()
    except (LowtideError, OSError, UnicodeDecodeError) as error:
        print(f"where: error: {error}", file=sys.stderr)
        return 2
    label = options.label or options.artifact.name
    about = {n: getattr(options, n) for n in ("bits", "head", "cache_bits", "tokens", "event")}
    about |= {"model": label, "bytes": divided, "rows": rows}
    text = tables(rows, divided, options.contexts[-1])
    path = common.save(f"where-{label}" + ("-quick" if options.quick else ""), common.report(about), text)
    print(json.dumps(rows, indent=2) if options.json else f"{text}\n\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
