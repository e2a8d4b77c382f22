#!/usr/bin/env python3
"""Robustness: what perturbed input costs the dense model, the masked model at several budgets, and trained artifacts.

    python benchmarks/robustness.py models/stories15M stories15M.lowtide --sampled 24 --label stories15M
    python benchmarks/robustness.py smol-twin.gguf plain.lowtide trained.lowtide --text test.txt --windows 8 --bits 3

Perturbations (lowtide/eval/perturb.py), each at several strengths: typos (share of the letters), adjacent words
swapped and words swapped within 5 (share of the words), Gaussian noise on the token embeddings (length relative to the
mean embedding's), HotFlip (tokens flipped per window). HotFlip follows the dense model's gradient and is aimed at the
dense model alone; the others merely inherit its flips. Every candidate sees the same perturbed input.

Per candidate: KL(dense || candidate) on the same input, clean or perturbed, in nats per token: does masking hurt more
there? Perplexity, and by how much it rises over the candidate's own on clean input. Typos and swaps change the tokens,
so their ratios are per word and per character; noise and flips do not, their loss is that of the original tokens.
KL(clean || perturbed) of each model with itself where positions align: how far its own output moves. A seed draws
the perturbation. Thresholds are those of the budget asked for, moved by one offset such that the first clean windows
read just that; on perturbed text they stay, and what was read is in the rows.

The verdict is computed: differences to the dense model, paired by window, with 95 % intervals of a bootstrap over
windows. A model that is less sure loses less where it is wrong, so there is a control: the dense model softened by a
temperature until its clean loss is the candidate's. Who loses less than the dense model but not less than the softened
one is less sure, not more robust. Artifacts may hold weights of their own (jointly trained ones do); the shapes must be
the model's. Finished windows wait in --work, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import quality
import robustness_report as report
import torch

from lowtide.arch import norm_specs
from lowtide.compress import masked
from lowtide.compress.dense import DenseModel
from lowtide.compress.masked import MaskedModel
from lowtide.errors import LowtideError
from lowtide.eval import perturb
from lowtide.format.manifest import MANIFEST_NAME
from lowtide.format.reader import Artifact, open_artifact
from lowtide.kernels.types import PolicyParams
from lowtide.rules import get_rule
from lowtide.runtime.budget import parse_bits, policy_params

STRENGTHS: dict[str, tuple[float, ...]] = {
    "typos": (0.02, 0.05, 0.1),
    "adjacent words swapped": (0.1, 0.3),
    "words swapped within 5": (0.1, 0.3),
    "embedding noise": (0.1, 0.3, 0.6),
    "HotFlip": (2, 4, 8),
}
REACH = {"adjacent words swapped": 1, "words swapped within 5": 5}
TEMPERATURES = tuple(round(1 + 0.05 * i, 2) for i in range(41))
"""Of the softened dense model, 1 to 3."""
SETTLE_WINDOWS, SETTLE_PASSES, SETTLED = 2, 4, 0.005
"""The offset of a budget: at most so many passes over so many clean windows, until the bits are so near, relatively."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the dense model: anything that lowtide compress reads")
    parser.add_argument("artifacts", nargs="+", metavar="artifact", help="made from it, trained or not")
    parser.add_argument("--text", help="held-out text file")
    parser.add_argument("--sampled", type=int, metavar="N", help="instead of --text: N windows sampled from the model")
    parser.add_argument("--windows", type=int, default=8, help=f"of --text; a verdict takes {report.MIN_WINDOWS}")
    parser.add_argument("--window", type=int, default=256, help="tokens of each")
    parser.add_argument("--bits", default="2.5,3,dense", help="budgets of each artifact")
    parser.add_argument("--policy", help="mask rule or rules; the one an artifact puts first by default")
    parser.add_argument("--seeds", default="0,1,2", help="of the perturbations")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="where made files are kept")
    parser.add_argument("--label", help="name of the results file; the model's by default")
    parser.add_argument("--quick", action="store_true", help="two short windows, one seed, one strength: a trial")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if (options.text is None) == (options.sampled is None):
        parser.error("give either --text or --sampled")
    if options.quick:
        options.windows, options.window, options.seeds = 2, min(options.window, 64), options.seeds.split(",")[0]
        options.sampled = options.sampled and 2
        options.bits = options.bits.split(",")[0]
    return options


