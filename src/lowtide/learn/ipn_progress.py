"""Checkpoints of a training run: one safetensors file with what is now, what was best, and Adam's state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowtide.errors import LowtideError
from lowtide.learn.checkpoint import read_tensors, write_tensors

NAME = "progress.safetensors"


@dataclass
class Run:
    """Where a run is.

    step: steps done; best_step, best: the step kept and its held-out value; first: the value before any step;
    kept: its parameters by name; history: one entry per look at the held-out windows; tokens: trained on so far.
    """

    step: int = 0
    best_step: int = 0
    first: float = float("inf")
    best: float = float("inf")
    tokens: int = 0
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def keep(self, parameters: Mapping[str, nn.Parameter], value: float) -> None:
        """Remember the parameters as the best so far."""
        self.kept = {name: p.detach().clone() for name, p in parameters.items()}
        self.best_step, self.best = self.step, value

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the best ones back."""
        put(parameters, self.kept, "checkpoint")


def put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor], where: str) -> None:
    """Set parameters by name; LowtideError where names or shapes differ."""
    if set(parameters) != set(values):
        raise LowtideError(f"{where}: holds other parameters than this run's; give --restart")
    with torch.no_grad():
        for name, p in parameters.items():
            if values[name].shape != p.shape or not torch.isfinite(values[name]).all():
                raise LowtideError(f"{where}: {name} does not fit this model; give --restart")
            p.copy_(values[name])


def save(
    folder: Path, run: Run, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, key: str
) -> None:
    """Write everything that resuming needs."""
    tensors = {f"now.{n}": p.detach().clone() for n, p in parameters.items()}
    tensors |= {f"best.{n}": t for n, t in run.kept.items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{n}": torch.as_tensor(v).clone() for n, v in state.items()}
    about = {k: getattr(run, k) for k in ("step", "best_step", "first", "best", "tokens", "history")}
    write_tensors(folder / NAME, tensors, {"about": json.dumps(about | {"key": key})})


def load(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, key: str
) -> Run | None:
    """Resume; None if there is no checkpoint of this very run (model, text and options)."""
    path = folder / NAME
    if not path.exists():
        return None
    tensors, metadata = read_tensors(path)
    try:
        about = json.loads(metadata["about"])
        if about.pop("key") != key:
            return None
        put(parameters, {n[4:]: t for n, t in tensors.items() if n.startswith("now.")}, str(path))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, what = name.split(".")
                state.setdefault(int(index), {})[what] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        kept = {n[5:]: t for n, t in tensors.items() if n.startswith("best.")}
        return Run(kept=kept, **about)
    except (KeyError, ValueError, TypeError) as error:
        raise LowtideError(f"{path}: damaged ({error}); give --restart") from None
