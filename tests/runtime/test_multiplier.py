"""The importance as a multiplier: what it changes and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from support.tiny import make_artifact

from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.runtime.model import load
from lowtide.runtime.multiplier import with_importance, with_multiplier


@pytest.fixture
def artifact(tmp_path):
    return open_artifact(make_artifact(tmp_path / "a"))


def test_columns_are_multiplied_by_their_importance(artifact):
    group = artifact.groups["layers.0.down"]
    changed = with_multiplier(group, 0.5)
    v = group.importance.astype(np.float64)
    known = v > 0
    expected = np.sqrt(v[known] / np.exp(np.log(v[known]).mean()))
    ratio = changed.dequantise(0, 3)[:, known] / group.dequantise(0, 3)[:, known]
    np.testing.assert_allclose(ratio, np.broadcast_to(expected, ratio.shape), rtol=2e-3)
    np.testing.assert_array_equal(changed.exact_part(0), group.exact_part(0))
    assert np.array_equal(group.col_scale, artifact.groups["layers.0.down"].col_scale)


def test_a_power_of_zero_and_tables_change_nothing(artifact):
    assert with_importance(artifact, 0.0) is artifact
    assert with_multiplier(artifact.groups["head"], 1.0) is artifact.groups["head"]


def test_the_engine_runs_with_it(artifact):
    with load(artifact.path, threads=1) as plain, load(artifact.path, 1, importance_multiplier=0.5) as changed:
        a, b = (m.engine.prefill([1, 2, 3], 0) for m in (plain, changed))
    assert np.isfinite(b).all() and not np.array_equal(a, b)


@pytest.mark.parametrize("power", [float("nan"), float("inf"), 5.0])
def test_powers_that_make_no_sense(artifact, power):
    with pytest.raises(LowtideError, match="--importance-multiplier"):
        with_multiplier(artifact.groups["layers.0.down"], power)
