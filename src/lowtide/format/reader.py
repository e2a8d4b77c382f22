"""Opens an artifact: every structure checked, every byte hashed (or known to have been), tensors memory-mapped."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.arch import GroupSpec, ModelConfig, group_specs, norm_specs
from lowtide.errors import LowtideError
from lowtide.format import layout, stamp
from lowtide.format.centroids import Centroids, load_centroids
from lowtide.format.coded import check_spans
from lowtide.format.groups import GROUP_FIELDS, LINEAR_FIELDS, GroupTensors, IpnTensors, LinearTensors, ipn_shapes
from lowtide.format.hfconfig import check_config
from lowtide.format.image import file_entry, image_path, make_image
from lowtide.format.manifest import (
    CONFIG_NAME,
    DIGEST_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    WEIGHTS_NAME,
    Manifest,
    digest_line,
    ipn_sizes,
)
from lowtide.format.strictjson import short
from lowtide.format.validate import check_group, check_norm, real_outliers

VERIFY_MODES = ("auto", "full")
_DAMAGED = "is damaged (its SHA-256 is not the manifest's); copy or compress it again"
_CHUNK = 1 << 20


@dataclass
class Artifact:
    """An open, checked artifact. Its arrays are read-only views of the memory-mapped file and keep it open.

    Attributes:
        path: the folder.
        manifest: what it says about itself.
        groups: name -> tensors, in the order of `arch.group_specs`.
        manifest_sha256: of the manifest's file as it was read.
    """

    path: Path
    manifest: Manifest
    manifest_sha256: str
    groups: dict[str, GroupTensors]
    _tensors: dict[str, NDArray[Any]] = field(repr=False)
    _centroids: dict[str, Centroids] | None = field(default=None, init=False, repr=False)

    def centroids(self) -> dict[str, Centroids]:
        """What engines know of every group's centroids, by group; none in artifacts without. Made once for every
        artifact and kept in the user's cache.

        Raises:
            LowtideError: a product with one of them leaves float16's range.
        """
        if self._centroids is None:
            self._centroids = load_centroids(self.manifest_sha256, self.groups)
        return self._centroids

    @property
    def config(self) -> ModelConfig:
        return self.manifest.config

    def tensor(self, name: str) -> NDArray[Any]:
        """Any stored tensor under its full name, e.g. `model.norm.weight`; KeyError for others."""
        return self._tensors[name]

    def file(self, name: str) -> bytes:
        """Content of a small file, e.g. `tokenizer.json`, checked against its SHA-256 as it is read.

        Raises:
            LowtideError: the artifact has no such file, or it is damaged.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise LowtideError(f"{self.path}: the artifact has no {name}")
        data = _read_file(self.path / name, entry.bytes)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise LowtideError(f"{self.path / name}: {_DAMAGED}")
        return data

    def stored_bytes(self) -> int:
        """Bytes of all files, manifest and digest included."""
        own = [self.path / MANIFEST_NAME, self.path / DIGEST_NAME]
        return sum(f.bytes for f in self.manifest.files.values()) + sum(p.stat().st_size for p in own)


def open_artifact(path: str | Path, verify: str = "auto") -> Artifact:
    """Open an artifact for reading.

    Args:
        path: its folder.
        verify: "full" hashes every byte and checks every value. "auto" does so unless the same files were verified
            before (see `stamp`); then only names, shapes, sizes and the small files are checked.

    Raises:
        LowtideError: it is no artifact, a newer one, damaged, or not valid; one line naming file and tensor.
    """
    if verify not in VERIFY_MODES:
        raise LowtideError(f"verify={verify!r}: choose one of {', '.join(VERIFY_MODES)}")
    folder = Path(os.path.realpath(path))
    if not folder.is_dir():
        raise LowtideError(f"{path}: no such folder")
    return load_folder(folder, hashes=True, trust_stamp=verify == "auto")


