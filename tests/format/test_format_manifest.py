"""The manifest: what it accepts, and one line for everything it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tamper import read_manifest

from lowtide.errors import LowtideError
from lowtide.format.manifest import Manifest, TensorEntry, digest_line

Change = Callable[[dict[str, Any]], object]
Q = "model.layers.0.self_attn.q_proj"
SHA = "0" * 64


def test_round_trip(tiny_artifact: Path) -> None:
    data = (tiny_artifact / "lowtide.json").read_bytes()
    manifest = Manifest.from_json(data)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.to_json() == data
    assert (manifest.format_version, manifest.slices, manifest.policies) == (2, 3, ["channel-norm"])
    assert manifest.stats == {"source": "tiny", "seed": 0}
    assert manifest.tensors[f"{Q}.weight"].shape == (3, 48 * 64 // 4)
    assert next(iter(json.loads(data))) == "format_version"


def test_stats_keep_any_text(tiny_artifact: Path) -> None:
    manifest = Manifest.from_json((tiny_artifact / "lowtide.json").read_bytes())
    stats = {"note": 'a "quoted" [ 1,  2 ]\n line', "nested": {"list": [1, 2.5, None, True, "x"]}}
    again = Manifest.from_json(replace(manifest, stats=stats).to_json())
    assert again.stats == stats


def test_digest_line_is_that_of_sha256sum() -> None:
    assert digest_line(b"") == (b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  lowtide.json\n")


def put(*path: str, value: object) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


def drop(*path: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        del manifest[path[-1]]

    return change


FILE = {"bytes": 1, "sha256": SHA}
BAD: list[tuple[Change, str]] = [
    (put("format_version", value=4), "format_version must be 3 to 5 if the rule ipn"),
    (put("format_version", value=6), "format_version 6 is newer than 5; update lowtide"),
    (put("format_version", value=10**40), "format_version"),
    (put("format_version", value=0), "format_version must be a whole number"),
    (put("format_version", value=True), "format_version must be"),
    (put("format_version", value="1"), "format_version must be"),
    (drop("format_version"), "format_version must be"),
    (drop("slices"), "lacks field 'slices'"),
    (put("surprise", value=1), "unknown field 'surprise'"),
    (put("slices", value=0), "slices must be"),
    (put("slices", value=5), "slices must be"),
    (put("slices", value=2), f"tensor {Q}.weight|tensor .*must be"),
    (put("budgets", value=[]), "budgets must be a list"),
    (put("budgets", value=[1.0, 1.0, 2.0]), "budgets must ascend"),
    (put("budgets", value=[1.0, 2.0, 10**400]), "budgets must lie in"),
    (put("budgets", value=[-1.0, 2.0, 3.0]), "budgets must lie in"),
    (put("budgets", value=[False, 2.0, 3.0]), "budgets must be numbers"),
    (put("budgets", value=[1.0, 2.0]), "thresholds must be F32 \\[1, 2, 3\\]"),
    (put("policies", value=["a" * 65]), "policies must be"),
    (put("policies", value=["os; import"]), "policies must be"),
    (put("policies", value=["topk", "topk"]), "policies lists one twice"),
    (put("policies", value="topk"), "policies must be a list"),
    (put("model_id", value="xyz"), "model_id must be 64"),
    (put("model_id", value="A" * 64), "model_id must be 64"),
    (put("lowtide_version", value=1), "lowtide_version must be"),
    (put("stats", value=[]), "stats must be an object"),
    (put("stats", value={"a": [[[[[[[[[[[1]]]]]]]]]]]}), "stats.*nested too deeply"),
    (put("config", value=3), "config must be an object"),
    (drop("config", "tied"), "config lacks field 'tied'"),
    (put("config", "num_layers", value=1 << 60), "num_layers must be"),
    (put("config", "vocab_size", value=131), "must be"),
    (put("config", "architecture", value=["llama"]), "unknown architecture"),
    (put("config", "eos_token_ids", value="2"), "eos_token_ids must be"),
    (put("config", "rms_eps", value=-1), "rms_eps must be"),
    (put("groups", value={}), "groups do not fit the config"),
    (put("groups", "layers.9.o", value={"exact": 0, "linears": {}}), "'layers.9.o' is not in it"),
    (put("groups", "head", "exact", value=49), "group head exact must be"),
    (put("groups", "head", "exact", value=-1), "group head exact must be"),
    (put("groups", "head", "exact", value=1), "lowtide.head.exact_channels must be I32 \\[1\\]"),
    (put("groups", "head", "linears", value={}), "linears do not fit"),
    (put("groups", "layers.0.qkv", "linears", Q, "entries", value=1 << 32), "entries must be"),
    (put("groups", "layers.0.qkv", "linears", Q, "entries", value=10**6), "outlier_row must be U8 \\[1000000\\]"),
    (put("groups", "layers.0.qkv", "linears", Q, "outliers", value=10**6), "outliers must be"),
    (put("groups", "layers.0.qkv", "linears", Q, "outliers", value=1.0), "outliers must be"),
    (drop("tensors", f"{Q}.weight"), f"tensor '{Q}.weight' is missing"),
    (put("tensors", "extra", value={"dtype": "U8", "shape": [1], "sha256": SHA}), "'extra' is not part of this model"),
    (put("tensors", f"{Q}.weight", "shape", value=[48, 48]), "must be U8 \\[3, 768\\], not 'U8' \\[48, 48\\]"),
    (put("tensors", f"{Q}.weight", "shape", value=[3.0, 768]), "not made of whole numbers"),
    (put("tensors", f"{Q}.weight", "shape", value="3x768"), "shape must be a list"),
    (put("tensors", f"{Q}.weight", "dtype", value="F16"), "must be U8"),
    (put("tensors", f"{Q}.weight", "dtype", value=["U8"]), "must be U8"),
    (put("tensors", f"{Q}.weight", "sha256", value=None), "sha256 must be 64"),
    (put("tensors", "model.norm.weight", value=[]), "tensors 'model.norm.weight' must be an object"),
    (put("files", "config.json", "bytes", value=-5), "file config.json bytes must be"),
    (put("files", "config.json", "bytes", value=1 << 80), "file config.json bytes must be"),
    (put("files", "config.json", "sha256", value="0"), "sha256 must be 64"),
    (drop("files", "config.json"), "files lacks config.json"),
    (drop("files", "model.safetensors"), "files lacks model.safetensors"),
    (put("files", "CONFIG.json", value=FILE), "is taken"),
    (put("files", "lowtide.json", value=FILE), "manifest's own"),
    *(
        (put("files", name, value=FILE), "not a plain relative path inside")
        for name in ("../x", "/etc/passwd", "a/../../x", "", ".", "..", "a//b", "a\\..\\b", "C:x", ".hid", "a/", "x\n")
    ),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_refuses(tiny_artifact: Path, number: int) -> None:
    change, message = BAD[number]
    manifest = read_manifest(tiny_artifact)
    change(manifest)
    with pytest.raises(LowtideError, match=f"^a/lowtide.json: .*({message})") as error:
        Manifest.from_json(json.dumps(manifest).encode(), "a/lowtide.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"\xff", b'{"a": 1, "a": 1}', b'{"format_version": NaN}'])
def test_refuses_what_is_no_strict_json_object(text: bytes) -> None:
    with pytest.raises(LowtideError, match="^a/lowtide.json"):
        Manifest.from_json(text, "a/lowtide.json")


def test_nothing_by_passes_it(tiny_artifact: Path) -> None:
    """Built in code, not parsed, it is checked just the same."""
    manifest = Manifest.from_json((tiny_artifact / "lowtide.json").read_bytes())
    with pytest.raises(LowtideError, match="slices"):
        replace(manifest, slices=9)
    with pytest.raises(LowtideError, match="stats.*finite"):
        replace(manifest, stats={"x": float("nan")})
    with pytest.raises(LowtideError, match="holds a set"):
        replace(manifest, stats={"x": {1}})
    with pytest.raises(LowtideError, match="not part of this model"):
        replace(manifest, tensors=manifest.tensors | {"x": TensorEntry("U8", (1,), SHA)})
