"""The type that inexact products run in."""

from __future__ import annotations

import math

import pytest
import torch

from lowtide.compress import products
from lowtide.compress.products import AHEAD, INTEGERS_AHEAD, TYPES, int8_product, product_type
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
        (0.5, 0.49 / INTEGERS_AHEAD, products.Products(torch.bfloat16, True)),
        (math.inf, math.inf, TYPES["float32"]),
    ],
)
def test_others_must_be_clearly_faster(monkeypatch, bfloat16, int8, expected):
    asked = []

    def seconds(kind):
        asked.append(kind)
        return {torch.bfloat16: bfloat16, torch.int8: int8, torch.float32: 1.0}[kind]

    monkeypatch.setattr(products, "_seconds", seconds)
    assert products.products() == expected and product_type() == expected.floats
    assert len(asked) == 3  # timed once


def test_a_product_is_timed(monkeypatch):
    assert 0 < products._seconds(torch.float32) < 10

    def missing(x, w):
        raise RuntimeError("not on this processor")

    monkeypatch.setattr(products, "int8_product", missing)
    assert products._seconds(torch.int8) == math.inf


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (64, 130, 33)])
def test_int8_products_are_exact(shape):
    n, k, m = shape
    generator = torch.Generator().manual_seed(k)
    x, w = (torch.randint(-127, 128, s, generator=generator).to(torch.int8) for s in ((n, k), (m, k)))
    assert torch.equal(int8_product(x, w.T).long(), x.long() @ w.long().T)
    assert torch.equal(int8_product(x, w.T.contiguous()).long(), x.long() @ w.long().T)


def test_it_can_be_set(monkeypatch):
    monkeypatch.setenv("LOWTIDE_PRODUCTS", "bfloat16")
    assert product_type() == torch.bfloat16
    monkeypatch.setattr(products, "_chosen", [])
    monkeypatch.setenv("LOWTIDE_PRODUCTS", "float8")
    with pytest.raises(LowtideError, match="LOWTIDE_PRODUCTS=float8: known are float32, bfloat16, int8"):
        product_type()
