"""Nested masks: a coarse part that is closed spares the finer decisions in it.

    layer    a group of linear layers (or a whole block of the decoder) for one token
    block    a run of neighbouring channels
    neuron   a row of `up` and its channel of `down`, by the gate's value
    channel  one input channel: its level
    weight   the class of a weight's first digit: its level, once slice 0 of the channel has told it

A part's score is that of a channel, taken over the part: root mean square of |a_j| times root mean square of the
importance v_j, so that one number per part is read in place of one per channel. A part is open if its score is above
`factor * t_1`, t_1 being the waterline of the lowest level; a factor of 0 closes nothing but silent parts. Rules are
those of `lowtide.rules.base` with one score, `|a_j| v_j lift`; lift is the token's factor (2^(gain o) under `ipn`).

Functions are pure and run on numpy and torch. Coarse steps lose more than they spare buys elsewhere (docs/dynamic.md),
so no engine runs them; `lowtide.eval.rivals.hierarchy` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowtide.errors import LowtideError
from lowtide.rules.arrays import Array, astype, like, namespace
from lowtide.rules.base import count_above

GRAINS = ("layer", "block", "neuron", "channel", "weight")


@dataclass(frozen=True)
class Hierarchy:
    """Which steps are on, layer and block and channel; neuron and weight have functions of their own.

    Attributes:
        layer: factor of the layer's cut; None switches the step off.
        block: channels of a run; 0 switches the step off.
        block_cut: factor of the runs' cut.
        channel: whether channels choose their own level. Otherwise a run has one level, from its score.

    Raises:
        LowtideError: a factor or a size below 0, or runs of no channels that are to choose the level.
    """

    layer: float | None = None
    block: int = 0
    block_cut: float = 1.0
    channel: bool = True

    def __post_init__(self) -> None:
        if self.block < 0 or self.block_cut < 0 or (self.layer is not None and self.layer < 0):
            raise LowtideError(f"{self}: sizes and factors must not be negative")
        if not self.channel and not self.block:
            raise LowtideError(f"{self}: without channels a run needs a size; give block")


@dataclass(frozen=True)
class Decision:
    """What `decide` found, and what it took.

    Attributes:
        levels: i32 [..., in].
        open: bool [...], whether the layer is open.
        fine: i32 [...], channels whose own score was computed (and importance read).
        scores: i32 [...], scores computed, coarse ones included.
        decisions: i32 [...], comparisons: one per coarse part looked at; level + 1, at most S, of what has a level.
    """

    levels: Array
    open: Array
    fine: Array
    scores: Array
    decisions: Array


def run_scores(a: Array, importance: Array, size: int) -> Array:
    """Scores f32 [..., runs] of runs of `size` neighbouring channels, the last one may be shorter.

    a: f32 [..., in], centred; importance: f32 [in]. Channels without importance (exact ones) do not count.
    """
    counted = astype(importance > 0, "float32")
    number = _sums(counted, size).clip(like(1, a))
    magnitude = _sums(a * a * counted, size) / number
    return (magnitude * (_sums(importance * importance, size) / number)) ** 0.5


def spread(parts: Array, size: int, channels: int) -> Array:
    """The run's value for each of its channels: [..., runs] -> [..., channels]."""
    xp = namespace(parts)
    return parts[..., xp.arange(channels) // size]


def decide(
    hierarchy: Hierarchy,
    a: Array,
    importance: Array,
    cuts: Array,
    lift: Array | None = None,
    open_layer: Array | None = None,
    open_channels: Array | None = None,
) -> Decision:
    """Levels of one group's channels, coarse steps first.

    Args:
        hierarchy: the steps.
        a: f32 [..., in], input minus mean.
        importance: f32 [in], 0 for exact channels, which have level 0.
        cuts: f32 [S], ascending.
        lift: f32 [...], factor of a token's scores; 1 by default.
        open_layer: bool [...], decided already by a coarser step (a block of the decoder); all by default.
        open_channels: bool [..., in], decided already (neurons); all by default.
    """
    channels = a.shape[-1]
    if lift is not None:
        a = a * lift[..., None]
    live = astype(importance > 0, "bool")
    score = abs(a) * importance
    is_open = astype(namespace(a).ones_like(a[..., 0]), "bool") if open_layer is None else open_layer
    scores = decisions = nothing = 0 * astype(is_open, "int32")
    if hierarchy.layer is not None:
        looked = astype(is_open, "int32")
        scores, decisions = scores + looked, decisions + looked
        is_open = is_open & (run_scores(a, importance, channels)[..., 0] > hierarchy.layer * cuts[0])
    allowed = is_open[..., None] & live
    if open_channels is not None:
        allowed = allowed & open_channels
    if hierarchy.block:
        size = hierarchy.block
        run = run_scores(a, importance, size)
        looked = _sums(astype(allowed, "float32"), size) > 0  # runs with something left to decide
        scores = scores + _count(looked)
        if not hierarchy.channel:
            levels = count_above(run, cuts) * astype(looked, "int32")
            decisions = decisions + _comparisons(levels, looked, len(cuts))
            levels = spread(levels, size, channels) * astype(allowed, "int32")
            return Decision(levels, is_open, nothing, scores, decisions)
        decisions = decisions + _count(looked)
        allowed = allowed & spread(run > hierarchy.block_cut * cuts[0], size, channels)
    levels = count_above(score, cuts) * astype(allowed, "int32")
    fine = _count(allowed)
    return Decision(levels, is_open, fine, scores + fine, decisions + _comparisons(levels, allowed, len(cuts)))


def open_neurons(gate: Array, factor: Array, cut: Array | float, exact: Array | None = None) -> Array:
    """Neurons to read, bool [..., neurons]: |silu(gate_i)| * factor_i > cut; those of exact channels always.

    gate: f32 [..., neurons], silu(gate); factor: f32 [neurons], what a gate of 1 makes of the score of the channel of
    `down`: importance times the root mean square of `up`.
    """
    passed = abs(gate) * factor > cut
    return passed if exact is None else passed | exact


def row_steps(sensitivity: Array, lowest: int = -3, highest: int = 1) -> Array:
    """How many levels of 2 bits a row's waterline moves: round(log2(sensitivity) / 2), i32 [..., rows] within bounds.

    sensitivity: f32 [..., rows], of the result to an error in the row, 1 being usual.
    """
    xp = namespace(sensitivity)
    steps = xp.round(xp.log2(sensitivity.clip(like(1e-20, sensitivity))) / 2)
    return astype(steps.clip(like(lowest, steps), like(highest, steps)), "int32")


def weight_levels(score: Array, levels: Array, factors: Array, cuts: Array) -> Array:
    """Levels i32 [C, ..., in] of the weights of C classes of the first digit, in channels with the given levels.

    A closed channel stays closed; an open one reads slice 0 of all its weights, which tells their classes, and a
    class reads on where `score_j * factors_c` is above the cuts. factors: f32 [C]; score f32, levels i32 [..., in].
    """
    first = astype(levels > 0, "int32")
    found = [count_above(score * f, cuts).clip(like(1, first)) * first for f in factors]
    stack: Array = namespace(score).stack(found)
    return stack


def _sums(x: Array, size: int) -> Array:
    """Sums over runs of the last axis: [..., n] -> [..., runs]."""
    whole = x.shape[-1] // size * size
    parts = x[..., :whole].reshape(*x.shape[:-1], whole // size, size).sum(-1)
    if whole == x.shape[-1]:
        return parts
    return namespace(x).concatenate([parts, x[..., whole:].sum(-1)[..., None]], -1)


def _count(mask: Array) -> Array:
    return astype(astype(mask, "int32").sum(-1), "int32")


def _comparisons(levels: Array, looked: Array, slices: int) -> Array:
    """Slices are asked for one after the other until one is not read."""
    asked = (levels + 1).clip(like(0, levels), like(slices, levels))
    return astype((asked * astype(looked, "int32")).sum(-1), "int32")
