"""The graded model with its weights shared out over processes, by torch's FSDP2 (`fully_shard`).

A process keeps its rows of every matrix under training, of their gradients and of Adam's moments. A decoder block's
weights are gathered before its forward pass and again before its backward pass, and freed after each; gradients are
averaged over the processes as they are scattered to the rows' owners. Slices are coded from the gathered weights,
matrix by matrix, twice a step: before the product, and again on the way back. Blocks are made one after the other, so
no process ever holds all of them.

Whole in every process: what a token looks up (embedding and head), the importance prediction network, the outliers.
The library moves no tensor between devices here: everything is in the processors' memory, the processes talk over gloo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lowtide.arch import GROUPS
from lowtide.compress.dense import DenseModel
from lowtide.format.reader import Artifact
from lowtide.learn.digits import Code
from lowtide.learn.graded import GradedModel, Masks
from lowtide.learn.graded_group import GradedGroup
from lowtide.learn.slices import FloatSlices, Slices


class ShardedModel(GradedModel):
    """A `GradedModel` under joint training. All processes must call `hidden`, and in the same order.

    Args:
        artifact, dense: as for `GradedModel`.
        mesh: the processes, in one row.
        free: whether a block's weights are freed between its forward and its backward pass.
    """

    def __init__(self, artifact: Artifact, dense: DenseModel, mesh: DeviceMesh, free: bool = True) -> None:
        self._blocks: list[nn.Module] = []
        self._how: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": free}
        super().__init__(artifact, dense, train_weights=True)
        self._whole = _Whole(self, self._blocks, self.last)
        # Explicitly: by default the outermost module keeps its weights, and sharding must be over between passes.
        fully_shard(self._whole, mesh=mesh, reshard_after_forward=True)

    def _added(self, index: int) -> None:
        for kind in GROUPS:
            name = f"layers.{index}.{kind}"
            self.groups[name] = _thin(self.groups[name], self.codes[name])
        block = _Block(self, index)
        fully_shard(block, **self._how)
        self._blocks.append(block)

    def refresh(self) -> None:
        """Nothing: weights are coded when they are gathered."""

    def hidden(self, ids: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GradedModel.hidden`."""
        found: tuple[torch.Tensor, torch.Tensor] = self._whole(ids, masks)
        return found

    def block(
        self, index: int, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], masks: Masks
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GradedModel.block`."""
        found: tuple[torch.Tensor, torch.Tensor] = self._blocks[index](x, rope, masks)
        return found


class _Block(nn.Module):
    """A decoder block's parameters, whole while `forward` runs and while gradients pass back through it."""

    def __init__(self, model: GradedModel, index: int) -> None:
        super().__init__()
        self._model, self._index = model, index
        self.norms = model.norms[index]
        for kind in GROUPS:
            self.add_module(kind, model.groups[f"layers.{index}.{kind}"].learned)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], masks: Masks
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return GradedModel.block(self._model, self._index, x, rope, masks)


class _Whole(nn.Module):
    """All blocks and the last norm."""

    def __init__(self, model: GradedModel, blocks: list[nn.Module], last: nn.ParameterList) -> None:
        super().__init__()
        self._model = model
        self.blocks, self.last = nn.ModuleList(blocks), last

    def forward(self, ids: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
        return GradedModel.hidden(self._model, ids, masks)


@dataclass
class _ThinGroup(GradedGroup):
    """A group that holds no digits."""

    code: Code | None = None
    thin = True

    def coded(self, *parameters: torch.Tensor | None) -> tuple[Slices, torch.Tensor, torch.Tensor]:
        """Made from the parameters, which are whole."""
        assert self.code is not None
        return self.code.of(*parameters)


def _thin(group: GradedGroup, code: Code) -> GradedGroup:
    """The group without what its weights tell."""
    code.thin()
    nothing = FloatSlices(torch.empty(0), 0)
    fields = (group.rows, group.cols, group.always, group.stored_bias, group.mean, group.side_bits, group.outs)
    return _ThinGroup(group.name, nothing, *fields, learned=group.learned, code=code)
