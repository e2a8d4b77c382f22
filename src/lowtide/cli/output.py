"""Printing: JSON for programs, Markdown tables (as llama-bench does) for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def print_json(figures: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(figures, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A Markdown table on stdout: the first column to the left, the others to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    # A file or pipe has no width: do not cut what somebody keeps.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def bits_label(bits: float | str | None) -> str:
    """A budget as text: "3", "2.5" or "dense"."""
    return "dense" if bits is None or bits == "dense" else f"{bits:g}"
