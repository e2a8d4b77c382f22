"""WINA: TEAL's masks by magnitude times the norm of the matrix's column."""

from __future__ import annotations

import torch

from lowtide.arch import GROUPS
from lowtide.eval.rivals.allocation import MEMBERS
from lowtide.eval.rivals.calibration import Calibration
from lowtide.eval.rivals.teal import Teal


class Wina(Teal):
    """score_j = |x_j - mean_j| * ||W_:j||, the norm of each matrix' own column, kept in float16.

    Shares come from the greedy search that TEAL has, with this score.
    """

    name = "wina"
    source = "WINA (arXiv 2505.19427)"

    def weigh(self, calibration: Calibration) -> dict[tuple[str, str], torch.Tensor]:
        """Column norms f32 [in] of the dense matrices, rounded to float16."""
        norms = {}
        for index in range(calibration.dense.config.num_layers):
            block = calibration.dense.block(index)
            for group in GROUPS:
                name = f"layers.{index}.{group}"
                for matrix, rows in zip(MEMBERS[group], calibration.model.parts[name], strict=True):
                    norms[name, matrix] = block.weights[group][rows].norm(dim=0).half().float()
        return norms
