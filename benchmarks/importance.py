#!/usr/bin/env python3
"""Does a learned importance transfer? One-shot unstructured pruning, values exact, against Wanda and SparseGPT.

    python benchmarks/importance.py models/stories15M smol-twin.gguf:valid.txt:test.txt --seeds 3

A model is PATH (it samples its own calibration and evaluation text, with disjoint seeds) or PATH:CALIBRATION:TEXT.
For each model a network is trained on all the others and judged here, and one is trained on the model itself, with
row and column vectors. KL is the mean over all tokens of KL(dense || pruned) in nats; all rules of a model and seed
see the same calibration windows. Rules:

    wanda, sparsegpt      as published: block by block, statistics of the model pruned so far
    start                 the network before training: w^2 E[x^2] fisher / 2, one threshold over all layers
    others, own           the trained networks
    +refit                the same masks, the weights that stay refitted under the output metric (learn/restore.py)
    +gradual              as many weights of each layer, removed in steps with refits between

Rows are appended to WORK/rows.jsonl and not measured twice; trained networks and statistics stay in WORK, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import common
import torch

from lowtide.compress.calibrate import GroupStats
from lowtide.compress.dense import Block, DenseModel, decoder_block, rms_norm, rope_tables
from lowtide.compress.prune import get_pruner
from lowtide.compress.prune.problems import ProblemStore, split_problems
from lowtide.compress.sources import open_source
from lowtide.compress.text import encode_text
from lowtide.errors import LowtideError
from lowtide.learn import checkpoint
from lowtide.learn.importance import ImportanceNetwork
from lowtide.learn.oneshot import prune_learned, scores_of
from lowtide.learn.restore import Metric, output_metrics
from lowtide.learn.train_importance import Task, TrainOptions, run_block, train

BASELINES = ("wanda", "sparsegpt")
RULES = (*BASELINES, *(f"{n}{u}" for n in ("start", "others", "own") for u in ("", "+refit", "+gradual")))
EVALUATION_SEED = 20_000
Sums = dict[str, torch.Tensor]
COLUMNS = ("model", "rule", "sparsity", "KL", "spread", "perplexity", "vs SparseGPT", "vs Wanda")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="PATH, or PATH:CALIBRATION:TEXT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsities", default="0.5,0.6,0.7")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--steps", type=int, default=120, help="of training, end to end; half as many block by block")
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/importance"))
    parser.add_argument("--label", default="importance", help="name of the results file")
    parser.add_argument("--quick", action="store_true", help="few short windows, few steps, one seed: a trial run")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.sparsities, options.steps = 1, "0.5", min(options.steps, 10)
        options.calibration_windows, options.windows = 8, 2
        options.window = min(options.window, 128)
    options.levels = [float(s) for s in options.sparsities.split(",")]
    return options


@dataclass
class Subject:
    """A model with its texts; `ids(seed)`: calibration windows i64 [n, window]."""

    spec: str
    options: argparse.Namespace
    stores: dict[int, ProblemStore] = field(default_factory=dict)
    metrics: dict[int, dict[str, Metric]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path, *texts = self.spec.split(":")
        if len(texts) not in (0, 2):
            raise LowtideError(f"{self.spec}: give PATH or PATH:CALIBRATION:TEXT")
        self.name, self.texts = Path(path).stem, texts
        self.model = DenseModel(open_source(path))
        self.window = min(self.options.window, self.model.config.max_position)

    def ids(self, seed: int) -> torch.Tensor:
        """Calibration windows of a seed: sampled, or drawn from all windows of the calibration text."""
        count = self.options.calibration_windows
        if not self.texts:
            return self._sampled(f"calibration-{seed}", count, 100 + seed)
        tokens = encode_text(self.model.source, Path(self.texts[0]).read_text(encoding="utf-8"))
        order = torch.randperm(len(tokens) // self.window, generator=torch.Generator().manual_seed(seed))[:count]
        return torch.stack([tokens[i * self.window : (i + 1) * self.window] for i in order.tolist()])

    def _sampled(self, name: str, count: int, seed: int) -> torch.Tensor:
        path = self.options.work / f"{self.name}-{name}-{count}x{self.window}.pt"
        if not path.exists():
            torch.save(self.model.sample(count, self.window, seed), path)
        found: torch.Tensor = torch.load(path, weights_only=True)
        return found

    @cached_property
    def evaluation(self) -> torch.Tensor:
        """Evaluation windows, from the start of the text."""
        if not self.texts:
            return self._sampled("evaluation", self.options.windows, EVALUATION_SEED)
        tokens = encode_text(self.model.source, Path(self.texts[1]).read_text(encoding="utf-8"))
        return tokens[: self.options.windows * self.window].view(-1, self.window)

    def store(self, seed: int) -> ProblemStore:
        """The dense model's statistics on the calibration windows."""
        if seed not in self.stores:
            folder = self.options.work / f"{self.name}-statistics-{seed}"
            self.stores[seed] = ProblemStore(folder, self.model, self.ids(seed), seed)
        return self.stores[seed]

    def metric(self, seed: int) -> dict[str, Metric]:
        """Output metrics on the calibration windows; only one seed's are kept in memory."""
        if seed not in self.metrics:
            self.metrics = {seed: output_metrics(self.model, self.ids(seed), seed)}
        return self.metrics[seed]

    def task(self, seed: int = 0) -> Task:
        """For training."""
        return Task.of(self.model, self.ids(seed), self.store(seed))

    @torch.no_grad()
    def measure(self, weights: dict[str, torch.Tensor]) -> tuple[float, float]:
        """(KL, perplexity) with other weights: layer name -> f32 [out, in]."""
        total, nll, tokens, predicted = 0.0, 0.0, 0, 0
        norm, eps, head = self.model.final_norm, self.model.config.rms_eps, self.model.head_weight
        for row in self.evaluation:
            x = self.model.embed(row[None])
            for index in range(self.model.config.num_layers):
                x = run_block(self._bare, index, self._parts(index, weights), x)
            ours = torch.log_softmax(rms_norm(x, norm, eps)[0] @ head.T, -1).double()
            dense = torch.log_softmax(self.model.logits(row[None])[0], -1).double()
            total += float((dense.exp() * (dense - ours)).sum())
            nll -= float(ours[:-1].gather(1, row[1:, None]).sum())
            tokens, predicted = tokens + len(row), predicted + len(row) - 1
        return total / tokens, float(torch.tensor(nll / predicted).exp())

    @cached_property
    def _bare(self) -> Task:
        return Task(self.model, self.evaluation, [], [])

    def _parts(self, index: int, weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        prefix = f"model.layers.{index}."
        order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        by_kind = {n.rpartition(".")[2]: w for n, w in weights.items() if n.startswith(prefix)}
        return [by_kind[kind] for kind in order]


@torch.no_grad()
def baseline(subject: Subject, rule: str, sparsity: float, seed: int) -> dict[str, torch.Tensor]:
    """Wanda or SparseGPT block by block: each block's statistics are those the pruned blocks before it give."""
    model, prune = subject.model, get_pruner(rule)
    x = model.embed(subject.ids(seed))
    rope = rope_tables(model.config, 0, x.shape[1])
    found: dict[str, torch.Tensor] = {}
    for index in range(model.config.num_layers):
        block = model.block(index)
        sums: Sums = {}

        def apply(group: str, z: torch.Tensor, block: Block = block, sums: Sums = sums) -> torch.Tensor:
            sums[group] = sums.get(group, torch.zeros(())) + z[0].T @ z[0]
            return block.apply(group, z)

        for row in x:
            decoder_block(model.config, (block.input_norm, block.post_norm), row[None], apply, rope)
        parts = []
        for problem in split_problems(model, index, _plain(sums, block.weights, x.shape[0] * x.shape[1]), seed):
            found[problem.name] = prune(problem, sparsity, "unstructured").weight
            parts.append(found[problem.name])
        x = torch.cat([run_block(subject._bare, index, parts, row[None]) for row in x])
    return found


def _plain(sums: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], tokens: int) -> dict[str, GroupStats]:
    """Statistics for rules that ask for the Hessian alone; the Fisher information is set to one."""
    found = {}
    for group, total in sums.items():
        hessian = total / tokens
        one = torch.ones(len(weights[group]))
        found[group] = GroupStats(torch.zeros(len(hessian)), hessian.diagonal().double(), one, torch.empty(0))
        found[group].hessian = found[group].weighted = hessian
    return found


