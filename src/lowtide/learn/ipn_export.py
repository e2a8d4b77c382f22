"""From a trained network to an artifact: stored dtypes, thresholds for every budget, and trained weights' digits.

Thresholds are set last and on what is stored: for each budget that was trained for one shift of all of them is solved
for, so that the bits read on calibration text, side data counted, are the budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lowtide.arch import norm_specs
from lowtide.errors import LowtideError
from lowtide.format import codec
from lowtide.format.card import CARD_NAME
from lowtide.format.groups import GroupTensors, IpnTensors
from lowtide.format.manifest import CONFIG_NAME, WEIGHTS_NAME
from lowtide.format.reader import Artifact
from lowtide.format.writer import ArtifactWriter
from lowtide.learn.graded import GradedModel
from lowtide.learn.ipn import At, Ipn
from lowtide.learn.level import rows_of
from lowtide.learn.shards import whole

LOWEST = -60.0
"""log2 of a threshold that every score passes which is not zero."""
TOKENS = 2048
"""Tokens that thresholds are set on, in whole windows."""
SAMPLE = 1 << 18
"""Margins of a group that are sorted."""
ROUNDS, TOLERANCE = 3, 1e-3
"""Passes over them for each budget, at most, and how near to the budget their bits must come, relative: a shift changes
the inputs of the layers behind a little."""


@torch.no_grad()
def as_stored(ipn: Ipn) -> dict[str, IpnTensors]:
    """The network's tensors in stored dtypes, gains left empty; the network itself is rounded to them. Factors that are
    all 1 are left out."""
    found = {}
    factors = [ipn.get(name, "factor") for name in ipn.start]
    apart = any(factor is not None and bool(factor.any()) for factor in factors)
    for name, start in ipn.start.items():
        log = ipn.log_importance(name)
        importance = torch.where(ipn.open[name] > 0, log.exp2(), 0.0).clamp_max(65504.0).to(torch.float16)
        rounded = importance.float().clamp_min(2.0**-24).log2()
        learned = ipn.get(name, "importance")
        if learned is not None:
            learned.copy_(rounded - start)
        fields = {}
        probe, mix = ipn.get(name, "probe"), ipn.get(name, "mix")
        if probe is not None:
            scale = probe.abs().amax(1).clamp_min(1e-12) / 127
            digits = (probe / scale[:, None]).round()
            probe.copy_(digits * scale[:, None])
            bias = ipn.get(name, "bias")
            assert bias is not None
            fields = {
                "probe": digits.to(torch.int8).cpu().numpy(),
                "scale": scale.cpu().numpy(),
                "bias": bias.detach().cpu().numpy().copy(),
            }
        if mix is not None:
            fields["mix"] = mix.detach().cpu().numpy().copy()
        factor = ipn.get(name, "factor")
        if factor is not None and apart:
            fields["factor"] = factor.exp2().cpu().numpy()
            factor.copy_(torch.from_numpy(fields["factor"]).log2())
        if name in ipn.clusters:
            fields |= ipn.clusters[name].stored
        found[name] = IpnTensors(importance=importance.cpu().numpy(), **fields)
    return found


@torch.no_grad()
def take_stored(ipn: Ipn, artifact: Artifact) -> None:
    """The network that an artifact stores becomes the one to go on from; its thresholds are `ipn.tables` already.

    A gain is stored for every budget, and is one number here: the one that fits them best.
    """
    tilt = torch.tensor([ipn.tilt(bits) for bits in ipn.grid])
    for name, start in ipn.start.items():
        stored = artifact.groups[name].ipn
        assert stored is not None
        values: dict[str, torch.Tensor] = {}
        importance = torch.from_numpy(stored.importance.astype(np.float32)).clamp_min(2.0**-24).log2()
        values["importance"] = torch.where(ipn.open[name].cpu() > 0, importance - start.cpu(), 0.0)
        if stored.mix is not None and stored.gain is not None:
            values["mix"] = torch.from_numpy(stored.mix.copy())
            gain = torch.from_numpy(stored.gain.copy())
            used = gain > 0  # those below were clipped
            values["gain"] = ((gain - 1) * tilt * used).sum()[None] / (tilt**2 * used).sum().clamp_min(1e-9)
        if stored.probe is not None and stored.scale is not None and stored.bias is not None:
            values["probe"] = torch.from_numpy(stored.probe.astype(np.float32) * stored.scale[:, None])
            values["bias"] = torch.from_numpy(stored.bias.copy())
        if stored.factor is not None:
            values["factor"] = torch.from_numpy(stored.factor.copy()).log2()
        for what, value in values.items():
            learned = ipn.get(name, what)
            if learned is not None:
                learned.copy_(value)


@torch.no_grad()
def thresholds(
    model: GradedModel, ipn: Ipn, ids: torch.Tensor, report: Callable[[int, int], None] = lambda *_: None
) -> tuple[dict[str, np.ndarray], dict[float, float]]:  # type: ignore[type-arg]
    """f32 [B, S] for every group on the text ids i64 [B, N], and the bits that budgets then read there.

    Solved for are the budgets that the runtime interpolates between, which clamps what is asked for to what was trained
    for. Others get the shift of the nearest, and the last one reads everything whatever the network says.
    """
    used = _trained_budgets(ipn)
    shifts: dict[int, float] = {}
    reads: dict[float, float] = {}
    for done, index in enumerate(used):
        bits, near = ipn.grid[index], shifts[used[done - 1]] if done else 0.0
        shifts[index], reads[bits] = shift_for(model, ipn, ids, bits, near)
        report(done + 1, len(used))
    found = {}
    for name in ipn.start:
        rows = [
            ipn.shared_theta(name, bits) + (0.0 if name == "head" else shifts[min(max(index, used[0]), used[-1])])
            for index, bits in enumerate(ipn.grid[:-1])
        ]
        log = torch.stack([*rows, torch.full_like(ipn.tables[name][-1], LOWEST)])
        never = ipn.tables[name] >= 39.9  # infinite, before it became finite for learning
        found[name] = torch.where(never, torch.inf, log.exp2()).float().cpu().numpy()
    return found, reads


def _trained_budgets(ipn: Ipn) -> list[int]:
    """Places in the grid, the last one apart, of the budgets trained for and of the next beyond either end."""
    last = len(ipn.grid) - 2
    first = max(i for i, bits in enumerate(ipn.grid) if bits <= ipn.low or i == 0)
    final = min(i for i, bits in enumerate(ipn.grid) if bits >= ipn.high or i == last)
    return list(range(min(first, last), min(final, last) + 1))


def shift_for(model: GradedModel, ipn: Ipn, ids: torch.Tensor, bits: float, shift: float) -> tuple[float, float]:
    """(shift, bits that it reads): a pass measures, its margins say how far to go on, until one is near enough."""
    tried = []
    for _ in range(ROUNDS):
        at = At(ipn, bits, shift, keep_margins=True)
        read = float(model.hidden(ids, at)[1].mean())
        tried.append((shift, read))
        if abs(read - bits) < TOLERANCE * bits:
            break
        shift += _further(model, at, bits)
    return min(tried, key=lambda each: abs(each[1] - bits))


def _further(model: GradedModel, at: At, bits: float) -> float:
    """By how much thresholds would have to move, log2 units, for these margins to read so many bits."""
    side = sum(g.side_bits for n, g in model.groups.items() if n != "head") / model.weights
    curves = []
    for name, margins in at.margins.items():
        for own, rows in zip(margins, rows_of(model, name, margins[:, 0, 0, 0]), strict=True):
            flat = own.reshape(-1)[:: _stride(own.numel(), own.shape[2])]
            curves.append((flat.sort().values.cpu(), 2.0 * float(rows) * own.shape[0] * own.shape[2]))
    low, high = -8.0, 8.0
    for _ in range(30):
        middle = (low + high) / 2
        read = side
        for ordered, most in curves:
            above = len(ordered) - int(torch.searchsorted(ordered, torch.tensor(middle), right=True))
            read += most * above / len(ordered) / model.weights
        low, high = (middle, high) if read > bits else (low, middle)
    return (low + high) / 2


def _stride(count: int, inputs: int) -> int:
    """Step through `count` margins [S, T, in] that leaves some SAMPLE of them, and without a factor in common with
    `inputs`, so that it meets every channel."""
    stride = max(1, count // SAMPLE)
    while math.gcd(stride, inputs) > 1:
        stride += 1
    return stride


def gains(ipn: Ipn, name: str) -> np.ndarray:  # type: ignore[type-arg]
    """The offset's weight at every budget, f32 [B]."""
    with torch.no_grad():
        return np.array([float(ipn.gain(name, bits)) for bits in ipn.grid], np.float32)


