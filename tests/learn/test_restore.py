"""Updates under an output metric: the least-squares solution, and that the metric matters."""

from __future__ import annotations

import pytest
import torch

from lowtide.compress.prune.base import LayerProblem
from lowtide.compress.prune.problems import layer_problems
from lowtide.errors import LowtideError
from lowtide.learn import restore as module
from lowtide.learn.importance import ImportanceNetwork
from lowtide.learn.relax import threshold
from lowtide.learn.restore import block_sizes, output_metrics, refit, restore, solve
from lowtide.learn.train_importance import all_logs, kl_to_dense, run_block

OUT, IN = 7, 11


def positive(n: int, seed: int) -> torch.Tensor:
    a = torch.randn(n, 3 * n, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / (3 * n) + 0.05 * torch.eye(n)


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(OUT, IN, generator=g), torch.rand(OUT, IN, generator=g) > 0.5


def error(w: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor, metric: torch.Tensor) -> float:
    return float(torch.trace(metric @ (w - target) @ hessian @ (w - target).T))


def test_it_is_the_exact_minimum_on_the_mask(monkeypatch):
    monkeypatch.setattr(module, "TOLERANCE", 1e-7)
    target, mask = case()
    hessian, metric = positive(IN, 1), positive(OUT, 2)
    w = solve(target, hessian, [metric], mask, target, "layer", iterations=200)
    on = mask.reshape(-1)
    full = torch.kron(metric, hessian)[on][:, on].double()
    right = (metric @ target @ hessian).reshape(-1)[on].double()
    expected = torch.zeros(OUT * IN).double()
    expected[on] = torch.linalg.solve(full, right)
    assert torch.allclose(w.reshape(-1).double(), expected, atol=1e-3)
    assert not w[~mask].any()


def test_the_metric_lets_rows_help_each_other():
    target, mask = case()
    hessian, metric = positive(IN, 1), positive(OUT, 2) + 1.0  # outputs that act alike
    alone = solve(target, hessian, [torch.eye(OUT)], mask, target, "layer")
    together = solve(target, hessian, [metric], mask, target, "layer")
    assert error(together, target, hessian, metric) < 0.9 * error(alone, target, hessian, metric)
    assert error(alone, target, hessian, torch.eye(OUT)) < error(together, target, hessian, torch.eye(OUT))


def test_blocks_of_the_metric_are_those_of_a_block_diagonal_one():
    target, mask = case()
    hessian, parts = positive(IN, 1), [positive(4, 2), positive(3, 3)]
    w = solve(target, hessian, parts, mask, target, "layer")
    assert torch.allclose(w, solve(target, hessian, [torch.block_diag(*parts)], mask, target, "layer"), atol=1e-4)


def test_a_full_mask_gives_the_target_back():
    target, _ = case()
    full = torch.ones(OUT, IN, dtype=torch.bool)
    w = solve(target, positive(IN, 1), [positive(OUT, 2)], full, torch.zeros(OUT, IN), "layer")
    assert torch.allclose(w, target, atol=1e-2)


def test_statistics_that_are_not_finite_are_refused():
    target, mask = case()
    hessian = positive(IN, 1)
    hessian[0, 0] = float("nan")
    with pytest.raises(LowtideError, match="layer: the weight update diverged"):
        solve(target, hessian, [positive(OUT, 2)], mask, target, "layer")


def test_metric_blocks_are_few_and_even():
    assert block_sizes(100) == [100]
    assert block_sizes(2049) == [1025, 1024]
    assert sum(block_sizes(8960)) == 8960 and max(block_sizes(8960)) <= 2048


def test_restored_weights_are_closer_to_the_dense_model_than_masked_ones(small):
    task, network = small.task(), ImportanceNetwork()
    logs = all_logs(network, task)
    theta = threshold([t for block in logs for t in block], 0.5, exact=True)
    names = [f.name for block in task.layers for f in block]
    masks = dict(zip(names, [t > theta for block in logs for t in block], strict=True))
    metrics = output_metrics(small.model, small.ids, 0)
    assert {n: sum(len(b) for b in m) for n, m in metrics.items()} == {n: len(m) for n, m in masks.items()}
    fisher = {p.name: p.fisher for block in layer_problems(small.model, small.ids, 0) for p in block}
    for name, metric in metrics.items():  # its diagonal is the Fisher information of the same labels
        assert torch.allclose(torch.cat([b.diagonal() for b in metric]), fisher[name], rtol=1e-3)
    weights = restore(small.model, small.ids, masks, metrics)
    assert all(not weights[n][~masks[n]].any() for n in names)

    def kl(parts: list[list[torch.Tensor]]) -> float:
        x = task.states[0]
        for index, block in enumerate(parts):
            x = torch.cat([run_block(task, index, block, row[None]) for row in x])
        return float(kl_to_dense(task, x, torch.arange(len(x))))

    masked = [[w * masks[f.name] for w, f in zip(task.weights(i), b, strict=True)] for i, b in enumerate(task.layers)]
    assert kl([[weights[f.name] for f in block] for block in task.layers]) < 0.8 * kl(masked)


def test_gradual_removal_keeps_the_count_and_lowers_the_error():
    g = torch.Generator().manual_seed(3)
    out, inn = 40, 60
    shared = torch.randn(inn, 4, generator=g) @ torch.randn(4, inn, generator=g)
    mix = torch.randn(inn, inn, generator=g) / inn**0.5 + shared
    hessian, metric = mix @ mix.T, positive(out, 4)
    weight = torch.randn(out, inn, generator=g)
    one = torch.ones(inn)
    problem = LayerProblem("layer", "o_proj", 0.0, weight, one, one, metric.diagonal(), hessian, hessian)
    score = weight.square() * hessian.diagonal() * metric.diagonal()[:, None]
    mask = score > score.flatten().median()
    once, gradual = refit(problem, mask, [metric]), refit(problem, mask, [metric], score)
    assert int((gradual != 0).sum()) == int(mask.sum()) == int((once != 0).sum())
    assert error(gradual, weight, hessian, metric) < 0.99 * error(once, weight, hessian, metric)
    assert not torch.equal(gradual != 0, mask)
