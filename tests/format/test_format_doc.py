"""docs/format.md: its examples are right, its tables are complete, and a reader written from it alone can read.

`DocReader` uses nothing of lowtide, and no numpy: struct and json, as another language would.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import ODD, make_artifact

from lowtide.arch import ModelConfig
from lowtide.format import codec
from lowtide.format.groups import GROUP_FIELDS, IPN_FIELDS, LINEAR_FIELDS
from lowtide.format.manifest import Manifest
from lowtide.format.reader import open_artifact

DOC = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def example(name: str) -> dict[str, Any]:
    found = re.search(rf"<!-- example: {name} -->\n```json\n(.*?)```", DOC, re.S)
    assert found, f"docs/format.md has no example {name}"
    parsed: dict[str, Any] = json.loads(found[1])
    return parsed


def test_digits_example() -> None:
    e = example("digits")
    q = np.zeros((e["out"], e["in"]), np.uint8)
    for row, column, value in e["q"]:
        q[row, column] = value
    packed = codec.pack_digits(q, e["slices"]).reshape(e["slices"], e["in"], 16)
    for s in range(e["slices"]):
        for column in range(e["in"]):
            assert packed[s, column].tolist() == e[f"slice {s}, column {column}"]
    for level in (1, 2):
        expected = [
            e["row_scale"]
            * e["col_scale"][j]
            * e["shrink"][level - 1]
            * sum(((int(q[0, j]) >> 2 * (1 - s) & 3) - 1.5) * 4.0**-s for s in range(level))
            for j in range(e["in"])
        ]
        assert e[f"row 0 at level {level}"] == expected


def test_outliers_example() -> None:
    e = example("outliers")
    rows, columns, values = zip(*e["outliers"], strict=True)
    coded = codec.pack_outliers(np.array(rows), np.array(columns), np.array(values, np.float16), e["out"])
    for field, array in zip(("ptr", "row", "gap", "value"), map(np.asarray, coded), strict=True):
        assert array.tolist() == e[f"outlier_{field}"], field


def test_tables_are_complete() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) ", DOC, re.M))
    for field, dtype in (GROUP_FIELDS | IPN_FIELDS | LINEAR_FIELDS).items():
        assert rows[field] == dtype, field
    first_columns = set(re.findall(r"^\| `(\w+)` \|", DOC, re.M))
    assert {f.name for f in dataclasses.fields(Manifest)} <= first_columns
    for config_field in dataclasses.fields(ModelConfig):
        assert f"`{config_field.name}`" in DOC, config_field.name


class DocReader:
    """Reads an artifact by the page. Slow and short."""

    def __init__(self, folder: Path) -> None:
        text = (folder / "lowtide.json").read_bytes()
        digest = hashlib.sha256(text).hexdigest()
        assert (folder / "lowtide.json.sha256").read_bytes() == f"{digest}  lowtide.json\n".encode()
        self.manifest = json.loads(text)
        assert self.manifest["format_version"] == 2
        for path, entry in self.manifest["files"].items():
            data = (folder / path).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        self.file = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack_from("<Q", self.file)
        self.header = json.loads(self.file[8 : 8 + length])
        assert self.header.pop("__metadata__") == {"format": "lowtide"}
        self.data = self.file[8 + length :]
        assert self.header.keys() == self.manifest["tensors"].keys()

    def tensor(self, name: str) -> tuple[Any, ...]:
        """All elements in order, not shaped."""
        entry = self.header[name]
        begin, end = entry["data_offsets"]
        raw = self.data[begin:end]
        assert hashlib.sha256(raw).hexdigest() == self.manifest["tensors"][name]["sha256"]
        code = {"U8": "B", "F16": "e", "F32": "f", "I32": "i", "U32": "I"}[entry["dtype"]]
        return struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code}", raw)

    def tiles(self, out: int) -> Iterator[tuple[int, int]]:
        padded, first = -(-out // 64) * 64, 0
        while first < padded:
            width = 256 if padded - first >= 256 else 64
            yield first, width
            first += width

    def weights(self, group: str, layer: str, inputs: int, level: int) -> list[list[float]]:
        """[out][in] at one level, with outliers added and exact columns in place."""
        slices = self.manifest["slices"]
        packed = self.tensor(f"{layer}.weight")
        row_scale, out = self.tensor(f"{layer}.row_scale"), self.header[f"{layer}.row_scale"]["shape"][0]
        col_scale, shrink = self.tensor(f"lowtide.{group}.col_scale"), self.tensor(f"lowtide.{group}.shrink")
        run = -(-out // 64) * 16
        assert len(packed) == slices * inputs * run
        result = [[0.0] * inputs for _ in range(out)]
        for first, width in self.tiles(out):
            for i in range(first, min(first + width, out)):
                at, shift = first // 4 + (i - first) % (width // 4), 2 * ((i - first) // (width // 4))
                for j in range(inputs):
                    digits = [packed[s * inputs * run + j * run + at] >> shift & 3 for s in range(level)]
                    total = sum((d - 1.5) * 4.0**-s for s, d in enumerate(digits))
                    result[i][j] = row_scale[i] * col_scale[j] * shrink[level - 1] * total
        channels, exact = self.tensor(f"lowtide.{group}.exact_channels"), self.tensor(f"{layer}.exact")
        for e, j in enumerate(channels):
            for i in range(out):
                result[i][j] = exact[e * out + i]
        ptr, rows, gaps, values = (self.tensor(f"{layer}.outlier_{f}") for f in ("ptr", "row", "gap", "value"))
        for tile, (first, _) in enumerate(self.tiles(out)):
            column = 0
            for n in range(ptr[tile], ptr[tile + 1]):
                column += gaps[n]
                if values[n] != 0:
                    result[first + rows[n]][column] += values[n]
        return result


@pytest.mark.parametrize("options", [{}, {"slices": 2, "intermediate": 331, "outliers": 0.003, "hidden": 36}])
def test_a_reader_written_from_the_page(tmp_path: Path, options: dict[str, Any]) -> None:
    path = make_artifact(tmp_path / "a", ODD, **options)
    theirs, ours = DocReader(path), open_artifact(path)
    for name in ("layers.0.qkv", "layers.0.gate_up", "layers.0.down", "head", "embed"):
        group = ours.groups[name]
        for n, linear in enumerate(group.linears):
            for level in {1, group.slices}:
                got = np.array(theirs.weights(name, linear.name, group.in_features, level))
                np.testing.assert_allclose(group.dequantise(n, level) + group.exact_part(n), got, rtol=1e-6, atol=1e-9)
    norm = ours.tensor("model.norm.weight")
    assert theirs.tensor("model.norm.weight") == tuple(norm.tolist())
