"""`evaluate`: KL divergence to the dense model, perplexity of both, and every bit read on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lowtide.arch import group_specs
from lowtide.compress.dense import DenseModel
from lowtide.compress.same_model import check_same_model
from lowtide.compress.sources import Source, open_source
from lowtide.errors import LowtideError
from lowtide.eval.metrics import F64, Tally, log_softmax
from lowtide.eval.text import I32, TextOrIds, token_windows
from lowtide.format.reader import Artifact, open_artifact
from lowtide.kernels.types import DecodeStats, PolicyParams
from lowtide.runtime.budget import BudgetController, body_side_bits, body_weights, parse_bits, policy_params
from lowtide.runtime.model import load_tokenizer
from lowtide.runtime.multiplier import with_importance

if TYPE_CHECKING:
    from lowtide.runtime.tokenizer import Tokenizer

ENGINES = ("native", "reference")
DEFAULT_BITS = (2.5, 3.0, 3.5)


class DecodeEngine(Protocol):
    """What evaluation needs of an engine."""

    def decode(
        self, token: int, pos: int, policy: PolicyParams, want_logits: bool = True
    ) -> tuple[NDArray[np.float32], DecodeStats]:
        """Logits f32 [V] after one token at position pos, and what was read."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


@dataclass
class _Point:
    """One budget: its controller runs through the whole evaluation, as it does through a long generation."""

    bits: float | None
    controller: BudgetController
    tally: Tally = field(default_factory=Tally)

    def figures(self, all_weights: int) -> dict[str, Any]:
        """The point's entry in the result."""
        return {
            "bits": "dense" if self.bits is None else self.bits,
            "bits_read_body": self.controller.mean_bits,
            "bits_read_total": self.tally.all_bits / (self.tally.tokens * all_weights),
            "kl": self.tally.mean_kl,
            "ppl": self.tally.perplexity,
        }


def evaluate(
    artifact: str | Path | Artifact,
    reference: str | Path | Source,
    text: TextOrIds,
    windows: int = 4,
    window: int = 512,
    bits: Sequence[float | str | None] = DEFAULT_BITS,
    policy: str | None = None,
    engine: str | DecodeEngine = "native",
    threads: int | None = None,
    isa: str | None = None,
    cache_bits: int = 16,
    bos: bool = False,
    importance_multiplier: float = 0.0,
    head: tuple[float, float] = (0.0, 0.0),
    progress: bool = True,
) -> dict[str, Any]:
    """Measure an artifact against the model it was made from.

    Every token of every window goes through the engine's decode under the masks of its budget, so what is measured
    is what runs. Windows are non-overlapping, from the start of the text, each with an empty context.

    Args:
        artifact: folder made by `lowtide compress`, or an open artifact.
        reference: the model it was made from, in any form `lowtide compress` reads.
        text: a text file's path, or token ids [tokens] or [windows, tokens].
        windows: windows at most; fewer if the text is shorter.
        window: tokens of each window.
        bits: budgets in bits read per weight of the decoder's linear layers; None or "dense" reads everything.
        policy: mask rule that the artifact stores, e.g. `channel-norm` or `topk:0,4`; its first by default.
        engine: "native", "reference" (numpy, slow), or an engine.
        threads, isa: of the native engine, see `lowtide.load`.
        cache_bits: bits of cached keys and values, 16 or 8.
        bos: begin every window with the model's begin-of-sequence token.
        importance_multiplier: power of the columns' importance that multiplies the weights (runtime/multiplier.py).
        head: how the output head is read, (0, 0) once, else twice: see `lowtide.runtime.budget.parse_head`.
        progress: show a progress bar on stderr.

    Returns:
        {"windows", "window", "dense_ppl", "points": [{"bits", "bits_read_body", "bits_read_total", "kl", "ppl"}],
        "file_bytes", "file_bits_per_weight"}. KL is the mean over all tokens of KL(dense || ours) in nats, perplexity
        that of next tokens within windows, bits are per weight and token, weights of the whole model for the last two.

    Raises:
        LowtideError: the reference is another model or tokenizer, the text is shorter than one window, a budget or
            policy the artifact does not store, or anything that opening the two refuses.
    """
    opened = open_artifact(artifact) if isinstance(artifact, (str, Path)) else artifact
    opened = with_importance(opened, importance_multiplier)
    source = open_source(reference) if isinstance(reference, (str, Path)) else reference
    check_same_model(opened, source)
    points = [_point(opened, policy, b, head) for b in bits]
    if not points:
        raise LowtideError("--bits: give at least one budget")
    if window > opened.config.max_position:
        raise LowtideError(f"--window {window}: the model's context holds {opened.config.max_position} tokens")
    ids = _windows(opened, source, text, windows, window, bos)
    dense = Tally()
    running = engine if not isinstance(engine, str) else _open_engine(engine, opened, threads, isa, window, cache_bits)
    try:
        _run(running, DenseModel(source), ids, points, dense, progress)
    finally:
        if running is not engine:
            running.close()
    weights = all_weights(opened)
    size = opened.stored_bytes()
    return {
        "windows": len(ids),
        "window": window,
        "dense_ppl": dense.perplexity,
        "points": [p.figures(weights) for p in points],
        "file_bytes": size,
        "file_bits_per_weight": 8 * size / weights,
    }


