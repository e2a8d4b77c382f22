"""Joint training of a tiny model, for tests of several processes."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lowtide.compress import products
from lowtide.compress.dense import DenseModel
from lowtide.compress.sources import open_source
from lowtide.format.reader import open_artifact
from lowtide.learn.cluster_fit import fit_clusters
from lowtide.learn.clusters import Clusters
from lowtide.learn.graded import GradedModel, budget_tables
from lowtide.learn.ipn import Ipn
from lowtide.learn.ipn_train import IpnOptions, Learner
from lowtide.learn.parallel import Parallel, join
from lowtide.learn.run_ipn import learn_joint
from lowtide.learn.shards import own, whole

OPTIONS = IpnOptions(steps=6, bits=(4.0, 5.0), focus=0.7, windows=4, weight_rate=0.02, centroids=3, check_every=2)
STOPPED = 5
"""Where `interrupted` stops, a step behind the last checkpoint."""


class Threads(Parallel):
    """Two processes, played by threads."""

    world = 2

    def __init__(self, rank: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.barrier, self.slots = rank, barrier, slots

    def reduce_mean(self, tensor: torch.Tensor) -> torch.Tensor:
        self.slots[self.rank] = tensor
        self.barrier.wait(60)
        mean: torch.Tensor = (self.slots[0] + self.slots[1]) / 2
        self.barrier.wait(60)
        return mean


def make_learner(source: Path, parallel: Parallel) -> Learner:
    """A joint learner with clusters, whose windows are of two kinds, so that the processes' own KLs and bits differ."""
    artifact, dense = open_artifact(source / "artifact"), DenseModel(open_source(source / "model"))
    grid, tables = budget_tables(artifact)
    importance = {
        n: torch.from_numpy(g.importance.astype(np.float32)) for n, g in artifact.groups.items() if n != "embed"
    }
    ipn = Ipn(importance, grid, tables, 4, 0, Ipn.PARTS, 4.0, 5.0)
    with torch.no_grad():
        for name, p in ipn.table.items():
            if name.endswith("/mix"):
                p.copy_(torch.linspace(-1, 1, len(p)))
    draw = torch.Generator().manual_seed(1)
    ids = torch.where(
        torch.arange(12)[:, None] < 6, torch.full((12, 24), 7), torch.randint(0, 104, (12, 24), generator=draw)
    )
    options = IpnOptions(steps=40, bits=(4.0, 5.0), windows=4, features=4, weight_rate=0.01)
    if parallel.mesh is None:
        model = GradedModel(artifact, dense, train_weights=True)
    else:
        from lowtide.learn.sharded import ShardedModel

        model = ShardedModel(artifact, dense, parallel.mesh, parallel.free)
    stored = fit_clusters(artifact, dense, ids, 3)
    clusters = {name: Clusters.of(artifact.groups[name], own) for name, own in stored.items()}
    model.take_clusters(clusters)
    ipn.take_clusters(clusters)
    return Learner(model, ipn, ids, options, parallel)


@contextlib.contextmanager
def precise() -> Iterator[None]:
    """Products in float32: processes agree but for the order of sums."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_chosen", [products.EXACT])
        yield


def interrupted(source: Path, out: Path) -> None:
    """`learn joint` that comes to STOPPED and leaves a checkpoint."""
    step = Learner.step

    def stop(self: Learner, number: int, optimiser: torch.optim.Optimizer) -> dict[str, float]:
        if number == STOPPED:
            raise KeyboardInterrupt
        return step(self, number, optimiser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Learner, "step", stop)
        finished(source, out)


def finished(source: Path, out: Path) -> dict[str, Any]:
    """`learn joint`, to the end."""
    return learn_joint(source / "model", out, OPTIONS, source / "artifact", source / "text")


def one_step(learner: Learner, number: int) -> dict[str, torch.Tensor]:
    """What a step makes of everything that learns, gathered: figures, gradients, Adam's moments and new values."""
    optimiser = learner.optimiser()
    figures = learner.step(number, optimiser)
    found = {f"figure.{name}": torch.tensor(float(value)) for name, value in figures.items()}
    for name, p in learner.parameters().items():
        if p.grad is not None:
            found |= {f"grad.{name}": whole(p.grad), f"moment.{name}": whole(optimiser.state[p]["exp_avg_sq"])}
        found[f"now.{name}"] = whole(p).clone()
    found["value"] = torch.tensor(learner.check()["value"])
    return found


def held_rows(learner: Learner, number: int) -> dict[str, list[int]]:
    """Rows that this process holds of every weight, of its gradient and of Adam's moments, after a step: those that
    there is memory for. Gradients of a block share theirs."""
    optimiser = learner.optimiser()
    learner.step(number, optimiser)
    found = {}
    for name, p in learner.parameters().items():
        if name.startswith("model/"):
            assert p.grad is not None
            parts = (p, *(optimiser.state[p][what] for what in ("exp_avg", "exp_avg_sq")))
            row = 4 * p[:1].numel()
            found[name] = [len(own(p.grad)), *(own(t).untyped_storage().nbytes() // row for t in parts)]
    return found


def main(source: Path, out: Path) -> None:
    """One of several processes that a launcher started."""
    torch.set_num_threads(1)
    team = join(OPTIONS.windows)
    with precise():
        for number in (1, 2):
            found = one_step(make_learner(source, team), number)
            if team.main:
                save_file({name: t.contiguous() for name, t in found.items()}, out / f"step-{number}.safetensors")
        (out / f"rows-{team.rank}.json").write_text(json.dumps(held_rows(make_learner(source, team), 1)))
        interrupted(source, out / "two")
        team.wait()
        if team.main:
            shutil.copytree(out / "two.partial", out / "one.partial")
        team.wait()
        figures = finished(source, out / "two")
        finished(source, out / "from-one")
        if team.main:
            (out / "figures.json").write_text(json.dumps(figures))
        assert bool(figures) == team.main


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
