"""The digits of a group as a function of its weights, under training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lowtide.format import codec
from lowtide.format.groups import GroupTensors

HALF = torch.bfloat16
"""What products run in."""


class Code:
    """The digits of one group as a function of its weights: fixed scales, outliers and shrink factors.

    With K = sum_s t_s 4^-s the code of w is `q = round((w / (r c) + K) 4^(S-1))`, and level L stands for
    `r c gamma_L (floor(q / 4^(S-L)) 4^(1-L) - sum_{s<L} t_s 4^-s)`.
    """

    def __init__(self, group: GroupTensors) -> None:
        self.slices = group.slices
        self.rows = torch.from_numpy(np.concatenate([g.row_scale.astype(np.float32) for g in group.linears]))[:, None]
        self.cols = torch.from_numpy(group.col_scale.astype(np.float32))
        self._base = self.rows, self.cols
        self.shrink = [float(s) for s in group.shrink]
        halves = [c / 2 for c in group.centres]
        self.offsets = [sum(t * 4.0**-s for s, t in enumerate(halves[: n + 1])) for n in range(self.slices)]
        parts = [
            codec.unpack_digits(linear.weight, linear.out_features, group.in_features, group.slices)
            for linear in group.linears
        ]
        self.stored = torch.from_numpy(np.concatenate(parts))
        fixed = np.concatenate([_fixed(group, i) for i in range(len(group.linears))])
        self.fixed = torch.from_numpy(fixed)
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def thin(self) -> None:
        """Keep the few stored digits that training leaves alone, with their places; `units` has had its turn."""
        places = self.fixed.flatten().nonzero()[:, 0]
        self._kept = places, self.stored.flatten()[places]
        self.stored, self.fixed = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.bool)

    def digits(self, units: torch.Tensor) -> torch.Tensor:
        """Weights in units of scales f32 [out, in] -> codes u8 [out, in]; outliers and exact columns keep theirs."""
        steps = 4.0 ** (self.slices - 1)
        q = (units + self.offsets[-1]).mul_(steps).round_()
        q = q.clamp_(0, 4 * steps - 1).to(torch.uint8)
        if self._kept is None:
            return torch.where(self.fixed, self.stored, q)
        q.view(-1)[self._kept[0]] = self._kept[1]
        return q

    def units(self) -> torch.Tensor:
        """What the stored digits say, in units of scales f32 [out, in]; `digits` gives them back."""
        return self.stored.float().mul_(4.0 ** (1 - self.slices)).sub_(self.offsets[-1])

    def rescale(self, rows: torch.Tensor, cols: torch.Tensor) -> None:
        """New scales f32 [out, 1] and [in], rounded to float16, which is what is stored."""
        self.rows, self.cols = rows.half().float(), cols.half().float()

    def rescale_by(self, log_rows: torch.Tensor, log_cols: torch.Tensor) -> None:
        """The scales of the file times exp of what is learned, f32 [out] and [in]."""
        rows, cols = self._base
        self.rescale(rows * log_rows.exp()[:, None], cols * log_cols.exp())

    def planes(self, digits: torch.Tensor) -> list[torch.Tensor]:
        """What every slice adds: S bfloat16 [out, in]."""
        found: list[torch.Tensor] = []
        last: torch.Tensor | None = None
        whole = digits.float()
        for level in range(1, self.slices + 1):
            top = (whole / 4.0 ** (self.slices - level)).floor_()
            value = top.mul_(4.0 ** (1 - level)).sub_(self.offsets[level - 1]).mul_(self.shrink[level - 1])
            found.append((value if last is None else value - last).mul(self.cols).mul_(self.rows).to(HALF))
            last = value
        return found

    def of(self, *parameters: torch.Tensor | None) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Planes, and scales f32 [out, in], of a weight f32 [out, in], log_rows f32 [out] and log_cols f32 [in]."""
        weight, log_rows, log_cols = parameters
        assert weight is not None and log_rows is not None and log_cols is not None
        self.rescale_by(log_rows, log_cols)
        return self.planes(self.digits(weight)), self.rows * self.cols


def _fixed(group: GroupTensors, index: int) -> np.ndarray[Any, Any]:
    """bool [out, in]: weights that training leaves alone, for they are stored exactly beside the digits."""
    linear = group.linears[index]
    mask = np.zeros((linear.out_features, group.in_features), bool)
    rows, cols, _ = linear.outliers()
    mask[rows, cols] = True
    mask[:, group.exact_channels] = True
    return mask
