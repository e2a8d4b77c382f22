#!/usr/bin/env python3
"""From a coded file to a running model: seconds to unpack the runtime image, to open it again, and memory it adds.

    python benchmarks/opening.py smol.lowtide qwen.lowtide --label twins

Unpacking decodes every slice and writes the image, the file in the page cache; weights of all matrices per second,
fastest of --repeats. Opening is `open_artifact` with the image in the cache, in a process of its own: milliseconds, and
by how much the process's own memory (not shared with the page cache) grows. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

from lowtide.arch import group_specs
from lowtide.errors import LowtideError
from lowtide.format import image
from lowtide.format.manifest import WEIGHTS_NAME
from lowtide.format.reader import open_artifact, read_manifest

OPEN = """
import sys, time
def own():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0
from lowtide.format.reader import open_artifact
before, began = own(), time.perf_counter()
artifact = open_artifact(sys.argv[1])
print(time.perf_counter() - began, own() - before)
"""
COLUMNS = ("artifact", "M weights", "slices", "MB on disk", "unpack, s", "M weights/s", "open, ms", "own memory, MB")


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """One artifact's row."""
    manifest = read_manifest(folder)
    if manifest.coding != "entropy":
        raise LowtideError(f"{folder}: is not entropy-coded, so there is nothing to unpack")
    weights = sum(spec.weights for spec in group_specs(manifest.config))
    with (folder / WEIGHTS_NAME).open("rb") as file, tempfile.TemporaryDirectory() as scratch:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        bytes(data)  # into the page cache
        seconds = []
        for _ in range(repeats):
            target = Path(scratch) / "image"
            began = time.perf_counter()
            image.unpack(data, manifest, manifest.slices, target, str(folder))
            seconds.append(time.perf_counter() - began)
            target.unlink()
    stored = open_artifact(folder).stored_bytes()  # makes the image in the cache if it is not there
    opened = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True)
        opened.append([float(v) for v in done.stdout.split()])
    return {
        "artifact": folder.name,
        "weights": weights,
        "slices": manifest.slices,
        "file_bytes": stored,
        "unpack_s": min(seconds),
        "weights_per_s": weights / min(seconds),
        "open_s": statistics.median(o[0] for o in opened),
        "own_memory_bytes": statistics.median(o[1] for o in opened),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path, help="entropy-coded artifacts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--label", help="name of the results file; the first artifact's by default")
    parser.add_argument("--quick", action="store_true", help="once each")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(argv)
    try:
        rows = [measure(folder, 1 if options.quick else options.repeats) for folder in options.artifacts]
    except LowtideError as error:
        print(f"opening: error: {error}", file=sys.stderr)
        return 2
    cells = [
        (
            r["artifact"],
            f"{r['weights'] / 1e6:.0f}",
            r["slices"],
            f"{r['file_bytes'] / 1e6:.1f}",
            f"{r['unpack_s']:.2f}",
            f"{r['weights_per_s'] / 1e6:.0f}",
            f"{1e3 * r['open_s']:.0f}",
            f"{r['own_memory_bytes'] / 1e6:.1f}",
        )
        for r in rows
    ]
    table = common.markdown(COLUMNS, cells)
    path = common.save(f"opening-{options.label or rows[0]['artifact']}", common.report({"rows": rows}), table)
    print(json.dumps(rows, indent=2) if options.json else f"{table}\n\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
