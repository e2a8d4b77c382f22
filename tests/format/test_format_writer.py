"""The writer: all or nothing."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import Tiny, make_artifact, make_groups

from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.format.writer import ArtifactWriter

SMALL = Tiny(layers=1, tokenizer=False)


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_folder_holds_exactly_the_manifests_files(tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "deep" / "er" / "out")
    manifest = open_artifact(path).manifest
    assert listing(path) == sorted([*manifest.files, "lowtide.json", "lowtide.json.sha256"])
    assert listing(tmp_path / "deep") == sorted(["er", "er/out", *(f"er/out/{f}" for f in listing(path))])
    assert os.stat(path).st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_existing_folder_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    for force, message in [(False, "exists; choose another folder or pass --force"), (True, "no lowtide artifact")]:
        with pytest.raises(LowtideError, match=message):
            make_artifact(tmp_path / "out", SMALL, force=force)
    assert listing(tmp_path) == ["out", "out/precious"]


def test_existing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(LowtideError, match="is a file"):
        make_artifact(tmp_path / "out", SMALL, force=True)
    with pytest.raises(LowtideError, match="cannot write the artifact"):
        make_artifact(tmp_path / "out" / "below", SMALL)
    assert listing(tmp_path) == ["out"]


def test_force_replaces_an_artifact_and_an_empty_folder(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    make_artifact(path, SMALL, force=True)
    make_artifact(path, SMALL, force=True, slices=1)
    assert open_artifact(path).manifest.slices == 1
    assert os.listdir(tmp_path) == ["out"]


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = ArtifactWriter.finish

    def late(self: ArtifactWriter, **fields: Any) -> Any:
        (tmp_path / "out").mkdir()
        return finish(self, **fields)

    monkeypatch.setattr(ArtifactWriter, "finish", late)
    with pytest.raises(LowtideError, match="exists"):
        make_artifact(tmp_path / "out", SMALL)
    assert listing(tmp_path) == ["out"]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """failing(name, n): the n-th call of os.<name> from now fails with "no space left"; returns the calls so far."""

    def install(name: str, fail_at: int) -> list[int]:
        real, calls = getattr(os, name), [0]

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)
        return calls

    yield install
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["write", "fsync", "mkdir", "rename", "open", "pread"])
def test_disk_full_at_any_call_leaves_nothing(tmp_path: Path, failing: Any, name: str) -> None:
    calls = failing(name, -1)
    make_artifact(tmp_path / "count", SMALL)
    total = calls[0]
    assert total > 0
    harmless = 0
    # The tensors' calls are all alike, so some of those, and every call at either end.
    for n in sorted({*range(1, min(total, 8) + 1), *range(max(total - 12, 1), total + 1), *range(1, total, 17)}):
        failing(name, n)
        try:
            path = make_artifact(tmp_path / "new" / "out", SMALL)
        except LowtideError as error:
            assert "No space left on device" in str(error) and "\n" not in str(error)
            assert [p for p in listing(tmp_path) if not p.startswith("count")] == [], (name, n)
        else:
            harmless += 1
            open_artifact(path, verify="full")
            shutil.rmtree(path.parent)
    # What may fail without harm: syncing a folder (some file systems cannot), making one that is already there.
    assert harmless == 0 if name in ("write", "rename", "pread") else harmless < total / 2 + 1


def test_disk_full_keeps_what_force_would_replace(tmp_path: Path, failing: Any) -> None:
    path = make_artifact(tmp_path / "out", SMALL, slices=2)
    for name in ("write", "fsync", "rename"):
        for n in (1, 2):
            failing(name, n)
            with pytest.raises(LowtideError, match="No space left"):
                make_artifact(path, SMALL, force=True, slices=1)
            assert open_artifact(path, verify="full").manifest.slices == 2
            assert os.listdir(tmp_path) == ["out"]


def test_a_real_failing_disk(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the kernel itself cuts a write short, then refuses the next."""
    source = "\n".join(
        [
            "import resource, sys",
            "from pathlib import Path",
            "from lowtide.errors import LowtideError",
            "from support.tiny import make_artifact",
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))",
            "try:",
            "    make_artifact(Path(sys.argv[1]))",
            "except LowtideError as error:",
            "    print(error)",
            "    sys.exit(2)",
        ]
    )
    paths = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-c", source, str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    assert "cannot write the artifact: File too large; nothing was kept" in result.stdout
    assert os.listdir(tmp_path) == []


def test_any_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(tmp_path / "a" / "out") as writer:
        writer.add_file("tokenizer.json", b"{}")
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="without finish"), ArtifactWriter(tmp_path / "out"):
        pass
    assert listing(tmp_path) == []


def test_partial_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda target, data: write(target, data[:1000]))
    path = make_artifact(tmp_path / "out", SMALL)
    monkeypatch.undo()
    open_artifact(path, verify="full")


def _write_one(path: Path, name: str) -> None:
    with ArtifactWriter(path) as writer:
        writer.add_file(name, b"x")


@pytest.mark.parametrize("name", ["../escape", "/etc/x", "a/../../x", "lowtide.json"])
def test_file_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(LowtideError, match="inside the artifact's folder|manifest's own"):
        _write_one(tmp_path / "out", name)
    assert listing(tmp_path) == []


def test_subfolders_and_the_callers_own_card(tmp_path: Path) -> None:
    tiny = SMALL
    add_files = {"chat_templates/tools.jinja": b"{{ x }}", "README.md": b"mine"}
    real = ArtifactWriter.finish

    def finish(self: ArtifactWriter, **fields: Any) -> Any:
        for name, data in add_files.items():
            self.add_file(name, data)
        return real(self, **fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArtifactWriter, "finish", finish)
        path = make_artifact(tmp_path / "out", tiny)
    artifact = open_artifact(path)
    assert {name: artifact.file(name) for name in add_files} == add_files


def test_misuse_is_told_to_the_programmer(tmp_path: Path) -> None:
    groups = list(make_groups(SMALL))
    for step, message in [
        (lambda w: w.add_group(groups[0]), "added twice"),
        (lambda w: w.add_tensor("lowtide.layers.0.qkv.mean", np.zeros(3, np.float32)), "added twice"),
        (lambda w: w.add_tensor("x", np.zeros(3)), "float64 is not stored"),
        (lambda w: w.add_file("config.json", b""), "made by finish"),
        (lambda w: [w.add_file("x", b"") for _ in "12"], "added twice"),
    ]:
        with pytest.raises(ValueError, match=message), ArtifactWriter(tmp_path / "out") as writer:
            writer.add_group(groups[0])
            step(writer)  # type: ignore[no-untyped-call]
    assert listing(tmp_path) == []


def test_invalid_tensors_are_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import support.tiny

    def spoilt(tiny: Tiny) -> Any:
        for group in make_groups(tiny):
            if group.name == "layers.0.down":
                group.linears[0].row_scale[5] = np.nan
            yield group

    monkeypatch.setattr(support.tiny, "make_groups", spoilt)
    with pytest.raises(LowtideError, match="mlp.down_proj.row_scale: holds a scale that is not finite"):
        make_artifact(tmp_path / "out", SMALL)
    monkeypatch.setattr(support.tiny, "make_norms", lambda tiny: iter(()))
    with pytest.raises(LowtideError, match="norm.weight' is missing"):
        make_artifact(tmp_path / "out", SMALL)
    assert listing(tmp_path) == []
