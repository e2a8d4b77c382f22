"""liblowtide's structures and functions as ctypes knows them (csrc/lowtide.h)."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from lowtide.errors import LowtideError
from lowtide.format.groups import LINEAR_FIELDS

ABI_VERSION = 8
MAX_SLICES = 4

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p


class Linear(ctypes.Structure):
    _fields_ = [("out", _i64), *((name, _pointer) for name in LINEAR_FIELDS), ("ipn_base", _pointer)]


class Group(ctypes.Structure):
    _fields_ = [
        *((name, _i64) for name in ("in_", "slices", "linear_count", "exact_count", "side_bits")),
        ("centre", _i64 * MAX_SLICES),
        *((name, _pointer) for name in ("mean", "col_scale", "importance", "shrink", "exact_channels")),
        *((name, _i64) for name in ("ipn_side_bits", "ipn_features")),
        *((name, _pointer) for name in ("ipn_importance", "ipn_mix", "ipn_probe", "ipn_scale", "ipn_bias")),
        ("ipn_factor", _pointer),
        *((name, _i64) for name in ("ipn_centroids", "ipn_key_channels")),
        *((name, _pointer) for name in ("ipn_mean", "ipn_channels", "ipn_keys", "ipn_key_scale", "ipn_key_bias")),
        ("linear", Linear * 3),
    ]


class Model(ctypes.Structure):
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
        ("groups", ctypes.POINTER(Group)),
    ]


class Policy(ctypes.Structure):
    _fields_ = [
        *(("rule", _i64), ("params", _pointer), ("log2_offset", ctypes.c_double), ("gains", _pointer)),
        *(("head_offset", ctypes.c_double), ("head_margin", ctypes.c_float)),
    ]


class Stats(ctypes.Structure):
    _fields_ = [(name, _i64) for name in ("body_bits", "head_bits", "embed_bits", "cache_bytes")]


class Step(ctypes.Structure):
    _fields_ = [
        ("sequence", _pointer),
        ("token", _i64),
        ("position", _i64),
        ("policy", ctypes.POINTER(Policy)),
        ("logits", _pointer),
        ("stats", ctypes.POINTER(Stats)),
    ]


@cache
def library() -> ctypes.CDLL:
    """The library, loaded once: LOWTIDE_LIBRARY, or the one beside this file.

    Raises:
        LowtideError: it does not load, or it is of another version.
    """
    path = Path(os.environ.get("LOWTIDE_LIBRARY") or Path(__file__).with_name("liblowtide.so"))
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise LowtideError(f"{path}: the native library does not load ({error}); reinstall lowtide") from None
    try:
        _declare(lib)
    except AttributeError as error:
        raise LowtideError(f"{path}: the native library is of another version ({error}); reinstall lowtide") from None
    return lib


def _declare(lib: ctypes.CDLL) -> None:
    lib.lt_available_isas.restype = ctypes.c_char_p
    lib.lt_engine_new.restype = _pointer
    lib.lt_engine_new.argtypes = [ctypes.POINTER(Model), ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
    lib.lt_engine_free.argtypes = [_pointer]
    lib.lt_engine_isa.restype, lib.lt_engine_isa.argtypes = ctypes.c_char_p, [_pointer]
    lib.lt_sequence_new.restype, lib.lt_sequence_new.argtypes = _pointer, [_pointer]
    lib.lt_sequence_free.argtypes = [_pointer]
    lib.lt_decode.argtypes = [_pointer, ctypes.POINTER(Step), _i64]
    lib.lt_prefill.argtypes = [_pointer, _pointer, _pointer, _i64, _i64, ctypes.c_int, _pointer]
    lib.lt_group_product.restype = _i64
    policy = ctypes.POINTER(Policy)
    lib.lt_group_product.argtypes = [_pointer, _pointer, _i64, _pointer, policy, ctypes.POINTER(_pointer)]
    lib.lt_group_bits.restype, lib.lt_group_bits.argtypes = _i64, [_pointer, _pointer]
    lib.lt_read_bandwidth.restype = ctypes.c_double
    lib.lt_read_bandwidth.argtypes = [_pointer, _i64, ctypes.c_int]
