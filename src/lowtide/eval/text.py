"""Held-out text cut into windows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError

I32 = NDArray[np.int32]
TextOrIds: TypeAlias = str | Path | Sequence[int] | NDArray[Any]
"""A text file's path, or token ids: a stream [tokens] or windows of their own [windows, tokens]."""

MIN_WINDOW = 2


def token_windows(
    text: TextOrIds,
    encode: Callable[[str], list[int]],
    windows: int,
    window: int,
    vocab_size: int,
    bos: int | None = None,
) -> I32:
    """The first non-overlapping windows of a text: i32 [n, window], n at most `windows`.

    Args:
        text: a file's path or token ids.
        encode: text to ids without special tokens; asked only for a file.
        windows: how many at most; fewer if the text does not hold as many, but one at least.
        window: tokens of each.
        vocab_size: ids must be below this.
        bos: begins every window if given, within its length.

    Raises:
        LowtideError: unreadable or not UTF-8, shorter than one window, ids out of range, impossible sizes.
    """
    if windows < 1:
        raise LowtideError(f"--windows {windows}: must be 1 or more")
    if window < MIN_WINDOW:
        raise LowtideError(f"--window {window}: must be {MIN_WINDOW} or more")
    body = window - (bos is not None)
    name, ids = _ids(text, encode)
    if ids.ndim == 1:
        count = min(windows, len(ids) // body)
        cut = ids[: count * body].reshape(count, body)
    else:
        count = windows if ids.shape[1] >= body else 0
        cut = ids[:count, :body]
    if cut.shape[0] == 0:
        raise LowtideError(
            f"{name}: holds {ids.shape[-1]} tokens, one window needs {body}: give a longer text or a smaller --window"
        )
    if cut.min() < 0 or cut.max() >= vocab_size:
        raise LowtideError(f"{name}: holds a token id outside 0 to {vocab_size - 1}; it belongs to another model")
    if bos is not None:
        cut = np.concatenate([np.full((len(cut), 1), bos, cut.dtype), cut], axis=1)
    return cut.astype(np.int32)


def read_text(path: str | Path) -> str:
    """A UTF-8 file's contents.

    Raises:
        LowtideError: missing, a folder, unreadable or not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise LowtideError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise LowtideError(f"{path}: cannot read the text ({error.strerror})") from None


def _ids(text: TextOrIds, encode: Callable[[str], list[int]]) -> tuple[str, NDArray[np.int64]]:
    if isinstance(text, (str, Path)):
        return str(text), np.asarray(encode(read_text(text)), np.int64)
    ids = np.asarray(text)
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise LowtideError(f"token ids must be integers [tokens] or [windows, tokens], not {ids.dtype} {ids.shape}")
    return "the token ids", ids.astype(np.int64)
