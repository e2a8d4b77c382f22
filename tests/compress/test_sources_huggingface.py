"""Hugging Face folders and hub ids."""

from __future__ import annotations

import json
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from lowtide.compress.sources import open_source
from lowtide.errors import LowtideError


def change_config(model, **changes):
    file = model.folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_tensors_config_and_tokenizer(small_model):
    model = small_model(qkv_bias=True, tied=False)
    source = model.source()
    assert source.config == model.config
    assert source.name == "model"
    for name, values in model.tensors.items():
        assert torch.equal(source.tensor(name), torch.from_numpy(values))
    assert source.has("lm_head.weight")
    assert not source.has("lm_head.bias")
    assert set(source.tokenizer_files()) == {"tokenizer.json", "tokenizer_config.json"}


def test_sharded_weights(small_model):
    model = small_model()
    whole = model.source().fingerprint()
    names = sorted(model.tensors)
    (model.folder / "model.safetensors").unlink()
    weight_map = {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file({n: model.tensors[n] for n in chosen}, model.folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    (model.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = model.source()
    assert all(torch.equal(source.tensor(n), torch.from_numpy(v)) for n, v in model.tensors.items())
    assert source.fingerprint() == whole


def test_index_that_leaves_the_folder(small_model):
    model = small_model()
    (model.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(LowtideError, match="outside its folder"):
        model.source()


def test_half_precision_is_cast_exactly(small_model):
    model = small_model()
    halves = {n: torch.from_numpy(v).bfloat16() for n, v in model.tensors.items()}
    save_torch(halves, model.folder / "model.safetensors")
    source = model.source()
    value = source.tensor("model.norm.weight")
    assert value.dtype == torch.float32
    assert torch.equal(value, halves["model.norm.weight"].float())
    assert source.stored("model.norm.weight").nbytes == 2 * model.config.hidden_size


def test_fingerprint_tells_models_apart(small_model):
    a, b = small_model("a", seed=1), small_model("b", seed=2)
    assert a.source().fingerprint() != b.source().fingerprint()
    assert a.source().fingerprint() == a.source().fingerprint()
    nudged = dict(a.tensors)
    nudged["model.norm.weight"] = nudged["model.norm.weight"] + np.float32(1e-6)
    before = a.source().fingerprint()
    save_file(nudged, a.folder / "model.safetensors")
    assert a.source().fingerprint() != before


def test_chat_template_in_a_file_of_its_own(small_model):
    model = small_model()
    (model.folder / "chat_template.jinja").write_text("{{ hello }}")
    config = json.loads((model.folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model.folder / "tokenizer_config.json").write_text(json.dumps(config))
    stored = json.loads(model.source().tokenizer_files()["tokenizer_config.json"])
    assert stored["chat_template"] == "{{ hello }}"
    assert stored["bos_token"] == "<s>"


def test_hub_id_goes_through_huggingface_hub(small_model, monkeypatch):
    model = small_model()
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: asked.append((repo, options)) or str(model.folder)
    )
    source = open_source("someone/some-model")
    assert source.name == "someone/some-model"
    assert source.config == model.config
    assert asked[0][0] == "someone/some-model"
    assert "*.safetensors" in asked[0][1]["allow_patterns"]


def test_hub_failure_is_one_line(monkeypatch):
    def fail(repo, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(LowtideError, match="someone/gone.*no route") as caught:
        open_source("someone/gone")
    assert "\n" not in str(caught.value)


def test_hub_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(LowtideError, match="needs huggingface_hub"):
        open_source("someone/some-model")


def test_missing_and_empty_models(tmp_path):
    with pytest.raises(LowtideError, match="no such model"):
        open_source(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(LowtideError, match="no such model"):
        open_source("missing.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LowtideError, match="the folder is empty"):
        open_source(tmp_path / "empty")


def test_unknown_architecture_lists_those_known(small_model):
    model = small_model()
    change_config(model, architectures=["MambaForCausalLM"])
    with pytest.raises(LowtideError, match="MambaForCausalLM.*LlamaForCausalLM, Qwen2ForCausalLM"):
        model.source()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").unlink(), "config.json: missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not readable JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), "no .safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"1234"), "not a readable safetensors file"),
    ],
)
def test_damaged_folders(small_model, damage, message):
    model = small_model()
    damage(model.folder)
    with pytest.raises(LowtideError, match=message):
        model.source()


def test_missing_tensor_and_wrong_shape(small_model):
    model = small_model()
    short = dict(model.tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    short[name] = short[name][:-1]
    save_file(short, model.folder / "model.safetensors")
    with pytest.raises(LowtideError, match=r"up_proj.weight has shape \[79, 48\], config.json says \[80, 48\]"):
        model.source()
    del short[name]
    save_file(short, model.folder / "model.safetensors")
    with pytest.raises(LowtideError, match=f"tensor {name} is missing"):
        model.source()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(small_model, bad):
    model = small_model()
    tensors = dict(model.tensors)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].copy()
    tensors["model.norm.weight"][3] = bad
    save_file(tensors, model.folder / "model.safetensors")
    with pytest.raises(LowtideError, match="model.norm.weight holds NaN or infinity"):
        model.source().tensor("model.norm.weight")


def test_integer_weights(small_model):
    model = small_model()
    tensors = dict(model.tensors)
    tensors["model.norm.weight"] = np.ones(48, np.int8)
    save_file(tensors, model.folder / "model.safetensors")
    with pytest.raises(LowtideError, match="lowtide needs float weights"):
        model.source().tensor("model.norm.weight")


def test_tokenizer_missing(small_model):
    model = small_model()
    (model.folder / "tokenizer.json").unlink()
    with pytest.raises(LowtideError, match="tokenizer.json is missing"):
        model.source().tokenizer_files()
