"""Pick the next token from logits (numpy)."""

from __future__ import annotations

import math

import numpy as np

from lowtide.errors import LowtideError


class Sampler:
    """Temperature, top-k and top-p sampling from a seeded generator; temperature 0 is greedy."""

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None) -> None:
        """
        Args:
            temperature: 0 takes the likeliest token; 1 samples from the model's own distribution.
            top_k: keep only the k likeliest tokens (0 keeps all).
            top_p: keep the smallest set of likeliest tokens whose probability reaches p.
            seed: makes the choices repeatable; None takes one from the system.

        Raises:
            LowtideError: an option out of its range.
        """
        if not (math.isfinite(temperature) and temperature >= 0):
            raise LowtideError(f"--temperature {temperature}: must be 0 or more")
        if top_k < 0:
            raise LowtideError(f"--top-k {top_k}: must be 0 (all tokens) or more")
        if not 0 < top_p <= 1:
            raise LowtideError(f"--top-p {top_p}: must be above 0 and at most 1")
        if seed is not None and seed < 0:
            raise LowtideError(f"--seed {seed}: must be 0 or more")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._seed = seed
        self._random: np.random.Generator | None = None  # greedy choices need none, and numpy.random takes time to load

    def sample(self, logits: np.ndarray) -> int:
        """One token id out of logits f32 [V]; ties go to the lowest id.

        Raises:
            LowtideError: the logits are not all numbers (a broken artifact or engine).
        """
        best = int(np.argmax(logits))  # NaN wins argmax, so one look at the winner is enough
        if not math.isfinite(float(logits[best])):
            raise LowtideError("the model produced logits that are not finite; run `lowtide verify` on the artifact")
        if self.temperature == 0 or self.top_k == 1:
            return best
        ids, probability = self._kept((logits.astype(np.float64) - float(logits[best])) / self.temperature)
        if self._random is None:
            self._random = np.random.default_rng(self._seed)
        cumulative = np.cumsum(probability)
        place = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(ids[min(place, len(ids) - 1)])

    def _kept(self, scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Candidate ids, likeliest first when any are dropped, and their unnormalised probabilities."""
        weight = np.exp(scaled)
        if not self.top_k and self.top_p == 1:
            return np.arange(len(weight)), weight
        order = np.argsort(-weight, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        weight = weight[order]
        if self.top_p < 1:
            # The token that crosses p is kept, so at least one always is.
            before = (np.cumsum(weight) - weight) / weight.sum()
            keep = max(1, int(np.count_nonzero(before < self.top_p)))
            order, weight = order[:keep], weight[:keep]
        return order, weight
