"""Training in several processes: the gradient is that of one process with all windows, and one artifact is written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from support.joint import Threads, make_learner

from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.learn.ipn_train import IpnOptions
from lowtide.learn.parallel import Parallel, join
from lowtide.learn.run_ipn import learn_joint

OPTIONS = ["--bits", "4", "--high", "5", "--steps", "12", "--windows", "4", "--weight-rate", "0.002", "--json"]
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed: pip install accelerate"
)


def gradients(learner, number, out):
    figures = learner.step(number, learner.optimiser())
    out.append((figures, {n: p.grad for n, p in learner.parameters().items() if p.grad is not None}, learner.check()))


@pytest.mark.parametrize("number", [1, 2])
def test_two_shares_make_the_gradient_of_the_whole(source, number):
    whole: list = []
    gradients(make_learner(source, Parallel()), number, whole)
    barrier, slots, found = threading.Barrier(2), [None, None], ([], [])
    learners = [make_learner(source, Threads(rank, barrier, slots)) for rank in range(2)]
    threads = [threading.Thread(target=gradients, args=(a, number, b)) for a, b in zip(learners, found, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures, expected, check = whole[0]
    for shared, grads, checked in (found[0][0], found[1][0]):
        assert shared == pytest.approx(figures, rel=1e-3)
        assert grads.keys() == expected.keys() and len(grads) > 20
        for name, g in expected.items():
            assert torch.linalg.norm(grads[name] - g) <= 0.02 * torch.linalg.norm(g) + 1e-6, name
        assert checked["value"] == pytest.approx(check["value"], abs=0.02)
    first, second = (learner.parameters()["model/layers.0.qkv.weight"] for learner in learners)
    assert torch.equal(first, second)


@needs_accelerate
def test_two_processes_train_what_one_does_and_write_it_once(source, tmp_path):
    arguments = [str(source / "model"), str(tmp_path / "two"), "--artifact", str(source / "artifact")]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "lowtide.cli", "learn", "joint", *arguments, "--text", str(source / "text"), *OPTIONS]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout)  # printed once
    assert [p.name for p in tmp_path.iterdir()] == ["two"]
    options = IpnOptions(steps=12, bits=(4.0, 5.0), focus=0.7, windows=4, weight_rate=0.002)
    one = learn_joint(source / "model", tmp_path / "one", options, source / "artifact", source / "text")
    assert figures["trained_tokens"] == one["trained_tokens"] == 12 * 4 * 32
    assert figures["best_step"] == one["best_step"] == 12
    for when, error in (("before", 1e-3), ("after", 0.02)):
        for ours, theirs in zip(figures[when], one[when], strict=True):
            assert ours == pytest.approx(theirs, rel=error), when
    two, alone = open_artifact(tmp_path / "two"), open_artifact(tmp_path / "one")
    start = open_artifact(source / "artifact")
    assert two.manifest.stats["learned"] == alone.manifest.stats["learned"]
    for name in (n for n in alone.groups if n.startswith("layers")):
        for one_layer, two_layer, first in zip(*(x.groups[name].linears for x in (alone, two, start)), strict=True):
            moved = (one_layer.weight != first.weight).mean()
            assert 0 < moved and (one_layer.weight != two_layer.weight).mean() < 0.2 * moved, name


def test_one_process_needs_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for count in (None, "", "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if count is not None:
            monkeypatch.setenv("WORLD_SIZE", count)
        alone = join(3)
        assert (alone.rank, alone.world, alone.main, alone.share(3)) == (0, 1, True, slice(0, 3))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LowtideError, match="WORLD_SIZE is 2: several processes need accelerate: pip install"):
        join(2)


def test_windows_that_cannot_be_shared_are_refused(source, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(LowtideError, match="--windows 8: must be a multiple of the 3 processes"):
        learn_joint(source / "model", tmp_path / "out", IpnOptions(weight_rate=0.01), text=source / "text")
    assert not list(tmp_path.iterdir())
