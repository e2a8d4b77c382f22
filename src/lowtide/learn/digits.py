"""The digits of a group as a function of its weights, under training."""

from __future__ import annotations

import numpy as np
import torch

from lowtide.compress.products import product_type
from lowtide.format.groups import GroupTensors

CHUNK = 1 << 16
"""Values that elementwise passes take at a time: from memory they would cost as much as the products."""


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
        self.stored = torch.from_numpy(group.codes())
        self.fixed = torch.from_numpy(group.beside())  # training leaves these alone
        self._places = self.fixed.flatten().nonzero()[:, 0]
        self._kept = self.stored.flatten()[self._places]

    def thin(self) -> None:
        """Keep the few stored digits that training leaves alone, with their places; `units` has had its turn."""
        self.stored, self.fixed = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.bool)

    def digits(self, units: torch.Tensor) -> torch.Tensor:
        """Weights in units of scales f32 [out, in] -> codes u8 [out, in]; outliers and exact columns keep theirs."""
        q = self._coded(units).to(torch.uint8)
        q.view(-1)[self._places] = self._kept
        return q

    def _coded(self, units: torch.Tensor) -> torch.Tensor:
        """Codes f32 of any rows, as if there were no outliers."""
        steps = 4.0 ** (self.slices - 1)
        return (units + self.offsets[-1]).mul_(steps).round_().clamp_(0, 4 * steps - 1)

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

    def planes(self, digits: torch.Tensor) -> torch.Tensor:
        """What every slice adds, in units of the scales: [out, S * in], slices side by side."""
        found = torch.empty(len(digits), self.slices * len(self.cols), dtype=product_type())
        for part in chunks(*digits.shape):
            self._fill(digits[part].float(), found[part])
        return found

    def _fill(self, q: torch.Tensor, planes: torch.Tensor) -> None:
        """Planes of some rows' codes f32."""
        last: torch.Tensor | None = None
        for level, plane in enumerate(planes.chunk(self.slices, 1), 1):
            shrink = self.shrink[level - 1]
            value = (q * 4.0 ** (level - self.slices)).floor_().mul_(4.0 ** (1 - level) * shrink)
            value.sub_(self.offsets[level - 1] * shrink)
            plane.copy_(value if last is None else value - last)
            last = value

    def of(self, *parameters: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Planes and scales, f32 [out] and [in], of a weight f32 [out, in], its log_rows and log_cols."""
        weight, log_rows, log_cols = parameters
        assert weight is not None and log_rows is not None and log_cols is not None
        self.rescale_by(log_rows, log_cols)
        out, inputs = weight.shape
        planes = torch.empty(out, self.slices * inputs, dtype=product_type())
        parts = chunks(out, inputs)
        ends = torch.searchsorted(self._places, torch.tensor([part.stop * inputs for part in parts])).tolist()
        for part, first, last in zip(parts, [0, *ends], ends, strict=False):
            q = self._coded(weight[part])
            q.view(-1).index_copy_(0, self._places[first:last] - part.start * inputs, self._kept[first:last].float())
            self._fill(q, planes[part])
        return planes, self.rows[:, 0], self.cols


def chunks(rows: int, columns: int) -> list[slice]:
    """Runs of rows so few that several passes over them in float32 stay in a core's cache."""
    count = max(1, CHUNK // columns)
    return [slice(first, min(first + count, rows)) for first in range(0, rows, count)]
