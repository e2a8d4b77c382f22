"""The text that training looks at."""

from __future__ import annotations

import dataclasses
import random

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
        return sampled_windows(Parallel(), small.model, shape, options.seed, tmp_path, report, options.varied)

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


def test_more_clusters_are_found_on_more_text(small, monkeypatch):
    (least, most), of_each = cluster_fit.TOKENS, cluster_fit.MEMBERS
    assert cluster_fit.tokens_for(small.model, 64) == most
    assert cluster_fit.tokens_for(small.model, 1024) == 1024 * of_each > most
    monkeypatch.setattr(cluster_fit, "BYTES", 1)
    assert cluster_fit.tokens_for(small.model, 1024) == least


@pytest.fixture
def mixed(small, monkeypatch, tmp_path):
    """(what is wanted, the windows, whether each is of the file) for a text of so many words of all kinds."""
    monkeypatch.setattr(sensitivity, "PROBE_TOKENS", (64, 64))
    monkeypatch.setattr(cluster_fit, "TOKENS", (640, 640))  # 20 windows
    monkeypatch.setattr(cluster_fit, "MEMBERS", 0)
    write_folder(small.source, tmp_path / "model")
    dense = DenseModel(open_source(tmp_path / "model"))

    def mixed(words, part, tokens=100_000, keep=False, centroids=2, varied=False):
        draw = random.Random(0)
        text = " ".join("".join(draw.choices("abcdefgh", k=6)) for _ in range(words))
        (tmp_path / "file").write_text(text)
        if not keep:
            (tmp_path / NAME).unlink(missing_ok=True)
        options = dataclasses.replace(OPTIONS, own_text=part, centroids=centroids, varied=varied)
        found = wanted(dense, tmp_path / "file", tokens, options)
        ids = windows(Parallel(), dense, found, options, tmp_path, lambda *_: None)
        read = found.from_file.tolist()
        return found, ids, [row in read for row in ids.tolist()]

    return mixed


def test_a_file_and_the_model_give_their_parts(mixed):
    found, ids, read = mixed(1000, 0.25)
    assert found.from_file is not None and found.from_file.shape == (15, 32) and found.sampled == (5, 32)
    assert ids.shape == (20, 32) and sum(read) == 15 and len({tuple(row) for row in ids.tolist()}) == 20
    for first in range(0, 20, 4):  # whichever are held out are of both kinds
        assert sum(read[first : first + 4]) == 3
    assert mixed(1000, 0.5)[0].sampled == (10, 32)
    assert mixed(1000, 0.5, tokens=8 * 32)[0].sampled == (4, 32)
    fewer, _, _ = mixed(1000, 0.5, centroids=0)  # only training looks at them
    assert fewer.sampled == (7, 32) and fewer.from_file is not None and len(fewer.from_file) == 7


def test_beside_a_file_too_what_the_model_writes_is_varied(mixed):
    (_, plain, read), (_, varied, same) = mixed(1000, 0.25), mixed(1000, 0.25, varied=True)
    assert read == same and torch.equal(plain[read], varied[read])
    assert not torch.equal(plain[~torch.tensor(read)], varied[~torch.tensor(read)])


def test_more_centroids_are_found_on_more_of_both(mixed, monkeypatch):
    monkeypatch.setattr(cluster_fit, "MEMBERS", 320)
    assert len(mixed(1000, 0.5)[1]) == 20 and len(mixed(1000, 0.5, centroids=3)[1]) == 30


def test_windows_of_a_file_are_as_long_as_what_the_model_writes(mixed, monkeypatch):
    monkeypatch.setattr(training_text, "SAMPLED_WINDOW", 24)  # of 32 positions
    found, ids, read = mixed(1000, 0.5)
    assert found.from_file is not None and found.from_file.shape[1] == ids.shape[1] == 24
    assert sum(read) == found.sampled[0] == len(ids) // 2


def test_what_is_wanted_tells_how_much_the_model_writes(mixed):
    found, _, _ = mixed(1000, 0.25)
    assert found.key() != dataclasses.replace(found, sampled=(6, 32)).key()
    assert found.key() != dataclasses.replace(found, from_file=None).key()


def test_what_the_model_writes_is_varied_if_that_is_asked_for(written, monkeypatch):
    seen, real = [], DenseModel.sample

    def spy(self, batch, length, seed, progress, varied):
        seen.append(varied)
        return real(self, batch, length, seed, progress, varied)

    monkeypatch.setattr(DenseModel, "sample", spy)
    plain = written(100_000)
    assert seen and not any(seen)
    seen.clear()
    varied = written(100_000, dataclasses.replace(OPTIONS, varied=True))
    assert seen and all(seen) and varied.shape == plain.shape and not torch.equal(varied, plain)


def test_neither_part_outdoes_the_other_or_the_tokens_asked_for(mixed):
    found, ids, read = mixed(24, 0.5)  # a short file
    assert found.from_file is not None and 3 <= len(found.from_file) < 10
    assert found.sampled[0] == len(found.from_file) and len(ids) == 2 * sum(read)
    found, ids, _ = mixed(1000, 0.99)
    assert found.sampled == (17, 32) and len(ids) == 20


def test_a_mixture_is_read_again(mixed, small, monkeypatch):
    _, first, _ = mixed(1000, 0.5)

    def sample(*_):
        raise AssertionError("the model must not write again")

    monkeypatch.setattr(DenseModel, "sample", sample)
    assert torch.equal(mixed(1000, 0.5, keep=True)[1], first)


def test_a_part_without_a_file_or_beyond_its_range_is_refused_at_once(small, tmp_path, monkeypatch):
    write_folder(small.source, tmp_path / "model")
    monkeypatch.setattr(run_ipn, "compress", None)  # before that
    options = IpnOptions(own_text=0.5, weight_rate=0.01)
    with pytest.raises(LowtideError, match="--own-text 0.5: needs --text"):
        run_ipn.learn_joint(tmp_path / "model", tmp_path / "out", options)
    with pytest.raises(LowtideError, match="--own-text 0.5: needs --text"):
        run_ipn.learn_ipn(tmp_path / "none", tmp_path / "model", tmp_path / "out", IpnOptions(own_text=0.5))
    with pytest.raises(LowtideError, match="--varied: .*give --own-text, or leave out --text"):
        given = IpnOptions(varied=True), tmp_path / "text"
        run_ipn.learn_ipn(tmp_path / "none", tmp_path / "model", tmp_path / "out", *given)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    for part in (-0.1, 1.0, float("nan")):
        with pytest.raises(LowtideError, match="--own-text .*: must be from 0 to below 1"):
            IpnOptions(own_text=part)


@pytest.mark.parametrize("command", [["ipn", "artifact"], ["joint"]])
def test_commands_hand_on_the_part_that_the_model_writes(command, monkeypatch):
    seen = {}

    def learn_it(*given):
        options = next(each for each in given if isinstance(each, IpnOptions))
        seen["part"], seen["varied"] = options.own_text, options.varied
        return {}

    for name in ("learn_ipn", "learn_joint"):
        monkeypatch.setattr(run_ipn, name, learn_it)
    for varied in (True, False):
        arguments = [*command, "model", "out", "--text", "text", "--own-text", "0.25", *["--varied"][: int(varied)]]
        typer.main.get_command(learn.app)(arguments, standalone_mode=False)
        assert seen == {"part": 0.25, "varied": varied}
