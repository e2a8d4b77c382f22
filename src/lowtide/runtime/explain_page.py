"""An explanation as one self-contained HTML page: no network, no library; most of it works without JavaScript, too."""

from __future__ import annotations

import re
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError

if TYPE_CHECKING:
    import jinja2

    from lowtide.runtime.explain_data import Explanation

STEPS = 16
"""Colours of the heat map."""

#: From few bits to many, as anchors that the colours between them are mixed from.
LIGHT = ("#eef6f7", "#b9dfe4", "#6bb8c6", "#25849b", "#0d5673", "#072f49")
DARK = ("#15262d", "#17454f", "#1c6c78", "#36979c", "#7dc6bd", "#d9f5e6")


def write_page(path: Path, explanation: Explanation) -> None:
    """Write the page; raises OSError where that is not possible."""
    path.write_text(page(explanation), encoding="utf-8")


def check_target(path: Path) -> None:
    """Refuse a target that cannot be written, before the work that it is for.

    Raises:
        LowtideError: it is a folder, or lies in one that is not there.
    """
    if path.is_dir():
        raise LowtideError(f"--html {path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise LowtideError(f"--html {path}: there is no folder {path.parent}; make it first")


def page(explanation: Explanation) -> str:
    """The page's HTML."""
    e = explanation
    bits = np.asarray(e.bits)  # [n, L, K]
    weights = np.asarray(e.kind_weights, np.float64)
    layers = bits @ (weights / weights.sum())
    views = [_view("a", "whole layer", layers)]
    views += [_view(kind[0], kind, bits[:, :, k]) for k, kind in enumerate(e.kinds)]
    strip = _view("s", "", np.asarray([t.bits for t in e.tokens]))
    data = e.data() | {"steps": [v["steps"] for v in views[1:]]}
    template = _environment(e.slices, e.head_dim).get_template("explain.html.j2")
    return template.render(
        e=e,
        views=views,
        strip=strip,
        steps=STEPS,
        colours={"light": _colours(LIGHT), "dark": _colours(DARK)},
        cell=max(12, min(46, 900 // bits.shape[1])),
        layers=bits.shape[1],
        made=len(e.tokens) - e.prompt_tokens,
        least=min(t.bits for t in e.tokens),
        greatest=max(t.bits for t in e.tokens),
        most=max(1e-9, *(t.entropy for t in e.tokens)),
        chosen=e.tokens[e.chosen],
        detail=e.details[str(e.chosen)],
        always=max(max(counts) for counts in e.exact),
        data=data,
        script=_script(),
    )


def number(x: float) -> str:
    """Figures without an exponent; the script's `num` writes them alike (its toFixed rounds ties away from 0)."""
    a = abs(x)
    digits = 0 if a >= 100 or a == 0 else 1 if a >= 10 else 2 if a >= 1 else 3 if a >= 0.1 else 4
    return str(Decimal(x).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def shown(text: str) -> str:
    """A token's text with its white space and control characters to be seen."""
    return line(text).replace(" ", "␣")


def line(text: str) -> str:
    """A token's text without control characters, white space as it is."""
    text = text.replace("\n", "↵").replace("\t", "⇥").replace("\x7f", "␡")
    return re.sub("[\x00-\x1f]", lambda c: chr(0x2400 + ord(c[0])), text)


def _view(key: str, label: str, values: NDArray[np.float64]) -> dict[str, Any]:
    """A quantity as colours: steps [...] from 0 to STEPS - 1, over the range of all but the outermost values.

    One token or layer far off would otherwise leave one colour for all others.
    """
    low, high = (float(q) for q in np.percentile(values, (5, 95)))
    steps = np.floor((values - low) / max(high - low, 1e-9) * STEPS).clip(0, STEPS - 1)
    return {
        "key": key,
        "label": label,
        "low": low,
        "high": high,
        "steps": steps.astype(int).tolist(),
        "texts": np.char.mod("%.2f", values).tolist(),
    }


def _colours(anchors: tuple[str, ...]) -> str:
    """CSS variables --c0.. (backgrounds) and --t0.. (text on them)."""
    rgb = np.array([[int(a[i : i + 2], 16) for i in (1, 3, 5)] for a in anchors])
    at = np.linspace(0, len(anchors) - 1, STEPS)
    mixed = np.stack([np.interp(at, np.arange(len(anchors)), rgb[:, c]) for c in range(3)], axis=1)
    linear = np.where(mixed <= 10, mixed / 3294.6, ((mixed / 255 + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]  # WCAG 2.2, relative luminance
    parts = []
    for i, (colour, y) in enumerate(zip(np.rint(mixed).astype(int), luminance, strict=True)):
        text = "#fff" if 1.05 / (y + 0.05) > (y + 0.05) / 0.05 else "#000"
        parts.append(f"--c{i}: #{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}; --t{i}: {text};")
    return " ".join(parts)


@cache
def _script() -> Any:
    """The page's script, marked as safe."""
    from importlib.resources import files

    from markupsafe import Markup

    return Markup(files("lowtide.runtime").joinpath("templates/explain.js").read_text(encoding="utf-8"))


def _environment(slices: int, head_dim: int) -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lowtide.runtime"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "sort_keys": False, "ensure_ascii": False}
    environment.filters |= {
        "num": number,
        "signed": lambda x: ("−" if x < 0 else "+") + number(abs(x)),
        "percent": lambda x: f"{100 * x:.1f}\u00a0%",
        "shown": shown,
        "line": line,
        "dots": lambda level: "●" * level + "○" * (slices - level),
        "channel": lambda c, kind: f"{c // head_dim}·{c % head_dim}" if kind == "o" else str(c),
    }
    return environment
