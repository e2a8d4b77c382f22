#!/usr/bin/env python3
"""One-shot pruning: KL and perplexity of every rule over sparsities, structures and calibration samples.

    python benchmarks/pruning.py models/stories15M --sampled 24 --window 256 --label stories15M
    python benchmarks/pruning.py smol-twin.gguf --text test.txt --calibration valid.txt --label smollm2-twin
    python benchmarks/pruning.py models/stories15M --quick

All linear layers of the body are pruned, embedding and output head are not; what is kept is not rounded. KL is the mean
over all tokens of KL(dense || pruned) in nats over non-overlapping windows of text that calibration never saw. A seed
is one calibration sample: text the model writes itself (evaluation has a seed of its own), or windows drawn from the
calibration file. Every rule sees the same tokens, and every way of running it (sequential, global allocation, updates)
is measured for the baselines as for ours. Finished rows wait in --work, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from lowtide.compress.dense import DenseModel
from lowtide.compress.prune.apply import PruneOptions, prune_model
from lowtide.compress.prune.problems import ProblemStore
from lowtide.compress.sources import Source, open_source
from lowtide.compress.text import encode_text
from lowtide.errors import LowtideError
from lowtide.eval.text import read_text, token_windows

EVALUATION_SEED = 20_000
"""Of sampled evaluation text; calibration text is sampled with small seeds."""
UNSTRUCTURED = ("0.5", "0.6", "0.7")
STRUCTURES = ("2:4", "column:0.3", "row:0.3", "block:16x16:0.3")
METHODS: dict[str, dict[str, Any]] = {
    "random": {"rule": "random", "allocation": "erk"},
    "magnitude": {"rule": "magnitude"},
    "wanda": {"rule": "wanda"},
    "wanda, dsnot": {"rule": "wanda", "dsnot": True},
    "wanda, sequential": {"rule": "wanda", "sequential": "group"},
    "wanda, global": {"rule": "wanda", "allocation": "global"},
    "wanda, updates": {"rule": "wanda", "updates": True},
    "sparsegpt": {"rule": "sparsegpt"},
    "sparsegpt, sequential": {"rule": "sparsegpt", "sequential": "block"},
    "sparsegpt, global": {"rule": "sparsegpt", "allocation": "global"},
    "sparsegpt, sequential, updates": {"rule": "sparsegpt", "sequential": "group", "updates": True},
    "importance, no updates": {"rule": "importance", "updates": False},
    "importance": {"rule": "importance"},
    "importance, global": {"rule": "importance", "allocation": "global"},
    "importance, sequential": {"rule": "importance", "sequential": "group"},
    "importance, global, sequential": {"rule": "importance", "allocation": "global", "sequential": "group"},
    "importance, gradual": {"rule": "importance", "gradual": True},
}
QUICK = ("magnitude", "wanda", "sparsegpt", "sparsegpt, sequential", "importance", "importance, global, sequential")
COLUMNS = ("rule", "structure", "sparsity", "KL", "spread", "perplexity", "seeds", "seconds")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="anything that lowtide compress reads")
    parser.add_argument("--text", help="held-out text file")
    parser.add_argument("--sampled", type=int, default=24, metavar="N", help="without --text: N windows sampled")
    parser.add_argument("--calibration", help="calibration text; sampled by default")
    parser.add_argument("--calibration-windows", type=int, default=24)
    parser.add_argument("--windows", type=int, default=4, help="of --text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seeds", default="0,1,2", help="calibration samples")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    parser.add_argument("--sparsities", default=",".join(UNSTRUCTURED), help="unstructured")
    parser.add_argument("--structures", default=",".join(STRUCTURES), help="N:M or STRUCTURE:SPARSITY; empty for none")
    parser.add_argument(
        "--network",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a network by `lowtide learn importance`: adds the method `importance NAME, gradual`; repeat for several",
    )
    parser.add_argument("--work", type=Path, default=Path("build/pruning"), help="where made files are kept")
    parser.add_argument("--label", help="name of the results file; the model's by default")
    parser.add_argument("--quick", action="store_true", help="one seed, 8 windows, few methods: a trial run")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.sampled, options.windows = "0", 8, 1
        if options.methods == parser.get_default("methods"):
            options.methods = ";".join(QUICK)
        if options.structures == parser.get_default("structures"):
            options.structures = "2:4"
    for name, file in (text.split("=", 1) for text in options.network):
        METHODS[f"importance {name}, gradual"] = {"rule": "importance", "gradual": True, "network": file}
        options.methods += f";importance {name}, gradual"
    unknown = [m for m in options.methods.split(";") if m not in METHODS]
    if unknown:
        parser.error(f"--methods: no {unknown[0]!r}; known are {'; '.join(METHODS)}")
    return options


@dataclass
class Subject:
    """The model, the windows it is judged on i64 [n, window], and the folder of what was made for it."""

    source: Source
    ids: torch.Tensor
    work: Path

    def __post_init__(self) -> None:
        self.model = DenseModel(self.source)

    def measure(self, source: Source) -> tuple[float, float]:
        """(KL to the dense model in nats, perplexity) of a changed model."""
        changed = DenseModel(source)
        kl, nll = 0.0, 0.0
        for place, row in enumerate(self.ids):
            dense, ours = self._dense(place), torch.log_softmax(changed.logits(row[None])[0], -1)
            for p, q in zip(dense.split(64), ours.split(64), strict=True):  # float64 of a whole window is too much
                kl += float((p.double().exp() * (p.double() - q.double())).sum())
            nll -= float(ours[:-1].gather(1, row[1:, None]).double().sum())
        n, window = self.ids.shape
        return kl / (n * window), float(np.exp(nll / (n * (window - 1))))

    def _dense(self, place: int) -> torch.Tensor:
        """The dense model's log-probabilities f32 [window, V], kept on disk."""
        path = self.work / f"dense-{place}.npy"
        if not path.exists():
            partial = path.with_suffix(".part.npy")
            np.save(partial, torch.log_softmax(self.model.logits(self.ids[place][None])[0], -1).numpy())
            partial.rename(path)
        return torch.from_numpy(np.load(path))


