"""Rate-distortion coding of one group: steps from sensitivity, error feedback, rounding that knows its cost in bits.

The static half's quantiser. An error e in w_ij costs about fisher_i * e' H e / 2 nats, H the second moments of the
group's inputs. With H^-1 = U'U (U upper triangular), rounding column after column and moving each column's error into
those to come makes column j cost 1 / U_jj^2 (GPTQ, arXiv 2210.17323; successive cancellation). Under an entropy code,
whose length falls by one bit when a step doubles, the best steps then make every weight cost the same (reverse
water-filling at high rate):

    step_ij = step * r_i * c_j,   r_i = fisher_i^-1/2,   c_j = U_jj.

One `step` (square root of nats) serves all layers: it is lambda. Layers, rows and columns that matter less get larger
steps and so fewer bits, and whatever is smaller than half a step becomes zero by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowtide.compress.calibrate import GroupStats
from lowtide.compress.quantise import F16_MAX, F16_MIN, QuantisedGroup
from lowtide.format import codec

CHUNK_ROWS = 4096
BLOCK = 64
"""Columns whose errors are moved one by one; those beyond get them in one product."""
DAMP = 0.01
"""Added to H's diagonal, as a part of its mean: calibration text is short."""
SHRINK, MAX_SHRINK = 0.2, 0.5
"""Part of H's other elements that is taken for chance, times channels over tokens. With fewer tokens than channels H is
singular, and feedback would trust directions that only the calibration text lacks. SmolLM2's down_proj from 1,024
tokens: KL 0.298 at 2.62 bits; with a shrinkage of 0.1 0.063 at 3.14 and with one of 0.3 0.032 at 3.49, where the bits
alone would give 0.145 and 0.089."""
FISHER_FLOOR = 1e-3
"""Added to a row's sensitivity, as a part of the mean."""
RATE = 0.0577
"""Half of 2 ln 2 / 12: what one bit is worth in squared steps at high rate, halved for the threshold's shift."""
MAX_SHIFT = 0.48
SCALE_BITS = 5
"""Bits of mantissa that scales keep: a step need not be exact, and short ones deflate well."""
EXACT_SHARE = 0.4
"""A column of which more than this share is beyond the code's range is kept exact (16 bits against 32 for each)."""
ROW_SHARE = 0.002
"""A row's step grows until at most this share of it is beyond the code's range."""
DOUBLE_LIMIT = 4096
"""Wider Hessians are factored in float32."""


@dataclass(frozen=True)
class StepOptions:
    """How a group is coded: `step` in square roots of nats (lambda is its square), 2-bit slices stored."""

    step: float
    slices: int = 4


@torch.no_grad()
def code_steps(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stats: GroupStats,
    options: StepOptions,
    keep: torch.Tensor | None = None,
) -> QuantisedGroup:
    """Code one group.

    Args:
        weight: f32 [out, in], members concatenated.
        bias: f32 [out] or None.
        stats: with `hessian`.
        options: step and slices.
        keep: bool [out, in], False where a weight is pruned, or None.
    """
    assert stats.hessian is not None
    mean = _trim(stats.mean.float())
    hessian = _centred(stats, mean)
    fisher = stats.fisher.float()
    fisher = fisher + FISHER_FLOOR * fisher.mean() + 1e-30
    upper = feedback_factor(hessian)
    cols = upper.diagonal().clone()
    rows = options.step * fisher.rsqrt()
    low, high = code_range(options.slices)
    exact = _exact_columns(weight, rows, cols, low, high)
    if len(exact):
        mean[exact], cols[exact] = 0, 1.0
        upper = _without(hessian, exact)
    rows = _fit_rows(weight, rows, cols, exact, low, high)
    unit = 4.0 ** (options.slices - 1)
    row_scale, col_scale = _round_scales(rows * unit, cols)
    source = weight if keep is None else weight * keep
    fit = _Rounding(upper, row_scale / unit, col_scale, low, high, exact)
    digits, outlier, sums = fit.run(source, keep, fisher, hessian.diagonal(), options.slices)
    where = outlier.nonzero()
    importance = sums.importance.sqrt()
    importance[exact] = 0
    rms = float(importance.pow(2).mean().sqrt().clamp_min(1e-30))
    shift = weight @ mean + (0 if bias is None else bias)
    return QuantisedGroup(
        digits=digits,
        row_scale=row_scale.half(),
        bias=shift.half(),
        col_scale=col_scale.half(),
        mean=mean.half(),
        importance=_trim(importance / rms).half(),
        shrink=sums.shrink(),
        exact_channels=exact,
        exact=source[:, exact].T.half().contiguous(),
        outlier_rows=where[:, 0],
        outlier_cols=where[:, 1],
        outlier_values=source[where[:, 0], where[:, 1]].half(),
        distortion=sums.distortion(),
        importance_rms=rms,
    )


def code_range(slices: int) -> tuple[int, int]:
    """The smallest and largest whole number of steps that a code of S slices holds, zero being 0."""
    zero = codec.doubled_centre(codec.centres(slices, zero=True)) // 2
    return -zero, 4**slices - 1 - zero


