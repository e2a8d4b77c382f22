"""The safetensors header, as bytes: what is accepted, and each way in which it can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load
from support.tamper import join, split

from lowtide.errors import LowtideError
from lowtide.format import layout


def entry(dtype: str, shape: list[Any], start: Any, stop: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD: dict[str, Any] = {
    "__metadata__": {"format": "lowtide"},
    "a": entry("F32", [2, 3], 0, 24),
    "b": entry("F16", [0, 5], 24, 24),
    "c": entry("U8", [4], 24, 28),
}


def parse(header: dict[str, Any] | bytes, data: bytes = bytes(28)) -> tuple[int, dict[str, layout.TensorSpan]]:
    return layout.parse_header(memoryview(join(header, data)), "model.safetensors")


def test_good_header() -> None:
    start, spans = parse(GOOD)
    assert start % 64 == 0
    assert list(spans) == ["a", "b", "c"]
    assert spans["a"] == layout.TensorSpan("F32", (2, 3), 0, 24)


def test_planned_files_load_in_the_safetensors_library() -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "bytes": rng.integers(0, 255, 5, dtype=np.uint8),
        "halves": rng.normal(size=3).astype(np.float16),
        "floats": rng.normal(size=(2, 3)).astype(np.float32),
        "odd_weight": rng.integers(0, 255, (1, 16 * 3), dtype=np.uint8),
        "none": np.zeros((0, 7), np.float16),
        "weight": rng.integers(0, 255, (2, 64), dtype=np.uint8),
        "ints": np.arange(3, dtype=np.int32),
        "unsigned": np.arange(2, dtype=np.uint32),
    }
    spans = layout.plan({n: (layout.dtype_code(a.dtype), a.shape) for n, a in arrays.items()})
    file = layout.encode_header(spans) + b"".join(arrays[name].tobytes() for name in spans)
    start, parsed = layout.parse_header(memoryview(file), "f")
    assert parsed == spans and start % 64 == 0 and spans["weight"].start == 0
    for name, span in spans.items():
        assert (start + span.start) % arrays[name].itemsize == 0
    loaded = load(file)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_dtypes_that_are_not_stored() -> None:
    with pytest.raises(ValueError, match="float64 is not stored"):
        layout.dtype_code(np.dtype(np.float64))
    assert layout.dtype_code(np.dtype(">f4")) == "F32"


BAD: dict[str, tuple[Any, str | None]] = {
    "overlap": (GOOD | {"c": entry("U8", [4], 20, 24)}, "overlaps"),
    "hole": (GOOD | {"c": entry("U8", [3], 25, 28)}, "hole"),
    "first hole": ({**GOOD, "a": entry("F32", [2, 3], 4, 28)}, "hole"),
    "short": (GOOD | {"c": entry("U8", [3], 24, 27)}, "tensors end at byte"),
    "long": (GOOD | {"c": entry("U8", [5], 24, 29)}, "tensors end at byte"),
    "size": (GOOD | {"a": entry("F32", [2, 4], 0, 24)}, "does not take 24 bytes"),
    "product overflow": (GOOD | {"a": entry("F32", [1 << 32, 1 << 32], 0, 0)}, "does not take 0 bytes"),
    "product wraps to the size": (GOOD | {"a": entry("U8", [(1 << 52) + 1, 1 << 12, 24], 0, 24)}, "does not take"),
    "offset overflow": (GOOD | {"a": entry("U8", [1], (1 << 64) - 1, 1 << 64)}, "not two rising counts"),
    "huge count": (GOOD | {"a": entry("U8", [1 << 53], 0, 24)}, "counts"),
    "falling": (GOOD | {"a": entry("F32", [2, 3], 24, 0)}, "rising"),
    "negative": (GOOD | {"a": entry("F32", [-2, -3], 0, 24)}, "counts"),
    "bool": (GOOD | {"c": entry("U8", [True, 4], 24, 28)}, "counts"),
    "float": (GOOD | {"c": entry("U8", [4.0], 24, 28)}, "counts"),
    "text": (GOOD | {"c": entry("U8", ["4"], 24, 28)}, "counts"),
    "four axes": (GOOD | {"c": entry("U8", [1, 1, 1, 4], 24, 28)}, "up to three"),
    "dtype": (GOOD | {"c": entry("BOOL", [4], 24, 28)}, "dtype 'BOOL'"),
    "dtype type": (GOOD | {"c": entry(["U8"], [4], 24, 28)}, "dtype"),  # type: ignore[arg-type]
    "extra field": (GOOD | {"c": entry("U8", [4], 24, 28) | {"x": 1}}, "nothing else"),
    "no entry": (GOOD | {"c": 7}, "entry must hold"),
    "misaligned": (
        {"__metadata__": GOOD["__metadata__"], "c": entry("U8", [4], 0, 4), "a": entry("F32", [6], 4, 28)}, None),
    "unaligned": (
        {"__metadata__": GOOD["__metadata__"], "c": entry("U8", [1], 0, 1), "a": entry("F16", [13], 1, 27),
         "d": entry("U8", [1], 27, 28)}, "not aligned"),
    "metadata": (GOOD | {"__metadata__": {"format": "pt"}}, "format lowtide"),
    "no metadata": ({k: v for k, v in GOOD.items() if k != "__metadata__"}, "format lowtide"),
    "array": (b"[]", "does not start"),
    "leading space": (b" " + json.dumps(GOOD).encode(), "does not start"),
    "not JSON": (b"{nope}", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "NaN": (b'{"a": NaN}', "NaN is not allowed"),
    "huge number": (b'{"a": 1e999}', "out of range"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "long integer": (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON|entry must hold|format lowtide"),
    "duplicate tensor": (
        json.dumps(GOOD)[:-1].encode() + b', "a": ' + json.dumps(GOOD["a"]).encode() + b"}", "'a' is given twice"),
    "duplicate field": (
        json.dumps(GOOD).replace('"dtype": "U8"', '"dtype": "U8", "dtype": "U8"').encode(), "given twice"),
    "duplicate metadata": (
        json.dumps(GOOD).replace('"format"', '"format": "x", "format"').encode(), "given twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_header(case: str) -> None:
    header, message = BAD[case]
    if message is None:
        parse(header)  # the control: aligned by luck, so accepted
        return
    with pytest.raises(LowtideError, match=message) as error:
        parse(header)
    text = str(error.value)
    assert text.startswith("model.safetensors") and "\n" not in text and len(text) < 250


@pytest.mark.parametrize("length", [0, 1, 7, 8])
def test_too_short_for_a_length(length: int) -> None:
    with pytest.raises(LowtideError, match="truncated|does not start"):
        layout.parse_header(memoryview(bytes(length)), "f")


@pytest.mark.parametrize("length", [1 << 62, (1 << 64) - 1, 100_000_001, 2000])
def test_length_beyond_the_file(length: int) -> None:
    with pytest.raises(LowtideError, match="does not fit the file"):
        layout.parse_header(memoryview(length.to_bytes(8, "little") + bytes(1000)), "f")


def test_truncation_at_every_byte(tiny_artifact: Path) -> None:
    """Of the header and of the data: no prefix of a file is a file."""
    data = (tiny_artifact / "model.safetensors").read_bytes()
    _, start = split(data)
    view = memoryview(data)
    for end in [*range(start + 2), *range(start + 2, len(data), 499), len(data) - 1]:
        with pytest.raises(LowtideError):
            layout.parse_header(view[:end], "f")
    layout.parse_header(view, "f")
