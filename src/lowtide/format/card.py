"""The README.md inside an artifact, so that a folder found on a disk or a hub explains itself."""

from __future__ import annotations

from typing import Any

from lowtide.arch import ModelConfig, group_specs

CARD_NAME = "README.md"

_TEXT = """---
library_name: lowtide
tags:
- lowtide
- compressed
---

# {title}, compressed with lowtide

A {architecture} decoder ({layers} layers, {weights} weights in linear layers and embeddings) stored as {slices} slices
of 2 bits per weight. For every token the engine reads only the weights, and only the bits of them, that matter; how
many is a dial you turn at run time.

    pip install lowtide
    lowtide generate PATH_OF_THIS_FOLDER --prompt "Once upon a time" --bits {bits:g}

Budgets stored: {budgets} bits read per weight of the decoder's linear layers, and everything ("dense").
Mask rules stored: {policies}.

`lowtide verify` checks every byte; `lowtide inspect` lists every layer. The weights in `model.safetensors` are packed
digits: a loader that does not know lowtide refuses their shapes. lowtide's `docs/format.md` specifies every byte.
"""


def model_card(config: ModelConfig, slices: int, budgets: list[float], policies: list[str], title: str) -> bytes:
    """UTF-8 Markdown. `title` is the source model's name."""
    text = _TEXT.format(
        title=_plain(title),
        architecture=config.architecture,
        layers=config.num_layers,
        weights=_readable(sum(spec.weights for spec in group_specs(config))),
        slices=slices,
        bits=budgets[len(budgets) // 2],
        budgets=", ".join(f"{budget:g}" for budget in budgets),
        policies=", ".join(f"`{policy}`" for policy in policies),
    )
    return text.encode()


def _plain(title: Any) -> str:
    """A title on one line, without what Markdown or HTML would take for markup."""
    text = "".join(c if c.isalnum() or c in " -._/:+" else " " for c in str(title))
    return " ".join(text.split())[:100] or "A model"


def _readable(count: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
