"""What products run in that need not be exact: float32, or bfloat16 or int8 where the processor is that much faster.

An AMD EPYC with AVX512_BF16 is faster with bfloat16; an Intel Xeon with the same flag, but without AMX, takes 1.8 times
as long as in float32, and a quarter of float32's time with int8. Flags do not tell, so one product of each is timed,
once a process. LOWTIDE_PRODUCTS sets it, which a run must do that shall be repeated on another machine.

On a GPU products of floats are in TF32 where there is such a thing (10 bits of mantissa, bfloat16 has 7) unless
LOWTIDE_PRODUCTS says float32. int8 is not tried there.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lowtide.errors import LowtideError

CPU = torch.device("cpu")
VARIABLE = "LOWTIDE_PRODUCTS"
AHEAD, INTEGERS_AHEAD = 1.2, 2.0
"""How much faster bfloat16 and int8 must be: they are less exact."""
SHAPE, SHAPE_ELSEWHERE = (256, 1024, 1024), (8192, 2048, 2048)
"""Tokens, inputs and outputs of the products that are timed, on a processor and on other devices."""
ROUNDS = 5


@dataclass(frozen=True)
class Products:
    """floats: of products of floats; integers: whether those with digits run in int8."""

    floats: torch.dtype
    integers: bool = False


EXACT = Products(torch.float32)
TYPES = {
    "float32": EXACT,
    "bfloat16": Products(torch.bfloat16),
    "int8": Products(torch.float32, True),
    "int8-bfloat16": Products(torch.bfloat16, True),
}
_chosen: list[Products] = []
_chosen_for: list[str] = ["cpu"]
"""The type of device that it was chosen for."""


def products() -> Products:
    """The same for a whole process.

    Raises:
        LowtideError: LOWTIDE_PRODUCTS is none of the types.
    """
    if not _chosen:
        wanted = os.environ.get(VARIABLE)
        if wanted:
            use(wanted, VARIABLE + "=")
        else:
            _chosen.append(_fastest())
    return _chosen[0]


def choose(device: torch.device) -> None:
    """Choose for products on a device; what was chosen for another kind of device is forgotten.

    Raises:
        LowtideError: LOWTIDE_PRODUCTS asks for int8 where it is not to be had.
    """
    wanted = os.environ.get(VARIABLE)
    if device.type != "cpu" and wanted in TYPES and TYPES[wanted].integers:
        raise LowtideError(
            f"{VARIABLE}={wanted}: digits are multiplied in int8 on processors only; float32 or bfloat16"
        )
    if device.type == "cuda":  # settings of CUDA's products alone
        torch.backends.cuda.matmul.allow_tf32 = wanted != "float32"
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if device.type != _chosen_for[0]:
        _chosen.clear()
        _chosen_for[0] = device.type
    if not _chosen and not wanted and device.type != "cpu":  # a processor's are timed when they are first asked for
        _chosen.append(_fastest(device))


def on_device(name: str, device: torch.device) -> str:
    """What a type chosen elsewhere becomes on a device: without int8 where that is not to be had."""
    kind = TYPES[name]
    plain = Products(kind.floats, kind.integers and device.type == "cpu")
    return next(n for n, known in TYPES.items() if known == plain)


def use(name: str, where: str = "products ") -> None:
    """Set it to one of TYPES.

    Raises:
        LowtideError: it is none of them; `where` begins the message.
    """
    if name not in TYPES:
        raise LowtideError(f"{where}{name}: known are {', '.join(TYPES)}")
    _chosen[:] = [TYPES[name]]


def name() -> str:
    """Of the type in use, as LOWTIDE_PRODUCTS has it."""
    return next(n for n, kind in TYPES.items() if kind == products())


def product_type() -> torch.dtype:
    """Of products of floats."""
    return products().floats


def int8_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x int8 [n, k] times w int8 [k, m], summed exactly: i32 [n, m]. Slow where torch's own is not exact."""
    return torch._int_mm(x, w) if int8_is_exact() else (x.double() @ w.double()).int()


@functools.cache
def int8_is_exact() -> bool:
    """Whether torch's sums are right: without VNNI 128 is added to x, and pairs of products are added in 16 bits, which
    saturate."""
    x = torch.full((2, 64), 127, dtype=torch.int8)
    x[1] = -127
    w = torch.full((64, 3), 96, dtype=torch.int8)
    w[:, 1], w[::2, 2] = -96, -96
    try:
        return bool(torch.equal(torch._int_mm(x, w).long(), x.long() @ w.long()))
    except (AttributeError, RuntimeError):  # not in every torch, nor for every processor
        return False


def _fastest(device: torch.device = CPU) -> Products:
    plain, half = _seconds(torch.float32, device), _seconds(torch.bfloat16, device)
    floats = torch.bfloat16 if half * AHEAD < plain else torch.float32
    if device.type != "cpu":
        return Products(floats)
    return Products(floats, _seconds(torch.int8, device) * INTEGERS_AHEAD < min(plain, half))


def _seconds(kind: torch.dtype, device: torch.device) -> float:
    """The best of a few products, as other work on the machine only adds."""
    tokens, inputs, out = SHAPE if device.type == "cpu" else SHAPE_ELSEWHERE
    x, w = torch.ones(tokens, inputs, dtype=kind, device=device), torch.ones(out, inputs, dtype=kind, device=device)
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        y = int8_product(x, w.T) if kind == torch.int8 else F.linear(x, w)
        y[-1, -1].item()  # waits for the device
        found.append(time.perf_counter() - began)
    return min(found)
