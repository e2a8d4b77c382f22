#!/usr/bin/env python3
"""The static half in one run: file sizes at equal KL, what pruning and dynamic levels add, pruning rules, codecs.

    python benchmarks/static.py models/stories15M --quick
    python benchmarks/static.py smol-f16.gguf --text test.txt --calibration valid.txt --steps 1.7e-4,1e-4,5e-5 \\
        --llama Q6_K,Q4_K_M,Q3_K_M --llama-python llama/bin/python --label smollm2-twin

Sections (--sections):
  files    lowtide at several steps beside llama.cpp's types and round to nearest: every file whole, KL of the same
           windows. lowtide's weights are those that a full read stands for, computed with in float32; llama.cpp runs
           its own arithmetic. Each llama.cpp type is paired with the smallest lowtide file of equal or smaller KL.
  levels   the artifacts above read dynamically by the native engine, and one that was pruned first: KL at bits read.
  importance  the column importance as a multiplier of the reconstructed weights, at several powers.
  pruning, codec, fingerprint, keyed   the scripts of these names, their rows added to this file's; keyed trains on the
           calibration text and is judged on --text.

Rows of `files`: {model, codec, density, file_bytes, entropy_bits, coded_bits, kl, ppl, peer, peer_file_bytes, peer_kl}.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import quality
import torch
from rounding import RoundedSource

from lowtide.arch import group_specs
from lowtide.compress import compress, compress_curve
from lowtide.compress.dense import DenseModel
from lowtide.compress.held_out import coded_logits
from lowtide.compress.prune.apply import PruneOptions
from lowtide.errors import LowtideError
from lowtide.eval import evaluate
from lowtide.format.groups import GroupTensors
from lowtide.format.reader import Artifact, open_artifact

HERE = Path(__file__).parent
OWN, OTHERS = ("files", "levels", "importance"), ("pruning", "codec", "fingerprint", "keyed")
POWERS = (0.05, 0.1, 0.2)
LEVEL_BITS = (2.0, 2.5, 3.0, 3.5, 4.0, None)
POLICY = ["channel-norm"]
FILE_COLUMNS = ("codec", "density", "MB", "of peer", "bits/weight", "KL", "perplexity", "peer", "peer MB", "peer KL")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="anything that lowtide compress reads; a GGUF in F16 for llama.cpp's rows")
    parser.add_argument("--text", help="held-out text file")
    parser.add_argument("--sampled", type=int, metavar="N", help="instead of --text: N windows sampled")
    parser.add_argument("--windows", type=int, default=4, help="of --text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--calibration", help="calibration text; sampled by default")
    parser.add_argument("--calibration-tokens", type=int, help="of that text")
    parser.add_argument("--steps", default="2e-4,1e-4,5e-5", help="quantisation steps of the files")
    parser.add_argument("--seeds", default="0", help="of the calibration; several give mean and spread")
    parser.add_argument("--sparsity", default="0.3,0.5", help="files pruned first, at the middle step; empty for none")
    parser.add_argument("--static", default="4,5,6", help="widths of round to nearest; empty for none")
    parser.add_argument("--llama", default="", help="llama.cpp's types, e.g. Q6_K,Q4_K_M")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python")
    parser.add_argument("--sections", default=",".join(OWN), help=f"of {', '.join((*OWN, *OTHERS))}")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--label", help="name of the results file; the model's by default")
    parser.add_argument("--quick", action="store_true", help="every section, each short: a trial run")
    parser.add_argument("--json", action="store_true", help="print all rows as JSON")
    options = parser.parse_args(argv)
    options.keyed_texts = [options.calibration, options.text] if options.calibration and options.text else []
    if options.quick:
        options.text, options.sampled, options.window = None, options.sampled or 4, min(options.window, 256)
        options.steps, options.sparsity, options.static, options.llama = "4e-4,2e-4", "0.5", "5", ""
        options.sections = ",".join((*OWN, *OTHERS))
    if (options.text is None) == (options.sampled is None):
        parser.error("give either --text or --sampled")
    unknown = set(options.sections.split(",")) - {*OWN, *OTHERS}
    if unknown:
        parser.error(f"--sections: no {sorted(unknown)[0]!r}")
    return options


class Files:
    """Makes the artifacts and measures them, each once."""

    def __init__(self, options: argparse.Namespace, subject: quality.Subject) -> None:
        self.options, self.subject = options, subject
        self.model = DenseModel(subject.source)
        self.label = options.label or Path(subject.source.name).stem

    def place(self, step: float, seed: int, sparsity: float = 0.0) -> Path:
        """The folder of a step's artifact, kept in --work."""
        name = f"step-{step:g}-seed-{seed}" + (f"-sparsity-{sparsity:g}" if sparsity else "")
        return self.subject.work.parent / f"{name}-{Path(self.options.calibration or 'sampled').stem}"

    def make_all(self, steps: list[float], seed: int) -> None:
        """The artifacts of all steps of a seed that are not there yet, in one walk."""
        outs = {step: self.place(step, seed) for step in steps}
        outs = {step: out for step, out in outs.items() if not out.exists()}
        if outs:
            common.note(f"compressing, seed {seed}, steps {', '.join(f'{s:g}' for s in outs)}")
            o = self.options
            compress_curve(
                o.model,
                outs,
                calibration=o.calibration,
                calibration_tokens=o.calibration_tokens,
                seed=seed,
                policies=POLICY,
            )

    def artifact(self, step: float, seed: int, sparsity: float = 0.0) -> Artifact:
        """The artifact of a step."""
        out = self.place(step, seed, sparsity)
        if not (out / "lowtide.json").exists():
            common.note(f"compressing, {out.name}")
            prune = PruneOptions(sparsity=sparsity, allocation="global", sequential="group", seed=seed)
            compress(
                self.options.model,
                out,
                calibration=self.options.calibration,
                calibration_tokens=self.options.calibration_tokens,
                step=step,
                seed=seed,
                prune=prune if sparsity else None,
                policies=POLICY,
            )
        return open_artifact(out)

    def compare(self, groups: dict[str, GroupTensors]) -> tuple[float, float]:
        """(KL, perplexity) of the reconstructed weights."""
        ids = torch.from_numpy(self.subject.ids.astype(np.int64))
        return self.subject.compare(x.numpy() for x in coded_logits(self.model, groups.__getitem__, ids))

    def file_row(self, artifact: Artifact, codec: str, seed: int) -> dict[str, Any]:
        """A row of the files table, its peer still open."""
        kl, ppl = self.compare(artifact.groups)
        entropy = artifact.manifest.stats["entropy"]
        row = {"model": self.label, "codec": codec, "seed": seed, "step": artifact.manifest.stats["step"]}
        row |= {"density": density(artifact), "file_bytes": artifact.stored_bytes(), "weights": entropy["weights"]}
        row |= {"entropy_bits": entropy["entropy_bits"], "coded_bits": entropy["coded_bits"], "kl": kl, "ppl": ppl}
        return row | {"peer": None, "peer_file_bytes": None, "peer_kl": None}


