"""Writes an artifact: everything into a temporary folder beside the target, synced, then renamed. All or nothing.

Tensors are streamed to a spool file as they come; `finish` knows all of them, writes the header and copies them behind
it in aligned order. Memory stays at one tensor; the disk needs room for the tensors twice for a moment.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from lowtide.arch import ModelConfig
from lowtide.errors import LowtideError
from lowtide.format import layout
from lowtide.format.card import CARD_NAME, model_card
from lowtide.format.coded import coded_names, image_layout, linears, stream_name
from lowtide.format.encode import encode_spool, keep_streams
from lowtide.format.groups import GroupTensors
from lowtide.format.hfconfig import encode_config
from lowtide.format.manifest import (
    CONFIG_NAME,
    DIGEST_NAME,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    FileEntry,
    GroupSummary,
    IpnInfo,
    LinearSummary,
    Manifest,
    TensorEntry,
    check_file_name,
    check_shapes,
    digest_line,
    version_for,
)
from lowtide.format.reader import load_folder
from lowtide.format.spool import Spool, write_all
from lowtide.format.validate import real_outliers

_SPOOL_NAME, _CODED_NAME, _IMAGE_NAME = ".tensors.part", ".coded.part", ".image.part"
Report = Callable[[int, int], None]


class ArtifactWriter:
    """Context manager that makes one artifact folder.

    with ArtifactWriter(out) as writer:
        writer.add_group(group)                     # each of arch.group_specs(config), in any order
        writer.add_tensor(name, norm)               # each of arch.norm_specs(config), float32
        writer.add_file("tokenizer.json", data)
        writer.finish(config=config, slices=3, budgets=[2.0, 4.0], policies=["channel-norm"], model_id=..., stats={})

    Args:
        path: the folder to make. Missing parents are made.
        force: replace an artifact that is already there (at the very end; until then it stays as it is).

    Raises:
        LowtideError: the folder exists (without `force`), or exists and is no artifact, cannot be written, or the
            tensors are not valid. Whatever the error, nothing is left behind.
    """

    def __init__(self, path: str | Path, force: bool = False) -> None:
        self.path = Path(os.path.realpath(path))
        self._force = force
        self._check_target()
        self._groups: dict[str, GroupSummary] = {}
        self._files: dict[str, FileEntry] = {}
        self._made_parents: list[Path] = []
        self._folder = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        self._spool: Spool | None = None
        self._coded: Spool | None = None
        self._finished = False

    def __enter__(self) -> ArtifactWriter:
        try:
            with self._disk_errors():
                for parent in reversed([p for p in self.path.parents if not p.exists()]):
                    parent.mkdir()
                    self._made_parents.append(parent)
                self._folder.mkdir()
                self._spool = Spool(self._folder / _SPOOL_NAME)
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean_up()
        if error is None and not self._finished:
            raise RuntimeError("ArtifactWriter was left without finish(); nothing is written")

    def add_group(self, group: GroupTensors) -> None:
        """Add all tensors of a group. They are written out at once, so the caller may drop the group."""
        if group.name in self._groups:
            raise ValueError(f"group {group.name} is added twice")
        for name, array in group.tensors().items():
            self.add_tensor(name, array)
        counts = {n.name: LinearSummary(real_outliers(n), len(n.outlier_value)) for n in group.linears}
        self._groups[group.name] = GroupSummary(len(group.exact_channels), counts)

    def add_tensor(self, name: str, array: NDArray[Any]) -> None:
        """Add one tensor under its full name: the norms (float32). Groups go through `add_group`."""
        assert self._spool is not None
        with self._disk_errors():
            self._spool.add(name, array)

    def add_file(self, name: str, data: bytes) -> None:
        """Add a small file, such as `tokenizer.json`. What `finish` makes itself cannot be added."""
        if name in (CONFIG_NAME, WEIGHTS_NAME):
            raise ValueError(f"{name} is made by finish()")
        self._add_file(name, data)

    def finish(
        self,
        *,
        config: ModelConfig,
        slices: int,
        budgets: list[float],
        policies: list[str],
        model_id: str,
        stats: dict[str, Any] | None = None,
        zero: bool = False,
        coding: str = "packed",
        report: Report | None = None,
        ipn: IpnInfo | None = None,
        coded_from: Path | None = None,
    ) -> Manifest:
        """Write header, config, model card and manifest, check the whole folder, and move it to its place.

        Args: the manifest's fields of the same names. `stats["source"]`, if there, is the model card's title; what
            coding measures goes to `stats["entropy"]`. report: called with (done, total) while coding. coded_from: a
            coded `model.safetensors` with the same digits, whose streams are taken as they are; `stats` then has
            `entropy` already.

        Raises:
            LowtideError: something does not fit, or the disk is full; nothing is left behind.
        """
        stats = dict(stats or {})
        assert self._spool is not None
        if coding == "entropy":
            target = self._folder / _CODED_NAME
            with self._disk_errors():
                if coded_from is not None:
                    self._coded = keep_streams(self._spool, target, config, slices, coded_from)
                else:
                    self._coded, stats["entropy"] = encode_spool(self._spool, target, config, slices, zero, report)
        image, prefixes = self._write_weights(config, slices)
        self._add_file(CONFIG_NAME, encode_config(config, version_for(policies, ipn)))
        if CARD_NAME not in self._files:
            title = stats.get("source", self.path.name)
            self._add_file(CARD_NAME, model_card(config, slices, budgets, policies, title))
        from lowtide import __version__

        hashes = self._spool.hashes
        manifest = Manifest(
            config=config,
            slices=slices,
            budgets=[float(b) for b in budgets],
            policies=list(policies),
            groups=self._groups,
            tensors={} if self._coded else {n: TensorEntry(*s, hashes[n]) for n, s in self._spool.tensors.items()},
            files=dict(sorted(self._files.items())),
            model_id=model_id,
            lowtide_version=__version__,
            stats=stats,
            zero=zero,
            coding=coding,
            image=image,
            prefixes=prefixes,
            ipn=ipn,
            format_version=version_for(policies, ipn),
        )
        if self._coded:  # nothing but the image's tensors says what is in a coded file
            check_shapes(self._spool.tensors, manifest.expected_tensors())
        data = manifest.to_json()
        with self._disk_errors():
            _write_file(self._folder / MANIFEST_NAME, data)
            _write_file(self._folder / DIGEST_NAME, digest_line(data))
            _sync_folder(self._folder)
            self._drop_spools()
            # decoding it all once more is the proof that what was written can be read
            load_folder(self._folder, image=self._folder / _IMAGE_NAME)
            (self._folder / _IMAGE_NAME).unlink(missing_ok=True)
        self._move_into_place()
        return manifest

    def _add_file(self, name: str, data: bytes) -> None:
        check_file_name(name)
        if name in self._files:
            raise ValueError(f"file {name} is added twice")
        target = self._folder / name
        with self._disk_errors():
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_file(target, data)
            _sync_folder(target.parent)
        self._files[name] = FileEntry(len(data), hashlib.sha256(data).hexdigest())

    def _write_weights(self, config: ModelConfig, slices: int) -> tuple[FileEntry | None, list[FileEntry]]:
        """`model.safetensors`; if coded, what the image and the beginnings of the file will be."""
        assert self._spool is not None
        image, prefixes = None, []
        with self._disk_errors():
            if self._coded:
                packed = _Measure()
                self._spool.pour(image_layout(self._spool.tensors), packed)
                image = packed.entry()
            target = os.open(self._folder / WEIGHTS_NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                measure = _Measure(target)
                if self._coded is None:
                    self._spool.pour(layout.plan(self._spool.tensors), measure)
                else:
                    prefixes = self._write_coded(self._coded, config, slices, measure)
                os.fsync(target)
            finally:
                os.close(target)
        self._files[WEIGHTS_NAME] = measure.entry()
        return image, prefixes

    def _write_coded(self, spool: Spool, config: ModelConfig, slices: int, measure: _Measure) -> list[FileEntry]:
        """The coded tensors in the order of `coded.coded_names`, and what the file is after each slice."""
        spans = layout.sequence({name: spool.tensors[name] for name in coded_names(config, slices)})
        last = linears(config)[-1].name
        ends = {stream_name(last, s) for s in range(slices)}
        prefixes = []
        measure(memoryview(layout.encode_header(spans)))
        for name in spans:
            for piece in spool.pieces(name):
                measure(memoryview(piece))
            if name in ends:
                prefixes.append(measure.entry())
        return prefixes

    def _move_into_place(self) -> None:
        self._check_target()
        aside = self._folder.with_suffix(".old")
        with self._disk_errors():
            replacing = self.path.exists()
            if replacing:
                os.rename(self.path, aside)
            try:
                os.rename(self._folder, self.path)
            except OSError:
                if replacing:
                    os.rename(aside, self.path)
                raise
            self._finished = True
            _sync_folder(self.path.parent)
        shutil.rmtree(aside, ignore_errors=True)

    def _check_target(self) -> None:
        """The target must be free, or hold what `force` may replace: an artifact or an empty folder, never more."""
        if not os.path.lexists(self.path):
            return
        if not self._force:
            raise LowtideError(f"{self.path}: exists; choose another folder or pass --force")
        if not self.path.is_dir():
            raise LowtideError(f"{self.path}: is a file; choose another folder")
        if not (self.path / MANIFEST_NAME).exists() and any(self.path.iterdir()):
            raise LowtideError(f"{self.path}: is no lowtide artifact, so --force does not replace it")

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise LowtideError(f"{self.path}: cannot write the artifact: {reason}; nothing was kept") from error

    def _drop_spools(self) -> None:
        for spool in (self._spool, self._coded):
            if spool is not None:
                spool.close()

    def _clean_up(self) -> None:
        self._drop_spools()
        if self._finished:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        for parent in reversed(self._made_parents):
            with suppress(OSError):
                parent.rmdir()


class _Measure:
    """Counts and hashes what passes through, on its way to a file or nowhere."""

    def __init__(self, target: int | None = None) -> None:
        self._target, self._digest, self._size = target, hashlib.sha256(), 0

    def __call__(self, data: memoryview) -> None:
        if self._target is not None:
            write_all(self._target, data)
        self._digest.update(data)
        self._size += len(data)

    def entry(self) -> FileEntry:
        """Size and SHA-256 so far."""
        return FileEntry(self._size, self._digest.hexdigest())


def _write_file(path: Path, data: bytes) -> None:
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(target, memoryview(data))
        os.fsync(target)
    finally:
        os.close(target)


def _sync_folder(path: Path) -> None:
    """Make a folder's entries durable. Some file systems cannot; there the rename is still atomic."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
