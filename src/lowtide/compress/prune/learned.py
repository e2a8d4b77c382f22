"""Whole models pruned by an importance network: one threshold over all layers, weights removed step by step.

Between the steps the weights that stay take their best values (lowtide.learn.restore); a weight's score is its
importance times (value now / dense value)^2, so those that have come to stand in for others stay, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowtide.compress.prune.base import LayerProblem
from lowtide.compress.prune.problems import ProblemStore, Progress

if TYPE_CHECKING:
    from lowtide.learn.importance import ImportanceNetwork

START = "start"
"""Names the network before any training: w^2 E[x^2] fisher / 2, the second-order estimate of the loss."""


def network_named(name: str | None) -> ImportanceNetwork:
    """The network of a file, `start`, or by default the one that comes with the package."""
    from lowtide.learn.checkpoint import load  # here: learning imports this package
    from lowtide.learn.importance import ImportanceNetwork, shipped

    if name == START:
        return ImportanceNetwork()
    return shipped() if name is None else load(Path(name))[0]


def gradual_weights(
    store: ProblemStore, ids: torch.Tensor, network: str | None, sparsity: float, seed: int, progress: Progress
) -> dict[str, torch.Tensor]:
    """Layer name -> pruned weights f32 [out, in].

    Args:
        store: calibration of the model on `ids`, i64 [windows, tokens].
        network: a file, or `start`; by default `start`, which measured best with updates (docs/importance.md).
        sparsity: share of all the body's weights that go.
        seed: of the labels drawn for the output metrics.
        progress: stages `metric` and `update`.
    """
    from lowtide.learn.oneshot import prune_learned, scores_of

    scores = scores_of(network_named(network or START), _blocks(store))
    return prune_learned(store.model, ids, scores, sparsity, "gradual", seed=seed, report=progress)


def _blocks(store: ProblemStore) -> Iterator[list[LayerProblem]]:
    for index in range(len(store)):
        yield store.block(index)
