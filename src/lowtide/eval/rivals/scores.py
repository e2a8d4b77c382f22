"""What our own masks start from, channel by channel: importance, the token's lift and thresholds of `channel-norm` or
`ipn`, with the bits that each of them reads."""

from __future__ import annotations

import torch

from lowtide.errors import LowtideError
from lowtide.eval.rivals.base import THRESHOLD_BITS, BlockState
from lowtide.eval.rivals.calibration import WATERLINE, Calibration
from lowtide.eval.rivals.model import RivalModel
from lowtide.rules import get_rule
from lowtide.rules.ipn import token_offset
from lowtide.runtime.budget import policy_params

IPN = "ipn"
VALUE_BITS = 16
"""Bits of a mean, an importance or a bias, f16."""


class Scores:
    """Scores of one stored policy at one budget.

    `cuts[group]`: f32 [S]. A budget outside the range that the policy stores is moved to its end: what a mask that
    saves, or a check that costs, leaves for the digits may lie there, and the offset settles the rest.

    Raises:
        LowtideError: the artifact does not store the policy, it is another one than channel-norm and ipn, or it is ipn
            with centroids or factors.
    """

    def __init__(self, calibration: Calibration, policy: str, bits: float) -> None:
        if policy not in (WATERLINE, IPN):
            raise LowtideError(f"policy {policy}: nested masks start from the scores of {WATERLINE} or {IPN}")
        artifact = calibration.artifact
        low, high = artifact.manifest.budgets[0], artifact.manifest.budgets[-1]
        if policy == IPN and artifact.manifest.ipn is not None:
            if artifact.manifest.ipn["centroids"]:
                raise LowtideError(f"policy {policy}: this artifact's has centroids, and rivals know one mean only")
            if artifact.manifest.ipn["factors"]:
                raise LowtideError(f"policy {policy}: this artifact's q, k and v differ, and rivals know one mask only")
            low, high = max(low, artifact.manifest.ipn["low"]), min(high, artifact.manifest.ipn["high"])
        params = policy_params(artifact, policy, min(max(bits, low), high))
        names = [name for name in artifact.groups if name != "embed"]
        self.policy, self.rule = policy, get_rule(policy)
        self.cuts = {name: torch.from_numpy(row.copy()) for name, row in zip(names, params.thresholds, strict=True)}
        gains = [0.0] * len(names) if params.gains is None else params.gains.tolist()
        self.gains = dict(zip(names, gains, strict=True))

    def importance(self, model: RivalModel, name: str) -> torch.Tensor:
        """f32 [in], 0 for exact channels."""
        stats = model.groups[name].stats
        found = stats.ipn.importance if self.policy == IPN and stats.ipn is not None else stats.importance
        assert isinstance(found, torch.Tensor)
        return found

    def see(self, model: RivalModel, name: str, x: torch.Tensor, block: BlockState) -> None:
        """Leave the features of a group's input x f32 [..., in] in `block`, where lifts find them."""
        found = self.rule.features(model.groups[name].stats, x)
        if found is not None:
            block["features"] = found

    def lift(self, model: RivalModel, name: str, block: BlockState) -> torch.Tensor | None:
        """2^(gain o) of the tokens for a group, f32 [...]; None where the policy has no such thing."""
        ipn = model.groups[name].stats.ipn
        if self.policy != IPN or ipn is None or ipn.mix is None:
            return None
        lift: torch.Tensor = torch.exp2(self.gains[name] * token_offset(ipn.mix, block["features"]))
        return lift

    def side_bits(self, model: RivalModel, name: str) -> int:
        """Bits of a group's side data under the policy, importance left out: it is counted where it is read."""
        group = model.groups[name]
        side = group.ipn_side_bits if self.policy == IPN else group.side_bits
        return side - VALUE_BITS * group.planes.shape[2]

    def kept_bits(self, model: RivalModel, name: str) -> int:
        """Those of them that a closed layer reads all the same: means, thresholds, the policy's network, the bias."""
        group = model.groups[name]
        network = group.ipn_side_bits - group.side_bits if self.policy == IPN else 0
        slices, out, inputs = group.planes.shape
        return network + VALUE_BITS * (inputs + out) + THRESHOLD_BITS * slices
