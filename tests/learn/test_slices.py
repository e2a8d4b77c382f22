"""Products with slices in int8 against those in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowtide.compress import compress, products
from lowtide.format.reader import open_artifact
from lowtide.learn import slices
from lowtide.learn.digits import Code
from lowtide.learn.slices import LARGEST, FloatSlices, IntegerSlices

SHAPES = [(1, 1, 1), (3, 5, 7), (17, 64, 33), (65, 130, 96)]
SHRINK = [0.8, 0.95, 1.0]


def both(out, inputs, generator):
    """The same random digits in either form."""
    doubled = torch.randint(-3, 4, (3, out, inputs), generator=generator).to(torch.int8)
    upto = torch.stack([d.float() * 0.5 * 4.0**-s for s, d in enumerate(doubled)]).cumsum(0)
    levels = [g * part for g, part in zip(SHRINK, upto, strict=True)]
    planes = [levels[0], levels[1] - levels[0], levels[2] - levels[1]]
    scaled = torch.cat([d * 4 ** (2 - s) for s, d in enumerate(doubled)], 1)
    return FloatSlices(torch.cat(planes, 1), 3), IntegerSlices(scaled, SHRINK)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [4, 1 << 16])
def test_reading_differs_by_the_rounding_of_coefficients(shape, chunk, monkeypatch):
    monkeypatch.setattr(slices, "CHUNK", chunk)
    tokens, out, inputs = shape
    generator = torch.Generator().manual_seed(out)
    plain, whole = both(out, inputs, generator)
    a, cols = torch.randn(tokens, inputs, generator=generator), torch.rand(inputs, generator=generator) + 0.1
    score, cuts = torch.randn(tokens, inputs, generator=generator), [-0.7, 0.2, 0.9]
    expected, count = plain.read(a, cols, score, cuts)
    y, ours = whole.read(a, cols, score, cuts)
    assert torch.equal(ours, count)
    # Of each coefficient half a unit at most, and doubled digits reach 3.
    unit = (a * cols).abs().amax(1, keepdim=True) / LARGEST
    bound = sum(unit * 0.5 * 3 * 0.5 * 4.0**-s * (score > t).sum(1, keepdim=True) for s, t in enumerate(cuts))
    assert ((y - expected).abs() <= bound + 1e-5).all()
    if tokens > 10:
        assert 0 < float((y - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_come_back_nearly_exact(shape):
    tokens, out, inputs = shape
    generator = torch.Generator().manual_seed(inputs)
    plain, whole = both(out, inputs, generator)
    g = torch.randn(tokens, out, generator=generator) * torch.rand(tokens, 1, generator=generator).exp()
    g[0] = 0
    parts = [slice(0, 1), slice(1, tokens)] if tokens > 1 else [slice(0, 1)]
    expected, found = plain.back(g), whole.back(g)
    for part in parts:
        for a, b in zip(found(part), expected(part), strict=True):
            assert a.shape == b.shape
            assert float((a - b).abs().max()) <= 3e-4 * float(b.abs().max())


def test_nothing_read_is_nothing():
    _, whole = both(4, 6, torch.Generator().manual_seed(0))
    y, count = whole.read(torch.ones(2, 6), torch.ones(6), torch.full((2, 6), -1.0), [0.0, 1.0, 2.0])
    assert not y.any() and not count.any()


def test_digits_are_those_of_the_planes(source, monkeypatch):
    group = open_artifact(source / "artifact").groups["layers.0.gate_up"]
    made = []
    for kind in ("float32", "int8"):
        monkeypatch.setattr(products, "_chosen", [products.TYPES[kind]])
        code = Code(group)
        made.append(code.coded(code.stored))
        zero = torch.zeros(len(code.rows)), torch.zeros(len(code.cols))
        units = code.units()
        again = code.of(units, *zero)[0]
        assert torch.equal(*((s.planes if kind == "float32" else s.digits) for s in (made[-1], again)))
    plain, whole = made
    assert isinstance(plain, FloatSlices) and isinstance(whole, IntegerSlices)
    parts = whole.digits.chunk(group.slices, 1)
    value = torch.zeros(parts[0].shape)
    for s, (digits, shrink) in enumerate(zip(parts, group.shrink, strict=True)):
        value = value + digits.float() * 0.5 * 4.0 ** (1 - group.slices)
        upto = plain.planes.view(plain.planes.shape[0], plain.count, -1)[:, : s + 1].sum(1)
        np.testing.assert_allclose(upto.numpy(), (value * float(shrink)).numpy(), atol=1e-5)


def test_four_slices_stay_floats(source, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "_chosen", [products.TYPES["int8"]])
    compress(source / "model", tmp_path / "artifact", calibration=source / "text", bits_max=8)
    group = open_artifact(tmp_path / "artifact").groups["layers.0.o"]
    code = Code(group)
    assert group.slices == 4 and isinstance(code.coded(code.stored), FloatSlices)
