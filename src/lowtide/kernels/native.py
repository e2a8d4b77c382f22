"""The door to liblowtide: the native decode engine behind a ctypes interface (csrc/lowtide.h).

One call decodes one token, or one of each of several texts.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.format.groups import LINEAR_FIELDS
from lowtide.kernels import library
from lowtide.kernels.call import Call
from lowtide.kernels.sequences import Step, check_round
from lowtide.kernels.types import DecodeStats, PolicyParams

if TYPE_CHECKING:
    from lowtide.format.centroids import Centroids
    from lowtide.format.groups import GroupTensors, LinearTensors
    from lowtide.format.reader import Artifact

F32 = NDArray[np.float32]

SHORT_PROMPT = 2
MAX_CHANNELS = 65536
"""Sums of digits times coefficients stay within 32 bits, and byte offsets too (with layers below 4 GiB)."""

_NOT_HANDED_OVER = ("ipn_gain", "ipn_centroids", "ipn_step")
"""Of the IPN: gains come with each token, and centroids as the tables made of them."""

_pointer = ctypes.c_void_p


def available_isas() -> list[str]:
    """Instruction sets this machine can run, best first: of avx512, avx2, neondot, neon, portable."""
    return library.library().lt_available_isas().decode().split(",")


def default_threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TokenSequence:
    """One text in an engine, with a KV cache of its own (`Engine.sequence`).

    Positions may be rewritten: decoding at `pos` makes the KV cache valid up to and with `pos`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.lock = engine.lock
        self.handle: int | None = library.library().lt_sequence_new(engine.handle)
        if not self.handle:
            raise LowtideError(
                f"not enough memory for a KV cache of {engine.max_context} tokens: lower --context or --parallel"
            )
        self.call = Call(self.handle, engine.groups, engine.has_ipn)

    def decode(self, token: int, pos: int, policy: PolicyParams, want_logits: bool = True) -> tuple[F32, DecodeStats]:
        """One token at position pos under a policy.

        Returns:
            logits f32 [V] (empty unless wanted) and what was read.

        Raises:
            LowtideError: token or position out of range, or an unknown rule.
        """
        return self._engine.decode_sequence(self, token, pos, policy, want_logits)

    def prefill(self, tokens: Sequence[int] | NDArray[np.int32], pos: int, all_logits: bool = False) -> F32:
        """Given tokens from position pos on, all slices read: logits f32 [V] of the last, or [n, V] of all.

        Up to SHORT_PROMPT tokens are decoded one by one: unpacking every weight for so few takes longer.

        Raises:
            LowtideError: no tokens, or tokens or positions out of range.
        """
        return self._engine.prefill_sequence(self, tokens, pos, all_logits)

    def group_bits(self) -> NDArray[np.int64]:
        """Bits that the last token decoded read of each group, side data included: i64 [layers * 4 + 1], head last."""
        return self._engine.sequence_bits(self)

    def close(self) -> None:
        """Frees the KV cache. Safe to call twice."""
        with self.lock:
            if self.handle:
                library.library().lt_sequence_free(self.handle)
                self.handle = None

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.close()


