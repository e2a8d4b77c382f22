"""Mask rules: which slices of which channels a token reads. One file each, `RULES` lists them.

Rules are pure functions that run on numpy arrays and torch tensors alike; `docs/architecture.md` is their
specification, `literal.py` the slow form with one score for each single weight that they are tested against.
"""

from __future__ import annotations

from lowtide.rules import policy as _policy
from lowtide.rules.base import ALWAYS, GroupStats, IpnStats, Rule
from lowtide.rules.channel_abs import ChannelAbs
from lowtide.rules.channel_norm import ChannelNorm
from lowtide.rules.dense import Dense
from lowtide.rules.gate import Gate
from lowtide.rules.ipn import Ipn
from lowtide.rules.policy import Policy
from lowtide.rules.statistical_topk import StatisticalTopK
from lowtide.rules.topk import TopK

RULES: dict[str, Rule] = {
    rule.name: rule for rule in (ChannelNorm(), ChannelAbs(), Gate(), TopK(), StatisticalTopK(), Dense(), Ipn())
}


def get_rule(name: str) -> Rule:
    """The rule of that name; `rule:levels` works too. Unknown names raise a LowtideError with the list."""
    return _policy.get_rule(name.partition(":")[0].strip(), RULES)


def parse_policy(text: str, slices: int) -> Policy:
    """A policy from `rule` or `rule:levels` for an artifact with that many slices; LowtideError if it is wrong."""
    return _policy.parse_policy(text, slices, RULES)


__all__ = ["ALWAYS", "RULES", "GroupStats", "IpnStats", "Policy", "Rule", "get_rule", "parse_policy"]
