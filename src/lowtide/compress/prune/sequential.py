"""Layer problems of a model that is pruned on the way, front to back.

SparseGPT prunes a block, runs the calibration text through it and takes the next block's statistics from what comes
out. Here each group of linear layers sees the inputs that the pruned model really gives it, groups before it in the
same block included, and is told which weights would best give the dense model's outputs from them, `target`.

With x the dense model's input, x' the pruned one's, H' = E[x' x''] and r the damping:
target = (W E[x x''] + share * E[(d - d') x''] + r W) (H' + r)^-1, where d and d' are the residual streams that the
layer's output is added to: with share 1 the layer also makes up for what earlier layers left there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lowtide.arch import GROUPS
from lowtide.compress.calibrate import GroupStats
from lowtide.compress.dense import Block, DenseModel, decoder_block, rope_tables
from lowtide.compress.prune.base import LayerProblem
from lowtide.compress.prune.problems import split_problems
from lowtide.compress.prune.updates import damped

RESIDUAL_SHARE = 0.5
"""KL on stories15M at 60 %, damping 0.1: 0.758 at 0, 0.719 at 0.5, 0.754 at 1."""
ORDER = ("qkv", "o", "gate_up", "down")
ADDS = ("o", "down")
"""Groups whose output is added to the residual stream."""


class _Captured(Exception):
    """Ends a block's run once the wanted group's input is known."""


@dataclass
class Walk:
    """The two models' states on their way through the blocks, f32 [windows, tokens, hidden] each.

    share: how much of the residual stream's error a layer's target makes up for.
    within: groups see what those pruned before them in their own block do; else, as SparseGPT's authors do it, only
        blocks see what earlier blocks do.
    """

    model: DenseModel
    ids: torch.Tensor
    share: float = RESIDUAL_SHARE
    within: bool = True
    dense: torch.Tensor = field(init=False)
    pruned: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.dense = self.model.embed(self.ids)
        self.pruned = self.dense
        self.rope = rope_tables(self.model.config, 0, self.ids.shape[1])

    def block(self, index: int, known: dict[str, GroupStats], seed: int, prune: PruneGroup) -> dict[str, torch.Tensor]:
        """Prune one block and step over it.

        Args:
            index: of the block; call in forward order.
            known: the dense model's statistics of the block's groups: their Fisher information is used.
            seed: handed to the problems.
            prune: from the problems of one group's members to their pruned weights f32 [out, in].

        Returns:
            Group -> pruned weights, members concatenated, f32 [out, in].
        """
        dense = self.model.block(index)
        block = Block(dense.input_norm, dense.post_norm, dict(dense.weights), dense.biases)
        for group in ORDER:
            stats, targets = self._collect(dense, block, group, known[group])
            problems = split_problems(self.model, index, known | {group: stats}, seed, dense)
            first = sum(len(GROUPS[g]) for g in ORDER[: ORDER.index(group)])
            members = problems[first : first + len(GROUPS[group])]
            row = 0
            for problem in members:
                # several layers of a block would each make up for the same error of its input, and so overdo it
                problem.target = targets[row : row + len(problem.weight)] if self.within else None
                row += len(problem.weight)
            block.weights[group] = torch.cat(prune(members))
        self.dense = self._step(dense, self.dense)
        self.pruned = self._step(block, self.pruned)
        return block.weights

    def _step(self, block: Block, states: torch.Tensor) -> torch.Tensor:
        norms = (block.input_norm, block.post_norm)
        runs = (decoder_block(self.model.config, norms, row[None], block.apply, self.rope) for row in states)
        return torch.cat(list(runs))

    def _collect(self, dense: Block, block: Block, group: str, known: GroupStats) -> tuple[GroupStats, torch.Tensor]:
        """Statistics of the pruned model's inputs to a group, and the group's target weights f32 [out, in]."""
        weight = dense.weights[group]
        inn = weight.shape[1]
        hessian, cross = torch.zeros(inn, inn), torch.zeros(inn, inn)
        rest = torch.zeros(weight.shape)
        total, count = torch.zeros(inn, dtype=torch.float64), 0
        for row in range(len(self.ids)):
            x, d = self._inputs(dense, self.dense[row], group)
            y, e = self._inputs(block if self.within else dense, self.pruned[row], group)
            hessian += y.T @ y
            cross += x.T @ y
            if group in ADDS and self.share:
                rest += (d - e).T @ y
            total += y.sum(0, dtype=torch.float64)
            count += len(y)
        hessian /= count
        stats = GroupStats(total / count, hessian.diagonal().double(), known.fisher, torch.empty(0))
        stats.hessian = stats.weighted = hessian
        solid = damped(hessian)
        ridge = float(solid[0, 0] - hessian[0, 0])
        wanted = weight @ (cross / count) + self.share * rest / count + ridge * weight
        factor = torch.linalg.cholesky(solid.double())
        return stats, torch.cholesky_solve(wanted.T.double(), factor).T.float()

    def _inputs(self, block: Block, states: torch.Tensor, group: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(the group's inputs [tokens, in], the residual stream that its outputs are added to [tokens, hidden])."""
        norms = (block.input_norm, block.post_norm)
        stream = states
        seen: list[torch.Tensor] = []

        def apply(name: str, x: torch.Tensor) -> torch.Tensor:
            nonlocal stream
            if name == group:
                seen.append(x[0])
                raise _Captured
            y = block.apply(name, x)
            if name == "o":
                stream = states + y[0]
            return y

        try:
            decoder_block(self.model.config, norms, states[None], apply, self.rope)
        except _Captured:
            pass
        return seen[0], stream


PruneGroup = Callable[[list[LayerProblem]], list[torch.Tensor]]
