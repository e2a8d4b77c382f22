"""Speed of an artifact on this machine, measured like llama-bench: warm-up, repetitions, mean and deviation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lowtide.errors import LowtideError
from lowtide.runtime.budget import BudgetController
from lowtide.runtime.memory import peak_rss_bytes, rss_bytes
from lowtide.runtime.model import Model, load
from lowtide.runtime.sampling import Sampler

DEFAULT_BITS = (2.5, 3.0, 3.5)
DEFAULT_PROMPT = 512


@dataclass
class _Point:
    """One budget under measurement: the text it decodes, its controller and what was seen."""

    bits: float | None
    controller: BudgetController
    text: list[int] = field(default_factory=list)
    tps: list[float] = field(default_factory=list)
    body_bits: int = 0
    bytes_read: int = 0
    tokens: int = 0


def bench(
    artifact: str | Path,
    bits: Sequence[float | None] = DEFAULT_BITS,
    prompt_tokens: int | None = None,
    max_tokens: int = 128,
    threads: int | None = 2,
    repetitions: int = 5,
    policy: str | None = None,
    isa: str | None = None,
    seed: int = 0,
    head: tuple[float, float] = (0.0, 0.0),
    preload: bool = False,
) -> dict[str, Any]:
    """Measure prefill and decode.

    Per budget the model first writes a text at that budget (temperature 1; this is the warm-up), and each
    repetition decodes that text again, so sampling costs nothing and the channels read are those of real
    text. Budgets take turns within a repetition: a slow spell of the machine meets all of them.

    Args:
        artifact: folder made by `lowtide compress`.
        bits: budgets; None reads everything.
        prompt_tokens: tokens of the prefill test; None takes 512 or the whole context, if that is smaller.
        max_tokens: tokens decoded per repetition, from an empty context.
        threads: worker threads; None lets the engine choose.
        repetitions: measured runs.
        policy, isa, head: as in `lowtide.load` and `Model.generate`.
        seed: of the texts.
        preload: read what the budgets may read into memory first (`Model.preload`); it counts as loading.

    Returns:
        {"points": [{"bits" (number or "dense"), "bits_read_body", "decode_tps", "decode_tps_sd", "prefill_tps",
        "prefill_tps_sd", "bytes_read_per_token", "gb_per_s"}], "prompt_tokens", "max_tokens", "repetitions",
        "load_s", "preload_bytes" (0 without), "rss_bytes" (resident at the end), "peak_rss_bytes", "isa", "threads"}.
        Prefill reads all stored bits, so it is measured once for
        all budgets. Deviations are those of the sample (0 for one repetition).

    Raises:
        LowtideError: an option out of range, or anything `lowtide.load` refuses.
    """
    for name, value in (("-n", max_tokens), ("-r", repetitions), ("-p", 1 if prompt_tokens is None else prompt_tokens)):
        if value < 1:
            raise LowtideError(f"{name} {value}: must be 1 or more")
    started = time.perf_counter()
    with load(artifact, threads=threads, isa=isa, head=head) as model:
        preloaded = max((model.preload(b, policy) for b in bits), default=0) if preload else 0
        load_s = time.perf_counter() - started
        points = [_Point(b, model.controller(b, policy)) for b in bits]
        room = model.engine.max_context
        prompt_tokens = min(DEFAULT_PROMPT, room) if prompt_tokens is None else prompt_tokens
        if prompt_tokens > room or max_tokens + 1 > room:
            raise LowtideError(f"-p {prompt_tokens} -n {max_tokens}: the context holds {room} tokens; ask for less")
        prompt = np.random.default_rng(seed).integers(0, model.engine.vocab_size, prompt_tokens, dtype=np.int32)
        prefill_tps = _measure(model, points, prompt, max_tokens, repetitions, seed)
        return {
            "points": [_figures(p, prefill_tps) for p in points],
            "prompt_tokens": prompt_tokens,
            "max_tokens": max_tokens,
            "repetitions": repetitions,
            "load_s": load_s,
            "preload_bytes": preloaded,
            "rss_bytes": rss_bytes(),
            "peak_rss_bytes": peak_rss_bytes(),
            "isa": model.engine.isa,
            "threads": model.engine.threads,
        }


def _measure(
    model: Model, points: list[_Point], prompt: np.ndarray, max_tokens: int, repetitions: int, seed: int
) -> list[float]:
    """Fill the points; returns prefill speeds in tokens per second, one per repetition."""
    model.engine.prefill(prompt, 0)
    for point in points:
        point.text = _write(model, point.controller, max_tokens, seed)
    prefill_tps = []
    for _ in range(repetitions):
        started = time.perf_counter()
        model.engine.prefill(prompt, 0)
        prefill_tps.append(len(prompt) / (time.perf_counter() - started))
        for point in points:
            _replay(model, point)
    return prefill_tps


def _first_token(model: Model) -> int:
    bos = model.artifact.config.bos_token_id
    return 0 if bos is None else bos


def _write(model: Model, controller: BudgetController, max_tokens: int, seed: int) -> list[int]:
    """A text of `max_tokens` tokens that the model writes at this budget; ends of sequence do not stop it."""
    sampler, first = Sampler(temperature=1.0, seed=seed), _first_token(model)
    logits, text = model.engine.prefill(np.asarray([first], np.int32), 0), []
    for place in range(1, max_tokens + 1):
        text.append(sampler.sample(logits))
        logits, read = model.engine.decode(text[-1], place, controller.params)
        controller.update(read.body_bits)
    return text


def _replay(model: Model, point: _Point) -> None:
    """Decode the point's text once more, timed."""
    engine, controller = model.engine, point.controller
    engine.prefill(np.asarray([_first_token(model)], np.int32), 0)
    body_bits = bytes_read = 0
    started = time.perf_counter()
    for place, token in enumerate(point.text, start=1):
        _, read = engine.decode(token, place, controller.params)
        controller.update(read.body_bits)
        body_bits += read.body_bits
        bytes_read += read.bytes_read
    point.tps.append(len(point.text) / (time.perf_counter() - started))
    point.body_bits += body_bits
    point.bytes_read += bytes_read
    point.tokens += len(point.text)


def _figures(point: _Point, prefill_tps: list[float]) -> dict[str, Any]:
    decode, per_token = statistics.fmean(point.tps), point.bytes_read / point.tokens
    return {
        "bits": "dense" if point.bits is None else point.bits,
        "bits_read_body": point.controller.per_weight(point.body_bits / point.tokens),
        "decode_tps": decode,
        "decode_tps_sd": _deviation(point.tps),
        "prefill_tps": statistics.fmean(prefill_tps),
        "prefill_tps_sd": _deviation(prefill_tps),
        "bytes_read_per_token": per_token,
        "gb_per_s": per_token * decode / 1e9,
    }


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
