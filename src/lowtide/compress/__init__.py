"""From an uncompressed model to an artifact. Needs torch: `pip install 'lowtide[compress]'`."""

from __future__ import annotations

from lowtide.compress.pipeline import compress, compress_curve
from lowtide.compress.sources import Source, open_source

__all__ = ["Source", "compress", "compress_curve", "open_source"]
