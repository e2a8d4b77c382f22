"""lowtide: compress a language model once, run it natively at any byte budget.

    import lowtide

    model = lowtide.load("smollm2.lowtide")
    for piece in model.generate("The tide", bits=3):
        print(piece, end="", flush=True)

Names are loaded on first use: importing lowtide imports nothing but the standard library.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowtide.compress import compress as compress
    from lowtide.errors import LowtideError as LowtideError
    from lowtide.eval import evaluate as evaluate
    from lowtide.runtime.bench import bench as bench
    from lowtide.runtime.model import Model as Model
    from lowtide.runtime.model import load as load

__version__ = "0.1.0"

_PUBLIC = {
    "LowtideError": "lowtide.errors",
    "Model": "lowtide.runtime.model",
    "bench": "lowtide.runtime.bench",
    "evaluate": "lowtide.eval",
    "load": "lowtide.runtime.model",
}

__all__ = ["LowtideError", "Model", "__version__", "bench", "compress", "evaluate", "load"]


def __getattr__(name: str) -> Any:
    if name == "compress":
        return importlib.import_module("lowtide.compress")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lowtide' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


class _CompressPackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compress(*args, **kwargs)


class _Package(ModuleType):
    """`lowtide.compress` names a package and the function in it: the package becomes callable when it is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "compress" and isinstance(value, ModuleType):
            value.__class__ = _CompressPackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
