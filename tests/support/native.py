"""Artifacts of odd shapes, instruction sets, thread counts and policies that the native engine is tested with."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from support.tiny import ODD, Tiny

from lowtide.format.reader import Artifact
from lowtide.kernels.native import available_isas
from lowtide.kernels.types import PolicyParams

SHAPES = {
    "default": Tiny(),
    "odd": ODD,
    "one-slice": Tiny(slices=1, hidden=40, intermediate=70, tied=False),
    "four-slices": Tiny(slices=4, exact=0, outliers=0.0, qkv_bias=True),
    "wide-tiles": Tiny(
        hidden=320, intermediate=700, layers=1, heads=5, kv_heads=1, head_dim=64, vocab=577, outliers=0.004
    ),
    "many-tiles": Tiny(hidden=20, intermediate=24, layers=1, heads=2, kv_heads=1, head_dim=10, vocab=6500),
    "grouped-heads": Tiny(hidden=60, heads=10, kv_heads=2, head_dim=6, exact=1),
    "one-centroid": dataclasses.replace(ODD, centroids=1),
    "five-centroids": Tiny(slices=2, qkv_bias=True, centroids=5),
    "factors": Tiny(hidden=60, heads=10, kv_heads=2, head_dim=6, factors=True),
    # rows of q, k and v are so short that threads share out entries, each layer's own
    "short-factors": Tiny(hidden=320, intermediate=70, layers=1, heads=4, kv_heads=2, head_dim=20, factors=True),
    "odd-centroids": dataclasses.replace(ODD, layers=2, centroids=64, key_channels=32),
    "many-centroids": dataclasses.replace(ODD, centroids=2 * 64 + 16 + 6),
    # rows of o are so short that threads share out its entries
    "wide-centroids": Tiny(
        hidden=320, intermediate=70, layers=1, head_dim=20, centroids=64, key_channels=128, factors=True
    ),
    "many-tiles-factors": Tiny(hidden=320, intermediate=64, layers=1, heads=40, kv_heads=20, head_dim=32, factors=True),
}
VARIANTS = [(isa, threads) for isa in available_isas() for threads in (1, 2, 3)]
THRESHOLDS = np.array([0.15, 0.5, 1.1, 1.9], np.float32)


def policy(artifact: Artifact, rule: str, offset: float = 0.0) -> PolicyParams:
    """Thresholds that inputs of about 1 pass to all levels, the same in every group."""
    rows = np.tile(THRESHOLDS[: artifact.manifest.slices], (4 * artifact.config.num_layers + 1, 1))
    if rule == "topk":
        rows = np.tile(np.array([21.4, 12, 5, 2], np.float32)[: artifact.manifest.slices], (len(rows), 1))
    if rule == "statistical-topk":
        rows = rows - 1
    gains = np.linspace(-0.7, 0.7, len(rows), dtype=np.float32) if rule == "ipn" else None
    return PolicyParams(rule, rows, offset, gains)


def random_tokens(artifact: Artifact, n: int = 21, seed: int = 3) -> NDArray[np.int32]:
    """Token ids i32 [n]."""
    return np.random.default_rng(seed).integers(0, artifact.config.vocab_size, n).astype(np.int32)
