"""Where uncompressed models come from: a Hugging Face folder, a hub id, a .gguf file, or a demo model."""

from __future__ import annotations

import re
from pathlib import Path

from lowtide.compress.sources import demo
from lowtide.compress.sources.base import Source
from lowtide.errors import LowtideError

__all__ = ["Source", "open_source"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_source(model: str | Path) -> Source:
    """Open a model.

    Args:
        model: a folder with config.json and safetensors, a `.gguf` file, a hub id `org/name`, or `demo:smollm2`.

    Raises:
        LowtideError: nothing there, an unknown architecture (those known are listed), unsupported tensor types.
    """
    text = str(model)
    if text.startswith("demo:"):
        return open_source(demo.fetch(text.removeprefix("demo:")))
    path = Path(text)
    if path.is_dir():
        from lowtide.compress.sources.huggingface import HuggingFaceSource

        if not any(path.iterdir()):
            raise LowtideError(f"{path}: the folder is empty")
        return HuggingFaceSource(path)
    if path.is_file():
        from lowtide.compress.sources.gguf_file import GGUFSource

        return GGUFSource(path)
    if path.suffix != ".gguf" and _HUB_ID.fullmatch(text):
        from lowtide.compress.sources.huggingface import HuggingFaceSource, download

        return HuggingFaceSource(download(text), name=text)
    raise LowtideError(f"{text}: no such model; give a folder, a .gguf file, a hub id org/name or demo:smollm2")
