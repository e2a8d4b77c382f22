"""`learn ipn` and `learn joint` from end to end: artifacts that run, runs that resume, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import typer
from support.learning import FAST, tensors
from support.twin import write_folder

import lowtide
from lowtide.cli import learn
from lowtide.compress import compress, products
from lowtide.compress.dense import DenseModel
from lowtide.compress.sources import open_source
from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.kernels.native import Engine
from lowtide.kernels.reference import ReferenceEngine
from lowtide.learn import first_network, ipn_train, run_ipn
from lowtide.learn.graded import GradedModel
from lowtide.learn.ipn_loss import Prices
from lowtide.learn.ipn_train import IpnOptions, Learner
from lowtide.learn.run_ipn import learn_ipn, learn_joint
from lowtide.runtime.budget import policy_params

pytestmark = pytest.mark.usefixtures("few_tokens")


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def test_the_result_is_an_ordinary_artifact_with_the_learned_rule_first(source, tmp_path):
    figures = learn_ipn(source / "artifact", source / "model", tmp_path / "out", FAST, source / "text")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    artifact, before = open_artifact(tmp_path / "out"), open_artifact(source / "artifact")
    assert artifact.manifest.policies == ["ipn", *before.manifest.policies]
    sizes = {
        "features": 4,
        "centroids": 0,
        "key_channels": 0,
        "factors": 0,
    }  # too small a model for the keys of clusters
    assert artifact.manifest.ipn == {"low": 4.0, "high": 6.0} | sizes
    old, new = tensors(source / "artifact"), tensors(tmp_path / "out")
    assert all(np.array_equal(old[n], new[n]) for n in old if not n.endswith("thresholds"))
    params = policy_params(artifact, "ipn", 5.0)
    native = Engine(artifact, threads=2, max_context=8)
    reference = ReferenceEngine(artifact, max_context=8)
    for position, token in enumerate((5, 9, 3)):
        ours, stats = native.decode(token, position, params)
        theirs, expected = reference.decode(token, position, params)
        assert np.array_equal(ours, theirs) and stats.body_bits == expected.body_bits
    native.close()
    assert figures["trained_tokens"] == 6 * 3 * 32 and figures["best_step"] <= 6
    assert figures["budget_error"] < 0.02


def test_budgets_are_kept_on_other_text(source, tmp_path):
    learn_ipn(source / "artifact", source / "model", tmp_path / "out", FAST, source / "text")
    other = np.random.default_rng(3).integers(0, 104, (3, 32)).astype(np.int32)
    found = lowtide.evaluate(tmp_path / "out", source / "model", other, window=32, bits=[4.5, 5.5], progress=False)
    for point in found["points"]:
        assert point["bits_read_body"] == pytest.approx(point["bits"], rel=0.02)


def test_an_interrupted_run_gives_the_same_artifact(source, tmp_path):
    learn_ipn(source / "artifact", source / "model", tmp_path / "whole", FAST, source / "text")

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if (stage, done) == ("train", 5):
            raise Stop

    with pytest.raises(Stop):
        learn_ipn(source / "artifact", source / "model", tmp_path / "cut", FAST, source / "text", report=stop)
    seen = []
    learn_ipn(
        source / "artifact", source / "model", tmp_path / "cut", FAST, source / "text", report=lambda *a: seen.append(a)
    )
    assert [s for s in seen if s[0] == "train"] == [("train", n, 6) for n in (4, 5, 6)]
    assert not [s for s in seen if s[0] == "probe"]
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))


def test_joint_training_moves_weights_and_helps(source, tmp_path):
    options = IpnOptions(
        steps=40, bits=(4.0, 5.0), focus=0.7, windows=6, features=4, check_every=10, weight_rate=0.004, rate=0.01
    )
    figures = learn_joint(source / "model", tmp_path / "out", options, source / "artifact", source / "text")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    values = {h["step"]: h["value"] for h in figures["history"]}
    assert figures["best_step"] > 0 and values[figures["best_step"]] < values[0]
    old, new = tensors(source / "artifact"), tensors(tmp_path / "out")
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(old[weight], new[weight])
    assert not np.array_equal(old["lowtide.layers.0.o.col_scale"], new["lowtide.layers.0.o.col_scale"])
    assert np.array_equal(old["lowtide.head.col_scale"], new["lowtide.head.col_scale"])
    artifact = open_artifact(tmp_path / "out")
    assert artifact.manifest.stats["learned"]["joint"] and artifact.manifest.stats["learned"]["trained_tokens"] > 0
    native = lowtide.evaluate(
        tmp_path / "out", source / "model", source / "text", window=32, windows=4, bits=[4.0, 5.0]
    )
    untrained = lowtide.evaluate(
        source / "artifact", source / "model", source / "text", window=32, windows=4, bits=[4.0, 5.0]
    )
    assert native["points"][0]["kl"] < 0.9 * untrained["points"][0]["kl"]


def test_joint_compresses_first_where_no_artifact_is_given(source, tmp_path):
    options = IpnOptions(steps=2, bits=(4.0, 5.0), windows=2, features=2, weight_rate=0.002)
    learn_joint(source / "model", tmp_path / "out", options, text=source / "text", calibration=source / "text")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert open_artifact(tmp_path / "out").manifest.policies[0] == "ipn"


def test_a_diverged_run_stops_and_keeps_the_last_good_step(source, tmp_path, monkeypatch):
    real = ipn_train.head_kl

    def broken(*args):
        broken.calls += 1
        return real(*args) * (math.nan if broken.calls > 8 else 1.0)

    broken.calls = 0
    monkeypatch.setattr(ipn_train, "head_kl", broken)
    figures = learn_ipn(source / "artifact", source / "model", tmp_path / "out", FAST, source / "text")
    assert figures["diverged"] and figures["steps"] < 6
    assert all(np.isfinite(t).all() for n, t in tensors(tmp_path / "out").items() if n.endswith("ipn_importance"))


def test_a_part_that_the_model_writes_is_trained_on(source, tmp_path):
    told = []
    options = dataclasses.replace(FAST, own_text=0.5)
    given = (source / "artifact", source / "model", tmp_path / "out", options, source / "text")
    learn_ipn(*given, tokens=8 * 32, report=lambda *say: told.append(say))
    assert [total for stage, _, total in told if stage == "sample"][-1] == 32  # the one round of four windows
    assert not (tmp_path / "out.partial").exists() and (tmp_path / "out" / "lowtide.json").exists()


def test_the_command_prints_figures_and_says_when_it_diverged(source, tmp_path, capsys):
    app = typer.main.get_command(learn.app)
    paths = [str(source / "artifact"), str(source / "model"), str(tmp_path / "out")]
    app(
        ["ipn", *paths, "--text", str(source / "text"), "--steps", "1", "--windows", "2", "--bits", "4,6", "--json"],
        standalone_mode=False,
    )
    figures = json.loads(capsys.readouterr().out)
    assert {"before", "after", "trained_tokens", "probe_ratio", "history"} <= set(figures)
    learn._tell(figures | {"diverged": True}, False)
    printed = capsys.readouterr()
    assert "diverged at step 1; kept step" in printed.err and "held-out KL at 4 bits" in printed.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "short"}, "give a longer text"),
        ({"options": IpnOptions(bits=(0.5, 3.0))}, "--bits 0.5,3: the artifact stores budgets from"),
        ({"artifact": "model"}, "is no artifact|lowtide.json"),
        ({"model": "other"}, "was made from other weights of this shape"),
        ({"out": "artifact"}, "exists already"),
        ({"options": IpnOptions(bits=(4.0, 6.0), parts=("theta",))}, "--parts theta: offset must be among them"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(source, tmp_path, small, change, message):
    given = {
        "artifact": "artifact",
        "model": "model",
        "out": tmp_path / "out",
        "options": FAST,
        "text": "text",
    } | change
    if change.get("text"):
        (source / "short").write_text("the end")
    if change.get("model") and not (source / "other").exists():
        values = {n: small.source.tensor(n).numpy() * 1.1 for n in small.source.names()}
        write_folder(type(small.source)(small.source.config, values, small.source.tokenizer_files()), source / "other")
    with pytest.raises(LowtideError, match=message):
        learn_ipn(
            source / given["artifact"],
            source / given["model"],
            source / given["out"],
            given["options"],
            source / given["text"],
        )
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_artifact_is_not_taken_up(source, tmp_path):
    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if (stage, done) == ("train", 5):
            raise Stop

    with pytest.raises(Stop):
        learn_ipn(source / "artifact", source / "model", tmp_path / "out", FAST, source / "text", report=stop)
    compress(source / "model", tmp_path / "other", calibration=source / "text", seed=1)
    seen = []
    learn_ipn(
        tmp_path / "other", source / "model", tmp_path / "out", FAST, source / "text", report=lambda *a: seen.append(a)
    )
    assert [s for s in seen if s[0] == "train"][0] == ("train", 1, 6)


def test_joint_without_a_weight_rate_is_refused(source, tmp_path):
    with pytest.raises(LowtideError, match="--weight-rate 0: leaves the model alone"):
        learn_joint(source / "model", tmp_path / "out", FAST, source / "artifact", source / "text")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried. More"), "enforce fail"),
        (MemoryError(), "no more to be had"),
        (torch.cuda.OutOfMemoryError("CUDA ran dry. Tried to allocate 2 GiB."), r"\(CUDA ran dry\)"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "ALLOC_FAILED"),
    ],
)
def test_out_of_memory_says_what_helps(source, tmp_path, monkeypatch, error, reason):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(first_network, "sensitivities", full)
    with pytest.raises(LowtideError, match=f"out of memory .*{reason}.*: fewer --windows help most, then fewer --to"):
        learn_ipn(source / "artifact", source / "model", tmp_path / "out", FAST, source / "text")


def test_other_errors_are_not_called_out_of_memory():
    wrong = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert run_ipn._out_of_memory(wrong, torch.device("cuda")) is wrong
    assert "--device cpu" in str(run_ipn._out_of_memory(MemoryError(), torch.device("cuda")))


def test_options_are_checked():
    for bad, message in (
        ({"bits": (3.0, 2.0)}, "--bits 3,2"),
        ({"steps": -1}, "--steps"),
        ({"features": 0}, "--features 0"),
        ({"head": "twice"}, "--head twice: known are once, full"),
        ({"focus": 1.5}, "--focus 1.5"),
        ({"weight_rate": float("nan")}, "--weight-rate nan"),
        ({"parts": ("gate",)}, "--parts: known are importance, theta, offset"),
    ):
        with pytest.raises(LowtideError, match=message):
            IpnOptions(**bad)
    with pytest.raises(LowtideError, match="--bits 2: give LOW,HIGH"):
        learn._budgets("2")


def test_the_l1_loss_and_consistency_train_too(source, tmp_path):
    options = IpnOptions(steps=3, bits=(4.0, 6.0), windows=2, features=2, prices=Prices("l1", consistency=0.5))
    figures = learn_ipn(source / "artifact", source / "model", tmp_path / "out", options, source / "text")
    assert not figures["diverged"] and torch.isfinite(torch.tensor(figures["after"][0]["kl"]))


def test_joint_training_in_int8_helps_too(source, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "_chosen", [products.TYPES["int8"]])
    options = IpnOptions(steps=20, bits=(4.0, 5.0), focus=0.7, windows=4, features=4, check_every=10, weight_rate=0.004)
    figures = learn_joint(source / "model", tmp_path / "out", options, source / "artifact", source / "text")
    values = {h["step"]: h["value"] for h in figures["history"]}
    assert figures["products"] == "int8"
    assert figures["best_step"] > 0 and values[figures["best_step"]] < values[0]


def test_the_weights_rate_falls_with_the_width(source, tmp_path, monkeypatch):
    assert run_ipn.rate_for(288) == run_ipn.rate_for(64) == 0.003
    assert run_ipn.rate_for(576) == pytest.approx(0.00075) and run_ipn.rate_for(8192) == 1e-4
    asked = []
    monkeypatch.setattr(run_ipn, "_learn", lambda *given: asked.append(given[5]) or {})
    learn_joint(source / "model", tmp_path / "out", IpnOptions(weight_rate=None), source / "artifact")
    learn_joint(source / "model", tmp_path / "out", IpnOptions(weight_rate=0.01), source / "artifact")
    assert [options.weight_rate for options in asked] == [0.003, 0.01]


def test_weights_with_feedback_are_where_joint_training_begins(source, tmp_path):
    long = tmp_path / "long"
    long.write_text((source / "text").read_text() * 4)
    compress(source / "model", tmp_path / "fed", calibration=long, policies=["channel-norm"], feedback="low")
    artifact = open_artifact(tmp_path / "fed")
    model = GradedModel(artifact, DenseModel(open_source(source / "model")), train_weights=True)
    for name, group in artifact.groups.items():
        if name in model.codes:
            assert np.array_equal(model.trained(name)[0].numpy(), group.codes()), name
    plain = GradedModel(open_artifact(source / "artifact"), model.dense, train_weights=True)
    assert not np.array_equal(plain.trained("layers.0.o")[0], model.trained("layers.0.o")[0])


def test_what_is_written_is_the_average_of_steps(source, tmp_path):
    for average in (0.0, 0.95):
        options = dataclasses.replace(FAST, average=average)
        learn_ipn(source / "artifact", source / "model", tmp_path / f"{average}", options, source / "text")
    assert not same(tensors(tmp_path / "0.0"), tensors(tmp_path / "0.95"))


def test_the_network_learns_more_slowly_beside_weights(source, tmp_path, monkeypatch):
    rates = []

    def adam(groups, **_):
        rates.append({id(g["params"][0]): g["lr"] for g in groups}.values())
        raise LowtideError("enough")

    monkeypatch.setattr(torch.optim, "Adam", adam)
    for weight_rate, start in ((0.0, learn_ipn), (0.0037, learn_joint)):
        options = dataclasses.replace(FAST, weight_rate=weight_rate)
        given = (source / "artifact", source / "model", tmp_path / "out", options, source / "text")
        if weight_rate:
            given = (source / "model", tmp_path / "out", options, source / "artifact", source / "text")
        with pytest.raises(LowtideError, match="enough"):
            start(*given, resume=False)
    alone, beside = (set(r) for r in rates)
    assert {FAST.rate, FAST.probe_rate} == alone
    assert not alone & beside
    share = ipn_train.JOINT_SHARE
    assert 0 < share < 0.1 and {FAST.rate * share, FAST.probe_rate * share} <= beside


@pytest.mark.parametrize(("count", "windows"), [(10, 3), (4, 6), (7, 7), (5, 1)])
def test_all_windows_are_seen_before_any_comes_again(count, windows):
    learner = Learner.__new__(Learner)
    learner.ids, learner.options = torch.zeros(count + 1, 8), IpnOptions(windows=windows, seed=3)  # one is held out
    rows = torch.cat([learner._rows(number) for number in range(4 * count)])
    turns = rows[: len(rows) // count * count].view(-1, count)
    assert torch.equal(turns.sort(1).values, torch.arange(count).expand_as(turns))
    assert any(not torch.equal(turns[0], turn) for turn in turns[1:])
