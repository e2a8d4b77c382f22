"""The runtime image's bytes: written in large aligned blocks, and the same whatever their size."""

import io

import pytest
from support.tiny import make_artifact

from lowtide.format import image
from lowtide.format.manifest import Manifest
from lowtide.format.reader import open_artifact


@pytest.mark.parametrize("block", [64, 1000, 1 << 14, 8 << 20])
def test_an_image_does_not_depend_on_the_size_of_blocks(tmp_path, monkeypatch, block):
    path = make_artifact(tmp_path / "a", coding="entropy", tied=False)
    manifest = Manifest.from_json((path / "lowtide.json").read_bytes())
    monkeypatch.setattr(image, "BLOCK_BYTES", block)
    data = memoryview((path / "model.safetensors").read_bytes())
    image.make_image(data, manifest, tmp_path / "image", "here")  # compares the digest
    assert image.file_entry(tmp_path / "image") == manifest.image


class Slow(io.BytesIO):
    """Remembers where and how much was written."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def write(self, data):
        self.writes.append((self.tell(), len(data)))
        return super().write(data)


def test_blocks_are_whole_and_aligned(monkeypatch):
    monkeypatch.setattr(image, "BLOCK_BYTES", 10)
    file = Slow()
    with image._Blocks(file) as blocks:
        for part in (b"abc", b"", b"d" * 25, b"efg"):
            blocks.write(part)
    assert file.getvalue() == b"abc" + b"d" * 25 + b"efg"
    assert file.writes == [(0, 10), (10, 10), (20, 10), (30, 1)]


def test_an_image_that_fails_half_way_is_not_finished(monkeypatch):
    monkeypatch.setattr(image, "BLOCK_BYTES", 10)
    file = Slow()
    with pytest.raises(KeyError), image._Blocks(file) as blocks:
        blocks.write(b"abc")
        raise KeyError
    assert file.writes == []


def test_an_artifact_from_an_image_is_the_one_from_the_packed_file(tmp_path):
    coded = open_artifact(make_artifact(tmp_path / "coded", coding="entropy"))
    packed = open_artifact(make_artifact(tmp_path / "packed"))
    for name, group in packed.groups.items():
        for ours, theirs in zip(coded.groups[name].linears, group.linears, strict=True):
            assert (ours.weight == theirs.weight).all() and (ours.outlier_value == theirs.outlier_value).all()
