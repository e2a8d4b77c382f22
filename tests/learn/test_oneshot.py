"""A whole model pruned by importances: exact counts, one threshold, and updates that help."""

from __future__ import annotations

import pytest
import torch

from lowtide.compress.prune.problems import layer_problems
from lowtide.errors import LowtideError
from lowtide.learn.importance import ImportanceNetwork
from lowtide.learn.oneshot import prune_learned, scores_of
from lowtide.learn.restore import output_metrics
from lowtide.learn.train_importance import kl_to_dense, run_block


def kl(small, weights):
    task = small.task()
    x = task.states[0]
    for index, block in enumerate(task.layers):
        parts = [weights[f.name] for f in block]
        x = torch.cat([run_block(task, index, parts, row[None]) for row in x])
    return float(kl_to_dense(task, x, torch.arange(len(x))))


def test_updates_help_and_counts_are_exact(small):
    scores = scores_of(ImportanceNetwork(), layer_problems(small.model, small.ids, 0))
    metrics = output_metrics(small.model, small.ids, 0)
    found = {}
    for updates in ("none", "refit", "gradual"):
        weights = prune_learned(small.model, small.ids, scores, 0.6, updates, metrics)
        total = sum(w.numel() for w in weights.values())
        assert sum(int((w == 0).sum()) for w in weights.values()) == round(0.6 * total)
        found[updates] = kl(small, weights)
        sparsities = {n: float((w == 0).float().mean()) for n, w in weights.items()}
        assert max(sparsities.values()) - min(sparsities.values()) > 0.05  # one threshold, not one share
    assert found["refit"] < 0.8 * found["none"]
    assert found["gradual"] < found["refit"]


def test_bad_options_are_refused(small):
    scores = {"model.layers.0.self_attn.q_proj": torch.ones(2, 2)}
    with pytest.raises(LowtideError, match="--sparsity 1: must be"):
        prune_learned(small.model, small.ids, scores, 1.0)
    with pytest.raises(LowtideError, match="--updates admm: known are none, refit, gradual"):
        prune_learned(small.model, small.ids, scores, 0.5, "admm")
