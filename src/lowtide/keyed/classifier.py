"""A linear text classifier of scikit-learn in a keyed file: predictions from texts, without its vocabulary.

Stored are the weights that matter (idf folded into them), each under its feature and class. A document's norm needs the
idf of all its features: those are kept to a few values in a second store, with short fingerprints, since a word that
was not in the vocabulary must not count, but one that does is no great harm. Predicting needs numpy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.fingerprint import CodeOptions, Store, describe
from lowtide.fingerprint.hashing import utf8
from lowtide.fingerprint.store import TEXTS
from lowtide.fingerprint.table import lloyd_table
from lowtide.keyed.analyse import Analysis
from lowtide.keyed.bundle import Bundle, open_bundle, write_bundle
from lowtide.keyed.store import text_store

F64 = NDArray[np.float64]
KIND = "classifier"
NORMS = (None, "l2")
SEPARATOR = "\x1f"
"""Between a feature and the number of its class (ASCII's unit separator: no token pattern lets it into a feature)."""
_FIELDS = {"kind", "stores", "analysis", "classes", "intercept", "norm", "sublinear_tf"}


@dataclass(frozen=True)
class ClassifierOptions:
    """How a classifier is stored.

    keep: share of the weights that is kept, those with the largest squares times document frequency; table_size:
    different weights; idf_values: different idfs; code: fingerprint lengths, its `error` being the mean squared weight
    of a stranger over that of a stored feature; idf_error: the same of the idfs, above 0.
    """

    keep: float = 0.2
    table_size: int = 24
    idf_values: int = 4
    code: CodeOptions = field(default_factory=lambda: CodeOptions(error=0.01))
    idf_error: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise LowtideError(f"keep {self.keep}: must be above 0 and at most 1")
        if not 1 <= self.idf_values <= 256:
            raise LowtideError(f"idf values {self.idf_values}: must be 1 to 256")
        if not 0 < self.idf_error < np.inf:
            raise LowtideError(f"idf error {self.idf_error}: must be above 0")


class KeyedClassifier:
    """An open classifier."""

    def __init__(self, bundle: Bundle, analysis: Analysis) -> None:
        meta = bundle.meta
        self.path, self.file_bytes = bundle.path, bundle.file_bytes
        self.analysis = analysis
        self.classes = list(meta["classes"])
        self._weights = bundle.stores[0]
        self._idf = bundle.stores[1] if len(bundle.stores) > 1 else None
        self._intercept = np.array(meta["intercept"], np.float64)
        self._norm, self._sublinear = meta["norm"], meta["sublinear_tf"]

    def decision_function(self, texts: Sequence[str]) -> F64:
        """Scores f64 [n, classes], or [n] for two classes (above 0: the second)."""
        columns = len(self._intercept)
        counted = [self.analysis.features(text) for text in texts]
        owner = np.repeat(np.arange(len(texts)), [len(c) for c in counted])
        tf = np.array([n for c in counted for n in c.values()], np.float64)
        if self._sublinear:
            tf = 1 + np.log(tf)
        names = [name for c in counted for name in c]
        unique = list(dict.fromkeys(names))
        number = {name: i for i, name in enumerate(unique)}
        which = np.array([number[name] for name in names], np.int64)
        keys = [f"{name}{SEPARATOR}{c}".encode("utf-8", "replace") for name in unique for c in range(columns)]
        weights = self._weights.values_of(keys)[:, 0].astype(np.float64).reshape(-1, columns)
        scores = np.zeros((len(texts), columns))
        for c in range(columns):
            scores[:, c] = np.bincount(owner, weights=tf * weights[which, c], minlength=len(texts))
        if self._norm == "l2":
            scores /= self._lengths(unique, which, tf, owner, len(texts))[:, None]
        scores += self._intercept
        return scores[:, 0] if columns == 1 else scores

    def predict(self, texts: Sequence[str]) -> list[Any]:
        """The class of each text.

        Raises:
            LowtideError: texts is one text, or holds something that is not text.
        """
        if isinstance(texts, (str, bytes)) or not all(isinstance(text, str) for text in texts):
            raise LowtideError("predict takes a list of texts")
        scores = self.decision_function(texts)
        best = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)
        return [self.classes[i] for i in best]

    def _lengths(self, unique: list[str], which: NDArray[np.int64], tf: F64, owner: NDArray[np.int64], n: int) -> F64:
        """Euclidean length of each document's tf * idf, 1 for an empty one; f64 [n]."""
        idf = np.ones(len(unique))
        if self._idf is not None:
            idf = self._idf.values_of([name.encode("utf-8", "replace") for name in unique])[:, 0].astype(np.float64)
        squares = np.bincount(owner, weights=(tf * idf[which]) ** 2, minlength=n)
        return np.sqrt(np.where(squares > 0, squares, 1))

    def info(self) -> Mapping[str, Any]:
        """Figures of the file."""
        parts = {"weights": describe(self._weights)}
        if self._idf is not None:
            parts["idf"] = describe(self._idf)
        return {"kind": KIND, "file_bytes": self.file_bytes, "classes": len(self.classes), "stores": parts}


