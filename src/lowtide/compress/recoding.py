"""The walk that gives a graded code its error feedback: forward, block by block, each on what the coded ones give.

Every window of the text is read at one of BUDGETS, with the thresholds of `channel-norm`, and the dense model runs
beside it. So a group is recoded on inputs as they will be, errors of the blocks before it included, and is asked for
what the dense model's layer gives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lowtide.arch import GROUPS
from lowtide.compress.dense import DenseModel, decoder_block, rope_tables
from lowtide.compress.feedback import Coded, Seen, recode
from lowtide.compress.pack import WorkFolder
from lowtide.compress.products import product_type
from lowtide.errors import LowtideError
from lowtide.format import codec
from lowtide.format.groups import GroupTensors

BUDGETS = (2.25, 2.75, 3.25, 4.0, math.inf)
"""Bits read that digits are chosen for, in turn over the windows."""
AIMS = {"low": (4.0**0.75, 5.0), "even": (4.0**1.2, 6.3)}
"""Which budgets gain. Higher ones have smaller errors, so their windows get a weight: a factor for each bit, and the
bits from which on it grows no more. `even` is to make none worse, `low` takes from a full read for budgets up to 3."""
STATE = "feedback"
FEEDBACK_VERSION = 1
"""Raised when blocks recoded by an older version of this code must not be reused."""


@dataclass
class _Text:
    """The states of both models on the way, f32 [B, N, D], and of each window the thresholds' row and the weight."""

    ours: torch.Tensor
    theirs: torch.Tensor
    rows: list[int]
    weight: torch.Tensor


