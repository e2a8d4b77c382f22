#!/usr/bin/env python3
"""Seconds and memory of `lowtide compress`, each model in a process of its own, and the cost per parameter.

    python benchmarks/compress_speed.py models/stories15M smollm2-f16.gguf qwen-f16.gguf --calibration wiki.valid.txt

What compressing costs should grow with the model and no faster: microseconds per parameter are to stay flat from the
smallest to the largest. Memory is the most the process had resident, pages of the mapped source among it. Seconds are
those of the whole process; the stages show where they go.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

from lowtide.errors import LowtideError

COLUMNS = ("model", "parameters, M", "seconds", "us per parameter", "against the first", "peak memory GB", "stages, s")


def compress_here(model: str, out: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Compresses in this process; weights, peak memory and seconds of each stage in the order of their begin."""
    import lowtide
    from lowtide.runtime.bench import peak_rss_bytes

    began: dict[str, float] = {"open": time.monotonic()}

    def progress(stage: str, done: int, total: int) -> None:
        began.setdefault(stage, time.monotonic())

    compress: Any = lowtide.compress
    figures = compress(model, out, progress=progress, **settings)
    moments = [*began.values(), time.monotonic()]
    stages = {stage: b - a for stage, a, b in zip(began, moments, moments[1:], strict=False)}
    return {
        "weights": figures["weights"],
        "file_bytes": figures["file_bytes"],
        "calibration_tokens": figures["calibration_tokens"],
        "peak_rss_bytes": peak_rss_bytes(),
        "stages_s": stages,
    }


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model's row.

    Raises:
        LowtideError: the compression failed, with its own line.
    """
    settings = {"calibration": options.calibration, "bits_max": options.bits_max, "seed": options.seed}
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:  # nothing of an earlier run to go on from
        out, figures = Path(folder) / "model.lowtide", Path(folder) / "figures.json"
        child = [sys.executable, str(Path(__file__).resolve()), "--child", model, str(out), str(figures)]
        environment = os.environ | ({"OMP_NUM_THREADS": str(options.threads)} if options.threads else {})
        began = time.monotonic()
        done = subprocess.run([*child, json.dumps(settings)], stderr=subprocess.PIPE, env=environment)
        seconds = time.monotonic() - began
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"code {done.returncode}"]
            raise LowtideError(last[0])
        found = json.loads(figures.read_bytes())
        shutil.rmtree(out)
    per = {"seconds": seconds, "us_per_parameter": 1e6 * seconds / found["weights"]}
    return {"model": Path(model).stem} | per | found


def table(rows: list[dict[str, Any]]) -> str:
    """The figures for people."""
    cells = (
        (
            r["model"],
            f"{r['weights'] / 1e6:.1f}",
            f"{r['seconds']:.1f}",
            f"{r['us_per_parameter']:.3f}",
            f"{r['us_per_parameter'] / rows[0]['us_per_parameter']:.2f}",
            f"{r['peak_rss_bytes'] / 1e9:.2f}",
            ", ".join(f"{stage} {s:.1f}" for stage, s in r["stages_s"].items()),
        )
        for r in rows
    )
    return common.markdown(COLUMNS, cells)


def child(model: str, out: str, figures: str, settings: str) -> int:
    """The process that compresses."""
    try:
        found = compress_here(model, out, json.loads(settings))
    except LowtideError as error:
        print(error, file=sys.stderr)
        return 2
    Path(figures).write_text(json.dumps(found))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        return child(*argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="anything that lowtide compress reads")
    parser.add_argument("--calibration", help="calibration text; by default each model writes its own")
    parser.add_argument("--bits-max", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of the compression; all processors by default")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="artifacts live here for a while")
    parser.add_argument("--label", default="compress-speed", help="name of the results file")
    parser.add_argument("--quick", action="store_true", help="the first model alone")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    rows = []
    try:
        for model in options.models[: 1 if options.quick else None]:
            common.note(f"compressing {Path(model).stem}")
            rows.append(measure(model, options))
    except LowtideError as error:
        print(f"compress_speed: error: {error}", file=sys.stderr)
        return 2
    rows.sort(key=lambda r: r["weights"])
    costs = [r["us_per_parameter"] for r in rows]
    about = {"calibration": Path(options.calibration).name if options.calibration else "sampled"}
    names = ", ".join(r["model"] for r in rows)
    figures = {"model": names} | about | {"highest_over_lowest": max(costs) / min(costs), "rows": rows}
    result = common.report(figures)
    path = common.save(options.label + ("-quick" if options.quick else ""), result, table(rows))
    flat = f"highest cost per parameter over the lowest: {result['highest_over_lowest']:.2f}"
    print(json.dumps(result, indent=2) if options.json else f"{table(rows)}\n\n{flat}; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
