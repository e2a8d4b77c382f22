"""Training the importance network: the masked model shall say what the dense one says.

First block by block: a random block reads what it reads in the dense model and its output error is taken, weighted
by the Fisher information at the output, which puts blocks on one scale. Then end to end: KL(dense || masked) of
whole windows. Each step draws its sparsity, so one network serves all; its loss is the logarithm of the error, or the
highest sparsity would drown the others.

The step goes backward in two parts, which keeps memory to one model: to the masks' leaves (weights times masks), then
layer by layer through the network. The penalty's multiplier is solved for on the way (`relax.price`).

Step n draws from a generator seeded by (seed, n), so a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from lowtide.arch import GROUPS
from lowtide.compress.dense import DenseModel, decoder_block, rms_norm, rope_tables
from lowtide.compress.prune.base import LayerProblem
from lowtide.errors import LowtideError
from lowtide.learn.checkpoint import Progressed, load_progress, save_progress
from lowtide.learn.importance import Features, ImportanceNetwork, features, inverse_diagonal
from lowtide.learn.relax import RELAXATIONS, price, relaxed, threshold

Report = Callable[[str, int, int], None]
"""`report(stage, done, total)`; stages: warm, train."""
CHECK_SPARSITIES = (0.5, 0.6, 0.7)
HEAD_CHUNK = 256
DIVERGED = math.log(2.0)
"""Training stops when the held-out KL is more than this above where it began (logarithm)."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        steps: end to end; warm_steps: block by block, before.
        sparsity: lowest and highest that a step may draw.
        rate, residual_rate, vector_rate: of Adam, for powers and offsets, for the residual networks and for one
            model's row and column vectors. The residual's is low, as it transfers least.
        tau: temperature of the masks, nats.
        relaxation: `straight-through` or `hard-concrete`.
        windows: of a step; own: train row and column vectors, too (the result serves this model only).
        check_every: steps between two looks at the held-out windows, which also write the checkpoint.
        seed: of everything drawn.
    """

    steps: int = 120
    warm_steps: int = 60
    sparsity: tuple[float, float] = (0.4, 0.8)
    rate: float = 0.02
    residual_rate: float = 0.002
    vector_rate: float = 0.03
    tau: float = 0.5
    relaxation: str = "straight-through"
    windows: int = 2
    own: bool = False
    check_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.sparsity
        if not 0 < low <= high < 1:
            raise LowtideError(f"--sparsity {low:g},{high:g}: must be above 0, below 1 and in order")
        if self.steps < 1 or self.warm_steps < 0:
            raise LowtideError(f"--steps {self.steps}: must be 1 or more")
        if self.relaxation not in RELAXATIONS:
            raise LowtideError(f"--relaxation {self.relaxation}: known are {', '.join(RELAXATIONS)}")


@dataclass
class Task:
    """A model to train on: the features of its layers and its dense behaviour on the calibration windows.

    ids: i64 [B, N]; the last `held` windows are for checking. layers[b]: block b's features in the order of GROUPS;
    say[b]: f32 [D], Fisher information at block b's output; states: what each block reads, and the final norm.
    """

    model: DenseModel
    ids: torch.Tensor
    layers: list[list[Features]]
    say: list[torch.Tensor]
    states: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, model: DenseModel, ids: torch.Tensor, problems: Iterable[list[LayerProblem]]) -> Task:
        """From the problems of all blocks, in any order.

        Raises:
            LowtideError: fewer than two windows (one is held out).
        """
        if len(ids) < 2:
            raise LowtideError(f"training needs two windows of {ids.shape[1]} tokens or more; give a longer text")
        layers: dict[int, list[Features]] = {}
        say = {}
        for block in problems:
            index = int(block[0].name.split(".")[2])
            inverse: dict[int, torch.Tensor] = {}
            for p in block:
                if id(p.hessian) not in inverse:
                    inverse[id(p.hessian)] = inverse_diagonal(p.hessian)
            layers[index] = [features(p, inverse[id(p.hessian)]) for p in block]
            say[index] = block[-1].fisher.float()  # down_proj's output is added to the block's
        order = range(model.config.num_layers)
        return cls(model, ids, [layers[i] for i in order], [say[i] for i in order], model.block_inputs(ids))

    @property
    def held(self) -> int:
        """Windows held out: a tenth, one at least and eight at most."""
        return min(8, max(1, len(self.ids) // 10))

    def weights(self, index: int) -> list[torch.Tensor]:
        """The dense weights of block `index`, in the order of `layers`."""
        sizes = [len(f.log_fisher) for f in self.layers[index]]
        parts: list[torch.Tensor] = []
        for group, members in GROUPS.items():
            here = sizes[len(parts) : len(parts) + len(members)]
            parts += self.model.block(index).weights[group].split(here)
        return parts


def grouped(parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layers in the order of GROUPS -> group -> [out, in] concatenated along out."""
    found, first = {}, 0
    for group, members in GROUPS.items():
        found[group] = torch.cat(parts[first : first + len(members)])
        first += len(members)
    return found


