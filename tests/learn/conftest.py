"""A random model of 2 blocks, its calibration windows and its training task."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.tiny import Tiny, make_tokenizer
from support.twin import TwinSource, write_folder

from lowtide.compress import compress, products
from lowtide.compress.dense import DenseModel
from lowtide.compress.prune.problems import layer_problems
from lowtide.compress.sources.base import expected_shapes
from lowtide.learn import run_ipn
from lowtide.learn.train_importance import Task

TINY = Tiny(hidden=32, intermediate=56, layers=2, heads=4, kv_heads=2, head_dim=8, vocab=104, max_position=32)


@dataclass
class Small:
    """The model, its calibration text i64 [12, 24] and a way to a fresh task."""

    source: TwinSource
    model: DenseModel
    ids: torch.Tensor

    def task(self) -> Task:
        return Task.of(self.model, self.ids, layer_problems(self.model, self.ids, 0))


@pytest.fixture(scope="session", autouse=True)
def products_in_float32():
    """Here and in the processes that tests launch: not what this machine is fastest with. Tests of others say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWTIDE_PRODUCTS", "float32")
        patch.setattr(products, "_chosen", [])
        yield


@pytest.fixture(scope="session", autouse=True)
def no_gpu():
    """Here and in processes that tests launch: they compare bits, which a GPU does not repeat."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are slower on several threads, and much slower where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small() -> Small:
    """Columns and rows of very different sizes, so that there is something to learn; logits far from uniform."""
    config = TINY.config()
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 2:
            values = rng.normal(0, shape[1] ** -0.5, shape) * np.exp(rng.normal(0, 0.6, shape[1]))
        else:
            values = rng.normal(1.0, 0.3, shape)
        tensors[name] = values.astype(np.float32) * (3 if "embed" in name else 1)
    source = TwinSource(config, tensors, make_tokenizer(TINY.vocab))
    ids = torch.from_numpy(rng.integers(0, TINY.vocab, (12, 24)))
    return Small(source, DenseModel(source), ids)


@pytest.fixture(scope="module")
def source(small, tmp_path_factory):
    """A folder with `model`, its `artifact` and a `text`."""
    folder = tmp_path_factory.mktemp("source")
    write_folder(small.source, folder / "model")
    (folder / "text").write_text("the end of the tide is there and then another one in the hand. " * 40)
    compress(folder / "model", folder / "artifact", calibration=folder / "text")
    return folder


@pytest.fixture
def few_tokens(monkeypatch):
    """Thresholds are set on 8 of these short windows: there are a good twenty budgets."""
    monkeypatch.setattr(run_ipn, "TOKENS", 256)
