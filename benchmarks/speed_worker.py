"""The worker of `speed.py`: `worker.py` with a place in the text to decode from, prefill, and the memory probe.

    python speed_worker.py llama      needs llama-cpp-python and numpy, nothing of lowtide
    python speed_worker.py lowtide    needs lowtide

Requests: open, prefill, decode_at; llama also logits and quantise, lowtide bandwidth. Both engines keep their cache
between requests: what of a text is in it already is not computed again, and what lies behind the place is forgotten.
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import worker

BATCH = 512
"""Tokens that llama.cpp takes at once, its own default."""


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Llama(worker.Llama):
    """llama.cpp; flash attention on request, as whichever is faster depends on the context."""

    def open(  # type: ignore[override]
        self, path: str, threads: int, context: int, flash: bool = False, all_logits: bool = False
    ) -> dict[str, Any]:
        import llama_cpp  # type: ignore[import-not-found]

        self.lib = llama_cpp
        self.cached: list[int] = []
        self.model = llama_cpp.Llama(
            path,
            n_ctx=context,
            n_batch=context if all_logits else BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=flash,
            logits_all=all_logits,
            verbose=False,
        )
        system = llama_cpp.llama_print_system_info().decode()
        isa = next((n.lower() for n in ("AVX512", "AVX2", "NEON") if f"{n} = 1" in system), "portable")
        return {"version": llama_cpp.__version__, "isa": isa, "vocab": self.model.n_vocab()}

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        """Seconds for a text from an empty cache, the last token's logits included."""
        self._keep(0)
        seconds = self._append(ids)
        self.cached = ids
        return {"seconds": seconds, "tokens": len(ids)}

    def decode_at(self, ids: list[int], context: int, tokens: int) -> dict[str, Any]:
        """Seconds for `tokens` tokens behind the first `context` of ids, one at a time, logits for each."""
        lib, model = self.lib, self.model.ctx
        kept = common_prefix(self.cached, ids[:context])
        self._keep(kept)
        if kept < context:
            self._append(ids[kept:context])
        token = (lib.llama_token * tokens)(*ids[context : context + tokens])
        step = ctypes.sizeof(lib.llama_token)
        singles = [
            lib.llama_batch_get_one((lib.llama_token * 1).from_buffer(token, i * step), 1) for i in range(tokens)
        ]
        started = time.perf_counter()
        for single in singles:
            if lib.llama_decode(model, single):
                raise ValueError("llama_decode failed")
            lib.llama_get_logits_ith(model, -1)  # waits for the computation
        seconds = time.perf_counter() - started
        self.cached = ids[: context + tokens]
        return {"seconds": seconds, "tokens": tokens}

    def _keep(self, count: int) -> None:
        """Forgets all but the first tokens."""
        lib = self.lib
        if count == 0:
            lib.llama_memory_clear(lib.llama_get_memory(self.model.ctx), True)
        elif not lib.llama_memory_seq_rm(lib.llama_get_memory(self.model.ctx), 0, count, -1):
            raise ValueError("llama_memory_seq_rm failed")

    def _append(self, ids: list[int]) -> float:
        """Seconds for these tokens behind what is there."""
        lib, model = self.lib, self.model.ctx
        parts = [(lib.llama_token * len(p))(*p) for p in (ids[i : i + BATCH] for i in range(0, len(ids), BATCH))]
        started = time.perf_counter()
        for part in parts:
            if lib.llama_decode(model, lib.llama_batch_get_one(part, len(part))):
                raise ValueError("llama_decode failed on the prompt")
        lib.llama_get_logits_ith(model, -1)
        return time.perf_counter() - started


class Lowtide(worker.Lowtide):
    """lowtide's native engine: all budgets in one process, each with a controller of its own that keeps running."""

    def open(  # type: ignore[override]
        self,
        path: str,
        threads: int,
        context: int,
        isa: str | None,
        policy: str | None,
        cache_bits: int,
        head: str = "once",
    ) -> dict[str, Any]:
        import lowtide
        from lowtide.format.reader import open_artifact
        from lowtide.kernels.native import Engine
        from lowtide.runtime.budget import parse_head

        self.artifact, self.policy, self.head = open_artifact(path), policy, parse_head(head)
        self.engine = Engine(self.artifact, threads=threads, isa=isa, max_context=context, cache_bits=cache_bits)
        self.controllers: dict[float | str, Any] = {}
        self.cached: list[int] = []
        return {"version": lowtide.__version__, "isa": self.engine.isa, "vocab": self.engine.vocab_size}

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        """Seconds for a text from an empty cache, the last token's logits included."""
        started = time.perf_counter()
        self.engine.prefill(ids, 0)
        seconds = time.perf_counter() - started
        self.cached = ids
        return {"seconds": seconds, "tokens": len(ids)}

    def decode_at(
        self, ids: list[int], context: int, tokens: int, bits: float | str, logits: bool = True
    ) -> dict[str, Any]:
        """Seconds for `tokens` tokens behind the first `context` of ids, one at a time, budget control included.

        bits is a budget, "dense", or "nothing", which reads no slice at all.
        """
        kept = common_prefix(self.cached, ids[:context])
        if kept < context:
            self.engine.prefill(ids[kept:context], kept)
        controller = self._controller(bits)
        read = body = 0
        started = time.perf_counter()
        for place in range(context, context + tokens):
            _, stats = self.engine.decode(ids[place], place, controller.params, logits)
            controller.update(stats.body_bits)
            read += stats.bytes_read
            body += stats.body_bits
        seconds = time.perf_counter() - started
        self.cached = ids[: context + tokens]
        mean = controller.per_weight(body / tokens)
        return {"seconds": seconds, "tokens": tokens, "bytes_read": read, "bits_read_body": mean}

    def bandwidth(self) -> dict[str, Any]:
        """Bytes per second that the engine's threads read from memory at best."""
        return {"bytes_per_second": self.engine.read_bandwidth()}

    def _controller(self, bits: float | str) -> Any:
        from lowtide.kernels.types import PolicyParams
        from lowtide.runtime.budget import BudgetController, body_side_bits, body_weights, policy_params

        if bits not in self.controllers:
            weights = body_weights(self.artifact)
            if bits == "nothing":
                import numpy as np

                shape = policy_params(self.artifact, None, None).thresholds.shape
                self.controllers[bits] = BudgetController(
                    PolicyParams("channel-norm", np.full(shape, np.inf, np.float32)), None, weights
                )
            else:
                target = None if bits == "dense" else float(bits)
                # a budget below the grid begins at its lowest point; the controller goes on from there
                known = target and max(target, self.artifact.manifest.budgets[0])
                params = policy_params(self.artifact, self.policy, known, self.head)
                side = body_side_bits(self.artifact, params.rule)
                self.controllers[bits] = BudgetController(params, target, weights, side)
        return self.controllers[bits]


if __name__ == "__main__":
    sys.exit(worker.main({"llama": Llama, "lowtide": Lowtide}))
