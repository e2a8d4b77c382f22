"""Building and asking a map from features to weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowtide.errors import LowtideError
from lowtide.fingerprint import CodeOptions, Store, build_store, describe
from lowtide.fingerprint.code import F64
from lowtide.fingerprint.hashing import U64, hash_texts, utf8
from lowtide.fingerprint.store import TEXTS
from lowtide.fingerprint.table import lloyd_table
from lowtide.keyed.bundle import Bundle, open_bundle, write_bundle

F32 = NDArray[np.float32]
KIND = "map"
_SEEDS = 8


class KeyedStore:
    """An open map. Features are texts, or their UTF-8 bytes."""

    def __init__(self, bundle: Bundle) -> None:
        self.path = bundle.path
        self.file_bytes = bundle.file_bytes
        self._store = bundle.stores[0]

    def __len__(self) -> int:
        return self._store.count

    def get(self, feature: str | bytes) -> float:
        """A feature's weight; 0 if it is not stored, but for false positives.

        Raises:
            LowtideError: bytes that are not UTF-8.
        """
        return float(self.get_many([feature])[0])

    def get_many(self, features: Sequence[str | bytes]) -> F32:
        """The weights of features [n], f32 [n]; much faster than one by one. Raises as `get`."""
        return self._store.values_of(features)[:, 0]

    def has_many(self, features: Sequence[str | bytes]) -> NDArray[np.bool_]:
        """Whether features [n] seem to be stored; wrong for strangers at info()'s false_positive_rate."""
        return self._store.symbols_of(features) >= 0

    def info(self) -> Mapping[str, Any]:
        """Figures of the file."""
        return {"kind": KIND, "file_bytes": self.file_bytes, **describe(self._store)}


def build(
    features: Sequence[str | bytes],
    weights: ArrayLike,
    path: str | Path,
    *,
    table_size: int = 16,
    code: CodeOptions | None = None,
    force: bool = False,
) -> Mapping[str, Any]:
    """Write a map from features to weights.

    Weights of 0 are not stored: features that are not stored have that weight anyway.

    Args:
        features: different texts, or their UTF-8 bytes.
        weights: [n], finite.
        path: the file to make.
        table_size: different weights kept; the others are rounded to them with the least squared error.
        code: fingerprint lengths. Its `error` is the mean squared weight of a stranger over that of a stored feature.
        force: replace a file that exists.

    Returns:
        Figures, as KeyedStore.info().

    Raises:
        LowtideError: nothing to store, duplicate features, not UTF-8, weights that are not finite or not as many.
    """
    values = np.asarray(weights, np.float32)
    if values.shape != (len(features),):
        raise LowtideError(f"{len(features)} features, but weights of shape {list(values.shape)}; give one for each")
    if not len(features):
        raise LowtideError("the map is empty; there is nothing to store")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise LowtideError(f"feature {features[bad[0]]!r:.60}: its weight is {values[bad[0]]}, not a finite number")
    texts = unique_features(features)
    kept = np.flatnonzero(values)
    if not len(kept):
        raise LowtideError("all weights are zero; there is nothing to store")
    table, symbols = lloyd_table(values[kept], table_size)
    store = text_store([texts[i] for i in kept], symbols, table, code or CodeOptions(error=0.001))
    size = write_bundle(path, KIND, {}, {"weights": store}, force)
    return {"kind": KIND, "file_bytes": size, **describe(store)}


def open_store(path: str | Path) -> KeyedStore:
    """Open a map made by `build`, memory-mapped.

    Raises:
        LowtideError: cannot be read, damaged, or not a map.
    """
    bundle = open_bundle(path, KIND)
    if len(bundle.stores) != 1 or bundle.stores[0].kind != TEXTS or bundle.stores[0].table.shape[1] != 1:
        raise LowtideError(f"{path}: does not hold one map of weights")
    return KeyedStore(bundle)


def unique_features(features: Sequence[str | bytes]) -> list[bytes]:
    """Features as UTF-8.

    Raises:
        LowtideError: not UTF-8, or a feature that occurs twice.
    """
    texts = [utf8(feature) for feature in features]
    if len(set(texts)) != len(texts):
        seen: set[bytes] = set()
        for text in texts:
            if text in seen:
                raise LowtideError(f"feature {text.decode()!r:.60} is given twice; add its weights up first")
            seen.add(text)
    return texts


def text_store(
    texts: Sequence[bytes],
    symbols: NDArray[Any],
    table: F32,
    code: CodeOptions,
    *,
    strangers: float | None = None,
    energy: F64 | None = None,
) -> Store:
    """A store of different texts; `strangers`: as many as there are texts by default. See build_store."""
    seed, hashes = distinct_hashes(texts, code.seed)
    options = CodeOptions(code.error, code.constant, code.bits, seed)
    expected = float(len(texts)) if strangers is None else strangers
    return build_store(hashes, symbols, table, options, strangers=expected, kind=TEXTS, energy=energy)


def distinct_hashes(texts: Sequence[bytes], seed: int) -> tuple[int, U64]:
    """The first seed from `seed` on under which all hashes differ, and the hashes u64 [n]."""
    for turn in range(_SEEDS):  # among a million texts two have the same hash once in 40 million seeds
        hashes = hash_texts(texts, seed + turn)
        if len(np.unique(hashes)) == len(hashes):
            return seed + turn, hashes
    raise LowtideError("no seed tells all features apart; are there duplicates?")