def load_folder(folder: Path, hashes: bool = False, trust_stamp: bool = False, image: Path | None = None) -> Artifact:
    """`open_artifact` in pieces, for the writer, which checks what it wrote but has just made the hashes itself.

    Args:
        folder: resolved path.
        hashes: compare every file and tensor with its SHA-256, and leave a stamp.
        trust_stamp: let a stamp of an earlier verification replace the hashes and the checks of values.
        image: where a coded artifact's runtime image lies or is to be made; by default in the user's cache.
    """
    manifest, manifest_sha256 = _read_manifest(folder)
    stats = {name: _check_size(folder / name, entry.bytes) for name, entry in manifest.files.items()}
    weights = folder / WEIGHTS_NAME
    data = _map_file(weights, manifest.files[WEIGHTS_NAME].bytes)
    if manifest.image is not None and image is None:
        image = image_path(manifest_sha256)
    if image is not None and manifest.image is not None and image.exists():
        stats[f"image {image}"] = os.stat(image)
        if trust_stamp and stamp.is_stamped(folder, manifest_sha256, stamp.identity(stats)):
            return _assemble(folder, manifest, manifest_sha256, _map_file(image, manifest.image.bytes), str(image))
    elif manifest.image is None and trust_stamp and stamp.is_stamped(folder, manifest_sha256, stamp.identity(stats)):
        return _assemble(folder, manifest, manifest_sha256, data, str(weights))
    if hashes:
        _check_hashes(folder, manifest, data)
    config = folder / CONFIG_NAME
    check_config(
        _read_file(config, manifest.files[CONFIG_NAME].bytes), manifest.config, str(config), manifest.format_version
    )
    if manifest.image is not None:
        assert image is not None
        if not image.exists() or file_entry(image) != manifest.image:
            make_image(data, manifest, image, str(weights))
        stats[f"image {image}"] = os.stat(image)
        data = _map_file(image, manifest.image.bytes)
    artifact = _assemble(folder, manifest, manifest_sha256, data, str(weights))
    _check_values(artifact, str(weights))
    if hashes:
        stamp.write_stamp(folder, manifest_sha256, stamp.identity(stats))
    return artifact


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in a folder, which need not be complete otherwise.

    Raises:
        LowtideError: it is no artifact, or its manifest is damaged or not valid.
    """
    if not folder.is_dir():
        raise LowtideError(f"{folder}: no such folder")
    return _read_manifest(folder)[0]


def open_image(folder: Path, manifest: Manifest, image: Path) -> Artifact:
    """An artifact whose tensors come from an image just made of it."""
    digest = hashlib.sha256(manifest.to_json()).hexdigest()
    return _assemble(folder, manifest, digest, _map_file(image, image.stat().st_size), str(image))


def _read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest and the SHA-256 of its bytes."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise LowtideError(f"{folder}: is no lowtide artifact (it has no {MANIFEST_NAME})")
    data = _read_file(path)
    expected = digest_line(data)
    if _read_file(folder / DIGEST_NAME, len(expected)) != expected:
        raise LowtideError(f"{path}: is damaged (its SHA-256 is not that in {DIGEST_NAME}); copy or compress it again")
    return Manifest.from_json(data, str(path)), hashlib.sha256(data).hexdigest()


def _check_size(path: Path, expected: int) -> os.stat_result:
    """stat of a regular file of the expected size. Links are followed: a hub's cache is made of them."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise LowtideError(f"{path}: cannot be read: {error.strerror}") from None
    _check_status(path, status, expected)
    return status


