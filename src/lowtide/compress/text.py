"""The calibration text: tokens of a file, or text that the model writes itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lowtide.compress.dense import DenseModel
from lowtide.compress.sources import Source
from lowtide.errors import LowtideError

WINDOW = 512
FILE_WINDOWS = 12
SAMPLE_WINDOW = 256
SAMPLE_WINDOWS = 24


def encode_text(source: Source, text: str) -> torch.Tensor:
    """Token ids of a text by the source's own tokenizer, without special tokens; i64 [n]."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(source.tokenizer_files()["tokenizer.json"])
    except LowtideError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise LowtideError(f"{source.name}: its tokenizer.json is not readable ({error})") from None
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)


def windows_of_file(
    source: Source, file: Path, windows: int | None = None, tokens: int | None = None, window: int = WINDOW
) -> torch.Tensor:
    """Windows spread evenly over a text file, i64 [at most `windows` (default FILE_WINDOWS), window]; a window has no
    more tokens than the model has positions.

    tokens: as many windows as hold so many tokens instead; LowtideError if the text has fewer.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise LowtideError(f"{file}: cannot be read as calibration text ({reason})") from None
    ids = encode_text(source, text)
    window = min(window, source.config.max_position)
    available = len(ids) // window
    if available == 0:
        raise LowtideError(f"{file}: {len(ids)} tokens are less than one window of {window}; give a longer text")
    if tokens is not None:
        windows = max(1, -(-tokens // window))
        if tokens < 1 or windows > available:
            raise LowtideError(
                f"--calibration-tokens {tokens}: {file} holds {len(ids)} tokens, {available} windows of {window}; "
                "ask for fewer or give a longer text"
            )
    count = min(windows or FILE_WINDOWS, available)
    starts = [(available * i // count) * window for i in range(count)]
    return torch.stack([ids[s : s + window] for s in starts])


def sampled_windows(model: DenseModel, seed: int, progress: Callable[[int, int], None] | None = None) -> torch.Tensor:
    """Text from the model itself, i64 [SAMPLE_WINDOWS, window]."""
    window = min(SAMPLE_WINDOW, model.config.max_position)
    report = (lambda done: progress(done + 1, window)) if progress else None
    return model.sample(SAMPLE_WINDOWS, window, seed, report)
