"""tests/native/agree.cpp: the C interface without Python, on this machine and, under qemu, on AArch64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "native" / "qemu.sh"
# cmake and ninja may be the virtual environment's own.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

pytestmark = pytest.mark.skipif(
    not all(shutil.which(tool, path=PATH) for tool in ("bash", "cmake", "g++")), reason="needs bash, cmake and g++"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the first test builds, the second finds."""
    return tmp_path_factory.mktemp("native")


def run(*arguments):
    """Output of the script, as {line up to the colon: values in order}."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PATH": PATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    said: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(": ")
        said.setdefault(name, []).append(value)
    return said


def test_instruction_sets_and_thread_counts_give_the_same_bits(folder):
    said = run("native", folder)
    assert said["instruction sets"][0].split(",")[-1] == "portable"
    assert int(said["values"][0]) > 100_000


@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++")
    or not (shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")),
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_aarch64_gives_the_same_bits(folder):
    said = run(folder)
    assert said["instruction sets"][1:] == ["neondot,neon,portable", "neon,portable"]
    assert len(said["checksum"]) == 3 and len(set(said["checksum"])) == 1
