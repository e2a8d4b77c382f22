"""Which network `learn ipn` and `learn joint` begin with: the artifact's, another artifact's, or a fresh one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.learning import FAST, tensors
from support.twin import write_folder

from lowtide.compress import compress
from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.learn import first_network, training_text
from lowtide.learn.ipn_train import FEATURES
from lowtide.learn.run_ipn import learn_ipn, learn_joint

pytestmark = pytest.mark.usefixtures("few_tokens")


def test_training_goes_on_from_the_network_that_is_there(source, tmp_path, monkeypatch):
    args = source / "model", tmp_path / "first"
    learn_ipn(source / "artifact", *args, FAST, source / "text")
    monkeypatch.setattr(first_network, "fit_probes", None)  # not asked for again
    idle = dataclasses.replace(FAST, steps=0)
    again = learn_ipn(tmp_path / "first", source / "model", tmp_path / "again", idle, source / "text")
    before, after = tensors(tmp_path / "first"), tensors(tmp_path / "again")
    for name in (n for n in before if "ipn_" in n):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for name in (n for n in before if n.endswith("thresholds")):
        finite = np.isfinite(before[name])
        np.testing.assert_allclose(after[name][finite], before[name][finite], rtol=0.05, err_msg=name)
    for point in again["before"]:  # thresholds were solved for
        assert point["read"] == pytest.approx(point["bits"], rel=0.05)
    assert again["probe_ratio"] is None
    wider = dataclasses.replace(idle, features=5)
    monkeypatch.undo()
    assert learn_ipn(tmp_path / "first", source / "model", tmp_path / "wider", wider, source / "text")["probe_ratio"]


def test_features_are_those_of_the_network_that_is_there_or_a_few(source, tmp_path):
    idle = dataclasses.replace(FAST, steps=0, features=None)
    model, text = source / "model", source / "text"
    learn_ipn(source / "artifact", model, tmp_path / "few", idle, text)
    assert open_artifact(tmp_path / "few").manifest.ipn["features"] == FEATURES
    learn_ipn(source / "artifact", model, tmp_path / "five", dataclasses.replace(idle, features=5), text)
    again = learn_ipn(tmp_path / "five", model, tmp_path / "again", idle, text)
    assert open_artifact(tmp_path / "again").manifest.ipn["features"] == 5 and again["probe_ratio"] is None
    other = learn_ipn(source / "artifact", model, tmp_path / "other", idle, text, network=tmp_path / "five")
    assert open_artifact(tmp_path / "other").manifest.ipn["features"] == 5 and other["probe_ratio"] is None


def test_sizes_are_those_of_the_network_only_if_it_is_gone_on_with(source, tmp_path):
    start = dataclasses.replace(FAST, steps=0, centroids=3)
    learn_ipn(source / "artifact", source / "model", tmp_path / "first", start, source / "text")
    first, none = open_artifact(tmp_path / "first"), dataclasses.replace(start, features=None, centroids=None)

    def sizes(**given):
        options = first_network.settled(dataclasses.replace(none, **given), first)
        return options.features, options.centroids, first_network.goes_on(first, options)

    assert sizes() == sizes(features=4) == sizes(centroids=3) == (4, 3, True)
    assert sizes(features=7) == (7, 0, False)  # a fresh one; the model is too small for centroids of its own accord
    assert sizes(centroids=2) == (FEATURES, 2, False) and sizes(parts=("offset",)) == (FEATURES, 0, False)


def test_an_artifact_without_channel_norm_is_refused_at_once(source, tmp_path, monkeypatch):
    monkeypatch.setattr(training_text, "sampled_windows", None)  # before the model has written its text
    compress(source / "model", tmp_path / "other", calibration=source / "text", policies=["channel-abs"])
    with pytest.raises(LowtideError, match="stores no thresholds for channel-norm"):
        learn_ipn(tmp_path / "other", source / "model", tmp_path / "out", FAST)
    assert not list(tmp_path.glob("out*"))


def test_training_begins_with_the_network_of_another_artifact(source, tmp_path, monkeypatch):
    learn_ipn(source / "artifact", source / "model", tmp_path / "first", FAST, source / "text")
    monkeypatch.setattr(first_network, "fit_probes", None)  # not asked for
    compress(source / "model", tmp_path / "low", calibration=source / "text", feedback="low")
    idle = dataclasses.replace(FAST, steps=0)
    given = tmp_path / "low", source / "model", tmp_path / "out", idle, source / "text"
    done = learn_ipn(*given, network=tmp_path / "first")
    assert done["probe_ratio"] is None
    taken, from_, low = tensors(tmp_path / "out"), tensors(tmp_path / "first"), tensors(tmp_path / "low")
    for name in (n for n in from_ if "ipn_" in n):
        np.testing.assert_allclose(taken[name], from_[name], rtol=1e-5, atol=1e-6, err_msg=name)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(taken[weight], low[weight]) and not np.array_equal(taken[weight], from_[weight])
    joint = dataclasses.replace(FAST, steps=1, weight_rate=0.001)
    learn_joint(
        source / "model", tmp_path / "joint", joint, tmp_path / "low", source / "text", network=tmp_path / "out"
    )
    assert open_artifact(tmp_path / "joint").manifest.stats["learned"]["joint"]


def test_a_network_that_does_not_fit_is_refused(source, tmp_path, small):
    given = source / "artifact", source / "model", tmp_path / "out", FAST, source / "text"
    with pytest.raises(
        LowtideError,
        match="artifact: has no importance prediction network; wanted is one with 4 .* and 0 centroids$",
    ):
        learn_ipn(*given, network=source / "artifact")
    wide = dataclasses.replace(FAST, steps=0, features=5)
    learn_ipn(source / "artifact", source / "model", tmp_path / "wide", wide, source / "text")
    with pytest.raises(
        LowtideError, match="wide: its network has 5 features and 0 centroids; wanted is one with 4 features and 0 cen"
    ):
        learn_ipn(*given, network=tmp_path / "wide")
    values = {n: small.source.tensor(n).numpy() * 1.1 for n in small.source.names()}
    write_folder(type(small.source)(small.source.config, values, small.source.tokenizer_files()), tmp_path / "other")
    compress(tmp_path / "other", tmp_path / "others", calibration=source / "text")
    with pytest.raises(LowtideError, match="others: its network is of another model"):
        learn_ipn(*given, network=tmp_path / "others")
    compress(source / "model", tmp_path / "four", calibration=source / "text", bits_max=4)
    with pytest.raises(LowtideError, match="four: its network is for other budgets, exact channels or means"):
        learn_ipn(*given, network=tmp_path / "four")
    with pytest.raises(LowtideError, match="--parts offset: all of them learn where --network is given"):
        learn_ipn(*given[:3], dataclasses.replace(FAST, parts=("offset",)), source / "text", network=tmp_path / "wide")
    with pytest.raises(LowtideError, match="nowhere"):
        joint = dataclasses.replace(FAST, weight_rate=0.001)
        learn_joint(source / "model", tmp_path / "out", joint, None, source / "text", network=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.*"))
