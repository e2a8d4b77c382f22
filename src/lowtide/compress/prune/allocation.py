"""How a model's sparsity is shared among its layers.

uniform: every layer the same. erk: dense where layers are small (Evci et al. 2020, "Rigging the lottery"). global: one
threshold over all layers on a score that is in nats, so that layers the loss depends on keep more. searched: an
evolutionary search on the KL of the whole model (after EvoPress, Sieberling et al. 2024): errors of layers do not add.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowtide.compress.prune.base import LayerProblem
from lowtide.compress.prune.importance import saliency
from lowtide.compress.prune.masks import check_sparsity
from lowtide.errors import LowtideError

ALLOCATIONS = ("uniform", "erk", "global", "searched")
Sparsities = dict[str, float]
"""Layer name -> share of its weights that go."""
MOST = 0.98
"""No layer loses more than this by allocation alone."""
_LOW, _HIGH, _PER_OCTAVE = -120, 40, 64
"""The histogram's range in powers of two, and its bins for each doubling of the score."""


def uniform(sizes: Mapping[str, tuple[int, int]], sparsity: float) -> Sparsities:
    """Every layer the same. sizes: layer name -> (out, in)."""
    return dict.fromkeys(sizes, check_sparsity(sparsity))


def erk(sizes: Mapping[str, tuple[int, int]], sparsity: float) -> Sparsities:
    """Density proportional to (out + in) / (out * in), at most 1, the mean over all weights as asked."""
    check_sparsity(sparsity)
    dense: set[str] = set()
    total = sum(out * inn for out, inn in sizes.values())
    while True:
        budget = (1 - sparsity) * total - sum(sizes[n][0] * sizes[n][1] for n in dense)
        share = sum(out + inn for n, (out, inn) in sizes.items() if n not in dense)
        factor = budget / share if share else 0.0
        density = {n: 1.0 if n in dense else factor * (o + i) / (o * i) for n, (o, i) in sizes.items()}
        full = {n for n, d in density.items() if d > 1 and n not in dense}
        if not full:
            return {n: 1 - d for n, d in density.items()}
        dense |= full


@dataclass
class ScoreHistogram:
    """The distribution of scores of many layers, in bins of the logarithm: any model fits, layer by layer."""

    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros((_HIGH - _LOW) * _PER_OCTAVE, dtype=torch.float64))

    def add(self, name: str, score: torch.Tensor) -> None:
        """Take in a layer's scores, f32 [out, in], >= 0."""
        bins = (_HIGH - _LOW) * _PER_OCTAVE
        flat = score.reshape(-1)
        place = ((flat.clamp_min(1e-38).log2() - _LOW) * _PER_OCTAVE).long().clamp_(0, bins - 1)
        self.counts[name] = torch.bincount(place, minlength=bins).double()
        self.sums += torch.bincount(place, weights=flat.double(), minlength=bins)

    def sparsities(self, sparsity: float) -> Sparsities:
        """Each layer's share below the one threshold that removes `sparsity` of all weights."""
        check_sparsity(sparsity)
        all_counts = torch.stack(list(self.counts.values())).sum(0)
        wanted = sparsity * float(all_counts.sum())
        below = all_counts.cumsum(0)
        place = int(torch.searchsorted(below, torch.tensor(wanted, dtype=torch.float64)))
        place = min(place, len(below) - 1)
        before = float(below[place - 1]) if place else 0.0
        part = (wanted - before) / max(float(all_counts[place]), 1.0)  # of the bin that holds the threshold
        return {
            n: min(MOST, (float(c[:place].sum()) + part * float(c[place])) / float(c.sum()))
            for n, c in self.counts.items()
        }

    def knee(self) -> float:
        """The sparsity where the curve of error against sparsity breaks, as `masks.auto_sparsity` finds it."""
        counts = torch.stack(list(self.counts.values())).sum(0)
        if float(self.sums.sum()) <= 0:
            return 0.0
        removed, error = counts.cumsum(0) / counts.sum(), self.sums.cumsum(0) / self.sums.sum()
        return min(MOST, float(removed[int((removed - error).argmax())]))


