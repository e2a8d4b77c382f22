"""Starts for `speed.py`: seconds from before the process exists to its first token, and the memory it takes.

warm    the file is in the page cache and, for lowtide, was verified before
cold    the same with the file's pages thrown out of the page cache first
first   lowtide only: never verified on this machine, so every byte is hashed first
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import peers

from lowtide.errors import LowtideError

SCRIPT = Path(__file__).with_name("start.py")
LEFT = 0.05
"""A file of which more than this is still in memory was not thrown out, and its start was not cold."""


@dataclass
class Starter:
    """One setting of one engine: `arguments` for start.py, `files` it reads; python as in `peers.Worker`."""

    arguments: list[str]
    files: list[Path]
    python: str | None = None

    def __call__(self, **environment: str) -> dict[str, float]:
        """Starts once: {"first_token_s", "whole_s", "peak_rss_bytes", "rss_own_bytes", "rss_file_bytes"}."""
        base = peers.environment_of(self.python)
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
            figures = Path(folder) / "figures.json"
            command = [self.python or sys.executable, str(SCRIPT), str(figures), *self.arguments]
            began = time.perf_counter()
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=(dict(os.environ) if base is None else base) | environment,
                bufsize=0,
            )
            assert process.stdout is not None
            got = process.stdout.read(1)
            first = time.perf_counter() - began
            while process.stdout.read(1 << 16):
                pass
            code = process.wait()
            whole = time.perf_counter() - began
            process.stdout.close()
            if code or not got:
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
                raise LowtideError(f"starting {self.arguments[0]} failed with code {code}: {last[0]}")
            return {"first_token_s": first, "whole_s": whole} | json.loads(figures.read_bytes())


def lowtide_starter(
    artifact: Path,
    bits: float | str,
    threads: int,
    context: int,
    tokens: int,
    prompt: str,
    more: Mapping[str, Any],
) -> Starter:
    """`lowtide generate`, as a user calls it; `more` holds further options, None for those left out."""
    arguments = ["lowtide", "generate", str(artifact), "--prompt", prompt, "-n", str(tokens), "--bits", f"{bits}"]
    arguments += ["--threads", str(threads), "--context", str(context)]
    for option, value in more.items():
        arguments += [] if value is None else [f"--{option}", str(value)]
    return Starter(arguments, [p for p in artifact.rglob("*") if p.is_file()])


def llama_starter(
    gguf: Path, flash: bool, threads: int, context: int, tokens: int, ids: Sequence[int], python: str | None
) -> Starter:
    """llama-cpp-python: load, read the prompt, write tokens."""
    numbers = [threads, context, tokens, int(flash), *ids]
    return Starter(["llama", str(gguf), *map(str, numbers)], [gguf], python)


def measure(
    starters: dict[str, Starter],
    rounds: int,
    cold_rounds: int,
    evict: Callable[[Iterable[Path]], bool] | None = None,
) -> dict[str, dict[str, Any]]:
    """Warm starts in turn, `rounds` times after one that is not counted, then cold and first ones.

    Returns:
        By setting: medians first_token_s, whole_s, peak_rss_bytes, rss_own_bytes, rss_file_bytes; all_first_token_s;
        first_token_cold_s (None if the page cache would not let go of the file) and first_token_first_s (None for
        llama.cpp), each None without cold rounds.
    """
    evict = evict or throw_out
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in starters}
    for i in range(rounds + 1):
        for name in list(starters)[:: 1 if i % 2 else -1]:
            figures = starters[name]()
            if i:
                seen[name].append(figures)
    found: dict[str, dict[str, Any]] = {}
    for name, runs in seen.items():
        found[name] = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        found[name]["all_first_token_s"] = [r["first_token_s"] for r in runs]
        found[name] |= _rare(name, starters[name], cold_rounds, evict)
    return found


def _rare(name: str, starter: Starter, rounds: int, evict: Callable[[Iterable[Path]], bool]) -> dict[str, Any]:
    """Cold and first starts."""
    cold: list[float] = []
    first: list[float] = []
    for _ in range(rounds):
        if evict([*starter.files, *_cached_files()]):
            cold.append(starter()["first_token_s"])
        if starter.arguments[0] == "lowtide":
            with tempfile.TemporaryDirectory() as cache:
                first.append(starter(XDG_CACHE_HOME=cache)["first_token_s"])
    if rounds and not cold:
        common.note(f"{name}: the page cache would not let go of the file; no cold start")
    return {
        "first_token_cold_s": statistics.median(cold) if cold else None,
        "first_token_first_s": statistics.median(first) if first else None,
    }


def _cached_files() -> list[Path]:
    """What lowtide keeps in the user's cache: stamps, and whatever else a start reads."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return [p for p in (root / "lowtide").rglob("*") if p.is_file()]


def throw_out(files: Iterable[Path]) -> bool:
    """Throw files out of the page cache; False if they are still there (someone else has them mapped, or no Linux)."""
    held = whole = 0.0
    for path in files:
        with open(path, "rb") as file:
            try:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            except (AttributeError, OSError):
                return False
            size = path.stat().st_size
            whole += size
            held += size and size * resident_share(file.fileno(), size)
    return whole > 0 and held <= LEFT * whole


def resident_share(descriptor: int, size: int) -> float:
    """Share of a file's pages that are in memory (mincore); 1 where that cannot be told."""
    pages = -(-size // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * pages)()
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        mincore = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
        failed = mincore is None or mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), flags)
        del start  # else the mapping cannot be closed
    return 1.0 if failed else sum(f & 1 for f in flags) / pages
