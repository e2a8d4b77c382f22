"""An artifact's layers as one self-contained HTML page, and masks as PNG files. No library, no network."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #222; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: middle }}
th:first-child, td:first-child {{ text-align: left }}
img {{ image-rendering: pixelated; width: 128px; height: 128px; border: 1px solid #999 }}
.bars rect {{ fill: #1f6f8b }}
</style></head><body>
<h1>{title}</h1>
<p>{about}</p>
<table><thead><tr><th>layer</th><th>weights</th><th>density</th><th>step</th><th>entropy</th><th>coded</th>
<th>importance of its channels</th><th>mask</th></tr></thead><tbody>
{rows}
</tbody></table>
<p>Entropy and coded size are bits per weight. The histogram counts input channels by the octave of their importance,
the root mean square in the middle. In a mask, rows run down and input channels across; white survives.</p>
</body></html>
"""


def png(picture: NDArray[np.uint8]) -> bytes:
    """A grey picture uint8 [h, w] as a PNG file (W3C PNG, second edition: 8 bits, filter 0)."""
    height, width = picture.shape
    lines = b"".join(b"\0" + line.tobytes() for line in np.ascontiguousarray(picture))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(lines, 9))]
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in [*parts, (b"IEND", b"")]:
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


def write_page(path: Path, title: str, about: str, rows: Iterable[tuple[dict[str, Any], NDArray[np.uint8]]]) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        title, about: plain text.
        rows: figures of each layer (`survey.layer_figures`) and its mask's picture.
    """
    body = "\n".join(_row(figures, picture) for figures, picture in rows)
    page = _PAGE.format(title=html.escape(title), about=html.escape(about), rows=body)
    path.write_text(page, encoding="utf-8")


def _row(figures: dict[str, Any], picture: NDArray[np.uint8]) -> str:
    image = base64.b64encode(png(picture)).decode()
    name = html.escape(figures["layer"])
    cells = [
        name,
        f"{figures['weights']:,}",
        f"{figures['density']:.3f}",
        f"{figures['step']:.3g}",
        f"{figures['entropy_bits']:.3f}",
        "-" if figures["coded_bits"] is None else f"{figures['coded_bits']:.3f}",
        _bars(figures["importance_histogram"]),
        f'<img alt="mask of {name}" src="data:image/png;base64,{image}">',
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _bars(counts: list[int]) -> str:
    heights = [40 * c / max(1, *counts) for c in counts]
    bars = "".join(
        f'<rect x="{12 * i}" y="{40 - h:.1f}" width="10" height="{h:.1f}"><title>{c}</title></rect>'
        for i, (c, h) in enumerate(zip(counts, heights, strict=True))
    )
    return f'<svg class="bars" width="{12 * len(counts)}" height="40">{bars}</svg>'
