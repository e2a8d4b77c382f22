"""The worker of `engines.py` for OpenVINO: a GGUF made into its int8 or int4 form, then logits, prefill and decode.

    python openvino_worker.py openvino    needs openvino-genai and nncf, nothing of lowtide

Requests: convert, open, logits, prefill, decode_at, as those of `speed_worker.py`. Settings of the runtime are its own
defaults for latency; int4 weights are NNCF's, by default with AWQ and scale estimation on calibration text.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import worker


def inputs(ids: list[int], past: int) -> dict[str, Any]:
    """What the model takes for tokens behind `past` others, one sequence."""
    count = len(ids)
    return {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, past + count), np.int64),
        "position_ids": np.arange(past, past + count)[None],
        "beam_idx": np.zeros(1, np.int32),
    }


class OpenVino:
    """OpenVINO's CPU plugin on one compiled model, its keys and values held in its state."""

    def convert(self, gguf: str, path: str, mode: str, calibration: list[list[int]]) -> dict[str, Any]:
        """Write `path` (.xml, with a .bin beside it) from an F16 GGUF.

        mode: "int8", or "int4-G" with groups of G inputs; calibration: windows of ids, none for rounding to nearest.
        """
        import nncf  # type: ignore[import-not-found]
        import openvino  # type: ignore[import-not-found]
        import openvino_genai  # type: ignore[import-not-found]

        with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
            link = Path(folder) / "model.gguf"
            link.symlink_to(Path(gguf).absolute())
            openvino_genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
            model = openvino.Core().read_model(Path(folder) / "openvino_model.xml")
            kind, _, group = mode.partition("-")
            if kind == "int8":
                small = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
            else:
                tuned: dict[str, Any] = {}
                if calibration:
                    data = nncf.Dataset([inputs(ids, 0) for ids in calibration])
                    tuned = {"dataset": data, "awq": True, "scale_estimation": True}
                small = nncf.compress_weights(
                    model, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=int(group), ratio=1.0, **tuned
                )
            openvino.save_model(small, path)
        return {"bytes": os.path.getsize(Path(path).with_suffix(".bin"))}

    def open(self, path: str, threads: int, context: int) -> dict[str, Any]:
        """Compile the model; `context` is of no account, the state grows."""
        import openvino

        wanted = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.Core().compile_model(path, "CPU", wanted)
        self.request = compiled.create_infer_request()
        self.cached: list[int] = []
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        versions = (importlib.metadata.version(name) for name in ("openvino", "nncf"))
        return {"version": " / ".join(versions), "precision": precision}

    def logits(self, ids: list[int], out: str) -> dict[str, Any]:
        """Logits after every token of one window, saved as f32 [n, V]."""
        self.prefill(ids)
        np.save(out, self.request.get_output_tensor(0).data[0].astype(np.float32))
        return {}

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        """Seconds for a text from an empty state; the model as it is converted gives every token's logits."""
        self.request.reset_state()
        started = time.perf_counter()
        self.request.infer(inputs(ids, 0))
        seconds = time.perf_counter() - started
        self.cached = ids
        return {"seconds": seconds, "tokens": len(ids)}

    def decode_at(self, ids: list[int], context: int, tokens: int) -> dict[str, Any]:
        """Seconds for `tokens` tokens behind the first `context` of ids, one at a time, logits for each."""
        if self.cached != ids[:context]:  # a state cannot be cut
            self.prefill(ids[:context])
        each = [inputs(ids[place : place + 1], place) for place in range(context, context + tokens)]
        started = time.perf_counter()
        for step in each:
            self.request.infer(step)
        seconds = time.perf_counter() - started
        self.cached = ids[: context + tokens]
        return {"seconds": seconds, "tokens": tokens}


if __name__ == "__main__":
    sys.exit(worker.main({"openvino": OpenVino}))
