"""Training the importance prediction network, alone or together with the model it masks.

Every step draws a budget, so one network serves all of them; joint training draws the budget asked for more often than
the rest. Bits are on the budget from the first step on (`lowtide.learn.level`). Held-out windows decide which step is
kept: the mean over budgets of log KL, corrected for bits that differ from the budget (`ipn_loss.ELASTICITY`).

Step n draws from a generator seeded by (seed, n), so a resumed run goes on as if it had never stopped. With several
processes (`lowtide.learn.parallel`) all draw the same windows and each takes its share of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowtide.compress.products import product_type
from lowtide.errors import LowtideError
from lowtide.format.manifest_fields import MAX_CENTROIDS
from lowtide.learn.graded import GradedModel
from lowtide.learn.head import head_kl
from lowtide.learn.ipn import At, Ipn
from lowtide.learn.ipn_loss import ELASTICITY, Prices, loss_of
from lowtide.learn.level import densities, hold, project
from lowtide.learn.parallel import Parallel

Report = Callable[[str, int, int], None]
"""`report(stage, done, total)`; stages: sample, cluster, probe, apart, train, thresholds."""
DIVERGED = math.log(2.0)
"""Training stops when the held-out value is this much above where it began."""
WARM = 10
MOST_HELD = 8
"""Windows held out for checking, at most."""
KEPT_BYTES = 1 << 30
"""Of the dense model's states."""
FEATURES = 4
"""Of each probe: every token reads the probes, and from 3 bits on more features save less than their bytes do
elsewhere (docs/dynamic.md)."""
CENTROIDS = 64
"""Clusters of every group's inputs: a compromise between what they save and what they take in the file
(docs/dynamic.md)."""
HEADS = ("once", "full")
"""What the loss reads the output head at: the budget, or in full."""
SCALE_RATE = 0.5
"""Rate of the scales' logarithms, in units of the weights' relative rate."""

JOINT_SHARE = 0.02
"""Of the network's rates, where weights learn beside it: masks that move from step to step spoil what weights learn.
On a stories15M that had been trained before, 32 steps took 0.010 off the held-out value (the mean of log KL over two
budgets) at a fifth of the rates, 0.028 with probes held and 0.042 with the whole network held (trials that left no
results file). A fiftieth is close to that and still learns; it was not compared."""


@dataclass(frozen=True)
class IpnOptions:
    """How to train.

    Attributes:
        steps: of end-to-end training; 0 leaves the self-supervised start.
        bits: lowest and highest budget; focus: probability of drawing the lowest.
        windows: of a step.
        rate, probe_rate: of Adam, for thresholds, importances and mixes, and for probes; JOINT_SHARE of them where
            weights learn too.
        weight_rate: for the model's weights, biases and norms, relative to each matrix's root mean square; 0 leaves the
            model alone; None: by the model's width (`run_ipn.rate_for`).
        rank: of what is added to the weights; 0: they learn whole.
        head: what the loss reads the output head at: "once", the budget, or "full".
        tau: temperature of the masks' gradient, log2 units. prices: the loss's terms.
        average: decay, for each step, of the average of parameters that is kept (`ipn_progress.Run.follow`).
        features: H of each probe; None: as many as the network has that training begins with, or FEATURES.
        centroids: clusters of every group's inputs, 0 for none; None: as many as the network has that training begins
            with, or CENTROIDS, fewer in small models.
        apart: whether q, k and v have thresholds of their own (`lowtide.learn.apart`); None: if the network has that
            training begins with.
        own_text: part of the text that the model writes itself beside a file's, from 0 to below 1.
        varied: whether what the model writes begins with any token and differs in temperature (`DenseModel.sample`).
        parts: ingredients that learn. check_every: steps between looks at held-out windows.
        seed: of everything drawn.
    """

    steps: int = 100
    bits: tuple[float, float] = (2.0, 4.0)
    focus: float = 0.0
    windows: int = 8
    rate: float = 0.005
    probe_rate: float = 0.0005
    weight_rate: float | None = 0.0
    rank: int = 0
    head: str = "once"
    tau: float = 0.7
    prices: Prices = field(default_factory=Prices)
    average: float = 0.95
    features: int | None = None
    centroids: int | None = None
    apart: bool | None = None
    own_text: float = 0.0
    varied: bool = False
    parts: tuple[str, ...] = Ipn.PARTS
    check_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.bits
        if not 0 < low < high:
            raise LowtideError(f"--bits {low:g},{high:g}: two budgets in bits per weight, ascending")
        if self.check_every < 1:
            raise LowtideError(f"--check-every {self.check_every}: must be 1 or more")
        if self.steps < 0 or self.windows < 1:
            raise LowtideError(f"--steps {self.steps}, --windows {self.windows}: must be 0 and 1 or more")
        if self.features is not None and not 1 <= self.features <= 64:
            raise LowtideError(f"--features {self.features}: must be 1 to 64")
        if self.centroids is not None and not 0 <= self.centroids <= MAX_CENTROIDS:
            raise LowtideError(f"--centroids {self.centroids}: must be 0 (none) to {MAX_CENTROIDS}")
        if not 0 <= self.own_text < 1:
            raise LowtideError(f"--own-text {self.own_text:g}: must be from 0 to below 1")
        if not 0 <= self.focus <= 1:
            raise LowtideError(f"--focus {self.focus:g}: must be between 0 and 1")
        if self.weight_rate is not None and not 0 <= self.weight_rate < 1:
            raise LowtideError(f"--weight-rate {self.weight_rate:g}: must be at least 0 and below 1")
        if self.rank < 0:
            raise LowtideError(f"--rank {self.rank}: must be 0 (full weights) or more")
        if self.head not in HEADS:
            raise LowtideError(f"--head {self.head}: known are {', '.join(HEADS)}")
        if not 0 <= self.average < 1:
            raise LowtideError(f"average {self.average:g}: must be at least 0 and below 1")
        unknown = set(self.parts) - set(Ipn.PARTS)
        if unknown or not self.parts:
            raise LowtideError(f"--parts: known are {', '.join(Ipn.PARTS)}")


