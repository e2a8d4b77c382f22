"""The graded model as something to train: every token reads its own levels, and gradients pass through the masks.

Forward, a group computes `y = sum_k D_k (a * m_k)`, where `D_k` is what slice k adds to the weights, `a` the input
minus its mean, or its cluster's, and `m_k` in {0, 1} whether the token reads slice k: its score is above theta_k.
Backward, a mask's gradient is that of a sigmoid in place of the step (straight-through). Weights are learned in units
of their scales, w_ij = r_i c_j z_ij: z takes the gradient of a code without rounding, `dz = r c dy^T (a * m_0)`, for
what level a channel is read at does not matter to a weight that moves less than its step; r and c take the exact one,
digits held (after LSQ, arXiv 1902.08153).

Products run in int8 or bfloat16 on processors that are faster with it (`lowtide.compress.products`,
`lowtide.learn.slices`); sums, norms, softmax and the KL stay in float32. The gradient is that of coefficients that are
not rounded.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lowtide.arch import GROUPS, LAYER_NORMS, norm_specs
from lowtide.compress.dense import DenseModel, decoder_block, rms_norm, rope_tables
from lowtide.compress.same_model import check_same_model
from lowtide.errors import LowtideError
from lowtide.format.groups import GroupTensors
from lowtide.format.reader import Artifact
from lowtide.learn.always import Always
from lowtide.learn.clusters import Clusters
from lowtide.learn.digits import Code
from lowtide.learn.graded_group import GradedGroup, MaskedProduct
from lowtide.learn.low_rank import low_rank
from lowtide.learn.shards import whole

FEATURE_GROUPS = {"qkv": "qkv", "o": "qkv", "gate_up": "gate_up", "down": "gate_up"}
"""Whose input the probe reads that serves a group."""


class Masks(Protocol):
    """What decides the levels: a `lowtide.learn.ipn.At`, an Ipn at a budget for one call of the model."""

    tau: float
    """Temperature of the masks' gradient, log2 units."""
    code: torch.Tensor | None
    """The cluster of every token at the last group that was seen, i64 [T]; None where there are no clusters."""

    def see(self, name: str, x: torch.Tensor) -> None:
        """A normed residual stream f32 [T, in] passes by, at the input of group `name` (qkv, gate_up or the head)."""
        ...

    def scores(self, name: str, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For the centred input a f32 [T, in] of group `name`: log2 scores f32 [T, in], -inf for exact channels, and
        thresholds f32 [S] in log2, or [M, S], one row for each linear layer."""
        ...


class GradedModel:
    """A compressed model to learn masks, and weights, on.

    Args:
        artifact: its scales, outliers and digits.
        dense: the model it was made from: what is distilled, and the weights that training begins with. Everything
            lies on its device.
        train_weights: hold the decoder's weights as parameters; `refresh` codes them anew. Weights that were trained
            jointly before, or coded with error feedback, go on from their digits.
        rank: of what is added to the weights (LoRA, arXiv 2106.09685), at most; 0 lets all of them learn.
        seed: of what is drawn for that.

    Raises:
        LowtideError: the artifact is of another model.
    """

    def __init__(
        self, artifact: Artifact, dense: DenseModel, train_weights: bool = False, rank: int = 0, seed: int = 0
    ) -> None:
        check_same_model(artifact, dense.source)
        self.config, self.dense, self.rank, self.seed = dense.config, dense, rank, seed
        self.device = dense.device
        self.codes: dict[str, Code] = {}
        self.row_scales: dict[str, torch.Tensor] = {}
        self.groups: dict[str, GradedGroup] = {}
        self.norms: list[nn.ParameterList] = []
        # The artifact's norms, not the dense model's: joint training moves them.
        stored = {n: torch.from_numpy(np.array(artifact.tensor(n))).to(self.device) for n, _ in norm_specs(self.config)}
        learned = artifact.manifest.stats.get("learned")
        trained = isinstance(learned, dict) and bool(learned.get("joint"))
        from_digits = trained or "feedback" in artifact.manifest.stats
        for index in range(self.config.num_layers):
            pair = [nn.Parameter(stored[f"model.layers.{index}.{n}"], requires_grad=train_weights) for n in LAYER_NORMS]
            self.norms.append(nn.ParameterList(pair))
            weights = dense.block(index).weights if train_weights and not from_digits else {}
            for kind in GROUPS:
                self._add(artifact.groups[f"layers.{index}.{kind}"])
                if train_weights:
                    self._train(f"layers.{index}.{kind}", weights.get(kind))
            self._added(index)
        self._add(artifact.groups["head"])
        self.codes = self.codes if train_weights else {}
        self.codes.pop("head", None)
        self.last = nn.ParameterList([nn.Parameter(stored["model.norm.weight"], requires_grad=train_weights)])
        table = "head" if self.config.tied else "embed"
        self.embedding = torch.from_numpy(artifact.groups[table].lookup()).to(self.device)
        body = [g for name, g in self.groups.items() if name != "head"]
        self.weights = sum(g.out * g.inputs for g in body)

    def _add(self, group: GroupTensors) -> None:
        """Take a group of the artifact."""
        code = self.codes[group.name] = Code(group, self.device)
        self.groups[group.name] = _group(group, code)
        self.row_scales[group.name] = code.rows[:, 0]

    def _train(self, name: str, weight: torch.Tensor | None) -> None:
        """Make parameters of a group's weight f32 [out, in], of its digits if None, and of the bias beside them."""
        group, code = self.groups[name], self.codes[name]
        units = code.units() if weight is None else weight / code.cols / code.rows
        learned = {"weight": units, "bias": group.stored_bias}
        learned |= {"log_rows": units.new_zeros(group.out), "log_cols": units.new_zeros(group.inputs)}
        if self.rank:
            learned |= low_rank(units, self.rank, zlib.crc32(f"{self.seed} {name}".encode()))
        fixed = {"weight"} if self.rank else set()
        group.learned = nn.ParameterDict(
            {what: nn.Parameter(value, requires_grad=what not in fixed) for what, value in learned.items()}
        )
        code.thin()

    def _added(self, index: int) -> None:
        """A decoder block is complete."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Code the weights as they are now."""
        for name, code in self.codes.items():
            group = self.groups[name]
            group.slices, group.rows, group.cols = code.of(*group.parameters())

    @torch.no_grad()
    def trained(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Digits u8 [out, in] and bias f32 [out] of a group as its weights are now; `codes[name]` has the scales then.
        Where weights are sharded all processes must ask."""
        group, code = self.groups[name], self.codes[name]
        weight, log_rows, log_cols = (whole(t) for t in group.parameters() if t is not None)
        code.rescale_by(log_rows, log_cols)
        return code.digits(weight), whole(group.bias)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is under training: of each group `.weight`, or `.up` and `.down`, `.bias`, `.log_rows` and `.log_cols`;
        the norms under their Hugging Face names."""
        if not self.codes:
            return {}
        found: dict[str, nn.Parameter] = {}
        for name in self.codes:
            learned = self.groups[name].learned
            assert learned is not None
            found |= {f"{name}.{what}": value for what, value in learned.items() if value.requires_grad}
        return found | self.norm_tensors()

    def size_of(self, name: str, p: torch.Tensor) -> float:
        """What a relative rate of a parameter refers to: its root mean square. `up` begins at 0 and stands for the
        weights."""
        group, _, what = name.rpartition(".")
        if what == "up":
            learned = self.groups[group].learned
            assert learned is not None
            p = learned["weight"]
        return float(whole(p).pow(2).mean().sqrt().clamp_min(1e-3))

    def norm_tensors(self) -> dict[str, nn.Parameter]:
        """RMSNorm weights f32 [D] by Hugging Face tensor name."""
        found = {"model.norm.weight": self.last[0]}
        for index, pair in enumerate(self.norms):
            found |= {f"model.layers.{index}.{name}": p for name, p in zip(LAYER_NORMS, pair, strict=True)}
        return found

    def hidden(self, ids: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
        """ids i64 [B, N] -> (what the head reads f32 [B, N, D], bits read in the body f32 [B, N], per weight)."""
        rope = rope_tables(self.config, 0, ids.shape[1], self.device)
        x = F.embedding(ids.to(self.device), self.embedding)
        bits: list[torch.Tensor] = []
        for index in range(self.config.num_layers):
            x, read = self.block(index, x, rope, masks)
            bits.append(read)
        x = rms_norm(x, self.last[0], self.config.rms_eps)
        side = sum(g.side_bits for name, g in self.groups.items() if name != "head")
        return x, (torch.stack(bits).sum(0).view(ids.shape) + side) / self.weights

    def block(
        self, index: int, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], masks: Masks
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One decoder block: x f32 [B, N, D] -> (x f32 [B, N, D], bits read f32 [B * N])."""
        bits: list[torch.Tensor] = []

        def apply(kind: str, x: torch.Tensor) -> torch.Tensor:
            name = f"layers.{index}.{kind}"
            flat = x.reshape(-1, x.shape[-1])
            if FEATURE_GROUPS[kind] == kind:
                masks.see(name, flat)
            y, read = self.product(name, flat, masks)
            bits.append(read)
            return y.view(*x.shape[:-1], -1)

        norms = self.norms[index]
        x = decoder_block(self.config, (norms[0], norms[1]), x, apply, rope)
        return x, torch.stack(bits).sum(0)

    def product(self, name: str, x: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
        """One group: x f32 [T, in] -> (y f32 [T, out], bits read through slices f32 [T])."""
        group = self.groups[name]
        a = x - group.middle(masks.code)  # 0 for exact channels, which so are read as they are
        score, theta = masks.scores(name, a)
        y, count = MaskedProduct.apply(a, score, theta, *group.parameters(), group, masks.tau)
        return y + _bias(group, masks.code, theta), 2.0 * group.out * count

    def take_clusters(self, clusters: Mapping[str, Clusters]) -> None:
        """Let tokens go by the clusters of their inputs, by group; by none where a group has none."""
        for name, group in self.groups.items():
            group.clusters = clusters.get(name)


def _bias(group: GradedGroup, code: torch.Tensor | None, theta: torch.Tensor) -> torch.Tensor:
    """f32 [out], or of each token's cluster [T, out]. Under training it follows the weights: what all slices make of
    the clusters' middles."""
    known = group.clusters
    if known is None or code is None:
        return group.bias
    if group.learned is None:
        return known.bias[code]
    apart = known.mean - group.mean
    y, _ = MaskedProduct.apply(
        apart, torch.ones_like(apart), torch.zeros_like(theta), *group.parameters(), group, 1.0
    )  # every score is above every threshold
    return (y + group.bias)[code]


def _group(group: GroupTensors, code: Code) -> GradedGroup:
    device, bias = code.cols.device, np.concatenate([linear.bias.astype(np.float32) for linear in group.linears])
    return GradedGroup(
        name=group.name,
        slices=code.coded(code.stored),
        rows=code.rows[:, 0],
        cols=code.cols,
        always=Always(torch.from_numpy(group.always()).to(device)),
        stored_bias=torch.from_numpy(bias).to(device),
        mean=torch.from_numpy(group.mean.astype(np.float32)).to(device),
        side_bits=8 * group.side_bytes(),
        outs=[linear.out_features for linear in group.linears],
    )


def budget_tables(artifact: Artifact, policy: str = "channel-norm") -> tuple[list[float], Mapping[str, torch.Tensor]]:
    """The thresholds that learning starts from: the grid of budgets, and f32 [B, S] in log2 for every group."""
    manifest = artifact.manifest
    if policy not in manifest.policies:
        raise LowtideError(f"the artifact stores no thresholds for {policy}; compress it with the default policies")
    index = manifest.policies.index(policy)
    found = {}
    for name, group in artifact.groups.items():
        if name != "embed":
            found[name] = torch.from_numpy(np.log2(np.clip(group.thresholds[index], 2.0**-40, 2.0**40)))
    return list(manifest.budgets), found
