"""From a quantised group to the artifact's tensors, and the work folder in which finished groups wait."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lowtide.arch import GroupSpec
from lowtide.compress.calibrate import GroupStats
from lowtide.compress.quantise import QuantisedGroup
from lowtide.compress.thresholds import GroupCurve, score_table
from lowtide.errors import LowtideError
from lowtide.format import codec
from lowtide.format.groups import GROUP_FIELDS, LINEAR_FIELDS, GroupTensors, LinearTensors
from lowtide.rules import RULES
from lowtide.rules import GroupStats as RuleStats

TABLE_RULES = ("channel-norm", "channel-abs", "statistical-topk", "gate")
"""Rules whose thresholds come from the distribution of their scores."""


def pack_group(spec: GroupSpec, coded: QuantisedGroup, slices: int, zero: bool = False) -> GroupTensors:
    """The group's tensors in the artifact's layout, thresholds still missing ([0, 0, S]). zero: see `codec.centres`."""
    rows, cols, values = (t.numpy() for t in (coded.outlier_rows, coded.outlier_cols, coded.outlier_values))
    linears = []
    first = 0
    for linear in spec.linears:
        end = first + linear.out_features
        here = (rows >= first) & (rows < end)
        ptr, row, gap, value = codec.pack_outliers(rows[here] - first, cols[here], values[here], linear.out_features)
        linears.append(
            LinearTensors(
                name=linear.name,
                weight=codec.pack_digits(coded.digits[first:end].numpy(), slices),
                row_scale=coded.row_scale[first:end].numpy(),
                bias=coded.bias[first:end].numpy(),
                exact=np.ascontiguousarray(coded.exact[:, first:end].numpy()),
                outlier_ptr=ptr,
                outlier_row=row,
                outlier_gap=gap,
                outlier_value=value,
                out_features=linear.out_features,
            )
        )
        first = end
    group = GroupTensors(
        name=spec.name,
        in_features=spec.in_features,
        slices=slices,
        mean=coded.mean.numpy(),
        col_scale=coded.col_scale.numpy(),
        importance=coded.importance.numpy(),
        shrink=coded.shrink.numpy(),
        exact_channels=coded.exact_channels.numpy().astype(np.int32),
        thresholds=np.zeros((0, 0, slices), np.float32),
        linears=linears,
        zero=zero,
    )
    _check_finite(group)
    return group


def _check_finite(group: GroupTensors) -> None:
    for name, tensor in group.tensors().items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise LowtideError(f"{name}: values beyond float16's range; this model cannot be coded")


def group_curve(group: GroupTensors, coded: QuantisedGroup, stats: GroupStats) -> GroupCurve:
    """What thresholds need to know of the group; its scores are those of the stored (rounded) tensors."""
    known = RuleStats.of(group)
    readable = np.ones(group.in_features, bool) if known.exact is None else ~np.asarray(known.exact)
    x = stats.sample.numpy()
    gate = None if stats.gate is None else stats.gate.numpy()
    tables = {}
    for rule in TABLE_RULES:
        if gate is not None or not RULES[rule].needs_gate:
            tables[rule] = score_table(np.asarray(RULES[rule].score(known, x, gate))[:, readable])
    side = group.side_bytes() + 4 * group.slices  # the thresholds of one policy and budget, still to come
    return GroupCurve(
        name=group.name,
        in_features=group.in_features,
        out=sum(linear.out_features for linear in group.linears),
        side_bits=8 * side,
        exact=len(group.exact_channels),
        distortion=coded.distortion,
        importance_rms=coded.importance_rms,
        tables=tables,
    )


class WorkFolder:
    """`OUT.partial`: what a compression has finished so far, thrown away if it was begun with other options."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path = path
        text = json.dumps(key, sort_keys=True)
        marker = path / "key.json"
        if not marker.is_file() or marker.read_text() != text:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            marker.write_text(text)

    def save_arrays(self, name: str, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        """Write arrays so that a crash leaves the old file or the new one."""
        temporary = self.path / f"{name}.tmp"
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, self.path / f"{name}.npz")

    def load_arrays(self, name: str) -> dict[str, np.ndarray[Any, Any]] | None:
        """The arrays saved under that name, or None."""
        file = self.path / f"{name}.npz"
        if not file.is_file():
            return None
        with np.load(file, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}

    def save_group(self, group: GroupTensors, curve: GroupCurve | None) -> None:
        """Keep a finished group and its curve."""
        arrays = dict(group.tensors())
        if curve is not None:
            arrays["curve"] = np.array([curve.out, curve.side_bits, curve.exact, curve.importance_rms], np.float64)
            arrays["distortion"] = np.array(curve.distortion, np.float64)
            arrays |= {f"table/{rule}": table for rule, table in curve.tables.items()}
        self.save_arrays(group.name, arrays)

    def has(self, name: str) -> bool:
        """Whether arrays were saved under that name."""
        return (self.path / f"{name}.npz").is_file()

    def load_group(self, spec: GroupSpec, slices: int, zero: bool = False) -> GroupTensors:
        """A finished group, thresholds still missing."""
        arrays = self._arrays(spec)
        own: dict[str, Any] = {f: arrays[f"lowtide.{spec.name}.{f}"] for f in GROUP_FIELDS if f != "thresholds"}
        linears = []
        for linear in spec.linears:
            fields = {f: arrays[f"{linear.name}.{f}"] for f in LINEAR_FIELDS}
            linears.append(LinearTensors(name=linear.name, out_features=linear.out_features, **fields))
        empty = np.zeros((0, 0, slices), np.float32)
        return GroupTensors(
            name=spec.name,
            in_features=spec.in_features,
            slices=slices,
            thresholds=empty,
            linears=linears,
            zero=zero,
            **own,
        )

    def load_curve(self, spec: GroupSpec) -> GroupCurve:
        """The curve of a finished group."""
        arrays = self._arrays(spec)
        out, side_bits, exact, rms = (float(v) for v in arrays["curve"])
        tables = {key.removeprefix("table/"): value for key, value in arrays.items() if key.startswith("table/")}
        distortion = [float(d) for d in arrays["distortion"]]
        return GroupCurve(spec.name, spec.in_features, int(out), int(side_bits), int(exact), distortion, rms, tables)

    def _arrays(self, spec: GroupSpec) -> dict[str, np.ndarray[Any, Any]]:
        arrays = self.load_arrays(spec.name)
        if arrays is None:
            raise LowtideError(f"{self.path}: {spec.name} is missing; delete the folder and compress again")
        return arrays

    def remove(self) -> None:
        """Throw the folder away."""
        shutil.rmtree(self.path, ignore_errors=True)
