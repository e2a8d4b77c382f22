"""What Python hands to the native engine for a token, made once and filled in anew each time.

A token of a 135M model reads some 50 MB, after which nothing that the interpreter needs is in a processor's cache: a
few dozen small objects made for a call, which cost next to nothing in a loop of their own, took a tenth of a
millisecond and more between tokens.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.kernels import library
from lowtide.kernels.types import DecodeStats, PolicyParams

RULES = {"dense": 0, "channel-norm": 1, "channel-abs": 2, "gate": 3, "topk": 4, "statistical-topk": 5, "ipn": 6}


class Call:
    """One sequence's token. Not for two threads at once: the engine's lock is held around it.

    Args:
        sequence: the native sequence.
        groups: how many groups have thresholds; ipn: whether the artifact has an importance prediction network.

    Attributes:
        step, policy: the native structures, which point to memory of this object.
    """

    def __init__(self, sequence: int, groups: int, ipn: bool) -> None:
        self._groups, self._ipn, self._slices = groups, ipn, 0
        self._params = np.full((groups, library.MAX_SLICES), np.inf, np.float32)
        self._gains = np.zeros(groups, np.float32)
        self._stats = library.Stats()
        self.policy = library.Policy(0, self._params.ctypes.data, 0.0, self._gains.ctypes.data, 0.0, 0.0)
        self.step = library.Step(sequence, 0, 0, ctypes.pointer(self.policy), None, ctypes.pointer(self._stats))

    def fill(self, policy: PolicyParams) -> library.Policy:
        """Take over a policy.

        Raises:
            LowtideError: an unknown rule, a rule that the artifact lacks the network for, or wrong shapes.
        """
        rule, thresholds, native = policy.rule, policy.thresholds, self.policy
        number = RULES.get(rule)
        if number is None:
            raise LowtideError(f"unknown mask rule {rule!r}: the native engine knows {', '.join(sorted(RULES))}")
        shape = thresholds.shape
        if len(shape) != 2 or shape[0] != self._groups or shape[1] > library.MAX_SLICES:
            raise LowtideError(f"thresholds must have shape ({self._groups}, slices), not {shape}")
        if shape[1] != self._slices:
            self._params.fill(np.inf)
            self._slices = shape[1]
        self._params[:, : shape[1]] = thresholds
        if rule == "ipn":
            self._take_gains(policy.gains)
        native.rule, native.log2_offset = number, policy.log2_offset
        native.head_offset, native.head_margin = policy.head_offset, policy.head_margin
        return native

    def _take_gains(self, gains: NDArray[np.float32] | None) -> None:
        if not self._ipn:
            raise LowtideError("rule ipn: the artifact has no importance prediction network; choose another --policy")
        if gains is not None and gains.shape != self._gains.shape:
            raise LowtideError(f"gains must have shape ({self._groups},), not {gains.shape}")
        self._gains[:] = 0.0 if gains is None else gains

    def read(self) -> DecodeStats:
        """What the engine says that the token read."""
        stats = self._stats
        body, head = stats.body_bits, stats.head_bits + stats.embed_bits
        return DecodeStats(body, head, (body + head + 7) // 8 + stats.cache_bytes)
