"""The importance as a multiplier of the weights when an artifact is loaded.

The first specification of importance vectors lets a loader use them so. A column read at full length is already the
model's own, so a multiplier other than 1 trades fidelity for emphasis; benchmarks/static.py measures what that costs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from lowtide.errors import LowtideError
from lowtide.format.groups import GroupTensors
from lowtide.format.reader import Artifact

MAX_POWER = 4.0


def with_importance(artifact: Artifact, power: float) -> Artifact:
    """An open artifact whose weights are multiplied by their columns' importance; see `with_multiplier`."""
    if power == 0:
        return artifact
    return replace(artifact, groups={name: with_multiplier(group, power) for name, group in artifact.groups.items()})


def with_multiplier(group: GroupTensors, power: float) -> GroupTensors:
    """A group whose column j is multiplied by (v_j / g)^power, g the geometric mean of the importances above zero.

    Columns without importance (exact channels) and tables that are only looked up stay as they are; a power of 0 gives
    the group itself.

    Raises:
        LowtideError: a power that is not finite or beyond 4 in size.
    """
    if not math.isfinite(power) or abs(power) > MAX_POWER:
        raise LowtideError(f"--importance-multiplier {power:g}: must lie between -{MAX_POWER:g} and {MAX_POWER:g}")
    if power == 0 or group.name in ("head", "embed"):
        return group
    importance = group.importance.astype(np.float64)
    known = importance > 0
    if not known.any():
        return group
    factor = np.ones(len(importance))
    factor[known] = (importance[known] / np.exp(np.log(importance[known]).mean())) ** power
    scale = np.clip(group.col_scale * factor, 2.0**-14, 65504.0).astype(np.float16)
    return replace(group, col_scale=scale)