class Engine:
    """Texts through an artifact, natively: `decode` and `prefill` serve one, `sequence` and `decode_round` several.

    Positions may be rewritten: decoding at `pos` makes the KV cache valid up to and with `pos`.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        isa: str | None = None,
        max_context: int | None = None,
        cache_bits: int = 16,
    ) -> None:
        """
        Args:
            artifact: an open, validated artifact; its memory-mapped tensors are used in place.
            threads: threads of the team, the caller's included; all processors by default.
            isa: instruction set; by default what LOWTIDE_ISA names, else the best.
            max_context: positions of the KV cache; by default the model's own maximum, at most 4096.
            cache_bits: of keys and values: 16 (float16) or 8 (int8 with a scale for each head and position).

        Raises:
            LowtideError: an instruction set this machine does not have, or a number out of range.
        """
        config = artifact.config
        self.handle: int | None = None
        self.lock = threading.RLock()  # ctypes lets other threads run during a call; a finaliser may come within one
        self.threads = default_threads() if threads is None else threads
        if not 1 <= self.threads <= 256:
            raise LowtideError(f"--threads {threads}: must be 1 to 256")
        self.max_context = min(config.max_position, 4096) if max_context is None else max_context
        if not 1 <= self.max_context <= config.max_position:
            raise LowtideError(f"max_context {max_context}: must be 1 to {config.max_position}, the model's maximum")
        if cache_bits not in (8, 16):
            raise LowtideError(f"--cache-bits {cache_bits}: must be 16 or 8")
        self.cache_bits = cache_bits
        wanted = isa or os.environ.get("LOWTIDE_ISA") or None
        if wanted and wanted not in available_isas():
            option = "isa" if isa else "LOWTIDE_ISA"
            found = ", ".join(available_isas())
            raise LowtideError(f"{option}={wanted}: not available on this machine; it has {found}")
        self.vocab_size = config.vocab_size
        self._keep: list[Any] = [artifact]
        model = self._describe(artifact)
        error = ctypes.create_string_buffer(512)
        self.handle = library.library().lt_engine_new(
            ctypes.byref(model), self.threads, wanted.encode() if wanted else None, error, len(error)
        )
        if not self.handle:
            raise LowtideError(error.value.decode())
        self.isa: str = library.library().lt_engine_isa(self.handle).decode()
        self._first = TokenSequence(weakref.proxy(self))  # no circle, so an engine left behind is freed at once
        self._outs = [[linear.out_features for linear in group.linears] for group in artifact.groups.values()]
        self._ins = [group.in_features for group in artifact.groups.values()]
        self._dense = PolicyParams("dense", np.zeros((4 * config.num_layers + 1, artifact.manifest.slices), np.float32))

    def sequence(self) -> TokenSequence:
        """A further text, with a KV cache of `max_context` positions of its own (memory is taken as it fills).

        Raises:
            LowtideError: no memory for it, or the engine is closed.
        """
        self._check_open(self._first)
        return TokenSequence(self)

    def decode(self, token: int, pos: int, policy: PolicyParams, want_logits: bool = True) -> tuple[F32, DecodeStats]:
        """`TokenSequence.decode` of the engine's own sequence."""
        return self._first.decode(token, pos, policy, want_logits)

    def prefill(self, tokens: Sequence[int] | NDArray[np.int32], pos: int, all_logits: bool = False) -> F32:
        """`TokenSequence.prefill` of the engine's own sequence."""
        return self._first.prefill(tokens, pos, all_logits)

    def group_bits(self) -> NDArray[np.int64]:
        """`TokenSequence.group_bits` of the engine's own sequence."""
        return self._first.group_bits()

    def decode_round(self, steps: Sequence[Step]) -> list[tuple[F32, DecodeStats]]:
        """One token of each of several sequences, in one call: what each gets alone, bit for bit.

        The sequences take turns within every group of linear layers. Each reads what its own mask says; what one has
        just read, the next finds in the processor's cache.

        Raises:
            LowtideError: as `TokenSequence.decode`, or a sequence that comes twice.
        """
        check_round(steps)
        logits = [np.empty(self.vocab_size if step.want_logits else 0, np.float32) for step in steps]
        calls = [step.sequence.call for step in steps]
        with self.lock:
            for step in steps:
                self._check(step.sequence, step.token, step.pos)
            for step, call, row in zip(steps, calls, logits, strict=True):
                self._fill(call, step.token, step.pos, step.policy, row)
            table = (library.Step * len(steps))(*(call.step for call in calls))
            library.library().lt_decode(self.handle, table, len(steps))
            return [(row, call.read()) for row, call in zip(logits, calls, strict=True)]

    def decode_sequence(
        self, sequence: TokenSequence, token: int, pos: int, policy: PolicyParams, want_logits: bool
    ) -> tuple[F32, DecodeStats]:
        """`TokenSequence.decode`: a round of one, with as little around the call as can be."""
        logits = np.empty(self.vocab_size if want_logits else 0, np.float32)
        with self.lock:
            self._check(sequence, token, pos)
            call = sequence.call
            self._fill(call, token, pos, policy, logits)
            library.library().lt_decode(self.handle, ctypes.byref(call.step), 1)
            return logits, call.read()

    @staticmethod
    def _fill(call: Call, token: int, pos: int, policy: PolicyParams, logits: F32) -> None:
        call.fill(policy)
        step = call.step
        step.token, step.position, step.logits = token, pos, logits.ctypes.data if len(logits) else None

    def prefill_sequence(
        self, sequence: TokenSequence, tokens: Sequence[int] | NDArray[np.int32], pos: int, all_logits: bool
    ) -> F32:
        """`TokenSequence.prefill`."""
        ids = np.ascontiguousarray(tokens, np.int32)
        if len(ids) == 0:
            raise LowtideError(f"tokens must be 1 or more ids from 0 to {self.vocab_size - 1}")
        for extreme in (ids.min(), ids.max()):
            self._check(sequence, int(extreme), pos, len(ids))
        if len(ids) <= SHORT_PROMPT:
            last, dense = len(ids) - 1, self._dense
            rows = [sequence.decode(int(t), pos + i, dense, all_logits or i == last)[0] for i, t in enumerate(ids)]
            return np.stack(rows) if all_logits else rows[last]
        logits = np.empty((len(ids), self.vocab_size) if all_logits else self.vocab_size, np.float32)
        with self.lock:
            self._check_open(sequence)
            failed = library.library().lt_prefill(
                self.handle, sequence.handle, ids.ctypes.data, len(ids), pos, int(all_logits), logits.ctypes.data
            )
        if failed:
            raise LowtideError("not enough memory to read the prompt: close something, or give a shorter one")
        return logits

    def sequence_bits(self, sequence: TokenSequence) -> NDArray[np.int64]:
        """`TokenSequence.group_bits`."""
        self._check_open(sequence)
        out = np.zeros(self.groups, np.int64)
        with self.lock:
            library.library().lt_group_bits(sequence.handle, out.ctypes.data)
        return out

    def group_product(self, index: int, x: F32, policy: PolicyParams) -> tuple[list[F32], int]:
        """The linear layers of one group on one input f32 [in], for tests: f32 [out] each, and the bits read.

        index counts groups in the artifact's order.
        """
        self._check_open(self._first)
        x = np.ascontiguousarray(x, np.float32)
        if not 0 <= index < self.groups:
            raise ValueError(f"group {index}: there are {self.groups} with thresholds")
        if x.shape != (self._ins[index],):
            raise ValueError(f"x must have shape ({self._ins[index]},), not {x.shape}")
        outs = [np.empty(n, np.float32) for n in self._outs[index]]
        pointers = (_pointer * len(outs))(*(o.ctypes.data for o in outs))
        with self.lock:
            params = self._first.call.fill(policy)
            bits = library.library().lt_group_product(
                self.handle, self._first.handle, index, x.ctypes.data, ctypes.byref(params), pointers
            )
        return outs, bits

    def read_bandwidth(self, size: int = 256 << 20, repeats: int = 5) -> float:
        """Best bytes per second that the team reads from `size` bytes of memory: the limit to hold figures against."""
        return float(library.library().lt_read_bandwidth(self.handle, size, repeats))

    def close(self) -> None:
        """Ends the threads and frees the engine's own KV cache. Safe to call twice."""
        with self.lock:
            if self.handle:
                library.library().lt_engine_free(self.handle)
                self.handle = None
                self._first.close()

    def __del__(self) -> None:
        self.close()

    def _check_open(self, sequence: TokenSequence) -> None:
        if self.handle is None:
            raise LowtideError("the engine is closed")
        if sequence.handle is None:
            raise LowtideError("the sequence is closed")
        if sequence.lock is not self.lock:
            raise LowtideError("the sequence belongs to another engine")

    def _check(self, sequence: TokenSequence, token: int, pos: int, count: int = 1) -> None:
        self._check_open(sequence)
        if not 0 <= token < self.vocab_size:
            raise LowtideError(f"tokens must be 1 or more ids from 0 to {self.vocab_size - 1}")
        if pos < 0 or pos + count > self.max_context:
            raise LowtideError(
                f"position {pos + count - 1} is outside the context of {self.max_context}: "
                "shorten the text or raise --context"
            )

    def _describe(self, artifact: Artifact) -> library.Model:
        c = artifact.config
        groups = list(artifact.groups.values())
        self.has_ipn = artifact.manifest.ipn is not None
        self.groups = 4 * c.num_layers + 1  # that have thresholds
        table, centroids = (library.Group * len(groups))(), artifact.centroids()
        for entry, group in zip(table, groups, strict=True):
            self._fill_group(entry, group)
            if group.name in centroids:
                self._fill_centroids(entry, group, centroids[group.name])
        kinds = ("input", "post_attention")
        names = [f"model.layers.{n}.{kind}_layernorm.weight" for n in range(c.num_layers) for kind in kinds]
        norms = [np.ascontiguousarray(artifact.tensor(name), np.float32) for name in [*names, "model.norm.weight"]]
        pointers = (_pointer * len(norms))(*(n.ctypes.data for n in norms))
        inv_freq = c.rope_theta ** (-np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim)
        self._keep += [table, norms, pointers, inv_freq]
        return library.Model(
            abi_version=library.ABI_VERSION,
            vocab=c.vocab_size,
            hidden=c.hidden_size,
            intermediate=c.intermediate_size,
            layers=c.num_layers,
            heads=c.num_heads,
            kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            max_context=self.max_context,
            tied=int(c.tied),
            cache_bits=self.cache_bits,
            rms_eps=c.rms_eps,
            inv_freq=inv_freq.ctypes.data,
            norms=ctypes.cast(pointers, ctypes.POINTER(_pointer)),
            groups=ctypes.cast(table, ctypes.POINTER(library.Group)),
        )

    def _pointer_to(self, array: NDArray[Any]) -> int:
        contiguous = np.ascontiguousarray(array)
        self._keep.append(contiguous)
        return contiguous.ctypes.data

    def _fill_group(self, entry: Any, group: GroupTensors) -> None:
        stored = max(linear.weight.nbytes for linear in group.linears)
        if group.in_features > MAX_CHANNELS or stored >= 1 << 32:
            raise LowtideError(
                f"{group.name}: {group.in_features} channels and {stored} bytes in one layer; the native engine takes "
                f"{MAX_CHANNELS} and 4 GiB at most"
            )
        entry.in_ = group.in_features
        entry.slices = group.slices
        entry.linear_count = len(group.linears)
        entry.exact_count = len(group.exact_channels)
        entry.side_bits = 8 * group.side_bytes()
        entry.centre[: group.slices] = group.centres
        for name in ("mean", "col_scale", "importance", "shrink", "exact_channels"):
            setattr(entry, name, self._pointer_to(getattr(group, name)))
        if group.ipn is not None:
            entry.ipn_side_bits = 8 * group.side_bytes(ipn=True)
            entry.ipn_features = 0 if group.ipn.mix is None else len(group.ipn.mix) - 1
            for name, tensor in group.ipn.fields().items():
                if name not in _NOT_HANDED_OVER:
                    setattr(entry, name, self._pointer_to(tensor))
        for target, linear in zip(entry.linear, group.linears, strict=False):
            self._fill_linear(target, linear)

    def _fill_centroids(self, entry: Any, group: GroupTensors, centroids: Centroids) -> None:
        entry.ipn_centroids = len(centroids.mean)
        if group.ipn is not None and group.ipn.channels is not None:
            entry.ipn_key_channels = len(group.ipn.channels)
        entry.ipn_mean = self._pointer_to(centroids.mean)
        for target, bias in zip(entry.linear, centroids.bias, strict=False):
            target.ipn_base = self._pointer_to(bias)

    def _fill_linear(self, entry: Any, linear: LinearTensors) -> None:
        entry.out = linear.out_features
        for name in LINEAR_FIELDS:
            setattr(entry, name, self._pointer_to(getattr(linear, name)))
