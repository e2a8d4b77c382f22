"""The reference engine: decodes with numpy exactly what the native engine must decode.

It follows docs/architecture.md step by step, down to the order of additions, so that both give the same bits. It is
meant for tests and for rules that are being tried out, and takes some tenths of a second per token on a model of 100M
parameters.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.format.codec import digit_planes
from lowtide.kernels import reference_ops as ops
from lowtide.kernels.native import SHORT_PROMPT
from lowtide.kernels.reference_cache import CachedRows
from lowtide.kernels.sequences import Step, check_round
from lowtide.kernels.types import DecodeStats, PolicyParams
from lowtide.rules import GroupStats, Rule, get_rule

if TYPE_CHECKING:
    from lowtide.format.groups import GroupTensors, LinearTensors
    from lowtide.format.reader import Artifact

F32 = NDArray[np.float32]
_Product = Callable[[int, str, F32, F32 | None], list[F32]]
Watch = Callable[[int, str, F32, F32 | None, NDArray[np.int64]], None]
"""Told of a group's product: index, name, input f32 [n, in], activated gate (`down` only) or None, bits read [n]."""

PLANE_CACHE_BYTES = 4 << 30
"""Digits are kept unpacked, one byte each, up to this size; a larger model is unpacked again for every call."""
HEAD_CHUNK = 64
"""Tokens that go through the output head at a time."""


@dataclass(frozen=True)
class Middle:
    """What a group's inputs are measured from.

    Attributes:
        stats: the group's statistics with that mean.
        mean: f32 [n, in] of each token's centroid; None: the group's own.
        bias: f32 [n, out] for every member; None: its own.
    """

    stats: GroupStats
    mean: F32 | None
    bias: list[F32 | None]


