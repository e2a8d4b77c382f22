"""The uncompressed model in plain torch, one decoder block at a time.

This is the yardstick of every figure (`DenseModel.logits`), the model that calibration differentiates, and, with
another `apply`, the body of the masked reference (`lowtide.compress.masked`).

Shapes: B sequences, N positions, D hidden size, H query heads, K key/value heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from lowtide.arch import GROUPS, ModelConfig
from lowtide.compress.products import CPU
from lowtide.compress.sources import Source
from lowtide.errors import LowtideError

Apply = Callable[[str, torch.Tensor], torch.Tensor]
"""`apply(group, x [B, N, in]) -> y [B, N, out]`: the group's linear layers, outputs concatenated, bias added."""

CACHE_BYTES = 3 << 30
"""Weights are kept in memory as float32 up to this size; a larger model is read again block by block."""
COOLEST = 0.7
"""Lowest temperature of varied texts."""


@dataclass
class Block:
    """One decoder block's weights.

    `weights[group]` is [out, in] with the group's members concatenated along out; `biases[group]` is [out] or None.
    """

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    weights: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor | None]

    def apply(self, group: str, x: torch.Tensor) -> torch.Tensor:
        """The dense product x @ W.T + b of one group."""
        return F.linear(x, self.weights[group], self.biases[group])

    def to(self, dtype: torch.dtype) -> Block:
        """A copy whose tensors have `dtype`."""
        return Block(
            self.input_norm.to(dtype),
            self.post_norm.to(dtype),
            {k: v.to(dtype) for k, v in self.weights.items()},
            {k: None if v is None else v.to(dtype) for k, v in self.biases.items()},
        )


