"""A tiny artifact with means, exact channels and outliers, a dense model of the same shape, and the literal product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from support.tiny import make_artifact
from support.twin import make_twins

from lowtide.compress.dense import DenseModel
from lowtide.eval.rivals import Calibration, RivalModel
from lowtide.format.reader import Artifact, open_artifact

BITS = 5.0


def make_calibration(folder: Path, windows: int = 3, length: int = 24, **options) -> Calibration:
    """Calibration on random tokens. The dense model is another one than the artifact's: rules must not mind."""
    artifact = open_artifact(make_artifact(folder / "tiny", tied=False, **options))
    _, source = make_twins(folder / "twin", tied=False, seed=7)
    ids = torch.randint(0, artifact.config.vocab_size, (windows, length), generator=torch.Generator().manual_seed(3))
    model = RivalModel(artifact, quantise_coefficients=False)
    return Calibration(artifact, model, DenseModel(source), ids)


def literal(artifact: Artifact, name: str, x: torch.Tensor, levels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of one group weight by weight: x f32 [n, in], levels int [n, out, in] of every single weight ->
    (y [n, out], bits of digits [n]). Exact channels have level 0 here whatever is asked for."""
    group = artifact.groups[name]
    count = range(len(group.linears))
    weights = np.stack(
        [np.concatenate([group.dequantise(i, level) for i in count]) for level in range(group.slices + 1)]
    )
    exact = np.concatenate([group.exact_part(i) for i in count])
    bias = np.concatenate([linear.bias.astype(np.float64) for linear in group.linears])
    levels = np.array(levels)
    levels[:, :, group.exact_channels] = 0
    ys, bits = [], []
    for row, level in zip(x.numpy().astype(np.float64), levels, strict=True):
        a = row - group.mean.astype(np.float64)
        chosen = np.take_along_axis(weights, level[None], 0)[0] + exact
        ys.append(bias + chosen @ a)
        bits.append(2.0 * level.sum())
    return torch.tensor(np.array(ys)).float(), torch.tensor(bits)


def all_rows(artifact: Artifact, name: str, levels: torch.Tensor) -> np.ndarray:
    """Levels of channels [n, in] as levels of weights [n, out, in]."""
    out = sum(linear.out_features for linear in artifact.groups[name].linears)
    return np.repeat(levels.numpy().astype(int)[:, None], out, 1)


def inputs(artifact: Artifact, name: str, tokens: int = 5, seed: int = 0) -> torch.Tensor:
    """Random inputs of a group, f32 [tokens, in], heavy-tailed."""
    width = artifact.groups[name].in_features
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) ** 3


def side_without_rule(artifact: Artifact, name: str) -> int:
    """Bits of a group's side data that every rule reads: no importance, no thresholds."""
    group = artifact.groups[name]
    fields = [group.mean, group.col_scale, group.shrink, group.exact_channels]
    return 8 * (sum(f.nbytes for f in fields) + sum(linear.side_bytes() for linear in group.linears))
