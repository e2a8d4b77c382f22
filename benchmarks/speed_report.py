"""Ratios and tables of `speed.py`, out of its rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import common

Row = dict[str, Any]
KEYS = (
    "model",
    "engine",
    "setting",
    "kl",
    "decode_tps",
    "prefill_tps",
    "first_token_s",
    "peak_rss_bytes",
    "bytes_read_per_token",
    "gb_per_s",
    "threads",
    "isa",
)
"""Of every row, in this order; what else a row holds comes after."""


def ordered(row: Row) -> Row:
    """The row with KEYS first.

    Raises:
        KeyError: one of them is missing.
    """
    return {key: row[key] for key in KEYS} | row


def groups(rows: Iterable[Row]) -> Iterator[tuple[Row, list[Row], list[Row]]]:
    """Rows of one interleaved run: (what they share, lowtide's, llama.cpp's)."""
    shared = ("model", "run", "prompt", "context")
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in shared), []).append(row)
    for key, members in found.items():
        ours = [r for r in members if r["engine"] == "lowtide"]
        yield dict(zip(shared, key, strict=True)), ours, [r for r in members if r["engine"] != "lowtide"]


def ratios(rows: Iterable[Row]) -> list[Row]:
    """At the quality of each llama.cpp type: the fastest lowtide against the fastest llama.cpp that are as good.

    A type with a lower KL that is also faster takes the place of the one that sets the limit. Types without KL, and
    limits that no lowtide row keeps, are left out.
    """
    found = []
    for about, ours, theirs in groups(rows):
        # a type's quality is the same with and without flash attention
        limits = {r["setting"].partition("+")[0]: r["kl"] for r in theirs if r["kl"] is not None}
        for kind, limit in limits.items():
            good = [r for r in ours if r["kl"] is not None and r["kl"] <= limit]
            peers = [r for r in theirs if r["kl"] is not None and r["kl"] <= limit]
            if not good:
                continue
            best, peer = (max(side, key=lambda r: r["decode_tps"]) for side in (good, peers))
            found.append(
                about
                | {
                    "at_kl_of": kind,
                    "kl_limit": limit,
                    "setting": best["setting"],
                    "kl": best["kl"],
                    "peer": peer["setting"],
                    "decode_ratio": best["decode_tps"] / peer["decode_tps"],
                    "decode_ratio_middle_half": middle_half(best["all_decode_tps"], peer["all_decode_tps"]),
                    "prefill_ratio": best["prefill_tps"] / max(r["prefill_tps"] for r in peers),
                    "of_memory_limit": best["of_memory_limit"],
                }
            )
    return found


def middle_half(ours: list[float], theirs: list[float]) -> list[float]:
    """First and third quartile of the rounds' own ratios: how steady the ratio of medians is."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    if len(each) == 1:
        return [each[0], each[0]]
    low, _, high = statistics.quantiles(each, n=4, method="inclusive")
    return [low, high]


def ratio_table(entries: list[Row]) -> str:
    """Ratios for people."""
    columns = (
        "model",
        "threads, isa",
        "prompt",
        "in cache",
        "at KL of",
        "lowtide",
        "KL",
        "KL limit",
        "against",
        "decode ratio",
        "of rounds, middle half",
        "prefill ratio",
        "of memory limit",
    )
    cells = (
        (
            e["model"],
            e["run"],
            e["prompt"],
            e["context"],
            e["at_kl_of"],
            e["setting"],
            f"{e['kl']:.4f}",
            f"{e['kl_limit']:.4f}",
            e["peer"],
            f"{e['decode_ratio']:.2f}",
            " to ".join(f"{x:.2f}" for x in e["decode_ratio_middle_half"]),
            f"{e['prefill_ratio']:.2f}",
            f"{e['of_memory_limit']:.0%}",
        )
        for e in entries
    )
    return common.markdown(columns, cells)


