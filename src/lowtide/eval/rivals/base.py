"""The interface of the rivals: rules from other papers, fitted to the same artifact on the same calibration text.

A `Rival` is fitted once. For a budget its `Fitted` offers settings (levels, ranks: what a paper leaves to be tuned) and
makes a `Plan` of each; `tune` (measure.py) keeps the plan with the least KL on calibration text. A plan computes one
group of linear layers at a time and says how many bits each token read for it. Everything a plan reads besides digits
is in `side_bits`: nobody gets a norm, a factor or a predictor for free.

Legend: B windows, N positions, `in` and `out` of a group, S slices. Leading dimensions are written [...].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lowtide.errors import LowtideError

if TYPE_CHECKING:
    from lowtide.eval.rivals.calibration import Calibration
    from lowtide.eval.rivals.model import RivalModel

BlockState = dict[str, torch.Tensor]
"""What a block has seen of these tokens so far: inputs [..., in] by group, and what a plan leaves there for itself."""
Knobs = dict[str, tuple[Any, ...]]
THRESHOLD_BITS = 32
"""Bits of one threshold, f32."""


class OutOfReach(LowtideError):
    """A rule cannot read that many bits: its floor is above the budget or its ceiling below."""


class Plan(ABC):
    """A fitted rival at one budget. `offset` is the one dial that moves all of its thresholds; higher reads less."""

    offset: float = 0.0

    @abstractmethod
    def product(
        self, model: RivalModel, name: str, x: torch.Tensor, block: BlockState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One group's layers for the input x f32 [..., in]: (y f32 [..., out], bits of digits read f32 [...])."""

    def side_bits(self, model: RivalModel, name: str) -> int:
        """Bits that every token reads for the group whatever its mask is.

        The artifact's side data without importance and thresholds, which most rivals do not need; they add their own.
        """
        group = model.groups[name]
        slices, inputs = len(group.planes), group.planes.shape[2]
        return group.side_bits - 16 * inputs - THRESHOLD_BITS * slices


class LevelPlan(Plan):
    """A plan that gives each input channel of a group one level, as our own rules do."""

    @abstractmethod
    def levels(self, model: RivalModel, name: str, x: torch.Tensor, block: BlockState) -> torch.Tensor:
        """Levels i32 [..., in] in 0..S; those of exact channels are ignored."""

    def product(
        self, model: RivalModel, name: str, x: torch.Tensor, block: BlockState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y f32 [..., out] and bits f32 [...]."""
        return model.read(name, x, self.levels(model, name, x, block))


class Fitted(ABC):
    """What a rival has learned from the calibration text. `trained_tokens`: tokens that gradients were taken on, or
    that a regression was solved on; 0 where only quantiles were taken."""

    trained_tokens: int = 0

    @abstractmethod
    def knobs(self, bits: float) -> Knobs:
        """Settings to try at a budget, by name, the likeliest first; each is a keyword of `plan`."""

    @abstractmethod
    def plan(self, bits: float, **setting: Any) -> Plan:
        """The plan of a setting whose thresholds should read `bits` per body weight.

        Raises:
            OutOfReach: the setting cannot read as many, or as few.
        """


class Rival(ABC):
    """One rule. `source` names the paper and its arXiv number."""

    name: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def fit(self, calibration: Calibration) -> Fitted:
        """Learn all that does not depend on the budget."""


def share_for(bits: float, fixed: float, per_share: float) -> float:
    """The share in 0..1 at which `fixed + share * per_share` bits are read; OutOfReach if there is none."""
    share = (bits - fixed) / per_share if per_share > 0 else -1.0
    if not 0.0 < share <= 1.0:
        raise OutOfReach(f"{bits:g} bits per weight are not between {fixed:.3g} and {fixed + per_share:.3g}")
    return share
