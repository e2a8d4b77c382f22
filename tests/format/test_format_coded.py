"""Coded artifacts: the same tensors as packed ones, damage found whatever is flipped, an image that is made once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from support import tamper
from support.tiny import make_artifact

from lowtide.errors import LowtideError
from lowtide.format import codec, coded, image, layout
from lowtide.format.reader import Artifact, open_artifact
from lowtide.format.writer import ArtifactWriter

VARIANTS = [
    {},
    {"slices": 1, "layers": 1},
    {"slices": 2, "zero": True, "exact": 0, "outliers": 0.0},
    {"slices": 4, "zero": True, "tied": False, "qkv_bias": True},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lowtide" / "images"


def same(a: Artifact, b: Artifact) -> None:
    assert a.groups.keys() == b.groups.keys()
    for name, group in a.groups.items():
        assert group.zero == b.groups[name].zero
        for tensor, values in group.tensors().items():
            np.testing.assert_array_equal(values, b.groups[name].tensors()[tensor], err_msg=tensor)


@pytest.mark.parametrize("variant", VARIANTS)
def test_coded_holds_what_packed_holds(tmp_path: Path, variant: dict) -> None:  # type: ignore[type-arg]
    packed = open_artifact(make_artifact(tmp_path / "packed", **variant))
    artifact = open_artifact(make_artifact(tmp_path / "coded", coding="entropy", **variant))
    same(packed, artifact)
    np.testing.assert_array_equal(packed.tensor("model.norm.weight"), artifact.tensor("model.norm.weight"))
    assert artifact.stored_bytes() < packed.stored_bytes()
    figures = artifact.manifest.stats["entropy"]
    assert figures["coded_bits"] >= figures["entropy_bits"] > 0


def test_saved_again_it_is_the_same_bytes(tmp_path: Path) -> None:
    first = make_artifact(tmp_path / "a", coding="entropy", slices=4, zero=True)
    opened = open_artifact(first)
    with ArtifactWriter(tmp_path / "b") as writer:
        for group in reversed(opened.groups.values()):  # whatever order they come in
            writer.add_group(group)
        for name in ("model.norm.weight", *(n for n in opened._tensors if n.endswith("layernorm.weight"))):
            writer.add_tensor(name, opened.tensor(name))
        m = opened.manifest
        writer.finish(
            config=m.config, slices=4, budgets=m.budgets, policies=m.policies, model_id=m.model_id, zero=True,
            coding="entropy",
        )  # fmt: skip
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_the_image_is_made_once_and_mapped(tmp_path: Path, cache: Path) -> None:
    path = make_artifact(tmp_path / "a", coding="entropy")
    assert not cache.exists()  # writing an artifact leaves nothing behind
    open_artifact(path)
    (made,) = cache.iterdir()
    before = made.stat()
    artifact = open_artifact(path)
    assert made.stat().st_mtime_ns == before.st_mtime_ns and made.stat().st_ino == before.st_ino
    weight = artifact.groups["layers.0.o"].linears[0].weight
    assert not weight.flags.owndata and not weight.flags.writeable


def test_a_stamped_image_is_trusted_and_a_changed_one_made_again(tmp_path: Path, cache: Path) -> None:
    path = make_artifact(tmp_path / "a", coding="entropy")
    reference = open_artifact(path).groups["head"].linears[0].weight.copy()
    (made,) = cache.iterdir()
    old = time.time() - 60
    for file in [*path.iterdir(), made]:
        os.utime(file, (old, old))
    data = bytearray(made.read_bytes())
    data[-1] ^= 1
    made.write_bytes(data)
    np.testing.assert_array_equal(open_artifact(path).groups["head"].linears[0].weight, reference)
    assert image.file_entry(made) == open_artifact(path).manifest.image


def test_a_flipped_byte_anywhere_is_found(tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "a", coding="entropy", layers=1)
    weights = path / "model.safetensors"
    data = weights.read_bytes()
    for at in np.linspace(0, len(data) - 1, 60, dtype=int):
        weights.write_bytes(_flip(data, int(at)))
        with pytest.raises(LowtideError, match=r"model\.safetensors: is damaged"):
            open_artifact(path)
    weights.write_bytes(data)
    open_artifact(path)


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def test_streams_behind_forged_hashes_do_not_get_in(tmp_path: Path) -> None:
    """An attacker who can make hashes: every stream shortened or scrambled is refused or decodes to other digits."""
    opened = open_artifact(make_artifact(tmp_path / "a", coding="entropy", layers=1, slices=2))
    data = bytearray((opened.path / "model.safetensors").read_bytes())
    start, spans = layout.parse_header(memoryview(bytes(data)), "x")
    rng = np.random.default_rng(0)
    for name in (
        coded.SIDE,
        coded.CLASSES,
        coded.TABLES,
        "model.layers.0.mlp.down_proj.weight",
        "model.embed_tokens.weight.1",
    ):
        for _ in range(5):
            forged = bytearray(data)
            at = start + int(rng.integers(spans[name].start, spans[name].stop))
            forged[at] ^= 1 << int(rng.integers(8))
            with pytest.raises(LowtideError, match="does not|ends too soon|left over|frequency|not what|get the file"):
                image.make_image(memoryview(bytes(forged)), opened.manifest, tmp_path / "image", "x")
            assert not (tmp_path / "image").exists()


@pytest.mark.parametrize("slices", [1, 2])
def test_the_beginning_of_the_file_is_the_model_at_fewer_slices(tmp_path: Path, slices: int) -> None:
    opened = open_artifact(make_artifact(tmp_path / "a", coding="entropy", slices=3))
    data = (opened.path / "model.safetensors").read_bytes()
    prefix = opened.manifest.prefixes[slices - 1]
    assert prefix.bytes < len(data)
    target = tmp_path / "image"
    image.unpack(memoryview(data[: prefix.bytes]), opened.manifest, slices, target, "x")
    start, spans = layout.parse_header(memoryview(target.read_bytes()), "x")
    raw = target.read_bytes()
    for group in opened.groups.values():
        for linear in group.linears:
            span = spans[f"{linear.name}.weight"]
            found = np.frombuffer(raw, np.uint8, span.stop - span.start, start + span.start).reshape(span.shape)
            np.testing.assert_array_equal(found[:slices], linear.weight[:slices])
            assert not found[slices:].any()


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_artifact(tmp_path / "a", coding="entropy")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(LowtideError, match="cannot write the runtime image.*lowtide pack --coding packed"):
        open_artifact(path)


def test_zero_code_is_zero_at_every_level() -> None:
    for slices in range(1, codec.MAX_SLICES + 1):
        centres = codec.centres(slices, zero=True)
        code = codec.doubled_centre(centres) // 2
        digits = [code >> 2 * (slices - 1 - s) & 3 for s in range(slices)]
        assert [2 * d for d in digits] == list(centres)


def test_version_1_is_read(tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "a")

    def older(manifest: dict) -> None:  # type: ignore[type-arg]
        for field in ("zero", "coding", "image", "prefixes"):
            del manifest[field]
        manifest["format_version"] = 1

    reference = open_artifact(path)
    config = path / "config.json"
    config.write_text(config.read_text().replace('"format_version": 2', '"format_version": 1'))
    tamper.edit_manifest(path, older)
    tamper.rehash(path)
    same(open_artifact(path), reference)
