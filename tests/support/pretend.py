"""A torch device, `pretend`, that computes on the processor and refuses tensors that are not on it.

It stands in for a GPU where there is none: what mixes devices fails here as it would there. It is registered when this
module is imported, for autograd counts devices once, when it is first used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
MOVES = ("aten::_to_copy", "aten::copy_")
_register = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
AVAILABLE = _register is not None
"""Whether this torch lets backends be written in Python."""
if _register is not None:
    _register(NAME)


@contextmanager
def pretend() -> Iterator[torch.device]:
    """The device, which exists inside."""
    with _Dispatch():
        yield torch.device(NAME, 0)


class _There(torch.Tensor):
    """A tensor on the device; `raw` is where its values are."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> _There:
        about = {"dtype": raw.dtype, "strides": raw.stride(), "storage_offset": raw.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, raw.shape, device=torch.device(NAME, 0), **about)
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """Takes what makes tensors on the device, or moves them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        there = wanted is not None and torch.device(wanted).type == NAME
        if there or any(isinstance(leaf, _There) for leaf in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`func` on the raw tensors."""
    name, strangers = func._schema.name, []

    def raw(leaf: Any) -> Any:
        if isinstance(leaf, _There):
            return leaf.raw
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            strangers.append(tuple(leaf.shape))
        return leaf

    wanted = kwargs.pop("device", None) if "device" in kwargs else None
    here, options = tree_map(raw, args), tree_map(raw, kwargs)
    if strangers and name not in MOVES:
        raise RuntimeError(f"{name}: tensors {strangers} are not on the device")
    found = func(*here, **options) if wanted is None else func(*here, **options, device="cpu")
    if name == "aten::copy_" or (func._schema.is_mutable and name.endswith("_") and isinstance(args[0], _There)):
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    if wanted is not None and torch.device(wanted).type == "cpu":
        return found
    return tree_map(lambda leaf: _There(leaf) if isinstance(leaf, torch.Tensor) else leaf, found)
