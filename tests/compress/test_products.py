"""The type that inexact products run in."""

from __future__ import annotations

import pytest
import torch

from lowtide.compress import products
from lowtide.compress.products import AHEAD, product_type
from lowtide.errors import LowtideError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(products, "_chosen", [])
    monkeypatch.delenv("LOWTIDE_PRODUCTS", raising=False)


@pytest.mark.parametrize(("bfloat16", "expected"), [(0.99 / AHEAD, torch.bfloat16), (0.95, torch.float32)])
def test_bfloat16_must_be_clearly_faster(monkeypatch, bfloat16, expected):
    asked = []

    def seconds(kind):
        asked.append(kind)
        return bfloat16 if kind == torch.bfloat16 else 1.0

    monkeypatch.setattr(products, "_seconds", seconds)
    assert product_type() == expected and product_type() == expected
    assert len(asked) == 2  # timed once


def test_a_product_is_timed():
    assert 0 < products._seconds(torch.float32) < 10


def test_it_can_be_set(monkeypatch):
    monkeypatch.setenv("LOWTIDE_PRODUCTS", "bfloat16")
    assert product_type() == torch.bfloat16
    monkeypatch.setattr(products, "_chosen", [])
    monkeypatch.setenv("LOWTIDE_PRODUCTS", "float8")
    with pytest.raises(LowtideError, match="LOWTIDE_PRODUCTS=float8: known are float32, bfloat16"):
        product_type()
