"""Sampling: greedy, cut-offs, repeatability, and the distribution it draws from."""

import subprocess
import sys

import numpy as np
import pytest

from lowtide.errors import LowtideError
from lowtide.runtime.sampling import Sampler

LOGITS = np.log(np.array([0.1, 0.5, 0.05, 0.25, 0.1], np.float32))


def draw(sampler: Sampler, n: int, logits: np.ndarray = LOGITS) -> np.ndarray:
    return np.bincount([sampler.sample(logits) for _ in range(n)], minlength=len(logits)) / n


def test_greedy_takes_the_likeliest_and_the_lowest_of_equals():
    assert Sampler().sample(LOGITS) == 1
    assert Sampler().sample(np.array([0, 3, 3], np.float32)) == 1
    assert Sampler(temperature=1, top_k=1, seed=0).sample(LOGITS) == 1


def test_temperature_one_draws_the_models_own_distribution():
    np.testing.assert_allclose(draw(Sampler(1.0, seed=0), 20000), np.exp(LOGITS), atol=0.015)


def test_temperature_sharpens():
    expected = np.exp(LOGITS / 0.5)
    np.testing.assert_allclose(draw(Sampler(0.5, seed=0), 20000), expected / expected.sum(), atol=0.015)


def test_top_k_keeps_the_k_likeliest_in_proportion():
    np.testing.assert_allclose(draw(Sampler(1.0, top_k=2, seed=0), 9000), [0, 2 / 3, 0, 1 / 3, 0], atol=0.02)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {1}), (0.5, {1}), (0.6, {1, 3}), (0.76, {0, 1, 3})])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, kept):
    assert set(np.flatnonzero(draw(Sampler(1.0, top_p=top_p, seed=0), 2000))) == kept


def test_the_seed_repeats_the_choices_and_another_does_not():
    def choices(seed):
        sampler = Sampler(1.0, seed=seed)
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert choices(7) == choices(7)
    assert choices(7) != choices(8)


def test_huge_logits_do_not_overflow():
    assert Sampler(1.0, seed=0).sample(np.array([1e30, -1e30, 0], np.float32)) == 0


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(broken, temperature):
    logits = LOGITS.copy()
    logits[2] = broken
    with pytest.raises(LowtideError, match="not finite"):
        Sampler(temperature, seed=0).sample(logits)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_k": -1}, "--top-k"),
        ({"top_p": 0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(LowtideError, match=named):
        Sampler(**options)


def test_greedy_choices_load_no_random_numbers():
    code = (
        "import sys, numpy as np; from lowtide.runtime.sampling import Sampler; s = Sampler(); "
        "assert s.sample(np.array([0.0, 2, 1])) == 1; print('numpy.random' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
