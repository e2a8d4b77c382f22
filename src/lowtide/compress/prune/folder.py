"""A changed model as a Hugging Face folder that any tool reads: pruned weights are plain zeros."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from lowtide.compress.sources import Source
from lowtide.compress.sources.base import tensor_names
from lowtide.errors import LowtideError

DTYPES = {"f16": torch.float16, "f32": torch.float32}


def check_target(out: Path, force: bool) -> None:
    """Refuse a path that is taken. With force: a folder that is a Hugging Face model may be replaced, nothing else."""
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise LowtideError(f"{out}: exists already; choose another folder or give --force")
    if out.is_symlink() or not out.is_dir() or not (out / "config.json").is_file():
        raise LowtideError(f"{out}: exists and is no model folder; it is not replaced, choose another")


def write_folder(source: Source, out: str | Path, dtype: str | None = None, force: bool = False) -> int:
    """Write a model: config.json, model.safetensors, tokenizer files. All or nothing, by renaming a finished folder.

    Args:
        source: the model.
        out: the folder to make.
        dtype: `f16` or `f32`; by default f32 for a model stored so, else f16.
        force: replace a model folder that is there.

    Returns:
        Bytes written.

    Raises:
        LowtideError: OUT exists, an unknown type, values beyond float16's range, or the disk says no.
    """
    target = Path(os.path.realpath(out)) if Path(out).parent.exists() else Path(out)
    check_target(Path(out), force)
    kind = dtype_of(source, dtype)
    tensors = {}
    for name in tensor_names(source.config):
        value = source.tensor(name).to(kind)
        if not torch.isfinite(value).all():
            raise LowtideError(f"{name}: values beyond float16's range; give --dtype f32")
        tensors[name] = value.contiguous()
    config = source.config.to_hf() | {"dtype": str(kind).removeprefix("torch.")}
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, data in source.tokenizer_files().items():
            (partial / name).write_bytes(data)
        size = sum(file.stat().st_size for file in partial.iterdir())
        for file in partial.iterdir():
            _sync(file)
        if target.exists():
            shutil.rmtree(target)
        os.rename(partial, target)
    except OSError as error:
        raise LowtideError(f"{error.filename or out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return size


def dtype_of(source: Source, wanted: str | None) -> torch.dtype:
    """The type to store: the one wanted, else f32 if the source's matrices are stored in 4 bytes, else f16."""
    if wanted is not None:
        if wanted not in DTYPES:
            raise LowtideError(f"--dtype {wanted}: known are {', '.join(DTYPES)}")
        return DTYPES[wanted]
    name = "model.layers.0.mlp.down_proj.weight"
    per_weight = source.stored(name).size / (source.config.hidden_size * source.config.intermediate_size)
    return torch.float32 if per_weight == 4 else torch.float16


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
