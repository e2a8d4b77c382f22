"""What rivals may look at: the artifact, the dense model and the calibration text, the same for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lowtide.compress.dense import Block, DenseModel, decoder_block, rope_tables
from lowtide.compress.thresholds import score_table
from lowtide.errors import LowtideError
from lowtide.eval.rivals.model import RivalModel
from lowtide.format.reader import Artifact
from lowtide.rules import get_rule
from lowtide.runtime.budget import policy_params

F32 = NDArray[np.float32]
WATERLINE = "channel-norm"
"""The stored policy whose thresholds say how our own levels spread a budget over groups, and what the head reads."""
CHOICE_TOKENS = 1024
"""Calibration tokens on which settings are compared."""


@dataclass
class Calibration:
    """The calibration text of one artifact.

    Attributes:
        artifact, model: the compressed model, as stored and in torch.
        dense: the model it was made from.
        ids: i64 [B, N], the calibration windows that rules are fitted on.
        seed: of whatever is trained.
        choice: i64 [b, N], the windows on which settings are compared: the last ones given, which `ids` then loses; of
            fewer than are wanted all serve both.
    """

    artifact: Artifact
    model: RivalModel
    dense: DenseModel
    ids: torch.Tensor
    seed: int = 0
    choice: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        if WATERLINE not in self.artifact.manifest.policies:
            raise LowtideError(
                f"{self.artifact.path}: stores no thresholds of the policy {WATERLINE}, which the comparison needs; "
                "compress the model again with it"
            )
        kept = max(1, CHOICE_TOKENS // self.ids.shape[1])
        self.choice = self.ids[-kept:]
        if len(self.ids) > kept:
            self.ids = self.ids[:-kept]
        self._params: dict[float, dict[str, F32]] = {}

    def params(self, bits: float) -> dict[str, F32]:
        """Our own thresholds at a budget, f32 [S] by group, head included; LowtideError outside the stored grid."""
        if bits not in self._params:
            rows = policy_params(self.artifact, WATERLINE, bits).thresholds
            names = [name for name in self.artifact.groups if name != "embed"]
            self._params[bits] = dict(zip(names, rows, strict=True))
        return self._params[bits]

    @torch.no_grad()
    def blocks(self) -> Iterator[tuple[int, Block, dict[str, torch.Tensor]]]:
        """Block by block what the dense model saw: (index, block, inputs).

        inputs: f32 [tokens, in] for each group, `gate` = silu(gate) and `up`, f32 [tokens, intermediate].
        """
        rope = rope_tables(self.dense.config, 0, self.ids.shape[1])
        x = self.dense.embed(self.ids)
        for index in range(self.dense.config.num_layers):
            block = self.dense.block(index)
            seen: dict[str, list[torch.Tensor]] = {}

            def apply(group: str, x: torch.Tensor, block: Block = block, seen: dict = seen) -> torch.Tensor:  # type: ignore[type-arg]
                y = block.apply(group, x)
                seen.setdefault(group, []).append(x[0])
                if group == "gate_up":
                    gate, up = y[0].chunk(2, -1)
                    seen.setdefault("gate", []).append(F.silu(gate))
                    seen.setdefault("up", []).append(up)
                return y

            norms = (block.input_norm, block.post_norm)
            x = torch.cat([decoder_block(self.dense.config, norms, row[None], apply, rope) for row in x])
            yield index, block, {name: torch.cat(rows) for name, rows in seen.items()}

    def norm_scores(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The channel-norm scores f32 [tokens, readable channels] of a group's inputs."""
        return self.usable(name, get_rule(WATERLINE).score(self.model.groups[name].stats, x))

    def usable(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """values [..., in] without the exact channels of the group."""
        exact = self.model.groups[name].stats.exact
        return values if exact is None else values[..., ~exact]


class Table:
    """The distribution of a score over calibration tokens and channels, for quantiles."""

    def __init__(self, scores: torch.Tensor) -> None:
        self.sorted = score_table(scores.numpy())

    def at(self, share: float) -> float:
        """The score that this share of all exceed; inf for none, something under all of them for all."""
        above = int(share * self.sorted.size + 0.5)
        if above <= 0:
            return float("inf")
        if above >= self.sorted.size:
            least = float(self.sorted[0])
            return least / 2 if least > 0 else least - 1e-6
        return float(self.sorted[self.sorted.size - above - 1])

    def share(self, threshold: float) -> float:
        """The share of scores above a threshold."""
        return 1.0 - float(np.searchsorted(self.sorted, threshold, side="right")) / self.sorted.size
