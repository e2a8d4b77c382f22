"""What the sections of dynamic.py share: model, artifact, texts, rows that are kept."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from lowtide.compress.dense import DenseModel
from lowtide.compress.same_model import check_same_model
from lowtide.compress.sources import Source, open_source
from lowtide.compress.text import encode_text, windows_of_file
from lowtide.eval.text import token_windows
from lowtide.format.reader import Artifact, open_artifact

EVALUATION_SEED = 20_000
"""Of sampled evaluation text; calibration text is sampled with small seeds."""
Row = dict[str, Any]


@dataclass
class Subject:
    """What is measured.

    Attributes:
        label: of the model, for rows.
        source, dense, artifact: the model, in torch, and compressed.
        ids: i64 [n, window], the windows it is judged on.
        calibration: i64 [n, window], the tokens rules are tuned on.
        work: folder of what was made for these windows.
    """

    label: str
    source: Source
    artifact: Artifact
    ids: torch.Tensor
    calibration: torch.Tensor
    work: Path

    def __post_init__(self) -> None:
        self.dense = DenseModel(self.source)
        manifest = self.artifact.path / "lowtide.json"
        key = hashlib.sha256(manifest.read_bytes() + self.calibration.numpy().tobytes())
        self.kept = self.work / f"rows-{key.hexdigest()[:12]}.jsonl"

    def reference(self, place: int) -> torch.Tensor:
        """The dense model's log-probabilities f32 [window, V] of a window, kept on disk."""
        path = self.work / f"dense-{place}.npy"
        if not path.exists():
            partial = path.with_suffix(".part.npy")
            np.save(partial, torch.log_softmax(self.dense.logits(self.ids[place][None])[0], -1).numpy())
            partial.rename(path)
        return torch.from_numpy(np.load(path))

    def dense_perplexity(self) -> float:
        """Perplexity of the dense model."""
        nll = 0.0
        for place, row in enumerate(self.ids):
            nll -= float(self.reference(place)[:-1].gather(1, row[1:, None]).double().sum())
        return float(np.exp(nll / (len(self.ids) * (self.ids.shape[1] - 1))))

    def once(self, key: str, measure: Callable[[], list[Row]]) -> list[Row]:
        """The rows of that key: those kept by an earlier run, or measured now. Rows of one key are kept together."""
        if self.kept.exists():
            for line in self.kept.read_text().splitlines():
                found: dict[str, Any] = json.loads(line)
                if found["key"] == key:
                    return list(found["rows"])
        rows = measure()
        with open(self.kept, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "rows": rows}) + "\n")
        return rows


def make_subject(options: argparse.Namespace) -> Subject:
    """Opens model and artifact, cuts or samples the texts."""
    source = open_source(options.model)
    artifact = open_artifact(options.artifact)
    check_same_model(artifact, source)
    work = options.work / source.fingerprint()[:16]
    work.mkdir(parents=True, exist_ok=True)
    window = min(options.window, source.config.max_position)
    if options.text is None:
        ids = _sampled(source, work, options.sampled, window, EVALUATION_SEED)
    else:
        vocab = source.config.vocab_size
        cut = token_windows(
            options.text, lambda text: encode_text(source, text).tolist(), options.windows, window, vocab
        )
        ids = torch.from_numpy(cut.astype(np.int64))
    if options.calibration is None:
        calibration = _sampled(source, work, options.calibration_windows, window, options.seed)
    else:
        calibration = windows_of_file(source, Path(options.calibration), options.calibration_windows)
    own = work / f"windows-{digest(ids)}"
    own.mkdir(exist_ok=True)
    label = options.label or Path(source.name).stem
    return Subject(label, source, artifact, ids, calibration, own)


def _sampled(source: Source, work: Path, windows: int, window: int, seed: int) -> torch.Tensor:
    """Text that the model wrote, kept on disk; i64 [windows, window]."""
    path = work / f"sampled-{windows}x{window}-{seed}.npy"
    if not path.exists():
        common.note(f"sampling {windows} windows of {window} tokens, seed {seed}")
        np.save(path, DenseModel(source).sample(windows, window, seed).numpy())
    return torch.from_numpy(np.load(path))


def digest(ids: torch.Tensor) -> str:
    """Short name of a set of windows."""
    return hashlib.sha256(ids.numpy().tobytes() + str(tuple(ids.shape)).encode()).hexdigest()[:12]


def budgets(text: str) -> list[float]:
    """A list of budgets in bits per weight."""
    return [float(part) for part in text.split(",") if part]
