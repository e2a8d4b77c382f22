"""Models as Hugging Face folders: config.json, one or many safetensors files, tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lowtide.arch import ModelConfig
from lowtide.compress.sources.base import expected_shapes, weights_fingerprint
from lowtide.errors import LowtideError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
CHAT_TEMPLATE = "chat_template.jinja"
HUB_PATTERNS = ("*.json", "*.safetensors", CHAT_TEMPLATE)


def download(repo: str) -> Path:
    """Fetch `org/name` from the Hugging Face hub (or its cache) and return the local folder."""
    try:
        import huggingface_hub
    except ImportError:
        advice = "needs huggingface_hub; pip install 'lowtide[compress]'"
        raise LowtideError(f"{repo}: no such folder here, and fetching it from the hub {advice}") from None
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # the hub client raises dozens of kinds, all mean that the model is not to be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LowtideError(f"{repo}: no such folder here, and the Hugging Face hub says: {reason}") from None


class HuggingFaceSource:
    """A folder in Hugging Face's layout."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.resolve().name
        self.config = ModelConfig.from_hf(_read_json(path / "config.json"), str(path / "config.json"))
        self._files = self._weight_files()
        self._check_tensors()

    def _weight_files(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that holds it."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise LowtideError(f"{index}: no 'weight_map'; fetch the model again")
            names = sorted({str(v) for v in weight_map.values()})
            if any(Path(n).name != n for n in names):
                raise LowtideError(f"{index}: names files outside its folder")
            files = [self.path / n for n in names]
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise LowtideError(f"{self.path}: no .safetensors file; lowtide reads no other weight files of a folder")
        found: dict[str, Path] = {}
        for file in files:
            with _open(file) as tensors:
                found.update(dict.fromkeys(tensors.keys(), file))
        return found

    def _check_tensors(self) -> None:
        for name, shape in expected_shapes(self.config).items():
            if name not in self._files:
                raise LowtideError(f"{self.path}: tensor {name} is missing; the model is incomplete")
            with _open(self._files[name]) as tensors:
                there = tuple(tensors.get_slice(name).get_shape())
            if there != shape:
                file = self._files[name]
                raise LowtideError(f"{file}: tensor {name} has shape {list(there)}, config.json says {list(shape)}")

    def has(self, tensor: str) -> bool:
        """Whether the folder has that tensor."""
        return tensor in self._files

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as float32."""
        value = self._raw(name)
        if not value.is_floating_point():
            file = self._files[name]
            raise LowtideError(f"{file}: tensor {name} has type {value.dtype}; lowtide needs float weights")
        value = value.float()
        if not torch.isfinite(value).all():
            raise LowtideError(f"{self._files[name]}: tensor {name} holds NaN or infinity; the model is damaged")
        return value

    def _raw(self, name: str) -> torch.Tensor:
        if name not in self._files:
            raise LowtideError(f"{self.path}: tensor {name} is missing; the model is incomplete")
        with _open(self._files[name]) as tensors:
            value: torch.Tensor = tensors.get_tensor(name)
        return value

    def stored(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor's bytes, u8 [n]."""
        return self._raw(name).contiguous().flatten().view(torch.uint8).numpy()

    def fingerprint(self) -> str:
        """SHA-256 over all weights as stored."""
        return weights_fingerprint(self)

    def tokenizer_files(self) -> dict[str, bytes]:
        """The folder's tokenizer files; a chat template in a file of its own is moved into tokenizer_config.json."""
        if not (self.path / "tokenizer.json").is_file():
            raise LowtideError(f"{self.path}: tokenizer.json is missing; save the model with its fast tokenizer")
        files = {n: (self.path / n).read_bytes() for n in TOKENIZER_FILES if (self.path / n).is_file()}
        template = self.path / CHAT_TEMPLATE
        if template.is_file():
            config = _read_json(self.path / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
            config.setdefault("chat_template", template.read_text(encoding="utf-8"))
            files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode()
        return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise LowtideError(f"{file}: not a readable safetensors file ({error}); fetch it again") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise LowtideError(f"{file}: missing; a Hugging Face model folder has one") from None
    except (OSError, ValueError) as error:
        raise LowtideError(f"{file}: not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise LowtideError(f"{file}: not a JSON object")
    return value
