"""From a budget in bits per weight to the thresholds of one token, and the loop that keeps the budget.

An artifact stores thresholds for a few budgets (`manifest.budgets`, in `bits_read_body`). `policy_params`
interpolates between them; `BudgetController` then moves one common offset, so that the mean over
tokens lands on the target whatever the text is like.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.kernels.types import PolicyParams

if TYPE_CHECKING:
    from lowtide.format.groups import GroupTensors
    from lowtide.format.manifest import Manifest
    from lowtide.format.reader import Artifact

GAIN = 0.02
"""log2 of threshold per bit of error and token: a time constant of some 50 tokens, slow enough not to ring."""

FIRST_GAIN = 0.5
"""The gain of token t is at least FIRST_GAIN / t: half of the errors' running mean, so short texts settle, too."""

FULL_HEAD = (-math.inf, 0.0)
"""How the head is read: once, and all that the policy's levels allow, whatever the budget is. `policy_params` makes
thresholds of it; `PolicyParams` does not know it."""
MAX_OFFSET = 8.0
"""The controller never scales thresholds by more than 2^8: there every channel is on or off anyway."""


def parse_bits(text: str) -> float | None:
    """A `--bits` value: a positive number, or "dense", which becomes None."""
    if text.strip().lower() == "dense":
        return None
    try:
        bits = float(text)
    except ValueError:
        bits = float("nan")
    if not 0 < bits < 1000:
        raise LowtideError(f'--bits {text}: give a positive number of bits per weight, or "dense"')
    return bits


def parse_head(text: str) -> tuple[float, float]:
    """A `--head` value: (log2 offset of the first pass, margin in nats) for "OFFSET,MARGIN", (0, 0) for "once", and
    FULL_HEAD for "full".

    Raises:
        LowtideError: none of them.
    """
    word = text.strip().lower()
    if word in ("once", "full"):
        return FULL_HEAD if word == "full" else (0.0, 0.0)
    try:
        offset, margin = (float(part) for part in text.split(","))
    except ValueError:
        offset = margin = float("nan")
    if not (0 < offset <= MAX_OFFSET and 0 <= margin < math.inf):
        raise LowtideError(
            f'--head {text}: give "once", "full", or OFFSET,MARGIN such as 2.5,4: log2 of how much higher the first '
            f"pass's thresholds are, up to {MAX_OFFSET:g}, and nats"
        )
    return offset, margin


def body_weights(artifact: Artifact) -> int:
    """Weights in the decoder's linear layers (head and embedding left out): what budgets are counted per."""
    return sum(g.weights() for name, g in artifact.groups.items() if name not in ("head", "embed"))


def body_side_bits(artifact: Artifact, rule: str = "") -> int:
    """Bits that every token reads whatever its masks are: scales, outliers, exact channels, thresholds.

    rule: the mask rule (`PolicyParams.rule`); `ipn` has side data of its own.
    """
    body = (g for name, g in artifact.groups.items() if name not in ("head", "embed"))
    return sum(8 * g.side_bytes(rule == "ipn") for g in body)


def policy_params(
    artifact: Artifact, policy: str | None, bits: float | None, head: tuple[float, float] = (0.0, 0.0)
) -> PolicyParams:
    """Thresholds of `policy` at a budget.

    Args:
        artifact: an open artifact.
        policy: one of `artifact.manifest.policies` (`rule` or `rule:levels`), or "dense"; None takes the first stored.
        bits: target for bits_read_body, in bits per weight; None reads everything. Under the rule `ipn` a target
            outside the range that it was trained for is moved to the range's end, and a line on stderr says so.
        head: how the output head is read, see `parse_head` and `PolicyParams`.

    Returns:
        PolicyParams with thresholds f32 [layers * 4 + 1, S], the head's row last; for `ipn` also gains
        f32 [layers * 4 + 1], linear between budgets.

    Raises:
        LowtideError: unknown rule, one that the artifact stores no thresholds for, or a budget outside its grid.
    """
    from lowtide.rules import get_rule

    manifest = artifact.manifest
    groups = [g for name, g in artifact.groups.items() if name != "embed"]
    index = _policy_index(manifest, policy)
    if bits is not None and index is None and policy is not None:
        raise LowtideError("--policy dense reads everything: ask for --bits dense")
    if bits is None or index is None:
        return PolicyParams("dense", np.zeros((len(groups), manifest.slices), np.float32))
    rule, grid = get_rule(manifest.policies[index]), manifest.budgets
    asked = bits
    if rule.name == "ipn":
        bits = _held(manifest, bits)
    if not grid[0] <= bits <= grid[-1]:
        stored = f"{grid[0]:g} to {math.floor(100 * grid[-1]) / 100:g}"  # rounded down, so what it says is inside
        raise LowtideError(f'--bits {bits:g}: this artifact stores budgets from {stored} bits per weight, and "dense"')
    high = min(int(np.searchsorted(grid, bits)), len(grid) - 1)
    low = max(high - 1, 0)
    fraction = (bits - grid[low]) / (grid[high] - grid[low]) if high > low else 1.0
    tables = [group.thresholds[index] for group in groups]
    rows = [rule.interpolate(table[low], table[high], fraction) for table in tables]
    if head == FULL_HEAD:
        rows[-1], head = _everything(rule.name, tables[-1][-1], groups[-1].in_features), (0.0, 0.0)
    gains = [0.0 if (g := _gain(group)) is None else g[low] + (g[high] - g[low]) * fraction for group in groups]
    return PolicyParams(
        rule.name,
        np.stack(rows),
        gains=np.array(gains, np.float32) if rule.name == "ipn" else None,
        bits=None if bits == asked else bits,
        head_offset=head[0],
        head_margin=head[1],
    )