def write_weights(
    artifact: Artifact, model: GradedModel, out: Path, stats: dict[str, object], main: bool = True
) -> None:
    """The artifact again with the trained digits, scales, biases and norms; policies and everything else stay.

    Sharded weights are gathered group by group: all processes must call, the one that is `main` writes.

    Raises:
        LowtideError: a bias that left float16's range, or no room.
    """
    manifest = artifact.manifest
    norms = {name: whole(norm).float().cpu().numpy() for name, norm in model.norm_tensors().items()}
    if not main:
        for name in model.codes:
            _with_weights(artifact.groups[name], model, name)
        return
    with ArtifactWriter(out, force=True) as writer:
        for name, group in artifact.groups.items():
            trained = name in model.codes
            writer.add_group(_with_weights(group, model, name) if trained else group)
        for name, _ in norm_specs(manifest.config):
            writer.add_tensor(name, norms[name])
        for name in manifest.files:
            if name not in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME):
                writer.add_file(name, artifact.file(name))
        writer.finish(
            config=manifest.config,
            slices=manifest.slices,
            budgets=manifest.budgets,
            policies=manifest.policies,
            model_id=manifest.model_id,
            stats={k: v for k, v in manifest.stats.items() if k != "entropy"} | stats,
            zero=manifest.zero,
            coding=manifest.coding,
            ipn=manifest.ipn,
        )


def _with_weights(group: GroupTensors, model: GradedModel, name: str) -> GroupTensors:
    found, learned_bias = model.trained(name)
    digits, bias, code = found.cpu().numpy(), learned_bias.to(torch.float16).cpu().numpy(), model.codes[name]
    if not np.isfinite(bias).all():
        raise LowtideError(f"{name}: a trained bias left float16's range; lower --weight-rate")
    linears, first = [], 0
    for linear in group.linears:
        rows = slice(first, first + linear.out_features)
        packed = codec.pack_digits(digits[rows], group.slices)
        scale = code.rows[rows, 0].to(torch.float16).cpu().numpy()
        linears.append(dataclasses.replace(linear, weight=packed, bias=bias[rows], row_scale=scale))
        first += linear.out_features
    return dataclasses.replace(group, linears=linears, col_scale=code.cols.to(torch.float16).cpu().numpy())