def compress_classifier(
    vectorizer: Any,
    model: Any,
    path: str | Path,
    options: ClassifierOptions | None = None,
    force: bool = False,
) -> Mapping[str, Any]:
    """Write a fitted vectorizer and linear model.

    Args:
        vectorizer: a CountVectorizer or TfidfVectorizer with one of the settings of `Analysis`, norm "l2" or None.
        model: anything linear with coef_, intercept_ and classes_ (LogisticRegression, LinearSVC, SGDClassifier, ...).
        path: the file to make.
        force: replace a file that exists.

    Returns:
        KeyedClassifier.info().

    Raises:
        LowtideError: not fitted, not linear, settings that cannot be stored, weights that are not finite.
    """
    options = options or ClassifierOptions()
    features, coef, intercept = _linear(vectorizer, model)
    analysis = Analysis.of_vectorizer(vectorizer)
    idf = getattr(vectorizer, "idf_", None) if getattr(vectorizer, "use_idf", False) else None
    norm = getattr(vectorizer, "norm", None)
    if norm not in NORMS:
        raise LowtideError(f"the vectorizer's norm {norm!r:.20} cannot be stored; fit it with norm='l2' or None")
    frequency = np.ones(len(features))
    if idf is not None:
        idf = np.asarray(idf, np.float64)
        coef = coef * idf  # a document's term then only needs its tf
        frequency = np.exp(1 - idf)  # idf = 1 + ln((1 + documents) / (1 + those with the feature))
    stores = {"weights": _weight_store(features, coef, frequency, options)}
    if idf is not None and norm == "l2":
        stores["idf"] = _idf_store(features, idf, options)
    classes = [c.item() if isinstance(c, np.generic) else c for c in model.classes_]
    if not all(type(c) in (int, str, bool) for c in classes):
        raise LowtideError("the model's classes must be numbers without fraction or texts")
    meta = {
        "analysis": analysis.to_meta(),
        "classes": classes,
        "intercept": [float(np.float32(b)) for b in intercept],
        "norm": norm,
        "sublinear_tf": bool(getattr(vectorizer, "sublinear_tf", False)),
    }
    write_bundle(path, KIND, meta, stores, force)
    return open_classifier(path).info()


def _linear(vectorizer: Any, model: Any) -> tuple[list[str], F64, F64]:
    """Features [f] by column, coefficients f64 [c, f] and intercepts f64 [c]."""
    missing = [n for n in ("coef_", "intercept_", "classes_") if not hasattr(model, n)]
    if missing or not hasattr(vectorizer, "vocabulary_"):
        what = "the vectorizer has no vocabulary_" if not missing else f"the model has no {missing[0]}"
        raise LowtideError(f"{what}: give a fitted CountVectorizer or TfidfVectorizer and a fitted linear model")
    coef = np.atleast_2d(np.asarray(model.coef_, np.float64))
    intercept = np.broadcast_to(np.asarray(model.intercept_, np.float64), (len(coef),))
    vocabulary = vectorizer.vocabulary_
    if coef.shape[1] != len(vocabulary):
        raise LowtideError(
            f"the model has {coef.shape[1]} features, the vectorizer {len(vocabulary)}; fit them together"
        )
    if not np.isfinite(coef).all() or not np.isfinite(intercept).all():
        raise LowtideError("the model holds a weight that is not finite")
    features = [""] * len(vocabulary)
    for feature, column in vocabulary.items():
        features[column] = feature
    return features, coef, intercept


def _weight_store(features: list[str], coef: F64, frequency: F64, options: ClassifierOptions) -> Store:
    saliency = coef**2 * frequency
    count = max(1, min(round(options.keep * coef.size), int((saliency > 0).sum())))
    kept = np.sort(np.argsort(-saliency, axis=None, kind="stable")[:count])
    of_class, column = np.unravel_index(kept, coef.shape)
    values = coef[of_class, column].astype(np.float32)
    table, symbols = lloyd_table(values, options.table_size, frequency[column])
    texts = [utf8(f"{features[f]}{SEPARATOR}{c}") for c, f in zip(of_class.tolist(), column.tolist(), strict=True)]
    return text_store(texts, symbols, table, options.code)


def _idf_store(features: list[str], idf: F64, options: ClassifierOptions) -> Store:
    table, symbols = lloyd_table(idf.astype(np.float32), options.idf_values, np.exp(1 - idf))
    return text_store(
        [utf8(f) for f in features], symbols, table, CodeOptions(error=options.idf_error, seed=options.code.seed)
    )


def open_classifier(path: str | Path) -> KeyedClassifier:
    """Open a classifier made by `compress_classifier`, memory-mapped.

    Raises:
        LowtideError: cannot be read, damaged, or not a classifier.
    """
    bundle = open_bundle(path, KIND)
    meta = bundle.meta
    damaged = LowtideError(f"{path}: is damaged or not a classifier; make it again")
    if set(meta) != _FIELDS or meta["norm"] not in NORMS or type(meta["sublinear_tf"]) is not bool:
        raise damaged
    classes, intercept = meta["classes"], meta["intercept"]
    if not isinstance(classes, list) or not isinstance(intercept, list):
        raise damaged
    if not all(type(c) in (int, str, bool) for c in classes) or not all(type(b) is float for b in intercept):
        raise damaged
    if len(classes) < 2 or len(intercept) != (1 if len(classes) == 2 else len(classes)):
        raise damaged
    if len(bundle.stores) > 2 or any(s.kind != TEXTS or s.table.shape[1] != 1 for s in bundle.stores):
        raise damaged
    try:
        analysis = Analysis.from_meta(meta["analysis"])
    except LowtideError as error:
        raise LowtideError(f"{path}: {error}; make it again") from None
    return KeyedClassifier(bundle, analysis)
