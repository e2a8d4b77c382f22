"""compress(): from a model to an artifact, group by group."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowtide.arch import group_specs, norm_specs
from lowtide.compress.calibrate import GroupStats
from lowtide.compress.dense import DenseModel
from lowtide.compress.held_out import held_out_kl
from lowtide.compress.pack import WorkFolder, group_curve, pack_group
from lowtide.compress.prune.apply import PruneOptions, prune_model
from lowtide.compress.quantise import QuantisedGroup, QuantOptions, quantise_group
from lowtide.compress.recoding import AIMS, FEEDBACK_VERSION, Recoding
from lowtide.compress.search import ROUNDS, Target, Trial, coded_size, first_step, next_step
from lowtide.compress.sources import Source, open_source
from lowtide.compress.steps import StepOptions, code_steps
from lowtide.compress.text import sampled_windows, windows_of_file
from lowtide.compress.thresholds import DEFAULT_POLICIES, NORM, threshold_tables
from lowtide.compress.walk import Walk
from lowtide.errors import LowtideError
from lowtide.format.groups import GroupTensors
from lowtide.format.manifest import CODINGS
from lowtide.format.writer import ArtifactWriter
from lowtide.rules import parse_policy

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`; stages: sample, forward, quantise, feedback, measure, write, entropy."""
WORK_VERSION = 2
"""Raised when groups finished by an older version of this code must not be reused."""
STATIC_WINDOWS, HELD_OUT = 24, 4
"""Windows of a text file for static coding, and how many of them are held out to measure KL."""
FEEDBACK_WINDOWS = 32
"""Windows of a text file that feedback looks at; sampled text and `calibration_tokens` it takes as they are."""
GENTLE = 0.25
"""Part of the usual first step that is taken where pruning alone is asked for."""