def run_block(task: Task, index: int, parts: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Block `index` with other weights: x f32 [B, N, D] -> [B, N, D]."""
    block, weights = task.model.block(index), grouped(parts)
    rope = rope_tables(task.model.config, 0, x.shape[1])

    def apply(group: str, z: torch.Tensor) -> torch.Tensor:
        return F.linear(z, weights[group], block.biases[group])

    return decoder_block(task.model.config, (block.input_norm, block.post_norm), x, apply, rope)


def kl_to_dense(task: Task, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Mean KL(dense || ours) in nats; x f32 [B, N, D] before the final norm, rows: i64 [B], which windows they are."""
    model, eps = task.model, task.model.config.rms_eps
    ours = rms_norm(x, model.final_norm, eps).flatten(0, 1)
    dense = rms_norm(task.states[-1][rows], model.final_norm, eps).flatten(0, 1)
    total = torch.zeros(())
    for a, b in zip(ours.split(HEAD_CHUNK), dense.split(HEAD_CHUNK), strict=True):
        reference = F.log_softmax(b @ model.head_weight.T, -1)
        total = total + (reference.exp() * (reference - F.log_softmax(a @ model.head_weight.T, -1))).sum()
    return total / len(ours)


@torch.no_grad()
def masked_kl(task: Task, logs: list[list[torch.Tensor]], sparsity: float, rows: torch.Tensor) -> float:
    """KL in nats per token under hard masks from one exact threshold over all layers."""
    theta = threshold([t for block in logs for t in block], sparsity, exact=True)
    x = task.states[0][rows]
    for index, block in enumerate(logs):
        parts = [w * (t > theta) for w, t in zip(task.weights(index), block, strict=True)]
        x = torch.cat([run_block(task, index, parts, row[None]) for row in x])
    return float(kl_to_dense(task, x, rows))


@torch.no_grad()
def all_logs(network: ImportanceNetwork, task: Task) -> list[list[torch.Tensor]]:
    """Log-importances of every layer of every block."""
    return [[network(f) for f in block] for block in task.layers]


class Trainer:
    """One training under way."""

    def __init__(self, network: ImportanceNetwork, tasks: list[Task], options: TrainOptions) -> None:
        self.network, self.tasks, self.options = network, tasks, options
        if options.own:
            if len(tasks) != 1:
                raise LowtideError("row and column vectors belong to one model; train them on one")
            network.add_vectors([f for block in tasks[0].layers for f in block])
        residual = [*network.row.parameters(), *network.column.parameters()]
        groups = [
            {"params": [network.powers, network.offset], "lr": options.rate},
            {"params": residual, "lr": options.residual_rate},
        ]
        if options.own:
            groups.append({"params": network.vectors(), "lr": options.vector_rate})
        self.optimiser = torch.optim.Adam(groups, betas=(0.9, 0.98))

    def step(self, number: int) -> float:
        """Step `number` (warm ones first); returns its loss, the logarithm of the error."""
        draw = torch.Generator().manual_seed(self.options.seed * 1_000_003 + number)
        task = self.tasks[number % len(self.tasks)]
        low, high = self.options.sparsity
        sparsity = low + (high - low) * float(torch.rand((), generator=draw))
        logs = all_logs(self.network, task)
        theta = threshold([t for block in logs for t in block], sparsity)
        usable = len(task.ids) - task.held
        rows = torch.randperm(usable, generator=draw)[: self.options.windows]
        warm = number < self.options.warm_steps
        some = [int(torch.randint(len(logs), (), generator=draw))] if warm else list(range(len(logs)))
        leaves, slopes = self._masked(task, logs, some, theta, draw)
        if warm:
            loss = self._block_error(task, some[0], leaves[some[0]], rows)
        else:
            x = task.states[0][rows]
            for index in some:
                x = run_block(task, index, leaves[index], x)
            loss = kl_to_dense(task, x, rows)
        loss = loss.clamp_min(1e-12).log()
        if torch.isfinite(loss):
            loss.backward()
            self._through_network(task, some, leaves, slopes, number)
        return float(loss.detach())

    def _masked(
        self, task: Task, logs: list[list[torch.Tensor]], some: list[int], theta: float, draw: torch.Generator
    ) -> tuple[dict[int, list[torch.Tensor]], dict[int, list[torch.Tensor]]]:
        """Leaves (weight times mask) and the masks' slopes, of some blocks."""
        leaves: dict[int, list[torch.Tensor]] = {}
        slopes: dict[int, list[torch.Tensor]] = {}
        for index in some:
            leaves[index], slopes[index] = [], []
            for w, t in zip(task.weights(index), logs[index], strict=True):
                mask, slope = relaxed(t, theta, self.options.tau, self.options.relaxation, draw)
                leaves[index].append((w * mask).requires_grad_(True))
                slopes[index].append(slope)
        return leaves, slopes

    def _block_error(self, task: Task, index: int, parts: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """Half the Fisher-weighted squared error at a block's output, nats per token."""
        off = run_block(task, index, parts, task.states[index][rows]) - task.states[index + 1][rows]
        return 0.5 * (off.square() * task.say[index]).sum(-1).mean()

    def _through_network(
        self,
        task: Task,
        some: list[int],
        leaves: dict[int, list[torch.Tensor]],
        slopes: dict[int, list[torch.Tensor]],
        number: int,
    ) -> None:
        """From the leaves' gradients through the masks and the network, then one step of Adam."""
        gradients = {}
        for index in some:
            pairs = zip(leaves[index], task.weights(index), strict=True)
            gradients[index] = [_gradient(leaf) * w for leaf, w in pairs]
        costs = price([g for i in some for g in gradients[i]], [s for i in some for s in slopes[i]])
        self.optimiser.zero_grad()
        for index in some:
            for f, g, slope in zip(task.layers[index], gradients[index], slopes[index], strict=True):
                self.network(f).backward((g - costs) * slope)
        parameters = self.network.shared() + self.network.vectors()
        torch.nn.utils.clip_grad_norm_(self.network.shared(), 1.0)
        if all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in parameters):
            total = self.options.steps + self.options.warm_steps
            decay = 0.5 * (1 + math.cos(math.pi * number / total))
            rates = (self.options.rate, self.options.residual_rate, self.options.vector_rate)
            for group, rate in zip(self.optimiser.param_groups, rates, strict=False):
                group["lr"] = rate * (0.05 + 0.95 * decay)
            self.optimiser.step()

    def check(self) -> float:
        """Mean over tasks and sparsities of the logarithm of the held-out KL, under hard masks."""
        found = []
        for task in self.tasks:
            logs = all_logs(self.network, task)
            rows = torch.arange(len(task.ids) - task.held, len(task.ids))
            found += [math.log(max(masked_kl(task, logs, s, rows), 1e-12)) for s in CHECK_SPARSITIES]
        return sum(found) / len(found)


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


@dataclass(frozen=True)
class Outcome:
    """How training went.

    kl_before, kl_after: geometric mean of the held-out KL over sparsities 0.5, 0.6, 0.7 (nats per token), hard masks,
    no weight updates; best_step: of the network that is kept (0: none was better than the start); steps: done;
    diverged: training was stopped for it.
    """

    kl_before: float
    kl_after: float
    best_step: int
    steps: int
    diverged: bool


def train(
    network: ImportanceNetwork,
    tasks: list[Task],
    options: TrainOptions,
    work: Path | None = None,
    report: Report = lambda *_: None,
    key: str = "",
) -> Outcome:
    """Train; the network is left at the best step of those checked.

    Args:
        network: where to start.
        tasks: models to train on, in turn.
        work: folder of the checkpoint; a run with the same key goes on from there.
        key: what the run is (model, text, options); a checkpoint of another run is not used.
    """
    trainer = Trainer(network, tasks, options)
    known = load_progress(work, network, trainer.optimiser, key) if work else None
    state = known or Progressed(0, 0, trainer.check(), None)
    if known is None:
        state.keep(network, 0, state.first)
    total = options.warm_steps + options.steps
    diverged = False
    for number in range(state.step, total):
        loss = trainer.step(number)
        warm = number < options.warm_steps
        done, of = (number + 1, options.warm_steps) if warm else (number + 1 - options.warm_steps, options.steps)
        report("warm" if warm else "train", done, of)
        state.step = number + 1
        diverged = not math.isfinite(loss)
        if diverged or state.step % options.check_every == 0 or state.step == total:
            value = math.inf if diverged else trainer.check()
            diverged = diverged or not value < state.first + DIVERGED
            if value < state.best:
                state.keep(network, state.step, value)
            if work and not diverged:
                save_progress(work, network, trainer.optimiser, state, key)
        if diverged:
            break
    state.restore(network)
    return Outcome(math.exp(state.first), math.exp(state.best), state.best_step, state.step, diverged)
