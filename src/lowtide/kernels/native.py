"""The door to liblowtide: the native decode engine behind a ctypes interface (csrc/lowtide.h).

One call decodes one token, so what ctypes costs per call (about 2 microseconds) does not show.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.format.groups import LINEAR_FIELDS
from lowtide.kernels.types import DecodeStats, PolicyParams

if TYPE_CHECKING:
    from lowtide.format.groups import GroupTensors, LinearTensors
    from lowtide.format.reader import Artifact

F32 = NDArray[np.float32]

ABI_VERSION = 4
MAX_SLICES = 4
SHORT_PROMPT = 12
MAX_CHANNELS = 65536
"""Sums of digits times coefficients stay within 32 bits, and byte offsets too (with layers below 4 GiB)."""
RULES = {"dense": 0, "channel-norm": 1, "channel-abs": 2, "gate": 3, "topk": 4, "statistical-topk": 5, "ipn": 6}

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p


class _Linear(ctypes.Structure):
    _fields_ = [("out", _i64), *((name, _pointer) for name in LINEAR_FIELDS)]


class _Group(ctypes.Structure):
    _fields_ = [
        *((name, _i64) for name in ("in_", "slices", "linear_count", "exact_count", "side_bits")),
        ("centre", _i64 * MAX_SLICES),
        *((name, _pointer) for name in ("mean", "col_scale", "importance", "shrink", "exact_channels")),
        *((name, _i64) for name in ("ipn_side_bits", "ipn_features")),
        *((name, _pointer) for name in ("ipn_importance", "ipn_mix", "ipn_probe", "ipn_scale", "ipn_bias")),
        ("linear", _Linear * 3),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, _i64)
            for name in ("abi_version", "vocab", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim")
        ),
        ("max_context", _i64),
        ("tied", _i64),
        ("cache_bits", _i64),
        ("rms_eps", ctypes.c_double),
        ("inv_freq", _pointer),
        ("norms", ctypes.POINTER(_pointer)),
        ("groups", ctypes.POINTER(_Group)),
    ]


class _Policy(ctypes.Structure):
    _fields_ = [("rule", _i64), ("params", _pointer), ("log2_offset", ctypes.c_double), ("gains", _pointer)]


class _Stats(ctypes.Structure):
    _fields_ = [(name, _i64) for name in ("body_bits", "head_bits", "embed_bits", "cache_bytes")]


@cache
def _library() -> ctypes.CDLL:
    path = Path(os.environ.get("LOWTIDE_LIBRARY") or Path(__file__).with_name("liblowtide.so"))
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise LowtideError(f"{path}: the native library does not load ({error}); reinstall lowtide") from None
    lib.lt_available_isas.restype = ctypes.c_char_p
    lib.lt_engine_new.restype = _pointer
    lib.lt_engine_new.argtypes = [ctypes.POINTER(_Model), ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
    lib.lt_engine_free.argtypes = [_pointer]
    lib.lt_engine_isa.restype, lib.lt_engine_isa.argtypes = ctypes.c_char_p, [_pointer]
    lib.lt_decode.argtypes = [_pointer, _i64, _i64, ctypes.POINTER(_Policy), _pointer, ctypes.POINTER(_Stats)]
    lib.lt_prefill.argtypes = [_pointer, _pointer, _i64, _i64, ctypes.c_int, _pointer]
    lib.lt_group_product.restype = _i64
    lib.lt_group_product.argtypes = [_pointer, _i64, _pointer, ctypes.POINTER(_Policy), ctypes.POINTER(_pointer)]
    lib.lt_group_bits.restype, lib.lt_group_bits.argtypes = _i64, [_pointer, _pointer]
    lib.lt_read_bandwidth.restype = ctypes.c_double
    lib.lt_read_bandwidth.argtypes = [_pointer, _i64, ctypes.c_int]
    return lib


def available_isas() -> list[str]:
    """Instruction sets this machine can run, best first: of avx512, avx2, neondot, neon, portable."""
    return _library().lt_available_isas().decode().split(",")


def default_threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Engine:
    """One sequence through an artifact, natively.

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
        self._handle: int | None = None
        self._lock = threading.Lock()  # ctypes lets other Python threads run during a call
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
        self._handle = _library().lt_engine_new(
            ctypes.byref(model), self.threads, wanted.encode() if wanted else None, error, len(error)
        )
        if not self._handle:
            raise LowtideError(error.value.decode())
        self.isa: str = _library().lt_engine_isa(self._handle).decode()
        self._outs = [[linear.out_features for linear in group.linears] for group in artifact.groups.values()]
        self._ins = [group.in_features for group in artifact.groups.values()]
        self._dense = PolicyParams("dense", np.zeros((4 * config.num_layers + 1, artifact.manifest.slices), np.float32))

    def decode(self, token: int, pos: int, policy: PolicyParams, want_logits: bool = True) -> tuple[F32, DecodeStats]:
        """One token at position pos under a policy.

        Returns:
            logits f32 [V] (empty unless wanted) and what was read.

        Raises:
            LowtideError: token or position out of range, or an unknown rule.
        """
        self._check(np.asarray([token]), pos)
        params, keep = self._policy(policy)
        logits = np.empty(self.vocab_size if want_logits else 0, np.float32)
        stats = _Stats()
        to = logits.ctypes.data if want_logits else None
        with self._lock:
            _library().lt_decode(self._handle, token, pos, ctypes.byref(params), to, ctypes.byref(stats))
        del keep
        head = stats.head_bits + stats.embed_bits
        return logits, DecodeStats(stats.body_bits, head, (stats.body_bits + head + 7) // 8 + stats.cache_bytes)

    def prefill(self, tokens: Sequence[int] | NDArray[np.int32], pos: int, all_logits: bool = False) -> F32:
        """Given tokens from position pos on, all slices read: logits f32 [V] of the last, or [n, V] of all.

        Up to SHORT_PROMPT tokens are decoded one by one: unpacking every weight for so few takes longer.

        Raises:
            LowtideError: no tokens, or tokens or positions out of range.
        """
        ids = np.ascontiguousarray(tokens, np.int32)
        self._check(ids, pos)
        if len(ids) <= SHORT_PROMPT:
            last = len(ids) - 1
            rows = [self.decode(int(t), pos + i, self._dense, all_logits or i == last)[0] for i, t in enumerate(ids)]
            return np.stack(rows) if all_logits else rows[last]
        logits = np.empty((len(ids), self.vocab_size) if all_logits else self.vocab_size, np.float32)
        with self._lock:
            failed = _library().lt_prefill(
                self._handle, ids.ctypes.data, len(ids), pos, int(all_logits), logits.ctypes.data
            )
        if failed:
            raise LowtideError("not enough memory to read the prompt: close something, or give a shorter one")
        return logits

    def group_product(self, index: int, x: F32, policy: PolicyParams) -> tuple[list[F32], int]:
        """The linear layers of one group on one input f32 [in], for tests: f32 [out] each, and the bits read.

        index counts groups in the artifact's order.
        """
        x = np.ascontiguousarray(x, np.float32)
        if not 0 <= index < len(self._ins) - self._untied:
            raise ValueError(f"group {index}: there are {len(self._ins) - self._untied} with thresholds")
        if x.shape != (self._ins[index],):
            raise ValueError(f"x must have shape ({self._ins[index]},), not {x.shape}")
        params, keep = self._policy(policy)
        outs = [np.empty(n, np.float32) for n in self._outs[index]]
        pointers = (_pointer * len(outs))(*(o.ctypes.data for o in outs))
        with self._lock:
            bits = _library().lt_group_product(self._handle, index, x.ctypes.data, ctypes.byref(params), pointers)
        del keep
        return outs, bits

    def group_bits(self) -> NDArray[np.int64]:
        """Bits that the last token decoded read of each group, side data included: i64 [layers * 4 + 1], head last."""
        out = np.zeros(len(self._ins) - self._untied, np.int64)
        with self._lock:
            _library().lt_group_bits(self._handle, out.ctypes.data)
        return out

    def read_bandwidth(self, size: int = 256 << 20, repeats: int = 5) -> float:
        """Best bytes per second that the team reads from `size` bytes of memory: the limit to hold figures against."""
        return float(_library().lt_read_bandwidth(self._handle, size, repeats))

    def close(self) -> None:
        """Ends the threads and frees the KV cache. Safe to call twice."""
        with self._lock:
            if self._handle:
                _library().lt_engine_free(self._handle)
                self._handle = None

    def __del__(self) -> None:
        self.close()

    def _check(self, tokens: NDArray[Any], pos: int) -> None:
        if self._handle is None:
            raise LowtideError("the engine is closed")
        if len(tokens) == 0 or tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise LowtideError(f"tokens must be 1 or more ids from 0 to {self.vocab_size - 1}")
        if pos < 0 or pos + len(tokens) > self.max_context:
            raise LowtideError(
                f"position {pos + len(tokens) - 1} is outside the context of {self.max_context}: "
                "shorten the text or raise --context"
            )

    def _policy(self, policy: PolicyParams) -> tuple[_Policy, list[NDArray[np.float32]]]:
        if policy.rule not in RULES:
            raise LowtideError(f"unknown mask rule {policy.rule!r}: the native engine knows {', '.join(sorted(RULES))}")
        groups = len(self._ins) - self._untied
        thresholds = np.asarray(policy.thresholds, np.float32)
        if thresholds.ndim != 2 or thresholds.shape[0] != groups or thresholds.shape[1] > MAX_SLICES:
            raise LowtideError(f"thresholds must have shape ({groups}, slices), not {thresholds.shape}")
        params = np.full((groups, MAX_SLICES), np.inf, np.float32)
        params[:, : thresholds.shape[1]] = thresholds
        gains = np.zeros(groups, np.float32)
        if policy.rule == "ipn":
            if not self._ipn:
                raise LowtideError(
                    "rule ipn: the artifact has no importance prediction network; choose another --policy"
                )
            if policy.gains is not None:
                gains = np.ascontiguousarray(policy.gains, np.float32)
            if gains.shape != (groups,):
                raise LowtideError(f"gains must have shape ({groups},), not {gains.shape}")
        keep = [params, gains]
        return _Policy(RULES[policy.rule], params.ctypes.data, policy.log2_offset, gains.ctypes.data), keep

    def _describe(self, artifact: Artifact) -> _Model:
        c = artifact.config
        groups = list(artifact.groups.values())
        self._ipn = artifact.manifest.ipn is not None
        self._untied = len(groups) - 4 * c.num_layers - 1
        table = (_Group * len(groups))()
        for entry, group in zip(table, groups, strict=True):
            self._fill_group(entry, group)
        kinds = ("input", "post_attention")
        names = [f"model.layers.{n}.{kind}_layernorm.weight" for n in range(c.num_layers) for kind in kinds]
        norms = [np.ascontiguousarray(artifact.tensor(name), np.float32) for name in [*names, "model.norm.weight"]]
        pointers = (_pointer * len(norms))(*(n.ctypes.data for n in norms))
        inv_freq = c.rope_theta ** (-np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim)
        self._keep += [table, norms, pointers, inv_freq]
        return _Model(
            abi_version=ABI_VERSION,
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
            groups=ctypes.cast(table, ctypes.POINTER(_Group)),
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
                if name != "ipn_gain":
                    setattr(entry, name, self._pointer_to(tensor))
        for target, linear in zip(entry.linear, group.linears, strict=False):
            self._fill_linear(target, linear)

    def _fill_linear(self, entry: Any, linear: LinearTensors) -> None:
        entry.out = linear.out_features
        for name in LINEAR_FIELDS:
            setattr(entry, name, self._pointer_to(getattr(linear, name)))
