"""The numpy specification against formulas written out by hand, plain loops, and torch."""

import numpy as np
import pytest

from lowtide.format import codec
from lowtide.format.groups import GroupTensors, LinearTensors
from lowtide.kernels import reference_ops as ops
from lowtide.kernels.reference_cache import CachedRows
from lowtide.rules import literal

f32 = np.float32


def random_group(outs=(5, 3), inputs=19, slices=3, exact=(2, 11), outliers=4, seed=0, name="layers.0.qkv"):
    """A group with every feature: exact channels, outliers, biases, several layers."""
    rng = np.random.default_rng(seed)
    keep = np.ones(inputs, bool)
    keep[list(exact)] = False
    linears = []
    for i, out in enumerate(outs):
        q = rng.integers(0, 4**slices, (out, inputs), dtype=np.uint8)
        cells = rng.choice(out * keep.sum(), min(outliers, out * keep.sum()), replace=False)
        rows, cols = cells // keep.sum(), np.flatnonzero(keep)[cells % keep.sum()]
        values = rng.normal(0, 3, len(cells)).astype(np.float16)
        ptr, row, gap, value = codec.pack_outliers(rows, cols, values, out)
        linears.append(
            LinearTensors(
                name=f"model.layers.0.member{i}",
                weight=codec.pack_digits(q, slices),
                row_scale=rng.uniform(0.5, 2, out).astype(np.float16),
                bias=rng.normal(0, 1, out).astype(np.float16),
                exact=rng.normal(0, 1, (len(exact), out)).astype(np.float16),
                outlier_ptr=ptr,
                outlier_row=row,
                outlier_gap=gap,
                outlier_value=value,
                out_features=out,
            )
        )
    return GroupTensors(
        name=name,
        in_features=inputs,
        slices=slices,
        mean=(rng.normal(0, 0.2, inputs) * keep).astype(np.float16),
        col_scale=rng.uniform(0.5, 2, inputs).astype(np.float16),
        importance=(rng.uniform(0.5, 2, inputs) * keep).astype(np.float16),
        shrink=rng.uniform(0.8, 1.1, slices).astype(f32),
        exact_channels=np.array(exact, np.int32),
        thresholds=np.zeros((1, 1, slices), f32),
        linears=linears,
    )


def random_levels(group, tokens, seed=1):
    levels = np.random.default_rng(seed).integers(0, group.slices + 1, (tokens, group.in_features)).astype(np.int32)
    levels[:, group.exact_channels] = 0
    return levels


def inputs_for(group, tokens=3, seed=2):
    return np.random.default_rng(seed).normal(0, 1, (tokens, group.in_features)).astype(f32)


def planes_of(group, linear):
    return ops.channel_planes(codec.digit_planes(linear.weight, linear.out_features, group.in_features))


def reach_by_loops(entries):
    """Four times the mean magnitude of a class, summed slice by slice in sixteen lanes of the values before 4^-s."""
    total = f32(0)
    for s in sorted({e[2] for e in entries}):
        lanes = [f32(0)] * 16
        for i, e in enumerate(x for x in entries if x[2] == s):
            lanes[i % 16] += f32(abs(e[3]) * f32(4.0**s))
        for width in (8, 4, 2, 1):
            lanes = [lanes[i] + lanes[i + width] for i in range(width)]
        total += f32(lanes[0] * f32(4.0**-s))
    return f32(f32(total / f32(len(entries))) * f32(4))


