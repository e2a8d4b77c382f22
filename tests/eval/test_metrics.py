"""KL divergence and perplexity against numbers worked out by hand."""

import math

import numpy as np
import pytest

from lowtide.eval.metrics import Tally, kl_divergence, log_softmax


def test_log_softmax_survives_large_logits():
    logits = np.float32([[1e4, 1e4, -1e4], [0, math.log(3), -1e9]])
    np.testing.assert_allclose(np.exp(log_softmax(logits)), [[0.5, 0.5, 0], [0.25, 0.75, 0]], atol=1e-7)
    assert log_softmax(logits).dtype == np.float64


def test_kl_by_hand():
    p, q = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    assert kl_divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_divergence(q, p) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert kl_divergence(p, p) == 0


def test_tally_means_over_tokens_and_over_predicted_tokens():
    tally = Tally()
    p, q = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    tally.add(q, 1, p)
    tally.add(p, 0, p)
    tally.add(q, None, p)  # the last position of a window predicts nothing, but its KL counts
    one = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert tally.mean_kl == pytest.approx(2 * one / 3)
    assert tally.perplexity == pytest.approx(math.exp(-(math.log(0.75) + math.log(0.5)) / 2))
    assert (tally.tokens, tally.predicted) == (3, 2)


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    tally = Tally()
    for target in range(7):
        tally.add(log_softmax(np.zeros(50, np.float32)), target)
    assert tally.perplexity == pytest.approx(50)