def all_weights(artifact: Artifact) -> int:
    """Weights of all matrices, a tied embedding counted once."""
    return sum(spec.weights for spec in group_specs(artifact.config))


def _point(
    artifact: Artifact, policy: str | None, bits: float | str | None, head: tuple[float, float] = (0.0, 0.0)
) -> _Point:
    target = parse_bits(bits) if isinstance(bits, str) else bits
    params = policy_params(artifact, policy, target, head)
    return _Point(
        target, BudgetController(params, target, body_weights(artifact), body_side_bits(artifact, params.rule))
    )


def _windows(artifact: Artifact, source: Source, text: TextOrIds, windows: int, window: int, bos: bool) -> I32:
    start = artifact.config.bos_token_id
    if bos and start is None:
        raise LowtideError("--bos: the model has no begin-of-sequence token")

    def encode(content: str) -> list[int]:
        ids = load_tokenizer(artifact).encode(content, special=False)
        if _source_tokenizer(source).encode(content, special=False) != ids:
            raise LowtideError(
                f"{source.name}: its tokenizer cuts the text differently from the artifact's; compress it again"
            )
        return ids

    return token_windows(text, encode, windows, window, artifact.config.vocab_size, start if bos else None)


def _source_tokenizer(source: Source) -> Tokenizer:
    from lowtide.runtime.tokenizer import Tokenizer

    files = source.tokenizer_files()
    if "tokenizer.json" not in files:
        raise LowtideError(f"{source.name}: holds no tokenizer; give token ids or a reference with one")
    return Tokenizer(files["tokenizer.json"])


def _open_engine(
    name: str, artifact: Artifact, threads: int | None, isa: str | None, window: int, cache_bits: int
) -> DecodeEngine:
    if name == "native":
        from lowtide.kernels.native import Engine

        return Engine(artifact, threads=threads, isa=isa, max_context=window, cache_bits=cache_bits)
    if name == "reference":
        from lowtide.kernels.reference import ReferenceEngine

        return ReferenceEngine(artifact, max_context=window, cache_bits=cache_bits)
    raise LowtideError(f"--engine {name}: known are {', '.join(ENGINES)}")


def _run(engine: DecodeEngine, model: DenseModel, ids: I32, points: list[_Point], dense: Tally, progress: bool) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("evaluating", total=ids.size * len(points))
        for row in ids:
            reference = dense_log_probabilities(model, row)
            following = [*row[1:].tolist(), None]
            for logp, target in zip(reference, following, strict=True):
                dense.add(logp, target)
            for point in points:
                for pos, token in enumerate(row.tolist()):
                    _step(engine, point, token, pos, following[pos], reference[pos])
                    bar.advance(task)


def dense_log_probabilities(model: DenseModel, row: I32) -> F64:
    """Log-probabilities f64 [n, V] of the dense model after each token of a window i32 [n]."""
    logits = model.logits(torch.from_numpy(row.astype(np.int64))[None])[0].numpy()
    logp = np.empty(logits.shape, np.float64)
    for i, position in enumerate(logits):  # row by row: the temporaries of a whole window are larger than it
        logp[i] = log_softmax(position)
    return logp


def _step(engine: DecodeEngine, point: _Point, token: int, pos: int, target: int | None, reference: F64) -> None:
    """One token at one budget: decode, compare, account, and let the controller move."""
    logits, stats = engine.decode(token, pos, point.controller.params)
    point.controller.update(stats.body_bits)
    point.tally.add(log_softmax(logits), target, reference)
    point.tally.all_bits += stats.body_bits + stats.head_bits
