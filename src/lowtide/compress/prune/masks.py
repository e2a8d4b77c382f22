"""From scores to masks: the structures that a rule may prune, exact counts, and a threshold found by itself.

Structures: `unstructured`, `N:M` (N of every M consecutive inputs of a row survive), `row`, `column`, `block:RxC`
(R rows by C inputs). Sparsity is the share of weights that go, in [0, 1). Ties are broken by position: of two weights
with the same score the later one goes first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowtide.errors import LowtideError

AUTO_RESOLUTION = 1024
"""Points of the error curve on which `auto` looks for the knee."""
_N_M = re.compile(r"(\d{1,4}):(\d{1,4})")
_BLOCK = re.compile(r"block:(\d{1,5})x(\d{1,5})")


@dataclass(frozen=True)
class Structure:
    """A parsed structure.

    kind: `unstructured`, `n:m`, `row`, `column` or `block`; a, b: N and M, or the block's rows and columns (else 0).
    """

    kind: str
    a: int = 0
    b: int = 0

    @property
    def fixed_sparsity(self) -> float | None:
        """The sparsity that N:M implies; None for structures that leave it open."""
        return 1 - self.a / self.b if self.kind == "n:m" else None

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.a}:{self.b}"
        return f"block:{self.a}x{self.b}" if self.kind == "block" else self.kind


def parse_structure(text: str) -> Structure:
    """The structure that a text names.

    Raises:
        LowtideError: no such structure, or N:M without 0 < N < M.
    """
    if text in ("unstructured", "row", "column"):
        return Structure(text)
    if found := _N_M.fullmatch(text):
        n, m = int(found[1]), int(found[2])
        if not 0 < n < m:
            raise LowtideError(f"--structure {text}: N of every M survive, so 0 < N < M")
        return Structure("n:m", n, m)
    if found := _BLOCK.fullmatch(text):
        rows, cols = int(found[1]), int(found[2])
        if rows < 1 or cols < 1:
            raise LowtideError(f"--structure {text}: a block needs one row and one column or more")
        return Structure("block", rows, cols)
    raise LowtideError(f"--structure {text}: known are unstructured, N:M (e.g. 2:4), row, column and block:RxC")


def check_sparsity(sparsity: float) -> float:
    """The sparsity itself if it lies in [0, 1).

    Raises:
        LowtideError: it does not, or it is no number.
    """
    if not 0 <= sparsity < 1:  # also refuses NaN
        raise LowtideError(f"--sparsity {sparsity:g}: must be 0 or more and below 1")
    return float(sparsity)


def check_fits(structure: Structure, out: int, inn: int, name: str) -> None:
    """Refuse a layer [out, in] that the structure does not divide.

    Raises:
        LowtideError: naming the layer.
    """
    if structure.kind == "n:m" and inn % structure.b:
        raise LowtideError(f"--structure {structure}: {name} has {inn} inputs, no multiple of {structure.b}")
    if structure.kind == "block" and (out % structure.a or inn % structure.b):
        raise LowtideError(f"--structure {structure}: {name} is {out} x {inn}, which such blocks do not divide")


def removal_count(sparsity: float, units: int) -> int:
    """How many of `units` go: the nearest whole number."""
    return min(units, math.floor(sparsity * units + 0.5))


def make_mask(
    score: torch.Tensor, sparsity: float, structure: Structure, name: str = "the layer", per_row: bool = False
) -> torch.Tensor:
    """Mask of the weights that survive.

    Args:
        score: f32 [out, in], what removing a weight costs; a structure's score is the sum over its weights.
        sparsity: share of weights that go; N:M has its own and ignores it.
        structure: what may go together.
        name: of the layer, for errors.
        per_row: unstructured: every output row loses the same share, as Wanda does.

    Returns:
        bool [out, in], True survives. Exactly `removal_count` units go.

    Raises:
        LowtideError: a sparsity outside [0, 1), a structure that does not divide the layer.
    """
    check_sparsity(sparsity)
    out, inn = score.shape
    check_fits(structure, out, inn, name)
    if structure.kind == "n:m":
        parts = score.reshape(-1, structure.b)
        return _keep_best(parts, structure.b - structure.a).view(out, inn)
    if structure.kind == "row":
        return _keep_best(score.sum(1)[None], removal_count(sparsity, out)).T.expand(out, inn).clone()
    if structure.kind == "column":
        return _keep_best(score.sum(0)[None], removal_count(sparsity, inn)).expand(out, inn).clone()
    if structure.kind == "block":
        rows, cols = structure.a, structure.b
        sums = score.view(out // rows, rows, inn // cols, cols).sum((1, 3))
        keep = _keep_best(sums.view(1, -1), removal_count(sparsity, sums.numel())).view_as(sums)
        return keep.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    if per_row:
        upto = torch.tensor([removal_count(sparsity, inn * row) for row in range(out + 1)])
        return _keep_best(score, upto.diff())  # counts of rows differ by one at most, and add up exactly
    return _keep_best(score.reshape(1, -1), removal_count(sparsity, out * inn)).view(out, inn)


def _keep_best(score: torch.Tensor, remove: int | torch.Tensor) -> torch.Tensor:
    """bool like score [n, units]: the `remove` (one number, or i64 [n]) lowest of a row are False; NaN is lowest."""
    order = torch.nan_to_num(score.float(), nan=-math.inf, posinf=math.inf, neginf=-math.inf).sort(
        dim=1, descending=True, stable=True
    )
    count = torch.as_tensor(remove).view(-1, 1)
    stays = (torch.arange(score.shape[1]) < score.shape[1] - count).expand(score.shape)
    return torch.empty(score.shape, dtype=torch.bool).scatter_(1, order.indices, stays)


def threshold_mask(scores: Sequence[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
    """One threshold over the scores of several layers: bool masks of the same shapes, exact total, ties by position.

    scores: tensors of any shapes on one scale, e.g. nats.
    """
    check_sparsity(sparsity)
    flat = torch.cat([s.reshape(-1) for s in scores])
    keep = _keep_best(flat[None], removal_count(sparsity, flat.numel()))[0]
    parts = keep.split([s.numel() for s in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def auto_sparsity(score: torch.Tensor) -> float:
    """The sparsity at the knee of the curve of error against sparsity.

    The curve is the share of all scores' sum that the lowest s of them hold. It rises from (0, 0) to (1, 1) and is
    convex; its knee is where it lies farthest below the chord: there one more per cent of weights begins to cost more
    than one per cent of the error (the Kneedle criterion, Satopaa et al. 2011).

    score: any shape, what removing a unit costs, >= 0. Returns a number in [0, 1).
    """
    ordered = score.reshape(-1).double().clamp_min(0).sort().values
    total = float(ordered.sum())
    if total <= 0 or not math.isfinite(total):
        return 0.0
    curve = ordered.cumsum(0) / total
    n = len(curve)
    at = torch.unique(torch.linspace(0, n - 1, min(AUTO_RESOLUTION, n)).round().long())
    below = (at + 1).double() / n - curve[at]
    best = int(at[int(below.argmax())]) + 1
    return min(best / n, 1 - 1 / n) if float(below.max()) > 1e-9 else 0.0
