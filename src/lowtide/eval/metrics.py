"""Sums behind KL divergence and perplexity, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def log_softmax(logits: NDArray[Any]) -> F64:
    """Log-probabilities f64 [..., V] in nats of logits [..., V]."""
    z = logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return z


def kl_divergence(reference: F64, ours: F64) -> F64:
    """KL(reference || ours) in nats, f64 [...], of log-probabilities [..., V]."""
    kl: F64 = (np.exp(reference) * (reference - ours)).sum(axis=-1)
    return kl


@dataclass
class Tally:
    """Running sums over tokens.

    Attributes:
        kl: KL divergences in nats, of `tokens` positions.
        nll: negative log-likelihoods in nats of the next token, of `predicted` positions.
        all_bits: bits read, output head and embedding rows included.
    """

    kl: float = 0.0
    nll: float = 0.0
    tokens: int = 0
    predicted: int = 0
    all_bits: int = 0

    def add(self, logp: F64, target: int | None, reference: F64 | None = None) -> None:
        """Take in one position: log-probabilities [V], the token that follows (None at a window's end)."""
        self.tokens += 1
        if reference is not None:
            self.kl += float(kl_divergence(reference, logp))
        if target is not None:
            self.nll -= float(logp[target])
            self.predicted += 1

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence, nats per token."""
        return self.kl / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of next tokens within windows."""
        return math.exp(min(self.nll / self.predicted, 700.0))
