"""What must hold of the tensors' values, checked before native code sees a byte and before the writer stores one.

Shapes, dtypes and names are the manifest's business; here they are taken as right. Every check is vectorised and works
on bit patterns where it can, because float16 arithmetic in numpy is slow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.format import codec
from lowtide.format.groups import GroupTensors, IpnTensors, LinearTensors

_F16_INFINITY = 0x7C00
_F16_NO_SIGN = 0x7FFF


def check_group(group: GroupTensors, policies: list[str], where: str) -> None:
    """Check every value of a group.

    Args:
        group: with the right shapes and dtypes.
        policies: what the first axis of the thresholds means.
        where: file name for errors.

    Raises:
        LowtideError: naming the file and the tensor.
    """
    prefix = f"{where}: tensor lowtide.{group.name}"
    _check_channels(group.exact_channels, group.in_features, f"{prefix}.exact_channels")
    exact = group.exact_channels
    _finite_f16(group.mean, f"{prefix}.mean")
    _positive_f16(group.col_scale, f"{prefix}.col_scale")
    if np.any(group.mean[exact] != 0):
        raise LowtideError(f"{prefix}.mean: must be zero for exact channels")
    _check_importance(group.importance, exact, f"{prefix}.importance")
    if group.ipn is not None:
        _check_ipn(group.ipn, group, prefix)
    if not np.all(np.isfinite(group.shrink) & (group.shrink > 0)):
        raise LowtideError(f"{prefix}.shrink: holds a value that is not finite and above zero")
    if group.name != "embed":
        for policy, table in zip(policies, group.thresholds, strict=True):
            _check_thresholds(table, policy, group.in_features, f"{prefix}.thresholds: policy {policy}")
    for linear in group.linears:
        _check_linear(linear, group, where)


def check_norm(name: str, values: NDArray[np.float32], where: str) -> None:
    """RMSNorm weights must be finite."""
    if not np.all(np.isfinite(values)):
        raise LowtideError(f"{where}: tensor {name}: holds a value that is not finite")


def real_outliers(linear: LinearTensors) -> int:
    """Number of outliers stored, fillers left out."""
    return int(np.count_nonzero(_bits(linear.outlier_value) & _F16_NO_SIGN))


def _check_importance(importance: NDArray[np.float16], exact: NDArray[np.int32], where: str) -> None:
    _finite_f16(importance, where)
    if np.any(importance < 0):
        raise LowtideError(f"{where}: holds a negative value")
    if np.any(importance[exact] != 0):
        raise LowtideError(f"{where}: must be zero for exact channels")


def _check_ipn(ipn: IpnTensors, group: GroupTensors, prefix: str) -> None:
    """The rule `ipn`: any int8 is a probe's weight, a key or a centroid, everything else is finite."""
    _check_importance(ipn.importance, group.exact_channels, f"{prefix}.ipn_importance")
    if ipn.step is not None:
        _check_importance(ipn.step, group.exact_channels, f"{prefix}.ipn_step")
    if ipn.channels is not None:
        _check_channels(ipn.channels, group.in_features, f"{prefix}.ipn_channels")
    if ipn.factor is not None and np.any(ipn.factor <= 0):
        raise LowtideError(f"{prefix}.ipn_factor: must be above zero")
    for field, tensor in ipn.fields().items():
        if tensor.dtype == np.float32 and not np.all(np.isfinite(tensor)):
            raise LowtideError(f"{prefix}.{field}: holds a value that is not finite")


def _check_channels(channels: NDArray[np.int32], inputs: int, where: str) -> None:
    if channels.size and (channels[0] < 0 or channels[-1] >= inputs or np.any(channels[1:] <= channels[:-1])):
        raise LowtideError(f"{where}: must ascend and lie in 0 to {inputs - 1}")


def _check_thresholds(table: NDArray[np.float32], policy: str, inputs: int, where: str) -> None:
    """One policy's [B, S]. topk stores descending counts, statistical-topk z-scores, the others score thresholds."""
    if np.any(np.isnan(table) | (table == -np.inf)):
        raise LowtideError(f"{where}: holds NaN or minus infinity")
    rule = policy.partition(":")[0]
    if rule == "topk":
        if np.any((table < 0) | (table > inputs)):
            raise LowtideError(f"{where}: holds a count outside 0 to {inputs}")
        if np.any(table[:, 1:] > table[:, :-1]):
            raise LowtideError(f"{where}: counts must descend from slice to slice")
        return
    if rule != "statistical-topk" and np.any(table < 0):
        raise LowtideError(f"{where}: holds a negative threshold")
    if np.any(table[:, 1:] < table[:, :-1]):
        raise LowtideError(f"{where}: thresholds must ascend from slice to slice")


