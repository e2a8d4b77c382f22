"""The importance prediction network: which weights matter for this input.

Reference form, `Ipn.scores(x, W)`: a batch of inputs and a weight matrix in, one importance for each weight out,

    log2 score_tij = log2 |x_tj - mean_j| + log2 |w_ij| + (log2 w_j - log2 norm_j) + gain o_t

differentiable in everything. Pooled over a column (root mean square over the rows) the first two terms become
`|x_tj - mean_j| * norm_j`, so the runtime form `|x_tj - mean_j| * w_j * 2^(gain o_t)` is the same function at the
granularity that bytes can be skipped at; tests hold one against the other.

o_t, the token's offset of the waterline, is read off the residual stream: after each RMSNorm a probe of H features,
`f = relu(P x + b)`, and for each group `o = clip(mix . [f, 1])`. Why the token and not the channel: an oracle that
knows every token's gradient saves half the distortion by moving whole tokens and less than 1 % more by moving single
channels (docs/dynamic.md has the study).

theta is a function of the budget: the untrained thresholds (reverse water-filling, compress/thresholds.py) plus learned
corrections that are linear in the bits, `theta(B) = theta_0(B) + delta + slope (B - 3)`, constant outside the budgets
trained for. So is the offset's gain. `level` moves all thresholds together, linear in the bits as well; no gradient
moves it but the controller that keeps the budgets (`lowtide.learn.level`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from lowtide.learn.clusters import Clusters, Keys
from lowtide.learn.graded import FEATURE_GROUPS

LIMIT = 4.0
"""Largest offset, log2 of the score: two levels."""
MIDDLE = 3.0
"""Budget around which what depends on it is linear."""
TINY = 1e-30
THIN, NEAR = 16, 0.25
"""Densities are counted on every THIN-th token, within NEAR log2 units of a threshold."""


class _Clip(torch.autograd.Function):
    """Clipping whose gradient passes where it leads back inside."""

    @staticmethod
    def forward(ctx, z: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z)
        return z.clamp(-LIMIT, LIMIT)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):  # type: ignore[no-untyped-def]
        (z,) = ctx.saved_tensors
        g = grads[0]
        return torch.where(((z > LIMIT) & (g < 0)) | ((z < -LIMIT) & (g > 0)), 0.0, g)


class Ipn(nn.Module):
    """Parameters for all groups of a model.

    Args:
        importance: the untrained importance f32 [in] of every group, head included (0 for exact channels). Where these
            lie, and tables with them, everything lies.
        grid: budgets in bits per weight, ascending; tables: thresholds f32 [B, S] in log2 of every group.
        features: H of every probe; 0 for no offset.
        seed: of the probes' first weights.
        parts: which ingredients learn: importance, theta, offset.
        low, high: budgets that are trained for, bits per weight.
        apart: q, k and v have thresholds of their own, the group's times a factor each.
    """

    PARTS = ("importance", "theta", "offset")

    def __init__(
        self,
        importance: Mapping[str, torch.Tensor],
        grid: list[float],
        tables: Mapping[str, torch.Tensor],
        features: int = 16,
        seed: int = 0,
        parts: tuple[str, ...] = PARTS,
        low: float = 2.0,
        high: float = 4.0,
        apart: bool = False,
    ) -> None:
        super().__init__()
        self.low, self.high, self.apart = low, high, apart
        generator = torch.Generator().manual_seed(seed)
        self.grid, self.tables, self.parts = grid, dict(tables), parts
        self.features = features if "offset" in parts else 0
        self.start = {name: v.clamp_min(TINY).log2() for name, v in importance.items()}
        self.open = {name: (v > 0).float() for name, v in importance.items()}
        self.has_exact = {name: not bool(v.all()) for name, v in self.open.items()}
        table: dict[str, nn.Parameter] = {}

        def learn(name: str, what: str, value: torch.Tensor) -> None:
            table[_key(name, what)] = nn.Parameter(value)

        for name, v in importance.items():
            if "importance" in parts:
                learn(name, "importance", torch.zeros_like(v))
            if name == "head":
                continue
            if "theta" in parts:
                learn(name, "delta", torch.zeros_like(tables[name][0]))
                learn(name, "slope", torch.zeros_like(tables[name][0]))
                if apart and _kind(name) == "qkv":
                    learn(name, "factor", v.new_zeros(3))
            if self.features:
                learn(name, "mix", v.new_zeros(self.features + 1))
                learn(name, "gain", v.new_zeros(1))
                if FEATURE_GROUPS[_kind(name)] == _kind(name):
                    probe = torch.randn(self.features, len(v), generator=generator) / math.sqrt(len(v))
                    learn(name, "probe", probe.to(v.device))
                    learn(name, "bias", v.new_zeros(self.features))
        self.table = nn.ParameterDict(table)
        self.level = nn.Parameter(v.new_zeros(2), requires_grad=False)
        self.clusters: dict[str, Clusters] = {}
        self.keys: dict[str, Keys] = {}

    def take_clusters(self, clusters: Mapping[str, Clusters]) -> None:
        """Clusters of every group's inputs: `mean` above is that of a token's cluster. They do not learn."""
        self.clusters = dict(clusters)
        self.keys = {name: found.keys for name, found in clusters.items() if found.keys is not None}

    def get(self, name: str, what: str) -> nn.Parameter | None:
        """A group's parameter, None if it does not learn that."""
        key = _key(name, what)
        return self.table[key] if key in self.table else None

    def log_importance(self, name: str) -> torch.Tensor:
        """log2 w_j, f32 [in]."""
        learned = self.get(name, "importance")
        return self.start[name] if learned is None else self.start[name] + learned

    def theta(self, name: str, bits: float) -> torch.Tensor:
        """Thresholds f32 [S] in log2 at a budget, [3, S] of q, k and v apart. The head's are not learned: budgets leave
        it out."""
        own, factor = self.shared_theta(name, bits), self.get(name, "factor")
        return own if factor is None else own + factor[:, None]

    def shared_theta(self, name: str, bits: float) -> torch.Tensor:
        """f32 [S]: those that a group's factors are of."""
        base = self._between(self.tables[name], bits)
        if name == "head":
            return base
        base = base + self.level[0] + self.level[1] * self.place(bits)
        delta, slope = self.get(name, "delta"), self.get(name, "slope")
        if delta is None or slope is None:
            return base
        # cummax: no level is easier to reach than the one below it
        return torch.cummax(base + delta + slope * self.tilt(bits), 0).values

    def tilt(self, bits: float) -> float:
        """What corrections are linear in."""
        return min(max(bits, self.low), self.high) - MIDDLE

    def place(self, bits: float) -> float:
        """Where a budget lies among those trained for: from -1 to 1."""
        return (min(max(bits, self.low), self.high) - (self.low + self.high) / 2) / ((self.high - self.low) / 2)

    def _between(self, table: torch.Tensor, bits: float) -> torch.Tensor:
        """Rows of the grid interpolated; outside of it the nearest."""
        bits = min(max(bits, self.grid[0]), self.grid[-1])
        high = min(range(len(self.grid)), key=lambda i: (self.grid[i] < bits, abs(self.grid[i] - bits)))
        low = max(high - 1, 0)
        if high == low or self.grid[high] == self.grid[low]:
            return table[high]
        part = (bits - self.grid[low]) / (self.grid[high] - self.grid[low])
        return torch.lerp(table[low], table[high], part)

    def gain(self, name: str, bits: float) -> torch.Tensor:
        """Weight of the offset at a budget: 1 at MIDDLE bits, not negative."""
        gain = self.get(name, "gain")
        return torch.ones_like(self.level[:1]) if gain is None else (1 + gain * self.tilt(bits)).clamp_min(0)

    def feature_values(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Features f32 [T, H] of the residual stream x f32 [T, in] at the input of group `name` (qkv or gate_up)."""
        probe, bias = self.get(name, "probe"), self.get(name, "bias")
        assert probe is not None and bias is not None
        return torch.relu(x @ probe.T + bias)

    def offset(self, name: str, features: torch.Tensor) -> torch.Tensor:
        """o f32 [T] from the features f32 [T, H] of the probe that serves the group."""
        mix = self.get(name, "mix")
        assert mix is not None
        clipped = _Clip.apply(features @ mix[:-1] + mix[-1])
        assert isinstance(clipped, torch.Tensor)
        return clipped

    def scores(
        self, name: str, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The reference form: log2 importance f32 [T, out, in] of every weight for every input.

        x: f32 [T, in]; weight: f32 [out, in]; mean: f32 [in]; shift: gain o, f32 [T], 0 if None.
        """
        norm = weight.pow(2).mean(0).sqrt()
        column = (x - mean).abs().clamp_min(TINY).log2() + self.log_importance(name) - norm.clamp_min(TINY).log2()
        scores = column[:, None, :] + weight.abs().clamp_min(TINY).log2()
        return scores if shift is None else scores + shift[:, None, None]

    def side_bits(self, name: str) -> int:
        """Bits of the network that a token reads for a group, its importance (in the place of the fixed one) apart."""
        keys = self.keys.get(name)
        own = 0 if keys is None else 8 * keys.weight.numel() + 64 * len(keys.bias) + 32 * len(keys.channels)
        if not self.features or name == "head":
            return own
        own += 32 * (self.features + 1) + 32 + (0 if self.get(name, "factor") is None else 32 * 3)
        probe = self.get(name, "probe")
        return own + (0 if probe is None else 8 * probe.numel() + 64 * self.features)


class At:
    """An Ipn at one budget, for one pass of a model: the `Masks` that `GradedModel` asks.

    shift moves every threshold (log2), tau is the temperature of the masks' gradient in levels' log2 units.
    offsets[name], margins[name] keep o f32 [T] and, with keep_margins, log2 score - theta f32 [M, S, T, in] of all
    layers (M = 1) or each. density[name] f32 [M, S], with keep_density, is by how many channels a token reads less for
    each log2 unit that a threshold rises. full_head: the head is read in full, whatever the budget.
    """

    def __init__(
        self,
        ipn: Ipn,
        bits: float,
        shift: float = 0.0,
        tau: float = 0.7,
        keep_margins: bool = False,
        keep_density: bool = False,
        full_head: bool = False,
    ) -> None:
        self.ipn, self.bits, self.shift, self.tau = ipn, bits, shift, tau
        self.keep_margins, self.keep_density, self.full_head = keep_margins, keep_density, full_head
        self.density: dict[str, torch.Tensor] = {}
        self.offsets: dict[str, torch.Tensor] = {}
        self.margins: dict[str, torch.Tensor] = {}
        self._features: dict[str, torch.Tensor] = {}
        self.code: torch.Tensor | None = None

    def see(self, name: str, x: torch.Tensor) -> None:
        """Features of the residual stream, and its cluster. Scores do not pass gradients to what they are computed
        from: a weight should not move to please a mask."""
        keys = self.ipn.keys.get(name)
        if keys is not None:
            self.code = keys.code(x.detach())
        if self.ipn.features and name != "head":
            self._features = {_kind(name): self.ipn.feature_values(name, x.detach())}

    def scores(self, name: str, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Masks`: log2 scores f32 [T, in] of a group and its thresholds."""
        ipn = self.ipn
        score = a.detach().abs().clamp_min(TINY).log2() + ipn.log_importance(name)
        if ipn.features and name != "head":
            offset = ipn.offset(name, self._features[FEATURE_GROUPS[_kind(name)]])
            self.offsets[name] = offset
            score = score + (ipn.gain(name, self.bits) * offset)[:, None]
        if ipn.has_exact[name]:
            score = score.masked_fill(ipn.open[name] == 0, -torch.inf)
        theta = ipn.theta(name, self.bits)
        if name == "head":
            return score, torch.full_like(theta, -torch.inf) if self.full_head else theta
        theta = theta + self.shift
        each = theta.reshape(-1, theta.shape[-1])
        if self.keep_margins:
            self.margins[name] = score - each[:, :, None, None]
        if self.keep_density:
            some = score.detach()[::THIN]
            near = (some - each.detach()[:, :, None, None]).abs_() < NEAR
            self.density[name] = near.sum((2, 3)) / (2 * NEAR * len(some))
        return score, theta


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _key(name: str, what: str) -> str:
    return f"{name.replace('.', '/')}/{what}"
