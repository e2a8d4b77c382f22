"""JSON from an untrusted file: no duplicate keys, no NaN or infinity, no surprises, one-line errors."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from lowtide.errors import LowtideError


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top level is an object.

    Args:
        data: the bytes of the file, or of the part of it that holds the JSON.
        where: file name for errors.

    Raises:
        LowtideError: not UTF-8, not JSON, a key given twice, a number that is not finite, nested too deeply.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
    except RecursionError:
        raise LowtideError(f"{where}: JSON is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, our own and over-long integers
        raise LowtideError(f"{where}: not valid JSON ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise LowtideError(f"{where}: JSON must be an object")
    return value


def short(value: object) -> str:
    """A value from a file as one short printable piece of an error line."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).encode("ascii", "replace").decode()
    return text if len(text) <= 120 else text[:117] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"key {short(twice)} is given twice")
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not allowed")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {short(text)} is out of range")
    return value
