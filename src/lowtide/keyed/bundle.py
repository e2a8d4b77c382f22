"""The file of a keyed model: one JSON object and one or more fingerprint stores. docs/fingerprint.md specifies it."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.errors import LowtideError
from lowtide.fingerprint import Store, pack, unpack
from lowtide.fingerprint.tensor import map_file
from lowtide.format.strictjson import parse_object

MAGIC = b"LTKEYED\0"
VERSION = 1
_HEAD = struct.Struct("<8sHHI")
"""Magic, version, number of stores, bytes of the JSON. Then the stores' lengths, the JSON, and a digest of all that."""
_DIGEST = 32
MAX_STORES = 64
MAX_META = 1 << 26


@dataclass(frozen=True)
class Bundle:
    """An open file: path, what its JSON says, its stores in the order of meta["stores"], and its size."""

    path: str
    meta: Mapping[str, Any]
    stores: tuple[Store, ...]
    file_bytes: int


def write_bundle(
    path: str | Path, kind: str, meta: Mapping[str, Any], stores: Mapping[str, Store], force: bool = False
) -> int:
    """Write a file, all or nothing; returns its bytes.

    Raises:
        LowtideError: the file exists and `force` is not given, or it cannot be written.
    """
    blobs = [pack(store) for store in stores.values()]  # of whole 8 bytes, so that all lie aligned
    whole = {"kind": kind, "stores": list(stores)} | dict(meta)
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > MAX_META or len(blobs) > MAX_STORES:
        raise LowtideError(f"{path}: its description of {len(text)} bytes is too large")
    head = _HEAD.pack(MAGIC, VERSION, len(blobs), len(text))
    head += struct.pack(f"<{len(blobs)}Q", *map(len, blobs)) + text
    head += bytes(-len(head) % 8)
    body = b"".join([head, hashlib.sha256(head).digest(), *blobs])
    _write(Path(path), body, force)
    return len(body)


def open_bundle(path: str | Path, kind: str | None = None) -> Bundle:
    """Open a file, memory-mapped, after checking every byte of it.

    Args:
        kind: refuse files of another kind.

    Raises:
        LowtideError: cannot be read, damaged, of a newer version, or of another kind.
    """
    raw = map_file(path)
    if len(raw) < _HEAD.size + _DIGEST or raw[:8].tobytes() != MAGIC:
        raise LowtideError(f"{path}: not a file of lowtide keyed")
    _, version, count, length = _HEAD.unpack(raw[: _HEAD.size].tobytes())
    if version > VERSION:
        raise LowtideError(f"{path}: format version {version}; this lowtide reads up to {VERSION}, get a newer one")
    start = _HEAD.size + 8 * count + length
    start += -start % 8
    damaged = LowtideError(f"{path}: is damaged; get or make the file again")
    if version < 1 or not 1 <= count <= MAX_STORES or length > MAX_META or len(raw) < start + _DIGEST:
        raise damaged
    if hashlib.sha256(raw[:start].data).digest() != raw[start : start + _DIGEST].tobytes():
        raise damaged
    lengths = struct.unpack(f"<{count}Q", raw[_HEAD.size : _HEAD.size + 8 * count].tobytes())
    begin = _HEAD.size + 8 * count
    meta = parse_object(raw[begin : begin + length].tobytes(), str(path))
    place = start + _DIGEST
    if place + sum(lengths) != len(raw):
        raise damaged
    names = meta.get("stores")
    named = isinstance(names, list) and len(names) == count and all(isinstance(n, str) for n in names)
    if not named or not isinstance(meta.get("kind"), str):
        raise damaged
    if kind is not None and meta["kind"] != kind:
        raise LowtideError(f"{path}: holds a {meta['kind']:.20}, not a {kind}")
    stores = []
    for size in lengths:
        stores.append(unpack(raw[place : place + size], str(path)))
        place += size
    return Bundle(str(path), meta, tuple(stores), len(raw))


def _write(path: Path, body: bytes, force: bool) -> None:
    if path.exists() and not force:
        raise LowtideError(f"{path}: exists; choose another name or give --force")
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise LowtideError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