@dataclass
class KVCache:
    """Keys and values of one block for the positions seen so far, each [B, K, capacity, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor
    length: int = 0

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, K, n, head_dim]; return all keys and values so far."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope_tables(
    config: ModelConfig, start: int, count: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each f32 [count, head_dim], of positions start..start+count-1 (half-rotation layout)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angle = torch.arange(start, start + count, dtype=torch.float64)[:, None] * config.rope_theta**-half
    angle = torch.cat([angle, angle], -1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def _rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return (x * rope[0] + turned * rope[1]).to(x.dtype)


def decoder_block(
    config: ModelConfig,
    norms: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    apply: Apply,
    rope: tuple[torch.Tensor, torch.Tensor],
    cache: KVCache | None = None,
) -> torch.Tensor:
    """One decoder block: x [B, N, D] -> [B, N, D], its linear layers done by `apply`.

    `norms` are the input and post-attention RMSNorm weights, `rope` the tables of these N positions. With a cache,
    N positions are appended to it (N = 1, or an empty cache).
    """
    batch, n, _ = x.shape
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    grouped = heads != kv_heads
    qkv = apply("qkv", rms_norm(x, norms[0], config.rms_eps))
    q, k, v = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
    q = _rotate(q.view(batch, n, heads, head_dim).transpose(1, 2), rope)
    k = _rotate(k.view(batch, n, kv_heads, head_dim).transpose(1, 2), rope)
    v = v.view(batch, n, kv_heads, head_dim).transpose(1, 2)
    if cache is not None:
        k, v = cache.extend(k, v)
    if grouped and x.device.type != "cpu":  # fused kernels of GPUs know no groups in float32
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        grouped = False
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=n > 1, enable_gqa=grouped)
    x = x + apply("o", mixed.transpose(1, 2).reshape(batch, n, heads * head_dim))
    gate, up = apply("gate_up", rms_norm(x, norms[1], config.rms_eps)).chunk(2, -1)
    return x + apply("down", F.silu(gate) * up)


@dataclass
class DenseModel:
    """The source model in float32.

    Weights stay in the source's precision and are cast block by block; a model whose float32 weights fit
    `cache_bytes` is cast once and kept, on `device`, where everything is computed.
    """

    source: Source
    cache_bytes: int = CACHE_BYTES
    device: torch.device = CPU
    _blocks: dict[int, Block] = field(default_factory=dict, repr=False)
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.source.config

    @property
    def fits_cache(self) -> bool:
        """Whether all blocks may be kept as float32."""
        c = self.config
        per_block = c.hidden_size * (2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.intermediate_size)
        return 4 * per_block * c.num_layers <= self.cache_bytes

    def _small(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            self._tensors[name] = self._tensor(name)
        return self._tensors[name]

    def _tensor(self, name: str) -> torch.Tensor:
        return self.source.tensor(name).to(self.device)

    def block(self, index: int) -> Block:
        """Decoder block `index` in float32."""
        if index in self._blocks:
            return self._blocks[index]
        prefix = f"model.layers.{index}."
        weights: dict[str, torch.Tensor] = {}
        biases: dict[str, torch.Tensor | None] = {}
        for group, members in GROUPS.items():
            weights[group] = torch.cat([self._tensor(f"{prefix}{m}.weight") for m in members])
            named = [f"{prefix}{m}.bias" for m in members]
            biases[group] = torch.cat([self._tensor(b) for b in named]) if self.source.has(named[0]) else None
        block = Block(
            self._tensor(prefix + "input_layernorm.weight"),
            self._tensor(prefix + "post_attention_layernorm.weight"),
            weights,
            biases,
        )
        if self.fits_cache:
            self._blocks[index] = block
        return block

    def release(self) -> None:
        """Forget the embedding and the head; they are read again when next asked for."""
        self._tensors.clear()

    @property
    def embedding(self) -> torch.Tensor:
        """Token embedding, f32 [V, D]."""
        return self._small("model.embed_tokens.weight")

    @property
    def head_weight(self) -> torch.Tensor:
        """Output head, f32 [V, D] (the embedding if tied)."""
        return self.embedding if self.config.tied else self._small("lm_head.weight")

    @property
    def final_norm(self) -> torch.Tensor:
        """Weight of the last RMSNorm, f32 [D]."""
        return self._small("model.norm.weight")

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, N], on any device -> f32 [B, N, D]."""
        _check_ids(ids, self.config.vocab_size)
        return F.embedding(ids.to(self.device), self.embedding)

    @torch.no_grad()
    def block_inputs(self, ids: torch.Tensor, report: Callable[[int], None] | None = None) -> list[torch.Tensor]:
        """What each block reads, and last what the final norm reads: num_layers + 1 tensors f32 [B, N, D].

        `report(n)` is called when n blocks are done.
        """
        rope = rope_tables(self.config, 0, ids.shape[1], self.device)
        states = [self.embed(ids)]
        for index in range(self.config.num_layers):
            states.append(self._run_block(self.block(index), states[-1], rope))
            if report:
                report(index + 1)
        return states

    def _run_block(self, block: Block, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        norms = (block.input_norm, block.post_norm)
        if x.device.type != "cpu":
            return decoder_block(self.config, norms, x, block.apply, rope)
        # one sequence at a time: the activations of one window fit the caches, those of a batch do not
        return torch.cat([decoder_block(self.config, norms, row[None], block.apply, rope) for row in x])

    @torch.no_grad()
    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, N] -> the head's input (after the final norm), f32 [B, N, D]."""
        rope = rope_tables(self.config, 0, ids.shape[1], self.device)
        x = self.embed(ids)
        for index in range(self.config.num_layers):
            x = self._run_block(self.block(index), x, rope)
        return rms_norm(x, self.final_norm, self.config.rms_eps)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, N] -> next-token logits, f32 [B, N, V]."""
        return F.linear(self.hidden(ids), self.head_weight)

    @torch.no_grad()
    def sample(
        self,
        batch: int,
        length: int,
        seed: int,
        progress: Callable[[int], None] | None = None,
        varied: bool = False,
    ) -> torch.Tensor:
        """Text from the model itself: temperature 1, no truncation, from the start token; i64 [batch, length].

        With `varied` the token after it is any of the vocabulary's, each as likely (LLM-QAT, arXiv:2305.17888, begins
        so), and every text has a temperature of its own, from COOLEST to 1: more kinds of text, fewer of them noise.
        """
        start = self.start_token()
        dtype = torch.float32 if self.fits_cache else torch.bfloat16  # sampling needs no precision, but all blocks
        blocks = [self.block(i) if self.fits_cache else self.block(i).to(dtype) for i in range(self.config.num_layers)]
        head, norm = self.head_weight.to(dtype), self.final_norm.to(dtype)
        shape = (batch, self.config.num_kv_heads, length, self.config.head_dim)
        room = partial(torch.zeros, shape, dtype=dtype, device=self.device)
        caches = [KVCache(room(), room()) for _ in blocks]
        generator = torch.Generator().manual_seed(seed)
        coldness = torch.ones(batch, 1, device=self.device)
        if varied:
            coldness /= 1 - (1 - COOLEST) * torch.rand(batch, 1, generator=generator).to(self.device)
        ids = torch.full((batch, length), start, dtype=torch.int64, device=self.device)
        for position in range(length - 1):
            rope = rope_tables(self.config, position, 1, self.device)
            x = self.embed(ids[:, position : position + 1]).to(dtype)
            for block, cache in zip(blocks, caches, strict=True):
                x = decoder_block(self.config, (block.input_norm, block.post_norm), x, block.apply, rope, cache)
            logits = F.linear(rms_norm(x, norm, self.config.rms_eps)[:, 0], head).float()
            if varied and position == 0:
                logits = torch.zeros_like(logits)
            ids[:, position + 1] = draw(torch.softmax(logits * coldness, -1), generator)
            if progress:
                progress(position + 1)
        return ids.cpu()

    def start_token(self) -> int:
        """The token that opens a text: BOS, or the end-of-text token of models without one."""
        if self.config.bos_token_id is not None:
            return self.config.bos_token_id
        return self.config.eos_token_ids[0] if self.config.eos_token_ids else 0


def draw(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token i64 [B] from each of the distributions p f32 [B, V], by its cumulated probabilities: one random number
    each, where torch.multinomial draws one for every word and takes longer than a small model. The generator is the
    processor's, so that a seed means the same numbers on every device.

    Raises:
        LowtideError: a distribution is not finite.
    """
    up_to = p.cumsum(-1)
    if not bool(up_to[:, -1].isfinite().all()):
        raise LowtideError("the model's output is not finite: its weights are damaged")
    aim = torch.rand(len(p), 1, generator=generator).to(p.device) * up_to[:, -1:]
    return torch.searchsorted(up_to, aim, right=True)[:, 0].clamp_max(p.shape[1] - 1)


def _check_ids(ids: torch.Tensor, vocab_size: int) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise LowtideError(f"token {worst} is outside the model's vocabulary of {vocab_size}: wrong tokenizer?")
