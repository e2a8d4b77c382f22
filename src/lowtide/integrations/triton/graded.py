"""The graded linear layer on a torch device, one token at a time: a Triton backend and a plain torch one.

Both compute what docs/architecture.md defines, with two differences from the native kernels. Coefficients stay float32
and are not rounded to int8 with a scale per class (a GPU gains nothing from integers here), so results are nearer to
the exact product than the reference's. And sums are taken in another order: for each row digits, bias, outliers, exact
columns, outliers sorted by row. Levels are the reference's, bit for bit, so the same bytes are read.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowtide.errors import LowtideError
from lowtide.format import codec
from lowtide.format.groups import GroupTensors

BACKENDS = ("auto", "triton", "torch")
PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True)
class Tuning:
    """How the Triton kernels divide their work. Powers of two; results differ by the order of sums alone.

    Attributes:
        chunk: channels that share a region of the list of entries.
        block_bytes: bytes of a channel (4 rows each) that one program sums.
        block_entries: entries that one program loads at once.
        splits: programs that share the entries of the same bytes; None: enough to fill the device.
        block_rows, block_outliers: rows that one program finishes, and outliers of a row that it loads at once.
        warps: warps of a program that sums digits.
    """

    chunk: int = 64
    block_bytes: int = 128
    block_entries: int = 16
    splits: int | None = None
    block_rows: int = 32
    block_outliers: int = 16
    warps: int = 4

    def __post_init__(self) -> None:
        for name in ("chunk", "block_bytes", "block_entries", "block_rows", "block_outliers", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, not {value}")
        if self.splits is not None and self.splits < 1:
            raise ValueError(f"splits must be at least 1, not {self.splits}")


class GradedGroup:
    """The member layers of one group, uploaded once, applied to one input after the other.

    Not for several threads or streams at once: calls share their scratch memory.

    Attributes:
        in_features: input channels.
        slices: S.
        out_features: rows of each member, in the order of the group.
        device: where the tensors are.
        backend: "triton" or "torch".
    """

    def __init__(
        self, group: GroupTensors, device: str | torch.device, *, backend: str = "auto", tuning: Tuning | None = None
    ):
        """Uploads the group.

        Args:
            group: from `Artifact.groups`; not needed afterwards.
            device: e.g. "cuda" or "cpu".
            backend: "triton"; "torch", slower, for any device; "auto" takes Triton on a GPU if it is installed.
            tuning: how Triton divides the work.

        Raises:
            LowtideError: the backend is unknown or cannot run here.
        """
        self.device = torch.device(device)
        self.backend = choose_backend(backend, self.device)
        self.in_features, self.slices = group.in_features, group.slices
        self._zero, self._centres = group.zero, group.centres
        self.out_features = [linear.out_features for linear in group.linears]
        self._upload_columns(group)
        self._upload_rows(group)
        self._upload_outliers(group)
        self.device = self._weight.device  # "cuda" has become "cuda:0"
        if self.backend == "triton":
            self._prepare(tuning or Tuning())

    def __call__(self, x: torch.Tensor, thresholds: torch.Tensor) -> list[torch.Tensor]:
        """y f32 [out] of every member under the rule channel-norm.

        Args:
            x: f32 [in] on the device.
            thresholds: f32 [S] on the device, ascending, offset applied: +inf never reads a slice, a negative one
                always does.

        Returns:
            Views of one new tensor, in the order of the group's members.
        """
        self._check(x, (self.in_features,), torch.float32, "x")
        self._check(thresholds, (self.slices,), torch.float32, "thresholds")
        if self.backend == "torch":
            return self.apply(x, self.levels(x, thresholds))
        return self._launch(x, thresholds, None)

    def apply(self, x: torch.Tensor, levels: torch.Tensor) -> list[torch.Tensor]:
        """y f32 [out] of every member for given levels i32 [in] in 0..S (any other rule); exact channels count as 0."""
        self._check(x, (self.in_features,), torch.float32, "x")
        self._check(levels, (self.in_features,), torch.int32, "levels")
        if self.backend == "torch":
            return list(self._torch_product(x, levels * self._readable).split(self.out_features))
        return self._launch(x, None, levels)

    def levels(self, x: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
        """Levels i32 [in] of the rule channel-norm: thresholds below |x - mean| * importance; 0 for exact channels."""
        score = (x - self._mean.float()).abs() * self._importance.float()
        return (score[:, None] > thresholds).sum(1, dtype=torch.int32) * self._readable

    def bytes_read(self, levels: torch.Tensor) -> int:
        """Bytes of the group that the product loads at these levels i32 [in]: runs of digits (padding rows included)
        and side tensors. Scratch memory, inputs and outputs are not counted."""
        side = (
            *(self._mean, self._col_scale, self._importance, self._readable, self._shrink, self._exact_channels),
            *(self._row_scale, self._bias, self._exact, self._place),
            *(self._outlier_ptr, self._outlier_col, self._outlier_value),
        )
        return int(levels.sum()) * self._width + sum(t.numel() * t.element_size() for t in side)

    def _upload_columns(self, group: GroupTensors) -> None:
        """What belongs to input channels, and to the group as a whole."""
        readable = np.ones(group.in_features, np.uint8)
        readable[group.exact_channels] = 0
        self._readable = self._put(readable)
        self._mean, self._col_scale = self._put(group.mean), self._put(group.col_scale)
        self._importance, self._shrink = self._put(group.importance), self._put(group.shrink)
        self._exact_channels = self._put(group.exact_channels)

    def _upload_rows(self, group: GroupTensors) -> None:
        """Digits u8 [S, in, width] with all members side by side, and what belongs to rows.

        place i32 [rows] says where a row's digits are: its pair of bits in the byte * width + its byte.
        """
        shape = (group.slices, group.in_features)
        widths = [codec.padded_rows(out) // 4 for out in self.out_features]
        self._width = sum(widths)
        self._weight = torch.empty((*shape, self._width), dtype=torch.uint8, device=self.device)
        places, start = [], 0
        for linear, width in zip(group.linears, widths, strict=True):
            self._weight[:, :, start : start + width] = self._put(linear.weight).view(*shape, width)
            byte, pair = _row_places(linear.out_features)
            places.append(pair * self._width + start + byte)
            start += width
        self._place = self._put(np.concatenate(places).astype(np.int32))
        self._row_scale = self._put(np.concatenate([linear.row_scale for linear in group.linears]))
        self._bias = self._put(np.concatenate([linear.bias for linear in group.linears]))
        self._exact = self._put(np.concatenate([linear.exact for linear in group.linears], axis=1))

    def _upload_outliers(self, group: GroupTensors) -> None:
        """Outliers of all members, sorted by row: the artifact's order would need atomics to add them."""
        listed = [linear.outliers() for linear in group.linears]
        starts = np.cumsum([0, *self.out_features])
        rows = np.concatenate([rows + start for (rows, _, _), start in zip(listed, starts[:-1], strict=True)])
        cols = np.concatenate([cols for _, cols, _ in listed])
        values = np.concatenate([values for _, _, values in listed])
        order = np.lexsort((cols, rows))
        ptr = np.searchsorted(rows[order], np.arange(starts[-1] + 1))
        self._outlier_ptr = self._put(ptr.astype(np.int32))
        self._outlier_col = self._put(cols[order].astype(np.int32))
        self._outlier_value = self._put(values[order])

    def _prepare(self, tuning: Tuning) -> None:
        """Scratch memory of the Triton kernels."""
        self._chunks = -(-self.in_features // tuning.chunk)
        blocks = -(-self._width // tuning.block_bytes)
        splits = tuning.splits or -(-PROGRAMS_PER_PROCESSOR * _processors(self.device) // blocks)
        self._splits = min(splits, self._chunks)
        self._tuning, self._blocks = tuning, blocks
        capacity = self._chunks * tuning.chunk * self.slices
        self._entry = torch.empty(capacity, dtype=torch.int32, device=self.device)
        self._coef = torch.empty(capacity, dtype=torch.float32, device=self.device)
        self._count = torch.empty(self._chunks, dtype=torch.int32, device=self.device)
        self._partial = torch.empty((self._splits, 4, self._width), dtype=torch.float32, device=self.device)

    def _launch(
        self, x: torch.Tensor, thresholds: torch.Tensor | None, levels: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """The three kernels; exactly one of thresholds and levels is given."""
        with torch.cuda.device_of(x):  # Triton launches on the current GPU; on the CPU this does nothing
            return self._launch_here(x, thresholds, levels)

    def _launch_here(
        self, x: torch.Tensor, thresholds: torch.Tensor | None, levels: torch.Tensor | None
    ) -> list[torch.Tensor]:
        from lowtide.integrations.triton import kernels

        t, rows = self._tuning, len(self._place)
        y = torch.empty(rows, dtype=torch.float32, device=self.device)
        columns = (self._mean, self._col_scale, self._importance, self._readable, self._shrink)
        # The one that is not given is not read either; the kernel only needs some pointer there.
        rule = (self._shrink if thresholds is None else thresholds, self._entry if levels is None else levels)
        entries = (self._entry, self._coef, self._count)
        kernels.choose_entries[(self._chunks,)](
            *(x, *columns, *rule, *entries, self.in_features),
            GIVEN=levels is not None,
            SLICES=self.slices,
            CHUNK=t.chunk,
        )
        kernels.sum_digits[(self._blocks, self._splits)](
            *(self._weight, *entries, self._partial, self._width, self.in_features, self._chunks, self._splits),
            SLICES=self.slices,
            ZERO=self._zero,
            CHUNK=t.chunk,
            BLOCK_BYTES=t.block_bytes,
            BLOCK_ENTRIES=t.block_entries,
            num_warps=t.warps,
        )
        kernels.finish_rows[(-(-rows // t.block_rows),)](
            *(self._partial, self._place, self._row_scale, self._bias, x, self._mean),
            *(self._exact_channels, self._exact, self._outlier_ptr, self._outlier_col, self._outlier_value),
            *(y, rows, 4 * self._width, self._splits, len(self._exact_channels)),
            BLOCK_ROWS=t.block_rows,
            BLOCK_OUTLIERS=t.block_outliers,
        )
        return list(y.split(self.out_features))

    def _torch_product(self, x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """y f32 [rows] of all members in plain torch; reads the active channels of each slice, as Triton does."""
        a = x - self._mean.float()
        gamma = torch.cat([self._shrink.new_zeros(1), self._shrink])[levels.long()]
        value = a * self._col_scale.float() * gamma
        planes = torch.zeros((4, self._width), device=self.device)
        for s in range(self.slices):
            active = torch.nonzero(levels > s).flatten()
            u = value[active] * 4.0**-s
            runs = self._weight[s, active]
            for pair in range(4):
                planes[pair] += u @ (((runs >> (2 * pair)) & 3).float() - self._centres[s] / 2)
        y = planes.flatten()[self._place.long()] * self._row_scale.float() + self._bias.float()
        rows = torch.repeat_interleave(torch.arange(len(y), device=self.device), self._outlier_ptr.diff().long())
        y.index_add_(0, rows, self._outlier_value.float() * a[self._outlier_col.long()])
        return y + x[self._exact_channels.long()] @ self._exact.float()

    def _put(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """A copy of the array on the device; the artifact's arrays are read-only maps, which torch warns about."""
        return torch.from_numpy(np.array(array)).to(self.device)

    def _check(self, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
        """Kernels take the address on trust, so a wrong tensor must not reach them."""
        right = tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.is_contiguous()
        if not right or tensor.device != self.device:
            raise ValueError(
                f"{name} must be a contiguous {dtype} {list(shape)} on {self.device}, "
                f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend to use, "triton" or "torch", for a wish out of BACKENDS; LowtideError if it cannot be met."""
    if backend not in BACKENDS:
        raise LowtideError(f"backend {backend!r} is not known; take one of {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        return "triton" if installed and device.type == "cuda" else "torch"
    if backend == "triton" and not installed:
        raise LowtideError("backend 'triton' needs Triton: pip install triton, or take backend 'torch'")
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise LowtideError("backend 'triton' needs a GPU, or TRITON_INTERPRET=1 to be interpreted; or take 'torch'")
    return backend


def _row_places(out: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(byte of a channel, pair of bits in it) of each row, i64 [out]."""
    byte, pair = np.empty(codec.padded_rows(out), np.int64), np.empty(codec.padded_rows(out), np.int64)
    for first, rows in codec.tiles(out):
        row = np.arange(rows)
        byte[first : first + rows] = first // 4 + row % (rows // 4)
        pair[first : first + rows] = row // (rows // 4)
    return byte[:out], pair[:out]


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few for the interpreter, so that it meets several splits."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2
