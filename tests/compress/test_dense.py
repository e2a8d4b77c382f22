"""The dense decoder against a second, naive one, and decoding with a cache against decoding without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowtide.arch import GROUPS
from lowtide.compress import dense
from lowtide.compress.dense import DenseModel, KVCache, decoder_block, draw, rope_tables
from lowtide.errors import LowtideError


def naive_logits(config, tensors, ids):
    """One sequence in float64, position by position, head by head."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}

    def norm(x, w):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_eps) * w

    def linear(name, x):
        return x @ t[name + ".weight"].T + t.get(name + ".bias", 0.0)

    d = config.head_dim
    states = t["model.embed_tokens.weight"][ids]
    for n in range(config.num_layers):
        p = f"model.layers.{n}."
        h = norm(states, t[p + "input_layernorm.weight"])
        q, k, v = (linear(p + m, h) for m in GROUPS["qkv"])
        mixed = np.zeros((len(ids), config.num_heads * d))
        for head in range(config.num_heads):
            kv = head // (config.num_heads // config.num_kv_heads)
            for i in range(len(ids)):
                rotated = rotate(q[i, head * d : (head + 1) * d], i, config)
                keys = np.stack([rotate(k[j, kv * d : (kv + 1) * d], j, config) for j in range(i + 1)])
                score = keys @ rotated / np.sqrt(d)
                share = np.exp(score - score.max())
                mixed[i, head * d : (head + 1) * d] = share / share.sum() @ v[: i + 1, kv * d : (kv + 1) * d]
        states = states + linear(p + "self_attn.o_proj", mixed)
        h = norm(states, t[p + "post_attention_layernorm.weight"])
        gate = linear(p + "mlp.gate_proj", h)
        states = states + linear(p + "mlp.down_proj", gate / (1 + np.exp(-gate)) * linear(p + "mlp.up_proj", h))
    head = t["model.embed_tokens.weight"] if config.tied else t["lm_head.weight"]
    return norm(states, t["model.norm.weight"]) @ head.T


def rotate(x, position, config):
    out = np.empty_like(x)
    half = len(x) // 2
    for i in range(half):
        angle = position * config.rope_theta ** (-2 * i / len(x))
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


@pytest.mark.parametrize("options", [{}, {"tied": False, "qkv_bias": True, "kv_heads": 1}], ids=["llama", "qwen2"])
def test_logits_equal_a_naive_decoder(small_model, options):
    model = small_model(**options)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 9)
    ours = DenseModel(model.source()).logits(torch.from_numpy(ids)[None])[0].numpy()
    np.testing.assert_allclose(ours, naive_logits(model.config, model.tensors, ids), atol=2e-5)


def test_a_model_over_the_cache_limit_gives_the_same_logits(small_model):
    source = small_model().source()
    ids = torch.arange(12).view(2, 6)
    streamed = DenseModel(source, cache_bytes=0)
    assert not streamed.fits_cache
    assert torch.equal(streamed.logits(ids), DenseModel(source).logits(ids))
    assert streamed._blocks == {}


def test_cached_decoding_equals_the_whole_window(small_model):
    model = DenseModel(small_model().source())
    config, block = model.config, model.block(0)
    norms = (block.input_norm, block.post_norm)
    x = torch.randn(2, 7, config.hidden_size, generator=torch.Generator().manual_seed(0))
    whole = decoder_block(config, norms, x, block.apply, rope_tables(config, 0, 7))
    empty = torch.zeros(2, config.num_kv_heads, 7, config.head_dim)
    cache = KVCache(empty.clone(), empty.clone())
    for i in range(7):
        part = decoder_block(config, norms, x[:, i : i + 1], block.apply, rope_tables(config, i, 1), cache)
        assert torch.allclose(part[:, 0], whole[:, i], atol=1e-5)


