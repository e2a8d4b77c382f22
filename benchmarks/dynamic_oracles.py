"""How much there is to gain, and along which axis: figures of the dense model's gradients, no training.

With g_ti the gradient at output i for token t (several sampled labels) an error e_ij in weight (i, j) costs
`(g_ti e_ij a_tj)^2`. If bits may follow a factor s of that cost, what distortion remains at equal bits is the geometric
over the arithmetic mean of s (reverse water-filling); 1 means nothing to gain, 0.25 one bit.

  token     s_t = sum_i (r_i g_ti)^2: what a perfect per-token offset would save
  channel   s_tj / (s_t s_j), s_tj = sum_i g_ti^2 w_ij^2: what a perfect context of channels would save beyond it
  columns   (a_tj v_j)^2: what channel-norm saves; rows (up only): silu(gate_ti)^2 times the row's mean sensitivity
  matrices  static differences between the matrices of a group
  before, now   squared correlation of log s_t with the log entropy of the prediction before (known when the token is
            read) and of the token's own (known only afterwards): what confidence tells about sensitivity
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from dynamic_common import Row, Subject

from lowtide.compress.dense import decoder_block, rms_norm, rope_tables

NAME = "oracles"
COLUMNS = ("group", "token", "channel", "columns", "rows", "matrices", "before", "now")
LABELS = 24
"""Labels sampled for each token. Their noise lowers `token`, by 4 % at most (chi-squared of 24 degrees)."""
FLOOR = 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this section."""
    parser.add_argument("--oracle-windows", type=int, default=4, help="windows whose gradients are taken")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses what cannot be; --quick shortens."""
    if options.oracle_windows < 1:
        parser.error(f"--oracle-windows {options.oracle_windows}: 1 or more")
    if options.quick:
        options.oracle_windows = 1


def left(s: torch.Tensor) -> float:
    """Geometric over arithmetic mean, values below FLOOR of the mean raised to it."""
    s = s.double()
    return float(s.clamp_min(FLOOR * float(s.mean())).log().mean().exp() / s.mean())


def gradients(subject: Subject, ids: torch.Tensor, seed: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """For one window i64 [N]: group -> (input f32 [N, in], output f32 [N, out], mean squared gradient f32 [N, out],
    log entropy of the predictions f32 [N])."""
    dense, config = subject.dense, subject.dense.config
    rope = rope_tables(config, 0, len(ids))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    x = dense.embed(ids[None])
    for index in range(config.num_layers):
        block = dense.block(index)

        def apply(kind: str, x: torch.Tensor, index: int = index) -> torch.Tensor:
            y = dense.block(index).apply(kind, x)
            if y.requires_grad:
                y.retain_grad()
            else:
                y.requires_grad_(True)
            seen[f"layers.{index}.{kind}"] = (x.detach()[0], y)
            return y

        x = decoder_block(config, (block.input_norm, block.post_norm), x, apply, rope)
    logits = F.linear(rms_norm(x, dense.final_norm, config.rms_eps), dense.head_weight)[0]
    generator = torch.Generator().manual_seed(seed)
    total = {name: torch.zeros(y.shape[1:]) for name, (_, y) in seen.items()}
    for label in range(LABELS):
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        for _, y in seen.values():
            y.grad = None
        F.cross_entropy(logits, drawn, reduction="sum").backward(retain_graph=label < LABELS - 1)
        for name, (_, y) in seen.items():
            assert y.grad is not None
            total[name] += y.grad[0].pow(2) / LABELS
    logp = logits.detach().log_softmax(-1)
    entropy = (-(logp.exp() * logp).sum(-1)).clamp_min(1e-3).log()
    return {name: (x, y.detach()[0], total[name], entropy) for name, (x, y) in seen.items()}


def explained(entropy: torch.Tensor, say: torch.Tensor, window: int) -> dict[str, float]:
    """Squared correlations of log entropies f32 [T] with log sensitivities f32 [T], windows' first tokens left out."""
    now, log = entropy.view(-1, window), (say + 1e-6 * say.mean()).log().view(-1, window)
    pairs = {"before": (now[:, :-1], log[:, 1:]), "now": (now[:, 1:], log[:, 1:])}
    return {n: float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] ** 2) for n, (a, b) in pairs.items()}


def figures(
    subject: Subject, name: str, x: torch.Tensor, y: torch.Tensor, g2: torch.Tensor, entropy: torch.Tensor
) -> dict[str, Any]:
    """The ratios of one group from all windows' tokens."""
    group = subject.artifact.groups[name]
    scale = torch.from_numpy(np.concatenate([linear.row_scale.astype(np.float32) for linear in group.linears]))
    weight = torch.from_numpy(np.concatenate([group.dequantise(i, group.slices) for i in range(len(group.linears))]))
    rows = g2 * scale**2
    say = rows.sum(1)
    open_channels = np.setdiff1d(np.arange(group.in_features), group.exact_channels)
    pairs = (g2 @ weight.pow(2))[:, open_channels]
    context = pairs / pairs.mean(1, keepdim=True).clamp_min(1e-30)
    context = context / context.mean(0).clamp_min(1e-30)
    mean = torch.from_numpy(group.mean.astype(np.float32))
    score = (x - mean) * torch.from_numpy(group.importance.astype(np.float32))
    sizes = [linear.out_features for linear in group.linears]
    shares = torch.cat([part.mean().expand(size) for part, size in zip(rows.split(sizes, 1), sizes, strict=True)])
    found = {
        "group": name,
        "token": left(say),
        "channel": left(context),
        "columns": left(score[:, open_channels].pow(2)),
        "matrices": left(shares),
    }
    found |= explained(entropy, say, subject.ids.shape[1])
    if name.endswith("gate_up"):
        gate = F.silu(y[:, : sizes[0]]).pow(2)
        up = rows[:, sizes[0] :]
        found["rows"] = left(gate * (up.mean(0) / gate.mean(0).clamp_min(1e-30)))
    return found


def rows(options: argparse.Namespace, subject: Subject) -> Iterator[Row]:
    """One row for each group, and the mean of each kind."""

    def measure() -> list[Row]:
        common.note("oracles: gradients of the dense model")
        parts: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        for number, ids in enumerate(subject.ids[: options.oracle_windows]):
            for name, found in gradients(subject, ids, number).items():
                parts.setdefault(name, []).append(found)
        all_rows = []
        for name, windows in parts.items():
            joined = [torch.cat(column) for column in zip(*windows, strict=True)]
            all_rows.append({"model": subject.label} | figures(subject, name, *joined))
        return all_rows

    yield from subject.once(f"oracles {options.oracle_windows}", measure)


def table(found: list[Row]) -> str:
    """Mean over layers of every kind of group, for people."""
    lines = []
    for kind in ("qkv", "o", "gate_up", "down"):
        of = [r for r in found if r["group"].endswith(f".{kind}")]
        cells = [f"{np.mean([r[c] for r in of]):.3f}" if c in of[0] else "" for c in COLUMNS[1:]]
        lines.append((kind, *cells))
    return common.markdown(COLUMNS, lines)
