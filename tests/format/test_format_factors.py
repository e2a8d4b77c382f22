"""Artifacts whose q, k and v have thresholds of their own: format version 5, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tamper import edit_tensor, refuse_manifest
from support.tiny import make_artifact

from lowtide.errors import LowtideError
from lowtide.format.ipn import attach
from lowtide.format.reader import open_artifact
from lowtide.format.repack import repack

POLICIES = ("ipn", "channel-norm")
QKV = "lowtide.layers.0.qkv"
PLAIN = {"policies": POLICIES, "tied": False, "layers": 1}
WITH = PLAIN | {"factors": True}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("factors") / "a", **WITH)


@pytest.mark.parametrize("centroids", [0, 5])
@pytest.mark.parametrize("coding", ["packed", "entropy"])
def test_only_q_k_and_v_have_factors_and_they_are_read(tmp_path: Path, centroids: int, coding: str) -> None:
    options = {"centroids": centroids, "coding": coding}
    artifact = open_artifact(make_artifact(tmp_path / "a", **WITH, **options), verify="full")
    plain = open_artifact(make_artifact(tmp_path / "b", **PLAIN, **options), verify="full")
    assert (artifact.manifest.format_version, plain.manifest.format_version) == (5, 4 if centroids else 3)
    info = artifact.manifest.ipn
    assert info is not None and info == {**(plain.manifest.ipn or {}), "factors": 1}
    mark = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert mark == {"quant_method": "lowtide", "format_version": 5}
    for name, group in artifact.groups.items():
        more = 12 if name.endswith("qkv") else 0
        assert group.side_bytes(ipn=True) == plain.groups[name].side_bytes(ipn=True) + more
        assert group.side_bytes() == plain.groups[name].side_bytes()
        assert (group.ipn is not None and group.ipn.factor is not None) == bool(more)
    assert repack(tmp_path / "a", tmp_path / "c", coding="packed", bits_max=4).format_version == 5
    kept = open_artifact(tmp_path / "c", verify="full").groups["layers.0.qkv"].ipn
    assert kept is not None and kept.factor is not None
    np.testing.assert_array_equal(kept.factor, np.float32([1.7, 1.0, 0.6]))


def test_attach_adds_factors_and_takes_them_away(original: Path, tmp_path: Path) -> None:
    donor = open_artifact(original)
    ipn = {name: group.ipn for name, group in donor.groups.items() if group.ipn is not None}
    thresholds = {name: donor.groups[name].thresholds[0] for name in ipn}
    assert donor.manifest.ipn is not None
    attach(make_artifact(tmp_path / "plain", tied=False, layers=1), tmp_path / "a", ipn, thresholds, donor.manifest.ipn)
    found = open_artifact(tmp_path / "a", verify="full")
    assert found.manifest.format_version == 5 and found.manifest.ipn == donor.manifest.ipn
    bare = {name: dataclasses.replace(tensors, factor=None) for name, tensors in ipn.items()}
    attach(tmp_path / "a", tmp_path / "b", bare, thresholds, {**donor.manifest.ipn, "factors": 0})
    assert open_artifact(tmp_path / "b", verify="full").manifest.format_version == 3


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["ipn"].update(factors=0), "ipn factors must be 1 in version 5"),
        (lambda m: m["ipn"].update(factors=2), "ipn factors must be a whole number from 0 to 1"),
        (lambda m: m["ipn"].pop("factors"), "ipn lacks field 'factors'"),
        (lambda m: m.update(format_version=4), "ipn has an unknown field 'factors'"),
        (lambda m: m["ipn"].update(centroids=4), "centroids and key_channels must both be there"),
        (lambda m: m["tensors"].pop(f"{QKV}.ipn_factor"), "ipn_factor' is missing"),
    ],
)
def test_manifests_that_do_not_fit(original: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    refuse_manifest(original, change, message)


@pytest.mark.parametrize(
    "value, message",
    [(0.0, "must be above zero"), (-1.0, "must be above zero"), (np.inf, "a value that is not finite")],
)
def test_factors_that_make_no_sense(original: Path, tmp_path: Path, value: float, message: str) -> None:
    def change(values: Any) -> None:
        values[1] = value

    folder = Path(shutil.copytree(original, tmp_path / "a"))
    edit_tensor(folder, f"{QKV}.ipn_factor", change)
    with pytest.raises(LowtideError, match=f"qkv.ipn_factor: .*{message}"):
        open_artifact(folder)
