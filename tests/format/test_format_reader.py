"""Opening: what was written comes back, any damage is found, a stamp saves the second look."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny import DEFAULT, ODD, Tiny, make_artifact, make_groups, make_norms, make_tokenizer

from lowtide.errors import LowtideError
from lowtide.format import layout, reader, stamp
from lowtide.format.reader import load_folder, open_artifact

CASES: dict[str, tuple[Tiny, dict[str, Any]]] = {
    "default": (DEFAULT, {}),
    "odd": (ODD, {}),
    "qwen": (DEFAULT, {"qkv_bias": True, "tied": False}),
    "plain": (DEFAULT, {"slices": 1, "exact": 0, "outliers": 0.0}),
    "four slices": (ODD, {"slices": 4, "exact": 1}),
    "policies": (DEFAULT, {"policies": ("channel-norm:0,4", "topk", "statistical-topk", "dense"), "layers": 1}),
    "two tile widths": (DEFAULT, {"layers": 1, "intermediate": 340, "vocab": 577, "outliers": 0.001}),
    "all exact": (DEFAULT, {"layers": 1, "hidden": 16, "intermediate": 16, "heads": 1, "kv_heads": 1, "exact": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip_and_the_safetensors_library(tmp_path: Path, case: str) -> None:
    base, options = CASES[case]
    path = make_artifact(tmp_path / "a", base, **options)
    artifact = open_artifact(path)
    tiny = Tiny(**{**vars(base), **options})
    groups = list(make_groups(tiny))
    assert list(artifact.groups) == [g.name for g in groups]
    expected: dict[str, np.ndarray[Any, Any]] = dict(make_norms(tiny))
    for group in groups:
        expected |= group.tensors()
        got = artifact.groups[group.name]
        assert (got.in_features, got.slices) == (group.in_features, group.slices)
        assert got.tensors().keys() == group.tensors().keys()
        assert got.thresholds.shape == group.thresholds.shape
        assert [x.out_features for x in got.linears] == [x.out_features for x in group.linears]
        assert got.side_bytes() == group.side_bytes()
    library = load_file(path / "model.safetensors")
    assert library.keys() == expected.keys()
    for name, array in expected.items():
        ours = artifact.tensor(name)
        for other in (array, library[name]):
            assert ours.dtype == other.dtype and ours.shape == other.shape, name
            np.testing.assert_array_equal(ours, other)
        assert not ours.flags.writeable and not ours.flags.owndata
        assert ours.ctypes.data % ours.itemsize == 0
    assert artifact.config == tiny.config()
    assert artifact.file("tokenizer.json") == make_tokenizer(tiny.vocab)["tokenizer.json"]
    assert artifact.stored_bytes() == sum(f.stat().st_size for f in path.iterdir())


def test_weights_are_aligned_for_the_engine(tiny_artifact: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    for group in artifact.groups.values():
        for linear in group.linears:
            assert linear.weight.nbytes % 64 == 0 and linear.weight.ctypes.data % 64 == 0


def test_plain_loaders_cannot_take_the_payload(tiny_artifact: Path) -> None:
    """A loader that looks for [out, in] floats finds, under the name it wants, bytes of another shape."""
    artifact = open_artifact(tiny_artifact)
    for group in artifact.groups.values():
        for linear in group.linears:
            assert linear.weight.dtype == np.uint8
            assert linear.weight.shape != (linear.out_features, group.in_features)


def test_transformers_fails_loudly(tiny_artifact: Path) -> None:
    """It skips a quantisation method that it does not know with a warning; the shapes must stop it."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with pytest.raises((RuntimeError, ValueError, OSError)):
        transformers.AutoModelForCausalLM.from_pretrained(tiny_artifact)


@pytest.mark.parametrize("missing", ["lowtide.json", "lowtide.json.sha256", "model.safetensors", "README.md"])
def test_a_missing_file(tmp_path: Path, missing: str) -> None:
    path = make_artifact(tmp_path / "a", layers=1)
    (path / missing).unlink()
    with pytest.raises(LowtideError, match=missing):
        open_artifact(path)


