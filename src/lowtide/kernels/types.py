"""What goes into an engine with each token, and what comes out beside the logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PolicyParams:
    """The mask rule of one token.

    Attributes:
        rule: name of the rule, a key of `lowtide.rules.RULES`.
        thresholds: f32 [groups, S], the rule's params for each group: layers 0..n-1 times (qkv, o, gate_up, down),
            then head.
        gains: f32 [groups] for the rule `ipn`, how far a token moves each group's thresholds (0 for the head); None: 0.
        bits: the budget they are made for, bits per weight, if it is not the one asked for.
        head_offset, head_margin: how the head is read. An offset other than 0: twice, all rows with thresholds that are
            moved by head_offset as well (higher reads less), then, as `thresholds` say, the tiles of rows that hold a
            logit within head_margin nats of the largest.
        log2_offset: how far the budget controller has moved them (`Rule.shift`); higher reads less.
    """

    rule: str
    thresholds: NDArray[np.float32]
    log2_offset: float = 0.0
    gains: NDArray[np.float32] | None = None
    bits: float | None = None
    head_offset: float = 0.0
    head_margin: float = 0.0

    def moved(self, log2_offset: float) -> PolicyParams:
        """The same, moved by the budget controller: `dataclasses.replace` without looking fields up, for every token
        comes here."""
        rest = (self.gains, self.bits, self.head_offset, self.head_margin)
        return PolicyParams(self.rule, self.thresholds, log2_offset, *rest)

    @property
    def head_twice(self) -> bool:
        """Whether the head is read coarsely first and then in part again."""
        return self.head_offset != 0 and self.rule != "dense"


@dataclass(frozen=True)
class DecodeStats:
    """What one token read.

    Attributes:
        body_bits: for the linear layers of the decoder, side data included.
        head_bits: for the output head (side data included) and the embedding row.
        bytes_read: all of these in bytes, and the KV cache.
    """

    body_bits: int
    head_bits: int
    bytes_read: int
