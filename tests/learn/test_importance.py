"""The importance network: what its parameter space holds, and that its scores compare across layers."""

from __future__ import annotations

import pytest
import torch

from lowtide.compress.prune.base import LayerProblem
from lowtide.errors import LowtideError
from lowtide.learn import checkpoint
from lowtide.learn.importance import KINDS, SHIPPED, ImportanceNetwork, features, inverse_diagonal, score, score_with

OUT, IN = 24, 40


def make_problem(kind: str = "up_proj", seed: int = 0, depth: float = 0.5, scale: float = 1.0) -> LayerProblem:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, IN, generator=g) @ torch.randn(IN, IN, generator=g) / IN**0.5 + 0.3
    say = torch.rand(400, 1, generator=g) * 2
    weight = torch.randn(OUT, IN, generator=g) * scale
    fisher = torch.rand(OUT, generator=g) * 3 + 0.1
    return LayerProblem(
        f"model.layers.1.mlp.{kind}",
        kind,
        depth,
        weight,
        x.mean(0),
        x.square().mean(0),
        fisher,
        x.T @ x / 400,
        (x * say).T @ x / float(say.sum()),
    )


def same_order(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors rank alike, up to rounding: the order of one leaves the other sorted."""
    ordered = b.reshape(-1)[a.reshape(-1).argsort()].double()
    return bool((ordered[1:] >= ordered[:-1] * (1 - 1e-4)).all())


POINTS = {
    "magnitude": ((2, 0, 0, 0), lambda p: p.weight.abs()),
    "wanda": ((2, 1, 0, 0), lambda p: p.weight.abs() * p.second.sqrt()),
    "obs": ((2, 0, 1, 0), lambda p: p.weight.square() / inverse_diagonal(p.hessian)),
    "fisher obs": (
        (2, 0, 1, 1),
        lambda p: p.weight.square() / inverse_diagonal(p.hessian) * p.fisher[:, None],
    ),
}


@pytest.mark.parametrize("point", POINTS)
def test_known_rules_are_points_of_its_parameter_space(point):
    powers, rule = POINTS[point]
    network = ImportanceNetwork()
    network.set_powers(*powers)
    for kind in ("q_proj", "down_proj"):
        problem = make_problem(kind)
        ours = score_with(network, problem)
        assert ours.shape == (OUT, IN) and ours.dtype == torch.float32
        assert same_order(rule(problem), ours)
        for other in set(POINTS) - {point}:
            assert not same_order(POINTS[other][1](problem), ours)


def test_it_begins_at_the_second_order_estimate_of_the_loss():
    problem = make_problem()
    expected = 0.5 * problem.weight.square() * problem.second * problem.fisher[:, None]
    assert torch.allclose(score_with(ImportanceNetwork(), problem), expected, rtol=1e-4)


def test_scores_compare_between_layers():
    """A layer whose loss is a hundred times more sensitive is a hundred times more important."""
    calm, loud = make_problem("o_proj"), make_problem("o_proj")
    loud.fisher = calm.fisher * 100
    ratio = score_with(ImportanceNetwork(), loud) / score_with(ImportanceNetwork(), calm)
    assert torch.allclose(ratio, torch.full_like(ratio, 100.0), rtol=1e-3)


def test_residual_and_slopes_take_part():
    network, problem = ImportanceNetwork(), make_problem()
    before = score_with(network, problem)
    with torch.no_grad():
        network.row[2].weight[1] = 0.3
    assert not same_order(before, score_with(network, problem))


def test_an_unknown_kind_is_the_mean_of_those_known():
    network = ImportanceNetwork()
    with torch.no_grad():
        network.offset[:, 0] = torch.arange(7.0)
    found = features(make_problem("dense_proj"))
    assert torch.allclose(found.kind, torch.full((len(KINDS),), 1 / 7))
    middle = score_with(network, make_problem(KINDS[3]))
    assert torch.allclose(score_with(network, make_problem("dense_proj")), middle, rtol=1e-4)


def test_dead_inputs_and_rows_and_zero_weights_are_least():
    problem = make_problem()
    problem.weight[2] = 0
    problem.weight[:, 5] = 0
    problem.second[7] = 0
    problem.hessian[7], problem.hessian[:, 7] = 0, 0
    problem.weighted[7], problem.weighted[:, 7] = 0, 0
    found = score_with(ImportanceNetwork(), problem)
    assert torch.isfinite(found).all()
    alive = torch.ones(OUT, IN, dtype=torch.bool)
    alive[2], alive[:, [5, 7]] = False, False
    assert found[~alive].max() < found[alive].min()


def test_statistics_that_are_not_finite_are_refused_by_name():
    problem = make_problem()
    problem.fisher[3] = float("nan")
    with pytest.raises(LowtideError, match="up_proj: weights or statistics that are not finite"):
        score_with(ImportanceNetwork(), problem)


def test_vectors_of_another_model_are_refused():
    network = ImportanceNetwork()
    problem = make_problem()
    network.add_vectors([features(problem)])
    problem.weight = problem.weight[:-1]
    problem.fisher = problem.fisher[:-1]
    with pytest.raises(LowtideError, match="trained on a model of other shapes"):
        score_with(network, problem)


def test_file_holds_everything(tmp_path):
    network, problem = ImportanceNetwork(seed=3), make_problem()
    network.add_vectors([features(problem)])
    with torch.no_grad():
        for p in [*network.parameters(), *network.vectors()]:
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    checkpoint.save(tmp_path / "n.safetensors", network, {"models": ["a"]})
    again, about = checkpoint.load(tmp_path / "n.safetensors")
    assert about == {"models": ["a"]}
    assert torch.equal(score_with(again, problem), score_with(network, problem))


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "n.safetensors"
    with pytest.raises(LowtideError, match="no such file"):
        checkpoint.load(path)
    checkpoint.save(path, ImportanceNetwork(), {})
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(LowtideError, match="cannot be read as an importance network"):
        checkpoint.load(path)
    path.write_bytes(data.replace(b"lowtide-importance-1", b"lowtide-importance-9"))
    with pytest.raises(LowtideError, match="is no importance network"):
        checkpoint.load(path)
    network = ImportanceNetwork()
    with torch.no_grad():
        network.powers[0, 0] = float("inf")
    checkpoint.save(path, network, {})
    with pytest.raises(LowtideError, match="tensor powers is not a finite float32"):
        checkpoint.load(path)


def test_the_shipped_network_scores_every_kind():
    assert SHIPPED.stat().st_size < 64 << 10
    about = checkpoint.load(SHIPPED)[1]
    assert about["models"]
    for kind in KINDS:
        found = score(make_problem(kind))
        assert torch.isfinite(found).all() and (found > 0).all()
