"""KL of a coded model to the dense one on text that calibration did not see, one block at a time.

Weights are those that the artifact's full read stands for, in float32: what static coding costs, without the rounding
of coefficients that an engine adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from lowtide.compress.dense import Block, DenseModel, decoder_block, rms_norm, rope_tables
from lowtide.format.groups import GroupTensors

LoadGroup = Callable[[str], GroupTensors]


def full_read(group: GroupTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight f32 [out, in], bias f32 [out]) that make the group's product when every slice is read: y = W x + b."""
    parts = []
    for index in range(len(group.linears)):
        weight = torch.from_numpy(group.dequantise(index, group.slices))
        parts.append(weight + torch.from_numpy(group.exact_part(index)))
    weight = torch.cat(parts)
    bias = torch.cat([torch.from_numpy(linear.bias.astype("float32")) for linear in group.linears])
    return weight, bias - weight @ torch.from_numpy(group.mean.astype("float32"))


def table(group: GroupTensors) -> torch.Tensor:
    """Embedding f32 [V, D]: the full read, outliers in place of their digits."""
    return full_read(group)[0]


def coded_block(model: DenseModel, index: int, load: LoadGroup) -> Block:
    """Decoder block `index` as the artifact has it."""
    dense = model.block(index)
    weights: dict[str, torch.Tensor] = {}
    biases: dict[str, torch.Tensor | None] = {}
    for name in dense.weights:
        weights[name], biases[name] = full_read(load(f"layers.{index}.{name}"))
    return Block(dense.input_norm, dense.post_norm, weights, biases)


@torch.no_grad()
def coded_states(reference: DenseModel, load: LoadGroup, ids: torch.Tensor, both: bool) -> list[torch.Tensor]:
    """What the final norm reads, f32 [B, N, D]: of the dense model first, if `both`, and of the coded one."""
    config = reference.config
    rope = rope_tables(config, 0, ids.shape[1])
    states = [F.embedding(ids, table(load("head" if config.tied else "embed")))]
    if both:
        states.insert(0, reference.embed(ids))
    for index in range(config.num_layers):
        blocks = [coded_block(reference, index, load)]
        if both:
            blocks.insert(0, reference.block(index))
        states = [
            torch.cat([decoder_block(config, (b.input_norm, b.post_norm), row[None], b.apply, rope) for row in x])
            for b, x in zip(blocks, states, strict=True)
        ]
    return states


def coded_logits(reference: DenseModel, load: LoadGroup, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits f32 [N, V] of the coded model, window by window of ids i64 [B, N]."""
    (states,) = coded_states(reference, load, ids, both=False)
    head, bias = full_read(load("head"))
    for window in states:
        yield _logits(reference, window, head, bias)


def held_out_kl(reference: DenseModel, load: LoadGroup, ids: torch.Tensor) -> float:
    """Mean KL(dense || coded) in nats per token.

    Args:
        reference: the dense model.
        load: group name -> its tensors.
        ids: i64 [B, N].
    """
    dense, coded = coded_states(reference, load, ids, both=True)
    head, bias = full_read(load("head"))
    total = 0.0
    for a, b in zip(dense, coded, strict=True):
        p = torch.log_softmax(_logits(reference, a, reference.head_weight, None), -1)
        q = torch.log_softmax(_logits(reference, b, head, bias), -1)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return total / ids.numel()


@torch.no_grad()
def _logits(model: DenseModel, x: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(rms_norm(x, model.final_norm, model.config.rms_eps), head, bias)
