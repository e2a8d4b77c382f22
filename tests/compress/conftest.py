"""Small random source models: tensors in memory, as Hugging Face folders and as GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.tiny import Tiny, make_tokenizer

from lowtide.arch import ARCHITECTURES, GGUF_KEYS, ModelConfig
from lowtide.compress.sources import Source, open_source
from lowtide.compress.sources.base import expected_shapes

Tensors = dict[str, np.ndarray[Any, Any]]
SMALL = Tiny(hidden=48, intermediate=80, layers=2, heads=4, kv_heads=2, head_dim=12, vocab=130, max_position=32)


def random_tensors(config: ModelConfig, seed: int = 0) -> Tensors:
    """Weights of variance 1 / in, norms around 1, biases around 0; f32."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 2:
            values = rng.normal(0, shape[1] ** -0.5, shape)
        else:
            values = rng.normal(0.0 if name.endswith("bias") else 1.0, 0.1, shape)
        tensors[name] = values.astype(np.float32)
    return tensors


@dataclass(frozen=True)
class SmallModel:
    """A random model and where it lies as a Hugging Face folder."""

    config: ModelConfig
    tensors: Tensors
    folder: Path

    def source(self) -> Source:
        return open_source(self.folder)


@pytest.fixture
def small_model(tmp_path: Path) -> Callable[..., SmallModel]:
    """`small_model(tied=False, qkv_bias=True, ...)`: keywords of `support.tiny.Tiny`."""

    def make(folder: str = "model", seed: int = 0, **options: Any) -> SmallModel:
        tiny = Tiny(**{**SMALL.__dict__, **options})
        config = tiny.config()
        tensors = random_tensors(config, seed)
        path = tmp_path / folder
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config.to_hf()))
        for name, data in make_tokenizer(tiny.vocab).items():
            (path / name).write_bytes(data)
        return SmallModel(config, tensors, path)

    return make


GPT2_TOKENS = ["<|endoftext|>", "<|im_start|>", *(chr(c) for c in range(33, 127)), "Ġ", "Ċ", "th", "Ġth", "12"]
GPT2_MERGES = ["t h", "Ġ th", "1 2"]


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model as a GGUF file, q and k permuted as llama.cpp's converter does."""

    def write(
        model: SmallModel,
        name: str = "model.gguf",
        arch: str | None = None,
        quantise: dict[str, gguf.GGMLQuantizationType] | None = None,
        extra: Tensors | None = None,
        skip: tuple[str, ...] = (),
        tokenizer: bool = True,
    ) -> Path:
        config = model.config
        architecture = ARCHITECTURES[config.architecture]
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, arch or architecture.gguf_name)
        for field, key in GGUF_KEYS.items():
            value = getattr(config, field, None)
            key = key.format(arch=architecture.gguf_name)
            if isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
        if tokenizer:
            add_tokenizer(writer, config.vocab_size)
        to_gguf = {hf: theirs for theirs, hf in architecture.gguf_tensor_map(config.num_layers).items()}
        for hf, values in model.tensors.items():
            if to_gguf[hf] in skip:
                continue
            values = permuted(hf, values, config) if architecture.gguf_permuted else values
            kind = (quantise or {}).get(hf)
            if kind is None:
                writer.add_tensor(to_gguf[hf], values)
            else:
                writer.add_tensor(to_gguf[hf], gguf.quants.quantize(values, kind), raw_dtype=kind)
        for key, values in (extra or {}).items():
            writer.add_tensor(key, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """Byte-level BPE over ASCII with three merges, padded to `vocab` tokens."""
    tokens = GPT2_TOKENS + [f"<extra_{i}>" for i in range(vocab - len(GPT2_TOKENS))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(GPT2_MERGES)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")


def permuted(name: str, values: np.ndarray[Any, Any], config: ModelConfig) -> np.ndarray[Any, Any]:
    """llama.cpp's `permute`: half rotation to interleaved pairs."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return values
    heads = config.num_heads if "q_proj" in name else config.num_kv_heads
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape).copy()