def make_subject(options: argparse.Namespace) -> Subject:
    """Opens the model, cuts or samples the text to judge on."""
    source = open_source(options.model)
    work = options.work / source.fingerprint()[:16]
    work.mkdir(parents=True, exist_ok=True)
    if options.text is None:
        window = min(options.window, source.config.max_position)
        ids = sampled(DenseModel(source), work, options.sampled, window, EVALUATION_SEED)
    else:
        cut = token_windows(
            options.text,
            lambda text: encode_text(source, text).tolist(),
            options.windows,
            options.window,
            source.config.vocab_size,
        )
        ids = torch.from_numpy(cut.astype(np.int64))
    own = work / f"windows-{digest(ids)}"
    own.mkdir(exist_ok=True)
    return Subject(source, ids, own)


def sampled(model: DenseModel, work: Path, windows: int, window: int, seed: int) -> torch.Tensor:
    """Text that the model wrote, kept on disk; i64 [windows, window]."""
    path = work / f"sampled-{windows}x{window}-{seed}.npy"
    if not path.exists():
        common.note(f"sampling {windows} windows of {window} tokens, seed {seed}")
        np.save(path, model.sample(windows, window, seed).numpy())
    return torch.from_numpy(np.load(path))


def calibration(options: argparse.Namespace, subject: Subject, seed: int) -> torch.Tensor:
    """A calibration sample, i64 [windows, window]."""
    window = min(options.window, subject.source.config.max_position)
    if options.calibration is None:
        return sampled(subject.model, subject.work.parent, options.calibration_windows, window, seed)
    ids = encode_text(subject.source, read_text(options.calibration))
    available = len(ids) // window
    if available < options.calibration_windows:
        raise LowtideError(f"{options.calibration}: holds {available} windows, --calibration-windows asks for more")
    chosen = random.Random(seed).sample(range(available), options.calibration_windows)
    return torch.stack([ids[i * window : (i + 1) * window] for i in sorted(chosen)])


def digest(ids: torch.Tensor) -> str:
    """Short name of a set of windows."""
    return hashlib.sha256(ids.numpy().tobytes() + str(tuple(ids.shape)).encode()).hexdigest()[:12]


