"""The declarative table of architectures and the config read from Hugging Face files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.tiny import Tiny

from lowtide.arch import (
    ARCHITECTURES,
    GGUF_KEYS,
    ModelConfig,
    architecture_from_gguf,
    group_specs,
    norm_specs,
)
from lowtide.errors import LowtideError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
}


def test_reads_transformers_4_and_5() -> None:
    four = ModelConfig.from_hf(LLAMA | {"rope_theta": 5e5}, "config.json")
    five = ModelConfig.from_hf(LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "config.json")
    assert four == five
    assert (four.rope_theta, four.head_dim, four.num_kv_heads, four.tied) == (5e5, 48, 6, False)
    assert ModelConfig.from_hf(LLAMA, "config.json").rope_theta == 10000.0


@pytest.mark.parametrize("tiny", [Tiny(), Tiny(tied=False), Tiny(qkv_bias=True)])
def test_to_hf_and_back(tiny: Tiny) -> None:
    config = tiny.config()
    assert ModelConfig.from_hf(config.to_hf(), "config.json") == config
    several = replace(config, eos_token_ids=(2, 5), bos_token_id=None)
    assert ModelConfig.from_hf(several.to_hf(), "config.json") == several
    none = replace(config, eos_token_ids=())
    assert ModelConfig.from_hf(none.to_hf(), "config.json") == none


@pytest.mark.parametrize(
    "change,message",
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM'; known ones: LlamaForCausalLM, Qwen2ForCausalLM"),
        ({"architectures": []}, "'architectures' must list one name"),
        ({"architectures": None}, "'architectures' must list one name"),
        ({"hidden_size": None}, "'hidden_size' must be a number"),
        ({"hidden_size": 288.0}, "whole numbers"),
        ({"num_attention_heads": 0}, "above zero"),
        ({"vocab_size": "many"}, "'vocab_size' must be a number"),
        ({"vocab_size": 10**400}, "'vocab_size' must be a number"),
        ({"vocab_size": -1}, "vocab_size must be"),
        ({"num_hidden_layers": 10**9}, "num_layers must be a whole number from 1 to 1024"),
        ({"hidden_size": 1 << 40}, "hidden_size must be"),
        ({"num_key_value_heads": 4}, "no multiple of num_kv_heads 4"),
        ({"head_dim": 47}, "head_dim 47 is odd"),
        ({"head_dim": 1 << 23}, "num_heads \\* head_dim"),
        ({"rms_norm_eps": 0}, "rms_eps must be"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a number"),
        ({"tie_word_embeddings": 1}, "tied must be true or false"),
        ({"eos_token_id": 32000}, "eos_token_id must be"),
        ({"bos_token_id": True}, "bos_token_id must be"),
        ({"attention_bias": True}, "attention_bias = True is not supported for llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling of type 'llama3' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters of type 'yarn' is not supported"),
        ({"rope_parameters": 7}, "'rope_parameters' must be an object"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta has two values"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LowtideError, match=f"^some/config.json: .*{message}") as error:
        ModelConfig.from_hf(LLAMA | change, "some/config.json")
    assert "\n" not in str(error.value)


def test_qwen2_sliding_window_is_refused_and_llama_ignores_it() -> None:
    qwen = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
    assert ModelConfig.from_hf(qwen | {"use_sliding_window": False}, "c").qkv_bias
    with pytest.raises(LowtideError, match="use_sliding_window = True is not supported for qwen2"):
        ModelConfig.from_hf(qwen | {"use_sliding_window": True}, "c")


def test_groups_cover_every_linear_once_in_order() -> None:
    config = Tiny(tied=False).config()
    specs = group_specs(config)
    assert [s.name for s in specs] == [
        *(f"layers.{n}.{g}" for n in range(2) for g in ("qkv", "o", "gate_up", "down")),
        "head",
        "embed",
    ]
    shapes = {linear.name: (linear.out_features, linear.in_features) for s in specs for linear in s.linears}
    assert shapes["model.layers.1.self_attn.k_proj"] == (24, 48)
    assert shapes["model.layers.0.self_attn.o_proj"] == (48, 48)
    assert shapes["model.layers.0.mlp.up_proj"] == (80, 48)
    assert shapes["model.layers.0.mlp.down_proj"] == (48, 80)
    assert shapes["lm_head"] == shapes["model.embed_tokens"] == (130, 48)
    assert len(shapes) == 2 * 7 + 2
    assert sum(s.weights for s in specs if s.is_body) == 2 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 80 * 48)
    assert [s.linears[0].name for s in group_specs(Tiny().config())][-1] == "model.embed_tokens"
    assert list(norm_specs(config))[-2:] == [
        ("model.layers.1.post_attention_layernorm.weight", 48),
        ("model.norm.weight", 48),
    ]


def test_gguf_names_reach_every_tensor() -> None:
    for architecture in ARCHITECTURES.values():
        assert architecture_from_gguf(architecture.gguf_name, "m.gguf") is architecture
        tiny = Tiny(tied=False, qkv_bias=architecture.qkv_bias)
        names = set(architecture.gguf_tensor_map(2).values())
        specs = group_specs(tiny.config())
        wanted = {f"{linear.name}.weight" for s in specs for linear in s.linears}
        wanted |= {name for name, _ in norm_specs(tiny.config())}
        if architecture.qkv_bias:
            wanted |= {f"{linear.name}.bias" for s in specs for linear in s.linears if s.name.endswith(".qkv")}
        assert names == wanted
        assert architecture.gguf_tensor_map(2)["blk.1.attn_q.weight"] == "model.layers.1.self_attn.q_proj.weight"
    assert ARCHITECTURES["qwen2"].gguf_key("num_layers") == "qwen2.block_count"
    assert {"hidden_size", "rope_theta", "num_kv_heads"} <= GGUF_KEYS.keys()
    with pytest.raises(LowtideError, match="unknown GGUF architecture 'rwkv'; known ones: llama, qwen2"):
        architecture_from_gguf("rwkv", "m.gguf")