def _check_linear(linear: LinearTensors, group: GroupTensors, where: str) -> None:
    prefix = f"{where}: tensor {linear.name}"
    _positive_f16(linear.row_scale, f"{prefix}.row_scale")
    _finite_f16(linear.bias, f"{prefix}.bias")
    _finite_f16(linear.exact, f"{prefix}.exact")
    if not codec.padding_is_zero(linear.weight, linear.out_features, group.in_features):
        raise LowtideError(f"{prefix}.weight: padding rows from {linear.out_features} on hold digits that are not zero")
    _check_outliers(linear, group, prefix)


def _check_outliers(linear: LinearTensors, group: GroupTensors, prefix: str) -> None:
    ptr, row, gap, value = linear.outlier_ptr, linear.outlier_row, linear.outlier_gap, linear.outlier_value
    if ptr[0] != 0 or int(ptr[-1]) != len(value) or np.any(ptr[1:] < ptr[:-1]):
        raise LowtideError(f"{prefix}.outlier_ptr: must rise from 0 to the {len(value)} entries stored")
    if not len(value):
        return
    _finite_f16(value, f"{prefix}.outlier_value")
    tile, rows, cols = codec.outlier_positions(ptr, row, gap, linear.out_features)
    _, widths = np.array(codec.tiles(linear.out_features)).T
    if np.any(rows >= linear.out_features) or np.any(row >= widths[tile]):
        raise LowtideError(f"{prefix}.outlier_row: holds a row outside its tile or the layer")
    if int(cols.max()) >= group.in_features:
        raise LowtideError(f"{prefix}.outlier_gap: leads to column {int(cols.max())} of {group.in_features}")
    is_exact = np.zeros(group.in_features, bool)
    is_exact[group.exact_channels] = True
    filler = (_bits(value) & _F16_NO_SIGN) == 0
    if np.any(is_exact[cols] & ~filler):
        raise LowtideError(f"{prefix}.outlier_gap: an outlier lies in an exact channel")
    _check_order(tile, row, gap, value, filler, prefix)


def _check_order(
    tile: NDArray[np.int64],
    row: NDArray[np.uint8],
    gap: NDArray[np.uint8],
    value: NDArray[np.float16],
    filler: NDArray[np.bool_],
    prefix: str,
) -> None:
    """Entries strictly ascend by column and row within a tile, and fillers are as the writer makes them."""
    same_tile = tile[1:] == tile[:-1]
    if np.any(same_tile & (gap[1:] == 0) & ~filler[:-1] & (row[1:] <= row[:-1])):
        raise LowtideError(f"{prefix}.outlier_row: rows of one column must ascend")
    if np.any(filler & ((gap != codec.MAX_GAP) | (row != 0) | (_bits(value) != 0))):
        raise LowtideError(f"{prefix}.outlier_value: a filler must be +0 with row 0 and gap {codec.MAX_GAP}")
    if filler[-1] or np.any(filler[:-1] & (~same_tile | (gap[1:] == 0))):
        raise LowtideError(f"{prefix}.outlier_gap: a filler must lead to a further column of its tile")


def _bits(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The bit patterns of float16 values; a stored tensor is always contiguous."""
    return values.view(np.uint16)


def _finite_f16(values: NDArray[np.float16], where: str) -> None:
    if values.size and int((_bits(values) & _F16_NO_SIGN).max()) >= _F16_INFINITY:
        raise LowtideError(f"{where}: holds NaN or infinity")


def _positive_f16(values: NDArray[np.float16], where: str) -> None:
    # Zero wraps to the largest value, and everything negative, infinite or NaN lies above the positive numbers.
    if values.size and int((_bits(values) - np.uint16(1)).max()) >= _F16_INFINITY - 1:
        raise LowtideError(f"{where}: holds a scale that is not finite and above zero")