@dataclass
class Input:
    """One window as a candidate sees it.

    Attributes:
        ids: i64 [N].
        targets: i64 [N], what is to be predicted: the same, or the clean window's tokens where positions align.
        noise: f32 [N, D] on the embeddings, or None.
        words, characters: of the text in `targets`.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    words: int
    characters: int
    noise: torch.Tensor | None = None


@dataclass
class Subject:
    """The dense model, the clean windows (i64 [at most window]), and the strengths of each perturbation."""

    model: DenseModel
    text: perturb.EditableText
    clean: list[torch.Tensor]
    window: int
    strengths: dict[str, tuple[float, ...]]
    work: Path

    def given(self, ids: Sequence[int]) -> Input:
        """A window whose own tokens are to be predicted."""
        tensor, text = torch.tensor(ids, dtype=torch.int64), self.text.decode(ids)
        return Input(tensor, tensor, len(text.split()), len(text))

    def cases(self, place: int, seed: int) -> Iterator[tuple[str, float, Input]]:
        """(perturbation, strength, input) of one clean window and seed."""
        clean = self.given(self.clean[place].tolist())
        for kind, strengths in self.strengths.items():
            if kind == "HotFlip":
                counts, allowed = [int(s) for s in strengths], self.text.ordinary()
                flipped = perturb.hotflip(self.model, clean.ids, counts, allowed, 1000 * seed + place)
                for count, ids in zip(strengths, flipped, strict=True):
                    yield kind, count, Input(ids, clean.targets, clean.words, clean.characters)
                continue
            for strength in strengths:
                # strengths share the draw, so that noise differs in length alone
                rng = np.random.default_rng((seed, place, zlib.crc32(kind.encode())))
                yield kind, strength, self._changed(kind, strength, clean, rng)

    def _changed(self, kind: str, strength: float, clean: Input, rng: np.random.Generator) -> Input:
        if kind == "embedding noise":
            noise = perturb.embedding_noise(self.model, len(clean.ids), strength, rng)
            return Input(clean.ids, clean.targets, clean.words, clean.characters, noise)

        def change(text: str) -> str:
            if kind == "typos":
                return perturb.typos(text, strength, rng)
            return perturb.swap_words(text, strength, rng, REACH[kind])

        return self.given(self.text.edit(clean.ids.tolist(), change)[: self.window])


class Candidate:
    """The dense model as a candidate, and what all of them have.

    Attributes:
        artifact, rule, bits: its name; the dense model has no artifact and no bits.
        key: names its records.
        temperature: of the dense model that is softened to its clean loss.
        own_weights: the artifact was made from other weights than the dense model's.
    """

    artifact: str = ""
    rule: str = "dense"
    bits: float | str | None = None
    key: str = "dense"
    temperature: float = 1.0
    own_weights: bool = False

    def __init__(self, model: DenseModel) -> None:
        self._dense = model

    def settle(self, windows: Sequence[Input]) -> None:
        """Aim at the budget on clean text."""

    @torch.no_grad()
    def logits(self, seen: Input) -> tuple[torch.Tensor, float | None]:
        """(logits f32 [N, V], bits_read_body; None: not counted)."""
        x = self._dense.embed(seen.ids[None])[0]
        return perturb.dense_logits(self._dense, x if seen.noise is None else x + seen.noise), None


class Masked(Candidate):
    """An artifact at one budget, every token masked (lowtide.compress.masked)."""

    def __init__(self, artifact: Artifact, name: str, model: MaskedModel, policy: str, bits: float | None) -> None:
        manifest = (artifact.path / MANIFEST_NAME).read_bytes()
        self.artifact, self.rule, self.bits = name, policy, "dense" if bits is None else bits
        self.key = f"{hashlib.sha256(manifest).hexdigest()[:12]}|{policy}|{self.bits}"
        self._params: PolicyParams = policy_params(artifact, policy, bits)
        self._model, self._offset = model, 0.0
        self._target = self._params.bits or bits  # ipn holds a budget within the range that it was trained for
        self._names = [group for group in artifact.groups if group != "embed"]

    def settle(self, windows: Sequence[Input]) -> None:
        """Move the thresholds such that clean text reads the budget."""
        for _ in range(SETTLE_PASSES if self._target is not None else 0):
            read = sum(self.logits(w)[1] * len(w.ids) for w in windows) / sum(len(w.ids) for w in windows)
            if abs(read - self._target) <= SETTLED * self._target:
                break
            self._offset += read - self._target  # a step of log2 reads one bit less, or a little less than that

    def logits(self, seen: Input) -> tuple[torch.Tensor, float]:
        """(logits f32 [N, V], bits_read_body)."""
        rule = get_rule(self._params.rule)
        shifted = [rule.shift(row, self._offset) for row in self._params.thresholds]
        params, gains = dict(zip(self._names, shifted, strict=True)), self._params.gains
        named = None if gains is None else dict(zip(self._names, gains.tolist(), strict=True))
        return perturb.masked_logits(self._model, seen.ids, rule, params, seen.noise, named)


def make_subject(options: argparse.Namespace) -> Subject:
    """Opens the model, cuts or samples the text."""
    found = quality.make_subject(options)
    limit = found.source.config.max_position
    if options.window > limit:
        raise LowtideError(f"--window {options.window}: the model's context holds {limit} tokens")
    text = perturb.EditableText(found.source)
    clean = [torch.tensor(text.canonical(row.tolist(), options.window)) for row in found.ids]
    strengths = {k: v[len(v) // 2 :][:1] for k, v in STRENGTHS.items()} if options.quick else dict(STRENGTHS)
    subject = Subject(DenseModel(found.source), text, clean, options.window, strengths, found.work)
    for place, ids in enumerate(clean):
        if subject.given(ids.tolist()).words < 2:
            raise LowtideError(f"window {place + 1} of the text holds fewer than 2 words; use a longer --window")
    return subject


def make_candidates(options: argparse.Namespace, subject: Subject) -> list[Candidate]:
    """The dense model, then every artifact at every budget."""
    candidates: list[Candidate] = [Candidate(subject.model)]
    source, names = subject.model.source, [Path(a).name.removesuffix(".lowtide") for a in options.artifacts]
    for place, path in enumerate(options.artifacts):
        artifact = open_artifact(path)
        for key in ("architecture", "vocab_size", "hidden_size", "num_layers"):
            ours, theirs = getattr(artifact.config, key), getattr(source.config, key)
            if ours != theirs:
                raise LowtideError(f"{path}: made from another model: its {key} is {ours}, {source.name} has {theirs}")
        name = names[place] if names.count(names[place]) == 1 else f"{names[place]} {place + 1}"
        norms = {n: artifact.tensor(n) for n, _ in norm_specs(artifact.config)}
        model = MaskedModel(artifact.config, artifact.groups, norms, centroids=artifact.centroids())
        policies = (options.policy or artifact.manifest.policies[0]).split(",")
        for policy, bits in itertools.product(policies, map(parse_bits, options.bits.split(","))):
            if bits is None and policy != policies[0]:
                continue  # a full read has no mask
            candidate = Masked(artifact, name, model, policy, bits)
            candidate.own_weights = artifact.manifest.model_id != source.fingerprint()
            candidates.append(candidate)
        if candidates[-1].own_weights:
            common.note(f"{name}: its weights are not {source.name}'s: trained, or another model's")
    return candidates


def measure_clean(subject: Subject, candidates: list[Candidate], place: int, keep: Keep) -> None:
    """Records of one clean window; the dense model's has its losses at all TEMPERATURES, too."""
    clean = subject.given(subject.clean[place].tolist())
    keys = [record_of(c, place, "none", 0.0, 0) for c in candidates]
    if all(r["key"] in keep.known for r in keys):
        return
    dense = torch.log_softmax(candidates[0].logits(clean)[0], -1)
    for candidate, record in zip(candidates, keys, strict=True):
        logits, bits = candidate.logits(clean)
        figures = report.compare(clean, torch.log_softmax(logits, -1), dense, None)
        curve = (
            [report.nll(clean, report.softened(dense, t)) for t in TEMPERATURES] if candidate is candidates[0] else None
        )
        keep.add(record | {"bits": bits, "curve": curve} | figures)


