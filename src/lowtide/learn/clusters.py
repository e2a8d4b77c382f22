"""Clusters of a group's inputs: a token needs only the product of what is left of its input beside the middle of the
cluster it is in, for what the weights make of the middle is known (`lowtide.format.centroids`).

Which cluster is told by few channels and a linear form for each cluster, the largest of which wins: `Keys`. The keys of
`qkv` serve `o`, those of `gate_up` serve `down`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.compress.products import CPU
from lowtide.format import centroids
from lowtide.format.groups import GroupTensors, IpnTensors

FIELDS = ("centroids", "step", "channels", "keys", "key_scale", "key_bias")
"""Of `IpnTensors`, what clusters are stored as."""


@dataclass
class Keys:
    """channels i64 [C]; weight f32 [K, C]; bias f32 [K]."""

    channels: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def code(self, x: torch.Tensor) -> torch.Tensor:
        """The cluster of every input, i64 [T], from x f32 [T, in]."""
        found: torch.Tensor = (x[:, self.channels] @ self.weight.T + self.bias).argmax(1)
        return found


@dataclass
class Clusters:
    """Of one group.

    stored: the fields of `IpnTensors` that hold them, by name; mean: f32 [K, in], their middles as engines know them;
    bias: f32 [K, out], what the artifact's weights make of them; keys: None where another group's serve.
    """

    stored: dict[str, NDArray[Any]]
    mean: torch.Tensor
    bias: torch.Tensor
    keys: Keys | None

    @classmethod
    def of(cls, group: GroupTensors, stored: dict[str, NDArray[Any]], device: torch.device = CPU) -> Clusters:
        """The clusters that a group's tensors would be stored with, or are."""
        ipn = IpnTensors(group.importance, centroids=stored["centroids"], step=stored["step"])
        made = centroids.make(dataclasses.replace(group, ipn=ipn))
        keys = None
        if "keys" in stored:
            weight = stored["keys"].T.astype(np.float32) * stored["key_scale"][:, None]
            parts = (stored["channels"].astype(np.int64), weight, stored["key_bias"])
            keys = Keys(*(torch.from_numpy(np.array(part)).to(device) for part in parts))
        bias = np.concatenate(made.bias, 1).astype(np.float32)
        mean = made.mean.astype(np.float32)
        return cls(stored, torch.from_numpy(mean).to(device), torch.from_numpy(bias).to(device), keys)


def stored_clusters(group: GroupTensors) -> dict[str, NDArray[Any]]:
    """What an artifact's group holds of its clusters; empty where it has none."""
    if group.ipn is None or group.ipn.centroids is None:
        return {}
    return {field: value for field in FIELDS if (value := getattr(group.ipn, field)) is not None}
