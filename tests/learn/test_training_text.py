"""The text that training looks at."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import typer
from support.twin import write_folder

from lowtide.cli import learn
from lowtide.compress.dense import DenseModel
from lowtide.compress.sources import open_source
from lowtide.errors import LowtideError
from lowtide.learn import cluster_fit, run_ipn, sensitivity, training_text
from lowtide.learn.ipn_train import IpnOptions
from lowtide.learn.parallel import Parallel
from lowtide.learn.sensitivity import probe_tokens
from lowtide.learn.training_text import NAME, sampled_shape, sampled_windows, wanted, windows

OPTIONS = IpnOptions(steps=3, windows=2, seed=7)


@pytest.fixture
def written(small, monkeypatch, tmp_path):
    """Text of at most so many tokens; the folder is emptied first, unless it is to be kept."""
    monkeypatch.setattr(sensitivity, "PROBE_TOKENS", (64, 64))  # two windows
    monkeypatch.setattr(training_text, "SAMPLED_AT_ONCE", 4)

    def written(tokens, options=OPTIONS, report=lambda *_: None, keep=False):
        if not keep:
            (tmp_path / NAME).unlink(missing_ok=True)
        shape = sampled_shape(small.model, tokens, options)
        return sampled_windows(Parallel(), small.model, shape, options.seed, tmp_path, report)

    return written


def test_a_model_writes_as_much_text_as_training_looks_at(written):
    told = []
    ids = written(100_000, report=lambda *told_of: told.append(told_of))
    assert ids.shape == (3 * 2 + 8, 32)
    assert len({tuple(row) for row in ids.tolist()}) == len(ids)
    assert told[-1] == ("sample", 128, 128) and [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert torch.equal(written(8 * 32), ids[:8])  # less text: its beginning
    assert written(1).shape == (3, 32)
    assert written(100_000, IpnOptions(steps=0)).shape == (2 + 8, 32)
    assert not torch.equal(written(8 * 32, IpnOptions(steps=3, windows=2, seed=8)), ids[:8])


def test_what_was_written_is_read_again(written, small, monkeypatch, tmp_path):
    first = written(256)

    def sample(*_):
        raise AssertionError("the model must not write again")

    monkeypatch.setattr(type(small.model), "sample", sample)
    assert torch.equal(written(256, keep=True), first)
    for damage in (b"", np.full((8, 32), 1 << 40)):
        with (tmp_path / NAME).open("wb") as file:
            file.write(damage) if isinstance(damage, bytes) else np.save(file, damage)
        with pytest.raises(LowtideError, match="text.npy: .*give --restart"):
            written(256, keep=True)


def test_probes_see_as_much_as_memory_allows(small, monkeypatch):
    least, most = sensitivity.PROBE_TOKENS
    assert probe_tokens(small.model) == most  # 2 layers of 32 channels
    per_token = 2 * 2 * 2 * 32
    monkeypatch.setattr(sensitivity, "PROBE_BYTES", 20_000 * per_token)
    assert probe_tokens(small.model) == 20_000
    monkeypatch.setattr(sensitivity, "PROBE_BYTES", 1)
    assert probe_tokens(small.model) == least


def mixture(small, monkeypatch, tmp_path, words, own, tokens=100_000):
    """(what is wanted, the windows) of a file of so many words and a part that the model writes."""
    monkeypatch.setattr(sensitivity, "PROBE_TOKENS", (64, 64))
    monkeypatch.setattr(cluster_fit, "TOKENS", (640, 640))  # 20 windows
    place = tmp_path / f"{own}-{tokens}"
    place.mkdir()
    write_folder(small.source, place / "model")
    (place / "file").write_text("the end of the tide is there. " * words)
    dense, options = DenseModel(open_source(place / "model")), dataclasses.replace(OPTIONS, own=own)
    found = wanted(dense, place / "file", tokens, options)
    return found, windows(Parallel(), dense, found, options, place, lambda *_: None)


def test_a_file_and_the_model_give_their_parts(small, monkeypatch, tmp_path):
    found, ids = mixture(small, monkeypatch, tmp_path, 1000, 0.25)
    assert found.from_file is not None and found.from_file.shape == (15, 32) and found.sampled == (5, 32)
    read = [row for row in ids.tolist() if row in found.from_file.tolist()]
    assert ids.shape == (20, 32) and len(read) == 15
    assert ids[:15].tolist() != found.from_file.tolist()  # they are mixed
    again, _ = mixture(small, monkeypatch, tmp_path, 1000, 0.5)
    assert again.sampled == (10, 32) and len(again.key()) != len(found.key())
    assert mixture(small, monkeypatch, tmp_path, 1000, 0.5, tokens=8 * 32)[0].sampled == (4, 32)


def test_a_short_file_is_not_outdone(small, monkeypatch, tmp_path):
    found, ids = mixture(small, monkeypatch, tmp_path, 5, 0.5)
    assert found.from_file is not None and 3 <= len(found.from_file) < 10
    assert found.sampled[0] == len(found.from_file) and len(ids) == 2 * len(found.from_file)


def test_the_part_that_the_model_writes_is_refused_without_a_file_or_beyond_its_range(small):
    with pytest.raises(LowtideError, match="--own 0.5: needs --text"):
        wanted(small.model, None, 1000, IpnOptions(own=0.5))
    for own in (-0.1, 1.0, float("nan")):
        with pytest.raises(LowtideError, match="--own .*: must be from 0 to below 1"):
            IpnOptions(own=own)


@pytest.mark.parametrize("command", [["ipn", "artifact"], ["joint"]])
def test_commands_hand_on_the_part_that_the_model_writes(command, monkeypatch):
    seen = {}

    def learn_it(*given):
        seen["own"] = next(each.own for each in given if isinstance(each, IpnOptions))
        return {}

    for name in ("learn_ipn", "learn_joint"):
        monkeypatch.setattr(run_ipn, name, learn_it)
    arguments = [*command, "model", "out", "--text", "text", "--own", "0.25"]
    typer.main.get_command(learn.app)(arguments, standalone_mode=False)
    assert seen == {"own": 0.25}
