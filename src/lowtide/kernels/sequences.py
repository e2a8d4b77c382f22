"""Several texts in one engine: what `decode_round` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.kernels.types import PolicyParams

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """One token of one text.

    Attributes:
        sequence: the text, from the engine's `sequence()`.
        token, pos, policy, want_logits: as in the engine's `decode`.
    """

    sequence: Any
    token: int
    pos: int
    policy: PolicyParams
    want_logits: bool = True


def check_round(steps: Sequence[Step]) -> None:
    """A round holds each sequence once.

    Raises:
        LowtideError: it does not.
    """
    if len({id(step.sequence) for step in steps}) != len(steps):
        raise LowtideError("a round takes one token of each sequence; decode the second one in the next round")