class Recoding:
    """Error feedback for all groups of the decoder.

    Args:
        model: what is compressed; ids: i64 [B, N], a window each; aim: one of AIMS; grid, thresholds: of
        `channel-norm`, budgets in bits and f32 [B, S] for each group; load: a group as it was coded first;
        progress(done, total).
    """

    def __init__(
        self,
        model: DenseModel,
        ids: torch.Tensor,
        aim: str,
        grid: list[float],
        thresholds: Mapping[str, np.ndarray],  # type: ignore[type-arg]
        load: Callable[[str], GroupTensors],
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        self.model, self.ids, self.aim, self.grid, self.thresholds = model, ids, aim, grid, thresholds
        self.load, self.progress = load, progress

    @torch.no_grad()
    def run(self, work: WorkFolder, embedding: torch.Tensor) -> None:
        """Recode into `work`, where an interrupted run goes on. embedding: f32 [V, D], as engines look it up."""
        layers = self.model.config.num_layers
        if len(self.ids) < len(BUDGETS):
            raise LowtideError(
                f"--feedback: needs {len(BUDGETS)} windows of {self.ids.shape[1]} tokens or more, one for each of its "
                "budgets; give a longer calibration text"
            )
        rows, say = [], []
        factor, most = AIMS[self.aim]
        for window in range(len(self.ids)):
            bits = min(BUDGETS[window % len(BUDGETS)], self.grid[-1])
            rows.append(min(range(len(self.grid)), key=lambda i: abs(self.grid[i] - bits)))
            say.append(factor ** min(bits, most))
        weight = torch.tensor(say) / (sum(say) / len(say))
        state = work.load_arrays(STATE)
        if state is None:
            text = _Text(F.embedding(self.ids, embedding), self.model.embed(self.ids), rows, weight)
        else:
            text = _Text(torch.from_numpy(state["ours"]), torch.from_numpy(state["theirs"]), rows, weight)
        for index in range(0 if state is None else int(state["next"]), layers):
            self._block(index, text, work)
            both = {"ours": text.ours.numpy(), "theirs": text.theirs.numpy()}
            work.save_arrays(STATE, {"next": np.array(index + 1)} | both)
            self.progress(index + 1, layers)

    def _block(self, index: int, text: _Text, work: WorkFolder) -> None:
        block, config = self.model.block(index), self.model.config
        rope = rope_tables(config, 0, self.ids.shape[1])
        dense: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def theirs(kind: str, x: torch.Tensor) -> torch.Tensor:
            dense[kind] = x, block.apply(kind, x)
            return dense[kind][1]

        def ours(kind: str, x: torch.Tensor) -> torch.Tensor:
            group = self.load(f"layers.{index}.{kind}")
            wanted, y = dense.pop(kind)
            coded, seen = self._look(group, x.flatten(0, 1), wanted.flatten(0, 1), y.flatten(0, 1), text)
            recode(coded, seen, block.weights[kind] * ~coded.held)
            shift = (seen.error * seen.weight[:, None]).mean(0)
            work.save_group(_with(group, coded.digits, shift), None)
            return y - (seen.error - shift).view_as(y)

        norms = (block.input_norm, block.post_norm)
        text.theirs = decoder_block(config, norms, text.theirs, theirs, rope)
        assert set(dense) == set(GROUPS)
        text.ours = decoder_block(config, norms, text.ours, ours, rope)

    def _look(
        self, group: GroupTensors, x: torch.Tensor, wanted: torch.Tensor, y: torch.Tensor, text: _Text
    ) -> tuple[Coded, Seen]:
        """The group's digits, and what it saw: x, wanted f32 [T, in], inputs of ours and of the dense model; y f32
        [T, out], the dense layer's output."""
        coded = coded_of(group)
        mean = torch.from_numpy(group.mean.astype(np.float32))
        a = x - mean
        score = a.abs() * torch.from_numpy(group.importance.astype(np.float32))
        window = self.ids.shape[1]
        cuts = torch.from_numpy(self.thresholds[group.name])[text.rows].repeat_interleave(window, 0)
        bias = torch.from_numpy(np.concatenate([linear.bias for linear in group.linears]).astype(np.float32))
        always = torch.from_numpy(group.always())
        exact = torch.from_numpy(group.exact_channels.astype(np.int64))
        error = y - bias - a[:, exact] @ always[:, exact].T  # massive inputs: in float32
        a[:, exact] = 0
        kind = product_type()  # of products whose errors are measured; what digits are chosen by is float32
        error -= F.linear(a.to(kind), always.to(kind)).float()
        masks = []
        for k, plane in enumerate(coded.planes()):
            masks.append(score > cuts[:, k, None])
            error -= F.linear((a * masks[k]).to(kind), plane.to(kind)).float()
        return coded, Seen(a, wanted - mean, torch.stack(masks), error, text.weight.repeat_interleave(window))


def coded_of(group: GroupTensors) -> Coded:
    """A group's digits and what they mean."""
    scales = np.concatenate([linear.row_scale for linear in group.linears]).astype(np.float32)
    return Coded(
        torch.from_numpy(group.codes()),
        code_values(group),
        torch.from_numpy(scales),
        torch.from_numpy(group.col_scale.astype(np.float32)),
        torch.from_numpy(group.beside()),
    )


def code_values(group: GroupTensors) -> torch.Tensor:
    """What each slice of each code adds, in units of the scales, f32 [4^S, S]: levels' values and their differences."""
    codes = torch.arange(4**group.slices, dtype=torch.float32)
    centre, last, found = 0.0, torch.zeros(len(codes)), []
    for level in range(1, group.slices + 1):
        centre += group.centres[level - 1] / 2 * 4.0 ** (1 - level)
        top = (codes / 4.0 ** (group.slices - level)).floor()
        value = (top * 4.0 ** (1 - level) - centre) * float(group.shrink[level - 1])
        found.append(value - last)
        last = value
    return torch.stack(found, 1)


def _with(group: GroupTensors, digits: torch.Tensor, shift: torch.Tensor) -> GroupTensors:
    """The group with other digits u8 [out, in], and its biases moved by shift f32 [out]."""
    linears, first = [], 0
    for linear in group.linears:
        rows = slice(first, first + linear.out_features)
        weight = codec.pack_digits(np.ascontiguousarray(digits[rows].numpy()), group.slices)
        bias = (linear.bias.astype(np.float32) + shift[rows].numpy()).clip(-65504, 65504).astype(np.float16)
        linears.append(dataclasses.replace(linear, weight=weight, bias=bias))
        first += linear.out_features
    return dataclasses.replace(group, linears=linears)
