"""What products run in that need not be exact: float32, or bfloat16 or int8 where the processor is that much faster.

An AMD EPYC with AVX512_BF16 is faster with bfloat16; an Intel Xeon with the same flag, but without AMX, takes 1.8 times
as long as in float32, and a quarter of that with int8. Flags do not tell, so one product of each is timed, once a
process. LOWTIDE_PRODUCTS=float32, bfloat16 or int8 sets it, for the same result on any machine.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lowtide.errors import LowtideError

VARIABLE = "LOWTIDE_PRODUCTS"
AHEAD, INTEGERS_AHEAD = 1.2, 2.0
"""How much faster bfloat16 and int8 must be: they are less exact."""
SHAPE = (256, 1024, 1024)
ROUNDS = 5


@dataclass(frozen=True)
class Products:
    """floats: of products of floats; integers: whether those with digits run in int8."""

    floats: torch.dtype
    integers: bool = False


EXACT = Products(torch.float32)
TYPES = {"float32": EXACT, "bfloat16": Products(torch.bfloat16), "int8": Products(torch.float32, True)}
_chosen: list[Products] = []


def products() -> Products:
    """The same for a whole process.

    Raises:
        LowtideError: LOWTIDE_PRODUCTS is none of the types.
    """
    if not _chosen:
        wanted = os.environ.get(VARIABLE)
        if wanted and wanted not in TYPES:
            raise LowtideError(f"{VARIABLE}={wanted}: known are {', '.join(TYPES)}")
        _chosen.append(TYPES[wanted] if wanted else _fastest())
    return _chosen[0]


def product_type() -> torch.dtype:
    """Of products of floats."""
    return products().floats


def int8_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x int8 [n, k] times w int8 [k, m], summed exactly: i32 [n, m]."""
    return torch._int_mm(x, w)


def _fastest() -> Products:
    plain, half = _seconds(torch.float32), _seconds(torch.bfloat16)
    floats = torch.bfloat16 if half * AHEAD < plain else torch.float32
    return Products(floats, _seconds(torch.int8) * INTEGERS_AHEAD < min(plain, half))


def _seconds(kind: torch.dtype) -> float:
    """The best of a few products, as other work on the machine only adds; infinite if there is no such product."""
    tokens, inputs, out = SHAPE
    x, w = torch.ones(tokens, inputs, dtype=kind), torch.ones(out, inputs, dtype=kind)
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        try:
            int8_product(x, w.T) if kind == torch.int8 else F.linear(x, w)
        except (AttributeError, NotImplementedError, RuntimeError):  # an older torch, or another processor
            return math.inf
        found.append(time.perf_counter() - began)
    return min(found)
