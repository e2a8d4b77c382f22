"""What an attacker does: change a file of an artifact, then recompute every hash, so that only structure tells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.format.manifest import Manifest

_DTYPES = {"U8": "u1", "F16": "<f2", "F32": "<f4", "I32": "<i4", "U32": "<u4"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "lowtide.json").read_bytes())
    return manifest


def refuse_manifest(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    """Changed like this, an artifact's manifest must be refused in one line that matches the message."""
    manifest = read_manifest(folder)
    change(manifest)
    with pytest.raises(LowtideError, match=message) as error:
        Manifest.from_json(json.dumps(manifest).encode())
    assert "\n" not in str(error.value)


def write_manifest(folder: Path, manifest: dict[str, Any] | bytes) -> None:
    """Write the manifest (or raw bytes) with its digest."""
    data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    (folder / "lowtide.json").write_bytes(data)
    (folder / "lowtide.json.sha256").write_bytes(f"{sha256(data)}  lowtide.json\n".encode())


def split(data: bytes) -> tuple[dict[str, Any], int]:
    """Header and start of the data part of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


def join(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """A safetensors file of a header (or its raw bytes) and a data part."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text + data


def rehash(folder: Path) -> None:
    """Make every hash and size of the manifest those of the files as they are."""
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": sha256(data)}
    data = (folder / "model.safetensors").read_bytes()
    try:
        header, start = split(data)
        for name, entry in manifest["tensors"].items():
            first, last = header[name]["data_offsets"]
            entry["sha256"] = sha256(data[start + first : start + last])
    except (ValueError, KeyError, TypeError):
        pass  # the header is what was broken
    write_manifest(folder, manifest)


def edit_tensor(folder: Path, name: str, change: Callable[[NDArray[Any]], None]) -> None:
    """Change a tensor's values in place, then recompute the hashes."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    header, start = split(bytes(data))
    entry = header[name]
    first, last = entry["data_offsets"]
    array = np.frombuffer(data[start + first : start + last], _DTYPES[entry["dtype"]]).copy().reshape(entry["shape"])
    change(array)
    data[start + first : start + last] = array.tobytes()
    path.write_bytes(data)
    rehash(folder)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the parsed manifest, then recompute its digest."""
    manifest = read_manifest(folder)
    change(manifest)
    write_manifest(folder, manifest)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the parsed header of the weights, then recompute the hashes."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header, start = split(data)
    change(header)
    path.write_bytes(join(header, data[start:]))
    rehash(folder)
