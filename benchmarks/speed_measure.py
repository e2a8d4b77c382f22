"""The measuring part of `speed.py`: one block is one thread count and instruction set, all its engines interleaved."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import common
import decode
import gguf
import peers
import speed_start
from speed_kl import Bits, label

from lowtide.arch import ModelConfig
from lowtide.errors import LowtideError

SCRIPT = Path(__file__).with_name("speed_worker.py")
START_TEXT = "The harbour lies where the river meets the sea. Twice a day"
START_CONTEXT = 512
START_TOKENS = 16


@dataclass
class Subject:
    """A model under measurement.

    Attributes:
        name: for the table.
        config, path: its shapes, and where the artifact lies.
        files: GGUF by llama.cpp type, e.g. {"Q4_K_M": ...}.
        kinds: llama.cpp settings: a type, with "+fa" if flash attention is to be used.
        bits: lowtide's budgets.
        texts: token ids by name of prompt, each long enough for every context.
        start: ids of START_TEXT.
    """

    name: str
    config: ModelConfig
    path: Path
    files: dict[str, Path]
    kinds: list[str]
    bits: list[Bits]
    texts: dict[str, list[int]]
    start: list[int]


@dataclass
class Block:
    """What is run in one go: `cases` are (prompt, tokens already in the cache); no isa is the best there is."""

    threads: int
    isa: str | None
    cases: list[tuple[str, int]]
    rounds: int
    tokens: int
    prefill: int
    prefill_rounds: int
    starts: int
    cold_starts: int = 0
    kernel: bool = False


@dataclass
class Timed:
    """Calling it sends the request and gives tokens per second; `replies` keeps all but the warm-up's."""

    worker: peers.Worker
    do: str
    request: dict[str, Any]
    replies: list[dict[str, Any]] = field(default_factory=list)
    _warm: bool = False

    def __call__(self) -> float:
        reply = self.worker(self.do, **self.request)
        if self._warm:
            self.replies.append(reply)
        self._warm = True
        return float(reply["tokens"] / reply["seconds"])

    def mean(self, key: str) -> float:
        """Mean per token of a count in the replies."""
        return sum(r[key] for r in self.replies) / sum(r["tokens"] for r in self.replies)


@dataclass
class Team:
    """The processes of a block: lowtide, and one llama.cpp for each setting."""

    ours: peers.Worker
    theirs: dict[str, peers.Worker]
    isas: dict[str, str]
    version: str

    def requests(self, do: str, bits: list[Bits], **request: Any) -> dict[str, Timed]:
        """The same request to everyone; to lowtide once for each budget."""
        engines = {label(b): Timed(self.ours, do, request | {"bits": b}) for b in bits}
        return engines | {kind: Timed(worker, do, request) for kind, worker in self.theirs.items()}


