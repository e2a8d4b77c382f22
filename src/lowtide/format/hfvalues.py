"""A Hugging Face `config.json` and the numbers of a `ModelConfig`: one read from the other, in both directions.

transformers 4 and 5 write the rotary base in different places; both are read and both are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowtide.errors import LowtideError
from lowtide.format.strictjson import short

if TYPE_CHECKING:
    from lowtide.arch import Architecture, ModelConfig


def class_name(config: Mapping[str, Any], where: str) -> object:
    """The one entry of `architectures`.

    Raises:
        LowtideError: config is no object, or lists none or several.
    """
    if not isinstance(config, Mapping):
        raise LowtideError(f"{where}: not a JSON object")
    names = config.get("architectures")
    if not isinstance(names, (list, tuple)) or len(names) != 1:
        raise LowtideError(f"{where}: 'architectures' must list one name, not {short(names)}")
    return names[0]


def read(config: Mapping[str, Any], architecture: Architecture, where: str) -> dict[str, Any]:
    """Every field of `ModelConfig` but architecture and qkv_bias, which the architecture decides.

    Numbers are numbers; whether they are in range is `ModelConfig`'s business.

    Args:
        config: the parsed file.
        architecture: what its class name stands for.
        where: its name, for errors.

    Raises:
        LowtideError: a number is missing, or a feature is not supported.
    """
    _refuse_unsupported(config, architecture, where)
    heads = _number(config, "num_attention_heads", where)
    hidden = _number(config, "hidden_size", where)
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise LowtideError(f"{where}: num_attention_heads and hidden_size must be whole numbers above zero")
    eos = config.get("eos_token_id")
    if not isinstance(eos, list):
        eos = [] if eos is None else [eos]
    return {
        "vocab_size": _number(config, "vocab_size", where),
        "hidden_size": hidden,
        "intermediate_size": _number(config, "intermediate_size", where),
        "num_layers": _number(config, "num_hidden_layers", where),
        "num_heads": heads,
        "num_kv_heads": _number(config, "num_key_value_heads", where, default=heads),
        "head_dim": _number(config, "head_dim", where, default=hidden // heads),
        "rms_eps": float(_number(config, "rms_norm_eps", where, default=1e-6)),
        "rope_theta": _rope_theta(config, architecture, where),
        "max_position": _number(config, "max_position_embeddings", where, default=2048),
        "tied": config.get("tie_word_embeddings", False),
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": tuple(eos),
    }


def write(config: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    """The `config.json` of this model, readable by transformers 4 and 5 and by `read`."""
    eos = list(config.eos_token_ids)
    return {
        "architectures": [architecture.hf_names[0]],
        "model_type": architecture.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
    }


def _number(config: Mapping[str, Any], key: str, where: str, default: Any = None) -> Any:
    """A number of the config; absent or null falls back to the default. Ranges are ModelConfig's business."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1e30 < value < 1e30:
        raise LowtideError(f"{where}: '{key}' must be a number, not {short(value)}")
    return value


def _refuse_unsupported(config: Mapping[str, Any], architecture: Architecture, where: str) -> None:
    """Features that would change what the decoder computes and that lowtide does not have."""
    for key in architecture.refused:
        if config.get(key):
            raise LowtideError(f"{where}: {key} = {short(config[key])} is not supported for {architecture.name}")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise LowtideError(f"{where}: hidden_act {short(activation)} is not supported; only silu is")


def _rope_theta(config: Mapping[str, Any], architecture: Architecture, where: str) -> float:
    """The rotary base from `rope_parameters` (transformers 5) or `rope_theta` (4); scaling is refused by its name."""
    nested: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = config.get(key)
        if part is None:
            continue
        if not isinstance(part, Mapping):
            raise LowtideError(f"{where}: '{key}' must be an object, not {short(part)}")
        kind = part.get("rope_type", part.get("type", "default"))
        if kind != "default":
            raise LowtideError(f"{where}: {key} of type {short(kind)} is not supported; only 'default' is")
        nested.update(part)
    values = {float(_number(d, "rope_theta", where)) for d in (config, nested) if d.get("rope_theta") is not None}
    if len(values) > 1:
        raise LowtideError(f"{where}: rope_theta has two values, {sorted(values)}; keep the right one")
    return values.pop() if values else architecture.default_rope_theta