@torch.no_grad()
def learned(
    subject: Subject, network: ImportanceNetwork, sparsity: float, seed: int, updates: str
) -> dict[str, torch.Tensor]:
    """One threshold over the network's importances of all layers, with or without updates."""
    scores = scores_of(network, subject.store(seed))
    metrics = subject.metric(seed) if updates != "none" else None
    return prune_learned(subject.model, subject.ids(seed), scores, sparsity, updates, metrics)


def network_for(subject: Subject, others: list[Subject], kind: str, options: argparse.Namespace) -> ImportanceNetwork:
    """The network a rule asks for, trained and kept in the work folder."""
    if kind == "start":
        return ImportanceNetwork()
    path = options.work / f"{subject.name}-{kind}.safetensors"
    if path.exists():
        return checkpoint.load(path)[0]
    network, on = ImportanceNetwork(), others if kind == "others" else [subject]
    settings = TrainOptions(steps=options.steps, warm_steps=options.steps // 2, own=kind == "own")
    common.note(f"training on {', '.join(s.name for s in on)} to judge {subject.name}")
    outcome = train(network, [s.task() for s in on], settings, options.work / f"{subject.name}-{kind}", key=kind)
    about = {"models": [s.name for s in on], "held_out": vars(outcome)}
    checkpoint.save(path, network, about)
    return network


def rows(subjects: list[Subject], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure what WORK/rows.jsonl does not hold yet; yields all rows."""
    path = options.work / "rows.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    yield from known
    have = {(r["model"], r["rule"], r["sparsity"], r["seed"]) for r in known}
    for seed in range(options.seeds):
        for subject in subjects:
            others = [s for s in subjects if s is not subject]
            for rule in options.rules.split(","):
                if rule.startswith("others") and not others:
                    continue
                for sparsity in options.levels:
                    if (subject.name, rule, sparsity, seed) in have:
                        continue
                    if rule in BASELINES:
                        weights = baseline(subject, rule, sparsity, seed)
                    else:
                        kind, _, updates = rule.partition("+")
                        network = network_for(subject, others, kind, options)
                        weights = learned(subject, network, sparsity, seed, updates or "none")
                    kl, ppl = subject.measure(weights)
                    row = {"model": subject.name, "rule": rule, "sparsity": sparsity, "structure": "unstructured"}
                    row |= {"kl": kl, "ppl": ppl, "seed": seed}
                    common.note(json.dumps(row))
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    yield row


def table(found: list[dict[str, Any]]) -> str:
    """Mean and spread over seeds, and the ratio to SparseGPT's and Wanda's mean."""
    mean: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in found:
        mean.setdefault((row["model"], row["rule"], row["sparsity"]), []).append(row)

    def kl(model: str, rule: str, sparsity: float) -> float | None:
        group = mean.get((model, rule, sparsity))
        return statistics.fmean(r["kl"] for r in group) if group else None

    lines = []
    for (model, rule, sparsity), group in mean.items():
        ours = statistics.fmean(r["kl"] for r in group)
        ratios = [f"{ours / k - 1:+.0%}" if (k := kl(model, peer, sparsity)) else None for peer in BASELINES[::-1]]
        spread = statistics.stdev(r["kl"] for r in group) if len(group) > 1 else None
        ppl = statistics.fmean(r["ppl"] for r in group)
        shown = None if spread is None else f"{spread:.4f}"
        lines.append((model, rule, f"{sparsity:g}", f"{ours:.4f}", shown, f"{ppl:.2f}", *ratios))
    return common.markdown(COLUMNS, lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, save, print."""
    options = arguments(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        subjects = [Subject(spec, options) for spec in options.models]
        found = list(rows(subjects, options))
    except (LowtideError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = common.report({"model": ", ".join(s.name for s in subjects), "rows": found})
    common.save(options.label, result, table(found))
    print(json.dumps(found, indent=2) if options.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
