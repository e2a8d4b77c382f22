"""How sparsity grows while a model is trained (Zhu & Gupta 2017, "To prune, or not to prune")."""

from __future__ import annotations

from dataclasses import dataclass

from lowtide.compress.prune.masks import check_sparsity
from lowtide.errors import LowtideError


@dataclass(frozen=True)
class CubicSchedule:
    """s(t) = final + (initial - final) * (1 - t)^3 with t the share of the ramp that is over.

    initial, final: sparsities in [0, 1); begin, end: first and last step of the ramp; every: steps between changes.

    Raises:
        LowtideError: impossible sparsities or steps.
    """

    final: float
    initial: float = 0.0
    begin: int = 0
    end: int = 1000
    every: int = 1

    def __post_init__(self) -> None:
        check_sparsity(self.initial)
        check_sparsity(self.final)
        if not 0 <= self.begin < self.end or self.every < 1:
            raise LowtideError(f"schedule: steps {self.begin} to {self.end} by {self.every} are no ramp")

    def sparsity(self, step: int) -> float:
        """The sparsity that is due at a step."""
        if step >= self.end:
            return self.final
        done = max(0, step - self.begin) // self.every * self.every
        left = 1 - done / (self.end - self.begin)
        return self.final + (self.initial - self.final) * left**3
