"""What all benchmarks share: who measured what, where and when, and tables for people."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lowtide

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("numpy", "torch", "tokenizers", "gguf")


def machine() -> dict[str, Any]:
    """Processor model, cores this process may use, memory in GB, operating system."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": model,
        "cores": cores,
        "memory_gb": round(memory, 1),
        "system": platform.system() + " " + platform.release(),
    }


def versions(**more: str) -> dict[str, str]:
    """Versions of Python and of the packages that matter, and whatever else the caller knows."""
    found = {"lowtide": lowtide.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | more


def command() -> str:
    """This process' command line; folders of absolute paths are left out, they say nothing elsewhere."""
    words = [":".join(Path(p).name if os.path.isabs(p) else p for p in w.split(":")) for w in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def report(figures: Mapping[str, Any], **more_versions: str) -> dict[str, Any]:
    """The figures with machine, versions, date and command."""
    now = datetime.datetime.now(datetime.timezone.utc)
    about = {
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "command": command(),
        "machine": machine(),
        "versions": versions(**more_versions),
    }
    return about | dict(figures)


def save(name: str, result: Mapping[str, Any], table: str, folder: Path = RESULTS) -> Path:
    """Writes NAME.json and NAME.md (the table under a line that says what was measured); returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    box = result["machine"]
    lines = [
        f"# {name}",
        "",
        f"{result.get('model', '')}; {box['cpu']}, {box['cores']} cores; {result['date']}; "
        f"lowtide {result['versions']['lowtide']}",
        "",
        f"    {result['command']}",
        "",
        table,
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table: the first column to the left, the others to the right; None is empty."""
    text = [[_cell(v) for v in row] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in text), 3) for i, c in enumerate(columns)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(list(columns)), rule, *(line(r) for r in text)])


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def note(text: str) -> None:
    """Progress for people, on stderr."""
    print(text, file=sys.stderr, flush=True)
