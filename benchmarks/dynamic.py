#!/usr/bin/env python3
"""Dynamic rules at equal bytes: KL and perplexity of ours and of other papers', and what each ingredient is worth.

    python benchmarks/dynamic.py models/stories15M stories.lowtide --sampled 24 --window 256 --label stories15M
    python benchmarks/dynamic.py smol-twin.gguf smol.lowtide --text test.txt --calibration valid.txt --label smollm2
    python benchmarks/dynamic.py models/stories15M stories.lowtide --sampled 24 --quick

KL is the mean over all tokens of KL(dense || masked) in nats, over non-overlapping windows of text that calibration
never saw, every token masked, all bytes counted. What has been measured waits in --work, so an interrupted run goes on.
Each section is a module of its own, dynamic_SECTION.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import common
import dynamic_ablation
import dynamic_hierarchy
import dynamic_oracles
import dynamic_rivals
from dynamic_common import budgets, make_subject

from lowtide.errors import LowtideError

SECTIONS = {module.NAME: module for module in (dynamic_rivals, dynamic_ablation, dynamic_hierarchy, dynamic_oracles)}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="anything that lowtide compress reads")
    parser.add_argument("artifact", help="made of it by lowtide compress")
    parser.add_argument("--text", help="held-out text file")
    parser.add_argument("--sampled", type=int, metavar="N", help="instead of --text: N windows sampled from the model")
    parser.add_argument("--windows", type=int, default=4, help="of --text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--calibration", help="calibration text; sampled by default")
    parser.add_argument("--calibration-windows", type=int, default=12)
    parser.add_argument("--bits", default="2,2.5,3,3.5,4", help="budgets in bits read per body weight")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="parts to run")
    parser.add_argument("--seed", type=int, default=0, help="of training and of sampled calibration text")
    parser.add_argument("--work", type=Path, default=Path("build/dynamic"), help="where made files are kept")
    parser.add_argument("--label", help="name of the results file; the model's by default")
    parser.add_argument("--quick", action="store_true", help="two budgets, 4 windows: a trial run")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    for section in SECTIONS.values():
        section.add_arguments(parser)
    options = parser.parse_args(argv)
    if (options.text is None) == (options.sampled is None):
        parser.error("give either --text or --sampled")
    if options.quick:
        options.windows, options.sampled = 1, options.sampled and 4
        options.window, options.calibration_windows = min(options.window, 128), 8
        if options.bits == parser.get_default("bits"):
            options.bits = "2.5,3"
    unknown = [name for name in options.sections.split(",") if name not in SECTIONS]
    if unknown:
        parser.error(f"--sections: no {unknown[0]!r}; known are {', '.join(SECTIONS)}")
    try:
        budgets(options.bits)
    except ValueError:
        parser.error(f"--bits {options.bits}: numbers, separated by commas")
    for section in SECTIONS.values():
        section.check(parser, options)
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the sections asked for; returns the exit code."""
    options = arguments(argv)
    rows, tables = [], []
    try:
        subject = make_subject(options)
        for name in options.sections.split(","):
            found = list(SECTIONS[name].rows(options, subject))
            rows += found
            tables.append(f"## {name}\n\n{SECTIONS[name].table(found)}")
        dense = subject.dense_perplexity()
    except LowtideError as error:
        print(f"dynamic: error: {error}", file=sys.stderr)
        return 2
    result = common.report(
        {
            "model": subject.label,
            "text": f"{len(subject.ids)} sampled windows" if options.text is None else Path(options.text).name,
            "windows": len(subject.ids),
            "window": subject.ids.shape[1],
            "calibration": "sampled" if options.calibration is None else Path(options.calibration).name,
            "calibration_tokens": subject.calibration.numel(),
            "dense_ppl": dense,
            "rows": rows,
        }
    )
    text = "\n\n".join(tables)
    path = common.save(f"dynamic-{subject.label}" + ("-quick" if options.quick else ""), result, text)
    print(json.dumps(result, indent=2) if options.json else f"{text}\n\ndense perplexity {dense:.3f}; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
