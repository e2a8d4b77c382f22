"""The text that training looks at, i64 [B, N]: windows of a file, or text that the model writes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from lowtide.compress.dense import DenseModel
from lowtide.compress.text import windows_of_file
from lowtide.errors import LowtideError
from lowtide.learn.ipn_train import MOST_HELD, IpnOptions, Report
from lowtide.learn.parallel import Parallel
from lowtide.learn.sensitivity import probe_tokens

FILE_WINDOW, SAMPLED_WINDOW = 512, 256
SAMPLED_AT_ONCE = 128
"""Windows: their keys and values are in memory together."""
NAME = "text.npy"


def file_windows(dense: DenseModel, path: Path, tokens: int, seed: int) -> torch.Tensor:
    """Windows spread evenly over a file, in an order that is drawn, `tokens` at most but three windows at least.

    Raises:
        LowtideError: the file cannot be read, or has less than a window.
    """
    window = min(FILE_WINDOW, dense.config.max_position)
    found = windows_of_file(dense.source, path, windows=max(3, tokens // window))
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]


def sampled_shape(dense: DenseModel, tokens: int, options: IpnOptions) -> tuple[int, int]:
    """(windows, tokens of each) of a text that the model writes: no more than training can look at, as it writes
    slowly."""
    window = min(SAMPLED_WINDOW, dense.config.max_position)
    useful = max(options.steps * options.windows, probe_tokens(dense) // window) + MOST_HELD
    return max(3, min(useful, tokens // window)), window


def sampled_windows(
    team: Parallel, dense: DenseModel, shape: tuple[int, int], seed: int, work: Path, report: Report
) -> torch.Tensor:
    """Text that the model writes, and keeps in `work`: a run that goes on reads it there, for on another device, or
    with products in another type, the same seed soon gives other words.

    Raises:
        LowtideError: what was kept is damaged.
    """
    kept = work / NAME
    if not team.main:
        return team.first(torch.zeros(shape, dtype=torch.int64))
    if kept.exists():
        return team.first(_read(kept, shape, dense.config.vocab_size))
    found = _written(dense, *shape, seed, report)
    temporary = kept.with_suffix(".tmp.npy")
    np.save(temporary, found.numpy())
    os.replace(temporary, kept)
    return team.first(found)


def _read(kept: Path, shape: tuple[int, int], vocab_size: int) -> torch.Tensor:
    try:
        found = np.load(kept, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise LowtideError(f"{kept}: cannot be read ({error}); give --restart") from None
    if found.shape != shape or found.dtype != np.int64 or not 0 <= found.min() <= found.max() < vocab_size:
        raise LowtideError(f"{kept}: damaged; give --restart")
    return torch.from_numpy(found)


def _written(dense: DenseModel, count: int, window: int, seed: int, report: Report) -> torch.Tensor:
    """Some windows at a time."""
    parts, rounds = [], -(-count // SAMPLED_AT_ONCE)
    for number in range(rounds):
        batch = min(SAMPLED_AT_ONCE, count - number * SAMPLED_AT_ONCE)

        def progress(done: int, before: int = number * window) -> None:
            report("sample", before + done + 1, rounds * window)

        parts.append(dense.sample(batch, window, seed + number * 1_000_003, progress))
    return torch.cat(parts)
