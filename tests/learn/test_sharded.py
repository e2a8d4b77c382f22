"""Weights sharded over processes (FSDP2): each holds its rows, and what comes out is what one process makes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import joint

from lowtide.cli.app import BAD_INPUT, run
from lowtide.errors import LowtideError
from lowtide.format import codec
from lowtide.format.reader import open_artifact
from lowtide.learn.ipn_progress import NAME
from lowtide.learn.parallel import Parallel, join
from lowtide.learn.shards import rows_of

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed: pip install accelerate"
)
LAUNCH = ["--use_fsdp", "--fsdp_version", "2", "--num_machines", "1", "--mixed_precision", "no"]


@pytest.fixture(scope="module")
def sharded(source, tmp_path_factory):
    """What two processes leave (`support.joint.main`), beside the checkpoint of one that was interrupted."""
    out = tmp_path_factory.mktemp("out")
    with joint.precise():
        joint.interrupted(source, out / "from-one")
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, "--num_processes", "2"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", joint.__file__, str(source), str(out)]
    paths = [str(Path(joint.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@needs_accelerate
@pytest.mark.parametrize("number", [1, 2])
def test_a_step_is_that_of_one_process(source, sharded, number):
    with joint.precise():
        learner = joint.make_learner(source, Parallel())
        before = {name: p.detach().clone() for name, p in learner.parameters().items()}
        expected = joint.one_step(learner, number)
    found = load_file(sharded / f"step-{number}.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        wrong = found[name] - value
        if name.startswith("now."):  # Adam's first step is the rate in the gradient's direction: noise where it is 0
            size = expected.get(name.replace("now.", "grad."), value).abs()
            wrong = wrong[size > 1e-3 * size.max()]
        if name == "value":  # a logarithm of held-out KL, which may be near 0; a mask may tip over
            assert abs(wrong) < 0.05
            continue
        assert torch.linalg.norm(wrong) <= 1e-4 * torch.linalg.norm(value) + 1e-6, name
    weights = [name for name in before if name.endswith(".weight") and "layers" in name]
    assert len(weights) == 4 * 2 + 2 * 2
    for name in weights:
        moved = [(t[f"now.{name}"] != before[name]).reshape(len(before[name]), -1).any(1) for t in (found, expected)]
        assert torch.equal(*moved) and moved[0].float().mean() > 0.7, name


@needs_accelerate
def test_a_process_holds_its_rows_only(source, sharded):
    first, second = (json.loads((sharded / f"rows-{rank}.json").read_text()) for rank in range(2))
    whole = {name: len(p) for name, p in joint.make_learner(source, Parallel()).parameters().items()}
    assert first.keys() == second.keys() == {n for n in whole if n.startswith("model/")}
    for name in first:
        for rank, held in enumerate((first[name], second[name])):
            assert held == [len(rows_of(whole[name], rank, 2))] * 4, name


def digits_of(artifact):
    return {
        f"{name}.{linear.name}": codec.unpack_digits(
            linear.weight, linear.out_features, group.in_features, group.slices
        )
        for name, group in artifact.groups.items()
        for linear in group.linears
        if name.startswith("layers")
    }


@needs_accelerate
def test_runs_go_on_sharded_or_not_and_end_alike(source, sharded):
    assert {p.name for p in (sharded / "one.partial").glob("*.safetensors")} == {
        NAME,
        "rows-4-0.safetensors",
        "rows-4-1.safetensors",
    }
    with joint.precise():
        alone = joint.finished(source, sharded / "alone")
        resumed = joint.finished(source, sharded / "one")  # one process goes on where two were
    two = json.loads((sharded / "figures.json").read_text())
    start, straight = digits_of(open_artifact(source / "artifact")), digits_of(open_artifact(sharded / "alone"))
    changed = np.mean([np.mean(straight[name] != start[name]) for name in start])
    assert changed > 0.02
    assert alone["best_step"] > 0
    for figures in (two, resumed):
        assert figures["best_step"] == alone["best_step"] and figures["trained_tokens"] == alone["trained_tokens"]
        for ours, theirs in zip(figures["after"], alone["after"], strict=True):
            assert ours == pytest.approx(theirs, rel=0.01)
    for name in ("two", "one", "from-one"):
        other = open_artifact(sharded / name)
        for linear, values in digits_of(other).items():
            wrong = values != straight[linear]
            assert wrong.mean() < 0.05 * changed, (name, linear)
        norm = "model.layers.1.input_layernorm.weight"
        assert np.allclose(other.tensor(norm), open_artifact(sharded / "alone").tensor(norm), atol=1e-4)
    assert not list(sharded.glob("*.partial"))


@needs_accelerate
def test_a_missing_part_of_a_checkpoint_is_named(source, sharded, tmp_path):
    with joint.precise():
        joint.interrupted(source, tmp_path / "out")
        path = tmp_path / "out.partial" / NAME
        assert path.exists()
        tensors = load_file(path)
    from safetensors import safe_open

    from lowtide.learn.checkpoint import write_tensors

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    write_tensors(path, tensors, {"about": json.dumps(about | {"shards": 2})})
    with joint.precise(), pytest.raises(LowtideError, match="damaged .*give --restart"):
        joint.finished(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "FSDP version 1: weights are sharded by FSDP2 only; launch with --fsdp_version 2"),
        ({"FSDP_VERSION": "1"}, "FSDP version 1: weights are sharded by FSDP2 only; launch with --fsdp_version 2"),
        ({"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "--fsdp_sharding_strategy HYBRID_SHARD: is not supported"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params true: is not supported; leave it out"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "NO_SHARD"}, "--fsdp_reshard_after_forward NO_SHARD: is not supported"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "--fsdp_auto_wrap_policy SIZE_BASED_WRAP: is not supported"),
    ],
)
def test_other_ways_to_shard_are_refused(source, tmp_path, monkeypatch, capsys, settings, message):
    wanted = {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"} | ({"FSDP_VERSION": "2"} if settings else {}) | settings
    for name, value in wanted.items():
        monkeypatch.setenv(name, value)
    assert run(["learn", "joint", str(source / "model"), str(tmp_path / "out"), "--text", str(source / "text")]) == (
        BAD_INPUT
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_weights_under_training_there_is_nothing_to_shard(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LowtideError, match="no weights under training to shard; launch with --multi_gpu"):
        join(2, weights=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join(2).mesh is None  # one process holds everything
