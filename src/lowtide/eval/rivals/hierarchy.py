"""Nested and shared masks as rivals: what is tried, how factors are tuned, `HIERARCHIES`.

A coarse step's factor is set by the share of its parts that it would close on the calibration text under flat masks,
so that one share means the same at every budget; the share is tuned by KL as the rivals' settings are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lowtide.eval.rivals.base import BlockState, Fitted, Knobs, Rival
from lowtide.eval.rivals.calibration import WATERLINE, Calibration
from lowtide.eval.rivals.model import RivalModel
from lowtide.eval.rivals.neighbours import NeighbourPlan
from lowtide.eval.rivals.nested import HierarchyPlan, Neurons, Steps, split_classes
from lowtide.eval.rivals.scores import IPN, Scores
from lowtide.rules.hierarchy import Decision, run_scores

SHARES = ("layer", "whole", "block_cut", "neuron")
"""Settings that are given as the share of parts to close."""
ALWAYS = 1e4
"""Sensitivity of a row that is read whatever its gate says, unless the gate is shut."""


class Hierarchical(Rival):
    """Steps and the settings that are tried; starts from `ipn` where the artifact stores it, without centroids and
    factors, else `channel-norm`."""

    source = "nested masks of the specification; ours"

    def __init__(self, name: str, steps: Steps, **tried: tuple[Any, ...]) -> None:
        self.name, self.steps, self.tried = name, steps, tried  # type: ignore[misc]

    def fit(self, calibration: Calibration, policy: str | None = None) -> HierarchyFitted:
        """Statistics of the gates, if neurons are masked."""
        has = calibration.artifact.manifest.ipn
        found = WATERLINE if has is None or has["centroids"] or has["factors"] else IPN
        return HierarchyFitted(calibration, policy or found, self.steps, self.tried)


class HierarchyFitted(Fitted):
    """A hierarchy ready to be tuned."""

    def __init__(self, calibration: Calibration, policy: str, steps: Steps, tried: dict[str, tuple[Any, ...]]) -> None:
        self.calibration, self.policy, self.steps, self.tried = calibration, policy, steps, tried
        gates = steps.neuron is not None or "neuron" in tried or steps.rows
        self.neurons = gate_statistics(calibration, policy) if gates else None
        self.classes = split_classes(calibration.model) if steps.weight is not None else None
        self._seen: dict[tuple[float, int], dict[str, torch.Tensor]] = {}

    def knobs(self, bits: float) -> Knobs:
        """Whatever the registry lists."""
        return dict(self.tried)

    def plan(self, bits: float, **setting: Any) -> HierarchyPlan:
        """The plan of the steps with some of them set; shares become factors."""
        steps = replace(self.steps, **setting)
        scores = Scores(self.calibration, self.policy, bits)
        wanted = [name for name in SHARES if getattr(steps, name) is not None]
        if not steps.block or not steps.channel:
            wanted.remove("block_cut")
        if wanted:
            seen = self._ratios(scores, steps.block, bits)
            factors: dict[str, Any] = {name: quantile(seen[name], getattr(steps, name)) for name in wanted}
            steps = replace(steps, **factors)
        kind = NeighbourPlan if steps.share else HierarchyPlan
        return kind(scores, steps, self.neurons, self.classes)

    def _ratios(self, scores: Scores, block: int, bits: float) -> dict[str, torch.Tensor]:
        """Scores of coarse parts over the waterline on the choice windows, by setting."""
        if (bits, block) not in self._seen:
            recorder = Recorder(scores, block, self.neurons)
            self.calibration.model.states(self.calibration.choice, recorder)
            self._seen[bits, block] = {name: torch.cat(parts) for name, parts in recorder.seen.items() if parts}
        return self._seen[bits, block]


class Recorder(HierarchyPlan):
    """Flat masks; `seen[setting]` keeps every coarse part's score over the waterline of its group."""

    def __init__(self, scores: Scores, block: int, neurons: dict[str, Neurons] | None) -> None:
        super().__init__(scores, Steps(), neurons)
        self.size = block
        self.seen: dict[str, list[torch.Tensor]] = {name: [] for name in SHARES}

    def decide(
        self, model: RivalModel, name: str, x: torch.Tensor, lift: torch.Tensor | None, block: BlockState
    ) -> Decision:
        """As ever."""
        a, importance, cut = x - model.groups[name].stats.mean, self.scores.importance(model, name), self.cuts(name)[0]
        a = a if lift is None else a * lift[..., None]
        whole = run_scores(a, importance, a.shape[-1]).flatten() / cut
        self.seen["layer"].append(whole)
        if name.endswith(".qkv"):
            self.seen["whole"].append(whole)
        if self.size:
            self.seen["block_cut"].append(run_scores(a, importance, self.size).flatten() / cut)
        if name.endswith(".down") and self.neurons:
            judged = block["gate"].abs() * self.neurons[name.rpartition(".")[0]].reach
            judged = judged if lift is None else judged * lift[..., None]
            self.seen["neuron"].append(judged.flatten() / cut)
        return super().decide(model, name, x, lift, block)


def quantile(values: torch.Tensor, share: float) -> float:
    """What this share of the values f32 [n] does not exceed."""
    place = min(max(int(share * values.numel()), 1), values.numel())
    return float(values.kthvalue(place).values)


def gate_statistics(calibration: Calibration, policy: str) -> dict[str, Neurons]:
    """`Neurons` of every layer from the dense model's gates on the calibration text."""
    scores = Scores(calibration, policy, calibration.artifact.manifest.budgets[0])
    found = {}
    for index, _, inputs in calibration.blocks():
        layer = f"layers.{index}"
        importance = scores.importance(calibration.model, f"{layer}.down")
        exact = importance == 0  # a channel of `down` that is always read asks for its row of `up`
        usual = (inputs["gate"] * importance).square().mean().sqrt()
        reach = importance * inputs["up"].square().mean(0).sqrt()
        found[layer] = Neurons(reach.half().float(), torch.where(exact, ALWAYS, importance / usual))
    return found


HIERARCHIES: dict[str, Hierarchical] = {
    rival.name: rival
    for rival in (
        Hierarchical("channel (flat)", Steps()),
        Hierarchical("layer > channel", Steps(), layer=(0.02, 0.01)),
        Hierarchical("decoder block > channel", Steps(), whole=(0.02, 0.01)),
        Hierarchical("block > channel", Steps(block=8), block_cut=(0.05, 0.15)),
        Hierarchical("block of 2 for channel", Steps(block=2, channel=False)),
        Hierarchical("block of 4 for channel", Steps(block=4, channel=False)),
        Hierarchical("neuron > channel", Steps(), neuron=(0.1, 0.3)),
        Hierarchical("layer > block > neuron > channel", Steps(layer=0.01, block=8, block_cut=0.05, neuron=0.1)),
        Hierarchical("up by rows", Steps(rows="rows"), tilt=(1.0, 2.0)),
        Hierarchical("up by rows and channels", Steps(rows="both"), tilt=(1.0, 2.0)),
        Hierarchical("channel > weight", Steps(weight=0.25), weight=(0.25, 0.5)),
        Hierarchical("levels of the layer before, every other", Steps(share="levels")),
        Hierarchical("levels of the layer before, all layers", Steps(share="levels ahead")),
        Hierarchical("input of the layer before, every other", Steps(share="input")),
        Hierarchical("input of the layer before, all layers", Steps(share="input ahead")),
        Hierarchical("input of qkv for gate_up", Steps(share="within")),
    )
}