def measure_window(subject: Subject, candidates: list[Candidate], place: int, seed: int, keep: Keep) -> None:
    """Records of one window and seed under all perturbations; the dense model is the first candidate."""
    if all(key in keep.known for key in keys_of(subject, candidates, place, [seed])):
        return
    clean = subject.given(subject.clean[place].tolist())
    clean_logp = [torch.log_softmax(c.logits(clean)[0], -1) for c in candidates]
    for kind, strength, seen in subject.cases(place, seed):
        dense = torch.log_softmax(candidates[0].logits(seen)[0], -1)
        aligned = kind in report.ALIGNED
        for candidate, own in zip(candidates, clean_logp, strict=True):
            record = record_of(candidate, place, kind, strength, seed)
            if record["key"] in keep.known:
                continue
            logp, bits = dense, None
            if candidate is not candidates[0]:
                logits, bits = candidate.logits(seen)
                logp = torch.log_softmax(logits, -1)
            record |= {"bits": bits} | report.compare(seen, logp, dense, own if aligned else None)
            soft = report.softened(dense, candidate.temperature)
            record["nll_soft"] = report.nll(seen, soft)
            record["kl_self_soft"] = (
                report.kl(report.softened(clean_logp[0], candidate.temperature), soft) if aligned else None
            )
            keep.add(record)