class ReferenceEngine:
    """Texts through an artifact, the numpy twin of `lowtide.kernels.native.Engine`; a further text is an engine, too.

    Positions may be rewritten: decoding at `pos` makes the cache valid up to and with `pos`.
    """

    isa = "reference"
    threads = 1

    def __init__(self, artifact: Artifact, *, max_context: int | None = None, cache_bits: int = 16) -> None:
        """
        Args:
            artifact: an open artifact.
            max_context: positions of the KV cache; the model's own maximum by default, which it may not exceed.
            cache_bits: of keys and values: 16 (float16) or 8 (int8 with a scale for each head and position).

        Raises:
            LowtideError: max_context out of range.
        """
        c = artifact.config
        self.config = c
        self.max_context = c.max_position if max_context is None else max_context
        if not 1 <= self.max_context <= c.max_position:
            raise LowtideError(f"max_context {max_context}: must be 1 to {c.max_position}, the model's own maximum")
        self.vocab_size = c.vocab_size
        self._groups: dict[str, GroupTensors] = artifact.groups
        self._stats = {name: GroupStats.of(group) for name, group in self._groups.items()}
        self._centroids = artifact.centroids()
        self._norms = [
            tuple(
                _f32(artifact.tensor(f"model.layers.{n}.{name}_layernorm.weight"))
                for name in ("input", "post_attention")
            )
            for n in range(c.num_layers)
        ]
        self._final_norm = _f32(artifact.tensor("model.norm.weight"))
        self._cache_bits = cache_bits
        total = sum(g.weights() * g.slices for g in self._groups.values())
        self._planes: dict[str, NDArray[np.uint8]] | None = {} if total <= PLANE_CACHE_BYTES else None
        self._begin()

    def _begin(self) -> None:
        """An empty KV cache."""
        c, bits = self.config, self._cache_bits
        self._keys = [CachedRows(c.num_kv_heads, c.head_dim, bits) for _ in range(c.num_layers)]
        self._values = [CachedRows(c.num_kv_heads, c.head_dim, bits) for _ in range(c.num_layers)]
        self._bits = np.zeros(4 * c.num_layers + 1, np.int64)

    def sequence(self) -> ReferenceEngine:
        """A further text: the same tensors, a KV cache of its own."""
        other = copy.copy(self)
        other._begin()
        return other

    def decode_round(self, steps: Sequence[Step]) -> list[tuple[F32, DecodeStats]]:
        """One token of each of several sequences, each by itself.

        Raises:
            LowtideError: as `decode`, or a sequence that comes twice.
        """
        check_round(steps)
        return [step.sequence.decode(step.token, step.pos, step.policy, step.want_logits) for step in steps]

    def decode(self, token: int, pos: int, policy: PolicyParams, want_logits: bool = True) -> tuple[F32, DecodeStats]:
        """One token at position pos under a policy.

        Returns:
            logits f32 [V] (empty unless wanted) and what was read.

        Raises:
            LowtideError: token or position out of range, or an unknown rule.
        """
        logits, stats = self.decode_many([token], pos, policy, want_logits)
        return (logits[0] if want_logits else np.empty(0, np.float32)), stats[0]

    def decode_many(
        self, tokens: Sequence[int] | NDArray[np.int32], pos: int, policy: PolicyParams, want_logits: bool = True
    ) -> tuple[F32, list[DecodeStats]]:
        """Given tokens from position pos on, each masked by itself under one policy: logits f32 [n, V] and stats.

        The same as n calls of `decode`, but faster, because the tokens are known beforehand.
        """
        x, body_bits = self.decode_body(tokens, pos, policy)
        logits = np.empty((len(x), self.vocab_size if want_logits else 0), np.float32)
        head_bits = np.full(len(x), ops.embedding_bits(self.embedding_group))
        for start in range(0, len(x) if want_logits else 0, HEAD_CHUNK):
            rows = slice(start, start + HEAD_CHUNK)
            head = _Masked(self, policy, len(x[rows]))
            logits[rows] = head.head(x[rows])
            head_bits[rows] += head.bits
            self._bits[-1] = head.bits[-1]
        c, scales = self.config, 8 if self._cache_bits == 8 else 0  # bytes of a key's and a value's scale
        per_position = c.num_layers * c.num_kv_heads * (c.head_dim * self._cache_bits // 4 + scales)
        stats = []
        for i, (body, head_) in enumerate(zip(body_bits.tolist(), head_bits.tolist(), strict=True)):
            stats.append(DecodeStats(body, head_, (body + head_ + 7) // 8 + per_position * (pos + i + 1)))
        return logits, stats

    def decode_body(
        self, tokens: Sequence[int] | NDArray[np.int32], pos: int, policy: PolicyParams, watch: Watch | None = None
    ) -> tuple[F32, NDArray[np.int64]]:
        """The decoder's layers alone: given tokens from position pos on, each masked by itself under one policy.

        Args:
            tokens: n ids.
            pos: of the first.
            policy: what is read.
            watch: called after every group's product, in the order of the layers.

        Returns:
            what the output head reads, f32 [n, D], and the bits read in the decoder's linear layers, i64 [n], side
            data included.

        Raises:
            LowtideError: token or position out of range, thresholds of another model, or an unknown rule.
        """
        ids = self._check(tokens, pos)
        masked = _Masked(self, policy, len(ids))

        def product(index: int, name: str, x: F32, gate: F32 | None) -> list[F32]:
            before = masked.bits.copy()
            outs = masked(index, name, x, gate)
            if watch is not None:
                watch(index, name, x, gate, masked.bits - before)
            return outs

        x = self._body(ids, pos, product)
        self._bits = masked.last
        return x, masked.bits

    def prefill(self, tokens: Sequence[int] | NDArray[np.int32], pos: int, all_logits: bool = False) -> F32:
        """Given tokens from position pos on, all slices read: logits f32 [V] of the last, or [n, V] of all.

        Up to SHORT_PROMPT tokens are decoded, as the native engine does.
        """
        ids = self._check(tokens, pos)
        if len(ids) <= SHORT_PROMPT:
            shape = (4 * self.config.num_layers + 1, self._groups["head"].slices)
            logits, _ = self.decode_many(ids, pos, PolicyParams("dense", np.zeros(shape, np.float32)))
            return logits if all_logits else logits[-1]
        x = self._body(ids, pos, self._dense)
        if not all_logits:
            return self._dense(-1, "head", x[-1:], None)[0][0]
        return self._dense(-1, "head", x, None)[0]

    def group_bits(self) -> NDArray[np.int64]:
        """Bits that the last token decoded read of each group, side data included: i64 [layers * 4 + 1], head last."""
        return self._bits.copy()

    def close(self) -> None:
        """Frees the KV cache and the unpacked digits."""
        self._keys, self._values = [], []
        self._planes = None

    @property
    def embedding_group(self) -> GroupTensors:
        """The group that holds the embedding: the head's if tied."""
        return self._groups["head" if self.config.tied else "embed"]

    def group(self, name: str) -> tuple[GroupTensors, GroupStats]:
        """A group's tensors and what rules may know about it."""
        return self._groups[name], self._stats[name]

    def middle(self, name: str, rule: Rule, code: NDArray[np.int64] | None) -> Middle:
        """What a group's inputs are measured from under a rule; code i64 [n]: the tokens' centroids."""
        group, stats = self.group(name)
        found = self._centroids.get(name)
        if found is None or rule.name != "ipn":
            return Middle(stats, None, [None] * len(group.linears))
        mean = found.mean[code].astype(np.float32)
        return Middle(dataclasses.replace(stats, mean=mean), mean, [_f32(bias[code]) for bias in found.bias])

    def digits(self, group: GroupTensors, linear: LinearTensors) -> NDArray[np.uint8]:
        """The unpacked digits of one linear layer, u8 [S, in, out]."""
        if self._planes is not None and linear.name in self._planes:
            return self._planes[linear.name]
        planes = ops.channel_planes(digit_planes(linear.weight, linear.out_features, group.in_features))
        if self._planes is not None:
            self._planes[linear.name] = planes
        return planes

    def _dense(self, index: int, name: str, x: F32, gate: F32 | None) -> list[F32]:
        group = self._groups[name]
        return [ops.dense_linear(group, m, x) for m in range(len(group.linears))]

    def _body(self, ids: list[int], pos: int, product: _Product) -> F32:
        """What the output head reads, f32 [n, D]: embedding, all layers, final norm. Fills the KV cache."""
        c = self.config
        cos, sin = ops.rope_tables(np.arange(pos, pos + len(ids)), c.head_dim, c.rope_theta)
        x = np.stack([ops.embedding_row(self.embedding_group, token) for token in ids])
        for n, (input_norm, post_norm) in enumerate(self._norms):
            name = f"layers.{n}."
            q, k, v = product(4 * n, name + "qkv", ops.rms_norm(x, input_norm, c.rms_eps), None)
            q = ops.rope(q.reshape(-1, c.num_heads, c.head_dim), cos, sin)
            k = ops.rope(k.reshape(-1, c.num_kv_heads, c.head_dim), cos, sin)
            self._keys[n].store(pos, k)
            self._values[n].store(pos, v.reshape(k.shape))
            mixed = ops.attention(q, self._keys[n], self._values[n], pos)
            x = x + product(4 * n + 1, name + "o", mixed.reshape(len(ids), c.q_size), None)[0]
            gate, up = product(4 * n + 2, name + "gate_up", ops.rms_norm(x, post_norm, c.rms_eps), None)
            gate = ops.silu(gate)
            x = x + product(4 * n + 3, name + "down", gate * up, gate)[0]
        return ops.rms_norm(x, self._final_norm, c.rms_eps)

    def _check(self, tokens: Sequence[int] | NDArray[np.int32], pos: int) -> list[int]:
        ids = [int(t) for t in tokens]
        if not ids:
            raise LowtideError("no tokens given: at least one is needed")
        wrong = [t for t in ids if not 0 <= t < self.vocab_size]
        if wrong:
            raise LowtideError(f"token {wrong[0]}: must be 0 to {self.vocab_size - 1}, the model's vocabulary")
        if pos < 0 or pos + len(ids) > self.max_context:
            raise LowtideError(f"position {pos} + {len(ids)} tokens: the context holds {self.max_context}")
        if pos > len(self._keys[0]):
            raise LowtideError(f"position {pos}: only {len(self._keys[0])} positions have been filled so far")
        return ids


class _Masked:
    """The graded product of a group under a policy; counts the bits of each token, i64 [n], and for the last token
    those of each group, i64 [groups]."""

    def __init__(self, engine: ReferenceEngine, policy: PolicyParams, tokens: int) -> None:
        expected = 4 * engine.config.num_layers + 1
        if len(policy.thresholds) != expected:
            raise LowtideError(f"policy {policy.rule}: thresholds for {len(policy.thresholds)} groups, not {expected}")
        self.rule = get_rule(policy.rule)
        self.engine = engine
        self.policy = policy
        self.bits = np.zeros(tokens, np.int64)
        self.last = np.zeros(expected, np.int64)
        self._features: F32 | None = None
        self._code: NDArray[np.int64] | None = None

    def __call__(self, index: int, name: str, x: F32, gate: F32 | None) -> list[F32]:
        group, _ = self.engine.group(name)
        middle = self._middle(name, x)
        levels = self._levels(index, name, x, gate, self.policy.log2_offset, middle.stats)
        bits = ops.group_bits(group, levels, self.rule.name == "ipn")
        self.bits += bits
        self.last[index] = bits[-1]
        return [
            ops.graded_linear(group, m, self.engine.digits(group, m), x, own, middle.mean, bias)
            for m, own, bias in zip(group.linears, levels, middle.bias, strict=True)
        ]

    def head(self, x: F32) -> F32:
        """Logits f32 [n, V] of what the head reads f32 [n, D]."""
        if not self.policy.head_twice:
            return self(-1, "head", x, None)[0]
        group, _ = self.engine.group("head")
        linear, planes = group.linears[0], self.engine.digits(group, group.linears[0])
        offset, middle = self.policy.log2_offset, self._middle("head", x)
        (coarse,) = self._levels(-1, "head", x, None, offset + self.policy.head_offset, middle.stats)
        (fine,) = self._levels(-1, "head", x, None, offset, middle.stats)
        logits = ops.graded_linear(group, linear, planes, x, coarse, middle.mean, middle.bias[0])
        again = ops.leading_rows(logits, self.policy.head_margin)
        self.bits += ops.group_bits(group, coarse, self.rule.name == "ipn")
        self.bits += 2 * fine.sum(axis=-1, dtype=np.int64) * again.sum(axis=-1)
        finer = ops.graded_linear(group, linear, planes, x, fine, middle.mean, middle.bias[0])
        return np.where(again, finer, logits)

    def _middle(self, name: str, x: F32) -> Middle:
        found = self.rule.code(self.engine.group(name)[1], x)
        self._code = self._code if found is None else found
        return self.engine.middle(name, self.rule, self._code)

    def _levels(
        self, index: int, name: str, x: F32, gate: F32 | None, offset: float, stats: GroupStats
    ) -> list[NDArray[np.int32]]:
        """Levels i32 [n, in] of each of the group's linear layers."""
        found = self.rule.features(stats, x)
        self._features = self._features if found is None else found
        gain = 0.0 if self.policy.gains is None else float(self.policy.gains[index])
        params = self.rule.shift(self.policy.thresholds[index], offset)
        params = self.rule.waterline(stats, params, self._features, gain)
        return self.rule.member_levels(stats, x, params, len(self.engine.group(name)[0].linears), gate)


def _f32(tensor: NDArray[np.generic]) -> F32:
    return np.asarray(tensor, dtype=np.float32)
