"""The embedded 2-bit-slice code of one group: which channels and weights stay exact, scales, digits, shrink factors.

All errors are weighted by what they cost at the model's output: an error e in w_ij costs fisher_i * E[a_j^2] * e^2,
where a is the group's input minus its mean. Large matrices (output heads) are worked on in chunks of rows, so the
memory needed is the weights, one mask and the digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowtide.compress.calibrate import GroupStats

CHUNK_ELEMENTS = 1 << 20
"""Weights per chunk of rows: a handful of such float32 temporaries stays in the processor's cache."""
SAMPLE_ELEMENTS = 1 << 22
"""Weights that the outlier threshold is read from."""
F16_MIN, F16_MAX = 2.0**-14, 65504.0
"""Smallest normal and largest float16: scales are kept between them."""
MASSIVE_RATIO = 100.0
"""A channel this many times above the median energy is massive."""
SCALE_ROUNDS = 5
ROW_SAY = 0.5
"""Power of a row's share of the output energy that weighs it in the column scales. 0 spoils heads whose vocabulary is
mostly unused (stories15M: KL 0.217 against 0.135 at 3.4 bits), 1 spoils the rare tokens' embeddings."""
ROW_FACTORS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 1.8, 2.1)
"""Multipliers of the first clipping point tried for every row."""
LEVEL_WEIGHTS = (1.5, 32.0, 125.0, 500.0)
"""Weight of level L's error in the search for a row's scale: how often level L is read at middling budgets, over its
usual relative error."""


@dataclass(frozen=True)
class QuantOptions:
    """How a group is coded.

    slices: 2-bit slices stored per weight; clip: first clipping point in units of row rms times column rms;
    outliers: fraction of weights kept exact beside the code; max_exact: massive channels kept exact, at most.
    """

    slices: int = 3
    clip: float = 2.4
    outliers: float = 0.004
    max_exact: int = 3


@dataclass
class QuantisedGroup:
    """One group's code, the member layers' rows concatenated.

    digits u8 [out, in] (offset binary, 2 * slices bits); row_scale, bias f16 [out]; col_scale, mean, importance
    f16 [in]; shrink f32 [S]; exact_channels i64 [E]; exact f16 [E, out]; outlier_rows, outlier_cols i64 [n],
    outlier_values f16 [n]; distortion: S + 1 relative weighted errors of levels 0..S; importance_rms: the factor taken
    out of importance.
    """

    digits: torch.Tensor
    row_scale: torch.Tensor
    bias: torch.Tensor
    col_scale: torch.Tensor
    mean: torch.Tensor
    importance: torch.Tensor
    shrink: torch.Tensor
    exact_channels: torch.Tensor
    exact: torch.Tensor
    outlier_rows: torch.Tensor
    outlier_cols: torch.Tensor
    outlier_values: torch.Tensor
    distortion: list[float]
    importance_rms: float


