"""The static baseline: round every weight to nearest on a grid per group of 64, the same for every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lowtide.arch import group_specs
from lowtide.compress.sources import Source

GROUP = 64
SCALE_BITS = 16
HEAD_BITS = 6
"""Embedding and output head are kept at this width at least, as llama.cpp's mixes do."""
FACTORS = tuple(0.5 + 0.025 * i for i in range(25))
"""Candidates for a group's scale, as parts of the one that the largest weight asks for."""


def round_to_nearest(weight: torch.Tensor, bits: int, group: int = GROUP) -> torch.Tensor:
    """weight f32 [out, in] on the grid scale * (-2^(bits-1) .. 2^(bits-1) - 1), one float16 scale per `group` inputs.

    The scale is that of the largest magnitude times the factor that leaves the least squared error. Where in is no
    multiple of the group, the last group is shorter.
    """
    parts = [_round_groups(weight[:, start : start + group], bits) for start in range(0, weight.shape[1], group)]
    return torch.cat(parts, 1)


def _round_groups(block: torch.Tensor, bits: int) -> torch.Tensor:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest = block.abs().amax(1, keepdim=True).clamp_min(1e-8) / 2 ** (bits - 1)
    best, best_error = block, torch.full_like(largest, float("inf"))
    for factor in FACTORS:
        scale = (largest * factor).half().float().clamp_min(6e-8)
        coded = (block / scale).round().clamp(low, high) * scale
        error = (coded - block).square().sum(1, keepdim=True)
        best = torch.where(error < best_error, coded, best)
        best_error = torch.minimum(error, best_error)
    return best


def stored_bits(out: int, inputs: int, bits: int, group: int = GROUP) -> int:
    """Bits of a matrix coded by `round_to_nearest`, scales included."""
    return out * (inputs * bits + SCALE_BITS * -(-inputs // group))


@dataclass
class RoundedSource:
    """A `Source` whose matrices have been rounded: the decoder's to `bits`, embedding and head to HEAD_BITS or more."""

    source: Source
    bits: int
    _widths: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"{self.source.name}, rounded to {self.bits} bits"
        self.config = self.source.config
        self.has: Callable[[str], bool] = self.source.has
        self.stored = self.source.stored
        self.tokenizer_files = self.source.tokenizer_files
        self.fingerprint = self.source.fingerprint
        self._widths = {}
        for spec in group_specs(self.config):
            for linear in spec.linears:
                self._widths[f"{linear.name}.weight"] = self.bits if spec.is_body else max(self.bits, HEAD_BITS)

    def tensor(self, name: str) -> torch.Tensor:
        """The rounded tensor as float32; norms and biases are left alone."""
        tensor = self.source.tensor(name)
        return round_to_nearest(tensor, self._widths[name]) if name in self._widths else tensor

    def bits_per_weight(self) -> tuple[float, float]:
        """(of the decoder's linear layers, of all matrices), scales included."""
        body_bits = body = all_bits = total = 0
        for spec in group_specs(self.config):
            for linear in spec.linears:
                used = stored_bits(linear.out_features, linear.in_features, self._widths[f"{linear.name}.weight"])
                all_bits, total = all_bits + used, total + linear.weights
                if spec.is_body:
                    body_bits, body = body_bits + used, body + linear.weights
        return body_bits / body, all_bits / total
