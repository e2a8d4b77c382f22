"""An addition of low rank to weights that stay (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import torch


def low_rank(units: torch.Tensor, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Factors `up` f32 [out, R] and `down` f32 [R, in] to begin with, for weights f32 [out, in]: their product is 0.

    A step that moves every value of `up` by e moves the weights by e as well, root mean square.
    """
    out, inputs = units.shape
    rank = min(rank, out, inputs)
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=draw).to(units.device) / rank**0.5
    return {"up": units.new_zeros(out, rank), "down": down}
