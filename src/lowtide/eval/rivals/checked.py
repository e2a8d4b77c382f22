"""A rare check at full precision that corrects the cache of keys and values (after Sirius, arXiv 2409.03856).

After every N tokens those N run again with all slices, in one batch, and their keys and values take the place of the
masked ones: later tokens attend to what the whole code says. Logits that are out are not taken back. A token so sees
full keys and values of all earlier runs of N, and masked ones of its own run.

The batch reads the body's weights once for N tokens (`batch_bits`, what decoding pays in bytes where reading weights is
what counts); counted token by token it would be N times that (`naive_bits`).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from lowtide.arch import LAYER_NORMS
from lowtide.compress.dense import decoder_block, rms_norm, rope_tables
from lowtide.eval.rivals.base import THRESHOLD_BITS, BlockState, Plan
from lowtide.eval.rivals.model import RivalModel
from lowtide.eval.rivals.scores import VALUE_BITS

LAST_NEEDED = "qkv"
"""Of the last layer a check needs keys and values alone."""


class CheckedModel(RivalModel):
    """A model whose cache is corrected every `every` tokens; shares all tensors with the one it is made of.

    free: the check's bits are not counted, an upper bound of what it can be worth.
    """

    def __init__(self, model: RivalModel, every: int, free: bool = False) -> None:
        self.__dict__.update(copy.copy(model.__dict__))
        self.every, self.free = every, free

    @property
    def naive_bits(self) -> float:
        """Bits per body weight that every token's second run would read on its own."""
        last = f"layers.{self.config.num_layers - 1}."
        names = [n for n in self.body if not n.startswith(last) or n == last + LAST_NEEDED]
        bits = 0
        for name in names:
            slices, out, inputs = self.groups[name].planes.shape
            side = self.groups[name].side_bits - VALUE_BITS * inputs - THRESHOLD_BITS * slices  # no mask, no scores
            bits += 2 * slices * out * self.readable(name) + side
        return bits / self.body_weights

    @property
    def batch_bits(self) -> float:
        """Bits per body weight and token, the batch reading everything once."""
        return 0.0 if self.free else self.naive_bits / self.every

    @torch.no_grad()
    def states(self, ids: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, float]:
        """As `RivalModel.states`, the check's bits included."""
        states, bits = super().states(ids, plan)
        return states, bits + self.batch_bits

    def _states(self, ids: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, float]:
        rope = rope_tables(self.config, 0, ids.shape[1])
        whole = F.embedding(ids, self.embedding)
        x = whole
        read = 0.0
        for index in range(self.config.num_layers):
            block: BlockState = {}
            prefix = f"layers.{index}."

            def full(name: str, x: torch.Tensor, prefix: str = prefix) -> torch.Tensor:
                return self.read(prefix + name, x, self.full_levels(name, x, len(self.groups[prefix + name].planes)))[0]

            def masked(name: str, x: torch.Tensor, prefix: str = prefix, block: BlockState = block) -> torch.Tensor:
                nonlocal read
                block[name] = x
                y, bits = plan.product(self, prefix + name, x, block)
                read += float(bits.sum(dtype=torch.float64))
                if name == "gate_up":
                    block["gate"] = F.silu(y.chunk(2, -1)[0])
                return y

            before, after = (self.norms[f"model.{prefix}{name}"] for name in LAYER_NORMS)
            qkv = full("qkv", rms_norm(whole, before, self.config.rms_eps))
            x = self._block(x, masked, (before, after), rope, qkv)
            if index + 1 < self.config.num_layers:  # the last layer's keys and values are all that is needed of it
                whole = decoder_block(self.config, (before, after), whole, full, rope)
        return rms_norm(x, self.norms["model.norm.weight"], self.config.rms_eps), read

    def _block(self, x, apply, norms, rope, full_qkv):  # type: ignore[no-untyped-def]
        """One decoder block under masks: x [B, N, D], full_qkv [B, N, out] of the check -> [B, N, D]."""
        config = self.config
        batch, n, _ = x.shape
        q, k, v = self._heads(apply("qkv", rms_norm(x, norms[0], config.rms_eps)), rope)
        _, k_full, v_full = self._heads(full_qkv, rope)
        keys, values = torch.cat([k_full, k], 2), torch.cat([v_full, v], 2)
        mixed = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=visible(n, self.every), enable_gqa=config.num_heads != config.num_kv_heads
        )
        x = x + apply("o", mixed.transpose(1, 2).reshape(batch, n, -1))
        gate, up = apply("gate_up", rms_norm(x, norms[1], config.rms_eps)).chunk(2, -1)
        return x + apply("down", F.silu(gate) * up)

    def _heads(
        self, qkv: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [B, heads, N, head_dim], turned, of qkv [B, N, out]."""
        config = self.config
        sizes = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        q, k, v = (p.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for p in qkv.split(sizes, -1))
        return _turn(q, rope), _turn(k, rope), v


def visible(n: int, every: int) -> torch.Tensor:
    """Who sees what, bool [n, 2 n]: first the checked keys, those of earlier runs, then masked ones of one's own."""
    place = torch.arange(n)
    run = place // every
    checked = run[None, :] < run[:, None]
    own = (run[None, :] == run[:, None]) & (place[None, :] <= place[:, None])
    return torch.cat([checked, own], 1)


def _turn(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of x [B, heads, N, head_dim], half-rotation layout."""
    first, second = x.chunk(2, -1)
    return x * rope[0] + torch.cat([-second, first], -1) * rope[1]
