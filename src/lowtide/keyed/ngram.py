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
from lowtide.fingerprint import CodeOptions, describe
from lowtide.fingerprint.code import code_for
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
    false_mass: sum over all words of the p that false positives give them, expected for a word of the text, above 0;
    bits: fingerprints of this length instead; lower: lower-case the text; seed: of the hashes.
    """

    order: int = 3
    smoothing: str = "kneser-ney"
    probabilities: int = 12
    backoffs: int = 6
    false_mass: float = 0.02
    bits: int | None = None
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
        if not 0 < self.false_mass < np.inf:
            raise LowtideError(f"false mass {self.false_mass}: must be above 0")
        if self.bits is not None and not 0 <= self.bits <= 30:
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
    rounded = [_round(counts, model, k, options) for k in range(len(counts.orders))]
    codes = _codes(counts, rounded, options)
    stores = {}
    for k, (grams, code) in enumerate(zip(rounded, codes, strict=True)):
        texts = [text.encode() for text in counts.texts(k + 1)]
        stores[f"order{k + 1}"] = text_store(texts, grams.pair, grams.table, code, energy=grams.harm)
    meta = {"unknown": model.unknown, "lower": options.lower, "smoothing": options.smoothing}
    write_bundle(path, KIND, meta, stores, force)


@dataclass
class _Rounded:
    """The n-grams of one order: pair i64 [n], row of the table of each; table: f32 [K, 2], ln p and ln backoff."""

    pair: NDArray[np.int64]
    table: NDArray[np.float32]

    @property
    def harm(self) -> F64:
        """What a false positive of each row adds to a sum of probabilities: its p; f64 [K]."""
        p: F64 = np.exp(self.table[:, 0].astype(np.float64))
        return p


def _round(counts: Counts, model: Model, k: int, options: NgramOptions) -> _Rounded:
    """Values are rounded with the least error for a text like the one counted: n-grams weigh as often as they occur.

    Words are few and everything builds on them: their values are rounded eight times as finely.
    """
    fine = 1 if k else 8
    often = counts.orders[k].count.astype(np.float64)
    p_table, p = lloyd_table(model.log_p[k].astype(np.float32), fine * options.probabilities, often)
    b_table, b = lloyd_table(model.log_backoff[k].astype(np.float32), options.backoffs, often)
    used, pair = np.unique(p * len(b_table) + b, return_inverse=True)
    return _Rounded(pair, np.concatenate([p_table[used // len(b_table)], b_table[used % len(b_table)]], 1))


def _codes(counts: Counts, rounded: Sequence[_Rounded], options: NgramOptions) -> list[CodeOptions]:
    """Fingerprint lengths of each order.

    The law of lengths over all orders at once: strangers asked for at each prediction, times p, over the keys that pay.
    All words are strangers to an order-2 context; of order 3 only those that were seen after the last word are asked
    for.
    """
    if options.bits is not None:
        return [CodeOptions(bits=options.bits, seed=options.seed) for _ in rounded]
    strangers = _strangers(counts)
    shift = []
    for s, grams in zip(strangers, rounded, strict=True):
        mean = float(grams.harm[grams.pair].mean())
        shift.append(float(np.log2(max(s, 1e-3) * mean / len(grams.pair))))
    low, high = -16.0, 56.0
    for _ in range(20):
        middle, mass = (low + high) / 2, 0.0
        for s, grams, more in zip(strangers, rounded, shift, strict=True):
            code = code_for(np.bincount(grams.pair), grams.harm, _clipped(middle + more))
            mass += s * float((code.match_probability() * grams.harm).sum())
        low, high = (middle, high) if mass > options.false_mass else (low, middle)
    return [CodeOptions(constant=_clipped(high + more), seed=options.seed) for more in shift]


def _clipped(constant: float) -> float:
    return min(max(constant, -60.0), 60.0)


def _strangers(counts: Counts) -> list[float]:
    """How many n-grams of each order that do not exist are asked for when all words are tried at one position."""
    words = float(len(counts.orders[0].word))
    # as many new words as old ones: few will come, but one that gets a known word's p flatters the perplexity
    result = [words]
    for k in range(1, len(counts.orders)):
        if k == 1:
            result.append(words)
            continue
        shorter = counts.orders[k - 1]
        followers = np.bincount(shorter.prefix, minlength=len(counts.orders[k - 2].word))
        often = np.bincount(shorter.prefix, weights=shorter.count, minlength=len(followers))
        result.append(float((followers * often).sum() / often.sum()))
    return result


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
