"""The text that training looks at."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowtide.errors import LowtideError
from lowtide.learn import sensitivity, training_text
from lowtide.learn.ipn_train import IpnOptions
from lowtide.learn.parallel import Parallel
from lowtide.learn.sensitivity import probe_tokens
from lowtide.learn.training_text import NAME, sampled_shape, sampled_windows

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