def _check_status(path: Path, status: os.stat_result, expected: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise LowtideError(f"{path}: is not a regular file")
    if status.st_size != expected:
        raise LowtideError(f"{path}: has {status.st_size} bytes, not {expected}; it is truncated or damaged")


def _open(path: Path, expected: int | None) -> tuple[int, int]:
    """Descriptor and size of a regular file; O_NONBLOCK so that a pipe in its place cannot hang us."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise LowtideError(f"{path}: cannot be read: {error.strerror}") from None
    status = os.fstat(descriptor)
    try:
        _check_status(path, status, status.st_size if expected is None else expected)
    except LowtideError:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def _read_file(path: Path, expected: int | None = None) -> bytes:
    descriptor, size = _open(path, expected)
    with os.fdopen(descriptor, "rb") as stream:
        if size > MAX_MANIFEST_BYTES:
            raise LowtideError(f"{path}: {size} bytes are too many for this file")
        return stream.read(size)


def _map_file(path: Path, expected: int) -> memoryview:
    if expected == 0:
        raise LowtideError(f"{path}: is empty")
    descriptor, _ = _open(path, expected)
    try:
        return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise LowtideError(f"{path}: cannot be memory-mapped: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _check_hashes(folder: Path, manifest: Manifest, data: memoryview) -> None:
    """Every file, and every tensor by itself: the tensors in one thread, the files in another."""
    from concurrent.futures import ThreadPoolExecutor  # an import that a warm start can do without

    for name, entry in manifest.files.items():
        if name != WEIGHTS_NAME and _sha256(_read_file(folder / name, entry.bytes)) != entry.sha256:
            raise LowtideError(f"{folder / name}: {_DAMAGED}")
    where = str(folder / WEIGHTS_NAME)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(_sha256, data)
        try:
            start, spans = layout.parse_header(data, where)
            if manifest.image is not None:
                check_spans(manifest.config, manifest.slices, spans, where)
                spans = {}  # the whole file's hash is all there is
            else:
                _check_spans(manifest, spans, where)
        except LowtideError:
            # A broken header is most often an accident; then "damaged" says more than which field it hit.
            if whole.result() != manifest.files[WEIGHTS_NAME].sha256:
                raise LowtideError(f"{where}: {_DAMAGED}") from None
            raise
        for name, span in spans.items():
            if _sha256(data[start + span.start : start + span.stop]) != manifest.tensors[name].sha256:
                raise LowtideError(f"{where}: tensor {name}: {_DAMAGED}")
        if whole.result() != manifest.files[WEIGHTS_NAME].sha256:
            raise LowtideError(f"{where}: {_DAMAGED}")


def _sha256(data: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    view = memoryview(data)
    for start in range(0, len(view), _CHUNK):
        digest.update(view[start : start + _CHUNK])
    return digest.hexdigest()


def _check_spans(manifest: Manifest, spans: dict[str, layout.TensorSpan], where: str) -> None:
    """The file must hold exactly the manifest's tensors, with its dtypes and shapes."""
    expected = manifest.expected_tensors()
    if spans.keys() != expected.keys():
        odd = sorted(spans.keys() ^ expected.keys())[0]
        known = odd in expected
        raise LowtideError(f"{where}: tensor {short(odd)}: is {'missing' if known else 'not in the manifest'}")
    for name, span in spans.items():
        dtype, shape = expected[name]
        if (span.dtype, span.shape) != (dtype, shape):
            raise LowtideError(
                f"{where}: tensor {name}: is {span.dtype} {list(span.shape)}, but the manifest says "
                f"{dtype} {list(shape)}"
            )


def _assemble(folder: Path, manifest: Manifest, manifest_sha256: str, data: memoryview, where: str) -> Artifact:
    """Views of every tensor of `model.safetensors` or of its image, and the groups made of them. Copies nothing."""
    start, spans = layout.parse_header(data, where)
    _check_spans(manifest, spans, where)
    whole: NDArray[np.uint8] = np.frombuffer(data, np.uint8)
    tensors = {
        name: whole[start + span.start : start + span.stop].view(layout.DTYPES[span.dtype]).reshape(span.shape)
        for name, span in spans.items()
    }
    groups = {spec.name: _group(spec, manifest, tensors) for spec in group_specs(manifest.config)}
    return Artifact(folder, manifest, manifest_sha256, groups, tensors)


def _group(spec: GroupSpec, manifest: Manifest, tensors: dict[str, NDArray[Any]]) -> GroupTensors:
    slices = manifest.slices
    fields = {f: tensors[f"lowtide.{spec.name}.{f}"] for f in GROUP_FIELDS if f != "thresholds" or spec.has_thresholds}
    if not spec.has_thresholds:
        fields["thresholds"] = np.zeros((0, 0, slices), np.float32)
    linears = [
        LinearTensors(
            name=linear.name,
            out_features=linear.out_features,
            **{f: tensors[f"{linear.name}.{f}"] for f in LINEAR_FIELDS},
        )
        for linear in spec.linears
    ]
    ipn = None
    if manifest.ipn is not None and spec.has_thresholds:
        names = ipn_shapes(spec.name, spec.in_features, *ipn_sizes(manifest.ipn, len(manifest.budgets)))
        ipn = IpnTensors(**{f.removeprefix("ipn_"): tensors[f"lowtide.{spec.name}.{f}"] for f in names})
    return GroupTensors(
        name=spec.name,
        in_features=spec.in_features,
        slices=slices,
        linears=linears,
        zero=manifest.zero,
        ipn=ipn,
        **fields,
    )


def _check_values(artifact: Artifact, where: str) -> None:
    manifest = artifact.manifest
    for name, _ in norm_specs(manifest.config):
        check_norm(name, artifact.tensor(name), where)
    for group in artifact.groups.values():
        check_group(group, manifest.policies, where)
        for linear in group.linears:
            expected, found = manifest.groups[group.name].linears[linear.name].outliers, real_outliers(linear)
            if found != expected:
                tensor = f"{where}: tensor {linear.name}.outlier_value"
                raise LowtideError(f"{tensor}: holds {found} outliers, but the manifest says {expected}")