@dataclass
class _Fit:
    """Weights under work: w [out, in] (exact channels zeroed), cost weights of rows and columns, scales, mask."""

    w: torch.Tensor
    fisher: torch.Tensor
    energy: torch.Tensor
    options: QuantOptions
    rows: torch.Tensor
    cols: torch.Tensor
    outlier: torch.Tensor

    def chunks(self) -> Iterator[slice]:
        """Slices of rows of about CHUNK_ELEMENTS weights."""
        step = max(1, CHUNK_ELEMENTS // self.w.shape[1])
        for start in range(0, self.w.shape[0], step):
            yield slice(start, min(start + step, self.w.shape[0]))


@torch.no_grad()
def quantise_group(
    weight: torch.Tensor, bias: torch.Tensor | None, stats: GroupStats, options: QuantOptions
) -> QuantisedGroup:
    """Code one group. weight: f32 [out, in] (members concatenated), bias: f32 [out] or None."""
    mean = stats.mean.to(torch.float16)
    m = mean.double()
    energy = (stats.second - 2 * m * stats.mean + m * m).clamp_min(0).float()
    energy = energy + 1e-8 * energy.mean() + 1e-30
    fisher = stats.fisher.float()
    fisher = fisher + 1e-6 * fisher.mean() + 1e-30
    exact = massive_channels(weight, fisher, energy, options.max_exact)
    mean[exact] = 0
    shift = weight @ mean.float() + (0 if bias is None else bias)
    w = weight
    if len(exact):
        w = weight.clone()
        w[:, exact] = 0
        energy[exact] = 0
    none = torch.zeros(w.shape, dtype=torch.bool)
    fit = _Fit(w, fisher, energy, options, torch.ones(w.shape[0]), torch.ones(w.shape[1]), none)
    _fit_scales(fit)
    _search_rows(fit)
    _round_scales(fit)
    fit.cols[exact] = 1.0
    digits, shrink, distortion = _encode(fit)
    importance = _importance(fit)
    rms = float(importance.pow(2).mean().sqrt().clamp_min(1e-30))
    where = fit.outlier.nonzero()
    return QuantisedGroup(
        digits=digits,
        row_scale=fit.rows.to(torch.float16),
        bias=shift.to(torch.float16),
        col_scale=fit.cols.to(torch.float16),
        mean=mean,
        importance=(importance / rms).to(torch.float16),
        shrink=shrink,
        exact_channels=exact,
        exact=weight[:, exact].T.to(torch.float16).contiguous(),
        outlier_rows=where[:, 0],
        outlier_cols=where[:, 1],
        outlier_values=weight[where[:, 0], where[:, 1]].to(torch.float16),
        distortion=distortion,
        importance_rms=rms,
    )


def massive_channels(weight: torch.Tensor, fisher: torch.Tensor, energy: torch.Tensor, limit: int) -> torch.Tensor:
    """Channels whose energy at the output is over MASSIVE_RATIO times the median's, at most `limit`; sorted i64 [E]."""
    if limit == 0 or weight.shape[1] < 8:
        return torch.zeros(0, dtype=torch.int64)
    at_output = energy * torch.mv(weight.square().T, fisher)
    top = at_output.topk(min(limit, len(at_output)))
    return top.indices[top.values > MASSIVE_RATIO * at_output.median()].sort().values


def _fit_scales(fit: _Fit) -> None:
    """Row and column root mean squares in turn, outliers left out; outliers chosen by the error of clipping them."""
    importance_mean = float((fit.fisher * fit.w.square().mean(1)).mean().clamp_min(1e-30))
    for turn in range(SCALE_ROUNDS):
        col_sum = torch.zeros(fit.w.shape[1])
        col_count = torch.zeros(fit.w.shape[1])
        for part in fit.chunks():
            keep = ~fit.outlier[part]
            z = (fit.w[part] / fit.cols).square_().mul_(keep)
            fit.rows[part] = (z.sum(1) / keep.sum(1).clamp_min(1)).sqrt_().clamp_min_(1e-20)
            # rows that matter little for the output (rare tokens' rows of a head) have little say in the columns
            importance = fit.fisher[part] * fit.rows[part].square()
            share = (importance / importance_mean).pow(ROW_SAY)
            col_sum += share @ (fit.w[part] / fit.rows[part, None]).square_().mul_(keep)
            col_count += share @ keep.float()
        fit.cols = (col_sum / col_count.clamp_min(1e-20)).sqrt_().clamp_min_(1e-20)
        if fit.options.outliers > 0 and turn < SCALE_ROUNDS - 1:
            _choose_outliers(fit)


def _clip_cost(fit: _Fit, rows: slice | torch.Tensor) -> torch.Tensor:
    """Cost (root of weighted squared error) of clipping each weight of the rows; a trace of its size breaks ties."""
    r, col_cost = fit.rows[rows, None], fit.cols * fit.energy.sqrt()
    z = (fit.w[rows] / fit.cols).div_(r).abs_()
    clipped = (z - fit.options.clip).clamp_min_(0).mul_(r * fit.fisher[rows, None].sqrt())
    return clipped.add_(z, alpha=1e-6 * float(fit.rows.mean() * fit.fisher.mean().sqrt())).mul_(col_cost)


def _choose_outliers(fit: _Fit) -> None:
    """Mark the `outliers` fraction with the largest clipping cost (threshold from a sample of rows if it is large)."""
    out, inn = fit.w.shape
    stride = -(-out * inn // SAMPLE_ELEMENTS)
    sample = torch.arange(0, out, stride)
    count = round(fit.options.outliers * len(sample) * inn)
    if count == 0:
        return
    costs = torch.cat([_clip_cost(fit, s).flatten() for s in sample.split(max(1, CHUNK_ELEMENTS // inn))])
    threshold = costs.topk(min(count + 1, costs.numel())).values[-1]
    for part in fit.chunks():
        fit.outlier[part] = _clip_cost(fit, part) > threshold


def _grid(z: torch.Tensor, slices: int) -> torch.Tensor:
    """Nearest code of z (units of row times column scale, span -2..2) at full length, as float."""
    steps = 4.0 ** (slices - 1)
    return z.add(2).mul_(steps).floor_().clamp_(0, 4 * steps - 1)


def _at_level(q: torch.Tensor, level: int, slices: int) -> torch.Tensor:
    """Value, in the units of `_grid`, of codes cut to `level` slices."""
    drop, steps = 4.0 ** (slices - level), 4.0 ** (slices - 1)
    return (q / drop).floor_().add_(0.5).mul_(drop / steps).sub_(2)


def _search_rows(fit: _Fit) -> None:
    """Scale every row's clipping point by the factor that has the least level-weighted error; fold it into rows."""
    slices = fit.options.slices
    weights = LEVEL_WEIGHTS[:slices]
    col_cost = fit.cols.square() * fit.energy
    for part in fit.chunks():
        z = (fit.w[part] / fit.cols).div_(fit.rows[part, None]).mul_(~fit.outlier[part])
        # an outlier's z is 0; its error is some constant of the factor, too rare to move the choice
        best = torch.full((z.shape[0],), float("inf"))
        chosen = torch.ones(z.shape[0])
        for factor in ROW_FACTORS:
            unit = factor * fit.options.clip / 2
            scaled = z / unit
            q = _grid(scaled, slices)
            total = torch.zeros(z.shape[0])
            for level, weight in enumerate(weights, 1):
                total += weight * (_at_level(q, level, slices).sub_(scaled).square_() @ col_cost)
            total *= unit * unit
            better = total < best
            best = torch.where(better, total, best)
            chosen[better] = unit
        fit.rows[part] *= chosen


def _round_scales(fit: _Fit) -> None:
    """Round both scales to float16 (held in float32), a power of two moved between them so that both sit mid-range."""
    shift = torch.round((fit.cols.log2().median() - fit.rows.log2().median()) / 2)
    fit.rows = (fit.rows * 2.0**shift).clamp_(F16_MIN, F16_MAX).half().float()
    fit.cols = (fit.cols * 2.0**-shift).clamp_(F16_MIN, F16_MAX).half().float()


def _encode(fit: _Fit) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Digits with the rounded scales, least-squares shrink factor of each level and its relative weighted error."""
    slices = fit.options.slices
    digits = torch.empty(fit.w.shape, dtype=torch.uint8)
    dot, square, power = torch.zeros(slices, dtype=torch.float64), torch.zeros(slices, dtype=torch.float64), 0.0
    middle = 2 ** (2 * slices - 1)
    parity = torch.arange(fit.w.shape[1]) % 2
    for part in fit.chunks():
        outlier, scale = fit.outlier[part], fit.rows[part, None] * fit.cols
        w = fit.w[part] * ~outlier
        q = _grid(fit.w[part] / scale, slices)
        # the two codes next to zero in turn: at level 1 they read as -1/2 and +1/2 and cancel over a row
        rows = torch.arange(part.start, part.stop)[:, None]
        zero = (middle - (parity + rows) % 2).float()
        q = torch.where(outlier, zero, q)
        digits[part] = q.to(torch.uint8)
        fisher = fit.fisher[part]
        power += float(fisher @ (w.square() @ fit.energy))
        for level in range(1, slices + 1):
            value = _at_level(q, level, slices).mul_(scale)
            dot[level - 1] += float(fisher @ ((value * w) @ fit.energy))
            square[level - 1] += float(fisher @ (value.square_() @ fit.energy))
    power = max(power, 1e-300)
    shrink = torch.where(dot > 0, dot / square.clamp_min(1e-300), torch.ones_like(dot))
    errors = 1 - 2 * shrink * dot / power + shrink * shrink * square / power
    return digits, shrink.float(), [1.0, *(max(float(e), 1e-12) for e in errors)]


def _importance(fit: _Fit) -> torch.Tensor:
    """Sensitivity-weighted norm of each column without its outliers, f32 [in]."""
    total = torch.zeros(fit.w.shape[1])
    for part in fit.chunks():
        total += fit.fisher[part] @ (fit.w[part] * ~fit.outlier[part]).square_()
    return total.sqrt_()
