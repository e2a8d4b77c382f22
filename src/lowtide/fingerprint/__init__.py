"""The fingerprint codec: weights without their keys, at the price of false positives. See docs/fingerprint.md.

An option, which artifacts do not use: where all positions are known, a mask and an entropy code are smaller and exact.
It is for maps whose keys cannot be enumerated, see `lowtide.keyed`.
"""

from lowtide.fingerprint.file import describe, pack, sizes, unpack
from lowtide.fingerprint.store import CodeOptions, Store, build_store
from lowtide.fingerprint.tensor import TensorOptions, TensorReport, decode_tensor, encode_tensor, open_tensor

__all__ = [
    "CodeOptions",
    "Store",
    "TensorOptions",
    "TensorReport",
    "build_store",
    "decode_tensor",
    "describe",
    "encode_tensor",
    "open_tensor",
    "pack",
    "sizes",
    "unpack",
]
