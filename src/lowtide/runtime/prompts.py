"""A file of prompts: plain text, one a line, or JSON lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lowtide.errors import LowtideError


@dataclass(frozen=True)
class Prompt:
    """A text to continue; `seed` of its own, if the file has one."""

    text: str
    seed: int | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file. Lines without anything in them are left out.

    Args:
        path: UTF-8 text, one prompt a line; a name that ends in .jsonl says that every line is a JSON object with
            "prompt" and, if wanted, "seed"; other fields are left alone.

    Raises:
        LowtideError: it cannot be read, holds no prompt, or a line is not as it should be; names file and line.
    """
    try:
        lines = path.read_text("utf-8").split("\n")  # not splitlines, which breaks at characters that prompts may hold
    except OSError as error:
        raise LowtideError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LowtideError(f"{path}: is not UTF-8 text") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise LowtideError(f"{path}: holds no prompts; give one a line")
    if path.suffix == ".jsonl":
        return [_parse(line, f"{path}: line {number}") for number, line in numbered]
    return [Prompt(line) for _, line in numbered]


def _parse(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise LowtideError(f"{where}: is not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise LowtideError(f'{where}: must be an object with a text "prompt"')
    seed = row.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise LowtideError(f'{where}: "seed" must be a whole number')
    return Prompt(row["prompt"], seed)
