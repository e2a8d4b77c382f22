"""`config.json` of an artifact: the model's Hugging Face config and a mark that tells loaders what the weights are."""

from __future__ import annotations

import json

from lowtide.arch import ModelConfig
from lowtide.errors import LowtideError
from lowtide.format.manifest import FORMAT_VERSION
from lowtide.format.strictjson import parse_object, short

QUANT_METHOD = "lowtide"


def encode_config(config: ModelConfig, version: int = FORMAT_VERSION) -> bytes:
    """Bytes of `config.json`; version: the manifest's format version."""
    body = config.to_hf()
    body["quantization_config"] = {"quant_method": QUANT_METHOD, "format_version": version}
    return (json.dumps(body, indent=2, allow_nan=False) + "\n").encode()


def check_config(data: bytes, config: ModelConfig, where: str, version: int = FORMAT_VERSION) -> None:
    """`config.json` must describe the manifest's model and carry the mark of the manifest's format version.

    Raises:
        LowtideError: it does not.
    """
    body = parse_object(data, where)
    mark = body.get("quantization_config")
    if mark != {"quant_method": QUANT_METHOD, "format_version": version}:
        raise LowtideError(f"{where}: quantization_config {short(mark)} is not that of lowtide format {version}")
    if ModelConfig.from_hf(body, where) != config:
        raise LowtideError(f"{where}: describes another model than the manifest")
