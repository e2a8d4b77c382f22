"""The digits of a group as a function of its weights, under training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lowtide.compress.products import CPU, product_type, products
from lowtide.format.groups import GroupTensors
from lowtide.learn.slices import MOST_SLICES, FloatSlices, IntegerSlices, Slices, chunks


class Code:
    """The digits of one group as a function of its weights, on a device: fixed scales, outliers and shrink factors.

    With K = sum_s t_s 4^-s the code of w is `q = round((w / (r c) + K) 4^(S-1))`, and level L stands for
    `r c gamma_L (floor(q / 4^(S-L)) 4^(1-L) - sum_{s<L} t_s 4^-s)`.
    """

    def __init__(self, group: GroupTensors, device: torch.device = CPU) -> None:
        self.slices = group.slices
        rows = np.concatenate([g.row_scale.astype(np.float32) for g in group.linears])
        self.rows = torch.from_numpy(rows)[:, None].to(device)
        self.cols = torch.from_numpy(group.col_scale.astype(np.float32)).to(device)
        self._base = self.rows, self.cols
        self.shrink = [float(s) for s in group.shrink]
        self.centres = group.centres
        halves = [c / 2 for c in group.centres]
        self.offsets = [sum(t * 4.0**-s for s, t in enumerate(halves[: n + 1])) for n in range(self.slices)]
        self.stored = torch.from_numpy(group.codes()).to(device)
        self.fixed = torch.from_numpy(group.beside()).to(device)  # training leaves these alone
        self._places = self.fixed.flatten().nonzero()[:, 0]
        self._kept = self.stored.flatten()[self._places]
        self._ends: list[int] = []

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

    def coded(self, digits: torch.Tensor) -> Slices:
        """Slices of codes u8 [out, in]."""
        made, fill = self._begin(digits)
        for part in chunks(digits):
            fill(digits[part].float(), part)
        return made

    def _begin(self, of: torch.Tensor) -> tuple[Slices, Callable[[torch.Tensor, slice], None]]:
        """Slices of [out, in] to be filled, some rows' codes f32 at a time, in the type that products run in."""
        out, inputs = of.shape
        if products().integers and self.slices <= MOST_SLICES:
            digits = of.new_empty(out, self.slices * inputs, dtype=torch.int8)
            return IntegerSlices(digits, self.shrink), lambda q, part: self._fill_digits(q, digits[part])
        planes = of.new_empty(out, self.slices * inputs, dtype=product_type())
        return FloatSlices(planes, self.slices), lambda q, part: self._fill_planes(q, planes[part])

    def _fill_digits(self, q: torch.Tensor, digits: torch.Tensor) -> None:
        """2 (d - t) of every slice, times 4^(S - 1 - s), [rows, S * in]."""
        before: torch.Tensor | None = None
        for level, (slot, centre) in enumerate(zip(digits.chunk(self.slices, 1), self.centres, strict=True), 1):
            upto = (q * 4.0 ** (level - self.slices)).floor_()
            own = upto if before is None else upto - 4 * before
            slot.copy_((2 * own - centre) * 4.0 ** (self.slices - level))
            before = upto

    def _fill_planes(self, q: torch.Tensor, planes: torch.Tensor) -> None:
        """What every slice adds, [rows, S * in]."""
        last: torch.Tensor | None = None
        for level, plane in enumerate(planes.chunk(self.slices, 1), 1):
            shrink = self.shrink[level - 1]
            value = (q * 4.0 ** (level - self.slices)).floor_().mul_(4.0 ** (1 - level) * shrink)
            value.sub_(self.offsets[level - 1] * shrink)
            plane.copy_(value if last is None else value - last)
            last = value

    def of(self, *parameters: torch.Tensor | None) -> tuple[Slices, torch.Tensor, torch.Tensor]:
        """Slices and scales, f32 [out] and [in], of a weight f32 [out, in], its log_rows and log_cols."""
        weight, log_rows, log_cols = parameters
        assert weight is not None and log_rows is not None and log_cols is not None
        self.rescale_by(log_rows, log_cols)
        made, fill = self._begin(weight)
        inputs, parts = weight.shape[1], chunks(weight)
        if len(self._ends) != len(parts):
            stops = torch.tensor([part.stop * inputs for part in parts])
            self._ends = torch.searchsorted(self._places.cpu(), stops).tolist()
        ends = self._ends
        for part, first, last in zip(parts, [0, *ends], ends, strict=False):
            q = self._coded(weight[part])
            q.view(-1).index_copy_(0, self._places[first:last] - part.start * inputs, self._kept[first:last].float())
            fill(q, part)
        return made, self.rows[:, 0], self.cols
