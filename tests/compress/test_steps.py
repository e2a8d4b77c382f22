"""Steps from sensitivity and error feedback: what the static coder promises about errors, zeros and range."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowtide.arch import GroupSpec, LinearSpec
from lowtide.compress import steps
from lowtide.compress.calibrate import GroupStats
from lowtide.compress.held_out import full_read
from lowtide.compress.pack import pack_group
from lowtide.compress.steps import StepOptions, code_range, code_steps, feedback_factor
from lowtide.format import codec

OUT, IN = 96, 80


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_stats(inn: int = IN, out: int = OUT, mean: float = 0.3) -> tuple[GroupStats, torch.Tensor]:
    """Correlated inputs of unequal size."""
    x = random(2000, inn, seed=5) @ (torch.eye(inn) + 0.7 * random(inn, inn, seed=6) / inn**0.5)
    x = x * torch.linspace(0.3, 3, inn) + mean
    fisher = torch.logspace(-1, 1, out).double()
    d = x.double()
    hessian = (d.T @ d / len(d)).float()
    return GroupStats(d.mean(0), d.square().mean(0), fisher, x[::4], hessian=hessian), x


def pack(coded, slices: int = 4, out: int = OUT, inn: int = IN):
    spec = GroupSpec("layers.0.o", inn, (LinearSpec("x.o_proj", inn, out),))
    return pack_group(spec, coded, slices, zero=True)


def loss(weight: torch.Tensor, coded, stats: GroupStats, x: torch.Tensor, slices: int = 4) -> float:
    """Weighted output error in nats per token, from what the artifact would hold."""
    read, bias = full_read(pack(coded, slices))
    error = (x @ read.T + bias - x @ weight.T).double().square().mean(0)
    return float(error @ stats.fisher) / 2


def octaves(coded) -> float:
    """Mean over rows of the base-2 logarithm of their mean magnitude in steps: bits per weight, but for a constant."""
    return float((coded.digits.float() - 153).abs().mean(1).log2().mean())


def test_feedback_factor_is_the_root_of_the_inverse():
    stats, _ = make_stats()
    upper = feedback_factor(stats.hessian).double()
    assert torch.equal(upper, upper.triu())
    damped = stats.hessian.double() + steps.DAMP * stats.hessian.double().diagonal().mean() * torch.eye(IN)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(IN, dtype=torch.float64), atol=1e-4, rtol=0)


def test_a_singular_hessian_is_factored_all_the_same():
    x = random(5, IN)
    assert torch.isfinite(feedback_factor(x.T @ x)).all()
    assert torch.isfinite(feedback_factor(torch.zeros(IN, IN))).all()


@pytest.mark.parametrize("slices, expected", [(1, (-2, 1)), (2, (-9, 6)), (3, (-38, 25)), (4, (-153, 102))])
def test_code_range(slices, expected):
    assert code_range(slices) == expected


def test_half_the_step_is_a_quarter_of_the_loss_and_one_bit():
    weight, (stats, x) = random(OUT, IN) / IN**0.5, make_stats()
    coarse, fine = (code_steps(weight, None, stats, StepOptions(step)) for step in (4e-2, 2e-2))
    ratio = loss(weight, coarse, stats, x) / loss(weight, fine, stats, x)
    assert 3.0 < ratio < 5.2
    assert octaves(fine) - octaves(coarse) == pytest.approx(1.0, abs=0.1)


def test_the_loss_is_what_the_step_promises():
    """Every weight costs step^2 / 12, halved in nats, at high rate; zero-leaning rounding a little more."""
    weight, (stats, x) = random(OUT, IN) / IN**0.5, make_stats()
    coded = code_steps(weight, None, stats, StepOptions(2e-2))
    assert loss(weight, coded, stats, x) == pytest.approx(OUT * IN * 2e-2**2 / 24, rel=0.2)


def test_feedback_beats_rounding_each_weight_by_itself(monkeypatch):
    weight, (stats, x) = random(OUT, IN) / IN**0.5, make_stats()
    with_feedback = code_steps(weight, None, stats, StepOptions(2e-2))
    real = feedback_factor
    monkeypatch.setattr(steps, "feedback_factor", lambda h: torch.diag(real(h).diagonal()))
    without = code_steps(weight, None, stats, StepOptions(2e-2))
    assert loss(weight, with_feedback, stats, x) < 0.8 * loss(weight, without, stats, x)
    assert octaves(with_feedback) == pytest.approx(octaves(without), abs=0.1)


def test_rows_that_matter_more_get_more_bits():
    weight, (stats, _) = random(OUT, IN) / IN**0.5, make_stats()
    coded = code_steps(weight, None, stats, StepOptions(2e-2))
    size = (coded.digits.float() - 153).abs().mean(1)
    assert float(size[-1] / size[0]) == pytest.approx(10.0, rel=0.25)  # fisher differs by 100, steps by 10


@pytest.mark.parametrize("slices", [2, 3, 4])
def test_pruned_weights_are_zero_at_every_level(slices):
    weight, (stats, _) = random(OUT, IN) / IN**0.5, make_stats()
    keep = random(OUT, IN, seed=3) > 0.2
    group = pack(code_steps(weight * keep, None, stats, StepOptions(2e-2, slices), keep), slices)
    for level in range(slices + 1):
        assert not group.dequantise(0, level)[~keep.numpy()].any()
    assert not group.exact_part(0)[~keep.numpy()].any()


def test_keeping_zeros_costs_little():
    weight, (stats, x) = random(OUT, IN) / IN**0.5, make_stats()
    keep = random(OUT, IN, seed=3) > 0.0
    coded = code_steps(weight * keep, None, stats, StepOptions(2e-2), keep)
    alone = code_steps(weight * keep, None, stats, StepOptions(2e-2))
    # what is zero has no error of its own, but cannot take up that of others either
    assert loss(weight * keep, coded, stats, x) < 1.2 * loss(weight * keep, alone, stats, x)
    assert (coded.digits[~keep] == 153).all() and not (alone.digits[~keep] == 153).all()


def test_what_is_out_of_range_is_kept_exact():
    weight, (stats, x) = random(OUT, IN) / IN**0.5, make_stats()
    weight[7, 11] = 40.0
    weight[:, 20] *= 500
    coded = code_steps(weight, None, stats, StepOptions(2e-2))
    assert coded.exact_channels.tolist() == [20]
    np.testing.assert_array_equal(coded.exact[0].numpy(), weight[:, 20].half().numpy())
    at = (coded.outlier_rows == 7) & (coded.outlier_cols == 11)
    assert coded.outlier_values[at].tolist() == [40.0]
    assert coded.mean[20] == 0 and coded.importance[20] == 0
    assert loss(weight, coded, stats, x) < 0.5


def test_distortion_falls_and_shrink_ends_with_one():
    weight, (stats, _) = random(OUT, IN) / IN**0.5, make_stats()
    coded = code_steps(weight, None, stats, StepOptions(1e-2, 3))
    assert coded.distortion == sorted(coded.distortion, reverse=True) and coded.distortion[0] == 1.0
    assert coded.shrink[-1] == 1.0 and (coded.shrink > 0).all()


def test_scales_are_short_and_within_float16():
    weight, (stats, _) = random(OUT, IN) * 1e-4, make_stats()
    stats.fisher *= 1e-9
    coded = code_steps(weight, None, stats, StepOptions(1e-6))
    for scale in (coded.row_scale, coded.col_scale):
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert len(torch.unique(scale.view(torch.int16) & 0x1F)) == 1  # the last five of ten mantissa bits


def test_bias_takes_up_the_mean():
    weight, (stats, x) = random(OUT, IN) / IN**0.5, make_stats(mean=5.0)
    own = random(OUT, seed=9)
    coded = code_steps(weight, own, stats, StepOptions(1e-2))
    read, bias = full_read(pack(coded))
    expected, found = (x @ weight.T + own).mean(0), (x @ read.T + bias).mean(0)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.01)


def test_zero_is_in_the_code():
    for slices in range(1, 5):
        low, high = code_range(slices)
        assert low < 0 < high and high - low == 4**slices - 1
        assert -low == codec.doubled_centre(codec.centres(slices, zero=True)) // 2
