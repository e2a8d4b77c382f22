"""A model with some of its tensors replaced, so that everything that reads a source can read a changed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lowtide.compress.sources.base import Source, expected_shapes, weights_fingerprint
from lowtide.errors import LowtideError


class OverlaySource:
    """`source` with other values for the tensors in `tensors`.

    Args:
        source: the model below.
        tensors: Hugging Face tensor name -> values of the same shape, kept as float16 or float32 as given.
        name: of the changed model, for people.

    Raises:
        LowtideError: a tensor the model does not have, another shape, or values that are not finite.
    """

    def __init__(self, source: Source, tensors: Mapping[str, torch.Tensor], name: str | None = None) -> None:
        self.below = source
        self.name = name or f"{source.name}, changed"
        self.config = source.config
        self.tensors = dict(tensors)
        shapes = expected_shapes(self.config)
        for key, value in self.tensors.items():
            if shapes.get(key) != tuple(value.shape):
                wanted = list(shapes[key]) if key in shapes else "no such tensor"
                raise LowtideError(f"{self.name}: {key} has shape {list(value.shape)}, the model {wanted}")
            if not torch.isfinite(value).all():
                raise LowtideError(f"{self.name}: tensor {key} holds NaN or infinity")

    def has(self, tensor: str) -> bool:
        """Whether the model has a tensor of that name."""
        return self.below.has(tensor)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as float32, changed or not."""
        return self.tensors[name].float() if name in self.tensors else self.below.tensor(name)

    def stored(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor's bytes, u8 [n]."""
        if name not in self.tensors:
            return self.below.stored(name)
        return self.tensors[name].contiguous().flatten().view(torch.uint8).numpy()

    def tokenizer_files(self) -> dict[str, bytes]:
        """Those of the model below."""
        return self.below.tokenizer_files()

    def fingerprint(self) -> str:
        """SHA-256 over all weights as stored: that of another model than the one below."""
        return weights_fingerprint(self)
