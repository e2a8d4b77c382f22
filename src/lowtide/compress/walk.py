"""The walk over a model that compression makes: every group's weights and statistics, from the last block to the first.

Forward once, then backward block by block, then the embedding and the output head, whose sensitivity as a table of
embeddings is known only when the gradient has come all the way down. An interrupted walk goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lowtide.arch import GroupSpec, group_specs
from lowtide.compress.calibrate import GroupStats, block_pass, head_pass
from lowtide.compress.dense import DenseModel
from lowtide.compress.pack import WorkFolder
from lowtide.compress.steps import feedback_factor

Visit = Callable[[str, torch.Tensor, torch.Tensor | None, GroupStats], None]
"""`visit(group, weight f32 [out, in], bias f32 [out] or None, statistics)`."""
Progress = Callable[[str, int, int], None]
COUNT_FLOOR = 0.1
"""Occurrences that a token never seen is given, as an embedding."""


class Walk:
    """One model and one calibration text.

    hessians: gather the groups' Hessians; the statistics of a model that fits the memory are then kept, so that a
    second walk costs nothing.
    """

    def __init__(self, model: DenseModel, ids: torch.Tensor, seed: int, hessians: bool, progress: Progress) -> None:
        self.model, self.ids, self.seed, self.hessians, self.progress = model, ids, seed, hessians, progress
        self.specs = {spec.name: spec for spec in group_specs(model.config)}
        self._kept: dict[str, GroupStats] = {}

    def run(self, work: WorkFolder, visit: Visit) -> None:
        """Visit every group, but for those of blocks that an earlier run with this work folder has finished."""
        layers = self.model.config.num_layers
        if self._kept:
            return self._again(visit)
        keep = self.hessians and self.model.fits_cache
        state = None if keep else work.load_arrays("gradient")
        first = layers - 1 if state is None else int(state["next"])
        if first < -1:
            return None
        states = self.model.block_inputs(self.ids, lambda done: self.progress("forward", done, layers))
        self.model.release()  # at 150k tokens each of the two tables takes a gigabyte
        if state is None:
            grad, stats = head_pass(self.model, states[layers], self.seed + 1, self.hessians, weighted=False)
            head = stats.to_arrays()
            self.model.release()
            work.save_arrays("head-statistics", head)
            self._finish(work, layers, grad)
        else:
            grad = torch.from_numpy(state["grad"])
            head = work.load_arrays("head-statistics") or {}
        self.progress("quantise", layers - 1 - first, layers + 1)
        for index in range(first, -1, -1):
            block = self.model.block(index)
            grad, found = block_pass(self.model, block, states[index], grad, self.hessians, weighted=False)
            for group, stats in found.items():
                self._visit(f"layers.{index}.{group}", block.weights[group], block.biases[group], stats, visit, keep)
            states[index] = torch.empty(0)  # no longer needed
            self._finish(work, index, grad)
        stats = GroupStats(**{name: torch.from_numpy(array) for name, array in head.items()})
        self._tables(stats, grad, visit, keep)
        self._finish(work, -1, grad)
        return None

    def _finish(self, work: WorkFolder, index: int, grad: torch.Tensor) -> None:
        """Note that block `index` is done; num_layers stands for the head's pass, -1 for the tables."""
        layers = self.model.config.num_layers
        work.save_arrays("gradient", {"next": np.array(index - 1), "grad": grad.numpy()})
        self.progress("quantise", min(layers - index, layers + 1), layers + 1)

    def _visit(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, stats: GroupStats, visit: Visit, keep: bool
    ) -> None:
        if keep:
            self._kept[name] = stats
        visit(name, weight, bias, stats)

    def _tables(self, stats: GroupStats, grad: torch.Tensor, visit: Visit, keep: bool) -> None:
        """Head and embedding. A tied table serves as both: its rows matter for the sum of both reasons."""
        model = self.model
        if not self.hessians:
            visit("head", model.head_weight, None, stats)
        else:
            table = table_stats(self.ids, grad, model.config.vocab_size)
            if model.config.tied:
                assert stats.hessian is not None
                # What an error costs in the lookup, over what it costs in the product (steps.py), as a mean of columns:
                # one step for both cannot follow either column by column.
                cost = feedback_factor(stats.hessian).diagonal().double().pow(-2)
                stats.fisher = stats.fisher + table.fisher * (table.second.sum() / cost.sum())
            self._visit("head", model.head_weight, None, stats, visit, keep)
        model.release()
        if not model.config.tied:
            uniform = uniform_stats(self.specs["embed"])
            stats = table_stats(self.ids, grad, model.config.vocab_size) if self.hessians else uniform
            self._visit("embed", model.embedding, None, stats, visit, keep)
        model.release()

    def _again(self, visit: Visit) -> None:
        layers = self.model.config.num_layers
        for index in range(layers - 1, -1, -1):
            block = self.model.block(index)
            for group, weight in block.weights.items():
                name = f"layers.{index}.{group}"
                visit(name, weight, block.biases[group], self._kept[name])
            self.progress("quantise", layers - index, layers + 1)
        visit("head", self.model.head_weight, None, self._kept["head"])
        if not self.model.config.tied:
            visit("embed", self.model.embedding, None, self._kept["embed"])
        self.progress("quantise", layers + 1, layers + 1)


def table_stats(ids: torch.Tensor, grad: torch.Tensor, vocab: int) -> GroupStats:
    """Statistics of an embedding table as if it were a linear layer on one-hot inputs, turned about: rows matter by how
    often their token occurs, columns by the squared gradient of the loss at that coordinate.

    ids: i64 [B, N]; grad: f32 [B, N, D], the loss's gradient at the embeddings.
    """
    squared = grad.reshape(-1, grad.shape[-1]).square().mean(0, dtype=torch.float64)
    counts = torch.bincount(ids.flatten(), minlength=vocab).double() + COUNT_FLOOR
    zero = torch.zeros_like(squared)
    empty = torch.empty(0, len(squared))
    return GroupStats(zero, squared, counts / counts.sum(), empty, hessian=torch.diag(squared).float())


def uniform_stats(spec: GroupSpec) -> GroupStats:
    """For a table that is looked up and not multiplied: all rows and columns matter alike."""
    one = torch.ones(spec.in_features, dtype=torch.float64)
    rows = torch.ones(spec.weights // spec.in_features, dtype=torch.float64)
    return GroupStats(torch.zeros_like(one), one, rows, torch.empty(0, spec.in_features))
