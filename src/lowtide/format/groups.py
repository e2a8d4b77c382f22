"""The tensors of a group of graded linear layers, in memory: what compress makes, the file holds and engines read.

Legend: `in` input channels of the group, `out` rows of a layer, S slices, E exact channels, P policies, B budgets, H
features of the IPN (docs/architecture.md: Importance prediction).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.format import codec

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]

#: Field -> stored dtype, in stored order. Names in the file: `lowtide.<group>.<field>` and `<linear>.<field>`.
GROUP_FIELDS: dict[str, str] = {
    "mean": "F16",
    "col_scale": "F16",
    "importance": "F16",
    "shrink": "F32",
    "exact_channels": "I32",
    "thresholds": "F32",
}
#: The same for what the rule `ipn` adds to a group; `ipn_shapes` says which group has which.
IPN_FIELDS: dict[str, str] = {
    "ipn_importance": "F16",
    "ipn_mix": "F32",
    "ipn_gain": "F32",
    "ipn_probe": "I8",
    "ipn_scale": "F32",
    "ipn_bias": "F32",
    "ipn_factor": "F32",
    "ipn_centroids": "I8",
    "ipn_step": "F16",
    "ipn_channels": "I32",
    "ipn_keys": "I8",
    "ipn_key_scale": "F32",
    "ipn_key_bias": "F32",
}
#: Of these no token reads all: one budget's gain, and no centroid, for engines make tables of them (`centroids`).
_NOT_READ = {"ipn_gain": 4, "ipn_centroids": 0, "ipn_step": 0}
LINEAR_FIELDS: dict[str, str] = {
    "weight": "U8",
    "row_scale": "F16",
    "bias": "F16",
    "exact": "F16",
    "outlier_ptr": "U32",
    "outlier_row": "U8",
    "outlier_gap": "U8",
    "outlier_value": "F16",
}


@dataclass
class LinearTensors:
    """One linear layer.

    Attributes:
        name: Hugging Face module name, e.g. `model.layers.3.self_attn.q_proj`.
        weight: uint8 [S, in * out_pad / 4], 2-bit digits (see codec).
        row_scale: float16 [out], above zero.
        bias: float16 [out], the layer's own bias plus W @ mean.
        exact: float16 [E, out], exact columns in the order of `exact_channels`.
        outlier_ptr: uint32 [tiles + 1], first entry of each tile.
        outlier_row, outlier_gap: uint8 [n], row within the tile and step from the previous entry's column.
        outlier_value: float16 [n], exact weight; 0 marks a filler.
        out_features: rows.
    """

    name: str
    weight: NDArray[np.uint8]
    row_scale: F16
    bias: F16
    exact: F16
    outlier_ptr: NDArray[np.uint32]
    outlier_row: NDArray[np.uint8]
    outlier_gap: NDArray[np.uint8]
    outlier_value: F16
    out_features: int

    def outliers(self) -> tuple[NDArray[np.int64], NDArray[np.int64], F16]:
        """(rows, columns, values) of the outliers in stored order, fillers left out."""
        return codec.unpack_outliers(
            self.outlier_ptr, self.outlier_row, self.outlier_gap, self.outlier_value, self.out_features
        )

    def side_bytes(self) -> int:
        """Bytes read for every token besides the digits."""
        return sum(int(getattr(self, field).nbytes) for field in LINEAR_FIELDS if field != "weight")


@dataclass
class IpnTensors:
    """What the rule `ipn` (importance prediction network) stores for a group; None where a group has no such tensor.

    Attributes:
        importance: float16 [in], w_j >= 0; 0 for exact channels.
        mix: float32 [H + 1], weights of the features and a constant; groups of the decoder only.
        gain: float32 [B], how far each budget lets the waterline move; groups of the decoder only.
        probe: int8 [H, in]; `qkv` and `gate_up` only, like scale and bias.
        scale, bias: float32 [H].
        factor: float32 [3], above zero: the thresholds of q, k and v are the group's times these; `qkv` only. None, if
            they read the same channels.
        centroids: int8 [K, in], the middles of K clusters of the group's inputs in units of `step`, as differences from
            the mean; None, like all that follows, in artifacts without.
        step: float16 [in], at least 0; 0 for exact channels.
        channels: int32 [C], ascending, the input channels that tell clusters apart; `qkv`, `gate_up` and `head` only,
            like all that follows. C is a multiple of 16.
        keys: int8 [C, K]; key_scale, key_bias: float32 [K]. A token is of the cluster k with the largest
            `key_scale_k sum_c keys_ck x_c + key_bias_k`; `o` and `down` go by the cluster of `qkv` and `gate_up`.
    """

    importance: F16
    mix: F32 | None = None
    gain: F32 | None = None
    probe: NDArray[np.int8] | None = None
    scale: F32 | None = None
    bias: F32 | None = None
    factor: F32 | None = None
    centroids: NDArray[np.int8] | None = None
    step: F16 | None = None
    channels: NDArray[np.int32] | None = None
    keys: NDArray[np.int8] | None = None
    key_scale: F32 | None = None
    key_bias: F32 | None = None

    def fields(self) -> dict[str, NDArray[Any]]:
        """The tensors that are there, by their names in `IPN_FIELDS`."""
        found = {field: getattr(self, field.removeprefix("ipn_")) for field in IPN_FIELDS}
        return {field: tensor for field, tensor in found.items() if tensor is not None}

    def side_bytes(self) -> int:
        """Bytes read for every token besides what takes the place of the mean and the bias."""
        return sum(_NOT_READ.get(field, int(tensor.nbytes)) for field, tensor in self.fields().items())


def ipn_shapes(
    group: str, inputs: int, features: int, budgets: int, centroids: int = 0, channels: int = 0, factors: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shapes of exactly the IPN's tensors that a group has, by field; none for `embed`."""
    shapes: dict[str, tuple[int, ...]] = {}
    if group != "embed":
        shapes["ipn_importance"] = (inputs,)
    if group not in ("embed", "head"):
        shapes |= {"ipn_mix": (features + 1,), "ipn_gain": (budgets,)}
    if group.rpartition(".")[2] in ("qkv", "gate_up"):
        shapes |= {"ipn_probe": (features, inputs), "ipn_scale": (features,), "ipn_bias": (features,)}
    if factors and group.rpartition(".")[2] == "qkv":
        shapes["ipn_factor"] = (3,)
    if centroids and group != "embed":
        shapes |= {"ipn_centroids": (centroids, inputs), "ipn_step": (inputs,)}
        if group.rpartition(".")[2] in ("qkv", "gate_up", "head"):
            shapes |= {"ipn_channels": (channels,), "ipn_keys": (channels, centroids)}
            shapes |= {"ipn_key_scale": (centroids,), "ipn_key_bias": (centroids,)}
    return shapes


