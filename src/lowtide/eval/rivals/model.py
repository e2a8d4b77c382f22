"""The compressed model, whole windows at a time, with a rival's plan in place of a mask rule.

The arithmetic of a product is that of `lowtide.compress.masked`; rows may be read in part, and where all channels that
are read have the same level one matrix product takes the place of one for each slice (the same integers, summed first).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lowtide.arch import LAYER_NORMS, norm_specs
from lowtide.compress.dense import decoder_block, rms_norm, rope_tables
from lowtide.compress.masked import MaskedModel
from lowtide.eval.rivals.base import BlockState, Plan
from lowtide.format.groups import GroupTensors
from lowtide.format.reader import Artifact
from lowtide.rules import RULES

CHUNK_TOKENS = 1024
"""Tokens computed at a time: activations of so many stay small beside the weights."""


class RivalModel(MaskedModel):
    """`parts[group]`: the rows of each member layer; `body`: names of the groups of all blocks."""

    def __init__(self, artifact: Artifact, quantise_coefficients: bool = True) -> None:
        norms = {name: artifact.tensor(name) for name, _ in norm_specs(artifact.config)}
        super().__init__(artifact.config, artifact.groups, norms, quantise_coefficients)
        self.parts = {name: _rows(group) for name, group in artifact.groups.items()}
        self.body = [name for name in self.groups if name not in ("head", "embed")]
        self.body_weights = sum(self.weights(name) for name in self.body)
        self.all_weights = sum(self.weights(name) for name in self.groups)
        table = self.groups["head" if self.config.tied else "embed"]
        self.embedding_bits = 2 * len(table.planes) * self.config.hidden_size + 16 * self.config.hidden_size + 16
        """Of one row of the table: digits, column scales, the row's scale."""

    def weights(self, name: str) -> int:
        """Weights of a group."""
        _, out, inputs = self.groups[name].planes.shape
        return out * inputs

    def readable(self, name: str) -> int:
        """Channels of a group that are not exact."""
        group = self.groups[name]
        return group.planes.shape[2] - len(group.exact_channels)

    @torch.no_grad()
    def states(self, ids: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, float]:
        """ids i64 [B, N] -> (the head's input f32 [B, N, D], mean bits read per token and body weight)."""
        step = max(1, CHUNK_TOKENS // ids.shape[1])
        parts, read = [], 0.0
        for rows in ids.split(step):
            x, bits = self._states(rows, plan)
            parts.append(x)
            read += bits
        side = sum(plan.side_bits(self, name) for name in self.body)
        return torch.cat(parts), (read / ids.numel() + side) / self.body_weights

    def _states(self, ids: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, float]:
        rope = rope_tables(self.config, 0, ids.shape[1])
        x = F.embedding(ids, self.embedding)
        read = 0.0
        for index in range(self.config.num_layers):
            block: BlockState = {}

            def apply(name: str, x: torch.Tensor, index: int = index, block: BlockState = block) -> torch.Tensor:
                nonlocal read
                block[name] = x
                y, bits = plan.product(self, f"layers.{index}.{name}", x, block)
                read += float(bits.sum(dtype=torch.float64))
                if name == "gate_up":
                    block["gate"] = F.silu(y.chunk(2, -1)[0])
                return y

            before, after = (self.norms[f"model.layers.{index}.{name}"] for name in LAYER_NORMS)
            x = decoder_block(self.config, (before, after), x, apply, rope)
        return rms_norm(x, self.norms["model.norm.weight"], self.config.rms_eps), read

    @torch.no_grad()
    def head(self, x: torch.Tensor, params: NDArray[np.float32]) -> tuple[torch.Tensor, torch.Tensor]:
        """x f32 [..., D] -> (logits f32 [..., V], bits f32 [...]), read by the rule channel-norm with params f32 [S].

        Bits are those of the head, side data included, and of the embedding row.
        """
        group = self.groups["head"]
        levels = RULES["channel-norm"].levels(group.stats, x, torch.from_numpy(np.array(params, np.float32)))
        y, bits = self.read("head", x, levels)
        return y, bits + (group.side_bits + self.embedding_bits)

    def read(
        self, name: str, x: torch.Tensor, levels: torch.Tensor, rows: slice | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A group's layers, or those rows of them, with the given levels.

        x f32 [..., in], levels i32 [..., in] -> (y f32 [..., rows], bits of digits read f32 [...]).
        """
        group = self.groups[name]
        rows = rows or slice(0, group.out)
        if group.stats.exact is not None:
            levels = torch.where(group.stats.exact, 0, levels)
        a = x - group.stats.mean
        gamma = torch.cat([torch.zeros(1), group.shrink])[levels.long()]
        base = a * group.col_scale * gamma
        top = int(levels.max())
        y = group.bias[rows] + F.linear(a, group.outliers[rows])
        if top and bool(((levels == 0) | (levels == top)).all()):
            total = F.linear(self._round(base), self._sum_of_planes(name, top, rows))
            y += total * group.row_scale[rows]
        elif top:
            values = self._coefficients(base, levels, len(group.planes))[:top]
            total = sum((F.linear(v, group.planes[s][rows]) for s, v in enumerate(values)), torch.zeros(()))
            y += total * group.row_scale[rows]
        if len(group.exact_channels):
            y += x[..., group.exact_channels] @ group.exact[:, rows]
        return y, 2.0 * levels.sum(-1, dtype=torch.float32) * (rows.stop - rows.start)

    def _sum_of_planes(self, name: str, level: int, rows: slice) -> torch.Tensor:
        planes = self.groups[name].planes
        return sum((planes[s][rows] * 4.0**-s for s in range(1, level)), planes[0][rows])

    def _round(self, base: torch.Tensor) -> torch.Tensor:
        """8-bit coefficients of channels that are all read at one level: every slice is then a class of its own, and
        all classes round to the same integers."""
        if not self.quantise_coefficients:
            return base
        unit = (base.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
        return (base / unit).round() * unit

    def full_levels(self, name: str, x: torch.Tensor, level: int) -> torch.Tensor:
        """One level for every channel of x [..., in]: i32 [..., in]."""
        return torch.full(x.shape, level, dtype=torch.int32)


def _rows(group: GroupTensors) -> tuple[slice, ...]:
    found, first = [], 0
    for linear in group.linears:
        found.append(slice(first, first + linear.out_features))
        first += linear.out_features
    return tuple(found)


def threshold_of(params: Mapping[str, NDArray[np.float32]], name: str) -> torch.Tensor:
    """A group's thresholds f32 [S] as a tensor."""
    return torch.from_numpy(np.array(params[name], np.float32))
