"""GGUF files: names, the q/k permutation, quantised types, refusals."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch

from lowtide.compress.sources import open_source
from lowtide.compress.sources.gguf_file import unpermute
from lowtide.errors import LowtideError

Q = gguf.GGMLQuantizationType


@pytest.mark.parametrize("options", [{}, {"tied": False, "qkv_bias": True}], ids=["llama", "qwen2"])
def test_tensors_equal_the_hugging_face_folder(small_model, write_gguf, options):
    model = small_model(**options)
    source = open_source(write_gguf(model))
    assert source.config.tied == model.config.tied
    assert source.config.architecture == model.config.architecture
    for field in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "rope_theta", "vocab_size"):
        assert getattr(source.config, field) == getattr(model.config, field), field
    for name, values in model.tensors.items():
        assert torch.equal(source.tensor(name), torch.from_numpy(values)), name
    assert not source.has("no.such.tensor")


def test_unpermute_undoes_llama_cpps_interleaving():
    heads, d = 2, 6
    rows = torch.arange(heads * d)
    stored = rows.reshape(heads, 2, d // 2).transpose(1, 2).reshape(-1)  # row 0, 3, 1, 4, ... of each head
    assert stored[:4].tolist() == [0, 3, 1, 4]
    assert torch.equal(unpermute(stored, heads), rows)


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0, Q.Q5_1, Q.F16, Q.BF16])
def test_quantised_tensors_are_dequantised(small_model, write_gguf, kind):
    model = small_model(hidden=64, head_dim=16, intermediate=96)
    name = "model.layers.0.mlp.down_proj.weight"
    source = open_source(write_gguf(model, quantise={name: kind}))
    expected = gguf.quants.dequantize(gguf.quants.quantize(model.tensors[name], kind), kind)
    assert np.array_equal(source.tensor(name).numpy(), expected)
    spread = np.abs(expected - model.tensors[name]).max()
    assert 0 < spread < 0.1


def test_fingerprint_covers_the_stored_bytes(small_model, write_gguf):
    model = small_model()
    first = open_source(write_gguf(model, "a.gguf")).fingerprint()
    assert open_source(write_gguf(model, "b.gguf")).fingerprint() == first
    model.tensors["model.norm.weight"][0] += 1e-3
    assert open_source(write_gguf(model, "c.gguf")).fingerprint() != first


def test_unsupported_type_is_named(small_model, write_gguf):
    model = small_model(hidden=256, head_dim=64)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(LowtideError, match=r"tensor blk.0.ffn_up.weight has unsupported type TQ1_0; known: BF16, F16"):
        open_source(write_gguf(model, quantise={name: Q.TQ1_0}))


def test_unknown_architecture_is_named(small_model, write_gguf):
    with pytest.raises(LowtideError, match="'falcon'; known ones: llama, qwen2"):
        open_source(write_gguf(small_model(), arch="falcon"))


def test_tensors_missing_or_too_many(small_model, write_gguf):
    model = small_model()
    with pytest.raises(LowtideError, match="blk.1.attn_norm.weight is missing"):
        open_source(write_gguf(model, "a.gguf", skip=("blk.1.attn_norm.weight",)))
    experts = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 8), np.float32)}
    with pytest.raises(LowtideError, match="ffn_gate_exps.weight is not part of architecture llama"):
        open_source(write_gguf(model, "b.gguf", extra=experts))


def test_rope_factors_of_one_are_ignored_and_others_refused(small_model, write_gguf):
    model = small_model()
    ones = {"rope_freqs.weight": np.ones(6, np.float32)}
    assert open_source(write_gguf(model, "a.gguf", extra=ones)).config.num_layers == 2
    scaled = {"rope_freqs.weight": np.linspace(1, 8, 6, dtype=np.float32)}
    with pytest.raises(LowtideError, match="rope_freqs.weight"):
        open_source(write_gguf(model, "b.gguf", extra=scaled))


def test_wrong_shape(small_model, write_gguf):
    model = small_model()
    model.tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((48, 81), np.float32)
    with pytest.raises(LowtideError, match=r"blk.0.ffn_down.weight has shape \[48, 81\], expected \[48, 80\]"):
        open_source(write_gguf(model))


def test_tokenizer_missing(small_model, write_gguf):
    with pytest.raises(LowtideError, match="tokenizer is missing"):
        open_source(write_gguf(small_model(), tokenizer=False))


def test_files_that_are_no_gguf(tmp_path):
    for name, data, message in (
        ("empty.gguf", b"", "the file is empty"),
        ("text.gguf", b"hello there", "not a GGUF file"),
        ("header_only.gguf", b"GGUF\x03\x00\x00\x00", "not a readable GGUF file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(LowtideError, match=message):
            open_source(tmp_path / name)


def test_files_cut_short_anywhere(small_model, write_gguf, tmp_path):
    data = write_gguf(small_model()).read_bytes()
    for end in (20, 100, 1000, 4000, len(data) // 2, len(data) - 40):
        (tmp_path / "cut.gguf").write_bytes(data[:end])
        with pytest.raises(LowtideError) as caught:
            open_source(tmp_path / "cut.gguf").fingerprint()
        assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite(small_model, write_gguf):
    model = small_model()
    model.tensors["model.norm.weight"][0] = np.inf
    source = open_source(write_gguf(model))
    with pytest.raises(LowtideError, match="output_norm.weight holds NaN or infinity"):
        source.tensor("model.norm.weight")


def test_generation_config_has_the_special_tokens(small_model, write_gguf):
    files = open_source(write_gguf(small_model())).tokenizer_files()
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": [2]}
