"""From a target (a file size or a KL) to the step: walk, measure, correct, until it fits.

At high rate a step twice as large saves one bit for each weight and costs four times the KL, so the next guess is
never far off.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowtide.arch import ModelConfig, group_specs
from lowtide.errors import LowtideError
from lowtide.format import codec, coded, layout
from lowtide.format.entropy import Tables, classes
from lowtide.format.groups import GroupTensors
from lowtide.kernels import entropy

FIRST_STEP = 1e-4
"""Step of the first walk for SmolLM2's number of weights; others scale it so that the total error is the same."""
FIRST_WEIGHTS = 134e6
ROUNDS = 7
"""Walks at most; coarse codes of small models took more than five."""
SIZE_SLACK = 0.01
"""A file may be this much smaller than asked for."""
KL_SLACK = 0.04
FIXED_BYTES, STREAM_BYTES = 4500, 24
MARGIN = 0.995
"""Aim this far below a size: the measure before coding is an estimate."""


@dataclass(frozen=True)
class Target:
    """At most one of: size of the whole artifact in bytes, KL in nats per token, the step itself."""

    size: float | None = None
    kl: float | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        for option, value in (("--size-mb", self.size), ("--kl", self.kl), ("--step", self.step)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise LowtideError(f"{option}: must be a number above 0")
        if sum(value is not None for value in (self.size, self.kl, self.step)) > 1:
            raise LowtideError("--size-mb, --kl and --step: give one of them")

    @property
    def free(self) -> bool:
        """Whether nothing is asked for."""
        return self.size is self.kl is self.step is None

    def fits(self, size: float, kl: float) -> bool:
        """Whether a coded model is what was asked for."""
        if self.size is not None:
            return (1 - SIZE_SLACK) * self.size <= size <= self.size
        return self.kl is None or (1 - KL_SLACK) * self.kl <= kl <= self.kl


@dataclass(frozen=True)
class Trial:
    """One walk: its step, bytes of the whole artifact, and KL on held-out text (nan if it was not asked for)."""

    step: float
    size: float
    kl: float


def first_step(weights: int) -> float:
    """Where a search begins."""
    return FIRST_STEP * math.sqrt(FIRST_WEIGHTS / weights)


def next_step(target: Target, trials: list[Trial], weights: int) -> float:
    """The step to try after these trials."""
    last = trials[-1]
    if target.size is not None:
        # sizes have no noise, and coarse codes lose less than a bit for each doubling
        return _secant([(math.log2(t.step), t.size) for t in trials], MARGIN * target.size, -weights / 8, least=0.05)
    assert target.kl is not None
    points = [(math.log2(t.step), math.log2(max(t.kl, 1e-9))) for t in trials]
    # KL is noisy where it is small: each walk that missed makes the next one more careful
    step = _secant(points, math.log2(target.kl * (1 - KL_SLACK / 2 * len(trials))), 2.0)
    return min(step, last.step * 16)


def _secant(points: list[tuple[float, float]], wanted: float, slope: float, least: float = 0.3) -> float:
    """Step at which a measure reaches what is wanted, by the two trials nearest to it, or by the slope of theory, if
    theirs is less than `least` of that, or more than three times as steep."""
    nearest = sorted(points, key=lambda p: abs(p[1] - wanted))[:2]
    (x, y) = nearest[0]
    if len(nearest) == 2 and abs(nearest[1][0] - x) > 1e-6:
        measured = (nearest[1][1] - y) / (nearest[1][0] - x)
        if least < measured / slope < 3:
            slope = measured
    return float(2.0 ** (x + (wanted - y) / slope))


def coded_size(groups: Callable[[str], GroupTensors], config: ModelConfig, other: int) -> float:
    """Estimate in bytes of the artifact that these groups (by name) make: entropy of the codes, deflated side data.

    other: bytes of its other files.
    """
    slices = groups(group_specs(config)[0].name).slices
    other += _overhead(config, slices)
    counts: dict[str, NDArray[np.int64]] = {}
    side = 0
    for spec in group_specs(config):
        group = groups(spec.name)
        middle = codec.doubled_centre(group.centres) // 2 if group.zero else None
        for linear in group.linears:
            q = codec.unpack_digits(linear.weight, linear.out_features, group.in_features, group.slices)
            rows, cols = classes(q, group.slices, middle)
            found = entropy.histogram(q, rows, cols, group.slices)
            kind = coded.kind(linear.name)
            counts[kind] = counts[kind] + found if kind in counts else found
            side += _deflated([rows, cols]) // 2
        packed = {f"{linear.name}.weight" for linear in group.linears}
        side += _deflated([t for name, t in group.tensors().items() if name not in packed])
    bits = 0.0
    for table in counts.values():
        fitted = Tables.fit(table, slices)
        bits += fitted.entropy_bits(table) + 8 * len(fitted.to_bytes())
    return bits / 8 + side + other


def _overhead(config: ModelConfig, slices: int) -> int:
    """Bytes of the weights' header, the manifest, its digest, config.json and the model card, nearly."""
    names = coded.coded_names(config, slices)
    header = layout.encode_header({name: layout.TensorSpan("U8", (10**5,), 10**7, 10**7) for name in names})
    layers = coded.linears(config)
    summary = sum(2 * len(layer.name) + 125 for layer in layers) + 40 * len(group_specs(config))
    return len(header) + summary + STREAM_BYTES * len(names) + FIXED_BYTES


def _deflated(arrays: list[np.ndarray]) -> int:  # type: ignore[type-arg]
    size = 0
    for array in arrays:
        planes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize).T
        size += len(zlib.compress(planes.tobytes(), 6))
    return size