def density(artifact: Artifact) -> float:
    """Share of the body's weights that are not zero."""
    zeros = weights = 0
    for name, group in artifact.groups.items():
        if name not in ("head", "embed"):
            for index in range(len(group.linears)):
                read = group.dequantise(index, group.slices) + group.exact_part(index)
                zeros, weights = zeros + int((read == 0).sum()), weights + read.size
    return 1 - zeros / weights


def file_rows(files: Files) -> list[dict[str, Any]]:
    """lowtide's files and the peers', paired."""
    options, rows = files.options, []
    steps = [float(s) for s in options.steps.split(",")]
    for seed in map(int, options.seeds.split(",")):
        files.make_all(steps, seed)
        rows += [files.file_row(files.artifact(step, seed), "lowtide", seed) for step in steps]
    middle = steps[len(steps) // 2]
    for sparsity in (float(s) for s in options.sparsity.split(",") if s):
        rows.append(files.file_row(files.artifact(middle, 0, sparsity), f"lowtide, {sparsity:.0%} pruned first", 0))
    peers = list(peer_rows(files))
    return [*rows, *peers, *pairs(rows, peers)]


def peer_rows(files: Files) -> Iterator[dict[str, Any]]:
    """Round to nearest (sizes without a container) and llama.cpp's types."""
    options, subject = files.options, files.subject
    for bits in (int(b) for b in options.static.split(",") if b):
        common.note(f"round to nearest, {bits} bits")
        rounded = RoundedSource(subject.source, bits)
        model = DenseModel(rounded)
        kl, ppl = subject.compare(
            model.logits(torch.from_numpy(w.astype(np.int64))[None])[0].numpy() for w in subject.ids
        )
        weights = sum(spec.weights for spec in group_specs(subject.source.config))
        size = round(rounded.bits_per_weight()[1] * weights / 8)
        yield {
            "model": files.label,
            "codec": f"round to nearest, {bits} bits",
            "file_bytes": size,
            "kl": kl,
            "ppl": ppl,
        }
    for row in quality.measure_llama(options, subject):
        yield {
            "model": files.label,
            "codec": row["method"],
            "file_bytes": row["file_bytes"],
            "kl": row["kl"],
            "ppl": row["ppl"],
        }


def pairs(rows: list[dict[str, Any]], peers: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each llama.cpp type the smallest lowtide file that is at least as good."""
    for peer in peers:
        good = [r for r in rows if r["kl"] <= peer["kl"]]
        if good and peer["codec"].startswith("llama.cpp") and not peer["codec"].endswith("F16"):
            best = min(good, key=lambda r: r["file_bytes"])
            yield best | {"peer": peer["codec"], "peer_file_bytes": peer["file_bytes"], "peer_kl": peer["kl"]}


def level_rows(files: Files) -> list[dict[str, Any]]:
    """Dynamic reading of the default artifact, of the middle step's and of a pruned one."""
    options = files.options
    steps = [float(s) for s in options.steps.split(",")]
    default = files.subject.work.parent / f"graded-{Path(options.calibration or 'sampled').stem}"
    if not (default / "lowtide.json").exists():
        common.note("compressing for dynamic reading")
        compress(options.model, default, calibration=options.calibration, policies=POLICY)
    subjects = {"graded": open_artifact(default)}
    subjects |= {f"static, step {s:g}": files.artifact(s, 0) for s in steps[-2:]}
    for sparsity in (float(s) for s in options.sparsity.split(",") if s):
        subjects[f"static, {sparsity:.0%} pruned"] = files.artifact(steps[len(steps) // 2], 0, sparsity)
    rows = []
    for name, artifact in subjects.items():
        common.note(f"reading {name}")
        found = evaluate(
            artifact,
            files.subject.source,
            files.subject.ids,
            windows=len(files.subject.ids),
            window=files.subject.ids.shape[1],
            bits=[b for b in LEVEL_BITS if b is None or b > artifact.manifest.budgets[0]],
            threads=options.threads,
            progress=False,
        )
        for point in found["points"]:
            rows.append({"model": files.label, "artifact": name, "file_bytes": artifact.stored_bytes(), **point})
    return rows


def importance_rows(files: Files) -> list[dict[str, Any]]:
    """The multiplier: column j of every weight times (v_j / geometric mean)^power."""
    from lowtide.runtime.multiplier import with_multiplier

    steps = [float(s) for s in files.options.steps.split(",")]
    artifact = files.artifact(steps[len(steps) // 2], 0)
    rows = []
    for power in (0.0, *POWERS):
        groups = {name: with_multiplier(group, power) for name, group in artifact.groups.items()}
        kl, ppl = files.compare(groups)
        rows.append({"model": files.label, "importance_multiplier": power, "kl": kl, "ppl": ppl})
    return rows


def other_rows(section: str, options: argparse.Namespace, label: str) -> list[dict[str, Any]]:
    """Rows of a sibling script."""
    command = [sys.executable, str(HERE / f"{section}.py")]
    if section == "pruning":
        text = ["--sampled", str(options.sampled)] if options.text is None else ["--text", options.text]
        command += [options.model, *text, "--window", str(options.window), "--label", label]
        command += ["--calibration", options.calibration] if options.calibration else []
    elif section == "codec":
        command += [options.model, "--name", label + ("-quick" if options.quick else "")]
    elif section == "fingerprint":
        command += [options.model]
    elif not options.keyed_texts:
        common.note("keyed: left out, it needs --calibration and --text")
        return []
    else:
        command += ["--text", *options.keyed_texts]
    common.note(" ".join(Path(c).name for c in command[1:3]))
    done = subprocess.run([*command, "--json", *(["--quick"] if options.quick else [])], stdout=subprocess.PIPE)
    if done.returncode:
        raise LowtideError(f"{section}.py failed with exit code {done.returncode}")
    found = json.loads(done.stdout)
    return found if isinstance(found, list) else found.get("rows", [found])


def file_table(rows: list[dict[str, Any]]) -> str:
    """The files for people."""

    def cells(r: dict[str, Any]) -> list[Any]:
        peer = r.get("peer_file_bytes")
        return [
            r["codec"] + (f", seed {r['seed']}" if r.get("seed") else ""),
            f"{r['density']:.3f}" if "density" in r else None,
            f"{r['file_bytes'] / 1e6:.2f}" if r["file_bytes"] else None,
            f"{r['file_bytes'] / peer:.3f}" if peer else None,
            f"{8 * r['file_bytes'] / r['weights']:.3f}" if "weights" in r else None,
            f"{r['kl']:.4f}",
            f"{r['ppl']:.3f}",
            r.get("peer"),
            f"{peer / 1e6:.2f}" if peer else None,
            f"{r['peer_kl']:.4f}" if peer else None,
        ]

    return common.markdown(FILE_COLUMNS, (cells(r) for r in rows))


def plain_table(rows: list[dict[str, Any]]) -> str:
    """Any rows for people, their own keys as columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = [[f"{v:.4g}" if isinstance(v := row.get(c), float) else v for c in columns] for row in rows]
    return common.markdown(columns, shown)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(argv)
    sections: dict[str, list[dict[str, Any]]] = {}
    try:
        subject = quality.make_subject(options)
        files = Files(options, subject)
        makers = {"files": file_rows, "levels": level_rows, "importance": importance_rows}
        for section in options.sections.split(","):
            sections[section] = (
                makers[section](files) if section in makers else other_rows(section, options, files.label)
            )
    except LowtideError as error:
        print(f"static: error: {error}", file=sys.stderr)
        return 2
    text = f"{len(subject.ids)} sampled windows" if options.text is None else Path(options.text).name
    about = {"model": files.label, "text": text, "windows": len(subject.ids), "window": subject.ids.shape[1]}
    about["calibration"] = Path(options.calibration).name if options.calibration else "sampled"
    result = common.report(about | {"dense_ppl": subject.dense_perplexity(), "sections": sections})
    tables = [f"## {n}\n\n{file_table(rows) if n == 'files' else plain_table(rows)}" for n, rows in sections.items()]
    path = common.save(f"static-{files.label}" + ("-quick" if options.quick else ""), result, "\n\n".join(tables))
    print(json.dumps([row for rows in sections.values() for row in rows], indent=2) if options.json else path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
