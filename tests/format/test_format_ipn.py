"""Artifacts with an IPN: its tensors are there everywhere or nowhere, and `attach` changes nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tamper import edit_tensor, read_manifest, refuse_manifest
from support.tiny import ODD, make_artifact

from lowtide.errors import LowtideError
from lowtide.format import layout
from lowtide.format.groups import IpnTensors
from lowtide.format.ipn import attach
from lowtide.format.manifest import Manifest
from lowtide.format.reader import Artifact, open_artifact
from lowtide.format.repack import repack

POLICIES = ("ipn", "channel-norm")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("ipn") / "a", policies=POLICIES, tied=False, layers=1)


def parts(artifact: Artifact, seed: int = 5, features: int = 7) -> tuple[dict[str, Any], dict[str, Any]]:
    """An IPN and thresholds for every group but `embed`."""
    donor = {}
    rng = np.random.default_rng(seed)
    for name, group in artifact.groups.items():
        if name == "embed":
            continue
        inputs, last = group.in_features, name.rpartition(".")[2]
        importance = rng.uniform(0, 2, inputs).astype(np.float16)
        importance[group.exact_channels] = 0
        made = IpnTensors(importance)
        if name != "head":
            made.mix = rng.normal(0, 1, features + 1).astype(np.float32)
            made.gain = rng.uniform(0, 1, len(artifact.manifest.budgets)).astype(np.float32)
        if last in ("qkv", "gate_up"):
            made.probe = rng.integers(-128, 128, (features, inputs)).astype(np.int8)
            made.scale, made.bias = rng.normal(0, 1, (2, features)).astype(np.float32)
        donor[name] = made
    table = np.sort(rng.uniform(0, 1, (len(artifact.manifest.budgets), artifact.manifest.slices)), 1)
    return donor, {name: table.astype(np.float32) for name in donor}


NONE = {"centroids": 0, "key_channels": 0, "factors": 0}
INFO = {"features": 7, "low": 4.5, "high": 5.5} | NONE
PROBED = {"ipn_importance", "ipn_mix", "ipn_gain", "ipn_probe", "ipn_scale", "ipn_bias"}


def test_every_group_has_exactly_its_tensors(original: Path) -> None:
    artifact = open_artifact(original, verify="full")
    assert artifact.manifest.ipn == {"features": 16, "low": 4.0, "high": 6.0} | NONE
    assert read_manifest(original)["ipn"].keys() == {"features", "low", "high"}  # as older readers expect
    assert artifact.centroids() == {}
    assert artifact.manifest.format_version == 3
    mark = json.loads((original / "config.json").read_text())["quantization_config"]
    assert mark == {"quant_method": "lowtide", "format_version": 3}
    fields = {name: set(group.ipn.fields()) if group.ipn else set() for name, group in artifact.groups.items()}
    body = {"ipn_importance", "ipn_mix", "ipn_gain"}
    assert fields == {
        "layers.0.qkv": PROBED,
        "layers.0.o": body,
        "layers.0.gate_up": PROBED,
        "layers.0.down": body,
        "head": {"ipn_importance"},
        "embed": set(),
    }
    qkv = artifact.groups["layers.0.qkv"].ipn
    assert qkv is not None and qkv.probe is not None and qkv.mix is not None and qkv.gain is not None
    assert (qkv.probe.shape, qkv.probe.dtype, qkv.mix.shape, qkv.gain.shape) == ((16, 48), np.int8, (17,), (3,))


def test_side_bytes_count_what_the_rule_reads(original: Path) -> None:
    groups = open_artifact(original).groups
    plain = open_artifact(make_artifact(original.with_name("plain"), tied=False, layers=1)).groups
    for name, extra in {"qkv": 4 * 17 + 4 + 16 * 48 + 8 * 16, "o": 4 * 17 + 4}.items():
        group = groups[f"layers.0.{name}"]
        assert group.side_bytes(ipn=True) == group.side_bytes() + extra
        assert group.side_bytes() == plain[f"layers.0.{name}"].side_bytes()
    assert groups["head"].side_bytes(ipn=True) == groups["head"].side_bytes()
    assert groups["embed"].side_bytes(ipn=True) == groups["embed"].side_bytes() == plain["embed"].side_bytes()


def test_without_the_policy_nothing_is_stored(tiny_artifact: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    assert artifact.manifest.ipn is None and artifact.manifest.format_version == 2
    assert "ipn" not in read_manifest(tiny_artifact)
    assert all(group.ipn is None for group in artifact.groups.values())
    assert artifact.groups["head"].side_bytes(ipn=True) == artifact.groups["head"].side_bytes()


QKV, OUT = "lowtide.layers.0.qkv", "lowtide.layers.0.o"


@pytest.mark.parametrize(
    "name, value, message",
    [
        *((f"{OUT}.ipn_importance", v, "ipn_importance: holds") for v in (np.nan, np.inf, -1.0)),
        *((f"{OUT}.ipn_{f}", np.nan, f"ipn_{f}: holds a value that is not finite") for f in ("mix", "gain")),
        *((f"{QKV}.ipn_{f}", -np.inf, f"ipn_{f}: holds a value that is not finite") for f in ("scale", "bias")),
        ("lowtide.head.ipn_importance", np.nan, "lowtide.head.ipn_importance: holds NaN"),
    ],
)
def test_values_out_of_range(original: Path, tmp_path: Path, name: str, value: float, message: str) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "a"))

    def change(values: Any) -> None:
        values[0] = value

    edit_tensor(folder, name, change)
    with pytest.raises(LowtideError, match=message):
        open_artifact(folder)


def test_exact_channels_have_no_learned_importance(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "a"))
    channel = int(open_artifact(folder).groups["layers.0.o"].exact_channels[0])

    def change(values: Any) -> None:
        values[channel] = 0.5

    edit_tensor(folder, f"{OUT}.ipn_importance", change)
    with pytest.raises(LowtideError, match="o.ipn_importance: must be zero for exact channels"):
        open_artifact(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["ipn"].update(features=0), "ipn features must be a whole number from 1 to 64"),
        (lambda m: m["ipn"].update(features=65), "ipn features must be a whole number from 1 to 64"),
        (lambda m: m["ipn"].update(features=15), r"ipn_mix must be F32 \[16\], not 'F32' \[17\]"),
        (lambda m: m["ipn"].update(low=6.0), "ipn low and high must ascend"),
        (lambda m: m["ipn"].update(low=True), "ipn low and high must ascend"),
        (lambda m: m["ipn"].update(low=0), "ipn low and high must ascend"),
        (lambda m: m["ipn"].pop("high"), "ipn lacks field 'high'"),
        (lambda m: m["ipn"].update(more=1), "ipn has an unknown field 'more'"),
        (lambda m: m["ipn"].update(centroids=4), "ipn has an unknown field 'centroids'"),
        (lambda m: m["ipn"].update(centroids=4, key_channels=16), "ipn has an unknown field 'centroids'"),
        (lambda m: m["ipn"].update(key_channels=0), "ipn has an unknown field 'key_channels'"),
        (lambda m: m.update(ipn=None), "ipn does not fit the policies"),
        (lambda m: m.update(ipn=3), "ipn must be an object"),
        (lambda m: m.pop("ipn"), "ipn does not fit the policies"),
        (lambda m: m.update(policies=["topk", "channel-norm"]), "format_version must be 3 to 5 if the rule ipn"),
        (lambda m: m.update(format_version=2), "manifest has an unknown field 'ipn'"),
        (lambda m: m["tensors"].pop(f"{OUT}.ipn_mix"), "ipn_mix' is missing"),
        (
            lambda m: m["tensors"].update({"lowtide.embed.ipn_importance": m["tensors"][f"{OUT}.ipn_mix"]}),
            "not part of",
        ),
    ],
)
def test_manifests_that_do_not_fit(original: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    refuse_manifest(original, change, message)


def test_round_trip_of_the_manifest(original: Path) -> None:
    data = (original / "lowtide.json").read_bytes()
    assert Manifest.from_json(data).to_json() == data


@pytest.mark.parametrize("coding", ["packed", "entropy"])
@pytest.mark.parametrize(
    "options", [{}, {"base": ODD, "policies": ("topk", "channel-norm:0,4")}, {"policies": POLICIES}]
)
def test_attach_adds_a_policy_and_nothing_else(tmp_path: Path, coding: str, options: dict[str, Any]) -> None:
    path = make_artifact(tmp_path / "a", coding=coding, **options)
    before = open_artifact(path)
    ipn, thresholds = parts(before)
    attach(path, tmp_path / "b", ipn, thresholds, INFO, stats={"learned": {"steps": 7}})
    after = open_artifact(tmp_path / "b", verify="full")
    others = [p for p in before.manifest.policies if p != "ipn"]
    assert after.manifest.policies == ["ipn", *others]
    assert after.manifest.ipn == INFO
    assert (after.manifest.coding, after.manifest.stats) == (
        coding,
        before.manifest.stats | {"learned": {"steps": 7}},
    )
    for name, group in after.groups.items():
        old = before.groups[name]
        if name != "embed":
            np.testing.assert_array_equal(group.thresholds[0], thresholds[name])
            np.testing.assert_array_equal(group.thresholds[1:], old.thresholds[-len(others) :])
            assert group.ipn is not None
            assert group.ipn.fields().keys() == ipn[name].fields().keys()
            for field, values in ipn[name].fields().items():
                np.testing.assert_array_equal(group.ipn.fields()[field], values)
        bare, old_bare = (dataclasses.replace(g, ipn=None).tensors() for g in (group, old))
        for tensor, values in bare.items():
            if not tensor.endswith(".thresholds"):
                assert values.tobytes() == old_bare[tensor].tobytes(), tensor
    for name in before.manifest.files:
        if name not in ("config.json", "model.safetensors", "README.md"):
            assert before.file(name) == after.file(name)


def test_attach_keeps_the_streams_of_a_coded_artifact(tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "a", coding="entropy", zero=True)
    opened = open_artifact(path)
    attach(path, tmp_path / "b", *parts(opened), INFO)

    def parts_of(folder: Path) -> dict[str, bytes]:
        data = memoryview((folder / "model.safetensors").read_bytes())
        start, spans = layout.parse_header(data, "file")
        return {name: bytes(data[start + span.start : start + span.stop]) for name, span in spans.items()}

    old, new = parts_of(path), parts_of(tmp_path / "b")
    assert old.pop("lowtide.side") != new.pop("lowtide.side")
    assert old == new
    again = repack(tmp_path / "b", tmp_path / "c", coding="packed")
    assert again.ipn == INFO and again.coding == "packed"
    open_artifact(tmp_path / "c", verify="full")


def test_attach_in_place_replaces_an_ipn(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "a"))
    with pytest.raises(LowtideError, match="exists; choose another folder or pass --force"):
        attach(folder, folder, *parts(open_artifact(folder)), INFO)
    for seed in (1, 2):
        ipn, thresholds = parts(open_artifact(folder), seed)
        attach(folder, folder, ipn, thresholds, INFO, force=True)
    artifact = open_artifact(folder)
    assert artifact.manifest.policies == ["ipn", "channel-norm"]
    found = artifact.groups["layers.0.qkv"].ipn
    assert found is not None and np.array_equal(found.probe, ipn["layers.0.qkv"].probe)


def test_attach_refuses_what_does_not_fit(original: Path, tmp_path: Path) -> None:
    artifact = open_artifact(original)

    def refused(message: str, change: Callable[[Any, Any], object], info: Any = INFO) -> None:
        ipn, thresholds = parts(artifact)
        change(ipn, thresholds)
        with pytest.raises(LowtideError, match=message):
            attach(original, tmp_path / "out", ipn, thresholds, info)
        assert not list(tmp_path.iterdir())

    o, qkv = "layers.0.o", "layers.0.qkv"
    refused("IPN of group layers.0.o: missing", lambda i, t: i.pop(o))
    refused("thresholds of group layers.9.o: not in the model", lambda i, t: t.update({"layers.9.o": t[o]}))
    refused(r"thresholds of group head must be \[3, 3\], not \[2, 3\]", lambda i, t: t.update(head=t["head"][:2]))
    refused(
        r"ipn_probe must be I8 \[7, 48\], not 'I8' \[6, 48\]", lambda i, t: setattr(i[qkv], "probe", i[qkv].probe[1:])
    )
    refused("ipn_mix' is missing", lambda i, t: setattr(i[o], "mix", None))
    refused("ipn_gain: holds a value that is not finite", lambda i, t: i[o].gain.fill(np.nan))
    refused("thresholds must ascend", lambda i, t: t.update({o: -np.sort(-t[o], 1)}))
    refused("features must be", lambda i, t: None, {"features": 0, "low": 1.0, "high": 2.0})


def test_fewer_slices_keep_the_ipn_of_the_budgets_left(tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "a", policies=POLICIES, budgets=(2.5, 3.0, 9.0), exact=0, outliers=0.0)
    before = open_artifact(path).groups["layers.0.qkv"].ipn
    assert before is not None and before.gain is not None
    repack(path, tmp_path / "b", bits_max=4)
    after = open_artifact(tmp_path / "b", verify="full")
    found = after.groups["layers.0.qkv"].ipn
    assert (
        found is not None
        and found.gain is not None
        and after.manifest.ipn == {"features": 16, "low": 2.5, "high": 9} | NONE
    )
    assert len(found.gain) == len(after.manifest.budgets)
    np.testing.assert_array_equal(found.gain[-1], before.gain[-1])
