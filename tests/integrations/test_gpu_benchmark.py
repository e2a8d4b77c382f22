"""benchmarks/gpu.py as far as it goes without a GPU: what it feeds the layers, its sums, and its refusal."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'lowtide[compress]'")

from lowtide.errors import LowtideError  # noqa: E402
from lowtide.integrations.triton import GradedGroup  # noqa: E402


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("gpu")
    for name in ("gpu", "common"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_without_a_gpu_it_says_that_it_needs_one(gpu, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", torch)  # any module will do: the GPU is missing first
    assert gpu.main(["--quick"]) == 2
    said = capsys.readouterr().err
    assert said == "gpu: error: this benchmark needs an NVIDIA GPU that torch can use, and there is none here\n"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert gpu.main(["--quick"]) == 2
    assert capsys.readouterr().err == "gpu: error: this benchmark needs triton: pip install triton\n"


@pytest.mark.parametrize("bits", [0.5, 1.0, 3.0, 5.5])
def test_thresholds_give_the_bits_asked_for(gpu, bits):
    group = gpu.random_group(600, (64,))
    x = np.random.default_rng(1).normal(0, 1, 600).astype(np.float32)
    thresholds = gpu.thresholds_for(bits, np.abs(x) * group.importance.astype(np.float32))
    layer = GradedGroup(group, "cpu", backend="torch")
    levels = layer.levels(torch.from_numpy(x), torch.from_numpy(thresholds))
    assert 2 * float(levels.float().mean()) == pytest.approx(bits, abs=0.01)


def test_a_wrong_product_is_not_timed(gpu):
    want = torch.tensor([1.0, -2.0])
    gpu.same(want + 0.01, want, 0.01, "x")
    with pytest.raises(LowtideError, match="int4 qkv: off by 0.5"):
        gpu.same(want - torch.tensor([1.0, 0.0]), want, 0.4, "int4 qkv")
    with pytest.raises(LowtideError, match="off by nan"):
        gpu.same(want * float("nan"), want, 0.4, "x")


def test_a_layer_is_the_sum_of_its_groups(gpu):
    us = {"lowtide": 2.0, "bf16": 8.0, "int4": 3.0}
    row = {"asked_bits": 2.0, "bytes_read": 6000, "gb_per_s": 3.0, "us": us, "tuning": None}
    rows = [
        row | {"group": "o", "in": 10, "out": 10, "bits": 2.0},
        row | {"group": "down", "in": 30, "out": 10, "bits": 4.0},
    ]
    (layer,) = gpu.whole_layers(rows)
    assert layer["us"] == {"lowtide": 4.0, "bf16": 16.0, "int4": 6.0}
    assert (layer["bits"], layer["bytes_read"], layer["gb_per_s"]) == (3.5, 12000, 3.0)
    assert "| layer | 3.50 |         4.00 |         1.50 |" in gpu.table([*rows, layer])


def test_medians_interleave_and_leave_out_the_first_rounds(gpu):
    order = []

    def engine(name, times):
        return lambda: order.append(name) or times.pop(0)

    found = gpu.medians({"a": engine("a", [9, 9, 1, 2, 30]), "b": engine("b", [0, 0, 5, 5, 7])}, 3)
    assert found == {"a": 2, "b": 5}
    assert "".join(order) == "baabbaabba"
