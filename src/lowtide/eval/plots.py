"""KL against bits read, as a PNG (matplotlib) and as one self-contained HTML page (no library, no network)."""

from __future__ import annotations

import html as htmllib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowtide.errors import LowtideError

Curves = Mapping[str, Sequence[Mapping[str, Any]]]
"""Label -> points with "bits_read_body" and "kl" (and, for the page's table, whatever else `evaluate` gives)."""

COLOURS = ("#1f6f8b", "#d1495b", "#edae49", "#66a182", "#6a4c93", "#8d6b4f", "#4f5d75")
X_LABEL, Y_LABEL = "bits read per weight of the decoder's linear layers", "KL to the dense model (nats per token)"
WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 56


def write_png(curves: Curves, path: str | Path, title: str = "") -> None:
    """Draw the curves on a logarithmic KL axis.

    Raises:
        LowtideError: no point can be drawn.
    """
    drawable = _drawable(curves)
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    figure = Figure(figsize=(7.6, 4.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for i, (label, points) in enumerate(drawable.items()):
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=COLOURS[i % len(COLOURS)], label=label)
    axes.set_yscale("log")
    axes.set_xlabel(X_LABEL)
    axes.set_ylabel(Y_LABEL)
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(path, format="png")


def write_html(curves: Curves, path: str | Path, title: str = "KL against bits read") -> None:
    """Write one HTML file with the curves as inline SVG (values on hover) and all figures as tables.

    Raises:
        LowtideError: no point can be drawn.
    """
    body = [f"<h1>{_text(title)}</h1>", _svg(_drawable(curves)), _legend(curves)]
    body += [f"<h2>{_text(label)}</h2>{_table(points)}" for label, points in curves.items()]
    Path(path).write_text(_PAGE.format(title=_text(title), body="\n".join(body)), encoding="utf-8")


def _drawable(curves: Curves) -> dict[str, list[tuple[float, float]]]:
    """(bits, KL) of each curve by ascending bits, without points that a logarithmic axis cannot show."""
    out = {}
    for label, points in curves.items():
        pairs = [(float(p["bits_read_body"]), float(p["kl"])) for p in points if p.get("bits_read_body") is not None]
        kept = sorted((b, k) for b, k in pairs if k > 0 and math.isfinite(k) and math.isfinite(b))
        if kept:
            out[label] = kept
    if not out:
        raise LowtideError("nothing to draw: no point has both bits read and a KL above zero")
    return out


def _svg(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    every = [p for points in curves.values() for p in points]
    x0, x1 = math.floor(min(b for b, _ in every) * 2) / 2, math.ceil(max(b for b, _ in every) * 2) / 2
    x1 = x1 if x1 > x0 else x0 + 0.5
    y0, y1 = (math.log10(f(k for _, k in every)) for f in (min, max))
    pad = 0.06 * max(y1 - y0, 0.5)
    y0, y1 = y0 - pad, y1 + pad

    def x(bits: float) -> float:
        return LEFT + (bits - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def y(kl: float) -> float:
        return TOP + (y1 - math.log10(kl)) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{Y_LABEL} against {X_LABEL}">']
    for tick in _x_ticks(x0, x1):
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in _log_ticks(10**y0, 10**y1):
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{X_LABEL}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{Y_LABEL}</text>')
    for i, (label, points) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        line = "L".join(f"{x(b):.1f} {y(k):.1f}" for b, k in points)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for b, k in points:
            note = f"{_text(label)}: {b:.3f} bits, KL {k:.5f}"
            parts.append(
                f'<circle cx="{x(b):.1f}" cy="{y(k):.1f}" r="5" fill="{colour}"><title>{note}</title></circle>'
            )
    return "\n".join([*parts, "</svg>"])


def _x_ticks(low: float, high: float) -> list[float]:
    step = next(s for s in (0.5, 1.0, 2.0, 5.0, 10.0, 1e9) if (high - low) / s <= 10)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]


def _legend(curves: Curves) -> str:
    drawn = _drawable(curves)
    items = [
        f'<span><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{_text(label)}</span>'
        for i, label in enumerate(drawn)
    ]
    return f'<p class="legend">{"".join(items)}</p>'


def _table(points: Sequence[Mapping[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for p in points for key in p))
    head = "".join(f"<th>{_text(key)}</th>" for key in keys)
    rows = ["".join(f"<td>{_cell(p.get(key))}</td>" for key in keys) for p in points]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else _text(str(value))


def _text(value: str) -> str:
    return htmllib.escape(value, quote=True)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 800px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.05rem; margin: 1.6rem 0 .4rem; }}
svg {{ width: 100%; height: auto; }} svg text {{ fill: currentColor; font-size: 12px; }}
svg .grid {{ stroke: currentColor; stroke-opacity: .15; fill: none; }}
.legend span {{ margin-right: 1.2rem; white-space: nowrap; }}
.legend i {{ display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .4em; }}
table {{ border-collapse: collapse; }} th, td {{ padding: .15rem .7rem; text-align: right; }}
th {{ border-bottom: 1px solid currentColor; font-weight: 600; }}
</style></head><body>
{body}
</body></html>
"""