def test_sampled_text_follows_the_models_distribution(small_model):
    model = DenseModel(small_model(layers=1, vocab=100).source())
    model.embedding.mul_(3)  # tied: a sharper distribution
    ids = model.sample(600, 2, seed=3)
    assert torch.equal(ids[:, 0], torch.full((600,), model.start_token()))
    p = torch.softmax(model.logits(ids[:1, :1])[0, 0], -1)
    counts = torch.bincount(ids[:, 1], minlength=100)
    likely = p > 0.02
    assert likely.sum() >= 3
    spread = (600 * p * (1 - p)).sqrt()
    assert ((counts - 600 * p).abs()[likely] < 5 * spread[likely]).all()


def test_sampling_depends_on_the_seed_alone(small_model):
    model = DenseModel(small_model().source())
    assert torch.equal(model.sample(2, 8, seed=1), model.sample(2, 8, seed=1))
    assert not torch.equal(model.sample(2, 8, seed=1), model.sample(2, 8, seed=2))


def test_varied_text_begins_with_any_token(small_model):
    model = DenseModel(small_model(layers=1, vocab=100).source())
    model.embedding.mul_(3)  # tied: the model itself would favour a few
    ids = model.sample(2000, 2, seed=3, varied=True)
    assert torch.equal(ids[:, 0], torch.full((2000,), model.start_token()))
    counts = torch.bincount(ids[:, 1], minlength=100)
    assert len(counts) == 100 and 20 / 5 < counts.min() and counts.max() < 20 + 5 * 20**0.5


def test_every_varied_text_has_a_temperature_of_its_own(small_model, monkeypatch):
    model = DenseModel(small_model(layers=1, vocab=100).source())
    seen = []

    def spy(p, generator):
        seen.append(p)
        return draw(p, generator)

    monkeypatch.setattr(dense, "draw", spy)
    ids = model.sample(16, 5, seed=3, varied=True)
    logits = model.logits(ids)
    found = []
    for position in range(1, 4):
        asked, given = logits[:, position] - logits[:, position, :1], seen[position].log() - seen[position][:, :1].log()
        found.append((asked * given).sum(1) / given.square().sum(1))
    temperature = found[0]
    assert torch.allclose(torch.stack(found), temperature, rtol=1e-3)  # one for all of a text
    assert dense.COOLEST <= temperature.min() < 0.8 and 0.9 < temperature.max() <= 1


def test_start_token_falls_back_to_the_end_of_text(small_model):
    import dataclasses

    model = DenseModel(small_model().source())
    assert model.start_token() == model.config.bos_token_id
    model.source.config = dataclasses.replace(model.config, bos_token_id=None)
    assert model.start_token() == model.config.eos_token_ids[0]


def test_foreign_token_ids_are_refused(small_model):
    model = DenseModel(small_model().source())
    with pytest.raises(LowtideError, match="vocabulary of 130"):
        model.logits(torch.tensor([[130]]))


def test_large_models_sample_in_half_precision(small_model, monkeypatch):
    model = DenseModel(small_model().source(), cache_bytes=0)
    seen = set()
    real = dense.decoder_block

    def spy(config, norms, x, *rest):
        seen.add(x.dtype)
        return real(config, norms, x, *rest)

    monkeypatch.setattr(dense, "decoder_block", spy)
    assert model.sample(1, 4, seed=0).shape == (1, 4)
    assert seen == {torch.bfloat16}


def test_tokens_are_drawn_as_often_as_they_are_likely():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    count = 20_000
    drawn = torch.stack([draw(p, generator) for generator in [torch.Generator().manual_seed(1)] for _ in range(count)])
    shares = torch.stack([torch.bincount(column, minlength=6) for column in drawn.T]) / count
    assert torch.allclose(shares, p, atol=0.015)
    assert not shares[p == 0].any()
    same = [draw(p.repeat(50, 1), torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*same)


def test_the_last_likely_token_is_drawn_at_the_end_of_the_sum(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.ones(*shape))
    assert draw(torch.tensor([[0.25, 0.75]]), torch.Generator()).tolist() == [1]


def test_damaged_weights_draw_nothing():
    with pytest.raises(LowtideError, match="output is not finite"):
        draw(torch.tensor([[0.5, 0.5], [float("nan"), 1.0]]), torch.Generator())