def measure_block(
    subject: Subject, block: Block, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All rows of a block (without KL), and {"run", "probe_gb_per_s", "llama_cpp_python", "halving" if asked for}."""
    starts = measure_starts(subject, block, options)  # first: nobody must have the files mapped
    with ExitStack() as stack:
        team = open_team(subject, block, options, stack)
        run = f"{block.threads} thread{'s' * (block.threads > 1)}, {team.isas['lowtide']}"
        probes = [team.ours("bandwidth")["bytes_per_second"]]
        common.note(f"{subject.name}, {run}: prefill")
        prefill = measure_prefill(subject, team, block, options.pause)
        rows = []
        for prompt, context in block.cases:
            common.note(f"{subject.name}, {run}: decode, {prompt}, {context} tokens in the cache")
            engines = team.requests(
                "decode_at", subject.bits, ids=subject.texts[prompt], context=context, tokens=block.tokens
            )
            speeds = decode.interleave(engines, block.rounds, options.pause)
            probes.append(team.ours("bandwidth")["bytes_per_second"])
            for name, values in speeds.items():
                about = {"model": subject.name, "run": run, "prompt": prompt, "context": context}
                row = decode_row(subject, engines[name], name, values, context + block.tokens / 2)
                row |= {"threads": block.threads, "isa": team.isas[name if name in team.theirs else "lowtide"]}
                rows.append(about | row | prefill["lowtide" if row["engine"] == "lowtide" else name] | starts[name])
        probe = statistics.median(probes) / 1e9
        for row in rows:
            row |= {"probe_gb_per_s": probe, "of_memory_limit": row["gb_per_s"] / probe}
        about_block = {"model": subject.name, "run": run, "probe_gb_per_s": probe, "llama_cpp_python": team.version}
        if block.kernel:
            about_block["halving"] = measure_halving(subject, team, block, options)
        return rows, about_block


def open_team(subject: Subject, block: Block, options: argparse.Namespace, stack: ExitStack) -> Team:
    """Starts the processes and opens the model in each."""
    context = max(block.prefill, max(c for _, c in block.cases) + block.tokens)
    ours = stack.enter_context(peers.Worker("lowtide", script=SCRIPT))
    settings = {"isa": block.isa, "policy": options.policy, "cache_bits": options.cache_bits, "head": options.head}
    reply = ours("open", path=str(subject.path), threads=block.threads, context=context, **settings)
    isas, version, theirs = {"lowtide": reply["isa"]}, "", {}
    for kind in subject.kinds:
        worker = theirs[kind] = stack.enter_context(peers.Worker("llama", options.llama_python, SCRIPT))
        base, _, extra = kind.partition("+")
        flash = {"flash": extra == "fa"}
        reply = worker("open", path=str(subject.files[base]), threads=block.threads, context=context, **flash)
        isas[kind], version = reply["isa"], reply["version"]
    return Team(ours, theirs, isas, version)


def measure_starts(subject: Subject, block: Block, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """First token and memory of every setting, by its label."""
    common.note(f"{subject.name}, threads {block.threads}, {block.isa or 'best instruction set'}: starts")
    context = min(START_CONTEXT, subject.config.max_position)
    wanted = {"isa": block.isa, "policy": options.policy, "cache-bits": options.cache_bits, "head": options.head}
    starters = {
        label(b): speed_start.lowtide_starter(subject.path, b, block.threads, context, START_TOKENS, START_TEXT, wanted)
        for b in subject.bits
    }
    for kind in subject.kinds:
        base, _, extra = kind.partition("+")
        starters[kind] = speed_start.llama_starter(
            subject.files[base],
            extra == "fa",
            block.threads,
            context,
            START_TOKENS,
            subject.start,
            options.llama_python,
        )
    return speed_start.measure(starters, block.starts, block.cold_starts)


def measure_prefill(subject: Subject, team: Team, block: Block, pause: float) -> dict[str, dict[str, Any]]:
    """Prefill speed of lowtide (any budget: it reads everything) and of each llama.cpp setting."""
    ids = next(iter(subject.texts.values()))[: block.prefill]
    engines = {name: Timed(worker, "prefill", {"ids": ids}) for name, worker in team.theirs.items()}
    engines = {"lowtide": Timed(team.ours, "prefill", {"ids": ids})} | engines
    speeds = decode.interleave(engines, block.prefill_rounds, pause)
    return {
        name: {
            "prefill_tps": statistics.median(v),
            "prefill_tps_sd": deviation(v),
            "all_prefill_tps": v,
            "prefill_tokens": len(ids),
        }
        for name, v in speeds.items()
    }


def decode_row(subject: Subject, timed: Timed, name: str, speeds: list[float], length: float) -> dict[str, Any]:
    """The decode part of a row; `length` is the mean number of tokens in the cache."""
    median = statistics.median(speeds)
    if name in subject.kinds:
        body = None
        weights = gguf_bytes_per_token(subject.files[name.partition("+")[0]])
        read = weights + cache_bytes(subject.config, length)
    else:
        body, read = statistics.fmean(r["bits_read_body"] for r in timed.replies), timed.mean("bytes_read")
    return {
        "engine": "lowtide" if body is not None else "llama.cpp",
        "setting": name,
        "bits_read_body": body,
        "decode_tps": median,
        "decode_tps_sd": deviation(speeds),
        "all_decode_tps": speeds,
        "bytes_read_per_token": read,
        "gb_per_s": read * median / 1e9,
    }


def measure_halving(subject: Subject, team: Team, block: Block, options: argparse.Namespace) -> dict[str, Any]:
    """What half the bits do for the time of the layers: decode without the output head, at two budgets and at none.

    Attention, norms and the embedding row take the same time at both budgets. `ratio_step` leaves them in, so the
    layers gain more than that. `ratio_slices` takes out all that a step costs when no slice is read, and with it the
    layers' own scales and outliers, so the layers gain less than that.
    """
    prompt, context = block.cases[0]
    high, low = options.halve
    request = {"ids": subject.texts[prompt], "context": context, "tokens": block.tokens, "logits": False}
    engines = {str(b): Timed(team.ours, "decode_at", request | {"bits": b}) for b in (high, low, "nothing")}
    common.note(f"{subject.name}: {high:g} and {low:g} bits without the head")
    try:
        speeds = decode.interleave(engines, 2 * block.rounds, options.pause / 4)
    except LowtideError as error:  # an artifact of which more than that is read whatever the mask
        return {"bits": [high, low], "impossible": str(error)}
    ms = [1e3 / statistics.median(v) for v in speeds.values()]
    read = [statistics.fmean(r["bits_read_body"] for r in t.replies) for t in engines.values()]
    return {
        "bits": [high, low],
        "bits_read_body": read,
        "ms_per_token": ms,
        "ratio_bits": read[0] / read[1],
        "ratio_step": ms[0] / ms[1],
        "ratio_slices": (ms[0] - ms[2]) / (ms[1] - ms[2]) if ms[1] > ms[2] else None,
    }


@cache
def gguf_bytes_per_token(path: Path) -> float:
    """Bytes of all tensors that llama.cpp reads for a token; of an embedding table that is not the head, one row."""
    tensors = gguf.GGUFReader(path).tensors
    untied = any(t.name == "output.weight" for t in tensors)

    def size(t: Any) -> float:
        rows = int(t.shape[-1]) if untied and t.name == "token_embd.weight" else 1
        return int(t.n_bytes) / rows

    return sum(size(t) for t in tensors)


def cache_bytes(config: ModelConfig, length: float) -> float:
    """Bytes of keys and values in 16 bits for so many tokens."""
    return length * config.num_layers * 2 * config.num_kv_heads * config.head_dim * 2


def deviation(values: list[float]) -> float:
    """Standard deviation of a sample; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def blocks_of(options: argparse.Namespace, best: str, prompts: list[str]) -> Iterator[Block]:
    """All contexts and prompts with all threads and the best instruction set; the rest at the first of each."""
    first, most = options.contexts[0], options.threads[-1]
    cases = [(prompts[0], c) for c in options.contexts] + [(p, first) for p in prompts[1:]]
    counts = (options.rounds, options.tokens, options.prefill, options.prefill_rounds, options.starts)
    main = Block(most, None, cases, *counts, cold_starts=options.cold_starts, kernel=True)
    yield main
    other = replace(main, cases=cases[:1], cold_starts=0, kernel=False)
    for threads in options.threads[:-1][::-1]:
        yield replace(other, threads=threads)
    for isa in (i for i in options.isas if i != best):
        if isa == "portable":  # no vector instructions, so everything takes long: fewer and shorter rounds
            tokens, prefill = min(16, options.tokens), min(64, options.prefill)
            yield replace(other, isa=isa, rounds=3, tokens=tokens, prefill=prefill, prefill_rounds=1, starts=1)
        else:
            yield replace(other, isa=isa)
