"""A whole model pruned once by a network's importances: one threshold over all layers, then the updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from lowtide.compress.dense import DenseModel
from lowtide.compress.prune.base import LayerProblem
from lowtide.compress.prune.masks import threshold_mask
from lowtide.errors import LowtideError
from lowtide.learn.importance import ImportanceNetwork, score_with
from lowtide.learn.restore import Metric, output_metrics, restore

UPDATES = ("none", "refit", "gradual")


def scores_of(network: ImportanceNetwork, problems: Iterable[list[LayerProblem]]) -> dict[str, torch.Tensor]:
    """Layer name -> importances f32 [out, in], of all blocks' problems."""
    return {p.name: score_with(network, p) for block in problems for p in block}


def prune_learned(
    model: DenseModel,
    ids: torch.Tensor,
    scores: dict[str, torch.Tensor],
    sparsity: float,
    updates: str = "gradual",
    metrics: dict[str, Metric] | None = None,
    seed: int = 0,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, torch.Tensor]:
    """Prune every layer of the body, unstructured; layer name -> f32 [out, in].

    Args:
        ids: calibration text, i64 [windows, tokens].
        scores: layer name -> importances on one scale, from `scores_of`.
        sparsity: share of all these weights that go, in [0, 1).
        updates: `none`: the weights that stay keep their values; `refit`: they take their best values for the mask;
            `gradual`: the scores say how many weights each layer keeps, which are removed in steps with refits between.
        metrics: from `restore.output_metrics`, if made before; they do not depend on the sparsity.
        seed: of the labels drawn for the metrics.
        report: called with (stage, done, total); stages: metric, update.

    Raises:
        LowtideError: a sparsity outside [0, 1), an unknown kind of updates, statistics that are not finite.
    """
    if updates not in UPDATES:
        raise LowtideError(f"--updates {updates}: known are {', '.join(UPDATES)}")
    masks = dict(zip(scores, threshold_mask(list(scores.values()), sparsity), strict=True))
    if updates == "none":
        return {name: model.source.tensor(f"{name}.weight") * mask for name, mask in masks.items()}
    metrics = metrics or output_metrics(model, ids, seed, report)
    return restore(model, ids, masks, metrics, report, scores=scores if updates == "gradual" else None)
