"""What `compress` and `eval` need to know about an uncompressed model, wherever it comes from."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import numpy as np
import torch

from lowtide.arch import ModelConfig, group_specs, norm_specs


class Source(Protocol):
    """An opened model. Tensors have Hugging Face names and shapes and are read on demand."""

    name: str
    config: ModelConfig

    def has(self, tensor: str) -> bool:
        """Whether the model has a tensor of that name."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as float32. LowtideError if it is missing or holds NaN or infinity."""
        ...

    def stored(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor's bytes as the source stores them, u8 [n] (for the fingerprint)."""
        ...

    def tokenizer_files(self) -> dict[str, bytes]:
        """File name -> contents: tokenizer.json, tokenizer_config.json and, where known, generation_config.json."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all weights as stored, in a fixed order: tells whether two models are the same."""
        ...


def tensor_names(config: ModelConfig) -> list[str]:
    """Names of all tensors that a model of this config must have, in a fixed order."""
    names = [name for name, _ in norm_specs(config)]
    for group in group_specs(config):
        names += [f"{linear.name}.weight" for linear in group.linears]
        if config.qkv_bias and group.name.endswith(".qkv"):
            names += [f"{linear.name}.bias" for linear in group.linears]
    return names


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, for all tensors that a model of this config must have."""
    shapes: dict[str, tuple[int, ...]] = {name: (length,) for name, length in norm_specs(config)}
    for group in group_specs(config):
        for linear in group.linears:
            shapes[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
            if config.qkv_bias and group.name.endswith(".qkv"):
                shapes[f"{linear.name}.bias"] = (linear.out_features,)
    return shapes


def weights_fingerprint(source: Source) -> str:
    """SHA-256 over the names and stored bytes of all tensors of the source."""
    digest = hashlib.sha256()
    for name in tensor_names(source.config):
        digest.update(name.encode() + b"\0")
        digest.update(source.stored(name).data)
    return digest.hexdigest()
