"""TEAL's greedy allocation: which matrix of a block gives up its next share of channels at the least error.

From a full read, every step takes an equal number of weights (so a small matrix loses a larger share) from the matrix
at which the block's output suffers least, until nothing is left; the path gives the densities for every budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lowtide.arch import GROUPS
from lowtide.compress.dense import Block, decoder_block, rope_tables
from lowtide.eval.rivals.calibration import Calibration, Table

STEPS = 40
"""Steps from a full read of a block to none."""
TOKENS = 256
"""Of one calibration window, on which the error is measured."""
SETTLED = 0.25
"""The first quarter of the window is left out of the error: the first tokens' massive activations would rule it."""
MEMBERS = {group: tuple(f"{group}.{i}" for i in range(len(members))) for group, members in GROUPS.items()}
"""Names of the matrices of a block: `qkv.0` is the query's."""
Score = Callable[[str, str, torch.Tensor], torch.Tensor]
"""`score(group's full name, matrix, x [..., in])`: the scores [..., in] of the matrix's input channels."""


@dataclass
class Paths:
    """Densities of every matrix along the path: `steps[layer]` is a list of (density of the block, {matrix: density}),
    densest first."""

    steps: list[list[tuple[float, dict[str, float]]]]

    def at(self, layer: int, density: float) -> dict[str, float]:
        """Densities of a block's matrices at an overall density, linear between steps."""
        path = self.steps[layer]
        for (high, above), (low, below) in zip(path, path[1:], strict=False):
            if low <= density <= high:
                t = (density - low) / (high - low) if high > low else 0.0
                return {m: below[m] + t * (above[m] - below[m]) for m in above}
        return dict(path[0][1] if density > path[0][0] else path[-1][1])


def greedy_paths(calibration: Calibration, score: Score, tables: dict[tuple[str, str], Table]) -> Paths:
    """The paths of all blocks. tables: distribution of the scores by (group's full name, matrix)."""
    ids = calibration.ids[:1, :TOKENS]
    states = calibration.dense.block_inputs(ids)
    steps = []
    for index in range(calibration.dense.config.num_layers):
        trial = _Trial(calibration, index, states[index], score, tables)
        steps.append(list(_path(trial)))
    return Paths(steps)


def _path(trial: _Trial) -> Iterator[tuple[float, dict[str, float]]]:
    sizes = trial.sizes
    total = sum(sizes.values())
    density = dict.fromkeys(sizes, 1.0)
    yield 1.0, dict(density)
    while any(density.values()):
        errors = {}
        for matrix, d in density.items():
            if d > 0:
                errors[matrix] = trial.error(density | {matrix: max(0.0, d - total / STEPS / sizes[matrix])})
        worst = min(errors, key=errors.__getitem__)
        density[worst] = max(0.0, density[worst] - total / STEPS / sizes[worst])
        if density[worst] < 1e-9:
            density[worst] = 0.0
        yield sum(density[m] * sizes[m] for m in sizes) / total, dict(density)


class _Trial:
    """One block under trial densities. Products whose inputs and mask have not changed are kept."""

    def __init__(
        self, calibration: Calibration, index: int, x: torch.Tensor, score: Score, tables: dict[tuple[str, str], Table]
    ) -> None:
        self.calibration, self.x, self.score, self.tables = calibration, x, score, tables
        self.block: Block = calibration.dense.block(index)
        self.prefix = f"layers.{index}."
        self.rope = rope_tables(calibration.dense.config, 0, x.shape[1])
        self.rows = {g: calibration.model.parts[self.prefix + g] for g in GROUPS}
        self.sizes = {
            m: float((rows.stop - rows.start) * self.block.weights[g].shape[1])
            for g in GROUPS
            for m, rows in zip(MEMBERS[g], self.rows[g], strict=True)
        }
        self.kept: dict[tuple[object, ...], torch.Tensor] = {}
        self.target = self._run(dict.fromkeys(self.sizes, 1.0))

    def error(self, density: dict[str, float]) -> float:
        """Distance of the block's output from the dense one's."""
        first = int(SETTLED * self.x.shape[1])
        return float((self._run(density) - self.target)[:, first:].norm())

    def _run(self, density: dict[str, float]) -> torch.Tensor:
        if len(self.kept) > 64:
            self.kept.clear()
        upstream: list[object] = []

        def apply(group: str, x: torch.Tensor) -> torch.Tensor:
            parts = []
            for matrix, rows in zip(MEMBERS[group], self.rows[group], strict=True):
                key = (*upstream, matrix, density[matrix])
                if key not in self.kept:
                    self.kept[key] = self._product(group, matrix, rows, x, density[matrix])
                parts.append(self.kept[key])
            upstream.extend(density[m] for m in MEMBERS[group])
            return torch.cat(parts, -1)

        norms = (self.block.input_norm, self.block.post_norm)
        return decoder_block(self.calibration.dense.config, norms, self.x, apply, self.rope)

    def _product(self, group: str, matrix: str, rows: slice, x: torch.Tensor, density: float) -> torch.Tensor:
        weight, bias = self.block.weights[group][rows], self.block.biases[group]
        name = self.prefix + group
        if density < 1.0:
            stats = self.calibration.model.groups[name].stats
            read = self.score(name, matrix, x) > self.tables[name, matrix].at(density)
            if stats.exact is not None:
                read = read | stats.exact
            x = torch.where(read, x, stats.mean)
        return F.linear(x, weight, None if bias is None else bias[rows])
