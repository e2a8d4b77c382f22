"""The benchmark's own arithmetic: the crossover, and that its shortcuts do what the codec does."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from lowtide.fingerprint import CodeOptions, TensorOptions, decode_tensor, encode_tensor  # noqa: E402


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    sys.modules.pop("fingerprint", None)
    yield importlib.import_module("fingerprint")
    for name in ("fingerprint", "common"):
        sys.modules.pop(name, None)


def point(energy, bits):
    return {"codec": "fingerprint", "error": energy, "false_energy": energy, "bits_per_weight": bits}


@pytest.mark.parametrize(("exact", "expected"), [(3.0, 0.1), (2.5, 10**-0.5), (1.0, 10.0)])
def test_the_crossover_lies_on_the_lines_between_settings(benchmark, exact, expected):
    rows = [{"codec": "exact", "bits_per_weight": exact}, point(0.01, 5.0), point(0.1, 3.0), point(1.0, 2.0)]
    assert benchmark.crossover(rows) == pytest.approx(expected)


def test_layers_keep_the_share_asked_for_and_the_largest_products(benchmark):
    rng = np.random.default_rng(0)
    weight, second = rng.standard_normal((20, 50)).astype(np.float32), np.linspace(0.1, 4, 50).astype(np.float32)
    layer = benchmark.make_layer("x", weight, second, 0.3)
    score = np.abs(weight) * np.sqrt(second)
    kept = layer.coded != 0
    assert (kept.sum(1) <= 15).all()
    assert kept.mean() > 0.27  # a few survivors round to zero
    assert all(score[i][kept[i]].min() > np.sort(score[i])[-16] for i in range(20))
    assert np.abs(layer.coded - weight)[kept].max() < 0.51 * layer.step


def test_refitting_afterwards_is_the_codecs_own(benchmark):
    rng = np.random.default_rng(0)
    weight, second = rng.standard_normal((40, 50)).astype(np.float32), np.linspace(0.1, 4, 50).astype(np.float32)
    layer = benchmark.make_layer("x", weight, second, 0.3)
    decoded, _ = benchmark.fingerprint(layer, 0.5)
    options = TensorOptions(step=layer.step, code=CodeOptions(error=0.5), refit=True)
    store, _ = encode_tensor(layer.coded, model_id="m", name="x", options=options, target=weight, cost=second)
    assert benchmark.refitted(layer, decoded) == pytest.approx(decode_tensor(store, model_id="m", name="x"), abs=1e-6)
    assert benchmark.row("x", 0.3, "c", [layer], [layer.weight])["output_error"] == 0
