"""The type that inexact products run in."""

from __future__ import annotations

import pytest
import torch

from lowtide.compress import products
from lowtide.compress.products import AHEAD, INTEGERS_AHEAD, TYPES, int8_is_exact, int8_product, product_type
from lowtide.errors import LowtideError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(products, "_chosen", [])
    monkeypatch.delenv("LOWTIDE_PRODUCTS", raising=False)


@pytest.mark.parametrize(
    ("bfloat16", "int8", "expected"),
    [
        (0.99 / AHEAD, 1.0, TYPES["bfloat16"]),
        (0.95, 1.0, TYPES["float32"]),
        (2.0, 0.99 / INTEGERS_AHEAD, TYPES["int8"]),
        (0.5, 0.99 / INTEGERS_AHEAD, TYPES["bfloat16"]),
        (0.5, 0.49 / INTEGERS_AHEAD, TYPES["int8-bfloat16"]),
    ],
)
def test_others_must_be_clearly_faster(monkeypatch, bfloat16, int8, expected):
    asked = []

    def seconds(kind, device):
        assert device == torch.device("cpu")
        asked.append(kind)
        return {torch.bfloat16: bfloat16, torch.int8: int8, torch.float32: 1.0}[kind]

    monkeypatch.setattr(products, "_seconds", seconds)
    assert products.products() == expected and product_type() == expected.floats
    assert len(asked) == 3  # timed once


def test_a_product_is_timed():
    assert 0 < products._seconds(torch.float32, torch.device("cpu")) < 10


@pytest.fixture
def gpu(monkeypatch):
    """Not a real one: its products are timed by a stand-in, in which bfloat16 is fastest."""
    monkeypatch.setattr(products, "_seconds", lambda kind, where: {torch.bfloat16: 0.5, torch.float32: 1.0}[kind])
    monkeypatch.setattr(products, "_chosen", [TYPES["int8"]])
    monkeypatch.setattr(products, "_chosen_for", ["cpu"])
    names = "allow_tf32", "allow_bf16_reduced_precision_reduction"
    before = [getattr(torch.backends.cuda.matmul, name) for name in names]
    yield torch.device("cuda")
    for name, value in zip(names, before, strict=True):
        setattr(torch.backends.cuda.matmul, name, value)


@pytest.mark.parametrize(("wanted", "expected", "tf32"), [(None, "bfloat16", True), ("float32", "float32", False)])
def test_a_gpu_chooses_anew_and_among_floats(monkeypatch, gpu, wanted, expected, tf32):
    if wanted:
        monkeypatch.setenv(products.VARIABLE, wanted)
    products.choose(gpu)
    assert products.name() == expected and torch.backends.cuda.matmul.allow_tf32 is tf32
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_int8_cannot_be_asked_for_there(monkeypatch, gpu):
    monkeypatch.setenv(products.VARIABLE, "int8")
    with pytest.raises(LowtideError, match="LOWTIDE_PRODUCTS=int8: .* on processors only"):
        products.choose(gpu)


def test_a_processor_keeps_what_it_chose_but_not_a_gpus(monkeypatch, gpu):
    products.choose(torch.device("cpu"))
    assert products.name() == "int8"
    products.choose(gpu)
    monkeypatch.setattr(products, "_seconds", lambda kind, where: {torch.int8: 0.1}.get(kind, 1.0))
    products.choose(torch.device("cpu"))
    assert products.name() == "int8" and products.products().floats == torch.float32


def saturating(x, w):
    """As without VNNI: 128 is added to make x positive, and pairs are added in 16 bits."""
    pairs = ((x.int() + 128)[:, None] * w.T.int()).view(len(x), w.shape[1], -1, 2).sum(-1)
    return pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - 128 * w.int().sum(0)


def missing(x, w):
    raise RuntimeError("not on this processor")


@pytest.mark.parametrize("broken", [None, saturating, missing])
@pytest.mark.parametrize("shape", [(1, 2, 1), (5, 6, 3), (64, 130, 33)])
def test_int8_products_are_exact(shape, broken, monkeypatch):
    int8_is_exact.cache_clear()
    if broken is not None:
        monkeypatch.setattr(torch, "_int_mm", broken)
        assert not int8_is_exact()
    n, k, m = shape
    generator = torch.Generator().manual_seed(k)
    x, w = (torch.randint(-127, 128, s, generator=generator).to(torch.int8) for s in ((n, k), (m, k)))
    x[0] = w[0] = 127
    assert torch.equal(int8_product(x, w.T).long(), x.long() @ w.long().T)
    assert torch.equal(int8_product(x, w.T.contiguous()).long(), x.long() @ w.long().T)
    int8_is_exact.cache_clear()


def test_it_can_be_set(monkeypatch):
    for name in TYPES:
        monkeypatch.setattr(products, "_chosen", [])
        monkeypatch.setenv("LOWTIDE_PRODUCTS", name)
        assert products.products() == TYPES[name] and products.name() == name
    monkeypatch.setattr(products, "_chosen", [])
    monkeypatch.setenv("LOWTIDE_PRODUCTS", "float8")
    with pytest.raises(LowtideError, match="LOWTIDE_PRODUCTS=float8: known are float32, bfloat16, int8, int8-bfloat16"):
        product_type()
