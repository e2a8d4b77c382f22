"""Masks shared along the residual stream: `qkv` and `gate_up` take theirs from the layer before.

Neighbouring layers add little to the residual stream, so that the inputs of the same group in two of them are alike,
but for the norms' weights, which are taken out. Ways to share (`Steps.share`):

    levels        every other layer takes the levels of the layer before: half of the scores are not computed
    levels ahead  every layer but the first does (of the fresh ones made there): masks are known a layer early
    input         every other layer scores |a_j| of the layer before with its own importance, lift and thresholds
    input ahead   every layer but the first does
    within        gate_up scores |a_j| of its own layer's qkv: the residual stream before attention
"""

from __future__ import annotations

import torch

from lowtide.arch import LAYER_NORMS
from lowtide.eval.rivals.base import BlockState
from lowtide.eval.rivals.model import RivalModel
from lowtide.eval.rivals.nested import HierarchyPlan
from lowtide.eval.rivals.scores import VALUE_BITS
from lowtide.rules.hierarchy import Decision, decide

SHARED = {"qkv": LAYER_NORMS[0], "gate_up": LAYER_NORMS[1]}
"""Groups that read the residual stream, and the norm before each."""


class NeighbourPlan(HierarchyPlan):
    """A plan whose masks come from elsewhere, see above. `memory[kind]`: what the last layer left there."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.memory: dict[str, tuple[torch.Tensor, Decision]] = {}

    def decide(
        self, model: RivalModel, name: str, x: torch.Tensor, lift: torch.Tensor | None, block: BlockState
    ) -> Decision:
        """Its own decision, or one from the neighbour's levels or input."""
        _, layer, kind = name.split(".")
        if kind not in SHARED:
            return super().decide(model, name, x, lift, block)
        index, share = int(layer), self.steps.share
        a = x - model.groups[name].stats.mean
        plain = a / _gain(model, index, kind)
        source = self.memory.get("qkv" if share == "within" else kind)
        if share == "within":
            takes = kind == "gate_up"
        else:
            takes = index > 0 and (share.endswith("ahead") or index % 2 == 1)
        own = None
        if not takes or share == "levels ahead":
            own = super().decide(model, name, x, lift, block)
        found = own
        if takes:
            assert source is not None
            found = self._taken(model, name, source, lift, own)
        assert found is not None
        self.memory[kind] = (plain, found if own is None else own)
        return found

    def _taken(
        self,
        model: RivalModel,
        name: str,
        source: tuple[torch.Tensor, Decision],
        lift: torch.Tensor | None,
        own: Decision | None,
    ) -> Decision:
        """A decision from a neighbour's (plain input, decision). own: made for the layer after, and paid for here."""
        plain, theirs = source
        _, layer, kind = name.split(".")
        if self.steps.share.startswith("levels"):
            exact = self.scores.importance(model, name) == 0
            nothing = torch.zeros_like(theirs.fine)
            fine, scores, decisions = (nothing,) * 3 if own is None else (own.fine, own.scores, own.decisions)
            return Decision(torch.where(exact, 0, theirs.levels), theirs.open, fine, scores, decisions)
        a = plain * _gain(model, int(layer), kind)
        return decide(self.masks, a, self.scores.importance(model, name), self.cuts(name), lift)

    def side_bits(self, model: RivalModel, name: str) -> int:
        """The weights of the norm it came from besides, to take them out, where the neighbour's input is scored."""
        _, layer, kind = name.split(".")
        share = self.steps.share
        takes = kind == "gate_up" if share == "within" else int(layer) > 0 and kind in SHARED
        extra = VALUE_BITS * model.groups[name].planes.shape[2]
        if share == "input" and int(layer) % 2 == 0:
            takes = False
        return super().side_bits(model, name) + (extra if takes and not share.startswith("levels") else 0)


def _gain(model: RivalModel, index: int, kind: str) -> torch.Tensor:
    """The weights of the norm before a group, f32 [in]; those next to 0 are held away from it."""
    gain = model.norms[f"model.layers.{index}.{SHARED[kind]}"]
    return torch.where(gain < 0, -1.0, 1.0) * gain.abs().clamp_min(1e-6)
