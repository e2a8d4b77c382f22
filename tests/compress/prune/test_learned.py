"""Gradual pruning by an importance network, as `prune_model` offers it."""

from __future__ import annotations

import pytest
import torch

from lowtide.compress.prune.apply import PruneOptions, prune_model
from lowtide.compress.prune.learned import START, network_named
from lowtide.compress.sources import open_source
from lowtide.errors import LowtideError
from lowtide.learn.checkpoint import save
from lowtide.learn.importance import ImportanceNetwork


@pytest.fixture
def subject(small_model):
    model = small_model()
    ids = torch.randint(0, 130, (6, 32), generator=torch.Generator().manual_seed(3))
    return open_source(model.folder), ids


def test_gradual_removes_as_much_as_asked_for_and_keeps_more_of_the_model(subject):
    from lowtide.compress.dense import DenseModel

    source, ids = subject
    gradual, report = prune_model(source, ids, PruneOptions(sparsity=0.5, gradual=True))
    plain, _ = prune_model(source, ids, PruneOptions(rule="magnitude", sparsity=0.5))
    assert report["density"] == pytest.approx(0.5, abs=0.01) and len(report["layers"]) == 14
    dense = torch.log_softmax(DenseModel(source).logits(ids), -1)

    def loss(changed):
        return float((dense.exp() * (dense - torch.log_softmax(DenseModel(changed).logits(ids), -1))).sum(-1).mean())

    assert loss(gradual) < 0.7 * loss(plain)


def test_a_network_of_ones_own(subject, tmp_path):
    source, ids = subject
    save(tmp_path / "own.safetensors", ImportanceNetwork(), {})
    a, _ = prune_model(source, ids, PruneOptions(sparsity=0.6, gradual=True, network=str(tmp_path / "own.safetensors")))
    b, _ = prune_model(source, ids, PruneOptions(sparsity=0.6, gradual=True))  # the same network, untrained
    for name, weight in a.tensors.items():
        torch.testing.assert_close(weight, b.tensors[name])


def test_networks_by_name(tmp_path):
    assert torch.equal(network_named(START).powers, ImportanceNetwork().powers)
    assert not torch.equal(network_named(None).powers, ImportanceNetwork().powers)
    with pytest.raises(LowtideError, match="nowhere.safetensors"):
        network_named(str(tmp_path / "nowhere.safetensors"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gradual": True, "structure": "2:4"}, "--gradual: is of the rule importance, unstructured"),
        ({"gradual": True, "rule": "wanda"}, "--gradual: is of the rule importance"),
        ({"network": "x"}, "--network: needs --gradual"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(LowtideError, match=message):
        PruneOptions(**options)
