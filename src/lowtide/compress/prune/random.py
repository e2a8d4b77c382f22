"""Random masks, the floor of every comparison."""

from __future__ import annotations

import zlib

import torch

from lowtide.compress.prune.base import LayerProblem, Pruned
from lowtide.compress.prune.masks import make_mask, parse_structure


def prune(problem: LayerProblem, sparsity: float, structure: str) -> Pruned:
    """Remove weights, or units of the structure, at random; the same for the same layer name and seed.

    ERK is the allocation that suits this rule: `lowtide.compress.prune.allocation.erk`.
    """
    # not hash(): that differs from process to process
    generator = torch.Generator().manual_seed((zlib.crc32(problem.name.encode()) << 20) + problem.seed)
    score = torch.rand(problem.weight.shape, generator=generator)
    mask = make_mask(score, sparsity, parse_structure(structure), problem.name)
    return Pruned(mask, problem.weight * mask)
