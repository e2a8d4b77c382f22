"""Fixtures of the command-line tests: the command as users run it, and a tiny Hugging Face model to feed it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.tiny import Tiny, make_tokenizer

from lowtide.arch import group_specs, norm_specs
from lowtide.cli import app

TINY = Tiny(hidden=32, intermediate=48, layers=1, heads=2, kv_heads=1, head_dim=16, max_position=64)


@pytest.fixture
def cli():
    """Runs `lowtide ARGS` in a process of its own; returns the CompletedProcess with text output."""

    def run(*args: object, stdin: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lowtide.cli", *map(str, args)]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, **options)

    return run


def check_refusal(code: int, out: str, err: str) -> str:
    """A refusal is exit code 2, one line on stderr and nothing on stdout. Returns the line."""
    assert code == 2, err
    assert out == ""
    assert err.startswith("lowtide: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs a command that must be refused, in this process (torch takes seconds to import). Returns the line."""

    def run(*args: object, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        code = app.run([str(arg) for arg in args])
        return check_refusal(code, *capfd.readouterr())

    return run


@pytest.fixture
def process_refused(cli):
    """The same in a process of its own, exit code and all."""

    def run(*args: object, **options: Any) -> str:
        done = cli(*args, **options)
        return check_refusal(done.returncode, done.stdout, done.stderr)

    return run


def write_hf_model(folder: Path, tokenizer: bool = True, seed: int = 0, **config: Any) -> Path:
    """A random model as a Hugging Face folder; keywords change its config.json."""
    folder.mkdir()
    tiny = TINY.config()
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(1, 0.1, length).astype(np.float32) for name, length in norm_specs(tiny)}
    for spec in group_specs(tiny):
        for linear in spec.linears:
            shape = linear.out_features, linear.in_features
            tensors[f"{linear.name}.weight"] = rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tiny.to_hf() | config))
    if tokenizer:
        for name, data in make_tokenizer(TINY.vocab).items():
            (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def new_hf_model(tmp_path: Path):
    """Writes a model of its own into the test's folder: `new_hf_model(tokenizer=..., seed=..., **config)`."""
    return lambda **options: write_hf_model(tmp_path / "source", **options)


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face model to read but not to change."""
    return write_hf_model(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="session")
def compressed(hf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact that `lowtide compress` makes of `hf_model`."""
    out = tmp_path_factory.mktemp("compressed") / "model.lowtide"
    command = [sys.executable, "-m", "lowtide.cli", "compress", str(hf_model), str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["file_bytes"] == sum(f.stat().st_size for f in out.iterdir())
    return out