def point_table(rows: list[Row]) -> str:
    """Every point; its ratio is to the fastest llama.cpp of the same run, whatever the quality."""
    columns = (
        "model",
        "threads, isa",
        "prompt",
        "in cache",
        "engine",
        "setting",
        "KL",
        "ratio",
        "decode tok/s",
        "prefill tok/s",
        "read, body",
        "MB/token",
        "GB/s",
        "of memory limit",
    )
    cells = []
    for about, ours, theirs in groups(rows):
        fastest = max(r["decode_tps"] for r in theirs) if theirs else None
        for r in ours + theirs:
            cells.append(
                (
                    about["model"],
                    about["run"],
                    about["prompt"],
                    about["context"],
                    r["engine"],
                    r["setting"],
                    None if r["kl"] is None else f"{r['kl']:.4f}",
                    None if fastest is None else f"{r['decode_tps'] / fastest:.2f}",
                    f"{r['decode_tps']:.1f} ± {r['decode_tps_sd']:.1f}",
                    f"{r['prefill_tps']:.1f} ± {r['prefill_tps_sd']:.1f}",
                    None if r["bits_read_body"] is None else f"{r['bits_read_body']:.3f}",
                    f"{r['bytes_read_per_token'] / 1e6:.1f}",
                    f"{r['gb_per_s']:.2f}",
                    f"{r['of_memory_limit']:.0%}",
                )
            )
    return common.markdown(columns, cells)


def start_table(rows: list[Row]) -> str:
    """Starts and memory, once for each run and setting; memory also as a ratio to the first llama.cpp setting's."""
    columns = (
        "model",
        "threads, isa",
        "engine",
        "setting",
        "memory ratio",
        "first token, warm s",
        "cold s",
        "first ever s",
        "peak memory MB",
        "own MB",
        "of files MB",
    )
    cells = []
    seen: set[tuple[str, str]] = set()
    for about, ours, theirs in groups(rows):
        key = (about["model"], about["run"])
        if key in seen:
            continue
        seen.add(key)
        base = theirs[0]["peak_rss_bytes"] if theirs else None
        for r in ours + theirs:
            cells.append(
                (
                    *key,
                    r["engine"],
                    r["setting"],
                    None if base is None else f"{r['peak_rss_bytes'] / base:.2f}",
                    *(_seconds(r[f"first_token{kind}_s"]) for kind in ("", "_cold", "_first")),
                    *(f"{r[key] / 1e6:.0f}" for key in ("peak_rss_bytes", "rss_own_bytes", "rss_file_bytes")),
                )
            )
    return common.markdown(columns, cells)


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def halving_table(blocks: list[Row]) -> str:
    """What half the bits do for the linear layers; empty if it was not measured."""
    columns = (
        "model",
        "threads, isa",
        "bits read",
        "ratio of bits",
        "ms, ms, nothing read",
        "ratio of steps",
        "of slices alone",
    )
    cells = []
    for b in blocks:
        h = b.get("halving")
        if not h:
            continue
        if "impossible" in h:
            cells.append((b["model"], b["run"], h["impossible"], *[None] * 4))
            continue
        cells.append(
            (
                b["model"],
                b["run"],
                " / ".join(f"{x:.2f}" for x in h["bits_read_body"][:2]),
                f"{h['ratio_bits']:.2f}",
                " / ".join(f"{x:.2f}" for x in h["ms_per_token"]),
                f"{h['ratio_step']:.2f}",
                None if h["ratio_slices"] is None else f"{h['ratio_slices']:.2f}",
            )
        )
    return common.markdown(columns, cells) if cells else ""


def text(result: Row) -> str:
    """The whole report, ratios first."""
    probes = "; ".join(f"{b['model']}, {b['run']}: {b['probe_gb_per_s']:.1f}" for b in result["blocks"])
    parts = [
        "## Ratios at equal quality",
        "Tokens per second of the fastest lowtide over those of the fastest llama.cpp, both with a KL to the same F16 "
        "model of at most the type's; medians of one interleaved run. Above 1: lowtide is faster.",
        ratio_table(result["ratios"]) if result["ratios"] else "KL was not measured, or no budget is as good.",
        "## All points",
        f"Memory limit: read probe in the same run, GB/s ({probes}).",
        point_table(result["rows"]),
        "## Starts and memory",
        "Whole processes, from before they exist: `lowtide generate` and llama-cpp-python, same prompt and context. "
        "Memory after all tokens; the ratio is to the first llama.cpp row of the block.",
        start_table(result["rows"]),
    ]
    halving = halving_table(result["blocks"])
    if halving:
        parts += ["## Half the bits", "Decode without the output head, so it is the layers and attention.", halving]
    return "\n\n".join(parts)
