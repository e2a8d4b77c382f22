"""Talking to `worker.py`, and llama.cpp's side of the comparisons: files, sizes, logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.arch import ARCHITECTURES, group_specs, norm_specs
from lowtide.compress.sources import Source
from lowtide.errors import LowtideError

WORKER = Path(__file__).with_name("worker.py")


def environment_of(python: str | None) -> dict[str, str] | None:
    """Environment for an interpreter: PYTHONPATH goes along only to this same one, another has its own packages."""
    return None if python is None else {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


class Worker:
    """A running `worker.py`; calling it sends a request and waits for the reply.

    Args:
        kind: "llama" or "lowtide".
        python: the interpreter that has the engine's package; this one by default.
        script: another worker that speaks the same protocol.

    Raises (also from calls):
        LowtideError: the worker died or reports an error.
    """

    def __init__(self, kind: str, python: str | None = None, script: Path = WORKER) -> None:
        self.kind = kind
        self._process = subprocess.Popen(
            [python or sys.executable, str(script), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if kind == "llama" else None,  # llama.cpp talks a lot
            text=True,
            env=environment_of(python),
        )

    def __call__(self, do: str, **request: Any) -> dict[str, Any]:
        """One request, e.g. worker("decode", ids=[...], prompt=8)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do} | request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise LowtideError(f"the {self.kind} worker ended with code {self._process.wait()} during {do}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise LowtideError(f"{self.kind} worker, {do}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_f16_gguf(source: Source, path: Path) -> None:
    """The model as an F16 GGUF without a tokenizer, for llama.cpp; token ids go in and logits come out."""
    import gguf

    config = source.config
    architecture = ARCHITECTURES[config.architecture]
    writer = gguf.GGUFWriter(path, architecture.gguf_name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    present = {name for name, _ in norm_specs(config)}
    for theirs, ours in architecture.gguf_tensor_map(config.num_layers).items():
        if ours not in present and not source.has(ours) or (config.tied and ours == "lm_head.weight"):
            continue
        values = source.tensor(ours).numpy()
        if architecture.gguf_permuted and ours.endswith(("q_proj.weight", "k_proj.weight")):
            values = _interleave(values, config.head_dim)
        writer.add_tensor(theirs, values.astype(np.float16 if values.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(weight: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows of q or k from half rotation to the interleaved rotation of GGUF's llama."""
    heads = weight.shape[0] // head_dim
    split = weight.reshape(heads, 2, head_dim // 2, weight.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def gguf_bits(path: Path, source: Source) -> tuple[float, float]:
    """Bits per weight that a GGUF stores: (of the decoder's linear layers, of all matrices, tied ones once)."""
    import gguf

    names = ARCHITECTURES[source.config.architecture].gguf_tensor_map(source.config.num_layers)
    size = {names[t.name]: 8 * int(t.n_bytes) for t in gguf.GGUFReader(path).tensors if t.name in names}
    body_bits = body = all_bits = total = 0
    for spec in group_specs(source.config):
        for linear in spec.linears:
            used = size[f"{linear.name}.weight"]
            all_bits, total = all_bits + used, total + linear.weights
            if spec.is_body:
                body_bits, body = body_bits + used, body + linear.weights
    return body_bits / body, all_bits / total


def is_f16_gguf(path: str | Path) -> bool:
    """Whether this is a GGUF file whose matrices are all F16 or F32, from which llama.cpp may quantise."""
    import gguf

    if not Path(path).is_file():
        return False
    kinds = {t.tensor_type for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2}
    return kinds <= {gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32}