def _everything(rule: str, last: NDArray[np.float32], inputs: int) -> NDArray[np.float32]:
    """Thresholds f32 [S] that every channel passes however far the controller moves them; last: those of the grid's
    last budget, which say what levels the policy has."""
    if rule == "topk":
        return np.where(last > 0, np.float32(inputs * 2**MAX_OFFSET), np.float32(0))
    lowest = np.float32(-1e30 if rule == "statistical-topk" else 0)
    return np.where(np.isfinite(last), lowest, np.float32(np.inf)).astype(np.float32)


def _gain(group: GroupTensors) -> NDArray[np.float32] | None:
    return None if group.ipn is None else group.ipn.gain


def _held(manifest: Manifest, bits: float) -> float:
    """`bits` held within the range that the IPN was trained for, and within the grid of thresholds."""
    assert manifest.ipn is not None  # the manifest has it if it has the policy
    grid = manifest.budgets
    low, high = (min(max(end, grid[0]), grid[-1]) for end in (manifest.ipn["low"], manifest.ipn["high"]))
    held = min(max(bits, low), high)
    if held != bits:
        _warn(
            f"--bits {bits:g}: the importance network of this artifact is trained for {low:g} to {high:g} bits per "
            f"weight; using {held:g} (--policy channel-norm, if stored, has no such range)"
        )
    return held


@cache
def _warn(text: str) -> None:
    """A line on stderr, once for each text: a conversation asks for its budget again with every answer."""
    print(f"lowtide: warning: {text}", file=sys.stderr)


def _policy_index(manifest: Manifest, policy: str | None) -> int | None:
    """Place of the policy's thresholds in the artifact; None for dense, which needs none."""
    from lowtide.rules import parse_policy

    if policy is None:
        return 0
    name = parse_policy(policy, manifest.slices).text
    if name == "dense":
        return None
    if name in manifest.policies:
        return manifest.policies.index(name)
    stored = ", ".join(manifest.policies)
    raise LowtideError(f"--policy {policy}: this artifact stores no thresholds for it; stored: {stored}, dense")


class BudgetController:
    """Integral control of the bits read: keeps their mean over tokens at the target.

    Text differs from the calibration text, so fixed thresholds miss the budget by a few per cent. After
    each token every threshold is scaled by 2^(gain * error); at a constant gain the sum of all errors is
    offset / gain, a bounded number, so the mean error falls as 1 / tokens. The gain is higher for the first
    tokens, which halves what is left of the error after 64 of them.
    """

    def __init__(
        self,
        params: PolicyParams,
        target_bits: float | None,
        n_body_weights: int,
        side_bits: int = 0,
        gain: float = GAIN,
    ) -> None:
        """
        Args:
            params: where to begin, from `policy_params`.
            target_bits: bits_read_body to hold, in bits per weight; None (dense) controls nothing. Where `params` were
                made for another budget than the one asked for (`PolicyParams.bits`), that one is held.
            n_body_weights: weights in the decoder's linear layers.
            side_bits: bits read for them whatever the masks are; a target below that cannot be met.
            gain: log2 of threshold per bit of error and token; 0 switches the control off.

        Raises:
            LowtideError: the target is below what is always read.
        """
        floor = side_bits / n_body_weights
        if target_bits is not None and params.bits is not None:
            target_bits = params.bits
        if target_bits is not None and target_bits <= floor:
            raise LowtideError(f"--bits {target_bits:g}: {floor:.3g} bits are read whatever the mask; ask for more")
        self.params = params
        self._target = target_bits if params.rule != "dense" else None
        self._weights = n_body_weights
        self._gain = gain
        self._tokens = 0
        self._bits = 0

    def update(self, body_bits: int) -> None:
        """Account for one token that read `body_bits` (side data included) and move `params` for the next."""
        self._tokens += 1
        self._bits += body_bits
        if self._target is None:
            return
        error = self.per_weight(body_bits) - self._target
        gain = max(self._gain, FIRST_GAIN / self._tokens) if self._gain else 0.0
        offset = min(max(self.params.log2_offset + gain * error, -MAX_OFFSET), MAX_OFFSET)
        self.params = self.params.moved(offset)

    def per_weight(self, body_bits: float) -> float:
        """Bits of one token as bits per weight of the decoder's linear layers."""
        return body_bits / self._weights

    @property
    def tokens(self) -> int:
        """Tokens accounted for."""
        return self._tokens

    @property
    def mean_bits(self) -> float:
        """bits_read_body so far: mean over tokens of bits read per weight (0.0 before the first token)."""
        return self._bits / (self._tokens * self._weights) if self._tokens else 0.0
