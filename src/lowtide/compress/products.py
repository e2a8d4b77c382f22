"""What products run in that need not be exact: float32, or bfloat16 where the processor multiplies that much faster.

An AMD EPYC with AVX512_BF16 does; an Intel Xeon with the same flag, but without AMX, takes 1.8 times as long as in
float32. The flags do not tell, so one product is timed, once a process. LOWTIDE_PRODUCTS=float32 or bfloat16 sets it,
for the same result on any machine.
"""

from __future__ import annotations

import os
import time

import torch
import torch.nn.functional as F

from lowtide.errors import LowtideError

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VARIABLE = "LOWTIDE_PRODUCTS"
AHEAD = 1.2
"""How much faster bfloat16 must be: it is less exact, but takes half the memory."""
SHAPE = (256, 1024, 1024)
ROUNDS = 5
_chosen: list[torch.dtype] = []


def product_type() -> torch.dtype:
    """What products run in, the same for a whole process.

    Raises:
        LowtideError: LOWTIDE_PRODUCTS is none of the types.
    """
    if not _chosen:
        wanted = os.environ.get(VARIABLE)
        if not wanted:
            wanted = "bfloat16" if _seconds(torch.bfloat16) * AHEAD < _seconds(torch.float32) else "float32"
        if wanted not in TYPES:
            raise LowtideError(f"{VARIABLE}={wanted}: known are {', '.join(TYPES)}")
        _chosen.append(TYPES[wanted])
    return _chosen[0]


def _seconds(kind: torch.dtype) -> float:
    """The best of a few products, as other work on the machine only adds."""
    tokens, inputs, out = SHAPE
    x, w = torch.ones(tokens, inputs, dtype=kind), torch.ones(out, inputs, dtype=kind)
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        F.linear(x, w)
        found.append(time.perf_counter() - began)
    return min(found)
