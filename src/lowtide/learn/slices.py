"""Products with the slices of a group's digits, each token reading its own levels: forward, and back.

With E_s = 2 (d_s - t_s) the doubled centred digits of slice s, level L of a weight stands for
`gamma_L sum_{s<L} 4^-s E_s / 2` in units of its scales. Slice k adds the difference of levels k + 1 and k.

`FloatSlices` hold what every slice adds and are the specification. `IntegerSlices` hold E_s, a quarter of the bytes,
and multiply in int8, four times as fast on processors with VNNI: a token's coefficients are rounded to 8 bits, as
engines round them (by classes of channels, which is finer), its gradient to two times 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from lowtide.compress.products import int8_product

CHUNK = 1 << 16
"""Values that elementwise passes of processors take at a time: from memory they would cost as much as the products."""
MOST_SLICES = 3
"""Whose digits, times 4^(S - 1 - s), fit int8: 6 * 16 at most."""
LARGEST, FINER = 127, 254
"""Of int8, and by how much the gradient's second digits are finer: they reach half a unit of the first ones."""
TINY = 1e-30
Moved = Callable[[slice], list[torch.Tensor]]
"""For some tokens what the gradient says of each slice's coefficients, S times f32 [n, in]."""


class Slices(Protocol):
    """Of one group, in units of its scales."""

    def read(
        self, a: torch.Tensor, cols: torch.Tensor, score: torch.Tensor, cuts: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """a f32 [T, in] times column scales f32 [in], slice s read where score f32 [T, in] > cuts[s], which ascend ->
        (y f32 [T, out], slices open f32 [T])."""
        ...

    def back(self, g: torch.Tensor) -> Moved:
        """The way back of a gradient f32 [T, out]."""
        ...

    def part(self, rows: slice) -> Slices:
        """Those of some rows."""
        ...


class FloatSlices:
    """planes [out, S * in], float32 or bfloat16: what every slice adds, side by side."""

    def __init__(self, planes: torch.Tensor, count: int) -> None:
        self.planes, self.count = planes, count

    def read(
        self, a: torch.Tensor, cols: torch.Tensor, score: torch.Tensor, cuts: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Slices`. All slices are one product."""
        read, count = self.planes.new_empty(len(a), self.planes.shape[1]), a.new_zeros(len(a))
        for part in chunks(a):
            scaled = a[part] * cols
            mask = torch.empty_like(scaled)
            for t, slot in zip(cuts, read[part].chunk(self.count, 1), strict=True):
                count[part] += torch.gt(score[part], t, out=mask).sum(1)
                slot.copy_(mask.mul_(scaled))
        return F.linear(read, self.planes).float(), count

    def back(self, g: torch.Tensor) -> Moved:
        """See `Slices`."""
        passed = g.to(self.planes.dtype) @ self.planes
        return lambda part: [slot.float() for slot in passed[part].chunk(self.count, 1)]

    def part(self, rows: slice) -> FloatSlices:
        """See `Slices`."""
        return FloatSlices(self.planes[rows], self.count)


class IntegerSlices:
    """digits int8 [out, S * in]: E_s 4^(S - 1 - s), slices side by side; shrink: gamma of every level.

    Slices share a token's coefficients. What is rounded off counts 4^-s as much in slice s, as do its digits.
    """

    def __init__(self, digits: torch.Tensor, shrink: list[float]) -> None:
        self.digits, self.shrink = digits, shrink
        self._unit = 0.5 * 4.0 ** (1 - len(shrink))

    def read(
        self, a: torch.Tensor, cols: torch.Tensor, score: torch.Tensor, cuts: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Slices`."""
        count, units = a.new_zeros(len(a)), a.new_empty(len(a), 1)
        read = self.digits.new_empty(len(a), self.digits.shape[1])
        steps = [g - before for g, before in zip(self.shrink, [0.0, *self.shrink], strict=False)]
        for part in chunks(a):
            masks = [torch.gt(score[part], t).float() for t in cuts]
            whole = torch.zeros_like(masks[0])
            for mask, step in zip(masks, steps, strict=True):
                whole.add_(mask, alpha=step)
                count[part] += mask.sum(1)
            whole.mul_(a[part]).mul_(cols)
            torch.div(whole.abs().amax(1, keepdim=True).clamp_min_(TINY), LARGEST, out=units[part])
            whole.div_(units[part]).round_()
            for mask, slot in zip(masks, read[part].chunk(len(cuts), 1), strict=True):
                slot.copy_(mask.mul_(whole))
        return int8_product(read, self.digits.T).float().mul_(units.mul_(self._unit)), count

    def part(self, rows: slice) -> IntegerSlices:
        """See `Slices`."""
        return IntegerSlices(self.digits[rows], self.shrink)

    def back(self, g: torch.Tensor) -> Moved:
        """See `Slices`."""
        tokens = len(g)
        unit = g.abs().amax(1, keepdim=True).clamp_min_(TINY).div_(LARGEST)
        both = self.digits.new_empty(2 * tokens, g.shape[1])
        for part in chunks(g):
            scaled = g[part] / unit[part]
            first = scaled.round()
            both[part] = first
            both[tokens + part.start : tokens + part.stop] = scaled.sub_(first).mul_(FINER).round_()
        passed = int8_product(both, self.digits)
        unit.mul_(self._unit)

        def moved(part: slice) -> list[torch.Tensor]:
            rest = slice(part.start + tokens, part.stop + tokens)
            added = passed[part].float().add_(passed[rest], alpha=1 / FINER).mul_(unit[part])
            found: list[torch.Tensor] = []
            total = last = added.new_zeros(())
            for own, shrink in zip(added.chunk(len(self.shrink), 1), self.shrink, strict=True):
                total = own + total
                value = total * shrink
                found.append(value - last)
                last = value
            return found

        return moved


def chunks(of: torch.Tensor) -> list[slice]:
    """Runs of rows [rows, columns] so few that several passes over them in float32 stay in a core's cache; all rows at
    once where there are thousands of cores."""
    rows, columns = of.shape
    count = max(1, CHUNK // columns if of.device.type == "cpu" else rows)
    return [slice(first, min(first + count, rows)) for first in range(0, rows, count)]
