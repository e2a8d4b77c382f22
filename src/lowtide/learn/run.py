"""`lowtide learn importance`: from models and a text to a trained network in a file."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lowtide.compress.dense import DenseModel
from lowtide.compress.pack import WorkFolder
from lowtide.compress.prune.problems import ProblemStore
from lowtide.compress.sources import open_source
from lowtide.compress.text import encode_text, sampled_windows
from lowtide.errors import LowtideError
from lowtide.eval.text import read_text
from lowtide.learn import checkpoint
from lowtide.learn.importance import SHIPPED, ImportanceNetwork
from lowtide.learn.train_importance import Report, Task, TrainOptions, train

WINDOW = 256
WINDOWS = 32
"""Windows of text that a model is trained on, at most."""


def learn_importance(
    models: Sequence[str | Path],
    out: str | Path,
    options: TrainOptions,
    text: str | Path | None = None,
    start: str | Path | None = None,
    resume: bool = True,
    force: bool = False,
    report: Report = lambda *_: None,
) -> dict[str, Any]:
    """Train an importance network and write it to `out`.

    Args:
        models: Hugging Face folders, hub ids, `.gguf` files; more than one is trained on in turn.
        out: file to write (`.safetensors`). The checkpoint waits in `OUT.partial`.
        options: how to train.
        text: UTF-8 file; by default every model writes its own text.
        start: a network to begin with; by default the one that comes with the package, or Wanda times Fisher if
            there is none.
        resume: go on from `OUT.partial` if it is of the same run; otherwise it is thrown away.
        force: replace `out`.
        report: called with (stage, done, total); stages: sample, forward, calibrate, warm, train.

    Returns:
        kl_before, kl_after (held out, geometric mean over sparsities 0.5, 0.6, 0.7), best_step, steps, diverged, ...

    Raises:
        LowtideError: bad input, a text of fewer than two windows, `out` exists.
    """
    began = time.monotonic()
    target = Path(out)
    if (target.exists() or target.is_symlink()) and not force:
        raise LowtideError(f"{target}: exists already; choose another file or give --force")
    if target.is_dir() or not target.parent.is_dir():
        raise LowtideError(f"{target}: must name a file in a folder that exists")
    if not models:
        raise LowtideError("give a model to train on")
    opened = [DenseModel(open_source(m)) for m in models]
    given = [None if text is None else windows_of_text(m, Path(text)) for m in opened]
    network = _start(start)
    prints = [m.source.fingerprint() for m in opened]
    run = {"models": prints, "text": _digest(given), "options": asdict(options), "start": _digest_of(network)}
    key = json.dumps(run, sort_keys=True)
    work = WorkFolder(target.with_name(target.name + ".partial"), {"run": key if resume else time.time()})
    tasks = []
    for index, (model, ids) in enumerate(zip(opened, given, strict=True)):
        chosen = sampled_windows(model, options.seed, lambda d, n: report("sample", d, n)) if ids is None else ids
        problems = ProblemStore(work.path / f"statistics-{index}", model, chosen, options.seed, report)
        tasks.append(Task.of(model, chosen, problems))
    outcome = train(network, tasks, options, work.path, report, key)
    about: dict[str, Any] = {
        "models": [m.source.name for m in opened],
        "text": "sampled" if text is None else Path(text).name,
        "tokens": sum(t.ids.numel() for t in tasks),
        "own": options.own,
        "seed": options.seed,
    }
    about |= asdict(outcome)
    if not all(math.isfinite(v) for v in (outcome.kl_before, outcome.kl_after)):
        raise LowtideError("the held-out KL is not finite: the model or its text is damaged")
    checkpoint.save(target, network, about)
    work.remove()
    return about | {"out": str(target), "seconds": round(time.monotonic() - began, 1)}


def windows_of_text(model: DenseModel, file: Path) -> torch.Tensor:
    """Windows spread evenly over a text, i64 [at most WINDOWS, WINDOW or the model's context].

    Raises:
        LowtideError: unreadable, not UTF-8, fewer than two windows.
    """
    ids = encode_text(model.source, read_text(file))
    window = min(WINDOW, model.config.max_position)
    available = len(ids) // window
    if available < 2:
        raise LowtideError(f"{file}: {len(ids)} tokens; training needs two windows of {window}: give a longer text")
    count = min(WINDOWS, available)
    starts = [(available * i // count) * window for i in range(count)]
    return torch.stack([ids[s : s + window] for s in starts])


def _start(start: str | Path | None) -> ImportanceNetwork:
    if start is not None:
        return checkpoint.load(start)[0]
    return checkpoint.load(SHIPPED)[0] if SHIPPED.exists() else ImportanceNetwork()


def _digest(given: list[torch.Tensor | None]) -> str:
    parts = [b"sampled" if ids is None else ids.numpy().tobytes() for ids in given]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _digest_of(network: ImportanceNetwork) -> str:
    tensors = checkpoint.tensors_of(network)
    return hashlib.sha256(b"".join(tensors[n].numpy().tobytes() for n in sorted(tensors))).hexdigest()