def histogram(
    problems: Iterable[LayerProblem], score: Callable[[LayerProblem], torch.Tensor] = saliency
) -> ScoreHistogram:
    """The histogram of a model's scores."""
    result = ScoreHistogram()
    for problem in problems:
        result.add(problem.name, score(problem))
    return result


@dataclass
class Search:
    """The evolutionary search.

    A candidate gives each layer a level, an offset from its first sparsity in steps. A child raises the level of some
    layers and lowers it for as many of the same size, so the total stays exact. The best of the children and their
    parent lives on.

    Attributes:
        sizes: layer name -> (out, in).
        start: first sparsities.
        loss: `loss(sparsities)`, what is to be least, e.g. the KL in nats of the model pruned so.
        step: one level, as a share of the layer's weights.
        generations, children: how long and how wide.
        mutations: pairs of layers that a child changes at most.
        state: file that keeps the search, so that it goes on where it was; None for none.
    """

    sizes: Mapping[str, tuple[int, int]]
    start: Mapping[str, float]
    loss: Callable[[Sparsities], float]
    step: float = 0.05
    generations: int = 30
    children: int = 8
    mutations: int = 3
    seed: int = 0
    state: Path | None = None

    def run(self, progress: Callable[[str, int, int], None]) -> tuple[Sparsities, float]:
        """(best sparsities, their loss)."""
        best, score, first = self._resume()
        for generation in range(first, self.generations):
            progress("search", generation, self.generations)
            rng = random.Random(f"{self.seed}:{generation}")
            parent, tried = best, [best]
            for _ in range(self.children):
                child = self._mutate(parent, rng)
                if child in tried:
                    continue
                tried.append(child)
                loss = self.loss(self.sparsities(child))
                if loss < score:
                    best, score = child, loss
            self._save(best, score, generation + 1)
        progress("search", self.generations, self.generations)
        return self.sparsities(best), score

    def sparsities(self, levels: Mapping[str, int]) -> Sparsities:
        """What levels mean."""
        return {n: s + self.step * levels.get(n, 0) for n, s in self.start.items()}

    def _mutate(self, levels: dict[str, int], rng: random.Random) -> dict[str, int]:
        child = dict(levels)
        names = list(self.start)
        for _ in range(rng.randint(1, self.mutations)):
            up = rng.choice(names)
            others = [n for n in names if n != up and self.sizes[n] == self.sizes[up]]
            if not others:
                continue
            down = rng.choice(others)
            raised = self.start[up] + self.step * (child.get(up, 0) + 1)
            lowered = self.start[down] + self.step * (child.get(down, 0) - 1)
            if raised <= MOST and lowered >= 0:
                child[up] = child.get(up, 0) + 1
                child[down] = child.get(down, 0) - 1
        return {n: level for n, level in child.items() if level}

    def _key(self) -> str:
        return json.dumps([sorted(self.start.items()), self.step, self.children, self.mutations, self.seed])

    def _resume(self) -> tuple[dict[str, int], float, int]:
        if self.state is not None and self.state.exists():
            try:
                kept = json.loads(self.state.read_text(encoding="utf-8"))
                if kept["key"] != self._key():
                    raise LowtideError(f"{self.state}: belongs to another search; delete it")
                return dict(kept["levels"]), float(kept["loss"]), int(kept["generation"])
            except (ValueError, KeyError, TypeError) as error:
                raise LowtideError(f"{self.state}: damaged ({error}); delete it") from None
        return {}, self.loss(dict(self.start)), 0

    def _save(self, levels: dict[str, int], loss: float, generation: int) -> None:
        if self.state is None:
            return
        partial = self.state.with_name(self.state.name + ".part")
        text = json.dumps({"key": self._key(), "levels": levels, "loss": loss, "generation": generation})
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.state)
