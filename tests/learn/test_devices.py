"""Training on another device than the processor."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from support.learning import FAST, tensors
from support.pretend import AVAILABLE, pretend
from typer.testing import CliRunner

from lowtide.cli.app import app
from lowtide.errors import LowtideError
from lowtide.learn import devices, first_network, run_ipn
from lowtide.learn.devices import device_for
from lowtide.learn.ipn_loss import Prices
from lowtide.learn.ipn_train import IpnOptions
from lowtide.learn.sensitivity import fit_probes

JOINT = dataclasses.replace(FAST, weight_rate=0.01, focus=0.5)


@pytest.fixture
def elsewhere(monkeypatch):
    """A device that is not the processor: what torch finds no GPU for."""
    if not AVAILABLE:
        pytest.skip("this torch has no backends written in Python")
    with pretend() as device:
        monkeypatch.setattr(run_ipn, "device_for", lambda name, processes: device)
        monkeypatch.setattr(first_network, "fit_probes", functools.partial(fit_probes, steps=20))
        yield device


def test_a_tensor_left_behind_is_refused(elsewhere):
    with pytest.raises(RuntimeError, match="not on the device"):
        torch.zeros(3, device=elsewhere) + torch.ones(3)


@pytest.mark.parametrize(
    "change", [{}, {"centroids": 3, "apart": True}, {"rank": 2, "prices": Prices("l1", consistency=0.1)}]
)
def test_joint_training_is_the_same_elsewhere(source, few_tokens, tmp_path, elsewhere, monkeypatch, change):
    options = dataclasses.replace(JOINT, **change)
    given = options, source / "artifact", source / "text", 400
    there = run_ipn.learn_joint(source / "model", tmp_path / "there", *given)
    monkeypatch.setattr(run_ipn, "device_for", device_for)
    here = run_ipn.learn_joint(source / "model", tmp_path / "here", *given)
    ours, theirs = ([h["value"] for h in run["history"]] for run in (there, here))
    assert ours[0] == pytest.approx(theirs[0], abs=2e-3)
    assert ours == pytest.approx(theirs, abs=0.05)  # masks flip where sums are in another order
    assert ours[-1] < ours[0] - 0.1
    assert there["device"] == "pretend" and here["device"] == "cpu"
    before, expected, found = (tensors(p) for p in (source / "artifact", tmp_path / "here", tmp_path / "there"))
    for name in (n for n in expected if n.endswith(("row_scale", "col_scale")) and "layers" in n):
        moved, wanted = found[name] / before[name] - 1, expected[name] / before[name] - 1
        assert np.abs(wanted).max() > 5e-4
        assert np.corrcoef(moved.astype(np.float64), wanted.astype(np.float64))[0, 1] > 0.9


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_run_goes_on_on_another_device(source, few_tokens, tmp_path, elsewhere, monkeypatch, way):
    places = [lambda *_: elsewhere, lambda *_: torch.device("cpu")][:: 1 if way == "back" else -1]
    arguments = source / "artifact", source / "model", tmp_path / "out", FAST, None, 200
    save = run_ipn.progress.save

    def interrupted(*given):
        save(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_ipn, "device_for", places[0])
        patch.setattr(run_ipn.progress, "save", interrupted)
        run_ipn.learn_ipn(*arguments)
    begun = (tmp_path / "out.partial" / "text.npy").read_bytes()
    told = []
    monkeypatch.setattr(run_ipn, "device_for", places[1])
    figures = run_ipn.learn_ipn(*arguments, report=lambda *say: told.append(say))
    assert figures["device"] == ("cpu" if way == "back" else "pretend")
    assert not any(stage == "sample" for stage, _, _ in told) and begun
    assert [done for stage, done, _ in told if stage == "train"] == [4, 5, 6]
    monkeypatch.setattr(run_ipn, "device_for", device_for)
    whole = run_ipn.learn_ipn(*arguments[:2], tmp_path / "whole", *arguments[3:])
    assert figures["history"][-1]["value"] == pytest.approx(whole["history"][-1]["value"], abs=0.05)


def test_devices_that_cannot_be_had(monkeypatch):
    with pytest.raises(LowtideError, match="--device tpu: known are auto, cpu, cuda"):
        device_for("tpu")
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    assert device_for("auto").type == "cpu"
    with pytest.raises(LowtideError, match="--device cuda: torch finds no GPU"):
        device_for("cuda")
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    assert device_for("auto").type == "cuda" and device_for("cpu").type == "cpu"
    assert device_for("auto", processes=2).type == "cpu"
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert device_for("auto").type == "cpu" and device_for("cuda").type == "cuda"
    with pytest.raises(LowtideError, match="2 processes train on the processor"):
        device_for("cuda", processes=2)


def test_the_command_says_what_it_ran_on(source, few_tokens, tmp_path):
    paths = [str(source / "artifact"), str(source / "model"), str(tmp_path / "out")]
    more = ["--bits", "4,6", "--steps", "2", "--windows", "2", "--check-every", "1", "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, ["learn", "ipn", *paths, "--text", str(source / "text"), *more])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures["device"] == "cpu" and [h["step"] for h in figures["history"]] == [0, 1, 2]


@pytest.mark.parametrize(("command", "name"), [("ipn", "learn_ipn"), ("joint", "learn_joint")])
def test_options_reach_the_training(tmp_path, monkeypatch, command, name):
    given = {}

    def learn(*arguments):
        given["options"] = next(a for a in arguments if isinstance(a, IpnOptions))
        given["device"] = arguments[-1]
        return {}

    monkeypatch.setattr(run_ipn, name, learn)
    paths = [str(tmp_path / "artifact"), "model", str(tmp_path / "out")][command == "joint" :]
    done = CliRunner().invoke(
        app, ["learn", command, *paths, "--head", "full", "--check-every", "7", "--device", "cuda"]
    )
    assert done.exit_code == 0, done.output
    assert (given["options"].head, given["options"].check_every, given["device"]) == ("full", 7, "cuda")


def test_looking_every_zeroth_step_is_refused():
    with pytest.raises(LowtideError, match="--check-every 0"):
        dataclasses.replace(FAST, check_every=0)