def product_by_loops(group, linear, x, levels):
    """docs/architecture.md word by word, one number at a time, in its order."""
    digits = codec.digit_planes(linear.weight, linear.out_features, group.in_features)
    a = [f32(x[j] - f32(group.mean[j])) for j in range(group.in_features)]
    entries = []
    for j in range(group.in_features):
        for s in range(levels[j]):
            u = f32(f32(f32(a[j] * f32(group.col_scale[j])) * group.shrink[levels[j] - 1]) * f32(4.0**-s))
            entries.append((levels[j] - s - 1, j, s, u))
    y = [f32(0)] * linear.out_features
    for k in range(group.slices):
        mine = [e for e in entries if e[0] == k]
        if not mine:
            continue
        m = min(max(abs(e[3]) for e in mine), reach_by_loops(mine))
        scale, inverse = f32(f32(m / f32(127)) * f32(0.5)), f32(f32(127) / m)
        coef = [int(np.rint(f32(e[3] * inverse))) for e in mine]
        for i in range(linear.out_features):
            t = 2 * sum(c * int(digits[s, i, j]) for c, (_, j, s, _) in zip(coef, mine, strict=True)) - 3 * sum(coef)
            y[i] = f32(y[i] + f32(scale * f32(t)))
    y = [f32(f32(v * f32(r)) + f32(b)) for v, r, b in zip(y, linear.row_scale, linear.bias, strict=True)]
    for row, col, value in zip(*linear.outliers(), strict=True):
        y[row] = f32(y[row] + f32(f32(value) * a[col]))
    for e, channel in enumerate(group.exact_channels):
        y = [f32(v + f32(f32(linear.exact[e, i]) * x[channel])) for i, v in enumerate(y)]
    return np.array(y, f32)


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("outs", "inputs", "exact"), [((5, 3), 19, (2, 11)), ((1,), 1, ()), ((70,), 33, (0,)), ((321, 64), 7, ())]
)
def test_product_equals_plain_loops_bit_by_bit(slices, outs, inputs, exact):
    group = random_group(outs, inputs, slices, exact)
    x, levels = inputs_for(group, 2), random_levels(group, 2)
    for linear in group.linears:
        got = ops.graded_linear(group, linear, planes_of(group, linear), x, levels)
        assert got.dtype == f32
        for token in range(2):
            np.testing.assert_array_equal(got[token], product_by_loops(group, linear, x[token], levels[token]))


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_product_is_the_graded_mask_of_the_dequantised_weights(slices):
    """Against the literal form: each channel's weights at the precision of its level, up to int8 rounding."""
    group = random_group((40,), 64, slices, (5,), outliers=9)
    x, levels = inputs_for(group, 4), random_levels(group, 4)
    a = x - group.mean.astype(f32)
    weights = np.stack([group.dequantise(0, level) for level in range(slices + 1)])
    want = literal.graded_linear(a, weights, levels) + a @ group.exact_part(0).T + group.linears[0].bias.astype(f32)
    got = ops.graded_linear(group, group.linears[0], planes_of(group, group.linears[0]), x, levels)
    # each of the 64 coefficients of a class is off by at most half a step of 1/127 of the largest, at random
    step = np.abs(a).max() * 2 * 1.1 / 127 * 2 * 1.5
    assert np.abs(got - want).max() < step * 8 * slices
    assert np.abs(got - want).max() > 0
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.999


def test_binary_levels_equal_the_literal_mask():
    """Levels {0, S}: a literal mask with one score per channel over the fully read weights."""
    group = random_group((40,), 64, 3, (), outliers=0)
    x = inputs_for(group, 4)
    score = np.abs(x - group.mean.astype(f32)) * group.importance.astype(f32)
    levels = np.where(score > 0.8, 3, 0).astype(np.int32)
    want = literal.literal_linear(x - group.mean.astype(f32), group.dequantise(0, 3), 0.8, scores=score[:, None, :])
    got = ops.graded_linear(group, group.linears[0], planes_of(group, group.linears[0]), x, levels)
    got = got - group.linears[0].bias.astype(f32)
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


