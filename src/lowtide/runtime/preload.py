"""What of a runtime image a budget may read: the pages that `--preload` reads before the first token.

A slice that a policy never reads in a group (its threshold there is infinite: rule `channel-norm:0,4` and the third
slice) is left on disk, and so are the tensors of other rules. Two things read every slice: prompts, and looking up a
token's embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowtide.kernels.types import PolicyParams
from lowtide.runtime.memory import read_pages

if TYPE_CHECKING:
    from lowtide.format.centroids import Centroids
    from lowtide.format.groups import GroupTensors
    from lowtide.format.reader import Artifact

SIDE = ("row_scale", "exact", "outlier_ptr", "outlier_row", "outlier_gap", "outlier_value")


def readable_slices(params: PolicyParams, row: int, slices: int) -> int:
    """How many of a group's slices a token may read under a policy, 0 to S; row counts the rows of its thresholds."""
    if params.rule == "dense":
        return slices
    thresholds = params.thresholds[row]
    # topk stores counts, the others thresholds; none is NaN. A channel reads slice s only with all slices before it.
    open_ = thresholds > 0 if params.rule == "topk" else thresholds < np.inf
    return int(np.count_nonzero(np.logical_and.accumulate(open_)))


def readable(artifact: Artifact, params: PolicyParams, prompts: bool = True) -> list[NDArray[Any]]:
    """Arrays of an artifact that tokens may read under a policy.

    Args:
        artifact: an open artifact.
        params: of the budget (`policy_params`); its offset does not matter.
        prompts: prompts are read as well, not only decoded tokens.
    """
    slices, tied = artifact.manifest.slices, artifact.config.tied
    centroids = artifact.centroids() if params.rule == "ipn" else {}
    found: list[NDArray[Any]] = []
    for row, (name, group) in enumerate(artifact.groups.items()):
        looked_up = name == "embed" or (name == "head" and tied)
        found += _middles(group, centroids.get(name), prompts)
        count = slices if prompts or looked_up else readable_slices(params, row, slices)
        found += _side(group, params.rule)
        for linear in group.linears:
            found += [linear.weight[s] for s in range(count)]
            found += [getattr(linear, field) for field in SIDE]
    return found


def _side(group: GroupTensors, rule: str) -> list[NDArray[Any]]:
    """What a group has beside its linear layers, without thresholds, which are copied when a budget is set."""
    own: list[NDArray[Any]] = [group.col_scale, group.shrink, group.exact_channels]
    if rule != "ipn" or group.ipn is None:
        return [*own, group.importance]
    unread = ("ipn_gain", "ipn_centroids", "ipn_step")  # copied, or made tables of
    return own + [tensor for name, tensor in group.ipn.fields().items() if name not in unread]


def _middles(group: GroupTensors, centroids: Centroids | None, prompts: bool) -> list[NDArray[Any]]:
    """What inputs are measured from, and what their layers make of it: of a centroid, where there are any, or of the
    mean, from which prompts are measured always."""
    own: list[NDArray[Any]] = [group.mean, *(linear.bias for linear in group.linears)]
    if centroids is None:
        return own
    return [centroids.mean, *centroids.bias, *(own if prompts else [])]


def preload(artifact: Artifact, params: PolicyParams, prompts: bool = True) -> int:
    """Read into memory what a budget may read (`readable`), page by page; returns bytes."""
    return read_pages(readable(artifact, params, prompts))
