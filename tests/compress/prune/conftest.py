"""A layer with correlated inputs, and what calibration would know of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowtide.compress.prune.base import LayerProblem


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_problem(out: int = 24, inn: int = 64, seed: int = 0, **changes: Any) -> LayerProblem:
    """Inputs of unequal size, half of whose variance lies in a few shared directions."""
    x = random(4 * inn, 6, seed=seed) @ random(6, inn, seed=seed + 1) + random(4 * inn, inn, seed=seed + 2)
    x = x * torch.linspace(0.2, 2, inn)
    say = random(4 * inn, seed=seed + 3).square()
    say = say / say.mean()
    fields: dict[str, Any] = {
        "name": "model.layers.0.self_attn.q_proj",
        "kind": "q_proj",
        "depth": 0.0,
        "weight": random(out, inn, seed=seed + 4) * inn**-0.5,
        "mean": x.mean(0),
        "second": x.square().mean(0),
        "fisher": torch.linspace(0.5, 2, out),
        "hessian": x.T @ x / len(x),
        "weighted": (x * say[:, None]).T @ x / len(x),
        "seed": seed,
    }
    return LayerProblem(**{**fields, **changes})


def output_error(problem: LayerProblem, weight: torch.Tensor) -> float:
    """Mean squared error of the outputs, relative to the outputs."""
    error = weight - problem.weight
    return float(
        ((error @ problem.hessian) * error).sum() / ((problem.weight @ problem.hessian) * problem.weight).sum()
    )


@pytest.fixture
def problem() -> Callable[..., LayerProblem]:
    return make_problem


@pytest.fixture
def error() -> Callable[[LayerProblem, torch.Tensor], float]:
    return output_error
