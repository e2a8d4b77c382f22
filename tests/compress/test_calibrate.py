"""The block-by-block backward pass against differentiating the whole model at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lowtide.compress import calibrate
from lowtide.compress.calibrate import SAMPLE_STRIDE, block_pass, head_pass
from lowtide.compress.dense import DenseModel, decoder_block, draw, rms_norm, rope_tables


@pytest.fixture
def passes(small_model):
    """(model, ids, block inputs, gradient and stats of the head, per block: gradient at its input and stats)."""
    model = DenseModel(small_model().source())
    ids = torch.randint(0, 130, (3, 10), generator=torch.Generator().manual_seed(0))
    states = model.block_inputs(ids)
    grad, head = head_pass(model, states[-1], seed=5)
    blocks = {}
    upper = grad
    for index in (1, 0):
        upper, stats = block_pass(model, model.block(index), states[index], upper)
        blocks[index] = (upper, stats)
    return model, ids, states, grad, head, blocks


def whole_gradients(model, ids, seed):
    """Gradients of the summed loss at every group's output and at the embedding, by plain autograd."""
    seen = {}
    x = model.embed(ids).requires_grad_(True)
    first = x
    rope = rope_tables(model.config, 0, ids.shape[1])
    for index in range(model.config.num_layers):
        block = model.block(index)

        def apply(group, h, index=index, block=block):
            y = block.apply(group, h)
            y.retain_grad()
            seen[index, group] = (h.detach(), y)
            return y

        x = decoder_block(model.config, (block.input_norm, block.post_norm), x, apply, rope)
    logits = F.linear(rms_norm(x, model.final_norm, model.config.rms_eps), model.head_weight)
    flat = logits.reshape(-1, logits.shape[-1])
    labels = draw(torch.softmax(flat.detach(), -1), torch.Generator().manual_seed(seed))
    F.cross_entropy(flat, labels, reduction="sum").backward()
    return seen, first.grad, flat.detach()


def test_gradients_equal_autograd_through_the_whole_model(passes):
    model, ids, _, _, _, blocks = passes
    seen, at_embedding, _ = whole_gradients(model, ids, seed=5)
    assert torch.allclose(blocks[0][0], at_embedding, atol=1e-5)
    for (index, group), (_, y) in seen.items():
        fisher = y.grad.pow(2).mean((0, 1))
        assert torch.allclose(blocks[index][1][group].fisher.float(), fisher, rtol=1e-3, atol=1e-9), (index, group)


def test_input_statistics(passes):
    model, ids, _, _, _, blocks = passes
    seen, _, _ = whole_gradients(model, ids, seed=5)
    for (index, group), (h, _) in seen.items():
        stats = blocks[index][1][group]
        flat = h.reshape(-1, h.shape[-1])
        assert torch.allclose(stats.mean.float(), flat.mean(0), atol=1e-5)
        assert torch.allclose(stats.second.float(), flat.pow(2).mean(0), rtol=1e-4, atol=1e-7)
        assert torch.allclose(stats.sample, flat[::SAMPLE_STRIDE], atol=1e-5)
        assert (stats.gate is not None) == (group == "down")
    gate = F.silu(seen[0, "gate_up"][1].detach().chunk(2, -1)[0]).abs().reshape(-1, 80)[::SAMPLE_STRIDE]
    assert torch.allclose(blocks[0][1]["down"].gate, gate, atol=1e-5)


def test_head_fisher_is_the_expectation_over_labels(passes):
    model, ids, states, _, head, _ = passes
    _, _, logits = whole_gradients(model, ids, seed=5)
    p = torch.softmax(logits, -1).double()
    assert torch.allclose(head.fisher, (p * (1 - p)).mean(0), rtol=1e-4, atol=1e-9)


def test_head_chunks_do_not_matter(passes, monkeypatch):
    model, _, states, grad, head, _ = passes
    monkeypatch.setattr(calibrate, "HEAD_CHUNK", 7)
    chunked_grad, chunked = head_pass(model, states[-1], seed=5)
    assert torch.equal(chunked.sample, head.sample)  # the stride runs on across chunks
    assert torch.allclose(chunked.fisher, head.fisher, rtol=1e-6)
    assert chunked_grad.shape == grad.shape
