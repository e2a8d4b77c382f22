"""The literal form of the specification: a score for each single weight, for this input.

    importance score -> score > threshold -> binary mask -> mask * weights -> product

Nothing is skipped and nothing is fast here; every faster form is tested against it. Works on numpy and torch.
Legend: x [..., in], weight [out, in], scores and masks [..., out, in], products [..., out].
"""

from __future__ import annotations

from lowtide.rules.arrays import Array, astype, like, namespace


def importance(x: Array, weight: Array) -> Array:
    """The plain score |x_j| * |w_ij|: f32 [..., out, in] from x f32 [..., in] and weight f32 [out, in]."""
    return abs(x)[..., None, :] * abs(weight)


def binary_mask(scores: Array, threshold: Array | float) -> Array:
    """Boolean mask: score > threshold, strictly; the threshold is a number or broadcasts to the scores."""
    return scores > threshold


def masked_product(x: Array, weight: Array, mask: Array) -> Array:
    """y_i = sum_j (mask_ij * w_ij) * x_j: f32 [..., out]; mask bool or 0/1, [..., out, in]."""
    masked = astype(mask, str(weight.dtype).rpartition(".")[2]) * weight
    return (masked * x[..., None, :]).sum(-1)


def literal_linear(x: Array, weight: Array, threshold: Array | float, scores: Array | None = None) -> Array:
    """The specification in one line: product of the weights whose score is above the threshold.

    Args:
        x: f32 [..., in].
        weight: f32 [out, in].
        threshold: number, or an array that broadcasts to the scores.
        scores: [..., out, in] or what broadcasts to it, such as a score for each channel [..., 1, in];
            |x_j| * |w_ij| by default.

    Returns:
        f32 [..., out].
    """
    scores = importance(x, weight) if scores is None else scores
    return masked_product(x, weight, binary_mask(scores, threshold))


def graded_linear(x: Array, weights: Array, levels: Array) -> Array:
    """Every weight of channel j at the precision of its level: y_i = sum_j weights[levels_j]_ij * x_j.

    Args:
        x: f32 [..., in].
        weights: f32 [S + 1, out, in], the weights as read at levels 0..S; level 0 is usually all zero.
        levels: integers [..., in] in 0..S.

    Returns:
        f32 [..., out].
    """
    xp = namespace(x)
    y = xp.zeros_like(x[..., :1] * weights[0, :, 0])
    for level in range(weights.shape[0]):
        chosen = x * astype(levels == level, str(x.dtype).rpartition(".")[2])
        y = y + (weights[level] * chosen[..., None, :]).sum(-1)
    return y


def levels_as_masks(levels: Array, slices: int) -> Array:
    """Which slices of a channel are read: bool [slices, ..., in] from integer levels [..., in]."""
    steps = like(range(slices), levels)
    return levels[None] > steps.reshape(slices, *([1] * levels.ndim))
