"""Statistics of every group's inputs and of the loss's sensitivity to its outputs.

The sensitivity is the diagonal of the Fisher information at the outputs: labels are drawn from the model's own
distribution, the loss is differentiated, and the squared gradient of each output row is averaged over tokens. It puts
all layers on one scale (nats per token), so that a single lambda can share a budget among them.

The pass goes backward block by block and recomputes each block from its stored input, so memory is one block plus
the boundaries: (num_layers + 1) * tokens * hidden floats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lowtide.compress.dense import Block, DenseModel, decoder_block, draw, rms_norm, rope_tables

SAMPLE_STRIDE = 4
"""Every fourth token's input is kept to find thresholds."""
HEAD_CHUNK = 256
"""Positions of logits held at a time."""
_Seen = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Group -> (inputs [N, in], outputs [1, N, out] whose gradient is kept)."""


@dataclass
class GroupStats:
    """Statistics of one group over the calibration text.

    mean, second: f64 [in], E[x] and E[x^2]; fisher: f64 [out], mean squared gradient of the summed loss (nats^2);
    sample: f32 [n, in], the inputs of every fourth token; gate: f32 [n, in], |silu(gate)| of the same tokens
    (group `down` only); hessian: f32 [in, in], E[x x'], if asked for; weighted: f32 [in, in], E[s x x'], every token
    weighed by s, its share of the squared gradient at the group's outputs (mean 1); tokens: i64 [], how many these are.
    """

    mean: torch.Tensor
    second: torch.Tensor
    fisher: torch.Tensor
    sample: torch.Tensor
    gate: torch.Tensor | None = None
    hessian: torch.Tensor | None = None
    weighted: torch.Tensor | None = None
    tokens: torch.Tensor | None = None

    def to_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """For a file; the inverse is `GroupStats(**{name: torch.from_numpy(a) for ...})`."""
        return {name: value.numpy() for name, value in vars(self).items() if value is not None}


@dataclass
class _Sums:
    """Running sums of one group; `hessians`: those of the outer products of inputs, too; `weighted`: those
    weighed by gradients as well."""

    hessians: bool = False
    weighted: bool = True
    count: int = 0
    x: torch.Tensor | float = 0.0
    x2: torch.Tensor | float = 0.0
    g2: torch.Tensor | float = 0.0
    sample: list[torch.Tensor] = field(default_factory=list)
    gate: list[torch.Tensor] = field(default_factory=list)
    say: float = 0.0
    xx: torch.Tensor | float = 0.0
    sxx: torch.Tensor | float = 0.0

    def add_outer(self, x: torch.Tensor, say: torch.Tensor) -> None:
        """Take in inputs [n, in] and each token's weight [n] for the Hessians."""
        if isinstance(self.xx, torch.Tensor):
            self.xx.addmm_(x.T, x)
        else:
            self.xx = x.T @ x
        if not self.weighted:
            return
        self.sxx = self.sxx + (x * say[:, None]).T @ x
        self.say += float(say.sum())

    def add(self, x: torch.Tensor, g2: torch.Tensor) -> None:
        """Take in inputs [n, in] and the sum over tokens of squared output gradients [out]."""
        self.x = self.x + x.sum(0, dtype=torch.float64)
        self.x2 = self.x2 + x.pow(2).sum(0, dtype=torch.float64)
        self.g2 = self.g2 + g2
        self.sample.append(x[self.offset() :: SAMPLE_STRIDE].clone())
        self.count += x.shape[0]

    def offset(self) -> int:
        """First row of the next chunk that belongs to the every-fourth-token sample."""
        return -self.count % SAMPLE_STRIDE

    def result(self) -> GroupStats:
        """The averages."""
        n = self.count
        gate = torch.cat(self.gate) if self.gate else None
        result = GroupStats(
            _tensor(self.x) / n, _tensor(self.x2) / n, _tensor(self.g2) / n, torch.cat(self.sample), gate
        )
        if self.hessians:
            result.tokens = torch.tensor(n)
            result.hessian = _tensor(self.xx) / n
            if self.weighted:
                result.weighted = _tensor(self.sxx) / max(self.say, 1e-30)
        return result


def _tensor(value: torch.Tensor | float) -> torch.Tensor:
    assert isinstance(value, torch.Tensor), "no tokens were added"
    return value


def head_pass(
    model: DenseModel, states: torch.Tensor, seed: int, hessians: bool = False, weighted: bool = True
) -> tuple[torch.Tensor, GroupStats]:
    """Through the output head and the final norm.

    states: f32 [B, N, D], what the final norm reads. Returns the loss's gradient there (same shape) and the head's
    statistics. The head's Fisher diagonal is exact, E[p (1 - p)], without drawing labels.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = model.head_weight
    flat = states.reshape(-1, states.shape[-1])
    grad = torch.empty_like(flat)
    sums = _Sums(hessians, weighted)
    for start in range(0, flat.shape[0], HEAD_CHUNK):
        part = flat[start : start + HEAD_CHUNK].detach().requires_grad_(True)
        with torch.enable_grad():
            x = rms_norm(part, model.final_norm, model.config.rms_eps)
        with torch.no_grad():
            p = torch.softmax(F.linear(x, weight), -1)
            labels = draw(p, generator)[:, None]
            sums.add(x.detach(), (p * (1 - p)).sum(0, dtype=torch.float64))
            if hessians:
                sums.add_outer(x.detach(), (p * (1 - p)).sum(1))
            p.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=p.dtype))  # softmax - one-hot
            at_norm = p @ weight
        (grad[start : start + HEAD_CHUNK],) = torch.autograd.grad(x, part, at_norm)
    return grad.view_as(states), sums.result()


def block_pass(
    model: DenseModel,
    block: Block,
    states: torch.Tensor,
    grad_out: torch.Tensor,
    hessians: bool = False,
    weighted: bool = True,
) -> tuple[torch.Tensor, dict[str, GroupStats]]:
    """Back through one block: its input and the gradient at its output -> the gradient at its input, statistics.

    states, grad_out: f32 [B, N, D]. hessians: gather the groups' Hessians, too; weighted: both kinds.
    """
    rope = rope_tables(model.config, 0, states.shape[1])
    norms = (block.input_norm, block.post_norm)
    sums = {group: _Sums(hessians, weighted) for group in block.weights}
    grad_in = torch.empty_like(states)
    for row in range(states.shape[0]):
        seen: _Seen = {}

        def apply(group: str, x: torch.Tensor, seen: _Seen = seen) -> torch.Tensor:
            y = block.apply(group, x)
            y.retain_grad()
            seen[group] = (x.detach()[0], y)
            return y

        x = states[row : row + 1].detach().requires_grad_(True)
        with torch.enable_grad():
            out = decoder_block(model.config, norms, x, apply, rope)
        out.backward(grad_out[row : row + 1])
        assert x.grad is not None
        grad_in[row] = x.grad[0]
        gate = F.silu(seen["gate_up"][1].detach()[0].chunk(2, -1)[0]).abs()
        sums["down"].gate.append(gate[sums["down"].offset() :: SAMPLE_STRIDE].clone())
        for group, (inputs, y) in seen.items():
            assert y.grad is not None
            squared = y.grad[0].pow(2)
            sums[group].add(inputs, squared.sum(0, dtype=torch.float64))
            if hessians:
                sums[group].add_outer(inputs, squared.mean(1))
    return grad_in, {group: s.result() for group, s in sums.items()}
