"""Quality of an artifact against the model it was made from: KL divergence, perplexity, bits read. Needs torch."""

from __future__ import annotations

from lowtide.eval.measure import evaluate
from lowtide.eval.plots import write_html, write_png

__all__ = ["evaluate", "write_html", "write_png"]
