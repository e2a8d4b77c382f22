"""Policies: a mask rule and the levels it may use, written `rule` or `rule:levels`, e.g. `channel-norm:0,4`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowtide.errors import LowtideError
from lowtide.rules.base import ALWAYS, Rule


@dataclass(frozen=True)
class Policy:
    """A parsed policy.

    Attributes:
        text: the policy in its shortest spelling, the name under which an artifact stores it.
        rule: the mask rule.
        levels: the levels the rule may choose, in slices, ascending; (0, 1, ..., S) unless restricted.
    """

    text: str
    rule: Rule
    levels: tuple[int, ...]

    @property
    def graded(self) -> bool:
        """Whether all levels 0..S may be used."""
        return self.levels == tuple(range(self.levels[-1] + 1))

    def expand(
        self, cuts: Sequence[float] | np.ndarray, slices: int, never: float = np.inf, always: float = ALWAYS
    ) -> np.ndarray:
        """params f32 [slices] from one cut for each step between allowed levels (len(levels) - 1 of them).

        Slices that are only allowed together share their step's cut, those above the highest level are never read,
        those up to a lowest level above 0 always.
        """
        out = np.full(slices, never, np.float32)
        out[: self.levels[0]] = always
        for low, high, cut in zip(self.levels[:-1], self.levels[1:], cuts, strict=True):
            out[low:high] = cut
        return out

    def shares(self, graded: np.ndarray) -> np.ndarray:
        """The shares f64 [S] of channels that read each slice, reshaped to the allowed levels at equal bits.

        `graded` [S] descends: the shares of a rule that may use every level. Each step between allowed levels takes
        the mean share of its slices; what a ceiling on the levels cuts off goes to the slices below it.
        """
        graded = np.asarray(graded, np.float64)
        out = np.zeros_like(graded)
        out[: self.levels[0]] = 1.0
        for low, high in zip(self.levels[:-1], self.levels[1:], strict=True):
            out[low:high] = graded[low:high].mean()
        surplus = graded.sum() - out.sum()
        for low, high in zip(self.levels[:-1], self.levels[1:], strict=True):
            step = np.clip(surplus / (high - low), -out[low], 1.0 - out[low])
            out[low:high] += step
            surplus -= step * (high - low)
        return np.minimum.accumulate(out)


def parse_policy(text: str, slices: int, rules: dict[str, Rule]) -> Policy:
    """Reads `rule` or `rule:levels`; levels are bits per weight, even, ascending, at most 2 * slices.

    Raises:
        LowtideError: an unknown rule or levels that do not fit.
    """
    name, colon, levels = text.partition(":")
    rule = get_rule(name.strip(), rules)
    if not colon:
        return Policy(rule.name, rule, tuple(range(slices + 1)))
    try:
        bits = [int(part) for part in levels.split(",")]
    except ValueError:
        bits = []
    if len(bits) < 2 or bits != sorted(set(bits)) or bits[0] < 0 or bits[-1] > 2 * slices or any(b % 2 for b in bits):
        wanted = ",".join(str(2 * s) for s in range(slices + 1))
        raise LowtideError(f"policy {text!r}: levels must be two or more of {wanted} (bits per weight), ascending")
    chosen = tuple(b // 2 for b in bits)
    suffix = "" if chosen == tuple(range(slices + 1)) else ":" + ",".join(str(b) for b in bits)
    return Policy(rule.name + suffix, rule, chosen)


def get_rule(name: str, rules: dict[str, Rule]) -> Rule:
    """The rule of that name, or a LowtideError that lists those known."""
    if name not in rules:
        raise LowtideError(f"unknown mask rule {name!r}: known are {', '.join(sorted(rules))}")
    return rules[name]
