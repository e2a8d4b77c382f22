"""A hostile artifact, its hashes recomputed: the structure alone must give it away, before native code sees a byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tamper import edit_header, edit_manifest, edit_tensor, join, read_manifest, rehash, split, write_manifest
from support.tiny import make_artifact

from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
GROUP = "lowtide.layers.0.qkv"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its down_proj has 600 inputs: outliers lie far apart, and some gaps need fillers."""
    return make_artifact(
        tmp_path_factory.mktemp("attack") / "a",
        layers=1,
        intermediate=600,
        outliers=0.004,
        policies=("channel-norm", "topk", "statistical-topk"),
    )


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "a"))


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(LowtideError, match=message) as error:
        open_artifact(folder)
    text = str(error.value)
    assert "\n" not in text and str(folder) in text


def set_item(index: Any, value: Any) -> Callable[[Any], None]:
    def change(array: Any) -> None:
        array[index] = value

    return change


NAN, INF = float("nan"), float("inf")
VALUES: list[tuple[str, Callable[[Any], None], str]] = [
    *((f"{Q}.row_scale", set_item(3, v), "row_scale: holds a scale") for v in (NAN, INF, -INF, 0.0, -0.0, -1.0)),
    *((f"{GROUP}.col_scale", set_item(-1, v), "col_scale: holds a scale") for v in (NAN, INF, 0.0, -2.0)),
    *((f"{GROUP}.mean", set_item(0, v), "mean: holds NaN or infinity") for v in (NAN, INF, -INF)),
    *((f"{GROUP}.importance", set_item(0, v), "importance: holds") for v in (NAN, INF, -1.0)),
    *((f"{GROUP}.shrink", set_item(1, v), "shrink: holds") for v in (NAN, INF, 0.0, -1.0)),
    *((f"{Q}.bias", set_item(0, v), "bias: holds NaN") for v in (NAN, INF)),
    *((f"{Q}.exact", set_item((1, 2), v), "exact: holds NaN") for v in (NAN, -INF)),
    *((f"{Q}.outlier_value", set_item(0, v), "outlier_value: holds NaN") for v in (NAN, INF)),
    *(("model.norm.weight", set_item(0, v), "model.norm.weight: holds a value") for v in (NAN, INF)),
    *((f"{GROUP}.thresholds", set_item((0, 1, 1), v), "thresholds: policy channel-norm: ") for v in (NAN, -INF, -0.1)),
    (f"{GROUP}.thresholds", set_item((0, 0, 0), 9.0), "policy channel-norm: thresholds must ascend"),
    (f"{GROUP}.thresholds", set_item((1, 0, 2), 49.0), "policy topk: holds a count outside 0 to 48"),
    (f"{GROUP}.thresholds", set_item((1, 0, 2), -1.0), "policy topk: holds a count outside"),
    (f"{GROUP}.thresholds", set_item((1, 0, 0), 0.0), "policy topk: counts must descend"),
    (f"{GROUP}.thresholds", set_item((2, 0, 0), 9.0), "policy statistical-topk: thresholds must ascend"),
    (f"{GROUP}.exact_channels", set_item(1, 48), "exact_channels: must ascend"),
    (f"{GROUP}.exact_channels", set_item(0, -1), "exact_channels: must ascend"),
    (f"{GROUP}.exact_channels", set_item(slice(None), 5), "exact_channels: must ascend"),
    (f"{GROUP}.exact_channels", lambda a: a.sort() or a.__setitem__(slice(None), a[::-1].copy()), "must ascend"),
    (f"{Q}.weight", set_item((1, 15), 0xC0), "weight: padding rows from 48 on"),
    (f"{Q}.outlier_ptr", set_item(0, 1), "outlier_ptr: must rise"),
    (f"{Q}.outlier_ptr", set_item(-1, 10**6), "outlier_ptr: must rise"),
    (f"{DOWN}.outlier_ptr", set_item(slice(None), 0), "outlier_ptr: must rise"),
    ("model.layers.0.mlp.up_proj.outlier_ptr", set_item(1, 2**32 - 1), "outlier_ptr: must rise"),
    (f"{Q}.outlier_row", set_item(0, 48), "outlier_row: holds a row outside"),
    (f"{Q}.outlier_row", set_item(0, 255), "outlier_row: holds a row outside"),
    (f"{Q}.outlier_gap", set_item(-1, 255), "outlier_gap: leads to column"),
    (f"{Q}.outlier_gap", set_item(0, 255), "outlier_gap: leads to column"),
    (f"{Q}.outlier_value", set_item(0, 0.0), "outlier_value: a filler must be"),
    (f"{Q}.outlier_value", set_item(0, -0.0), "outlier_value: a filler must be"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_values_out_of_range(folder: Path, number: int) -> None:
    name, change, message = VALUES[number]
    edit_tensor(folder, name, change)
    refuse(folder, message)


@pytest.mark.parametrize("field", ["mean", "importance"])
def test_exact_channels_have_no_statistics(folder: Path, field: str) -> None:
    channel = int(open_artifact(folder).groups["layers.0.qkv"].exact_channels[0])
    edit_tensor(folder, f"{GROUP}.{field}", set_item(channel, 0.5))
    refuse(folder, f"{field}: must be zero for exact channels")


def outliers(folder: Path, gaps: list[int], rows: list[int], values: Sequence[float]) -> None:
    """Replace the outliers of down_proj (600 inputs, one tile of 64 rows) by these; its other entries are dropped."""
    count = len(gaps)

    def header_and_data() -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        header, start = split(data)
        new = {
            f"{DOWN}.outlier_ptr": np.array([0, count], "<u4"),
            f"{DOWN}.outlier_row": np.array(rows, "u1"),
            f"{DOWN}.outlier_gap": np.array(gaps, "u1"),
            f"{DOWN}.outlier_value": np.array(values, "<f2"),
        }
        order = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        body = b""
        for name in order:
            first, last = header[name]["data_offsets"]
            part = new[name].tobytes() if name in new else data[start + first : start + last]
            if name in new:
                header[name]["shape"] = list(new[name].shape)
            header[name]["data_offsets"] = [len(body), len(body) + len(part)]
            body += part
        path.write_bytes(join(header, body))

    def manifest_counts(manifest: dict[str, Any]) -> None:
        real = sum(v != 0 for v in values)
        manifest["groups"]["layers.0.down"]["linears"][DOWN] = {"outliers": real, "entries": count}
        for field in ("row", "gap", "value"):
            manifest["tensors"][f"{DOWN}.outlier_{field}"]["shape"] = [count]

    header_and_data()
    edit_manifest(folder, manifest_counts)
    rehash(folder)


def test_outlier_order(folder: Path) -> None:
    exact = set(open_artifact(folder).groups["layers.0.down"].exact_channels.tolist())
    free = next(c for c in range(2, 200) if not {c, c + 256, 2 * c} & exact)
    outliers(folder, [free, 0, 255, 1], [4, 9, 0, 4], [1, 1, 0, 1])
    assert open_artifact(folder).groups["layers.0.down"].linears[0].outliers()[1].tolist() == [free, free, free + 256]
    outliers(folder, [], [], [])
    assert len(open_artifact(folder).tensor(f"{DOWN}.outlier_value")) == 0
    for gaps, rows, values, message in [
        ([free, 0], [4, 4], [1, 1], "rows of one column must ascend"),
        ([free, 0], [9, 4], [1, 1], "rows of one column must ascend"),
        ([free, 255], [4, 0], [1, 0], "filler must lead to a further column"),
        ([255], [0], [0], "filler must lead to a further column"),
        ([255, 0], [0, 1], [0, 1], "filler must lead to a further column"),
        ([255, free], [1, 1], [0, 1], "a filler must be \\+0 with row 0 and gap 255"),
        ([free, free], [0, 1], [0, 1], "a filler must be"),
        ([255, 255, 255], [0, 0, 1], [0, 0, 1], "leads to column 765 of 600"),
    ]:
        outliers(folder, gaps, rows, values)
        refuse(folder, message)


def test_an_outlier_in_an_exact_channel(folder: Path) -> None:
    channel = int(open_artifact(folder).groups["layers.0.down"].exact_channels[0])
    fillers = max(channel - 1, 0) // 255
    outliers(folder, [255] * fillers + [channel - 255 * fillers], [0] * fillers + [1], [0.0] * fillers + [1.0])
    refuse(folder, "an outlier lies in an exact channel")


def test_outliers_are_counted(folder: Path) -> None:
    def one_fewer(manifest: dict[str, Any]) -> None:
        manifest["groups"]["layers.0.qkv"]["linears"][Q]["outliers"] -= 1

    edit_manifest(folder, one_fewer)
    refuse(folder, "q_proj.outlier_value: holds (\\d+) outliers, but the manifest says ")


# -- header against manifest ---------------------------------------------------------------------------------------


def swap(a: str, b: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[a], header[b] = header[b], header[a]

    return change


def test_header_that_does_not_fit_the_manifest(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    for change, message in [
        (swap(f"{Q}.weight", f"{DOWN}.weight"), "but the manifest says U8"),
        (lambda h: h[f"{Q}.row_scale"].update(shape=[24, 2]), "is F16 \\[24, 2\\], but the manifest says F16 \\[48\\]"),
        (lambda h: h[f"{GROUP}.exact_channels"].update(dtype="U32"), "is U32 .* but the manifest says I32"),
        (lambda h: h.update(extra=h.pop(f"{Q}.bias")), "is not in the manifest|is missing"),
        (lambda h: h[f"{Q}.weight"].update(shape=[48, 48]), "tensor .*q_proj.weight"),
        (lambda h: h[f"{Q}.weight"]["data_offsets"].reverse(), "not two rising counts"),
    ]:
        edit_header(folder, change)
        refuse(folder, message)
        (folder / "model.safetensors").write_bytes(data)


def test_every_count_of_the_header_changed(folder: Path) -> None:
    """Each shape and offset, too large or too small, one at a time."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header, start = split(data)
    manifest = read_manifest(folder)
    for name in [n for n in header if n != "__metadata__"][::13]:
        for field in ("shape", "data_offsets"):
            for axis in range(len(header[name][field])):
                for wrong in (header[name][field][axis] + 1, header[name][field][axis] - 1, 1 << 62, -1, 1 << 64):
                    changed = json.loads(json.dumps(header))
                    changed[name][field][axis] = wrong
                    path.write_bytes(join(changed, data[start:]))
                    write_manifest(folder, manifest)
                    rehash(folder)
                    refuse(folder, "model.safetensors")


# -- manifest and config -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("escape", ["../outside.json", "/etc/hostname", "sub/../../outside.json"])
def test_path_escaping_the_folder(folder: Path, escape: str) -> None:
    (folder.parent / "outside.json").write_bytes(b"{}")

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][escape] = {"bytes": 2, "sha256": "0" * 64}

    edit_manifest(folder, change)
    refuse(folder, "not a plain relative path inside the artifact's folder")


def test_newer_format_version(folder: Path) -> None:
    write_manifest(folder, {"format_version": 6, "something": "else"})
    refuse(folder, "format_version 6 is newer than 5; update lowtide")


def test_duplicate_keys(folder: Path) -> None:
    text = (folder / "lowtide.json").read_bytes()
    write_manifest(folder, text.replace(b'"slices": 3', b'"slices": 3, "slices": 3'))
    refuse(folder, "lowtide.json: not valid JSON \\(key 'slices' is given twice\\)")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"quantization_config": None}, "quantization_config"),
        ({"quantization_config": {"quant_method": "gptq", "format_version": 1}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "lowtide", "format_version": 3}}, "quantization_config"),
        ({"vocab_size": 131}, "another model"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"architectures": ["EvilForCausalLM"]}, "unknown architecture 'EvilForCausalLM'"),
    ],
)
def test_config_that_does_not_fit(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    rehash(folder)
    refuse(folder, message)


def test_config_marks_the_format(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    assert config["quantization_config"] == {"quant_method": "lowtide", "format_version": 2}
    assert config["architectures"] == ["LlamaForCausalLM"]


# -- fuzz ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lowtide.json", "model.safetensors", "config.json"])
def test_any_byte_changed_and_rehashed_is_refused_or_harmless(folder: Path, name: str) -> None:
    """Never another exception, and never arrays whose shapes do not fit the config."""
    path = folder / name
    data = path.read_bytes()
    manifest = read_manifest(folder)
    size = split(data)[1] if name == "model.safetensors" else len(data)
    rng = np.random.default_rng(7)
    opened = 0
    for n in sorted({*range(12), *rng.integers(0, size, 150).tolist()}):
        changed = bytearray(data)
        changed[n] = int(rng.integers(0, 256)) if n % 2 else changed[n] ^ 1
        if name == "lowtide.json":
            write_manifest(folder, bytes(changed))
        else:
            path.write_bytes(changed)
            write_manifest(folder, manifest)
            rehash(folder)
        try:
            artifact = open_artifact(folder)
        except LowtideError as error:
            assert "\n" not in str(error)
        else:
            opened += 1
            assert artifact.groups["head"].linears[0].weight.shape == (3, 48 * 192 // 4)
    assert opened < 81
