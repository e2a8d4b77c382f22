"""Counting n-grams, and the two smoothings that turn counts into stored numbers. Words are ids here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

BEGIN, END = "<s>", "</s>"
MAX_ORDER = 6
STUPID_BACKOFF = 0.4
"""Brants et al. 2007."""


@dataclass
class Grams:
    """All n-grams of one order k, sorted.

    prefix: i64 [n], number of the first k - 1 words among the (k-1)-grams (0 if k is 1); suffix: i64 [n], that of the
    last k - 1 words; word: i64 [n], the last word; count: i64 [n]; begins: bool [n], the first word is <s>.
    """

    prefix: I64
    suffix: I64
    word: I64
    count: I64
    begins: NDArray[np.bool_]


@dataclass
class Counts:
    """N-grams of a text: words, the vocabulary by id (id 0 is <s>, 1 is </s>), and the n-grams of orders 1, 2, ..."""

    words: list[str]
    orders: list[Grams]

    def texts(self, order: int) -> list[str]:
        """The n-grams of one order as words joined by spaces."""
        result = list(self.words)
        result = [result[w] for w in self.orders[0].word.tolist()]
        for grams in self.orders[1:order]:
            pairs = zip(grams.prefix.tolist(), grams.word.tolist(), strict=True)
            result = [f"{result[p]} {self.words[w]}" for p, w in pairs]
        return result


@dataclass
class Model:
    """What is stored of each order: ln p(word | context) f64 [n] and ln of the n-gram's backoff weight as a context
    f64 [n] (0 for the highest order and for n-grams that are no context); unknown: ln p of a word never seen."""

    log_p: list[F64]
    log_backoff: list[F64]
    unknown: float


def stream(sentences: Iterable[list[int]]) -> tuple[I64, I64]:
    """Sentences of word ids as one stream: <s> words </s> ..., i64 [n], and how many words of the same sentence lie
    before each, i64 [n]."""
    parts = [np.array([0, *s, 1], np.int64) for s in sentences]
    if not parts:
        raise LowtideError("the text has no words")
    return np.concatenate(parts), np.concatenate([np.arange(len(p)) for p in parts])


def count_grams(words: list[str], ids: I64, depth: I64, order: int) -> Counts:
    """N-grams of orders 1 to `order` of a stream, as `stream` returns it."""
    if not 1 <= order <= MAX_ORDER:
        raise LowtideError(f"order {order}: must be 1 to {MAX_ORDER}")
    orders: list[Grams] = []
    number = np.zeros(len(ids), np.int64)  # of the (k-1)-gram that ends before each position
    ends = number
    for k in range(1, order + 1):
        here = np.flatnonzero(depth >= k - 1)
        keys, first, inverse, count = np.unique(
            number[here] * len(words) + ids[here], return_index=True, return_inverse=True, return_counts=True
        )
        suffix = ends[here][first] if k > 1 else np.zeros(len(keys), np.int64)
        grams = Grams(keys // len(words), suffix, keys % len(words), count, depth[here][first] == k - 1)
        if k > 1:
            # <s> stands at the front of a sentence only
            grams.begins = orders[-1].begins[grams.prefix]
        else:
            grams.begins = grams.word == 0
        orders.append(grams)
        ends = np.full(len(ids), -1, np.int64)
        ends[here] = inverse
        number = np.concatenate([[-1], ends[:-1]])
        number[depth < k] = 0
    return Counts(words, orders)


def kneser_ney(counts: Counts) -> Model:
    """Interpolated modified Kneser-Ney (Chen and Goodman 1998): three discounts for each order, lower orders counted by
    the number of different words before them."""
    adjusted = _adjusted(counts)
    vocabulary = len(counts.words)  # </s> and the unknown word are predicted, <s> is not
    log_p, log_backoff, lower = [], [], None
    unknown = 0.0
    for k, (grams, a) in enumerate(zip(counts.orders, adjusted, strict=True)):
        discounts = _discounts(a)
        context = grams.prefix
        contexts = len(counts.orders[k - 1].word) if k else 1
        total = np.bincount(context, weights=a, minlength=contexts)
        taken = discounts[np.minimum(a, 3)]
        spare = np.bincount(context, weights=taken, minlength=contexts)
        backoff = np.where(total > 0, spare / np.maximum(total, 1), 1.0)
        base = lower[grams.suffix] if lower is not None else np.full(len(a), 1 / vocabulary)
        p = (a - taken) / np.maximum(total[context], 1) + backoff[context] * base
        if k:
            log_backoff.append(np.log(np.maximum(backoff, 1e-12)))
        else:
            unknown = float(np.log(backoff[0] / vocabulary))
            p[grams.word == 0] = np.exp(unknown)  # never asked for; counts as a context only
        log_p.append(np.log(p))
        lower = p
    log_backoff.append(np.zeros(len(counts.orders[-1].word)))
    return Model(log_p, log_backoff, unknown)


def stupid_backoff(counts: Counts) -> Model:
    """Relative frequencies, and the factor 0.4 for each order given up (Brants et al. 2007). Scores, not probabilities:
    they do not add up to 1."""
    log_p = []
    for k, grams in enumerate(counts.orders):
        c = grams.count.astype(np.float64)
        whole = counts.orders[k - 1].count.astype(np.float64)[grams.prefix] if k else c[grams.word != 0].sum()
        log_p.append(np.log(c / whole))
    backoff = [np.full(len(g.word), np.log(STUPID_BACKOFF)) for g in counts.orders[:-1]]
    backoff.append(np.zeros(len(counts.orders[-1].word)))
    words = counts.orders[0].count.sum()
    return Model(log_p, backoff, float(np.log(STUPID_BACKOFF / words)))


def _adjusted(counts: Counts) -> list[I64]:
    """Counts of the highest order and of n-grams that begin with <s>; of others, how many different words precede."""
    result = []
    for k, grams in enumerate(counts.orders):
        a = grams.count
        if k + 1 < len(counts.orders):
            left = np.bincount(counts.orders[k + 1].suffix, minlength=len(grams.word))
            a = np.where(grams.begins, grams.count, left)
        if k == 0:
            a = np.where(grams.word == 0, 0, a)  # <s> is never predicted
        result.append(a.astype(np.int64))
    return result


def _discounts(adjusted: I64) -> F64:
    """Discounts of counts 0, 1, 2 and 3 or more; f64 [4]. Where a text is too small to estimate them: 0.5, 1, 1.5."""
    n = np.bincount(np.minimum(adjusted, 5), minlength=6).astype(np.float64)
    fallback = np.array([0, 0.5, 1.0, 1.5])
    if (n[1:5] == 0).any():
        return fallback
    y = n[1] / (n[1] + 2 * n[2])
    found = np.array([0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]])
    return found if ((found[1:] > 0) & (found[1:] <= [1, 2, 3])).all() else fallback
