"""Models in one .gguf file, read through the `gguf` package and dequantised tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from lowtide.arch import Architecture, ModelConfig, architecture_from_gguf
from lowtide.compress.sources.base import expected_shapes, weights_fingerprint
from lowtide.compress.sources.gguf_tokenizer import tokenizer_files
from lowtide.errors import LowtideError

SUPPORTED_TYPES = frozenset("F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split())
IGNORED_TENSORS = frozenset({"rope_freqs.weight"})
"""Tensors that say nothing new when the config has no RoPE scaling; refused when they are not all ones."""


class GGUFSource:
    """A GGUF file of a known architecture."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self._reader = _open(path)
        arch = architecture_from_gguf(self._field("general.architecture"), str(path))
        self._tensors = {t.name: t for t in self._reader.tensors}
        self._check_types()
        self.config = self._config(arch)
        self._to_gguf = {hf: theirs for theirs, hf in arch.gguf_tensor_map(self.config.num_layers).items()}
        self._permuted = arch.gguf_permuted
        self._check_tensors()

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def _config(self, arch: Architecture) -> ModelConfig:
        def number(name: str, default: Any = None) -> Any:
            value = self._field(arch.gguf_key(name), default)
            if value is None:
                raise LowtideError(f"{self.path}: GGUF key {arch.gguf_key(name)} is missing")
            if not isinstance(value, (int, float)):
                raise LowtideError(f"{self.path}: GGUF key {arch.gguf_key(name)} must be one number")
            return value

        scaling = self._field(arch.gguf_key("rope_scaling"), "none")
        if scaling != "none":
            raise LowtideError(f"{self.path}: RoPE scaling {scaling!r} is not supported")
        heads, hidden = number("num_heads"), number("hidden_size")
        tokens = self._field("tokenizer.ggml.tokens")
        if tokens is None:
            raise LowtideError(f"{self.path}: the tokenizer is missing (no GGUF key tokenizer.ggml.tokens)")
        eos = self._field(arch.gguf_key("eos_token_id"))
        try:
            return ModelConfig(
                architecture=arch.name,
                vocab_size=self._embedding_rows(len(tokens)),
                hidden_size=hidden,
                intermediate_size=number("intermediate_size"),
                num_layers=number("num_layers"),
                num_heads=heads,
                num_kv_heads=number("num_kv_heads", heads),
                head_dim=number("head_dim", hidden // max(int(heads), 1)),
                rms_eps=float(number("rms_eps")),
                rope_theta=float(number("rope_theta", arch.default_rope_theta)),
                max_position=number("max_position"),
                tied="output.weight" not in self._tensors,
                qkv_bias=arch.qkv_bias,
                bos_token_id=self._field(arch.gguf_key("bos_token_id")),
                eos_token_ids=() if eos is None else (eos,),
            )
        except LowtideError as error:
            raise LowtideError(f"{self.path}: {error}") from None

    def _embedding_rows(self, default: int) -> int:
        # some files pad the embedding beyond the tokenizer's list; its rows are what the head answers with
        embedding = self._tensors.get("token_embd.weight")
        return default if embedding is None else int(embedding.shape[-1])

    def _check_types(self) -> None:
        for name, tensor in self._tensors.items():
            if tensor.tensor_type.name not in SUPPORTED_TYPES:
                kind, known = tensor.tensor_type.name, ", ".join(sorted(SUPPORTED_TYPES))
                raise LowtideError(f"{self.path}: tensor {name} has unsupported type {kind}; known: {known}")

    def _check_tensors(self) -> None:
        shapes = expected_shapes(self.config)
        for name, shape in shapes.items():
            tensor = self._tensors.get(self._to_gguf[name])
            if tensor is None:
                raise LowtideError(f"{self.path}: tensor {self._to_gguf[name]} is missing; the model is incomplete")
            there = tuple(int(d) for d in tensor.shape[::-1])
            if there != shape:
                raise LowtideError(f"{self.path}: tensor {tensor.name} has shape {list(there)}, expected {list(shape)}")
        wanted = {self._to_gguf[name] for name in shapes}
        for name in self._tensors:
            if name in IGNORED_TENSORS and np.all(self._tensors[name].data == 1):
                continue
            if name not in wanted:
                raise LowtideError(f"{self.path}: tensor {name} is not part of architecture {self.config.architecture}")

    def has(self, tensor: str) -> bool:
        """Whether the file has that tensor (Hugging Face name)."""
        return self._to_gguf.get(tensor) in self._tensors

    def _stored(self, name: str) -> Any:
        theirs = self._to_gguf.get(name, name)
        if theirs not in self._tensors:
            raise LowtideError(f"{self.path}: tensor {theirs} is missing; the model is incomplete")
        return self._tensors[theirs]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, dequantised to float32, rows of q and k in Hugging Face's order."""
        stored = self._stored(name)
        values = np.asarray(gguf.quants.dequantize(stored.data, stored.tensor_type), np.float32)
        value = torch.from_numpy(np.array(values.reshape([int(d) for d in stored.shape[::-1]])))
        if not torch.isfinite(value).all():
            raise LowtideError(f"{self.path}: tensor {stored.name} holds NaN or infinity; the model is damaged")
        if self._permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = unpermute(value, self.config.num_heads if "q_proj" in name else self.config.num_kv_heads)
        return value

    def stored(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor's bytes, u8 [n]."""
        return np.ascontiguousarray(self._stored(name).data).reshape(-1).view(np.uint8)

    def fingerprint(self) -> str:
        """SHA-256 over all weights as stored."""
        return weights_fingerprint(self)

    def tokenizer_files(self) -> dict[str, bytes]:
        """tokenizer.json, tokenizer_config.json and generation_config.json made from the file's metadata."""
        return tokenizer_files(self._field, self.config, str(self.path))


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from GGUF's interleaved rotary order to half rotation; [heads * head_dim, in] or its bias."""
    rest = weight.shape[1:]
    return weight.reshape(heads, -1, 2, *rest).transpose(1, 2).reshape(weight.shape).contiguous()


def _open(path: Path) -> gguf.GGUFReader:
    try:
        if path.stat().st_size == 0:
            raise LowtideError(f"{path}: the file is empty")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise LowtideError(f"{path}: not a GGUF file")
        return gguf.GGUFReader(str(path))
    except LowtideError:
        raise
    except Exception as error:  # the reader lets whatever a damaged file provokes through
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LowtideError(f"{path}: not a readable GGUF file ({reason}); of an unknown type or cut short?") from None
