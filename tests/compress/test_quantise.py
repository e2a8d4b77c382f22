"""The code of one group: what it promises about errors, exactness and float16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowtide.arch import GroupSpec, LinearSpec
from lowtide.compress import quantise
from lowtide.compress.calibrate import GroupStats
from lowtide.compress.pack import pack_group
from lowtide.compress.quantise import QuantOptions, massive_channels, quantise_group

OUT, IN = 96, 160


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_stats(inn: int = IN, out: int = OUT, mean: float = 0.0, seed: int = 7) -> GroupStats:
    x = random(512, inn, seed=seed) * torch.linspace(0.5, 2, inn) + mean
    fisher = torch.linspace(0.2, 3, out).double()
    return GroupStats(x.double().mean(0), x.double().pow(2).mean(0), fisher, x)


def pack(coded, out: int = OUT, inn: int = IN, slices: int = 3):
    return pack_group(GroupSpec("layers.0.o", inn, (LinearSpec("x.o_proj", inn, out),)), coded, slices)


def weighted_error(weight, group, level, stats, coded):
    """What `distortion` says, from the packed artifact tensors."""
    kept = torch.ones_like(weight, dtype=torch.bool)
    kept[coded.outlier_rows, coded.outlier_cols] = False
    kept[:, coded.exact_channels] = False
    value = torch.from_numpy(group.dequantise(0, level))
    cost = stats.fisher[:, None] * (stats.second - 2 * coded.mean.double() * stats.mean + coded.mean.double() ** 2)
    error = ((weight - value).double().square() * cost)[kept].sum()
    return float(error / (weight.double().square() * cost)[kept].sum())


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_distortion_is_what_the_packed_tensors_give(slices):
    weight, stats = random(OUT, IN), make_stats()
    coded = quantise_group(weight, None, stats, QuantOptions(slices=slices))
    group = pack(coded, slices=slices)
    measured = [weighted_error(weight, group, level, stats, coded) for level in range(slices + 1)]
    assert coded.distortion == pytest.approx(measured, rel=2e-2)
    limits = [1.0, 0.2, 0.02, 0.0015, 0.00015]
    if slices > 1:
        assert all(d < limit for d, limit in zip(coded.distortion[1:], limits[1:], strict=False))
    assert coded.distortion == sorted(coded.distortion, reverse=True)


def test_shrink_is_the_least_squares_factor():
    weight, stats = random(OUT, IN), make_stats()
    coded = quantise_group(weight, None, stats, QuantOptions())
    group = pack(coded)
    best = [weighted_error(weight, group, level, stats, coded) for level in (1, 2, 3)]
    for factor in (0.98, 1.02):
        group.shrink = coded.shrink.numpy() * np.float32(factor)
        for level in (1, 2, 3):
            assert weighted_error(weight, group, level, stats, coded) > best[level - 1]


def test_outliers_are_the_weights_whose_clipping_costs_most():
    weight, stats = random(OUT, IN), make_stats()
    weight[3, 5], weight[90, 150] = 40.0, -35.0
    coded = quantise_group(weight, None, stats, QuantOptions(outliers=2 / weight.numel()))
    found = list(zip(coded.outlier_rows.tolist(), coded.outlier_cols.tolist(), strict=True))
    assert found == [(3, 5), (90, 150)]
    assert coded.outlier_values.tolist() == [40.0, -35.0]
    # their digits lie next to the middle, so that the code adds next to nothing at the full level
    middle = 2 ** (2 * 3 - 1)
    assert all(coded.digits[r, c].item() in (middle - 1, middle) for r, c in found)
    # and they do not stretch the scales of their row and column
    without = quantise_group(weight.clip(-3, 3), None, stats, QuantOptions(outliers=2 / weight.numel()))
    assert coded.distortion[3] < 2 * without.distortion[3]


def test_outlier_fraction_is_kept_and_zero_means_none():
    weight, stats = random(OUT, IN), make_stats()
    coded = quantise_group(weight, None, stats, QuantOptions(outliers=0.01))
    assert abs(len(coded.outlier_rows) - 0.01 * weight.numel()) <= 1
    assert len(quantise_group(weight, None, stats, QuantOptions(outliers=0.0)).outlier_rows) == 0


def test_outlier_threshold_from_a_sample_of_rows(monkeypatch):
    monkeypatch.setattr(quantise, "SAMPLE_ELEMENTS", OUT * IN // 4)
    monkeypatch.setattr(quantise, "CHUNK_ELEMENTS", 10 * IN)
    weight, stats = random(OUT, IN), make_stats()
    coded = quantise_group(weight, None, stats, QuantOptions(outliers=0.02))
    assert 0.01 * weight.numel() < len(coded.outlier_rows) < 0.04 * weight.numel()


def test_chunks_of_rows_do_not_change_the_code(monkeypatch):
    weight, stats = random(OUT, IN), make_stats()
    whole = quantise_group(weight, None, stats, QuantOptions())
    monkeypatch.setattr(quantise, "CHUNK_ELEMENTS", 7 * IN)
    chunked = quantise_group(weight, None, stats, QuantOptions())
    assert (whole.digits != chunked.digits).float().mean() < 1e-3  # sums in another order
    assert torch.allclose(whole.row_scale.float(), chunked.row_scale.float(), rtol=2e-3)


def test_massive_channels_are_exact_and_out_of_the_code():
    weight, stats = random(OUT, IN), make_stats()
    for channel, size in ((17, 300.0), (130, 1000.0)):
        stats.second[channel] = size**2
        stats.mean[channel] = 1.0
    coded = quantise_group(weight, None, stats, QuantOptions())
    assert coded.exact_channels.tolist() == [17, 130]
    assert torch.equal(coded.exact, weight[:, [17, 130]].T.half())
    assert coded.mean[[17, 130]].tolist() == [0, 0]
    assert coded.importance[[17, 130]].tolist() == [0, 0]
    assert coded.col_scale[[17, 130]].tolist() == [1, 1]
    assert not set(coded.outlier_cols.tolist()) & {17, 130}
    # they do not take part in the error that the others are judged by
    plain = quantise_group(weight, None, make_stats(), QuantOptions())
    assert coded.distortion[1] == pytest.approx(plain.distortion[1], rel=0.05)


def test_massive_channels_are_limited_to_the_largest():
    fisher, energy = torch.ones(OUT), torch.ones(IN)
    energy[[1, 2, 3, 4]] = torch.tensor([1e3, 1e6, 1e5, 1e4])
    assert massive_channels(torch.ones(OUT, IN), fisher, energy, 3).tolist() == [2, 3, 4]
    assert massive_channels(torch.ones(OUT, IN), fisher, energy, 0).tolist() == []
    assert massive_channels(torch.ones(OUT, IN), fisher, torch.full((IN,), 50.0), 3).tolist() == []


def test_bias_takes_in_the_mean():
    weight, stats, bias = random(OUT, IN), make_stats(mean=0.7), random(OUT, seed=3)
    coded = quantise_group(weight, bias, stats, QuantOptions(max_exact=0))
    assert torch.allclose(coded.mean.float(), stats.mean.float(), rtol=1e-3)
    assert torch.allclose(coded.bias.float(), bias + weight @ coded.mean.float(), atol=0.03)


def test_importance_is_the_sensitivity_weighted_norm():
    weight, stats = random(OUT, IN), make_stats()
    coded = quantise_group(weight, None, stats, QuantOptions(outliers=0.0))
    expected = (stats.fisher @ weight.double().square()).sqrt().float()
    assert torch.allclose(coded.importance.float() * coded.importance_rms, expected, rtol=2e-3)
    assert coded.importance.float().square().mean().item() == pytest.approx(1, rel=1e-3)


def test_fisher_decides_which_rows_are_coded_well():
    """A clipped scale is chosen per row, but columns and outliers follow the rows that matter."""
    weight, stats = random(OUT, IN), make_stats()
    profile = torch.linspace(0.1, 10, IN)  # two halves that want different column scales
    weight *= torch.cat([profile.expand(OUT // 2, -1), profile.flip(0).expand(OUT // 2, -1)])
    errors = []
    for favoured in (slice(0, OUT // 2), slice(OUT // 2, OUT)):
        stats.fisher[:] = 1e-6
        stats.fisher[favoured] = 1.0
        coded = quantise_group(weight, None, stats, QuantOptions())
        value = torch.from_numpy(pack(coded).dequantise(0, 3))
        value[coded.outlier_rows, coded.outlier_cols] = coded.outlier_values.float()
        power = (weight[: OUT // 2] * stats.second.sqrt()).double().square().sum()
        errors.append(float(((weight - value)[: OUT // 2] * stats.second.sqrt()).square().sum() / power))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("factor", [1e-7, 1e-4, 1.0, 1e4])
def test_scales_stay_in_float16_for_weights_of_any_size(factor):
    weight, stats = random(OUT, IN) * factor, make_stats()
    weight[5] *= 1e-3  # a row far below the others
    coded = quantise_group(weight, None, stats, QuantOptions())
    for scale in (coded.row_scale, coded.col_scale):
        assert torch.isfinite(scale).all()
        assert (scale.float() >= 2.0**-14).all()
    if factor >= 1e-4:
        assert coded.distortion[3] < 0.0015


def test_rows_and_columns_of_zeros_are_coded():
    weight, stats = random(OUT, IN), make_stats()
    weight[4], weight[:, 9] = 0, 0
    stats.second[20] = 0
    stats.mean[20] = 0
    coded = quantise_group(weight, None, stats, QuantOptions())
    group = pack(coded)
    assert coded.distortion[3] < 0.0015
    value = group.dequantise(0, 3)
    assert np.abs(value[4]).max() < 1e-3
    assert np.abs(value[:, 9]).max() < 1e-3
    assert coded.importance[9] == 0


def test_an_all_zero_matrix_is_coded():
    coded = quantise_group(torch.zeros(OUT, IN), None, make_stats(), QuantOptions())
    assert np.abs(pack(coded).dequantise(0, 3)).max() < 1e-3
    assert all(np.isfinite(coded.distortion))


def test_level_prefixes_nest():
    """Reading fewer slices of the finest code is the coarser code: no separate code per level."""
    weight, stats = random(OUT, IN), make_stats()
    coded = quantise_group(weight, None, stats, QuantOptions())
    group = pack(coded)
    scale = coded.row_scale.float()[:, None] * coded.col_scale.float()
    for level in (1, 2, 3):
        q = (coded.digits >> (2 * (3 - level))).float()
        expected = (q - (4**level - 1) / 2) * 4.0 ** (1 - level) * scale * coded.shrink[level - 1]
        assert torch.allclose(torch.from_numpy(group.dequantise(0, level)), expected, rtol=1e-5)
