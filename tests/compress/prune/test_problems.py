"""Pruning problems of a small model: right rows, right Hessians, and a folder that survives interruption."""

from __future__ import annotations

import pytest
import torch

from lowtide.compress.dense import DenseModel
from lowtide.compress.prune import problems
from lowtide.compress.prune.problems import ProblemStore, layer_problems
from lowtide.errors import LowtideError

FIELDS = ("weight", "mean", "second", "fisher", "hessian", "weighted")


@pytest.fixture
def model(small_model) -> DenseModel:
    return DenseModel(small_model(tied=False, qkv_bias=True).source())


@pytest.fixture
def ids(model) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))


def test_problems_of_all_layers_last_block_first(model, ids):
    found = list(layer_problems(model, ids, seed=4))
    assert [[p.name.split(".")[2] for p in block][0] for block in found] == ["1", "0"]
    assert [p.kind for p in found[0]] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [p.depth for p in found[0]] == [0.5] * 7
    for problem in found[1]:
        assert torch.equal(problem.weight, model.source.tensor(problem.name + ".weight"))
        out, inn = problem.weight.shape
        assert problem.fisher.shape == (out,) and problem.hessian.shape == (inn, inn) == problem.weighted.shape
        assert torch.allclose(problem.hessian.diagonal(), problem.second, rtol=1e-3, atol=1e-6)
        assert problem.seed == 4
    q, k = found[0][:2]
    assert q.hessian is k.hessian


def test_hessian_is_that_of_the_inputs(model, ids):
    first = list(layer_problems(model, ids))[-1][0]
    x = torch.nn.functional.rms_norm(model.embed(ids), (48,), model.block(0).input_norm, model.config.rms_eps).reshape(
        -1, 48
    )
    assert torch.allclose(first.hessian, x.T @ x / len(x), rtol=1e-3, atol=1e-4)


def test_store_gives_the_same_and_reloads(model, ids, tmp_path, monkeypatch):
    direct = list(layer_problems(model, ids, seed=4))[::-1]
    store = ProblemStore(tmp_path / "kept", model, ids, 4)
    for want, got in zip(direct, store, strict=True):
        for a, b in zip(want, got, strict=True):
            assert a.name == b.name
            assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS)
    monkeypatch.setattr(problems, "block_pass", None)  # nothing is computed again
    assert len(ProblemStore(tmp_path / "kept", model, ids, 4).block(1)) == 7


def test_an_interrupted_store_goes_on(model, ids, tmp_path, monkeypatch):
    whole = ProblemStore(tmp_path / "whole", model, ids, 4)
    real, calls = problems.block_pass, []

    def dies_at_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(problems, "block_pass", dies_at_second)
    with pytest.raises(KeyboardInterrupt):
        ProblemStore(tmp_path / "kept", model, ids, 4)
    again = ProblemStore(tmp_path / "kept", model, ids, 4)
    assert len(calls) == 3  # block 1, the interrupted block 0, block 0
    assert all(torch.equal(a.weighted, b.weighted) for a, b in zip(whole.block(0), again.block(0), strict=True))
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["block-0.npz", "block-1.npz", "key.json"]


def test_foreign_and_damaged_stores_are_refused(model, ids, tmp_path):
    ProblemStore(tmp_path / "kept", model, ids, 4)
    with pytest.raises(LowtideError, match="another model, text or seed"):
        ProblemStore(tmp_path / "kept", model, ids, 5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x")
    with pytest.raises(LowtideError, match="no folder of pruning statistics"):
        ProblemStore(tmp_path / "other", model, ids, 4)
    (tmp_path / "kept" / "block-1.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(LowtideError, match="block-1.npz: damaged"):
        ProblemStore(tmp_path / "kept", model, ids, 4).block(1)
