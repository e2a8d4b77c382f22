"""Static pruning: rules that say which weights of a layer may go.

`PRUNERS` is the registry: name -> `prune(problem, sparsity, structure)`.
"""

from __future__ import annotations

from lowtide.compress.prune import importance, magnitude, random, sparsegpt, wanda
from lowtide.compress.prune.base import LayerProblem, Pruned, Pruner
from lowtide.errors import LowtideError

__all__ = ["PRUNERS", "LayerProblem", "Pruned", "Pruner", "get_pruner"]

PRUNERS: dict[str, Pruner] = {
    "magnitude": magnitude.prune,
    "random": random.prune,
    "wanda": wanda.prune,
    "sparsegpt": sparsegpt.prune,
    "importance": importance.prune,
}


def get_pruner(name: str) -> Pruner:
    """The rule of that name. LowtideError, listing those known, if there is none."""
    if name not in PRUNERS:
        raise LowtideError(f"--rule {name}: known are {', '.join(PRUNERS)}")
    return PRUNERS[name]
