"""An n-gram language model in a keyed file: two bytes or so for each n-gram, asked without unpacking.

Of each n-gram ln p(word | context) and, for those that are contexts, ln of the backoff weight are stored, both rounded
to a few values (Talbot and Brants 2008; Guthrie and Hepple 2010). p(w | h) is the stored p of "h w" if that is found,
and otherwise the backoff weight of h times p(w | h without its first word). An n-gram is believed only if the one
without its first word and the one without its last were found, which most strangers do not survive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.fingerprint import CodeOptions, Store, describe
from lowtide.fingerprint.store import TEXTS
from lowtide.fingerprint.table import lloyd_table
from lowtide.keyed.bundle import Bundle, open_bundle, write_bundle
from lowtide.keyed.counts import BEGIN, END, F64, MAX_ORDER, Counts, Model, count_grams, kneser_ney, stream
from lowtide.keyed.counts import stupid_backoff as _stupid
from lowtide.keyed.store import text_store

KIND = "ngram"
SMOOTHINGS: Mapping[str, Callable[[Counts], Model]] = {"kneser-ney": kneser_ney, "stupid-backoff": _stupid}


@dataclass(frozen=True)
class NgramOptions:
    """How an n-gram model is made.

    order: longest n-grams; smoothing: of SMOOTHINGS; probabilities, backoffs: different values kept of each, per order;
    bits: length of fingerprints; by_probability: longer ones for likelier n-grams (log2 p + a constant that gives
    `bits` on average) instead of the same for all; lower: lower-case the text; seed: of the hashes.
    """

    order: int = 3
    smoothing: str = "kneser-ney"
    probabilities: int = 12
    backoffs: int = 6
    bits: int = 12
    by_probability: bool = False
    lower: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.smoothing not in SMOOTHINGS:
            raise LowtideError(f"smoothing {self.smoothing!r:.40}: must be one of {', '.join(SMOOTHINGS)}")
        if not 1 <= self.order <= MAX_ORDER:
            raise LowtideError(f"order {self.order}: must be 1 to {MAX_ORDER}")
        for name, value, limit in (("probabilities", self.probabilities, 64), ("backoffs", self.backoffs, 8)):
            if not 1 <= value <= limit:
                raise LowtideError(f"{name} {value}: must be 1 to {limit}")
        if not 0 <= self.bits <= 30:
            raise LowtideError(f"fingerprint bits {self.bits}: must be 0 to 30")


@dataclass(frozen=True)
class Score:
    """Of a text: words predicted (ends of sentences among them), their sum of ln p, words that were never seen."""

    words: int
    log_p: float
    unknown: int

    @property
    def perplexity(self) -> float:
        """exp of the mean of -ln p."""
        return float(np.exp(-self.log_p / self.words))


class NgramModel:
    """An open model."""

    def __init__(self, bundle: Bundle) -> None:
        meta = bundle.meta
        self.path, self.file_bytes, self.stores = bundle.path, bundle.file_bytes, bundle.stores
        self.unknown, self.lower = float(meta["unknown"]), bool(meta["lower"])
        self.smoothing = str(meta["smoothing"])

    @property
    def order(self) -> int:
        """Words of the longest n-grams."""
        return len(self.stores)

    @property
    def ngrams(self) -> int:
        """N-grams stored, of all orders."""
        return sum(store.count for store in self.stores)

    def log_probabilities(self, sentence: str) -> F64:
        """ln p of each word of a sentence and of its end, f64 [words + 1]."""
        return self._score([sentence])[0]

    def score(self, sentences: Iterable[str]) -> Score:
        """The score of sentences (lines of a text)."""
        log_p, unknown = self._score(sentences)
        return Score(len(log_p), float(log_p.sum()), unknown)

    def _score(self, sentences: Iterable[str]) -> tuple[F64, int]:
        parts: list[str] = []
        depths: list[int] = []
        for sentence in sentences:
            words = [BEGIN, *split(sentence, self.lower), END]
            parts += words
            depths += range(len(words))
        if not parts:
            raise LowtideError("the text has no words")
        depth = np.array(depths)
        return score_stream(self._grams(parts, depth), depth, self.unknown)

    def _grams(self, words: Sequence[str], depth: NDArray[np.int64]) -> list[tuple[NDArray[np.bool_], F64, F64]]:
        """For each order, at each position: whether the n-gram ending there is found, its ln p and ln backoff."""
        result = []
        before = np.ones(len(words), np.bool_)
        texts = list(words)
        for k, store in enumerate(self.stores):
            if k:
                texts = [f"{a} {b}" for a, b in zip(["", *texts[:-1]], words, strict=True)]
            # both shorter n-grams must be there
            asked = np.flatnonzero((depth >= k) & before & np.concatenate([[k == 0], before[:-1]]) | (k == 0))
            # a text repeats itself; each n-gram is looked up once
            unique, inverse = np.unique(np.array([texts[i] for i in asked], dtype=object), return_inverse=True)
            symbols = store.symbols_of(unique.tolist())[inverse]
            found = np.zeros(len(words), np.bool_)
            log_p, backoff = np.zeros(len(words)), np.zeros(len(words))
            good = asked[symbols >= 0]
            found[good] = True
            log_p[good] = store.table[symbols[symbols >= 0], 0]
            backoff[good] = store.table[symbols[symbols >= 0], 1]
            result.append((found, log_p, backoff))
            before = found
        return result

    def info(self) -> Mapping[str, Any]:
        """Figures of the file."""
        return {
            "kind": KIND,
            "order": self.order,
            "smoothing": self.smoothing,
            "file_bytes": self.file_bytes,
            "ngrams": self.ngrams,
            "bytes_per_ngram": self.file_bytes / self.ngrams,
            "orders": [describe(store) for store in self.stores],
        }


def score_stream(
    grams: Sequence[tuple[NDArray[np.bool_], F64, F64]], depth: NDArray[np.int64], unknown: float
) -> tuple[F64, int]:
    """ln p at the positions of a stream that are predicted (all but <s>), and how many words are unknown.

    grams: for each order (found bool [n], ln p f64 [n], ln backoff f64 [n]) of the n-gram that ends at each position.
    """
    found, log_p, _ = grams[0]
    total = np.where(found, log_p, unknown)
    for k in range(1, len(grams)):
        _, _, backoff = grams[k - 1]
        context = np.concatenate([[0.0], backoff[:-1]])  # 0 where the context was not found
        found, log_p, _ = grams[k]
        inside = depth >= k
        total = np.where(inside, np.where(found, log_p, context + total), total)
    predicted = depth > 0
    return total[predicted], int((~grams[0][0][predicted]).sum())


def split(sentence: str, lower: bool = False) -> list[str]:
    """The words of a sentence: what white space separates."""
    return (sentence.lower() if lower else sentence).split()


def count_text(sentences: Iterable[str], order: int, lower: bool = False) -> Counts:
    """N-grams of sentences (lines of a text); lines without words are left out."""
    ids: dict[str, int] = {BEGIN: 0, END: 1}
    numbered = []
    for sentence in sentences:
        words = split(sentence, lower)
        if words:
            numbered.append([ids.setdefault(word, len(ids)) for word in words])
    if BEGIN in ids and any(0 in s or 1 in s for s in numbered):
        raise LowtideError(f"the text holds the word {BEGIN} or {END}, which mark a sentence's ends; take them out")
    return count_grams(list(ids), *stream(numbered), order)


def build_ngram(
    sentences: Iterable[str], path: str | Path, options: NgramOptions | None = None, force: bool = False
) -> Mapping[str, Any]:
    """Count the n-grams of a text, smooth, and write the model; returns NgramModel.info().

    Raises:
        LowtideError: no words, impossible options, the file exists (without force) or cannot be written.
    """
    options = options or NgramOptions()
    counts = count_text(sentences, options.order, options.lower)
    write_ngram(counts, SMOOTHINGS[options.smoothing](counts), path, options, force)
    return open_ngram(path).info()


def write_ngram(counts: Counts, model: Model, path: str | Path, options: NgramOptions, force: bool = False) -> None:
    """Write a model that was counted and smoothed before. Raises as `build_ngram`."""
    stores = {}
    for k in range(len(counts.orders)):
        stores[f"order{k + 1}"] = _order_store(counts, model, k, options)
    meta = {"unknown": model.unknown, "lower": options.lower, "smoothing": options.smoothing}
    write_bundle(path, KIND, meta, stores, force)


def _order_store(counts: Counts, model: Model, k: int, options: NgramOptions) -> Store:
    """The n-grams of one order: pairs of a quantised ln p and a quantised ln backoff.

    Values are rounded with the least error for a text like the one counted: n-grams weigh as often as they occur.
    Words are few and everything builds on them: their values are rounded eight times as finely.
    """
    fine = 1 if k else 8
    often = counts.orders[k].count.astype(np.float64)
    p_table, p = lloyd_table(model.log_p[k].astype(np.float32), fine * options.probabilities, often)
    b_table, b = lloyd_table(model.log_backoff[k].astype(np.float32), options.backoffs, often)
    pair = p * len(b_table) + b
    every = np.arange(len(p_table) * len(b_table))
    table = np.concatenate([p_table[every // len(b_table)], b_table[every % len(b_table)]], 1)
    code = CodeOptions(bits=options.bits, seed=options.seed)
    energy = None
    if options.by_probability:
        energy = np.exp(table[:, 0].astype(np.float64))
        code = CodeOptions(constant=_constant(np.bincount(pair, minlength=len(table)), energy, options.bits))
    return text_store([t.encode() for t in counts.texts(k + 1)], pair, table, code, energy=energy)


def _constant(counts: NDArray[np.int64], energy: F64, bits: float) -> float:
    """The constant whose fingerprints have `bits` bits on average."""
    from lowtide.fingerprint.code import code_for

    used = counts > 0
    low, high = -32.0, 32.0
    for _ in range(24):
        middle = (low + high) / 2
        mean = float(np.average(code_for(counts[used], energy[used], middle).fingerprint_bits, weights=counts[used]))
        low, high = (middle, high) if mean < bits else (low, middle)
    return high


def open_ngram(path: str | Path) -> NgramModel:
    """Open a model made by `build_ngram`, memory-mapped.

    Raises:
        LowtideError: cannot be read, damaged, or not an n-gram model.
    """
    bundle = open_bundle(path, KIND)
    meta = bundle.meta
    unknown = meta.get("unknown")
    good = set(meta) == {"kind", "stores", "unknown", "lower", "smoothing"}
    good = good and type(unknown) is float and type(meta["lower"]) is bool and meta["smoothing"] in SMOOTHINGS
    good = good and all(s.kind == TEXTS and s.table.shape[1] == 2 for s in bundle.stores)
    if not good or len(bundle.stores) > MAX_ORDER:
        raise LowtideError(f"{path}: is damaged or not an n-gram model; make it again")
    return NgramModel(bundle)
