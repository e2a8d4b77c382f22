"""numpy specification of every kernel: slow, plain, and what the native kernels are tested against.

The integer part (coefficients, digit sums) is exact. The float part adds in the same order and rounds after every
operation as the native kernels do: rounding inputs to int8 makes a difference in the last bit jump to 1/254 of the
largest input, and a few layers later two engines that differ in one bit differ by all of the rounding noise.

Legend: n tokens, S slices, `in` channels, `out` rows, H heads, K key/value heads, hd head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lowtide.format.codec import doubled_centre, tiles, unpack_digits

if TYPE_CHECKING:
    from lowtide.format.groups import GroupTensors, LinearTensors
    from lowtide.kernels.reference_cache import CachedRows

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]

LANES = 16

# A coefficient of 127 reaches this many times as far as the mean of its class; larger ones are entered several times.
RANGE = np.float32(4)
# A class whose mean magnitude is less than this counts as zero.
LEAST = np.float32(1e-30)

# Digits up to 3 times coefficients that are 127 at most, or 32 in the mean: a float32 sum of this many products stays
# below 2^24, so it is exact.
EXACT_CHUNK = 32768

# Prefill quantises inputs in blocks of this many channels: 127 * 255 * 128 is below 2^24, so these sums are exact too.
DENSE_BLOCK = 128


def in_order(terms: F32, axis: int) -> F32:
    """Sum over an axis from the first term to the last, rounding to f32 after each (numpy's own sum adds pairwise)."""
    sums = np.add.accumulate(terms, axis=axis, dtype=np.float32)
    return np.asarray(np.take(sums, -1, axis=axis))


def lane_sum(x: F32) -> F32:
    """Sum over the last axis as sixteen lanes do it: f32 [..., m] -> f32 [...].

    Lane i adds elements i, i + 16, i + 32, ... in order; then lane i takes lane i + 8, i + 4, i + 2 and i + 1.
    """
    padded = np.zeros((*x.shape[:-1], -(-x.shape[-1] // LANES), LANES), np.float32)
    padded.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]] = x
    lanes = in_order(padded, axis=-2)
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return np.asarray(lanes[..., 0])


def exponential(x: F32) -> F32:
    """e^x with a relative error below 3e-7 on [-87, 88], f32: 2^k times a Taylor polynomial of degree 7."""
    x = np.clip(x, np.float32(-87), np.float32(88))
    k = np.rint(x * np.float32(1.44269504088896341))
    r = (x - k * np.float32(0.693359375)) - k * np.float32(-2.12194440e-4)
    p = np.full_like(r, np.float32(1) / np.float32(5040))
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        p = p * r + np.float32(1) / np.float32(divisor)
    return np.asarray(np.ldexp(p, k.astype(np.int32)))


def rms_norm(x: F32, gain: F32, eps: float) -> F32:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis: f32 [n, D]."""
    mean = lane_sum(x * x)[..., None] / np.float32(x.shape[-1])
    scale = np.float32(1) / np.sqrt(mean + np.float32(eps))
    return np.asarray(x * scale * gain, np.float32)


def silu(x: F32) -> F32:
    """x / (1 + e^-x), f32, any shape."""
    return np.asarray(x / (np.float32(1) + exponential(-x)), np.float32)


def rope_tables(positions: NDArray[np.int64], head_dim: int, theta: float) -> tuple[F32, F32]:
    """cos and sin, f32 [n, hd/2], of position * theta^(-2i/hd), taken in float64."""
    inverse = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angle = positions[:, None].astype(np.float64) * inverse
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rope(x: F32, cos: F32, sin: F32) -> F32:
    """Half rotation of f32 [n, heads, hd]: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), Hugging Face's layout."""
    half = x.shape[-1] // 2
    a, b, c, s = x[..., :half], x[..., half:], cos[:, None, :], sin[:, None, :]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def attention(q: F32, keys: CachedRows, values: CachedRows, start: int) -> F32:
    """Causal attention with grouped heads.

    Args:
        q: f32 [n, H, hd], queries of positions start .. start + n - 1.
        keys, values: [start + n, K, hd], the cache up to and with the last of them.
        start: position of the first query.

    Returns:
        f32 [n, H, hd]; query head h attends to key/value head h // (H / K).
    """
    n, heads, head_dim = q.shape
    kv_heads = keys.data.shape[1]
    out = np.empty((n, kv_heads, heads // kv_heads, head_dim), np.float32)
    grouped = q.reshape(out.shape)[:, :, :, None]  # [n, K, H/K, 1, hd]
    k = keys.data.astype(np.float32).transpose(1, 0, 2)[:, None]  # [K, 1, positions, hd]
    v = values.data.astype(np.float32).transpose(1, 0, 2)[:, None]
    unit = np.full((kv_heads, 1, len(keys)), np.float32(1) / np.sqrt(np.float32(head_dim)), np.float32)
    if keys.scale is not None:
        unit *= keys.scale.T[:, None]
    for i in range(n):
        seen = start + i + 1
        scores = in_order(k[:, :, :seen] * grouped[i], axis=-1) * unit[..., :seen]  # [K, H/K, seen]
        weights = exponential(scores - scores.max(-1, keepdims=True))
        inverse = np.float32(1) / lane_sum(weights)
        if values.scale is not None:
            weights = weights * values.scale.T[:, None, :seen]
        out[i] = in_order(v[:, :, :seen] * weights[..., None], axis=-2) * inverse[..., None]
    return out.reshape(n, heads, head_dim)


def coefficients(a: F32, levels: I32, col_scale: F32, shrink: F32) -> tuple[I32, F32]:
    """The coefficients of every channel and slice, and the scale of every class.

    Engines multiply in int8: a coefficient beyond 127 is entered several times, which is the same sum.

    Args:
        a: f32 [n, in], centred inputs.
        levels: i32 [n, in] in 0..S.
        col_scale: f32 [in].
        shrink: f32 [S], gamma of levels 1..S.

    Returns:
        coef i32 [S, n, in] (0 where the slice is not read) and scale f32 [S, n]: S_k of class k = level - slice - 1.
    """
    slices = len(shrink)
    gamma = np.concatenate([np.zeros(1, np.float32), shrink.astype(np.float32)])[levels]
    value = a * col_scale * gamma
    classes = levels[None] - np.arange(slices)[:, None, None] - 1  # [S, n, in], negative: not read
    u = value[None] * (np.float32(4) ** -np.arange(slices, dtype=np.float32))[:, None, None]
    coef = np.zeros(u.shape, np.int32)
    scale = np.zeros((slices, len(a)), np.float32)
    for token in range(len(a)):
        for k in range(slices):
            m = class_range(value[token], levels[token], k, slices)
            if m > 0:
                member = classes[:, token] == k
                coef[:, token][member] = np.rint(u[:, token][member] * (np.float32(127) / m)).astype(np.int32)
                scale[k, token] = m / np.float32(127) * np.float32(0.5)
    return coef, scale


def class_range(value: F32, levels: I32, k: int, slices: int) -> np.float32:
    """What a coefficient of 127 stands for in class k of one token: value f32 [in] = a * c * gamma, levels i32 [in].

    The largest magnitude in the class, or RANGE times the mean if that is less; 0 for an empty class, for a mean below
    LEAST and for sums that are not finite.
    """
    top, total, count = np.float32(0), np.float32(0), 0
    for s in range(slices - k):
        listed = np.abs(value[levels == k + s + 1])
        if len(listed):
            quarter = np.float32(4.0**-s)
            top = max(top, np.float32(listed.max() * quarter))
            total = np.float32(total + lane_sum(listed) * quarter)
            count += len(listed)
    mean = total / np.float32(max(count, 1))
    reach = np.float32(mean * RANGE)
    return min(reach, top) if mean >= LEAST and np.isfinite(reach) else np.float32(0)


def digit_sums(planes: U8, coef: I32, levels: I32, k: int, centres: tuple[int, ...]) -> NDArray[np.int64]:
    """T_k = sum coef * (2 d - centre) over the entries of class k, exact; `centres` [S] as in `codec.centres`.

    Args:
        planes: u8 [S, in, out], digits in 0..3, coarsest slice first.
        coef: i32 [S, n, in].
        levels: i32 [n, in].
        k: the class.

    Returns:
        i64 [n, out].
    """
    total = np.zeros((coef.shape[1], planes.shape[2]), np.int64)
    for s in range(len(planes) - k):
        chosen = np.where(levels == k + s + 1, coef[s], 0)
        active = np.flatnonzero(chosen.any(axis=0))
        for start in range(0, len(active), EXACT_CHUNK):
            part = active[start : start + EXACT_CHUNK]
            c = chosen[:, part]
            sums = c.astype(np.float32) @ planes[s][part].astype(np.float32)
            total += 2 * sums.astype(np.int64) - centres[s] * c.sum(axis=1, dtype=np.int64)[:, None]
    return total


def graded_linear(
    group: GroupTensors,
    linear: LinearTensors,
    planes: U8,
    x: F32,
    levels: I32,
    mean: F32 | None = None,
    bias: F32 | None = None,
) -> F32:
    """One linear layer of a group: f32 [n, out] from inputs x f32 [n, in] and levels i32 [n, in].

    Args:
        planes: u8 [S, in, out], the layer's digits (`channel_planes`).
        mean, bias: f32 [n, in] and [n, out], what each token's centroid puts in place of the group's.
    """
    a = x - (group.mean.astype(np.float32) if mean is None else mean)
    coef, scale = coefficients(a, levels, group.col_scale.astype(np.float32), group.shrink)
    y = np.zeros((len(x), linear.out_features), np.float32)
    for k in range(group.slices):
        y += scale[k][:, None] * digit_sums(planes, coef, levels, k, group.centres).astype(np.float32)
    return _finish(group, linear, y, a, bias=bias)


def _finish(
    group: GroupTensors, linear: LinearTensors, y: F32, a: F32, outliers_first: bool = False, bias: F32 | None = None
) -> F32:
    """What follows the sums of a linear layer: row scale, bias, outliers, exact columns (whose mean is 0).

    Outliers are added to y one by one, or, with outliers_first, to each other and then as one number to y. bias: f32
    [n, out]; the layer's own by default.
    """
    y = y * linear.row_scale.astype(np.float32) + (linear.bias.astype(np.float32) if bias is None else bias)
    rows, cols, values = linear.outliers()
    weights = values.astype(np.float32)
    to = np.zeros_like(y) if outliers_first else y
    for token in range(len(y)):
        np.add.at(to[token], rows, weights * a[token, cols])  # unbuffered: adds in stored order
    if outliers_first:
        y += to
    for e, channel in enumerate(group.exact_channels):
        y += linear.exact[e].astype(np.float32) * a[:, channel, None]
    return np.asarray(y, np.float32)


def quantise_blocks(value: F32) -> tuple[NDArray[np.int8], F32]:
    """int8 values and scales of f32 [n, in] in blocks of DENSE_BLOCK channels.

    Returns:
        q i8 [n, blocks * DENSE_BLOCK], zero beyond in, and scale f32 [n, blocks], half of what one unit of q means.
    """
    n, inputs = value.shape
    blocks = -(-inputs // DENSE_BLOCK)
    padded = np.zeros((n, blocks, DENSE_BLOCK), np.float32)
    padded.reshape(n, -1)[:, :inputs] = value
    m = np.abs(padded).max(axis=-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(m > 0, np.float32(127) / m, np.float32(0))
    q = np.rint(padded * inverse[..., None]).astype(np.int8)
    return q.reshape(n, -1), m / np.float32(127) * np.float32(0.5)


def dense_linear(group: GroupTensors, index: int, x: F32) -> F32:
    """The group's member `index` with all slices read, as prefill does it: f32 [n, out] from x f32 [n, in].

    The inputs become int8 in blocks of DENSE_BLOCK channels; the sums over a block are exact. A row's outliers are
    added up by themselves first.
    """
    linear, slices = group.linears[index], group.slices
    a = x - group.mean.astype(np.float32)
    value = a * group.col_scale.astype(np.float32) * group.shrink[slices - 1]
    value[:, group.exact_channels] = 0
    q, scale = quantise_blocks(value)
    code = unpack_digits(linear.weight, linear.out_features, group.in_features, slices).astype(np.float32)
    middle = np.float32(doubled_centre(group.centres))
    y = np.zeros((len(x), linear.out_features), np.float32)
    for b in range(scale.shape[1]):
        part = slice(b * DENSE_BLOCK, min((b + 1) * DENSE_BLOCK, group.in_features))
        chosen = q[:, part].astype(np.float32)
        doubled = np.float32(2) * (chosen @ code[:, part].T) - middle * chosen.sum(1)[:, None]
        y += doubled * scale[:, b, None]
    return _finish(group, linear, y * np.float32(4.0 ** (1 - slices)), a, outliers_first=True)


def leading_rows(logits: F32, margin: float) -> NDArray[np.bool_]:
    """Which rows of the head are read again: those of tiles with a logit within `margin` of the largest.

    logits: f32 [n, V] -> bool [n, V]. A tile of 256 or 64 rows is one cache line of each channel.
    """
    least = logits.max(axis=-1, keepdims=True) - np.float32(margin)
    again = np.zeros(logits.shape, np.bool_)
    for first, width in tiles(logits.shape[-1]):
        part = slice(first, first + width)
        again[:, part] = logits[:, part].max(axis=-1, keepdims=True) >= least
    return again


def embedding_row(group: GroupTensors, token: int) -> F32:
    """The embedding f32 [in] of a token: row `token` of the group's only member, all slices read."""
    linear, slices = group.linears[0], group.slices
    code = np.zeros(group.in_features, np.int64)
    for digits in row_digits(linear.weight, token, linear.out_features, group.in_features):
        code = 4 * code + digits
    # twice the sum of (digit - its centre) * 4^(S-1-s), a whole number
    doubled = (2 * code - doubled_centre(group.centres)).astype(np.float32)
    unit = np.float32(4.0 ** (1 - slices) / 2)
    row: F32 = doubled * unit * group.col_scale.astype(np.float32) * linear.row_scale[token].astype(np.float32)
    rows, cols, values = linear.outliers()
    mine = rows == token
    row[cols[mine]] = values[mine].astype(np.float32)
    row[group.exact_channels] = linear.exact[:, token].astype(np.float32)
    return row


def row_digits(packed: U8, row: int, out: int, inputs: int) -> U8:
    """Digits u8 [S, in] of one row of a packed weight [S, in * out_pad / 4], read from its tile."""
    first, width = next(t for t in reversed(tiles(out)) if t[0] <= row)
    byte, quarter = (row - first) % (width // 4), (row - first) // (width // 4)
    runs = packed.reshape(len(packed), inputs, -1)
    return np.asarray((runs[:, :, first // 4 + byte] >> np.uint8(2 * quarter)) & 3, np.uint8)


def channel_planes(planes: U8) -> U8:
    """Digits [S, out, in] (`codec.digit_planes`) in channel-major order [S, in, out], contiguous."""
    return np.ascontiguousarray(planes.transpose(0, 2, 1))


def group_bits(group: GroupTensors, levels: I32 | Sequence[I32], ipn: bool = False) -> NDArray[np.int64]:
    """Bits read for a group by each token, i64 [n]: digits by levels i32 [n, in], of all linear layers or of each, and
    all side data.

    ipn: under the rule `ipn`, which has side data of its own.
    """
    each = [levels] * len(group.linears) if isinstance(levels, np.ndarray) else levels
    bits = np.full(len(each[0]), 8 * group.side_bytes(ipn), np.int64)
    for linear, own in zip(group.linears, each, strict=True):
        bits += 2 * linear.out_features * own.sum(axis=-1, dtype=np.int64)
    return bits


def embedding_bits(group: GroupTensors) -> int:
    """Bits read for one embedding row: its digits, the column scales and its row scale."""
    return 2 * group.slices * group.in_features + 8 * (2 * group.in_features + 2)
