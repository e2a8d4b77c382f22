"""compress(): from a model to an artifact, group by group."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowtide.arch import GroupSpec, group_specs, norm_specs
from lowtide.compress.calibrate import GroupStats, block_pass, head_pass
from lowtide.compress.dense import DenseModel
from lowtide.compress.pack import WorkFolder, group_curve, pack_group
from lowtide.compress.quantise import QuantOptions, quantise_group
from lowtide.compress.sources import Source, open_source
from lowtide.compress.text import sampled_windows, windows_of_file
from lowtide.compress.thresholds import DEFAULT_POLICIES, threshold_tables
from lowtide.errors import LowtideError
from lowtide.format.writer import ArtifactWriter
from lowtide.rules import parse_policy

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`; stages: sample, forward, quantise, write."""
WORK_VERSION = 1
"""Raised when groups finished by an older version of this code must not be reused."""


def compress(
    model: str | Path,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    bits_max: int = 6,
    seed: int = 0,
    force: bool = False,
    policies: Sequence[str] = DEFAULT_POLICIES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress a model into an artifact.

    Args:
        model: Hugging Face folder, hub id, `.gguf` file or `demo:smollm2`.
        out: the artifact's folder, made here; finished groups wait in `OUT.partial` and an interrupted run with the
            same options goes on from there.
        calibration: a UTF-8 text file; by default the model writes its own calibration text.
        bits_max: bits per weight stored, 2, 4, 6 or 8.
        seed: of the sampled text and of the Fisher labels.
        force: replace OUT if it is there.
        policies: mask rules (`rule` or `rule:levels`) to store thresholds for; the first is the default at run time.
        progress: called with (stage, done, total).

    Returns:
        Figures of the result: bits_max, weights, file_bytes, budgets, calibration_tokens, seconds, ...

    Raises:
        LowtideError: bad input, OUT exists, disk full; nothing half-written is left but the work folder.
    """
    began = time.monotonic()
    if bits_max not in (2, 4, 6, 8):
        raise LowtideError(f"--bits-max {bits_max}: must be 2, 4, 6 or 8")
    target = Path(out)
    if (target.exists() or target.is_symlink()) and not force:
        raise LowtideError(f"{target}: exists already; choose another folder or give --force")
    texts = [parse_policy(p, bits_max // 2).text for p in policies]
    if not texts or len(set(texts)) != len(texts):
        raise LowtideError("policies: give one or more, each once")
    source = open_source(model)
    files = source.tokenizer_files()
    try:
        job = _Job(source, bits_max // 2, seed, progress or (lambda *_: None))
        job.prepare(target, Path(calibration) if calibration else None)
        job.quantise()
        figures = job.write(target, files, texts, force)
    except OSError as error:
        raise LowtideError(f"{error.filename or target}: {error.strerror or error}") from None
    job.work.remove()
    return figures | {"seconds": round(time.monotonic() - began, 1)}


@dataclass
class _Job:
    """One compression under way."""

    source: Source
    slices: int
    seed: int
    progress: Progress

    def __post_init__(self) -> None:
        self.config = self.source.config
        self.model = DenseModel(self.source)
        self.options = QuantOptions(slices=self.slices)
        self.specs = {spec.name: spec for spec in group_specs(self.config)}
        self.model_id = self.source.fingerprint()

    def prepare(self, target: Path, calibration: Path | None) -> None:
        """Open the work folder and choose the calibration tokens."""
        # A text that is refused is refused before anything is written.
        given = None if calibration is None else windows_of_file(self.source, calibration)
        text_hash = None if calibration is None else hashlib.sha256(_read(calibration)).hexdigest()
        key = {"version": WORK_VERSION, "model": self.model_id, "text": text_hash, "seed": self.seed}
        self.work = WorkFolder(target.with_name(target.name + ".partial"), key | asdict(self.options))
        self.calibration = "sampled" if calibration is None else calibration.name
        known = self.work.load_arrays("calibration")
        if known is not None:
            self.ids = torch.from_numpy(known["ids"])
            return
        if given is None:
            given = sampled_windows(self.model, self.seed, lambda done, total: self.progress("sample", done, total))
        self.ids = given
        self.work.save_arrays("calibration", {"ids": self.ids.numpy()})

    def quantise(self) -> None:
        """Forward once, then backward from the head to the first block, coding each group on the way."""
        layers = self.config.num_layers
        state = self.work.load_arrays("gradient")
        first = layers if state is None else int(state["next"])
        if first < 0:
            return
        states = self.model.block_inputs(self.ids, lambda done: self.progress("forward", done, layers))
        self.model.release()  # at 150k tokens each of the two tables takes a gigabyte
        self.progress("quantise", layers - first, layers + 1)
        if state is None:
            grad, stats = head_pass(self.model, states[layers], self.seed + 1)
            self._code("head", self.model.head_weight, None, stats)
            if not self.config.tied:
                self.model.release()
                self._code("embed", self.model.embedding, None, None)
            self.model.release()
            self._finish_block(layers, grad)
            first = layers - 1
        else:
            grad = torch.from_numpy(state["grad"])
        for index in range(first, -1, -1):
            block = self.model.block(index)
            grad, found = block_pass(self.model, block, states[index], grad)
            for group, stats in found.items():
                self._code(f"layers.{index}.{group}", block.weights[group], block.biases[group], stats)
            states[index] = torch.empty(0)  # no longer needed
            self._finish_block(index, grad)

    def _finish_block(self, index: int, grad: torch.Tensor) -> None:
        self.work.save_arrays("gradient", {"next": np.array(index - 1), "grad": grad.numpy()})
        self.progress("quantise", self.config.num_layers - index + 1, self.config.num_layers + 1)

    def _code(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, stats: GroupStats | None) -> None:
        spec = self.specs[name]
        coded = quantise_group(weight, bias, stats or _uniform_stats(spec), self.options)
        group = pack_group(spec, coded, self.slices)
        self.work.save_group(group, None if stats is None else group_curve(group, coded, stats))

    def write(self, target: Path, files: dict[str, bytes], policies: list[str], force: bool) -> dict[str, Any]:
        """Find the thresholds and write the artifact."""
        curves = [self.work.load_curve(spec) for spec in self.specs.values() if spec.has_thresholds]
        budgets, thresholds = threshold_tables(curves[:-1], curves[-1], policies)
        weights = sum(spec.weights for spec in self.specs.values())
        stats: dict[str, Any] = {
            "source": self.source.name,
            "calibration": self.calibration,
            "calibration_tokens": self.ids.numel(),
            "seed": self.seed,
            "weights": weights,
            "body_weights": sum(c.weights for c in curves[:-1]),
        }
        with ArtifactWriter(target, force=force) as writer:
            for done, spec in enumerate(self.specs.values()):
                group = self.work.load_group(spec, self.slices)
                if spec.has_thresholds:
                    group.thresholds = thresholds[spec.name]
                writer.add_group(group)
                self.progress("write", done + 1, len(self.specs))
            for name, _ in norm_specs(self.config):
                writer.add_tensor(name, self.source.tensor(name).numpy())
            for name, data in files.items():
                writer.add_file(name, data)
            writer.finish(
                config=self.config,
                slices=self.slices,
                budgets=budgets,
                policies=policies,
                model_id=self.model_id,
                stats=stats,
            )
        size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
        figures = {"out": os.fspath(target), "bits_max": 2 * self.slices, "budgets": budgets, "policies": policies}
        return stats | figures | {"file_bytes": size, "file_bits_per_weight": round(8 * size / weights, 3)}


def _uniform_stats(spec: GroupSpec) -> GroupStats:
    """For a table that is looked up and not multiplied: all rows and columns matter alike."""
    one = torch.ones(spec.in_features, dtype=torch.float64)
    rows = torch.ones(spec.weights // spec.in_features, dtype=torch.float64)
    return GroupStats(torch.zeros_like(one), one, rows, torch.empty(0, spec.in_features))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise LowtideError(f"{file}: cannot be read as calibration text ({error.strerror})") from None
