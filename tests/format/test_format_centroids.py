"""Artifacts with centroids: format version 4, what it refuses, and the tables that engines make and keep in a cache."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tamper import edit_tensor, join, refuse_manifest, split
from support.tiny import DEFAULT, ODD, Tiny, make_artifact

from lowtide.errors import LowtideError
from lowtide.format import centroids
from lowtide.format.ipn import attach
from lowtide.format.manifest import Manifest
from lowtide.format.reader import Artifact, open_artifact
from lowtide.format.repack import repack

K, C = 5, 32
POLICIES = ("ipn", "channel-norm")
QKV, OUT = "lowtide.layers.0.qkv", "lowtide.layers.0.o"
INFO = {"features": 16, "low": 4.0, "high": 6.0, "centroids": K, "key_channels": C, "factors": 0}


def make(path: Path, base: Tiny = DEFAULT, **options: Any) -> Path:
    return make_artifact(path, base, policies=POLICIES, centroids=K, key_channels=C, **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("centroids") / "a", tied=False, layers=1)


def same(a: Artifact, b: Artifact) -> None:
    assert a.groups.keys() == b.groups.keys()
    for name, group in a.groups.items():
        theirs = b.groups[name].tensors()
        for tensor, values in group.tensors().items():
            assert values.tobytes() == theirs[tensor].tobytes(), tensor


def test_every_group_has_exactly_its_tensors(original: Path) -> None:
    artifact = open_artifact(original, verify="full")
    assert artifact.manifest.format_version == 4 and artifact.manifest.ipn == INFO
    mark = json.loads((original / "config.json").read_text())["quantization_config"]
    assert mark == {"quant_method": "lowtide", "format_version": 4}
    both = {"ipn_centroids", "ipn_step"}
    keyed = both | {"ipn_channels", "ipn_keys", "ipn_key_scale", "ipn_key_bias"}
    plain = open_artifact(make_artifact(original.with_name("plain"), policies=POLICIES, tied=False, layers=1))
    for name, group in artifact.groups.items():
        added = {"o": both, "down": both, "embed": set()}.get(name.rpartition(".")[2], keyed)
        old = plain.groups[name]
        fields, before = (set() if g.ipn is None else set(g.ipn.fields()) for g in (group, old))
        assert fields == added | before
        read = (4 * C + K * C + 8 * K) * (added == keyed)
        assert group.side_bytes(ipn=True) == old.side_bytes(ipn=True) + read
        assert group.side_bytes() == old.side_bytes()


@pytest.mark.parametrize("coding", ["packed", "entropy"])
@pytest.mark.parametrize("base", [DEFAULT, ODD])
def test_round_trip(tmp_path: Path, coding: str, base: Tiny) -> None:
    first, wanted = make(tmp_path / "a", base, coding=coding), open_artifact(make(tmp_path / "p", base))
    data = (first / "lowtide.json").read_bytes()
    assert Manifest.from_json(data).to_json() == data
    same(open_artifact(first, verify="full"), wanted)
    other = "packed" if coding == "entropy" else "entropy"
    assert repack(first, tmp_path / "b", coding=other).ipn == INFO
    same(open_artifact(tmp_path / "b", verify="full"), wanted)
    repack(first, tmp_path / "c", bits_max=4)
    fewer = open_artifact(tmp_path / "c", verify="full")
    assert fewer.manifest.format_version == 4 and len(fewer.centroids()["head"].mean) == K


@pytest.mark.parametrize("coding", ["packed", "entropy"])
def test_attach_adds_centroids_and_takes_them_away(original: Path, tmp_path: Path, coding: str) -> None:
    donor = open_artifact(original)
    ipn = {name: group.ipn for name, group in donor.groups.items() if group.ipn is not None}
    thresholds = {name: donor.groups[name].thresholds[0] for name in ipn}
    plain = make_artifact(tmp_path / "plain", tied=False, layers=1, coding=coding)
    attach(plain, tmp_path / "with", ipn, thresholds, donor.manifest.ipn)
    found = open_artifact(tmp_path / "with", verify="full")
    assert (found.manifest.format_version, found.manifest.ipn) == (4, INFO)
    for name, tensors in ipn.items():
        theirs = found.groups[name].ipn
        assert theirs is not None
        for field, values in tensors.fields().items():
            np.testing.assert_array_equal(theirs.fields()[field], values)
    gone = dict.fromkeys(("centroids", "step", "channels", "keys", "key_scale", "key_bias"))
    bare = {name: dataclasses.replace(tensors, **gone) for name, tensors in ipn.items()}
    attach(tmp_path / "with", tmp_path / "without", bare, thresholds, {"features": 16, "low": 4.0, "high": 6.0})
    assert open_artifact(tmp_path / "without", verify="full").manifest.format_version == 3


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["ipn"].update(centroids=0), "centroids and key_channels must both be there in version 4"),
        (lambda m: m["ipn"].update(key_channels=0), "centroids and key_channels must both be there in version 4"),
        (lambda m: m["ipn"].update(centroids=0, key_channels=0), "must both be there in version 4"),
        (lambda m: m["ipn"].update(key_channels=24), "ipn key_channels must be a multiple of 16, not 24"),
        (lambda m: m["ipn"].update(key_channels=144), "ipn key_channels must be a whole number from 0 to 128"),
        (lambda m: m["ipn"].update(centroids=1025), "ipn centroids must be a whole number from 0 to 1024"),
        (lambda m: m["ipn"].update(centroids=True), "ipn centroids must be a whole number"),
        (lambda m: m["ipn"].update(centroids=K + 1), r"ipn_centroids must be I8 \[6, 48\], not 'I8' \[5, 48\]"),
        (lambda m: m["ipn"].update(key_channels=16), r"ipn_channels must be I32 \[16\], not 'I32' \[32\]"),
        (lambda m: m["ipn"].pop("centroids"), "ipn lacks field 'centroids'"),
        (lambda m: m.update(format_version=3), "ipn has an unknown field 'centroids'"),
        (lambda m: m.update(format_version=5), "ipn lacks field 'factors'"),
        (lambda m: m["ipn"].update(factors=1), "ipn has an unknown field 'factors'"),
        (lambda m: m["tensors"].pop(f"{OUT}.ipn_step"), "ipn_step' is missing"),
    ],
)
def test_manifests_that_do_not_fit(original: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    refuse_manifest(original, change, message)


def _swap(values: Any) -> None:
    values[[0, 1]] = values[[1, 0]]


def _put(place: int, value: float) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        values[place] = value

    return change


@pytest.mark.parametrize(
    "name, change, message",
    [
        (f"{QKV}.ipn_channels", _swap, "qkv.ipn_channels: must ascend and lie in 0 to 47"),
        (f"{QKV}.ipn_channels", _put(-1, 48), "qkv.ipn_channels: must ascend and lie in 0 to 47"),
        (f"{QKV}.ipn_channels", _put(0, -1), "qkv.ipn_channels: must ascend and lie in 0 to 47"),
        (f"{OUT}.ipn_step", _put(0, -1), "o.ipn_step: holds a negative value"),
        (f"{OUT}.ipn_step", _put(0, np.nan), "o.ipn_step: holds NaN or infinity"),
        ("lowtide.head.ipn_key_scale", _put(0, np.inf), "head.ipn_key_scale: holds a value that is not finite"),
        ("lowtide.head.ipn_key_bias", _put(2, np.nan), "head.ipn_key_bias: holds a value that is not finite"),
    ],
)
def test_values_out_of_range(
    original: Path, tmp_path: Path, name: str, change: Callable[[Any], None], message: str
) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "a"))
    edit_tensor(folder, name, change)
    with pytest.raises(LowtideError, match=message):
        open_artifact(folder)


def test_exact_channels_are_in_the_middle_of_all_centroids(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "a"))
    exact = open_artifact(folder).groups["layers.0.o"].exact_channels
    assert all(not c.mean[:, open_artifact(original).groups[n].exact_channels].any() for n, c in tables(folder).items())
    edit_tensor(folder, f"{OUT}.ipn_step", _put(int(exact[0]), 0.5))
    with pytest.raises(LowtideError, match="o.ipn_step: must be zero for exact channels"):
        open_artifact(folder)


def tables(folder: Path) -> dict[str, centroids.Centroids]:
    return open_artifact(folder).centroids()


def equal(a: dict[str, centroids.Centroids], b: dict[str, centroids.Centroids]) -> None:
    assert a.keys() == b.keys()
    for name, one in a.items():
        for ours, theirs in zip([one.mean, *one.bias], [b[name].mean, *b[name].bias], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_centroid_and_its_product_say_what_the_mean_and_the_bias_say(original: Path) -> None:
    artifact, rng = open_artifact(original), np.random.default_rng(0)
    found = artifact.centroids()
    assert list(found) == [name for name in artifact.groups if name != "embed"] and artifact.centroids() is found
    for name, each in found.items():
        group = artifact.groups[name]
        x = rng.normal(0, 1, group.in_features).astype(np.float32)
        assert each.mean.shape == (K, group.in_features) and each.mean.dtype == np.float16
        assert np.abs(each.mean.astype(np.float32) - group.mean.astype(np.float32)).max() > 0.2
        for i, linear in enumerate(group.linears):
            weight = group.dequantise(i, group.slices) + group.exact_part(i)
            wanted = weight @ (x - group.mean.astype(np.float32)) + linear.bias.astype(np.float32)
            for mean, bias in zip(each.mean, each.bias[i], strict=True):
                got = weight @ (x - mean.astype(np.float32)) + bias.astype(np.float32)
                np.testing.assert_allclose(got, wanted, atol=4e-3)


def test_tables_are_made_once_for_an_artifact(original: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = centroids.make
    monkeypatch.setattr(centroids, "make", lambda group: made.append(group.name) or real(group))
    first = tables(original)
    (file,) = (own_cache / "lowtide" / "centroids").iterdir()
    assert len(made) == 5 and file.suffix == ".safetensors"
    equal(tables(original), first)
    assert len(made) == 5


def _cut(data: bytes) -> bytes:
    return data[:-7]


def _other_shape(data: bytes) -> bytes:
    header, start = split(data)
    header["layers.0.o.mean"]["shape"] = [48, K]
    return join(header, data[start:])


def _other_name(data: bytes) -> bytes:
    header, start = split(data)
    header["layers.7.o.mean"] = header.pop("layers.0.o.mean")
    return join(header, data[start:])


def _flipped(data: bytes) -> bytes:
    return data[:-999] + bytes([data[-999] ^ 8]) + data[-998:]


DAMAGES = [_cut, _flipped, lambda d: d[:20], lambda d: b"", lambda d: b"x" * 99, _other_shape, _other_name]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tables_are_made_again(original: Path, own_cache: Path, damage: Callable[[bytes], bytes]) -> None:
    wanted = tables(original)
    (file,) = (own_cache / "lowtide" / "centroids").iterdir()
    whole = file.read_bytes()
    wrong = damage(whole)
    file.unlink()  # the tables above are a map of it
    file.write_bytes(wrong)
    equal(tables(original), wanted)
    assert file.read_bytes() == whole
    assert list(file.parent.iterdir()) == [file]


def test_tables_are_of_the_artifact_that_was_opened(original: Path, tmp_path: Path, own_cache: Path) -> None:
    """Also if another one has taken its place meanwhile."""
    place, other = tmp_path / "place", make(tmp_path / "other", tied=False, layers=1, seed=7)
    shutil.copytree(original, place)
    opened, wanted = open_artifact(place), tables(original)
    shutil.rmtree(place)
    shutil.copytree(other, place)
    equal(opened.centroids(), wanted)
    equal(tables(place), tables(other))
    assert len(list((own_cache / "lowtide" / "centroids").iterdir())) == 2


def test_tables_need_no_cache(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tables(original)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    equal(tables(original), wanted)


def test_products_beyond_float16_are_refused(original: Path) -> None:
    group = open_artifact(original).groups["layers.0.o"]
    assert group.ipn is not None and group.ipn.step is not None
    step = np.where(group.ipn.step > 0, np.float16(500), np.float16(0))
    group.ipn = dataclasses.replace(group.ipn, step=step)
    with pytest.raises(LowtideError, match="o_proj: a product with one of the centroids leaves float16's range"):
        centroids.make(group)


def test_products_are_the_same_some_rows_at_a_time(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {name: g for name, g in open_artifact(original).groups.items() if name != "embed"}
    whole = {name: centroids.make(group) for name, group in groups.items()}
    monkeypatch.setattr(centroids, "ROWS", 7)
    for name, group in groups.items():
        for ours, theirs in zip(centroids.make(group).bias, whole[name].bias, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)
