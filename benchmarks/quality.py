#!/usr/bin/env python3
"""Quality per bit of a model: lowtide's rules at several budgets, static rounding, and llama.cpp, on the same windows.

    python benchmarks/quality.py smol-twin.gguf --text test.txt --calibration valid.txt --label smollm2-twin \\
        --llama Q4_K_M,Q6_K --llama-python ~/llama/bin/python
    python benchmarks/quality.py models/stories15M --sampled 24 --window 256 --label stories15m --bits 2.5,2.9,3.4,4

The artifact and everything else that takes long to make is kept in --work and used again. KL is the mean over all
tokens of KL(dense || candidate) in nats, over non-overlapping windows from the start of the text, no BOS added; for
lowtide every token is masked and decoded one by one by the engine. Bits are those read per weight of the decoder's
linear layers (body) and of all matrices (total); what is static reads everything it stores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import peers
import torch
from numpy.typing import NDArray
from rounding import RoundedSource

import lowtide
from lowtide.compress.dense import DenseModel
from lowtide.compress.same_model import check_same_model
from lowtide.compress.sources import Source, open_source
from lowtide.errors import LowtideError
from lowtide.eval.measure import dense_log_probabilities
from lowtide.eval.metrics import Tally, log_softmax
from lowtide.eval.text import token_windows
from lowtide.format.reader import Artifact, open_artifact
from lowtide.runtime.tokenizer import Tokenizer

COLUMNS = ("method", "target", "read, body", "read, total", "KL", "perplexity", "MB on disk")
EVALUATION_SEED = 20_000
"""Of sampled evaluation text; calibration text is sampled with small seeds."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="anything that lowtide compress reads")
    parser.add_argument("--text", help="held-out text file")
    parser.add_argument("--sampled", type=int, metavar="N", help="instead of --text: N windows sampled from the model")
    parser.add_argument("--calibration", help="calibration text; sampled by default")
    parser.add_argument("--artifact", help="use this artifact instead of compressing")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--bits", default="2.5,3,3.35,3.85,4.35,dense", help="budgets of the default rule")
    parser.add_argument("--other-bits", default="3.35,3.85", help="budgets of all other policies the artifact stores")
    parser.add_argument("--static", default="3,4,5", help="bits of static rounding; empty for none")
    parser.add_argument("--llama", default="", metavar="TYPES", help="llama.cpp types, e.g. Q4_K_M,Q6_K")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python; this one by default")
    parser.add_argument("--engine", default="native", choices=("native", "reference"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="where made files are kept")
    parser.add_argument("--label", help="name of the results file; the model's by default")
    parser.add_argument("--quick", action="store_true", help="one short window, two budgets, no peers: a trial run")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if (options.text is None) == (options.sampled is None):
        parser.error("give either --text or --sampled")
    if options.quick:
        options.windows, options.window = 1, min(options.window, 64)
        options.sampled = options.sampled and 1
        options.bits, options.other_bits, options.static, options.llama = "3.35,dense", "3.35", "4", ""
    return options


@dataclass
class Subject:
    """What is measured: the dense model, the windows i32 [n, window], and its log-probabilities (kept on disk)."""

    source: Source
    ids: NDArray[np.int32]
    work: Path

    def references(self) -> Iterator[NDArray[np.float32]]:
        """The dense model's log-probabilities f32 [window, V] of each window."""
        model: DenseModel | None = None
        for i, row in enumerate(self.ids):
            path = self.work / f"dense-{i}.npy"
            if not path.exists():
                common.note(f"dense model, window {i + 1} of {len(self.ids)}")
                model = model or DenseModel(self.source)
                partial = path.with_suffix(".part.npy")
                np.save(partial, dense_log_probabilities(model, row).astype(np.float32))
                partial.rename(path)
            yield np.load(path, mmap_mode="r")

    def compare(self, candidates: Iterator[NDArray[Any]]) -> tuple[float, float]:
        """(KL, perplexity) of a candidate's logits [window, V], one array for each window."""
        tally = Tally()
        for row, dense, logits in zip(self.ids, self.references(), candidates, strict=True):
            following = [*row[1:].tolist(), None]
            for target, reference, ours in zip(following, dense, logits, strict=True):
                tally.add(log_softmax(ours), target, reference.astype(np.float64))
        return tally.mean_kl, tally.perplexity

    def dense_perplexity(self) -> float:
        """Perplexity of the dense model."""
        return self.compare(self.references())[1]


def make_subject(options: argparse.Namespace) -> Subject:
    """Opens the model, cuts or samples the text."""
    source = open_source(options.model)
    work = options.work / source.fingerprint()[:16]
    work.mkdir(parents=True, exist_ok=True)
    if options.sampled is not None:
        path = work / f"sampled-{options.sampled}x{options.window}.npy"
        if not path.exists():
            common.note(f"sampling {options.sampled} windows of {options.window} tokens")
            np.save(
                path,
                DenseModel(source).sample(options.sampled, options.window, EVALUATION_SEED).numpy().astype(np.int32),
            )
        ids = np.load(path)
    else:
        files = source.tokenizer_files()
        tokenizer = Tokenizer(files["tokenizer.json"])
        ids = token_windows(
            options.text,
            lambda text: tokenizer.encode(text, special=False),
            options.windows,
            options.window,
            source.config.vocab_size,
        )
    own = work / f"windows-{hash_of(ids)}"
    own.mkdir(exist_ok=True)
    return Subject(source, ids, own)


def hash_of(ids: NDArray[np.int32]) -> str:
    """Short name of a set of windows."""
    import hashlib

    return hashlib.sha256(np.ascontiguousarray(ids).tobytes() + str(ids.shape).encode()).hexdigest()[:12]


def make_artifact(options: argparse.Namespace, source: Source) -> Artifact:
    """The artifact given, made before, or made now."""
    if options.artifact:
        artifact = open_artifact(options.artifact)
        check_same_model(artifact, source)
        return artifact
    name = Path(options.calibration).stem if options.calibration else "sampled"
    path = options.work / source.fingerprint()[:16] / f"{name}.lowtide"
    if not path.exists():
        common.note(f"compressing {source.name}")
        compress: Any = lowtide.compress
        compress(options.model, path, calibration=options.calibration)
    return open_artifact(path)


def row(method: str, target: Any, body: float, total: float, kl: float, ppl: float, size: int | None) -> dict[str, Any]:
    """One line of the table."""
    return {
        "method": method,
        "target": target,
        "bits_read_body": body,
        "bits_read_total": total,
        "kl": kl,
        "ppl": ppl,
        "file_bytes": size,
    }


def measure_lowtide(options: argparse.Namespace, subject: Subject, artifact: Artifact) -> Iterator[dict[str, Any]]:
    """Every policy of the artifact at its budgets."""
    low, high = artifact.manifest.budgets[0], artifact.manifest.budgets[-1]
    for place, policy in enumerate(artifact.manifest.policies):
        wanted = [parse(b) for b in (options.bits if place == 0 else options.other_bits).split(",")]
        bits = [b for b in wanted if b is None or low <= b <= high]
        if not bits:
            continue
        common.note(f"lowtide {policy} at {', '.join('dense' if b is None else f'{b:g}' for b in bits)} bits")
        result = lowtide.evaluate(
            artifact,
            subject.source,
            subject.ids,
            windows=len(subject.ids),
            window=subject.ids.shape[1],
            bits=bits,
            policy=policy,
            engine=options.engine,
            threads=options.threads,
        )
        for p in result["points"]:
            figures = (p["bits_read_body"], p["bits_read_total"], p["kl"], p["ppl"], result["file_bytes"])
            yield row(f"lowtide {policy}", p["bits"], *figures)


def parse(text: str) -> float | None:
    """A budget; None for "dense"."""
    return None if text == "dense" else float(text)


def measure_static(options: argparse.Namespace, subject: Subject) -> Iterator[dict[str, Any]]:
    """Static round-to-nearest at each width."""
    for bits in (int(b) for b in options.static.split(",") if b):
        common.note(f"round to nearest, {bits} bits")
        rounded = RoundedSource(subject.source, bits)
        model = DenseModel(rounded)
        logits = (model.logits(torch.from_numpy(w.astype(np.int64))[None])[0].numpy() for w in subject.ids)
        kl, ppl = subject.compare(logits)
        body, total = rounded.bits_per_weight()
        yield row(f"round to nearest, {bits} bits, group 64", None, body, total, kl, ppl, None)


def measure_llama(options: argparse.Namespace, subject: Subject) -> Iterator[dict[str, Any]]:
    """llama.cpp's types, quantised by llama.cpp from F16; F16 itself first, to show that both compute the same."""
    kinds = [k for k in options.llama.split(",") if k]
    if not kinds:
        return
    folder = subject.work.parent
    reference = Path(options.model)
    if not peers.is_f16_gguf(reference):
        reference = folder / "f16.gguf"
        if not reference.exists():
            peers.write_f16_gguf(subject.source, reference)
    for kind in ["F16", *kinds]:
        common.note(f"llama.cpp {kind}")
        path = reference if kind == "F16" else folder / f"{kind}.gguf"
        with peers.Worker("llama", options.llama_python) as worker:
            if not path.exists():
                worker("quantise", source=str(reference), path=str(path), kind=kind, threads=options.threads or 2)
            kl, ppl = subject.compare(llama_logits(worker, path, subject, options.threads or 2))
        body, total = peers.gguf_bits(path, subject.source)
        yield row(f"llama.cpp {kind}", None, body, total, kl, ppl, path.stat().st_size)


def llama_logits(worker: peers.Worker, path: Path, subject: Subject, threads: int) -> Iterator[NDArray[np.float32]]:
    """llama.cpp's logits f32 [window, V] of each window."""
    out = subject.work / "llama.npy"
    worker("open", path=str(path), threads=threads, context=subject.ids.shape[1], all_logits=True)
    try:
        for window in subject.ids:
            worker("logits", ids=window.tolist(), out=str(out))
            yield np.load(out)
    finally:
        out.unlink(missing_ok=True)


def table(rows: list[dict[str, Any]]) -> str:
    """The figures for people."""

    def cells(r: dict[str, Any]) -> list[Any]:
        target = r["target"] if not isinstance(r["target"], float) else f"{r['target']:g}"
        size = None if r["file_bytes"] is None else f"{r['file_bytes'] / 1e6:.1f}"
        return [
            r["method"],
            target,
            f"{r['bits_read_body']:.3f}",
            f"{r['bits_read_total']:.3f}",
            f"{r['kl']:.4f}",
            f"{r['ppl']:.3f}",
            size,
        ]

    return common.markdown(COLUMNS, (cells(r) for r in rows))


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(argv)
    try:
        subject = make_subject(options)
        artifact = make_artifact(options, subject.source)
        dense = subject.dense_perplexity()
        rows = list(measure_lowtide(options, subject, artifact))
        rows += measure_static(options, subject)
        rows += measure_llama(options, subject)
    except LowtideError as error:
        print(f"quality: error: {error}", file=sys.stderr)
        return 2
    label = options.label or Path(subject.source.name).stem
    result = common.report(
        {
            "model": label,
            "text": f"{len(subject.ids)} sampled windows" if options.text is None else Path(options.text).name,
            "windows": len(subject.ids),
            "window": subject.ids.shape[1],
            "calibration": artifact.manifest.stats.get("calibration"),
            "dense_ppl": dense,
            "rows": rows,
        }
    )
    path = common.save(f"quality-{label}" + ("-quick" if options.quick else ""), result, table(rows))
    print(json.dumps(result, indent=2) if options.json else f"{table(rows)}\n\ndense perplexity {dense:.3f}; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