def dense_by_loops(group, index, x):
    """The paragraph on prefill in docs/architecture.md, one number at a time."""
    linear, slices = group.linears[index], group.slices
    digits = codec.digit_planes(linear.weight, linear.out_features, group.in_features)
    a = x - group.mean.astype(f32)
    value = [f32(f32(v * f32(c)) * group.shrink[-1]) for v, c in zip(a, group.col_scale, strict=True)]
    y = [0.0] * linear.out_features
    for start in range(0, group.in_features, 128):
        block = [j for j in range(start, min(start + 128, group.in_features)) if j not in group.exact_channels]
        m = max((abs(value[j]) for j in block), default=f32(0))
        if m == 0:
            continue
        q = {j: int(np.rint(f32(value[j] * f32(f32(127) / m)))) for j in block}
        for i in range(linear.out_features):
            total = sum(q[j] * sum((digits[s, i, j] - 1.5) * 4.0**-s for s in range(slices)) for j in block)
            y[i] += total * float(m) / 127
    return np.array(y) * linear.row_scale + linear.bias + group.exact_part(index).astype(np.float64) @ a


@pytest.mark.parametrize("slices", [1, 3, 4])
@pytest.mark.parametrize("inputs", [5, 128, 129, 300])
def test_dense_linear_follows_its_paragraph(slices, inputs):
    group = random_group((9, 3), inputs, slices, (0, 3))
    x = inputs_for(group, 2)
    for i in range(2):
        got = ops.dense_linear(group, i, x)
        assert got.dtype == f32
        for token in range(2):
            np.testing.assert_allclose(got[token], dense_by_loops(group, i, x[token]), rtol=1e-5, atol=1e-4)


def test_dense_linear_is_nearly_the_dequantised_matrix():
    group = random_group((40, 7), 300, 3, (5, 6))
    x = inputs_for(group, 4)
    a = x - group.mean.astype(f32)
    for i, linear in enumerate(group.linears):
        want = a @ (group.dequantise(i, 3) + group.exact_part(i)).T + linear.bias
        got = ops.dense_linear(group, i, x)
        error = np.abs(got - want).max() / want.std()
        assert 0 < error < 0.05


def test_coefficients_by_hand():
    a = f32([[1, -3, 0.25, 0]])
    levels = np.int32([[2, 1, 2, 0]])
    coef, scale = ops.coefficients(a, levels, f32([1, 2, 1, 9]), f32([0.5, 1]))
    # class 0: (j1, s0) 3*2*0.5 = -3; (j0, s1) 1/4; (j2, s1) 1/16. class 1: (j0, s0) 1; (j2, s0) 1/4.
    np.testing.assert_array_equal(coef[0], [[127, -127, 32, 0]])  # 1/4 of 127 is 31.75
    np.testing.assert_array_equal(coef[1], [[11, 0, 3, 0]])  # 127/12 = 10.58, 127/48 = 2.65
    np.testing.assert_array_equal(scale[:, 0], [f32(f32(3) / f32(127)) * f32(0.5), f32(f32(1) / f32(127)) * f32(0.5)])


def test_coefficients_beyond_the_range_keep_the_others_fine():
    """A massive input gets a coefficient of many times 127; the rest are rounded as if it were not there, nearly."""
    a = np.random.default_rng(0).normal(0, 1, (1, 400)).astype(f32)
    a[0, 7] = 300
    coef, scale = ops.coefficients(a, np.ones((1, 400), np.int32), np.ones(400, f32), np.ones(1, f32))
    unit = 2 * scale[0, 0]
    mean = np.abs(a).mean()
    assert unit == pytest.approx(4 * mean / 127, rel=1e-5)
    assert coef[0, 0, 7] > 127 * 20
    np.testing.assert_allclose(coef[0] * unit, a, atol=unit / 2 * 1.001)
    spent = np.ceil(np.abs(coef[0, 0]) / 127).clip(1) - 1  # entries beyond the first
    assert 0 < spent.sum() <= 400 * (1 / 4 + 1 / 254)


def test_coefficients_without_a_massive_input_span_the_largest():
    a = np.linspace(-2, 2, 64, dtype=f32)[None]
    coef, scale = ops.coefficients(a, np.ones((1, 64), np.int32), np.ones(64, f32), np.ones(1, f32))
    assert np.abs(coef).max() == 127 and scale[0, 0] == f32(f32(2) / f32(127)) * f32(0.5)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 3e38])