def feedback_factor(hessian: torch.Tensor) -> torch.Tensor:
    """U f32 [in, in], upper triangular, with (H + damping)^-1 = U'U. One factorisation, one inverse of a triangle.

    H = M M' with M upper triangular is the usual factorisation with rows and columns turned about; U = M^-1.
    """
    wide = hessian.shape[0] > DOUBLE_LIMIT
    h = hessian.flip(0, 1) if wide else hessian.double().flip(0, 1)  # a copy either way
    mean = float(h.diagonal().mean())
    h.diagonal().add_(DAMP * mean + 1e-30)
    lower, failed = torch.linalg.cholesky_ex(h)
    if int(failed):
        h = hessian.double().flip(0, 1)
        h.diagonal().add_(10 * DAMP * mean + 1e-30)
        lower = torch.linalg.cholesky(h)
    del h
    upper = lower.flip(0, 1)
    del lower
    eye = torch.eye(upper.shape[0], dtype=upper.dtype)
    return torch.linalg.solve_triangular(upper, eye, upper=True).float()


def _centred(stats: GroupStats, mean: torch.Tensor) -> torch.Tensor:
    """E[(x - m)(x - m)'] for the rounded mean m that is taken out of the inputs, shrunk towards its diagonal (Ledoit
    and Wolf 2004, with a fixed intensity for each ratio of channels to tokens)."""
    assert stats.hessian is not None
    wide = len(mean) > DOUBLE_LIMIT  # copies of such a matrix are what memory goes to
    h = stats.hessian.clone() if wide else stats.hessian.double()
    mu, m = stats.mean.to(h.dtype), mean.to(h.dtype)
    h.addr_(mu, m, alpha=-1).addr_(m, mu, alpha=-1).addr_(m, m)
    if stats.tokens is not None:
        shrink = min(MAX_SHRINK, SHRINK * len(mu) / int(stats.tokens))
        diagonal = h.diagonal().clone()
        h.mul_(1 - shrink).diagonal().copy_(diagonal)
    return h