def test_no_folder_no_artifact_no_such_mode(tmp_path: Path, tiny_artifact: Path) -> None:
    with pytest.raises(LowtideError, match="nothing: no such folder"):
        open_artifact(tmp_path / "nothing")
    with pytest.raises(LowtideError, match="is no lowtide artifact"):
        open_artifact(tmp_path)
    with pytest.raises(LowtideError, match="verify='never': choose one of auto, full"):
        open_artifact(tiny_artifact, verify="never")
    with pytest.raises(LowtideError, match="the artifact has no nope.json"):
        open_artifact(tiny_artifact).file("nope.json")


def test_special_files_cannot_hang_the_reader(tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "a", layers=1)
    for name in ("lowtide.json.sha256", "tokenizer.json"):
        data = (path / name).read_bytes()
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(LowtideError, match=f"{name}: is not a regular file"):
            open_artifact(path)
        (path / name).unlink()
        (path / name).write_bytes(data)
    open_artifact(path)


def test_links_as_a_hub_makes_them(tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "blobs", layers=1)
    (tmp_path / "snapshot").mkdir()
    for file in path.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert open_artifact(tmp_path / "snapshot").file("tokenizer.json")


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small as it gets, for tests that open it thousands of times. Each restores what it changes."""
    options: dict[str, Any] = {"hidden": 8, "intermediate": 8, "heads": 1, "kv_heads": 1, "head_dim": 4, "exact": 1}
    return make_artifact(tmp_path_factory.mktemp("victim") / "a", layers=1, vocab=99, **options)


SMALL_FILES = (
    *("lowtide.json", "lowtide.json.sha256", "config.json"),
    *("tokenizer.json", "tokenizer_config.json", "README.md"),
)


@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_flipped_bit_at_every_byte_of_the_small_files(victim: Path, name: str) -> None:
    data = (victim / name).read_bytes()
    target = os.open(victim / name, os.O_WRONLY)
    try:
        for n, byte in enumerate(data):
            os.pwrite(target, bytes([byte ^ 1 << n % 8]), n)
            with pytest.raises(LowtideError, match="is damaged"):
                open_artifact(victim)
            os.pwrite(target, data[n : n + 1], n)
    finally:
        os.pwrite(target, data, 0)
        os.close(target)
    open_artifact(victim)


def test_a_flipped_bit_at_every_byte_of_the_header(victim: Path) -> None:
    """At every byte against the hashes alone (a whole open takes too long), at some by a whole open."""
    path = victim / "model.safetensors"
    data = bytearray(path.read_bytes())
    start, _ = layout.parse_header(memoryview(data), "f")
    manifest = open_artifact(victim).manifest
    for n in range(start):
        data[n] ^= 1 << n % 8
        with pytest.raises(LowtideError, match="model.safetensors: is damaged|model.safetensors: tensor .* is damaged"):
            reader._check_hashes(victim, manifest, memoryview(data))
        if n < 8 or n % 61 == 0:
            assert "is damaged" in _open_changed(path, bytes(data), victim)
        data[n] ^= 1 << n % 8


def test_a_flipped_bit_in_every_tensor_is_named(victim: Path) -> None:
    path = victim / "model.safetensors"
    data = bytearray(path.read_bytes())
    start, spans = layout.parse_header(memoryview(data), "f")
    for name, span in spans.items():
        for n in {span.start, (span.start + span.stop) // 2, span.stop - 1} if span.stop > span.start else ():
            data[start + n] ^= 16
            assert f"tensor {name}: is damaged" in _open_changed(path, bytes(data), victim)
            data[start + n] ^= 16
    open_artifact(victim)


def _open_changed(path: Path, changed: bytes, folder: Path) -> str:
    """The error of opening the folder while one file has other bytes."""
    good = path.read_bytes()
    try:
        path.write_bytes(changed)
        with pytest.raises(LowtideError) as error:
            open_artifact(folder)
        return str(error.value)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("name", [*SMALL_FILES, "model.safetensors"])
def test_truncated_and_extended_files(victim: Path, name: str) -> None:
    """The header's every byte: test_format_layout. Here some lengths of each file, through the front door."""
    path = victim / name
    data = path.read_bytes()
    for end in {0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, *range(0, len(data), 997)}:
        _open_changed(path, data[:end], victim)
    _open_changed(path, data + b"\n", victim)
    open_artifact(victim)