def held_out(ids: torch.Tensor) -> int:
    """How many of the windows i64 [B, N] are for checking, the last ones: a tenth, one at least, MOST_HELD at most."""
    return min(MOST_HELD, max(1, len(ids) // 10))


@dataclass
class Learner:
    """A model, its network and the windows i64 [B, N] to learn on; the last `held` are for checking."""

    model: GradedModel
    ipn: Ipn
    ids: torch.Tensor
    options: IpnOptions
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self) -> None:
        if len(self.ids) < 3:
            raise LowtideError(
                f"training needs three windows of {self.ids.shape[1]} tokens or more; give a longer --text"
            )
        self.dense_head = self.model.dense.head_weight.to(product_type())
        self._held_hidden: torch.Tensor | None = None
        self._states: dict[int, torch.Tensor] = {}

    @property
    def held(self) -> int:
        """Windows held out."""
        return held_out(self.ids)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that learns, by name."""
        own = {f"ipn/{k}": p for k, p in self.ipn.table.items() if not k.startswith("head/")}
        own["ipn/level"] = self.ipn.level
        return own | {f"model/{k}": p for k, p in self.model.parameters().items()}

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam with a rate for each kind of parameter; `rate0` is the one that schedules start from."""
        o = self.options
        weight_rate = o.weight_rate or 0.0
        share = JOINT_SHARE if weight_rate else 1.0
        groups = []
        for name, p in self.parameters().items():
            if name.endswith((".log_rows", ".log_cols")):
                rate = weight_rate * SCALE_RATE
            elif name.startswith("model/"):
                rate = weight_rate * self.model.size_of(name.removeprefix("model/"), p)
            elif name.endswith(("/probe", "/bias")):
                rate = o.probe_rate * share
            else:
                rate = o.rate * share
            groups.append({"params": [p], "lr": rate, "rate0": rate})
        return torch.optim.Adam(groups, betas=(0.9, 0.95), fused=self.model.device.type != "cpu" or None)

    def dense_states(self, rows: list[int]) -> torch.Tensor:
        """What the dense model's head reads for windows, f32 [B, N, D]; kept, as they come again, up to KEPT_BYTES."""
        new = [row for row in rows if row not in self._states]
        found = dict(zip(new, self.model.dense.hidden(self.ids[new]), strict=True)) if new else {}
        every = torch.stack([found[row] if row in found else self._states[row] for row in rows])
        for row, state in found.items():
            if (len(self._states) + 1) * state.nbytes <= KEPT_BYTES:
                self._states[row] = state.clone()
        return every

    def _rows(self, number: int) -> torch.Tensor:
        """A step's windows, i64 [windows]: the whole text in a random order before any of it comes again, for what is
        seen twice teaches less."""
        count, first = len(self.ids) - self.held, number * self.options.windows
        places = torch.arange(first, first + self.options.windows)
        rows = torch.empty_like(places)
        for turn in range(first // count, int(places[-1]) // count + 1):
            draw = torch.Generator().manual_seed((1 << 50) + self.options.seed * 1_000_003 + turn)
            now = places // count == turn
            rows[now] = torch.randperm(count, generator=draw)[places[now] % count]
        return rows

    def step(self, number: int, optimiser: torch.optim.Optimizer) -> dict[str, float]:
        """One step; returns its budget, bits and KL, over all processes. Not finite: nothing is changed."""
        o, team = self.options, self.parallel
        draw = torch.Generator().manual_seed(o.seed * 1_000_003 + number)
        rows = self._rows(number)
        low, high = o.bits
        at_low, spread = torch.rand(2, generator=draw).tolist()
        bits = low if at_low < o.focus else low + (high - low) * spread
        mine = rows[team.share(o.windows)]
        ids = self.ids[mine]
        theirs = self.dense_states(mine.tolist())
        margins = o.prices.needs_margins
        at = At(self.ipn, bits, tau=o.tau, keep_margins=margins, keep_density=True, full_head=o.head == "full")
        if team.rank:  # perturbed copies are each process's own
            draw.manual_seed((team.rank << 40) + o.seed * 1_000_003 + number)
        self.model.refresh()
        hidden, read = self.model.hidden(ids, at)
        kl, read = team.level(head_kl(self.model, hidden, theirs, self.dense_head, at)), team.level(read)
        loss = loss_of(o.prices, self.model, kl, read, bits, at, draw)
        figures = {"bits": bits, "read": float(read.detach().mean()), "kl": float(kl.detach())}
        figures["tokens"] = o.windows * ids.shape[1]
        optimiser.zero_grad()
        if not math.isfinite(float(team.reduce_mean(loss.detach()))):  # all go on, or none
            return figures | {"kl": math.nan}
        torch.autograd.backward(loss)
        team.average_gradients(self.parameters().values())
        rate = min(1.0, (number + 1) / WARM) * (0.5 + 0.5 * math.cos(math.pi * number / o.steps))
        for group in optimiser.param_groups:
            group["lr"] = group["rate0"] * rate
        density = {name: team.reduce_mean(d) for name, d in densities(self.model, at).items()}
        project(self.ipn, density)
        optimiser.step()
        hold(self.ipn, bits, figures["read"], float(sum(d.sum() for d in density.values())))
        return figures

    @torch.no_grad()
    def check(self) -> dict[str, Any]:
        """Held-out figures: {"value": what decides, "points": [{"bits", "read", "kl"}]}."""
        team = self.parallel
        held = self.ids[-self.held :][team.rank :: team.world]
        part = len(held) * team.world / self.held  # a process may have one more than others, or none
        if not len(held) and team.mesh is not None:
            held = self.ids[-1:]  # counts nothing: all must gather weights when one does
        if self._held_hidden is None and len(held):
            self._held_hidden = self.model.dense.hidden(held)
        self.model.refresh()
        low, high = self.options.bits
        budgets = [low] if self.options.focus >= 1 else [low, (low + high) / 2, high]
        if self.options.focus > 0:
            budgets = budgets[:2]
        points = []
        for bits in budgets:
            found = torch.zeros(2, device=self.model.device)
            if self._held_hidden is not None:
                at = At(self.ipn, bits, full_head=self.options.head == "full")
                hidden, used = self.model.hidden(held, at)
                kl = head_kl(self.model, hidden, self._held_hidden, self.dense_head, at)
                found = torch.stack([used.mean(), kl])
            read, kl = team.reduce_mean(found * part).cpu().tolist()
            points.append({"bits": bits, "read": read, "kl": kl})
        values = [math.log(max(p["kl"], 1e-8)) + ELASTICITY * (p["read"] - p["bits"]) for p in points]
        return {"value": sum(values) / len(values), "points": points}