def cells(options: argparse.Namespace) -> Iterator[tuple[str, str, float]]:
    """(method, structure, sparsity) of every row."""
    settings = [("unstructured", float(s)) for s in options.sparsities.split(",") if s]
    for text in filter(None, options.structures.split(",")):
        structure, _, sparsity = text.rpartition(":")
        fixed = structure.isdigit()  # N:M says its own sparsity
        settings.append((text, 1 - int(structure) / int(sparsity)) if fixed else (structure, float(sparsity)))
    for structure, sparsity in settings:
        for method in options.methods.split(";"):
            try:
                PruneOptions(sparsity=sparsity, structure=structure, **METHODS[method])
            except LowtideError:
                continue  # N:M allows no allocation, DSnoT no whole rows
            yield method, structure, sparsity


def measure(options: argparse.Namespace, subject: Subject, seed: int, kept: Path) -> Iterator[dict[str, Any]]:
    """The rows of one calibration sample; those in the file `kept` are not measured again."""
    known = {row["key"]: row for row in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    ids: torch.Tensor | None = None
    store: ProblemStore | None = None
    for method, structure, sparsity in cells(options):
        key = f"{method}|{structure}|{sparsity:g}|{seed}|{options.calibration_windows}|{subject.work.name}"
        if key not in known:
            if ids is None:
                ids = calibration(options, subject, seed)
                store = ProblemStore(subject.work.parent / f"problems-{digest(ids)}", subject.model, ids, seed)
            common.note(f"seed {seed}: {method}, {structure} {sparsity:g}")
            settings = PruneOptions(sparsity=sparsity, structure=structure, seed=seed, **METHODS[method])
            pruned, report = prune_model(subject.source, ids, settings, store=store)
            kl, ppl = subject.measure(pruned)
            known[key] = {
                "key": key,
                "rule": method,
                "sparsity": sparsity,
                "structure": structure,
                "kl": kl,
                "ppl": ppl,
            }
            known[key] |= {"seed": seed, "density": report["density"], "seconds": report["seconds"]}
            with open(kept, "a", encoding="utf-8") as file:
                file.write(json.dumps(known[key]) + "\n")
        yield {k: v for k, v in known[key].items() if k != "key"}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, for people."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["structure"], row["sparsity"], row["rule"]), []).append(row)
    lines = []
    for (structure, sparsity, rule), found in groups.items():
        kl = [r["kl"] for r in found]
        spread = f"{statistics.stdev(kl):.4f}" if len(kl) > 1 else None
        ppl, seconds = (statistics.fmean(r[k] for r in found) for k in ("ppl", "seconds"))
        mean = statistics.fmean(kl)
        lines.append((rule, structure, f"{sparsity:g}", f"{mean:.4f}", spread, f"{ppl:.3f}", len(kl), f"{seconds:.0f}"))
    return common.markdown(COLUMNS, lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(argv)
    try:
        subject = make_subject(options)
        label = options.label or Path(subject.source.name).stem
        kl, ppl = subject.measure(subject.source)
        dense = {"rule": "dense", "sparsity": 0.0, "structure": "unstructured", "kl": kl, "ppl": ppl, "seed": 0}
        rows = [dense | {"density": 1.0, "seconds": 0.0}]
        for seed in (int(s) for s in options.seeds.split(",")):
            rows += measure(options, subject, seed, subject.work / "rows.jsonl")
    except LowtideError as error:
        print(f"pruning: error: {error}", file=sys.stderr)
        return 2
    rows = [{"model": label} | row for row in rows]
    about = {
        "model": label,
        "text": f"{len(subject.ids)} sampled windows" if options.text is None else Path(options.text).name,
        "windows": len(subject.ids),
        "window": subject.ids.shape[1],
        "calibration": "sampled" if options.calibration is None else Path(options.calibration).name,
        "calibration_windows": options.calibration_windows,
        "dense_ppl": ppl,
        "rows": rows,
    }
    result = common.report(about)
    path = common.save(f"pruning-{label}" + ("-quick" if options.quick else ""), result, table(rows))
    print(json.dumps(result, indent=2) if options.json else f"{table(rows)}\n\ndense perplexity {ppl:.3f}; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
