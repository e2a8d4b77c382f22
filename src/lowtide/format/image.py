"""The runtime image: a coded artifact's tensors unpacked once into a file that engines memory-map.

Images lie in the user's cache, named by the digest of the manifest that they belong to, so an artifact that is copied
or moved keeps its image. Losing one costs the time to make it again, never anything else.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lowtide.errors import LowtideError
from lowtide.format import coded, layout
from lowtide.format.manifest import FileEntry, Manifest
from lowtide.format.stamp import cache_folder

BLOCK_BYTES = 8 << 20


def image_path(manifest_sha256: str) -> Path:
    """Where the image of an artifact with this manifest belongs."""
    return cache_folder() / "images" / f"{manifest_sha256}.safetensors"


def make_image(data: memoryview, manifest: Manifest, target: Path, where: str) -> None:
    """Decode a coded file into an image, under a temporary name until it is complete and its digest is right.

    Args:
        data: the coded `model.safetensors`, whole.
        manifest: with coding `entropy`.
        target: the image's path.
        where: the coded file's name, for errors.

    Raises:
        LowtideError: the file is damaged, or there is no room for the image.
    """
    assert manifest.image is not None
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        say(f"unpacking {where} into {target} ({manifest.image.bytes / 1e6:.0f} MB, once)")
        unpack(data, manifest, manifest.slices, temporary, where)
        if file_entry(temporary) != manifest.image:
            raise LowtideError(f"{where}: does not decode to what its manifest says; get the file again")
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise LowtideError(
            f"{target}: cannot write the runtime image: {reason}; make room, set XDG_CACHE_HOME to another folder, or "
            "store the artifact unpacked with `lowtide pack --coding packed`"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def unpack(data: memoryview, manifest: Manifest, slices: int, target: Path, where: str) -> None:
    """Write the packed tensors of a coded file's first slices as a safetensors file.

    Args:
        data: the coded file, or its beginning up to the last of these slices (`Manifest.prefixes`).
        manifest: of the artifact.
        slices: how many to decode, 1 to S. Weights keep S slices; those not decoded are zero bytes.
    """
    from lowtide.kernels import entropy, native  # not needed where the image is there already

    start, spans = layout.parse_header(data, where, whole=slices == manifest.slices)
    coded.check_spans(manifest.config, manifest.slices, spans, where)

    def part(name: str) -> memoryview:
        return data[start + spans[name].start : start + spans[name].stop]

    expected = manifest.expected_tensors()
    shapes = coded.side_shapes(manifest.config, expected)
    side = coded.unpack_side(part(coded.SIDE), shapes, where)
    tables = coded.unpack_tables(part(coded.TABLES), manifest.config, manifest.slices, where)
    found = entropy.decode_classes(
        part(coded.CLASSES), *coded.class_vectors(manifest.config), f"{where}: tensor {coded.CLASSES}"
    )
    places = coded.image_layout(expected)
    layers = {f"{layer.name}.weight": (i, layer) for i, layer in enumerate(coded.linears(manifest.config))}
    threads = min(16, native.default_threads())
    with target.open("wb") as file, _Blocks(file) as blocks:
        blocks.write(layout.encode_header(places))
        for name in places:  # in the order in which they lie
            if name in side:
                blocks.write(side[name].tobytes())
                continue
            index, linear = layers[name]
            packed = np.zeros(expected[name][1], np.uint8)
            entropy.decode(
                [part(coded.stream_name(linear.name, s)) for s in range(slices)],
                found[2 * index],
                found[2 * index + 1],
                tables[coded.kind(linear.name)],
                linear.out_features,
                linear.in_features,
                threads,
                packed,
                f"{where}: tensor {linear.name}",
            )
            blocks.write(packed.reshape(-1).data)


class _Blocks:
    """Writes a file in large aligned blocks: systems that keep files in large pages (Linux, where the file system
    does) then map it in pages as large, which saves a start some thousand page faults and decoding some misses."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._block, self._used = file, bytearray(BLOCK_BYTES), 0

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while len(rest):
            taken = min(len(rest), len(self._block) - self._used)
            self._block[self._used : self._used + taken] = rest[:taken]
            rest, self._used = rest[taken:], self._used + taken
            if self._used == len(self._block):
                self._flush()

    def _flush(self) -> None:
        self._file.write(memoryview(self._block)[: self._used])
        self._used = 0

    def __enter__(self) -> _Blocks:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._flush()


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if sys.version_info >= (3, 11) else _digest(file)
        return FileEntry(os.fstat(file.fileno()).st_size, digest.hexdigest())


def _digest(file):  # type: ignore[no-untyped-def]
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest


def say(text: str) -> None:
    """A line for people who wait; silent where nobody does."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"lowtide: {text}", file=sys.stderr)