def _without(hessian: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The factor where some columns are exact: they take no part, neither giving errors nor taking them."""
    h = hessian.clone()
    h[columns] = 0
    h[:, columns] = 0
    h.diagonal()[columns] = h.diagonal().mean()
    return feedback_factor(h)


def _exact_columns(weight: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Columns too large for the code's range, sorted i64 [E]."""
    beyond = torch.zeros(weight.shape[1])
    for start in range(0, weight.shape[0], CHUNK_ROWS):
        z = weight[start : start + CHUNK_ROWS] / rows[start : start + CHUNK_ROWS, None] / cols
        beyond += ((z > high + 0.5) | (z < low - 0.5)).sum(0)
    return (beyond > EXACT_SHARE * weight.shape[0]).nonzero()[:, 0]


def _fit_rows(
    weight: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, exact: torch.Tensor, low: int, high: int
) -> torch.Tensor:
    """Row steps, larger where too much of a row would be beyond the code's range (very frequent tokens of a head)."""
    reach = float(min(-low, high))
    largest = max(1, round(ROW_SHARE * weight.shape[1])) + 1
    fitted = rows.clone()
    for start in range(0, weight.shape[0], CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        z = (weight[part] / cols).abs_()
        z[:, exact] = 0
        edge = z.topk(min(largest, z.shape[1]), 1).values[:, -1]
        fitted[part] = torch.maximum(rows[part], edge / reach)
    return fitted


def _trim(values: torch.Tensor, bits: int = SCALE_BITS) -> torch.Tensor:
    """Round float32 to float16's range and `bits` bits of mantissa."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp(torch.round(mantissa * 2.0**bits) / 2.0**bits, exponent).half().float()


def _round_scales(rows: torch.Tensor, cols: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both scales short and within float16, a power of two moved between them so that both sit mid-range."""
    shift = torch.round((cols.log2().median() - rows.log2().median()) / 2)
    rows, cols = rows * 2.0**shift, cols * 2.0**-shift
    return _trim(rows.clamp(F16_MIN, F16_MAX)), _trim(cols.clamp(F16_MIN, F16_MAX))


@dataclass
class _Sums:
    """What thresholds and scores need: products of read and true weights per level, weighted by what errors cost."""

    dot: torch.Tensor
    square: torch.Tensor
    power: float
    importance: torch.Tensor

    def shrink(self) -> torch.Tensor:
        """Least-squares factor of each level, f32 [S]; 1 for the last, which is read as it was meant."""
        factor = torch.where(self.dot > 0, self.dot / self.square.clamp_min(1e-300), torch.ones_like(self.dot))
        factor[-1] = 1.0
        return factor.float()

    def distortion(self) -> list[float]:
        """Relative weighted error of levels 0..S."""
        g, power = self.shrink().double(), max(self.power, 1e-300)
        errors = 1 - 2 * g * self.dot / power + g * g * self.square / power
        return [1.0, *(max(float(e), 1e-12) for e in errors)]


@dataclass
class _Rounding:
    """Rounds a group. upper f32 [in, in]; rows, cols: the parts of the step; low, high: range in steps."""

    upper: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    low: int
    high: int
    exact: torch.Tensor

    def run(
        self,
        weight: torch.Tensor,
        keep: torch.Tensor | None,
        fisher: torch.Tensor,
        energy: torch.Tensor,
        slices: int,
    ) -> tuple[torch.Tensor, torch.Tensor, _Sums]:
        """Digits u8 [out, in], outliers bool [out, in] (code zero), sums over levels."""
        digits = torch.empty(weight.shape, dtype=torch.uint8)
        outlier = torch.zeros(weight.shape, dtype=torch.bool)
        zeros = torch.zeros(slices, dtype=torch.float64)
        sums = _Sums(zeros, zeros.clone(), 0.0, torch.zeros(weight.shape[1]))
        weights = energy.float().clamp_min(0)
        weights[self.exact] = 0  # exact columns have no levels
        for part in self._chunks(weight.shape[0]):
            kept = None if keep is None else keep[part]
            q, out = self._round(weight[part], part, kept)
            digits[part] = (q - self.low).to(torch.uint8)
            outlier[part] = out
            self._add(sums, weight[part] * ~out, q, part, fisher[part], weights, slices)
        return digits, outlier, sums

    def _chunks(self, out: int) -> Iterator[slice]:
        for start in range(0, out, CHUNK_ROWS):
            yield slice(start, min(start + CHUNK_ROWS, out))

    def _round(self, weight: torch.Tensor, part: slice, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole numbers of steps f32 [n, in] and outliers bool, with the errors of each column moved on."""
        # in units of the row's step, columns first: one row of memory is one column of the weight
        w = (weight / self.rows[part, None]).T.contiguous()
        to_zero, to_next = self._shifts(w)
        q, out = torch.zeros_like(w), torch.zeros(w.shape, dtype=torch.bool)
        kept = None if keep is None else keep.T.contiguous()
        skipped = torch.zeros(len(w), dtype=torch.bool)
        skipped[self.exact] = True
        for start in range(0, len(w), BLOCK):
            end = min(start + BLOCK, len(w))
            errors = torch.zeros(end - start, w.shape[1])
            for j in range(start, end):
                if skipped[j]:
                    continue
                step = self.cols[j]
                z = w[j] / step
                size = z.abs()
                shift = torch.where(size < 1, to_zero[j], to_next[j])
                q[j] = torch.copysign((size + 0.5 - shift).floor_().clamp_min_(0), z)
                if kept is not None:
                    q[j] *= kept[j]
                out[j] = (q[j] < self.low) | (q[j] > self.high)
                left = w[j] - q[j] * step
                if bool(out[j].any()):
                    left[out[j]] = 0  # an outlier is kept as it is
                    q[j][out[j]] = 0
                errors[j - start] = left / self.upper[j, j]
                if j + 1 < end:
                    w[j + 1 : end].addr_(self.upper[j, j + 1 : end], errors[j - start], alpha=-1)
            if end < len(w):
                w[end:].addmm_(self.upper[start:end, end:].T, errors, alpha=-1)
        return q.T.contiguous(), out.T.contiguous()

    def _shifts(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How far rounding leans to zero, between 0 and 1 and beyond, f32 [in, rows] each, in steps.

        Half of what the difference of two codes' lengths is worth; lengths are those of a Laplace distribution whose
        scale b_ij is a product of the row's and the column's mean magnitude.
        """
        size = (w / self.cols[:, None]).abs_()
        by_col, by_row = size.mean(1), size.mean(0)
        b = torch.outer(by_col / by_col.mean().clamp_min(1e-20), by_row).clamp_(0.05, 1e4)
        half = torch.exp(-0.5 / b)
        from_zero = torch.log2((1 - half) / (0.5 * half * (1 - torch.exp(-1 / b))))
        return (RATE * from_zero).clamp_(0, MAX_SHIFT), (RATE * 1.4427 / b).clamp_(0, MAX_SHIFT)

    def _add(
        self,
        sums: _Sums,
        weight: torch.Tensor,
        q: torch.Tensor,
        part: slice,
        fisher: torch.Tensor,
        energy: torch.Tensor,
        slices: int,
    ) -> None:
        scale = self.rows[part, None] * self.cols
        squared = weight.square()
        sums.importance += fisher @ squared
        sums.power += float(fisher @ (squared @ energy))
        centres = codec.centres(slices, zero=True)
        for level in range(1, slices + 1):
            drop = 4.0 ** (slices - level)
            zero = codec.doubled_centre(centres[:level]) // 2
            value = ((q - self.low) / drop).floor_().sub_(zero).mul_(drop).mul_(scale)
            sums.dot[level - 1] += float(fisher @ ((value * weight) @ energy))
            sums.square[level - 1] += float(fisher @ (value.square_() @ energy))