# -- stamps ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stamped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact that was opened, and so verified and stamped, once."""
    monkeypatch.setattr(stamp, "QUIET_NS", 0)
    path = make_artifact(tmp_path / "a", layers=1)
    open_artifact(path)
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose hashes were checked from now on."""
    seen: list[Path] = []
    check = reader._check_hashes

    def spy(folder: Path, *rest: Any) -> None:
        seen.append(folder)
        check(folder, *rest)

    monkeypatch.setattr(reader, "_check_hashes", spy)
    return seen


def test_a_stamp_spares_the_hash_but_not_verify_full(stamped: Path, hashed: list[Path], own_cache: Path) -> None:
    assert [p.parent for p in own_cache.rglob("*.json")] == [own_cache / "lowtide" / "verified"]
    warm = open_artifact(stamped)
    assert hashed == [] and warm.groups["head"].weights() == 130 * 48
    open_artifact(stamped, verify="full")
    assert hashed == [stamped]


def test_every_change_of_a_file_undoes_the_stamp(stamped: Path, hashed: list[Path]) -> None:
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        path = stamped / name
        status, data = path.stat(), path.read_bytes()
        changed = data[:-1] + bytes([data[-1] ^ 1])
        with path.open("r+b") as stream:  # same inode, same size
            stream.write(changed)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # and the same mtime; ctime tells
        with pytest.raises(LowtideError, match="is damaged"):
            open_artifact(stamped)
        path.write_bytes(data)
        open_artifact(stamped)  # good again, by a new look
        hashed.clear()
        open_artifact(stamped)
        assert hashed == []


def test_a_copy_a_moved_folder_and_a_broken_stamp_are_looked_at_again(
    stamped: Path, hashed: list[Path], own_cache: Path, tmp_path: Path
) -> None:
    open_artifact(shutil.copytree(stamped, tmp_path / "copy"))
    stamped = stamped.rename(tmp_path / "moved")
    open_artifact(stamped)
    for content in (b"", b"{}", b"[[[", b"\xff", b"[" * 100_000):
        for file in own_cache.rglob("*.json"):
            file.write_bytes(content)
        open_artifact(stamped)
    assert len(hashed) == 7


def test_fresh_files_get_no_stamp_yet(tmp_path: Path, hashed: list[Path]) -> None:
    """Within one tick of the file system's clock a second change would not show."""
    path = make_artifact(tmp_path / "a", layers=1)
    open_artifact(path)
    open_artifact(path)
    assert hashed == [path, path]


def test_no_cache_is_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[Path]) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(stamp, "QUIET_NS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = make_artifact(tmp_path / "a", layers=1)
    open_artifact(path)
    open_artifact(path)
    assert hashed == [path, path]


def test_small_files_are_checked_as_they_are_read_even_when_stamped(stamped: Path) -> None:
    artifact = open_artifact(stamped)
    path = stamped / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"<unk>", b"<ukn>"))
    with pytest.raises(LowtideError, match="tokenizer.json: is damaged"):
        artifact.file("tokenizer.json")


def test_load_folder_checks_values_without_hashes(tiny_artifact: Path, hashed: list[Path]) -> None:
    assert load_folder(tiny_artifact).manifest.slices == 3
    assert hashed == []


def test_reading_imports_little() -> None:
    """No torch, no safetensors: opening an artifact is json, hashlib and numpy."""
    code = "import sys, lowtide.format.reader; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    start = time.perf_counter()
    paths = os.pathsep.join(sys.path)
    names = subprocess.check_output([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, text=True)
    assert "numpy" in names.split() and time.perf_counter() - start < 10
    assert not {"torch", "safetensors", "tokenizers", "jinja2", "typer", "concurrent"} & set(names.split())
