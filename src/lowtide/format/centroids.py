"""The centroids of a group's inputs as engines use them: the input's middle, and what the weights make of it.

A token whose input lies near centroid m needs only the product of what is left of it, `y = W m + W (x - m)`, and a
smaller rest is read to lower levels for the same error. `W m` is known beforehand. A file stores the centroids alone;
the products follow from them and the weights, with all slices read, and are made when an artifact is first opened for
running. They lie in the user's cache, named by the digest of the manifest that they belong to, like the runtime image:
losing them costs the time to make them again, never anything else.

Products with quantised inputs, looked up: MADDNESS (arXiv 2106.10860). Only the rest multiplied: delta networks
(arXiv 1612.05571), whose reference is the token before.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.format import codec, layout, stamp
from lowtide.format.groups import GroupTensors, LinearTensors
from lowtide.format.image import say
from lowtide.format.manifest import Shapes
from lowtide.format.stamp import cache_folder

F16 = NDArray[np.float16]
F64 = NDArray[np.float64]
ROWS = 4096
"""Of a matrix that are unpacked to floats at a time."""
VERSION = 1
"""Of what is computed here, in the names of cached files; raised when it changes."""
DIGEST = "sha256"


@dataclass(frozen=True)
class Centroids:
    """Of one group.

    Attributes:
        mean: float16 [K, in], what takes the place of the group's mean.
        bias: float16 [K, out] for every linear layer, what takes the place of its bias.
    """

    mean: F16
    bias: list[F16]


def means(group: GroupTensors) -> F16:
    """float16 [K, in]: the group's mean and the centroids' differences from it."""
    assert group.ipn is not None and group.ipn.centroids is not None and group.ipn.step is not None
    offset = group.ipn.centroids.astype(np.float32) * group.ipn.step.astype(np.float32)
    with np.errstate(over="ignore"):  # what leaves the range makes products that do, which are refused
        return (group.mean.astype(np.float32) + offset).astype(np.float16)


def make(group: GroupTensors) -> Centroids:
    """A group's centroids and the products with them, from its own tensors."""
    mean = means(group)
    apart = mean.astype(np.float64) - group.mean.astype(np.float64)
    return Centroids(mean, [_products(group, linear, apart) for linear in group.linears])


def _products(group: GroupTensors, linear: LinearTensors, apart: F64) -> F16:
    """f16 [K, out]: the bias and what all slices and outliers make of f64 [K, in], which is 0 for exact channels. In
    float64, so that in whatever order a library adds, nearly all values round to the same float16. Some rows at a time:
    an output head in floats takes more memory than the artifact."""
    digits = codec.unpack_digits(linear.weight, linear.out_features, group.in_features, group.slices)
    nothing = sum(twice / 2 * 4.0**-place for place, twice in enumerate(group.centres))
    cols = group.col_scale.astype(np.float64) * float(group.shrink[-1])
    rows, channels, values = linear.outliers()
    found = np.empty((len(apart), linear.out_features), np.float16)
    for start in range(0, linear.out_features, ROWS):
        part = slice(start, start + ROWS)
        weight = (digits[part] * 4.0 ** (1 - group.slices) - nothing) * cols
        weight *= linear.row_scale[part].astype(np.float64)[:, None]
        here = (rows >= start) & (rows < start + ROWS)
        np.add.at(weight, (rows[here] - start, channels[here]), values[here].astype(np.float64))
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            found[:, part] = apart @ weight.T + linear.bias[part].astype(np.float64)
    if not np.all(np.isfinite(found)):
        raise LowtideError(f"{linear.name}: a product with one of the centroids leaves float16's range")
    return found


def load_centroids(manifest_sha256: str, groups: Mapping[str, GroupTensors]) -> dict[str, Centroids]:
    """Those of an artifact with this manifest: out of the cache, or made and put there. Without a cache they are just
    made.

    Raises:
        LowtideError: a product leaves float16's range.
    """
    wanted = {n: g for n, g in groups.items() if g.ipn is not None and g.ipn.centroids is not None}
    if not wanted:
        return {}
    expected = _expected(wanted)
    path = cache_folder() / "centroids" / f"{manifest_sha256}-{VERSION}.safetensors"
    tensors = _read(path, expected)
    if tensors is None:
        say(f"multiplying {len(wanted)} groups' centroids into {path} (once)")
        made = {name: make(group) for name, group in wanted.items()}
        named = {tensor: value for name, each in made.items() for tensor, value in _named(wanted[name], each).items()}
        _write(path, named, expected)
        tensors = _read(path, expected) or named  # mapped where that can be: what no token asks for takes no memory
    return {
        name: Centroids(tensors[f"{name}.mean"], [tensors[linear.name] for linear in group.linears])
        for name, group in wanted.items()
    }


def _named(group: GroupTensors, made: Centroids) -> dict[str, F16]:
    biases = {linear.name: bias for linear, bias in zip(group.linears, made.bias, strict=True)}
    return {f"{group.name}.mean": made.mean} | biases


def _expected(groups: Mapping[str, GroupTensors]) -> Shapes:
    found: Shapes = {}
    for name, group in groups.items():
        assert group.ipn is not None and group.ipn.centroids is not None
        count = len(group.ipn.centroids)
        found[f"{name}.mean"] = ("F16", (count, group.in_features))
        found |= {linear.name: ("F16", (count, linear.out_features)) for linear in group.linears}
    return found


def _read(path: Path, expected: Shapes) -> dict[str, F16] | None:
    """The cached tensors, memory-mapped; None if there are none or they are not these. Hashed, unless they were
    before (see `stamp`)."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        start, spans = layout.parse_header(data, str(path))
    except (OSError, ValueError, LowtideError):
        return None
    digest = spans.pop(DIGEST, None)
    if digest is None or {name: (span.dtype, span.shape) for name, span in spans.items()} != expected:
        return None
    known, files = bytes(data[start + digest.start : start + digest.stop]), stamp.identity({path.name: status})
    if not stamp.is_stamped(path, known.hex(), files):
        if hashlib.sha256(data[start : start + digest.start]).digest() != known:
            return None
        stamp.write_stamp(path, known.hex(), files)
    whole: NDArray[np.uint8] = np.frombuffer(data, np.uint8)
    return {
        name: whole[start + span.start : start + span.stop].view(layout.DTYPES["F16"]).reshape(span.shape)
        for name, span in spans.items()
    }


def _write(path: Path, tensors: Mapping[str, NDArray[Any]], expected: Shapes) -> None:
    """Under a temporary name until it is whole; where the cache cannot be written nothing is kept. The last tensor is
    the SHA-256 of those before."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    digest = hashlib.sha256()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(layout.encode_header(layout.sequence(expected | {DIGEST: ("U8", (32,))})))
                for name in expected:
                    content = np.ascontiguousarray(tensors[name]).data
                    digest.update(content)
                    file.write(content)
                file.write(digest.digest())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
