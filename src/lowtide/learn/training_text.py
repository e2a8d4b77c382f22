"""The text that training looks at, i64 [B, N]: windows of a file, text that the model writes, or both.

What is learned from a file holds for texts like it. A part that the model writes, which is of all kinds that it knows,
makes it hold elsewhere, too. Models that know many kinds can be made to write more of them (docs/dynamic.md).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lowtide.compress.dense import DenseModel
from lowtide.compress.text import windows_of_file
from lowtide.errors import LowtideError
from lowtide.learn.cluster_fit import tokens_for
from lowtide.learn.ipn_train import MOST_HELD, IpnOptions, Report
from lowtide.learn.parallel import Parallel
from lowtide.learn.sensitivity import probe_tokens

FILE_WINDOW, SAMPLED_WINDOW = 512, 256
SAMPLED_AT_ONCE = 128
"""Windows: their keys and values are in memory together."""
NAME = "text.npy"


@dataclass(frozen=True)
class Wanted:
    """What to train on.

    Attributes:
        from_file: windows of a file, i64 [B, N]; None where there is no file.
        sampled: (windows, tokens of each) that the model writes; (0, 0) for none.
    """

    from_file: torch.Tensor | None
    sampled: tuple[int, int]

    def key(self) -> bytes:
        """What tells one text from another, before any of it is written."""
        read = b"" if self.from_file is None else self.from_file.numpy().tobytes()
        return read + (repr(self.sampled).encode() if self.sampled[0] else b"")


def check_part(options: IpnOptions, path: str | Path | None) -> None:
    """LowtideError if a part is to be written beside a file that is not given, or varied where nothing is written."""
    if options.own_text and path is None:
        raise LowtideError(
            f"--own-text {options.own_text:g}: needs --text; without one the model writes all of the text"
        )
    if options.varied and path is not None and not options.own_text:
        raise LowtideError("--varied: is for what the model writes; give --own-text, or leave out --text")


def wanted(dense: DenseModel, path: Path | None, tokens: int, options: IpnOptions) -> Wanted:
    """What to train on; nothing is written yet. Where both are to be had windows are as long as what the model writes,
    and no more than training, or finding clusters, can look at.

    Raises:
        LowtideError: the file cannot be read, or has less than a window.
    """
    if path is None:
        return Wanted(None, sampled_shape(dense, tokens, options))
    if not options.own_text:
        return Wanted(file_windows(dense, path, tokens, options.seed), (0, 0))
    useful, window = sampled_shape(dense, tokens, options)
    clustered = min(tokens, tokens_for(dense, options.centroids)) // window if options.centroids else 0
    count = max(useful, clustered)
    found = file_windows(dense, path, round((1 - options.own_text) * count) * window, options.seed, window)
    # As many as the file has windows for: a short one is not to drown in what is written beside it.
    part = round(len(found) * options.own_text / (1 - options.own_text))
    return Wanted(found, (max(1, min(part, count - len(found))), window))


def windows(
    team: Parallel, dense: DenseModel, of: Wanted, options: IpnOptions, work: Path, report: Report
) -> torch.Tensor:
    """The windows i64 [B, N]. Both kinds lie evenly in one another, so that the last ones, which are held out, are of
    both."""
    if not of.sampled[0]:
        assert of.from_file is not None
        return of.from_file
    written = sampled_windows(team, dense, of.sampled, options.seed, work, report, options.varied)
    if of.from_file is None:
        return written
    places = torch.cat([(torch.arange(len(part)) + 0.5) / len(part) for part in (of.from_file, written)])
    return torch.cat([of.from_file, written])[places.argsort(stable=True)]


def file_windows(dense: DenseModel, path: Path, tokens: int, seed: int, window: int = FILE_WINDOW) -> torch.Tensor:
    """Windows spread evenly over a file, in an order that is drawn, `tokens` at most but three windows at least.

    Raises:
        LowtideError: the file cannot be read, or has less than a window.
    """
    window = min(window, dense.config.max_position)
    found = windows_of_file(dense.source, path, windows=max(3, tokens // window), window=window)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]


def sampled_shape(dense: DenseModel, tokens: int, options: IpnOptions) -> tuple[int, int]:
    """(windows, tokens of each) of a text that the model writes: no more than training can look at, as it writes
    slowly."""
    window = min(SAMPLED_WINDOW, dense.config.max_position)
    useful = max(options.steps * options.windows, probe_tokens(dense) // window) + MOST_HELD
    return max(3, min(useful, tokens // window)), window


def sampled_windows(
    team: Parallel,
    dense: DenseModel,
    shape: tuple[int, int],
    seed: int,
    work: Path,
    report: Report,
    varied: bool = False,
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
    found = _written(dense, *shape, seed, report, varied)
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


def _written(dense: DenseModel, count: int, window: int, seed: int, report: Report, varied: bool) -> torch.Tensor:
    """Some windows at a time."""
    parts, rounds = [], -(-count // SAMPLED_AT_ONCE)
    for number in range(rounds):
        batch = min(SAMPLED_AT_ONCE, count - number * SAMPLED_AT_ONCE)

        def progress(done: int, before: int = number * window) -> None:
            report("sample", before + done + 1, rounds * window)

        parts.append(dense.sample(batch, window, seed + number * 1_000_003, progress, varied))
    return torch.cat(parts)
