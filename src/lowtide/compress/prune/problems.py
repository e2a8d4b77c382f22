"""The pruning problems of a model's body, block by block, and a folder that keeps them for many rules.

Calibration walks backward from the head, so problems come last block first. Memory is that of one block's problems
and the boundaries between blocks; embedding and head are not pruned.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from lowtide.arch import GROUPS
from lowtide.compress.calibrate import GroupStats, block_pass, head_pass
from lowtide.compress.dense import Block, DenseModel
from lowtide.compress.prune.base import LayerProblem
from lowtide.errors import LowtideError

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`."""
CACHE_VERSION = 1
_FIELDS = ("mean", "second", "fisher", "hessian", "weighted")


def silent(stage: str, done: int, total: int) -> None:
    """No progress."""


def layer_problems(
    model: DenseModel, ids: torch.Tensor, seed: int = 0, progress: Progress = silent
) -> Iterator[list[LayerProblem]]:
    """The problems of every block, last block first.

    Args:
        model: the dense model; the statistics are of its own activations.
        ids: i64 [windows, tokens], the calibration text.
        seed: of the labels drawn for the Fisher information; also handed to the problems.
        progress: stages `forward` and `calibrate`.

    Yields:
        For each block the problems of q, k, v, o, gate, up and down. Members of a group share mean, second, hessian
        and weighted (the same tensors, not copies).
    """
    for index, stats, _ in _walk(model, ids, seed, progress, None):
        yield split_problems(model, index, stats, seed)


def split_problems(
    model: DenseModel, index: int, stats: dict[str, GroupStats], seed: int, block: Block | None = None
) -> list[LayerProblem]:
    """Problems of block `index` from its groups' statistics, which must have Hessians."""
    block = block or model.block(index)
    problems = []
    for group, members in GROUPS.items():
        known = stats[group]
        assert known.hessian is not None and known.weighted is not None
        mean, second, fisher = known.mean.float(), known.second.float(), known.fisher.float()
        first = 0
        for member, rows in zip(members, member_rows(model, group), strict=True):
            problems.append(
                LayerProblem(
                    name=f"model.layers.{index}.{member}",
                    kind=member.rpartition(".")[2],
                    depth=index / model.config.num_layers,
                    weight=block.weights[group][first : first + rows],
                    mean=mean,
                    second=second,
                    fisher=fisher[first : first + rows],
                    hessian=known.hessian,
                    weighted=known.weighted,
                    seed=seed,
                )
            )
            first += rows
    return problems


def member_rows(model: DenseModel, group: str) -> tuple[int, ...]:
    """Output rows of each member of a group."""
    c = model.config
    return {
        "qkv": (c.q_size, c.kv_size, c.kv_size),
        "o": (c.hidden_size,),
        "gate_up": (c.intermediate_size, c.intermediate_size),
        "down": (c.hidden_size,),
    }[group]


def _walk(
    model: DenseModel,
    ids: torch.Tensor,
    seed: int,
    progress: Progress,
    resume: tuple[int, torch.Tensor] | None,
) -> Iterator[tuple[int, dict[str, GroupStats], torch.Tensor]]:
    """(block, statistics, gradient at its input), last block first; `resume`: (next block, gradient at its output)."""
    layers = model.config.num_layers
    states = model.block_inputs(ids, lambda done: progress("forward", done, layers))
    if resume is None:
        grad, _ = head_pass(model, states[layers], seed + 1)
        first = layers - 1
    else:
        first, grad = resume
    states[layers] = torch.empty(0)
    for index in range(first, -1, -1):
        grad, stats = block_pass(model, model.block(index), states[index], grad, hessians=True)
        states[index] = torch.empty(0)  # no longer needed
        progress("calibrate", layers - index, layers)
        yield index, stats, grad


class ProblemStore:
    """Problems on disk: one calibration for many rules, allocations and searches.

    One `.npz` per block with the group's statistics (weights are read from the model), some
    8 * (3 * hidden^2 + intermediate^2) bytes each. An interrupted calibration goes on where it was.

    Args:
        folder: made if missing; one kept for another model, text or seed is refused.
        model, ids, seed: as for `layer_problems`.

    Raises:
        LowtideError: the folder holds something else, or cannot be written.
    """

    def __init__(
        self, folder: str | Path, model: DenseModel, ids: torch.Tensor, seed: int = 0, progress: Progress = silent
    ) -> None:
        self.folder, self.model, self.ids, self.seed = Path(folder), model, ids, seed
        digest = hashlib.sha256(np.ascontiguousarray(ids.numpy()).tobytes()).hexdigest()
        key = {"version": CACHE_VERSION, "model": model.source.fingerprint(), "ids": digest, "shape": list(ids.shape)}
        try:
            self._open(key | {"seed": seed})
            self._fill(progress)
        except OSError as error:
            raise LowtideError(f"{error.filename or self.folder}: {error.strerror or error}") from None

    def __len__(self) -> int:
        return self.model.config.num_layers

    def __iter__(self) -> Iterator[list[LayerProblem]]:
        """Blocks in forward order."""
        return (self.block(index) for index in range(len(self)))

    def block(self, index: int) -> list[LayerProblem]:
        """The problems of one block."""
        return split_problems(self.model, index, self.statistics(index), self.seed)

    def _open(self, key: dict[str, object]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, text = self.folder / "key.json", json.dumps(key)
        if path.exists():
            if path.read_text(encoding="utf-8") != text:
                raise LowtideError(f"{self.folder}: was made from another model, text or seed; delete it")
        elif any(self.folder.iterdir()):
            raise LowtideError(f"{self.folder}: is no folder of pruning statistics; choose another")
        else:
            path.write_text(text, encoding="utf-8")

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index}.npz"

    def _fill(self, progress: Progress) -> None:
        layers = len(self)
        missing = [i for i in range(layers) if not self._path(i).exists()]
        if not missing:
            return
        resume = None
        gradient = self.folder / "gradient.npz"
        if gradient.exists():
            with np.load(gradient) as state:
                resume = int(state["next"]), torch.from_numpy(state["grad"])
        # a run may have died between writing a block and its gradient: then that block is done again
        for index, stats, grad in _walk(self.model, self.ids, self.seed, progress, resume):
            arrays = {f"{g}.{f}": getattr(s, f).float().numpy() for g, s in stats.items() for f in _FIELDS}
            _save(self._path(index), arrays)
            _save(gradient, {"next": np.array(index - 1), "grad": grad.numpy()})
        gradient.unlink(missing_ok=True)

    def statistics(self, index: int) -> dict[str, GroupStats]:
        """Group -> the dense model's statistics in one block, Hessians included (no sample of inputs)."""
        path = self._path(index)
        try:
            with np.load(path) as arrays:
                return {g: _stats({f: torch.from_numpy(arrays[f"{g}.{f}"]) for f in _FIELDS}) for g in GROUPS}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise LowtideError(f"{path}: damaged ({error}); delete the folder") from None


def _stats(arrays: dict[str, torch.Tensor]) -> GroupStats:
    return GroupStats(sample=torch.empty(0), **arrays)


def _save(path: Path, arrays: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)
