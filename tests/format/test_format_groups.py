"""GroupTensors: the reference dequantisation, the byte counts, the names in the file."""

from __future__ import annotations

import numpy as np
import pytest
from support.tiny import ODD, Tiny, make_groups

from lowtide.format import codec
from lowtide.format.groups import GroupTensors


@pytest.fixture(scope="module")
def groups() -> list[GroupTensors]:
    return list(make_groups(ODD))


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_dequantise_is_the_formula(groups: list[GroupTensors], level: int) -> None:
    group = groups[0]
    linear = group.linears[1]
    planes = codec.digit_planes(linear.weight, linear.out_features, group.in_features)
    got = group.dequantise(1, level)
    assert got.dtype == np.float32 and got.shape == (linear.out_features, group.in_features)
    for i in range(linear.out_features):
        for j in range(group.in_features):
            total = sum((float(planes[s, i, j]) - 1.5) * 4.0**-s for s in range(level))
            gamma = float(group.shrink[level - 1]) if level else 0.0
            expected = float(linear.row_scale[i]) * float(group.col_scale[j]) * gamma * total
            if j in group.exact_channels:
                expected = 0.0
            assert got[i, j] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_exact_part_holds_outliers_and_exact_columns(groups: list[GroupTensors]) -> None:
    group = groups[0]
    linear = group.linears[0]
    part = group.exact_part(0)
    np.testing.assert_array_equal(part[:, group.exact_channels], linear.exact.T.astype(np.float32))
    rows, cols, values = linear.outliers()
    assert len(rows) > 0
    np.testing.assert_array_equal(part[rows, cols], values)
    part[rows, cols] = 0
    part[:, group.exact_channels] = 0
    assert not part.any()


def test_full_level_and_exact_part_come_close_to_the_weights(groups: list[GroupTensors]) -> None:
    """The builder's dense weights have a deviation of in^-0.5; 6 bits must leave a small part of that."""
    for group in groups:
        whole = group.dequantise(0, group.slices) + group.exact_part(0)
        assert 0.5 < float(whole.std()) * group.in_features**0.5 < 2


def test_dequantise_refuses_a_level_that_is_not_stored(groups: list[GroupTensors]) -> None:
    with pytest.raises(ValueError, match="level must be 0 to 3"):
        groups[0].dequantise(0, 4)


def test_side_bytes_by_hand() -> None:
    tiny = Tiny(hidden=40, slices=2, exact=3, outliers=0, layers=1)
    qkv = next(make_groups(tiny))
    linears = (48, 24, 24)  # q, k, v
    side = 3 * 2 * 40 + 4 * 2 + 4 * 3 + 4 * 2  # mean, col_scale, importance; shrink; exact_channels; thresholds
    side += sum(2 * out + 2 * out + 2 * 3 * out + 4 * 2 for out in linears)  # row_scale, bias, exact, outlier_ptr
    assert qkv.side_bytes() == side
    assert qkv.weights() == 40 * sum(linears)


def test_side_bytes_count_outliers_and_not_the_policies() -> None:
    few = next(make_groups(Tiny(outliers=0)))
    many = next(make_groups(Tiny(outliers=0.1, policies=("channel-norm", "topk", "gate"))))
    entries = sum(len(linear.outlier_value) for linear in many.linears)
    assert entries > 0
    assert many.side_bytes() - few.side_bytes() == 4 * entries


def test_names_and_the_embedding_without_thresholds(groups: list[GroupTensors]) -> None:
    embed = groups[-1]
    assert embed.name == "embed" and embed.thresholds.shape == (0, 0, 3)
    names = embed.tensors()
    assert "lowtide.embed.mean" in names and "model.embed_tokens.weight" in names
    assert "lowtide.embed.thresholds" not in names
    assert embed.side_bytes() == sum(a.nbytes for n, a in names.items() if n != "model.embed_tokens.weight")
    assert "lowtide.layers.0.qkv.thresholds" in groups[0].tensors()