def compress(
    model: str | Path | Source,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    bits_max: int | None = None,
    size_mb: float | None = None,
    kl: float | None = None,
    step: float | None = None,
    prune: PruneOptions | None = None,
    coding: str = "entropy",
    seed: int = 0,
    force: bool = False,
    policies: Sequence[str] = DEFAULT_POLICIES,
    feedback: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress a model into an artifact.

    Without `size_mb`, `kl`, `step` and `prune` the code is made for dynamic reading (compress/quantise.py); with one of
    them it is made to be small (compress/steps.py), density and step chosen together.

    Args:
        model: Hugging Face folder, hub id, `.gguf` file or `demo:smollm2`; or an opened model.
        out: the artifact's folder, made here; finished groups wait in `OUT.partial` and an interrupted run with the
            same options goes on from there.
        calibration: a UTF-8 text file; by default the model writes its own calibration text.
        calibration_tokens: how much of that file to use, spread evenly over it; refused if it holds less.
        bits_max: bits per weight stored at most, 2, 4, 6 or 8; by default 6, or 8 if made to be small.
        size_mb: size of the artifact in megabytes (10^6 bytes), all files counted.
        kl: KL to the dense model in nats per token, on text held out of the calibration text.
        step: the quantisation step that sizes and KLs are reached by, for runs that must not search.
        prune: prune the decoder's layers first, what is pruned staying zero; alone it asks for a step of little effect.
        coding: of the file, `entropy` or `packed`.
        seed: of the sampled text and of the Fisher labels.
        force: replace OUT if it is there.
        policies: mask rules (`rule` or `rule:levels`) to store thresholds for; the first is the default at run time.
        feedback: `low` or `even`: choose digits made for dynamic reading again so that errors cancel
            (compress/recoding.py). Codes that are made to be small have a feedback of their own.
        progress: called with (stage, done, total).

    Returns:
        Figures of the result: bits_max, weights, file_bytes, budgets, calibration_tokens, seconds, ...; made to be
        small also step, held_out_kl and trials.

    Raises:
        LowtideError: bad input, OUT exists, disk full; nothing half-written is left but the work folder.
    """
    began = time.monotonic()
    small = not (size_mb is kl is step is prune is None)
    bits = (8 if small else 6) if bits_max is None else bits_max
    if bits not in (2, 4, 6, 8):
        raise LowtideError(f"--bits-max {bits}: must be 2, 4, 6 or 8")
    if coding not in CODINGS:
        raise LowtideError(f"--coding {coding}: must be one of {', '.join(CODINGS)}")
    wanted = Target(None if size_mb is None else size_mb * 1e6, kl, step) if small else None
    target = Path(out)
    if (target.exists() or target.is_symlink()) and not force:
        raise LowtideError(f"{target}: exists already; choose another folder or give --force")
    texts = _policies(policies, bits // 2)
    if feedback is not None and feedback not in AIMS:
        raise LowtideError(f"--feedback {feedback}: must be one of {', '.join(AIMS)}")
    if feedback is not None and small:
        raise LowtideError("--feedback: is for codes to be read dynamically; those made to be small have their own")
    if calibration_tokens is not None and calibration is None:
        raise LowtideError("--calibration-tokens: needs --calibration, the text to take them from")
    source = open_source(model) if isinstance(model, (str, Path)) else model
    files = source.tokenizer_files()
    try:
        job = _Job(source, bits // 2, seed, progress or (lambda *_: None), wanted, prune, feedback)
        job.prepare(target, Path(calibration) if calibration else None, tokens=calibration_tokens)
        job.prune()
        found = job.quantise() if wanted is None else job.search(sum(map(len, files.values())))
        figures = job.write(target, files, texts, force, coding) | found
    except OSError as error:
        raise LowtideError(f"{error.filename or target}: {error.strerror or error}") from None
    job.root.remove()
    return figures | {"seconds": round(time.monotonic() - began, 1)}


def _policies(policies: Sequence[str], slices: int) -> list[str]:
    """Policies as the manifest names them; LowtideError for none, one given twice, or one that must be learned."""
    parsed = [parse_policy(p, slices) for p in policies]
    texts = [p.text for p in parsed]
    if not texts or len(set(texts)) != len(texts):
        raise LowtideError("policies: give one or more, each once")
    if any(p.rule.name == "ipn" for p in parsed):
        raise LowtideError("policy ipn: is learned, not calibrated; compress first, then `lowtide learn ipn`")
    return texts


def compress_curve(
    model: str | Path | Source,
    outs: Mapping[float, str | Path],
    *,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    seed: int = 0,
    policies: Sequence[str] = DEFAULT_POLICIES,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Several artifacts of one model in one walk: step -> folder. Calibration, most of the work, is shared.

    Arguments and figures are those of `compress` with `step`; folders that exist are refused.
    """
    for out in outs.values():
        if Path(out).exists():
            raise LowtideError(f"{out}: exists already; choose another folder")
    source = open_source(model) if isinstance(model, (str, Path)) else model
    texts = _policies(policies, 4)
    job = _Job(source, 4, seed, progress or (lambda *_: None), Target(step=min(outs)), None)
    first = Path(next(iter(outs.values())))
    job.prepare(
        first.with_name(first.name + ".curve"),
        Path(calibration) if calibration else None,
        list(outs),
        calibration_tokens,
    )
    works = {step: WorkFolder(job.root.path / f"step-{step:g}", {"step": step}) for step in outs}

    def visit(name: str, weight: torch.Tensor, bias: torch.Tensor | None, stats: GroupStats) -> None:
        for step, work in works.items():
            job.choose(step, work)
            job.code(name, weight, bias, stats)

    Walk(job.model, job.ids, seed, True, job.progress).run(job.root, visit)
    figures = []
    for step, work in works.items():
        job.choose(step, work)
        figures.append(job.write(Path(outs[step]), source.tokenizer_files(), texts, False, "entropy"))
    job.root.remove()
    return figures


@dataclass
class _Job:
    """One compression under way."""

    source: Source
    slices: int
    seed: int
    progress: Progress
    target: Target | None
    options: PruneOptions | None
    feedback: str | None = None

    def __post_init__(self) -> None:
        self.config = self.source.config
        self.model = self.dense = DenseModel(self.source)
        self.specs = {spec.name: spec for spec in group_specs(self.config)}
        self.weights = sum(spec.weights for spec in self.specs.values())
        self.model_id = self.source.fingerprint()
        self.static = StepOptions(first_step(self.weights), self.slices)
        self.pruned: dict[str, Any] | None = None
        self.recoded: WorkFolder | None = None

    def prepare(
        self, target: Path, calibration: Path | None, steps: Sequence[float] = (), tokens: int | None = None
    ) -> None:
        """Open the work folder and choose the calibration tokens. steps: of a curve."""
        # A text that is refused is refused before anything is written.
        windows = None if self.target is None else STATIC_WINDOWS
        given = None if calibration is None else windows_of_file(self.source, calibration, windows, tokens)
        text_hash = None if calibration is None else hashlib.sha256(_read(calibration)).hexdigest()
        key = {"version": WORK_VERSION, "model": self.model_id, "text": text_hash, "seed": self.seed}
        key["tokens"] = tokens
        key |= asdict(QuantOptions(slices=self.slices)) if self.target is None else asdict(self.target)
        key |= {"slices": self.slices, "prune": None if self.options is None else asdict(self.options)}
        if steps:
            key["steps"] = sorted(steps)
        self.root = self.work = WorkFolder(target.with_name(target.name + ".partial"), key)
        self.calibration = "sampled" if calibration is None else calibration.name
        known = self.work.load_arrays("calibration")
        if known is not None:
            ids = torch.from_numpy(known["ids"])
        elif given is not None:
            ids = given
        else:
            ids = sampled_windows(self.model, self.seed, lambda done, total: self.progress("sample", done, total))
        if known is None:
            self.work.save_arrays("calibration", {"ids": ids.numpy()})
        self.feedback_ids = ids
        if self.feedback and calibration is not None and tokens is None:
            self.feedback_ids = windows_of_file(self.source, calibration, FEEDBACK_WINDOWS)
        held = 0 if self.target is None else min(HELD_OUT, len(ids) // 4)
        self.ids, self.held_out = ids[: len(ids) - held], ids[len(ids) - held :]

    def prune(self) -> None:
        """Replace the model by a pruned one, if that is wanted. The dense one stays the reference."""
        if self.options is None:
            return
        source, report = prune_model(
            self.source, self.ids, self.options, work=self.root.path / "prune", progress=self.progress
        )
        self.model = DenseModel(source)
        self.pruned = {key: report[key] for key in ("rule", "sparsity", "structure", "allocation", "density")}

    def quantise(self) -> dict[str, Any]:
        """Code every group for dynamic reading."""
        Walk(self.model, self.ids, self.seed, False, self.progress).run(self.work, self.code)
        if self.feedback:
            self._feed_back()
        return {}

    def _feed_back(self) -> None:
        """Choose the decoder's digits again; from now on the work folder of recoded groups comes first."""
        curves = [self.work.load_curve(spec) for spec in self.specs.values() if spec.has_thresholds]
        grid, tables = threshold_tables(curves[:-1], curves[-1], [NORM])
        table = self.work.load_group(self.specs["head" if self.config.tied else "embed"], self.slices)
        assert self.feedback is not None
        about = {"version": FEEDBACK_VERSION, "aim": self.feedback, "windows": len(self.feedback_ids)}
        self.recoded = WorkFolder(self.root.path / "feedback", about)
        Recoding(
            self.model,
            self.feedback_ids,
            self.feedback,
            grid,
            {name: rows[0] for name, rows in tables.items()},
            lambda name: self.work.load_group(self.specs[name], self.slices),
            lambda done, total: self.progress("feedback", done, total),
        ).run(self.recoded, torch.from_numpy(table.lookup()))

    def search(self, other: int) -> dict[str, Any]:
        """Walk with one step after another until the target is met; the last walk's groups are the result.

        other: bytes of the artifact's files besides the tensors.
        """
        assert self.target is not None
        walk = Walk(self.model, self.ids, self.seed, True, self.progress)
        trials: list[Trial] = []
        step = self.target.step or first_step(self.weights)
        if self.target.free:
            step *= GENTLE
        while True:
            self.choose(step, WorkFolder(self.root.path / f"walk-{len(trials)}", {"step": step}))
            walk.run(self.work, self.code)
            trials.append(self._measure(other))
            if self.target.fits(trials[-1].size, trials[-1].kl):
                break
            if len(trials) == ROUNDS:
                self._check_end(trials)
                break
            self.work.remove()
            step = next_step(self.target, trials, self.weights)
        last = trials[-1]
        kl = None if last.kl != last.kl else last.kl
        return {"step": last.step, "held_out_kl": kl, "trials": [asdict(t) for t in trials]}

    def _check_end(self, trials: list[Trial]) -> None:
        """The last walk may miss the target a little, but never go beyond it."""
        last, target = trials[-1], self.target
        assert target is not None
        if (target.size is not None and last.size > target.size) or (target.kl is not None and last.kl > target.kl):
            found = ", ".join(f"step {t.step:.3g}: {t.size / 1e6:.2f} MB, KL {t.kl:.4g}" for t in trials)
            raise LowtideError(f"the target is not reached in {len(trials)} walks ({found}); ask for another")

    def _measure(self, other: int) -> Trial:
        def load(name: str) -> GroupTensors:
            return self.work.load_group(self.specs[name], self.slices, zero=True)

        self.progress("measure", 0, 1)
        size = coded_size(load, self.config, other)
        kl = held_out_kl(self.dense, load, self.held_out) if len(self.held_out) else float("nan")
        if kl != kl and self.target is not None and self.target.kl is not None:
            raise LowtideError("--kl: the calibration text is too short to hold some of it out; give a longer one")
        self.dense.release()
        self.progress("measure", 1, 1)
        return Trial(self.static.step, size, kl)

    def choose(self, step: float, work: WorkFolder) -> None:
        """Code with this step from now on, into this folder."""
        self.static, self.work = replace(self.static, step=step), work

    def code(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, stats: GroupStats) -> None:
        """Code one group and keep it in the work folder."""
        spec = self.specs[name]
        coded: QuantisedGroup
        if self.target is None:
            coded = quantise_group(weight, bias, stats, QuantOptions(slices=self.slices))
        elif self.work.has(name):
            return
        else:
            keep = weight != 0 if self.options is not None and spec.is_body else None
            coded = code_steps(weight, bias, stats, self.static, keep)
        group = pack_group(spec, coded, self.slices, zero=self.target is not None)
        self.work.save_group(group, group_curve(group, coded, stats) if spec.has_thresholds else None)

    def write(
        self, target: Path, files: dict[str, bytes], policies: list[str], force: bool, coding: str
    ) -> dict[str, Any]:
        """Find the thresholds and write the artifact."""
        curves = [self.work.load_curve(spec) for spec in self.specs.values() if spec.has_thresholds]
        budgets, thresholds = threshold_tables(curves[:-1], curves[-1], policies)
        stats: dict[str, Any] = {
            "source": self.source.name,
            "calibration": self.calibration,
            "calibration_tokens": self.ids.numel(),
            "seed": self.seed,
            "weights": self.weights,
            "body_weights": sum(c.weights for c in curves[:-1]),
        }
        if self.target is not None:
            stats |= {"step": self.static.step, "pruned": self.pruned}
        elif self.recoded is not None:
            stats |= {"feedback": self.feedback, "feedback_tokens": self.feedback_ids.numel()}
        zero = self.target is not None
        with ArtifactWriter(target, force=force) as writer:
            for done, spec in enumerate(self.specs.values()):
                folder = self.recoded if self.recoded is not None and self.recoded.has(spec.name) else self.work
                group = folder.load_group(spec, self.slices, zero)
                if spec.has_thresholds:
                    group.thresholds = thresholds[spec.name]
                writer.add_group(group)
                self.progress("write", done + 1, len(self.specs))
            for name, _ in norm_specs(self.config):
                writer.add_tensor(name, self.source.tensor(name).numpy())
            for name, data in files.items():
                writer.add_file(name, _dense_json(data) if name.endswith(".json") else data)
            manifest = writer.finish(
                config=self.config,
                slices=self.slices,
                budgets=budgets,
                policies=policies,
                model_id=self.model_id,
                stats=stats,
                zero=zero,
                coding=coding,
                report=lambda done, total: self.progress("entropy", done, total),
            )
        size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
        figures = {"out": os.fspath(target), "bits_max": 2 * self.slices, "budgets": budgets, "policies": policies}
        rate = {"file_bytes": size, "file_bits_per_weight": round(8 * size / self.weights, 3), "coding": coding}
        return manifest.stats | figures | rate


def _dense_json(data: bytes) -> bytes:
    """The same JSON without the spaces between its parts, which may be more than half of a tokenizer's file."""
    try:
        return json.dumps(json.loads(data), ensure_ascii=False, separators=(",", ":")).encode()
    except (ValueError, UnicodeError):
        return data


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise LowtideError(f"{file}: cannot be read as calibration text ({error.strerror})") from None