@dataclass
class GroupTensors:
    """The linear layers that share one input, and what they share.

    Attributes:
        name: `layers.N.<group>`, `head` or `embed`.
        in_features: input channels.
        slices: S.
        mean: float16 [in], 0 for exact channels.
        col_scale: float16 [in], above zero.
        importance: float16 [in], at least 0; 0 for exact channels.
        shrink: float32 [S], gamma of level L at index L - 1.
        exact_channels: int32 [E], strictly ascending.
        thresholds: float32 [P, B, S], ascending along S; [0, 0, S] for `embed`, which stores none.
        linears: the member layers in the order of `arch.GROUPS`.
        zero: a digit of each slice means exactly zero (see `codec.centres`).
        ipn: what the rule `ipn` needs, where the artifact has it.
    """

    name: str
    in_features: int
    slices: int
    mean: F16
    col_scale: F16
    importance: F16
    shrink: F32
    exact_channels: NDArray[np.int32]
    thresholds: F32
    linears: list[LinearTensors]
    zero: bool = False
    ipn: IpnTensors | None = None

    @property
    def centres(self) -> tuple[int, ...]:
        """Twice the digit that means nothing, slice by slice, [S]."""
        return codec.centres(self.slices, self.zero)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Every stored tensor under its name in the file."""
        named: dict[str, NDArray[Any]] = {}
        for field in GROUP_FIELDS:
            if field != "thresholds" or self.name != "embed":
                named[f"lowtide.{self.name}.{field}"] = getattr(self, field)
        for field, tensor in self.ipn.fields().items() if self.ipn else ():
            named[f"lowtide.{self.name}.{field}"] = tensor
        for linear in self.linears:
            for field in LINEAR_FIELDS:
                named[f"{linear.name}.{field}"] = getattr(linear, field)
        return named

    def codes(self) -> NDArray[np.uint8]:
        """The digits of all rows of the group as offset-binary integers, uint8 [out, in]."""
        parts = [codec.unpack_digits(x.weight, x.out_features, self.in_features, self.slices) for x in self.linears]
        return np.concatenate(parts)

    def beside(self) -> NDArray[np.bool_]:
        """Which weights are exact beside the digits (outliers, exact channels), of all rows: bool [out, in]."""
        mask = np.zeros((sum(linear.out_features for linear in self.linears), self.in_features), bool)
        mask[:, self.exact_channels] = True
        first = 0
        for linear in self.linears:
            rows, cols, _ = linear.outliers()
            mask[first + rows, cols] = True
            first += linear.out_features
        return mask

    def always(self) -> F32:
        """`exact_part` of all rows, float32 [out, in]."""
        return np.concatenate([self.exact_part(index) for index in range(len(self.linears))])

    def lookup(self) -> F32:
        """A table of embeddings as engines look it up, every slice and no shrink: float32 [out, in]."""
        whole = [_digit_sum(x.weight, self.centres, x.out_features, self.in_features) for x in self.linears]
        scale = np.concatenate([x.row_scale for x in self.linears]).astype(np.float32)[:, None]
        return np.where(self.beside(), self.always(), np.concatenate(whole) * self.col_scale.astype(np.float32) * scale)

    def weights(self) -> int:
        """Number of weights in the member layers."""
        return self.in_features * sum(linear.out_features for linear in self.linears)

    def side_bytes(self, ipn: bool = False) -> int:
        """Bytes read for every token besides digits: all side tensors, and thresholds of one policy and one budget.

        ipn: under the rule `ipn`, which reads its own tensors instead of the importance. Other rules read none of them.
        """
        own = sum(int(getattr(self, field).nbytes) for field in GROUP_FIELDS if field != "thresholds")
        if ipn and self.ipn is not None:
            own += self.ipn.side_bytes() - int(self.importance.nbytes)
        thresholds = 4 * self.slices if self.thresholds.size else 0
        return own + thresholds + sum(linear.side_bytes() for linear in self.linears)

    def dequantise(self, linear_index: int, level: int) -> F32:
        """What the digits say when every channel is read at one level: w_L, float32 [out, in].

        `r_i * c_j * gamma_L * sum_{s<L} (d_ijs - t_s) * 4^-s`, 2 t = `centres`; level 0 is zero. Columns of exact
        channels are zero, because those are always at level 0. Outliers and exact columns are not in it: add
        `exact_part`.
        """
        if not 0 <= level <= self.slices:
            raise ValueError(f"level must be 0 to {self.slices}, not {level}")
        linear = self.linears[linear_index]
        shape = (linear.out_features, self.in_features)
        if level == 0:
            return np.zeros(shape, np.float32)
        weight = _digit_sum(linear.weight[:level], self.centres[:level], *shape)
        weight *= self.col_scale.astype(np.float32) * self.shrink[level - 1]
        weight *= linear.row_scale.astype(np.float32)[:, None]
        weight[:, self.exact_channels] = 0
        return weight

    def exact_part(self, linear_index: int) -> F32:
        """Outliers and exact columns as a float32 [out, in] matrix; zero elsewhere. The product adds it to w_L."""
        linear = self.linears[linear_index]
        weight = np.zeros((linear.out_features, self.in_features), np.float32)
        rows, cols, values = linear.outliers()
        weight[rows, cols] = values
        weight[:, self.exact_channels] = linear.exact.T
        return weight


def _digit_sum(packed: NDArray[np.uint8], centres: tuple[int, ...], out: int, inputs: int) -> F32:
    """sum_s (d_s - centre_s / 2) * 4^-s over the given slices, float32 [out, in]; exact in float32."""
    slices = len(packed)
    q = codec.unpack_digits(packed, out, inputs, slices).astype(np.float32)
    # sum_s d_s 4^-s = q 4^-(S-1)
    q -= np.float32(codec.doubled_centre(centres) / 2)
    q *= np.float32(4.0 ** (1 - slices))
    return q
