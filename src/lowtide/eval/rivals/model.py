"""The compressed model, whole windows at a time, with a rival's plan in place of a mask rule.

The arithmetic of a product is that of `lowtide.compress.masked`, in integers as engines do it, ten times faster than
in floats; rows may be read in part.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lowtide.arch import LAYER_NORMS, norm_specs
from lowtide.compress.dense import decoder_block, rms_norm, rope_tables
from lowtide.compress.masked import MaskedModel, coefficient_unit
from lowtide.compress.products import int8_product
from lowtide.eval.rivals.base import BlockState, Plan
from lowtide.format.groups import GroupTensors
from lowtide.format.reader import Artifact
from lowtide.rules import RULES

CHUNK_TOKENS = 1024
"""Tokens computed at a time: activations of so many stay small beside the weights."""
SUMMED_SLICES = 3
"""Slices whose weighed sum fits in int8: 3 * (1 + 4 + 16) = 63 twice the distance from the centre."""


class RivalModel(MaskedModel):
    """`parts[group]`: the rows of each member layer; `body`: names of the groups of all blocks."""

    def __init__(self, artifact: Artifact, quantise_coefficients: bool = True) -> None:
        norms = {name: artifact.tensor(name) for name, _ in norm_specs(artifact.config)}
        super().__init__(artifact.config, artifact.groups, norms, quantise_coefficients, artifact.centroids())
        self.parts = {name: _rows(group) for name, group in artifact.groups.items()}
        self.body = [name for name in self.groups if name not in ("head", "embed")]
        self.body_weights = sum(self.weights(name) for name in self.body)
        self._int8: dict[tuple[str, int, int, int], torch.Tensor] = {}
        self._sparse: dict[tuple[str, int, int], torch.Tensor] = {}
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
        flat, level = a.reshape(-1, a.shape[-1]), levels.reshape(-1, a.shape[-1])
        y = (self._outliers(name, rows) @ flat.T).T + group.bias[rows]
        gamma = torch.cat([torch.zeros(1), group.shrink])[level]
        total = (self._integers if self.quantise_coefficients else self._floats)(
            name, flat * group.col_scale * gamma, level, rows
        )
        y = (y + total * group.row_scale[rows]).view(*x.shape[:-1], -1)
        if len(group.exact_channels):
            y = y + x[..., group.exact_channels] @ group.exact[:, rows]
        return y, 2.0 * levels.sum(-1, dtype=torch.float32) * (rows.stop - rows.start)

    def _floats(self, name: str, base: torch.Tensor, levels: torch.Tensor, rows: slice) -> torch.Tensor:
        """sum_s 4^-s * base * (d_s - centre) over the slices read, f32 [n, rows], coefficients not rounded."""
        total = torch.zeros(len(base), rows.stop - rows.start)
        for s in range(int(levels.max())):
            total += F.linear(torch.where(levels > s, base * 4.0**-s, 0.0), self.groups[name].planes[s][rows])
        return total

    def _integers(self, name: str, base: torch.Tensor, levels: torch.Tensor, rows: slice) -> torch.Tensor:
        """The same with coefficients of 8 bits for each class k = level - s - 1, multiplied as integers.

        Where all channels that are read have one level, each slice is a class of its own and all classes round to the
        same integers, so that the slices can be summed first.
        """
        top = int(levels.max())
        if top == 0:
            return torch.zeros(len(base), rows.stop - rows.start)
        members = [(levels == level).to(torch.int8) for level in range(1, top + 1)]
        sizes = [(base * member).abs() for member in members]
        peaks, sums = torch.stack([v.amax(-1) for v in sizes]), torch.stack([v.sum(-1) for v in sizes])  # [top, n]
        counts = torch.stack([member.sum(-1) for member in members])
        if top <= SUMMED_SLICES and not bool(peaks[:-1].any()):
            unit = coefficient_unit(peaks[-1], sums[-1], counts[-1])[:, None]
            whole = (base / unit).round()
            return _multiply(whole, self._digits(name, rows, top)) * (unit * (0.5 * 4.0 ** (1 - top)))
        scale = torch.tensor([4.0**-s for s in range(top)])[:, None]
        units = []
        for k in range(top):
            own, quarters = slice(k, None), scale[: top - k]
            largest, total_size = (peaks[own] * quarters).amax(0), (sums[own] * quarters).sum(0)
            units.append(coefficient_unit(largest, total_size, counts[own].sum(0)))
        stacked, total = self._digits(name, rows, 0), torch.zeros(len(base), rows.stop - rows.start)
        parts: list[list[torch.Tensor]] = [[] for _ in range(top)]
        for s in range(top):
            factors = [torch.zeros(len(base))] * (s + 1) + [4.0**-s / units[k] for k in range(top - s)]
            whole = (base * torch.stack(factors, -1).gather(-1, levels.long())).round()
            for k in range(top - s):
                parts[k].append(whole * members[s + k])
        for k, (unit, part) in enumerate(zip(units, parts, strict=True)):
            total += _multiply(torch.cat(part, -1), stacked[: (top - k) * base.shape[1]]) * (0.5 * unit)[:, None]
        return total

    def _digits(self, name: str, rows: slice, level: int) -> torch.Tensor:
        """2 (d - centre) as int8: all slices, one below the other, [S * in, rows]; or, with a level, their sum
        weighed by 4^(level - 1 - s), [in, rows]."""
        key = (name, rows.start, rows.stop, level)
        if key not in self._int8:
            planes = self.groups[name].planes[:, rows]
            if level:
                weights = torch.tensor([2 * 4.0 ** (level - 1 - s) for s in range(level)])
                made = torch.einsum("s,soi->io", weights, planes[:level])
            else:
                made = (2 * planes).transpose(1, 2).reshape(-1, rows.stop - rows.start)
            self._int8[key] = made.to(torch.int8).contiguous()
        return self._int8[key]

    def _outliers(self, name: str, rows: slice) -> torch.Tensor:
        """The outliers of those rows, sparse f32 [rows, in]."""
        key = (name, rows.start, rows.stop)
        if key not in self._sparse:
            self._sparse[key] = self.groups[name].outliers[rows].to_sparse()
        return self._sparse[key]

    def full_levels(self, name: str, x: torch.Tensor, level: int) -> torch.Tensor:
        """One level for every channel of x [..., in]: i32 [..., in]."""
        return torch.full(x.shape, level, dtype=torch.int32)


def _multiply(coefficients: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """Whole numbers f32 [n, in] times int8 [in, out], summed exactly, as f32 [n, out].

    Those beyond the range of int8 are few: what is left of them, in units of 127, is multiplied apart.
    """
    more = (coefficients / 127).trunc_()
    product = int8_product((coefficients - 127 * more).to(torch.int8), digits).float()
    columns = more.any(0).nonzero()[:, 0]
    if len(columns):
        product += 127 * _multiply(more[:, columns], digits[columns])
    return product


def _rows(group: GroupTensors) -> tuple[slice, ...]:
    found, first = [], 0
    for linear in group.linears:
        found.append(slice(first, first + linear.out_features))
        first += linear.out_features
    return tuple(found)


def threshold_of(params: Mapping[str, NDArray[np.float32]], name: str) -> torch.Tensor:
    """A group's thresholds f32 [S] as a tensor."""
    return torch.from_numpy(np.array(params[name], np.float32))