def test_a_class_that_is_not_finite_counts_as_zero(wrong):
    a = np.ones((1, 20), f32)
    a[0, :3] = wrong
    with np.errstate(over="ignore"):
        coef, scale = ops.coefficients(a, np.ones((1, 20), np.int32), np.ones(20, f32), np.ones(1, f32))
    assert not coef.any() and scale[0, 0] == 0


def test_a_class_next_to_zero_counts_as_zero():
    a = np.full((1, 20), 1e-32, f32)
    coef, scale = ops.coefficients(a, np.ones((1, 20), np.int32), np.ones(20, f32), np.ones(1, f32))
    assert not coef.any() and scale[0, 0] == 0


def test_coefficients_round_ties_to_even():
    # 127 steps to the largest value: 2.5 and 3.5 steps are ties
    coef, _ = ops.coefficients(
        f32([[127, 2.5, 3.5, -2.5]]), np.full((1, 4), 1, np.int32), np.ones(4, f32), np.ones(1, f32)
    )
    np.testing.assert_array_equal(coef[0, 0], [127, 2, 4, -2])


def test_an_input_at_its_mean_gives_the_bias():
    group = random_group((5,), 8, 3, ())
    x = group.mean.astype(f32)[None]
    levels = np.full((1, 8), 3, np.int32)
    got = ops.graded_linear(group, group.linears[0], planes_of(group, group.linears[0]), x, levels)
    np.testing.assert_array_equal(got[0], group.linears[0].bias.astype(f32))


def test_digit_sums_stay_exact_for_very_wide_layers():
    width = 3 * ops.EXACT_CHUNK // 2
    planes = np.full((1, width, 2), 3, np.uint8)
    planes[0, 0, 1] = 2
    coef, levels = np.full((1, 1, width), 127, np.int32), np.ones((1, width), np.int32)
    total = ops.digit_sums(planes, coef, levels, 0, (3,))
    np.testing.assert_array_equal(total, [[127 * 3 * width, 127 * 3 * width - 254]])


def test_embedding_row_replaces_outliers_and_exact_channels():
    group = random_group((300,), 40, 3, (1, 7), outliers=900, name="head")
    linear = group.linears[0]
    total = sum((d.astype(f32) - 1.5) * 4.0**-s for s, d in enumerate(codec.digit_planes(linear.weight, 300, 40)))
    want = linear.row_scale.astype(f32)[:, None] * group.col_scale.astype(f32) * total
    exact = group.exact_part(0)
    want = np.where(exact != 0, exact, want)
    assert (exact != 0).sum() > 1000
    for token in (0, 63, 64, 255, 256, 299):
        np.testing.assert_allclose(ops.embedding_row(group, token), want[token], rtol=1e-6)


def test_row_digits_find_every_row_of_every_tile():
    q = np.random.default_rng(0).integers(0, 64, (390, 6), dtype=np.uint8)
    packed = codec.pack_digits(q, 3)
    for row in (0, 1, 64, 127, 128, 255, 256, 300, 319, 320, 389):
        digits = ops.row_digits(packed, row, 390, 6)
        np.testing.assert_array_equal(digits[0] * 16 + digits[1] * 4 + digits[2], q[row])


def test_bits_by_hand():
    group = random_group((5, 3), 19, 3, (2, 11), outliers=4)
    levels = np.zeros((2, 19), np.int32)
    levels[1, :4] = [3, 1, 0, 2]
    shared = 3 * 2 * 19 + 4 * 3 + 4 * 2 + 4 * 3  # mean, col_scale, importance; shrink; exact_channels; thresholds
    own = sum(2 * out + 2 * out + 2 * 2 * out + 4 * 2 + 4 * (1 + 1 + 2) for out in (5, 3))
    np.testing.assert_array_equal(ops.group_bits(group, levels), [8 * (shared + own), 8 * (shared + own) + 2 * 6 * 8])
    assert ops.embedding_bits(group) == 2 * 3 * 19 + 8 * (2 * 19 + 2)


