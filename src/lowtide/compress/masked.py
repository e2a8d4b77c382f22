"""A compressed model evaluated in torch over whole windows: every token masked by its own levels, as decoding does.

The arithmetic is that of docs/architecture.md, coefficients of 8 bits per class included, as one matrix product per
slice; only the order of floating-point sums differs. It serves to tune compression and to check the engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from lowtide.arch import LAYER_NORMS, ModelConfig
from lowtide.compress.dense import decoder_block, rms_norm, rope_tables
from lowtide.errors import LowtideError
from lowtide.format import codec
from lowtide.format.centroids import Centroids
from lowtide.format.groups import GroupTensors
from lowtide.kernels.reference_ops import RANGE
from lowtide.rules import GroupStats, Rule


@dataclass
class _Group:
    """One group unpacked for torch: digit planes f32 [S, out, in] holding d - centre, scales, exact parts."""

    planes: torch.Tensor
    row_scale: torch.Tensor
    col_scale: torch.Tensor
    shrink: torch.Tensor
    bias: torch.Tensor
    outliers: torch.Tensor
    exact_channels: torch.Tensor
    exact: torch.Tensor
    stats: GroupStats
    outs: list[int]  # rows of each linear layer
    side_bits: int
    ipn_side_bits: int  # under the rule ipn
    has_centroids: bool
    centroid_mean: torch.Tensor | None  # f32 [K, in] and [K, out], in place of the mean and the bias
    centroid_bias: torch.Tensor | None

    @property
    def out(self) -> int:
        """Rows of all its layers."""
        return sum(self.outs)


def _unpack(group: GroupTensors, centroids: Centroids | None) -> _Group:
    planes, outliers = [], []
    for linear in group.linears:
        digits = codec.digit_planes(linear.weight, linear.out_features, group.in_features)
        centres = np.array(group.centres, np.float32)[:, None, None] / 2
        planes.append(torch.from_numpy(digits.astype(np.float32) - centres))
        extra = np.zeros((linear.out_features, group.in_features), np.float32)
        rows, cols, values = linear.outliers()
        extra[rows, cols] = values
        outliers.append(torch.from_numpy(extra))
    return _Group(
        planes=torch.cat(planes, 1),
        row_scale=_f32([linear.row_scale for linear in group.linears], 0),
        col_scale=_f32([group.col_scale], 0),
        shrink=torch.from_numpy(np.array(group.shrink)),
        bias=_f32([linear.bias for linear in group.linears], 0),
        outliers=torch.cat(outliers),
        exact_channels=torch.from_numpy(group.exact_channels.astype(np.int64)),
        exact=_f32([linear.exact for linear in group.linears], 1),
        stats=GroupStats.of(group).map(lambda a: torch.from_numpy(np.array(a))),
        outs=[linear.out_features for linear in group.linears],
        side_bits=8 * group.side_bytes(),
        ipn_side_bits=8 * group.side_bytes(ipn=True),
        has_centroids=group.ipn is not None and group.ipn.centroids is not None,
        centroid_mean=None if centroids is None else _f32([centroids.mean], 0),
        centroid_bias=None if centroids is None else _f32(centroids.bias, 1),
    )


def _f32(parts: list[np.ndarray], axis: int) -> torch.Tensor:  # type: ignore[type-arg]
    return torch.from_numpy(np.concatenate([p.astype(np.float32) for p in parts], axis))


class MaskedModel:
    """A compressed model. `groups` as in the artifact, `norms` by Hugging Face tensor name, f32.

    quantise_coefficients=False leaves the coefficients in float32, to see what their 8 bits cost. centroids:
    `Artifact.centroids()`; the rule `ipn` needs them if the artifact has any.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: Mapping[str, GroupTensors],
        norms: Mapping[str, np.ndarray],  # type: ignore[type-arg]
        quantise_coefficients: bool = True,
        centroids: Mapping[str, Centroids] | None = None,
    ) -> None:
        self.config = config
        known = centroids or {}
        self.groups = {name: _unpack(group, known.get(name)) for name, group in groups.items()}
        self.norms = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in norms.items()}
        self.quantise_coefficients = quantise_coefficients
        table = self.groups["head" if config.tied else "embed"]
        scale = torch.tensor([4.0**-s for s in range(len(table.planes))])
        self.embedding = torch.einsum("s,soi->oi", scale, table.planes) * table.row_scale[:, None] * table.col_scale
        self.embedding[table.outliers != 0] = table.outliers[table.outliers != 0]
        self.embedding[:, table.exact_channels] = table.exact.T

    @torch.no_grad()
    def logits(
        self,
        ids: torch.Tensor,
        rule: Rule,
        params: Mapping[str, np.ndarray],  # type: ignore[type-arg]
        gains: Mapping[str, float] | None = None,
    ) -> tuple[torch.Tensor, float]:
        """ids [B, N] -> (logits f32 [B, N, V], bits_read_body).

        params[group]: the rule's f32 [S]; gains[group]: for the rule `ipn`, see `PolicyParams.gains`; 0 by default.
        """
        rope = rope_tables(self.config, 0, ids.shape[1])
        x = F.embedding(ids, self.embedding)
        read = 0.0
        gate: list[torch.Tensor] = []
        features: torch.Tensor | None = None
        code: torch.Tensor | None = None

        for index in range(self.config.num_layers):

            def apply(name: str, x: torch.Tensor, index: int = index) -> torch.Tensor:
                nonlocal read, features, code
                full = f"layers.{index}.{name}"
                group = self.groups[full]
                found = rule.features(group.stats, x)
                features = features if found is None else found
                near = rule.code(group.stats, x)
                code = code if near is None else near
                cuts = torch.from_numpy(np.array(params[full]))
                cuts = rule.waterline(group.stats, cuts, features, 0.0 if gains is None else float(gains[full]))
                y, levels = self.product(full, x, rule, cuts, gate.pop() if name == "down" else None, code)
                side = group.ipn_side_bits if rule.name == "ipn" else group.side_bits
                read += 2.0 * sum(out * float(own.sum()) for out, own in zip(group.outs, levels, strict=True))
                read += side * ids.numel()
                if name == "gate_up":
                    gate.append(F.silu(y.chunk(2, -1)[0]))
                return y

            prefix = f"model.layers.{index}."
            before, after = (self.norms[prefix + name] for name in LAYER_NORMS)
            x = decoder_block(self.config, (before, after), x, apply, rope)
        x = rms_norm(x, self.norms["model.norm.weight"], self.config.rms_eps)
        logits, _ = self.product("head", x, rule, params["head"], None, rule.code(self.groups["head"].stats, x))
        weights = sum(g.out * g.planes.shape[2] for n, g in self.groups.items() if n not in ("head", "embed"))
        return logits, read / weights / ids.numel()

    def product(
        self,
        name: str,
        x: torch.Tensor,
        rule: Rule,
        params: np.ndarray | torch.Tensor,  # type: ignore[type-arg]
        gate: torch.Tensor | None = None,
        code: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """One group's layers: x f32 [..., in] -> (y f32 [..., out], levels i32 [..., in] of each).

        params: the rule's, f32 [S] or [S, ..., 1]. code: i64 [...], the tokens' centroids, if the rule has any.
        """
        group = self.groups[name]
        cuts = params if isinstance(params, torch.Tensor) else torch.from_numpy(np.array(params))
        stats, bias = group.stats, group.bias
        if rule.name == "ipn" and group.has_centroids:
            if group.centroid_mean is None or group.centroid_bias is None or code is None:
                raise LowtideError(f"{name}: the rule ipn measures from centroids here, and they were not given")
            stats, bias = replace(stats, mean=group.centroid_mean[code]), group.centroid_bias[code]
        levels = rule.member_levels(stats, x, cuts, len(group.outs), gate)
        a = x - stats.mean
        y = bias + F.linear(a, group.outliers)
        planes = group.planes.split(group.outs, 1)
        parts: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for i, (own, plane) in enumerate(zip(levels, planes, strict=True)):
            if not i or own is not levels[i - 1]:
                gamma = torch.cat([torch.zeros(1), group.shrink])[own.long()]
                values = self._coefficients(a * group.col_scale * gamma, own, len(plane))
            total = F.linear(values[0], plane[0])
            for value, digits in zip(values[1:], plane[1:], strict=True):
                total += F.linear(value, digits)
            parts.append(total)
        y += torch.cat(parts, -1) * group.row_scale
        if len(group.exact_channels):
            y += x[..., group.exact_channels] @ group.exact
        return y, levels

    def _coefficients(self, base: torch.Tensor, levels: torch.Tensor, slices: int) -> list[torch.Tensor]:
        """Coefficient of every channel for each slice, 0 where it is not read, rounded as engines do it per class."""
        values = [torch.where(levels > s, base * 4.0**-s, 0.0) for s in range(slices)]
        if not self.quantise_coefficients:
            return values
        for k in range(slices):
            members = [levels == s + k + 1 for s in range(slices)]
            sizes = [torch.where(m, v, 0.0).abs() for m, v in zip(members, values, strict=True)]
            count = sum(m.sum(-1) for m in members)
            unit = coefficient_unit(torch.stack(sizes).amax((0, -1)), torch.stack(sizes).sum((0, -1)), count)[..., None]
            values = [torch.where(m, (v / unit).round() * unit, v) for m, v in zip(members, values, strict=True)]
        return values


def coefficient_unit(top: torch.Tensor, total: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """What one unit of an int8 coefficient stands for (docs/architecture.md: Coefficients), never 0.

    top, total, count: largest magnitude, sum and number of the values of a class, of any shape; f32 of the same shape.
    """
    reach = torch.minimum(top, total / torch.as_tensor(count).clamp_min(1) * float(RANGE))
    return (reach / 127).clamp_min(1e-30)
