"""One engine in a process of its own, driven by JSON lines: {"do": ..., ...} on stdin, one reply line on stdout.

    python worker.py llama      needs llama-cpp-python and numpy, nothing of lowtide
    python worker.py lowtide    needs lowtide

Separate processes keep the engines' threads, memory and Python environments apart; only one works at a time.
Requests: open, decode; llama also logits and quantise. Errors come back as {"error": one line}.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

# llama.cpp's numbers for file types
FILE_TYPES = {
    "Q8_0": 7,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q4_0": 2,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
}


class Llama:
    """llama.cpp through llama-cpp-python's low-level calls: in the timed loop Python does nothing but call."""

    def open(self, path: str, threads: int, context: int, all_logits: bool = False) -> dict[str, Any]:
        import llama_cpp  # type: ignore[import-not-found]

        self.lib = llama_cpp
        self.model = llama_cpp.Llama(
            path,
            n_ctx=context,
            n_batch=context,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=all_logits,
            verbose=False,
        )
        return {"version": llama_cpp.__version__, "vocab": self.model.n_vocab()}

    def quantise(self, source: str, path: str, kind: str, threads: int) -> dict[str, Any]:
        """Quantise an F16 GGUF."""
        import llama_cpp

        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.nthread = FILE_TYPES[kind], threads
        if llama_cpp.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(options)):
            raise ValueError(f"llama.cpp could not quantise {source} to {kind}")
        return {"bytes": os.path.getsize(path)}

    def logits(self, ids: list[int], out: str) -> dict[str, Any]:
        """Logits after every token of one window, saved as f32 [n, V]."""
        import numpy as np

        self.model.reset()
        self.model.eval(ids)
        np.save(out, np.asarray(self.model.scores[: len(ids)], dtype=np.float32))
        return {}

    def decode(self, ids: list[int], prompt: int) -> dict[str, Any]:
        """Seconds for the tokens after the prompt, one at a time, logits computed for each."""
        lib, context = self.lib, self.model.ctx
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        token = (lib.llama_token * len(ids))(*ids)
        step = ctypes.sizeof(lib.llama_token)
        if prompt and lib.llama_decode(context, lib.llama_batch_get_one(token, prompt)):
            raise ValueError("llama_decode failed on the prompt")
        singles = [
            lib.llama_batch_get_one((lib.llama_token * 1).from_buffer(token, i * step), 1)
            for i in range(prompt, len(ids))
        ]
        started = time.perf_counter()
        for single in singles:
            if lib.llama_decode(context, single):
                raise ValueError("llama_decode failed")
            lib.llama_get_logits_ith(context, -1)  # waits for the computation
        return {"seconds": time.perf_counter() - started, "tokens": len(singles)}


class Lowtide:
    """lowtide's native engine with its budget controller."""

    def open(
        self, path: str, threads: int, context: int, bits: float | None, policy: str | None = None
    ) -> dict[str, Any]:
        import lowtide
        from lowtide.format.reader import open_artifact
        from lowtide.kernels.native import Engine
        from lowtide.runtime.budget import BudgetController, body_side_bits, body_weights, policy_params

        artifact = open_artifact(path)
        self.engine = Engine(artifact, threads=threads, max_context=context)
        params = policy_params(artifact, policy, bits)
        self.controller = BudgetController(params, bits, body_weights(artifact), body_side_bits(artifact))
        return {"version": lowtide.__version__, "vocab": self.engine.vocab_size, "isa": self.engine.isa}

    def decode(self, ids: list[int], prompt: int) -> dict[str, Any]:
        """Seconds for the tokens after the prompt, one at a time, logits and budget control included."""
        if prompt:
            self.engine.prefill(ids[:prompt], 0)
        read = bits = 0
        started = time.perf_counter()
        for place in range(prompt, len(ids)):
            _, stats = self.engine.decode(ids[place], place, self.controller.params)
            self.controller.update(stats.body_bits)
            read += stats.bytes_read
            bits += stats.body_bits
        return {
            "seconds": time.perf_counter() - started,
            "tokens": len(ids) - prompt,
            "bytes_read": read,
            "body_bits": bits,
            "mean_bits": self.controller.mean_bits,
        }


def main(kinds: dict[str, type] | None = None) -> int:
    """Serves requests to the engine that argv names."""
    engine = (kinds or {"llama": Llama, "lowtide": Lowtide})[sys.argv[1]]()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the replies
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(engine, request.pop("do"))(**request)
        except Exception as error:  # the parent decides what to do about it
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(reply), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