def test_rms_norm_and_silu_equal_torch():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(0, 4, (3, 65)).astype(f32)
    gain = np.random.default_rng(1).normal(1, 0.1, 65).astype(f32)
    want = torch.nn.functional.rms_norm(torch.from_numpy(x), (65,), torch.from_numpy(gain), 1e-5)
    np.testing.assert_allclose(ops.rms_norm(x, gain, 1e-5), want.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ops.silu(x), torch.nn.functional.silu(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ops.silu(f32([-200.0, 0, 200])), f32([0, 0, 200]), atol=1e-30)


def test_exponential_is_accurate_and_clamped():
    x = np.linspace(-87, 88, 20001).astype(f32)
    np.testing.assert_allclose(ops.exponential(x), np.exp(x.astype(np.float64)), rtol=3e-7)
    np.testing.assert_array_equal(ops.exponential(f32([-1e30, 0, 1e30])), ops.exponential(f32([-87, 0, 88])))
    assert ops.exponential(f32([0]))[0] == 1


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100])
def test_sums_have_a_fixed_order(size):
    x = np.random.default_rng(size).normal(0, 1, (2, size)).astype(f32)
    lanes = [[f32(0)] * 16 for _ in range(2)]
    for row in range(2):
        for i, value in enumerate(x[row]):
            lanes[row][i % 16] = f32(lanes[row][i % 16] + value)
        for width in (8, 4, 2, 1):
            for i in range(width):
                lanes[row][i] = f32(lanes[row][i] + lanes[row][i + width])
    np.testing.assert_array_equal(ops.lane_sum(x), [lanes[0][0], lanes[1][0]])
    total = f32(0)
    for value in x[0]:
        total = f32(total + value)
    assert ops.in_order(x, axis=-1)[0] == total
    np.testing.assert_array_equal(ops.in_order(x.T.copy(), axis=0), ops.in_order(x, axis=1))


def test_rope_rotates_halves_by_position():
    x = np.random.default_rng(0).normal(0, 1, (3, 2, 8)).astype(f32)
    cos, sin = ops.rope_tables(np.array([0, 1, 1000]), 8, 10000.0)
    got = ops.rope(x, cos, sin)
    np.testing.assert_array_equal(got[0], x[0])
    for token, position in ((1, 1), (2, 1000)):
        for i in range(4):
            turn = np.exp(1j * position * 10000.0 ** (-2 * i / 8))
            want = (x[token, :, i] + 1j * x[token, :, i + 4]) * turn
            np.testing.assert_allclose(got[token, :, i], want.real, atol=1e-5)
            np.testing.assert_allclose(got[token, :, i + 4], want.imag, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("start", "n"), [(0, 1), (0, 5), (7, 1), (7, 3)])
def test_attention_equals_torch(heads, kv_heads, start, n):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    q = rng.normal(0, 1, (n, heads, 8)).astype(f32)
    k, v = (rng.normal(0, 1, (start + n, kv_heads, 8)).astype(np.float16) for _ in range(2))
    mask = torch.arange(start + n)[None] <= start + torch.arange(n)[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(t.astype(f32)).transpose(0, 1) for t in (q, k, v)), attn_mask=mask, enable_gqa=True
    ).transpose(0, 1)
    for bits, tolerance in ((16, 1e-5), (8, 0.03)):
        keys, values = CachedRows(kv_heads, 8, bits), CachedRows(kv_heads, 8, bits)
        keys.store(0, k.astype(f32))
        values.store(0, v.astype(f32))
        np.testing.assert_allclose(ops.attention(q, keys, values, start), want.numpy(), rtol=1e-4, atol=tolerance)
