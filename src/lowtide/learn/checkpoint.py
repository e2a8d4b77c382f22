"""Files of importance networks: safetensors, a few kilobytes, what it was trained on in the metadata.

Tensors: `powers` [7, 4], `offset` [7, 3], `row.*` and `column.*` (the residual networks), and, if trained for one
model, `row_vector.LAYER` and `column_vector.LAYER`. All f32. Metadata: `format` = lowtide-importance-1, `about` = JSON.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lowtide.errors import LowtideError

if TYPE_CHECKING:
    from lowtide.learn.importance import ImportanceNetwork

FORMAT = "lowtide-importance-1"
_ROW, _COLUMN = "row_vector.", "column_vector."


def tensors_of(network: ImportanceNetwork) -> dict[str, torch.Tensor]:
    """Every parameter by name, copied."""
    found = {name: p.detach().clone() for name, p in network.named_parameters()}
    found |= {_ROW + name: p.detach().clone() for name, p in network.row_vectors.items()}
    return found | {_COLUMN + name: p.detach().clone() for name, p in network.column_vectors.items()}


def put_tensors(network: ImportanceNetwork, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Set every parameter from `tensors_of`'s names; vectors that the network lacks are added.

    Raises:
        LowtideError: names or shapes do not fit, values are not finite.
    """
    shared = dict(network.named_parameters())
    vectors = {n for n in tensors if n.startswith((_ROW, _COLUMN))}
    rows = {n.removeprefix(_ROW) for n in vectors if n.startswith(_ROW)}
    columns = {n.removeprefix(_COLUMN) for n in vectors if n.startswith(_COLUMN)}
    if set(tensors) - vectors != set(shared) or rows != columns:
        raise LowtideError(f"{where}: holds other tensors than an importance network; train it again")
    for name, value in tensors.items():
        shape = (value.numel(),) if name in vectors else tuple(shared[name].shape)
        if value.dtype != torch.float32 or tuple(value.shape) != shape or not torch.isfinite(value).all():
            raise LowtideError(f"{where}: tensor {name[:80]} is not a finite float32 {list(shape)}; train it again")
    with torch.no_grad():
        for name, parameter in shared.items():
            parameter.copy_(tensors[name])
        for prefix, table in ((_ROW, network.row_vectors), (_COLUMN, network.column_vectors)):
            for layer in sorted(rows):
                if layer in table:
                    table[layer].copy_(tensors[prefix + layer])
                else:
                    table[layer] = nn.Parameter(tensors[prefix + layer].clone())


def save(path: Path, network: ImportanceNetwork, about: dict[str, Any]) -> None:
    """Write a network so that a crash leaves the old file or the new one."""
    write_tensors(path, tensors_of(network), {"format": FORMAT, "about": json.dumps(about, sort_keys=True)})


def load(path: str | Path) -> tuple[ImportanceNetwork, dict[str, Any]]:
    """A network and what is known of its training.

    Raises:
        LowtideError: missing, damaged, or no importance network.
    """
    from lowtide.learn.importance import ImportanceNetwork

    tensors, metadata = read_tensors(Path(path))
    if metadata.get("format") != FORMAT:
        raise LowtideError(f"{path}: is no importance network; `lowtide learn importance` makes one")
    network = ImportanceNetwork()
    put_tensors(network, tensors, str(path))
    try:
        about = json.loads(metadata.get("about", "{}"))
    except ValueError:
        raise LowtideError(f"{path}: its metadata is damaged; train it again") from None
    return network, about


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise LowtideError(f"{path}: cannot be written ({error})") from None


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise LowtideError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise LowtideError(f"{path}: cannot be read as an importance network ({error})") from None


@dataclass
class Progressed:
    """Where a training is: steps done, the best step, the held-out value at the start and the best one's network."""

    step: int
    best_step: int
    first: float
    kept: dict[str, torch.Tensor] | None
    best: float = float("inf")

    def keep(self, network: ImportanceNetwork, step: int, value: float) -> None:
        """Remember the network as the best so far."""
        self.kept, self.best_step, self.best = tensors_of(network), step, value

    def restore(self, network: ImportanceNetwork) -> None:
        """Put the best one back."""
        assert self.kept is not None
        put_tensors(network, self.kept, "checkpoint")


def save_progress(
    folder: Path, network: ImportanceNetwork, optimiser: torch.optim.Optimizer, state: Progressed, key: str
) -> None:
    """Write everything that resuming needs to `folder/progress.safetensors`."""
    assert state.kept is not None
    tensors = {f"now.{n}": t for n, t in tensors_of(network).items()}
    tensors |= {f"best.{n}": t for n, t in state.kept.items()}
    held = optimiser.state_dict()["state"]
    tensors |= {f"adam.{i}.{n}": torch.as_tensor(v).clone() for i, s in held.items() for n, v in s.items()}
    about = {"key": key, "step": state.step, "best_step": state.best_step, "first": state.first, "best": state.best}
    write_tensors(folder / "progress.safetensors", tensors, {"about": json.dumps(about)})


def load_progress(
    folder: Path, network: ImportanceNetwork, optimiser: torch.optim.Optimizer, key: str
) -> Progressed | None:
    """Resume into the network and its optimiser; None if there is no checkpoint of this run."""
    path = folder / "progress.safetensors"
    if not path.exists():
        return None
    tensors, metadata = read_tensors(path)
    try:
        about = json.loads(metadata["about"])
        if about["key"] != key:
            return None
        now = {n.removeprefix("now."): t for n, t in tensors.items() if n.startswith("now.")}
        best = {n.removeprefix("best."): t for n, t in tensors.items() if n.startswith("best.")}
        put_tensors(network, now, str(path))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, what = name.split(".")
                state.setdefault(int(index), {})[what] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        return Progressed(about["step"], about["best_step"], about["first"], best, about["best"])
    except (KeyError, ValueError, TypeError) as error:
        raise LowtideError(f"{path}: damaged ({error}); delete the folder and start again") from None
