"""A pruned weight tensor as a fingerprint store: keys are positions, and no mask is stored.

All positions are known, so false positives can be counted, the worst of them listed (corrections), the table fitted to
what its entries are really used for, and the luckiest of several seeds taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.fingerprint.code import I64
from lowtide.fingerprint.file import sizes, unpack
from lowtide.fingerprint.hashing import hash_ints
from lowtide.fingerprint.store import ABSENT, F32, INTS, CodeOptions, Store, build_store
from lowtide.fingerprint.table import lloyd_table, uniform_table

_BATCH = 1 << 20
"""Positions asked for at a time."""


@dataclass(frozen=True)
class TensorOptions:
    """How a tensor is coded.

    table_size: quantised weights in the table, of least squared error; step: multiples of this instead; code:
    fingerprint lengths and first seed; corrections: share of the false positives' energy that a list of the worst of
    them takes away, 0 for no list, 1 for an exact store; seeds: seeds tried, the one of least false energy is kept;
    refit: fit the table again to all positions that read it, false ones included.
    """

    table_size: int = 16
    step: float | None = None
    code: CodeOptions = field(default_factory=CodeOptions)
    corrections: float = 0.0
    seeds: int = 1
    refit: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.corrections <= 1:
            raise LowtideError(f"corrections {self.corrections}: must be 0 to 1, a share of the false energy")
        if self.seeds < 1:
            raise LowtideError(f"seeds {self.seeds}: must be 1 or more")


@dataclass(frozen=True)
class TensorReport:
    """What became of a tensor.

    bits_per_weight: of the file, over all positions; false_positives: strangers that read a weight, corrected ones
    left out; corrected: those on the list; false_energy: the sum of squares of the weights that the former read, over
    that of all stored weights.
    """

    weights: int
    stored: int
    file_bytes: int
    bits_per_weight: float
    false_positives: int
    corrected: int
    false_energy: float
    seed: int


def encode_tensor(
    weights: NDArray[np.floating],
    *,
    model_id: str,
    name: str,
    options: TensorOptions | None = None,
    target: NDArray[np.floating] | None = None,
    cost: NDArray[np.floating] | None = None,
) -> tuple[Store, TensorReport]:
    """Code the non-zero weights of a tensor.

    Args:
        weights: pruned, any shape; zeros are not stored.
        model_id: fingerprint of the model (`Source.fingerprint`), written into the store; name: the tensor's.
        target: what `refit` fits to, of the same shape; the pruned weights by default. The unpruned ones are better: a
            false positive's own weight is small, but seldom zero.
        cost: weight of each position's error in `refit`, of a shape that broadcasts to the tensor's; 1 by default.

    Raises:
        LowtideError: no non-zero weight, a weight that is not finite, shapes that differ, or impossible options.
    """
    options = options or TensorOptions()
    flat = np.ascontiguousarray(weights, np.float32).ravel()
    if not np.isfinite(flat).all():
        raise LowtideError(f"{name}: holds a weight that is not finite")
    goal = flat if target is None else np.asarray(target, np.float32).ravel()
    if goal.shape != flat.shape:
        raise LowtideError(f"{name}: target has {goal.size} weights, the tensor {flat.size}")
    kept = np.flatnonzero(flat)
    if not len(kept):
        raise LowtideError(f"{name}: nothing to store, all weights are zero")
    values = flat[kept]
    table, symbols = (
        lloyd_table(values, options.table_size) if options.step is None else uniform_table(values, options.step)
    )
    meta = {"model_id": model_id, "tensor": name, "shape": list(np.shape(weights))}
    best: tuple[Store, I64, float] | None = None
    for turn in range(options.seeds):
        code = replace(options.code, seed=options.code.seed + turn)
        hashes = hash_ints(kept, code.seed)
        strangers = flat.size - len(kept)
        store = build_store(hashes, symbols, table, code, strangers=strangers, kind=INTS, universe=flat.size, meta=meta)
        store, found = _correct(store, kept, options.corrections)
        energy = _false_energy(store, found, kept)
        if best is None or energy < best[2]:
            best = store, found, energy
    store, found, _ = best  # type: ignore[misc]  # seeds is at least 1
    if options.refit:
        every = 1.0 if cost is None else np.broadcast_to(np.asarray(cost, np.float64), np.shape(weights)).ravel()
        store = replace(store, table=refit_table(store.table, found, goal, every))
    return store, _report(store, found, kept)


def refit_table(table: F32, found: I64, target: F32, cost: NDArray[np.float64] | float = 1.0) -> F32:
    """The table of least squared error for what is read at all positions, indices staying as they are.

    found: i64 [n], index read at each position or ABSENT; target f32 [n]; cost: f64 [n]. The error cannot grow, and the
    false positives stay where they are: they depend on indices and fingerprints only.
    """
    read = found != ABSENT
    share = np.broadcast_to(np.asarray(cost, np.float64), target.shape)[read]
    total = np.bincount(found[read], weights=share * target[read], minlength=len(table))
    weight = np.bincount(found[read], weights=share, minlength=len(table))
    fitted = np.where(weight > 0, total / np.where(weight > 0, weight, 1), table[:, 0])
    return fitted.astype(np.float32)[:, None]


def decode_tensor(store: Store, *, model_id: str, name: str) -> F32:
    """The tensor, f32, with its false positives.

    Raises:
        LowtideError: the store is of another model or tensor, or not of a tensor.
    """
    shape = check_tensor(store, model_id, name)
    result = np.empty(store.universe, np.float32)
    for part, found in _scan(store):
        result[part] = np.append(store.table[:, 0], np.float32(0))[found]
    return result.reshape(shape)


def open_tensor(path: str | Path, *, model_id: str, name: str) -> Store:
    """A store of a tensor, memory-mapped from a file.

    Raises:
        LowtideError: cannot be read, is damaged, or belongs to another model or tensor.
    """
    store = unpack(map_file(path), str(path))
    check_tensor(store, model_id, name)
    return store


def map_file(path: str | Path) -> NDArray[np.uint8]:
    """A file's bytes, memory-mapped, read only.

    Raises:
        LowtideError: it cannot be read.
    """
    try:
        if os.path.getsize(path) == 0:
            raise LowtideError(f"{path}: is empty")
        return np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise LowtideError(f"{path}: cannot be read ({error.strerror or error})") from None


def check_tensor(store: Store, model_id: str, name: str) -> tuple[int, ...]:
    """The tensor's shape.

    Raises:
        LowtideError: the store is of another model or tensor, or not of a tensor.
    """
    meta = store.meta
    shape = meta.get("shape")
    if store.kind != INTS or set(meta) != {"model_id", "tensor", "shape"} or store.table.shape[1] != 1:
        raise LowtideError("this fingerprint store does not hold a tensor")
    if meta["model_id"] != model_id:
        raise LowtideError(f"the fingerprint store of {name} was built for another model; build it from this one")
    if meta["tensor"] != name:
        raise LowtideError(f"the fingerprint store holds {str(meta['tensor']):.80}, not {name}")
    product = 1
    sound = isinstance(shape, list) and len(shape) <= 8
    for n in shape if isinstance(shape, list) else []:  # Python integers: they cannot overflow
        sound = sound and type(n) is int and n > 0
        product *= n if sound else 0
    if not isinstance(shape, list) or not sound or product != store.universe:
        raise LowtideError(f"the fingerprint store of {name}: its shape does not fit its positions; build it again")
    return tuple(shape)


def _scan(store: Store) -> Iterator[tuple[slice, NDArray[np.int32]]]:
    """All positions in batches, and the indices read there."""
    for start in range(0, store.universe, _BATCH):
        stop = min(start + _BATCH, store.universe)
        yield slice(start, stop), store.symbols_of(np.arange(start, stop))


def _correct(store: Store, kept: I64, share: float) -> tuple[Store, I64]:
    """The store with a list of its worst false positives, and what is then read at all positions."""
    found = np.concatenate([part for _, part in _scan(store)]).astype(np.int64)
    if share == 0:
        return store, found
    false = _false(found, kept)
    energy = store.table[found[false], 0].astype(np.float64) ** 2
    worst = np.argsort(-energy, kind="stable")
    removed = np.cumsum(energy[worst])
    count = len(false) if share == 1 else int(np.searchsorted(removed, share * removed[-1]) + 1) if len(false) else 0
    listed = np.sort(false[worst[:count]])
    found[listed] = ABSENT
    return replace(store, corrections=listed), found


def _false(found: I64, kept: I64) -> I64:
    """Positions that read a weight and have none."""
    stranger = found != ABSENT
    stranger[kept] = False
    return np.flatnonzero(stranger)


def _false_energy(store: Store, found: I64, kept: I64) -> float:
    """Squares of the weights that false positives read, over those of the stored weights."""
    squares = store.table[:, 0].astype(np.float64) ** 2
    return float(squares[found[_false(found, kept)]].sum() / max(squares[found[kept]].sum(), 1e-300))


def _report(store: Store, found: I64, kept: I64) -> TensorReport:
    size = sizes(store).total
    return TensorReport(
        weights=store.universe,
        stored=len(kept),
        file_bytes=size,
        bits_per_weight=8 * size / store.universe,
        false_positives=len(_false(found, kept)),
        corrected=len(store.corrections),
        false_energy=_false_energy(store, found, kept),
        seed=store.seed,
    )
