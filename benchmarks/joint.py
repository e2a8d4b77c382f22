#!/usr/bin/env python3
"""What training model and masks together gives: KL against training tokens, and the trained artifact in the engine.

    lowtide learn joint models/stories15M joint.lowtide --bits 2 --artifact stories.lowtide --json > joint.json
    python benchmarks/joint.py models/stories15M stories.lowtide joint.lowtide --figures joint.json --sampled 24

The curve is the training run's, on its held-out windows (bits are near the budget there, not on it, so the KL at the
budget is estimated with the measured slope of log KL); the table is the engine's, every byte counted, untrained and
trained at equal bits on windows that neither training nor calibration saw. `slices` leaves out what every token reads
whatever the mask is; `total` has the output head's bits as well.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np
from dynamic_common import budgets, make_subject

import lowtide
from lowtide.errors import LowtideError
from lowtide.format.reader import Artifact, open_artifact
from lowtide.learn.ipn_loss import ELASTICITY
from lowtide.runtime.budget import body_side_bits, body_weights, parse_head

COLUMNS = ("artifact", "rule", "head", "bits", "slices", "total", "KL", "perplexity")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="anything that lowtide compress reads")
    parser.add_argument("artifact", help="untrained")
    parser.add_argument("trained", nargs="+", help="made by lowtide learn joint, learn ipn or compress --feedback")
    parser.add_argument("--figures", type=Path, help="what the training run printed with --json")
    parser.add_argument("--text", help="held-out text file")
    parser.add_argument("--sampled", type=int, metavar="N", help="instead of --text: N windows sampled from the model")
    parser.add_argument("--windows", type=int, default=4, help="of --text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--bits", default="2,2.5,3,3.5", help="budgets in bits read per body weight")
    parser.add_argument("--head", default="once", help="ways to read it, as for `lowtide generate`, separated by ;")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path("build/dynamic"), help="where sampled windows are kept")
    parser.add_argument("--label", help="name of the results file; the model's by default")
    parser.add_argument("--quick", action="store_true", help="one short window, one budget: a trial run")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(argv)
    if options.quick:
        options.windows, options.window, options.bits = 1, min(options.window, 64), "3"
        options.sampled = options.sampled and 1
    if (options.text is None) == (options.sampled is None):
        parser.error("give either --text or --sampled")
    options.calibration, options.calibration_windows, options.seed = None, 1, 0
    return options


def side_of(artifact: Artifact, policy: str) -> float:
    """Bits per body weight that are read whatever the mask is."""
    return body_side_bits(artifact, policy) / body_weights(artifact)


def rows(options: argparse.Namespace, ids: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Untrained rule and trained one at every budget."""
    found = []
    for path in (options.artifact, *options.trained):
        artifact = open_artifact(path)
        policy = artifact.manifest.policies[0]
        side = side_of(artifact, policy)
        for head in options.head.split(";"):
            result = lowtide.evaluate(
                artifact,
                options.model,
                ids,
                windows=len(ids),
                window=ids.shape[1],
                bits=budgets(options.bits),
                policy=policy,
                threads=options.threads,
                head=parse_head(head),
            )
            for point in result["points"]:
                about = {"artifact": Path(path).name, "rule": policy, "head": head}
                about["slices"] = point["bits_read_body"] - side
                found.append(about | {k: point[k] for k in ("bits", "bits_read_body", "bits_read_total", "kl", "ppl")})
    return found


def curve_table(history: list[dict[str, Any]]) -> str:
    """KL at each budget against tokens trained on."""
    wanted = [p["bits"] for p in history[0]["points"]]
    lines = []
    for entry in history:
        cells: list[Any] = [entry["step"], entry["tokens"]]
        for p in entry["points"]:
            at_budget = p["kl"] * math.exp(ELASTICITY * (p["read"] - p["bits"]))
            cells += [f"{p['read']:.2f}", f"{p['kl']:.4f}", f"{at_budget:.4f}"]
        lines.append(cells)
    columns = ["step", "tokens"]
    for bits in wanted:
        columns += [f"read ({bits:g})", "KL there", f"KL at {bits:g}"]
    return common.markdown(columns, lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(argv)
    try:
        subject = make_subject(options)
        found = rows(options, subject.ids.numpy().astype(np.int32))
    except LowtideError as error:
        print(f"joint: error: {error}", file=sys.stderr)
        return 2
    lines = [
        (
            r["artifact"],
            r["rule"],
            r["head"],
            f"{r['bits_read_body']:.3f}",
            f"{r['slices']:.3f}",
            f"{r['bits_read_total']:.3f}",
            f"{r['kl']:.4f}",
            f"{r['ppl']:.3f}",
        )
        for r in found
    ]
    text = common.markdown(COLUMNS, lines)
    about: dict[str, Any] = {"model": subject.label, "windows": len(subject.ids), "window": subject.ids.shape[1]}
    about["text"] = "sampled" if options.text is None else Path(options.text).name
    if options.figures:
        trained = json.loads(options.figures.read_text(encoding="utf-8"))
        kept = ("steps", "best_step", "trained_tokens", "probe_ratio", "budget_error", "seconds", "history")
        about["training"] = {k: trained[k] for k in kept} | {
            k: trained[k] for k in ("device", "products") if k in trained
        }
        text += f"\n\n## held-out KL while training\n\n{curve_table(trained['history'])}"
    path = common.save(
        f"joint-{subject.label}" + ("-quick" if options.quick else ""), common.report(about | {"rows": found}), text
    )
    print(json.dumps(found, indent=2) if options.json else f"{text}\n\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