def record_of(candidate: Candidate, place: int, kind: str, strength: float, seed: int) -> dict[str, Any]:
    """What a record is of; `key` names it."""
    key = f"{candidate.key}|{place}|{kind}|{strength:g}|{seed}"
    return {"key": key, "window": place, "perturbation": kind, "strength": strength, "seed": seed}


def keys_of(subject: Subject, candidates: list[Candidate], place: int, seeds: list[int]) -> Iterator[str]:
    """The keys of all records of one window."""
    for candidate in candidates:
        yield record_of(candidate, place, "none", 0.0, 0)["key"]
        for seed in seeds:
            for kind, strengths in subject.strengths.items():
                for strength in strengths:
                    yield record_of(candidate, place, kind, strength, seed)["key"]


class Keep:
    """Records by key, kept in a file line by line as they are measured."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.known: dict[str, dict[str, Any]] = {r["key"]: r for r in map(json.loads, lines)}

    def add(self, record: dict[str, Any]) -> None:
        """Take in a record."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.known[record["key"]] = record


def measure(subject: Subject, candidates: list[Candidate], seeds: list[int]) -> list[dict[str, Any]]:
    """All records, measured now or by an earlier run."""
    code = b"".join(Path(module.__file__).read_bytes() for module in (perturb, masked))  # other code, other records
    keep = Keep(subject.work / f"robustness-{subject.window}-{hashlib.sha256(code).hexdigest()[:8]}.jsonl")
    places = range(len(subject.clean))
    wanted = [key for place in places for key in keys_of(subject, candidates, place, seeds)]
    if any(key not in keep.known for key in wanted):
        settled = [subject.given(ids.tolist()) for ids in subject.clean[:SETTLE_WINDOWS]]
        for candidate in candidates:
            candidate.settle(settled)
    for place in places:
        measure_clean(subject, candidates, place, keep)
    clean = [[keep.known[record_of(c, place, "none", 0.0, 0)["key"]] for place in places] for c in candidates]
    for candidate, mine in zip(candidates, clean, strict=True):
        candidate.temperature = TEMPERATURES[report.softening(mine, clean[0])]
    for place in places:
        common.note(f"window {place + 1} of {len(places)}")
        for seed in seeds:
            measure_window(subject, candidates, place, seed, keep)
    records = []
    for c in candidates:
        about = {"artifact": c.artifact, "rule": c.rule, "target": c.bits, "temperature": c.temperature}
        records += [keep.known[key] | about for key in wanted if key.startswith(f"{c.key}|")]
    return records


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(argv)
    try:
        subject = make_subject(options)
        candidates = make_candidates(options, subject)
        seeds = [int(s) for s in options.seeds.split(",")]
        records = measure(subject, candidates, seeds)
    except LowtideError as error:
        print(f"robustness: error: {error}", file=sys.stderr)
        return 2
    label = options.label or Path(subject.model.source.name).stem
    verdicts = report.verdicts(records, TEMPERATURES)
    result = common.report(
        {
            "model": label,
            "text": f"{len(subject.clean)} sampled windows" if options.text is None else Path(options.text).name,
            "windows": len(subject.clean),
            "window": options.window,
            "own_weights": sorted({c.artifact for c in candidates if c.own_weights}),
            "verdict": [report.sentence(v) for v in verdicts if v["perturbation"] == "all"],
            "verdicts": verdicts,
            "rows": [{"model": label} | row for row in report.rows(records)],
        }
    )
    page = report.page(result)
    path = common.save(f"robustness-{label}" + ("-quick" if options.quick else ""), result, page)
    print(json.dumps(result, indent=2) if options.json else f"{page}\n\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
