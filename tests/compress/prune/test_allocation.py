"""Sharing sparsity among layers: totals, thresholds, and a search that finds what it should."""

from __future__ import annotations

import json

import pytest
import torch

from lowtide.compress.prune.allocation import ScoreHistogram, Search, erk, histogram, uniform
from lowtide.compress.prune.masks import auto_sparsity, threshold_mask
from lowtide.compress.prune.schedule import CubicSchedule
from lowtide.errors import LowtideError

SIZES = {"a": (64, 64), "b": (64, 64), "c": (64, 256), "d": (8, 16)}


def mean(sparsities, sizes=SIZES) -> float:
    total = sum(o * i for o, i in sizes.values())
    return sum(s * sizes[n][0] * sizes[n][1] for n, s in sparsities.items()) / total


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_uniform_and_erk_keep_the_total(sparsity):
    assert uniform(SIZES, sparsity) == dict.fromkeys(SIZES, sparsity)
    shared = erk(SIZES, sparsity)
    assert mean(shared) == pytest.approx(sparsity)
    assert all(-1e-9 <= s < 1 for s in shared.values())
    assert shared["d"] <= shared["a"] <= shared["c"]


def test_erk_by_hand():
    shared = erk({"a": (10, 10), "b": (10, 30)}, 0.5)  # densities 20 f / 100 and 40 f / 300; 60 f = 200
    assert shared == pytest.approx({"a": 1 - 2 / 3, "b": 1 - 4 / 9})


def test_one_threshold_is_that_of_the_sorted_scores():
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(o, i, generator=generator).pow(3) * (k + 1) for k, (n, (o, i)) in enumerate(SIZES.items())}
    found = ScoreHistogram()
    for name, score in scores.items():
        found.add(name, score)
    shared = found.sparsities(0.6)
    exact = [float((~m).float().mean()) for m in threshold_mask(list(scores.values()), 0.6)]
    assert mean(shared) == pytest.approx(0.6, abs=1e-6)
    assert list(shared.values()) == pytest.approx(exact, abs=0.01)
    assert found.knee() == pytest.approx(auto_sparsity(torch.cat([s.flatten() for s in scores.values()])), abs=0.02)


def test_layers_the_loss_depends_on_keep_more(problem):
    quiet, loud = problem(name="quiet"), problem(name="loud")
    loud.fisher = loud.fisher * 100
    shared = histogram([quiet, loud]).sparsities(0.5)
    assert shared["loud"] < 0.3 < 0.7 < shared["quiet"]


def make_search(tmp_path, loss, **options):
    sizes = dict.fromkeys("abcdef", (8, 8)) | {"g": (4, 4)}
    return Search(sizes, uniform(sizes, 0.5), loss, generations=25, state=tmp_path / "search.json", **options)


def sensitive(sparsities) -> float:
    """a costs a lot, f nothing."""
    return sum(w * sparsities[n] ** 2 for n, w in zip("abcdef", [32, 8, 4, 2, 1, 0], strict=True))


def test_search_moves_sparsity_to_where_it_is_free(tmp_path):
    search = make_search(tmp_path, sensitive, seed=1)
    best, loss = search.run(lambda *_: None)
    assert loss == pytest.approx(sensitive(best)) and loss < 0.5 * sensitive(search.start)
    assert best["a"] < 0.4 < 0.6 < best["f"]
    assert mean(best, search.sizes) == pytest.approx(0.5)
    assert best["g"] == 0.5  # no other layer of its size


def test_search_goes_on_where_it_was(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = make_search(tmp_path / "whole", sensitive).run(lambda *_: None)
    calls = []

    def dies(sparsities) -> float:
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return sensitive(sparsities)

    with pytest.raises(KeyboardInterrupt):
        make_search(tmp_path / "cut", dies).run(lambda *_: None)
    assert 3 < json.loads((tmp_path / "cut" / "search.json").read_text())["generation"] < 25
    assert make_search(tmp_path / "cut", sensitive).run(lambda *_: None) == whole
    with pytest.raises(LowtideError, match="another search"):
        make_search(tmp_path / "cut", sensitive, seed=9).run(lambda *_: None)


def test_cubic_schedule():
    ramp = CubicSchedule(0.8, 0.2, begin=10, end=110, every=10)
    assert [ramp.sparsity(s) for s in (0, 10, 19)] == pytest.approx([0.2] * 3)
    assert ramp.sparsity(60) == pytest.approx(0.8 - 0.6 * 0.125)
    assert ramp.sparsity(110) == ramp.sparsity(999) == 0.8
    with pytest.raises(LowtideError, match="no ramp"):
        CubicSchedule(0.5, begin=5, end=5)
    with pytest.raises(LowtideError, match="--sparsity 1"):
        CubicSchedule(1.0)
