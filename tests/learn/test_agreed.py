"""One type of products for all processes and for a run that goes on."""

from __future__ import annotations

import pytest
import torch

from lowtide.compress import products
from lowtide.errors import LowtideError
from lowtide.learn.agreed import NAME, agree
from lowtide.learn.parallel import Parallel


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(products, "_chosen", [])
    monkeypatch.delenv("LOWTIDE_PRODUCTS", raising=False)


class Second(Parallel):
    """A process whose first one chose another type."""

    rank = 1

    def first(self, tensor):
        return torch.tensor(list(products.TYPES).index("int8"))


def test_a_run_goes_on_with_what_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "_fastest", lambda *_: products.TYPES["bfloat16"])
    assert agree(Parallel(), tmp_path) == "bfloat16"
    monkeypatch.setattr(products, "_chosen", [])
    monkeypatch.setattr(products, "_fastest", lambda *_: products.TYPES["float32"])  # it is timed again
    assert agree(Parallel(), tmp_path) == "bfloat16" and products.product_type() == torch.bfloat16
    monkeypatch.setattr(products, "_chosen", [])
    monkeypatch.setenv("LOWTIDE_PRODUCTS", "int8")  # but what is asked for counts
    assert agree(Parallel(), tmp_path) == "int8" and (tmp_path / NAME).read_text() == "int8\n"


def test_int8_stays_with_the_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "_fastest", lambda *_: products.TYPES["bfloat16"])
    monkeypatch.setattr(products, "_chosen_for", ["cpu"])
    monkeypatch.setattr(products, "_chosen", [])
    gpu = torch.device("meta")
    for begun, goes_on in (("int8", "float32"), ("int8-bfloat16", "bfloat16"), ("float32", "float32")):
        (tmp_path / NAME).write_text(begun)
        products.choose(gpu)
        assert agree(Parallel(), tmp_path, gpu) == goes_on == products.name()


def test_the_others_take_the_first_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "_fastest", lambda *_: products.TYPES["float32"])
    assert agree(Second(), tmp_path) == "int8" and products.products() == products.TYPES["int8"]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_said(tmp_path, monkeypatch):
    (tmp_path / NAME).write_text("float8")
    with pytest.raises(LowtideError, match="products: products float8: known are float32"):
        agree(Parallel(), tmp_path)
