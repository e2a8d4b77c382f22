"""What every pruning rule is given and what it returns.

A rule is a pure function `prune(problem, sparsity, structure) -> Pruned` in a file of its own; the registry
`lowtide.compress.prune.PRUNERS` is a plain dict. Nothing here knows of files or models.

Legend: `out` rows, `in` input channels of one linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class LayerProblem:
    """One linear layer and what calibration knows of it.

    Attributes:
        name: Hugging Face module name, e.g. `model.layers.3.self_attn.q_proj`.
        kind: last part of the name, e.g. `q_proj`.
        depth: index of the block over the number of blocks, 0 to below 1.
        weight: f32 [out, in].
        mean, second: f32 [in], E[x] and E[x^2] of the layer's inputs.
        fisher: f32 [out], mean squared gradient of the loss at the outputs (nats^2).
        hessian: f32 [in, in], E[x x'].
        weighted: f32 [in, in], E[s x x'], s the token's share of the squared output gradient (mean 1).
        seed: for rules that draw random numbers.
        target: f32 [out, in] or None: the weights that best give the dense model's outputs from these inputs, where
            the inputs come from a model already pruned in part; None where they are the dense model's own.
    """

    name: str
    kind: str
    depth: float
    weight: torch.Tensor
    mean: torch.Tensor
    second: torch.Tensor
    fisher: torch.Tensor
    hessian: torch.Tensor
    weighted: torch.Tensor
    seed: int = 0
    target: torch.Tensor | None = None


@dataclass
class Pruned:
    """mask: bool [out, in], True where a weight survives; weight: f32 [out, in], 0 where it does not."""

    mask: torch.Tensor
    weight: torch.Tensor


Pruner = Callable[["LayerProblem", float, "str"], Pruned]
"""`prune(problem, sparsity, structure)`: structure is `unstructured`, `N:M`, `row`, `column` or `block:RxC`."""
