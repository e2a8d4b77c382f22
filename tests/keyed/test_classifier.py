"""Text classifiers: the same features as scikit-learn's vectorizers, and predictions close to the model's."""

from __future__ import annotations

import numpy as np
import pytest

from lowtide.errors import LowtideError
from lowtide.fingerprint import CodeOptions
from lowtide.keyed.analyse import Analysis
from lowtide.keyed.classifier import ClassifierOptions, compress_classifier, open_classifier

pytest.importorskip("sklearn")

from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.naive_bayes import MultinomialNB  # noqa: E402

TOPICS = {
    "sea": "tide wave harbour boat salt sand gull",
    "hill": "stone path peak goat snow pine gull",
    "town": "tram roof market clock gull bell",
}
NEARLY_EXACT = ClassifierOptions(keep=1, table_size=2048, idf_values=256, code=CodeOptions(bits=24))


def texts(topics, count=200, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        topic = str(rng.choice(topics))
        own, other = TOPICS[topic].split(), " ".join(TOPICS[t] for t in topics).split()
        words = [str(rng.choice(own if rng.random() < 0.6 else other)) for _ in range(int(rng.integers(4, 15)))]
        yield topic, " ".join(words).capitalize() + f" {rng.integers(100)}!"


def fit(vectorizer, topics=("sea", "hill", "town")):
    labelled = list(texts(topics))
    x = vectorizer.fit_transform([t for _, t in labelled])
    return LogisticRegression(C=10).fit(x, [s for s, _ in labelled])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ngram_range": (1, 3)},
        {"ngram_range": (2, 2), "lowercase": False},
        {"binary": True, "token_pattern": r"(?u)\b\w+\b"},
        {"analyzer": "char", "ngram_range": (2, 4)},
        {"analyzer": "char_wb", "ngram_range": (1, 5)},
    ],
)
def test_features_are_those_of_scikit_learn(settings):
    vectorizer = CountVectorizer(**settings)
    text = ["The tide, the TIDE  and\n a caf\u00e9 at 5 o'clock: \u0130\u00df x", "a", "I  I am"]
    counted = vectorizer.fit_transform(text).toarray()
    names = vectorizer.get_feature_names_out().tolist()
    analysis = Analysis.of_vectorizer(vectorizer)
    for row, one in zip(counted.tolist(), text, strict=True):
        assert analysis.features(one) == {n: c for n, c in zip(names, row, strict=True) if c}


@pytest.mark.parametrize(
    "vectorizer",
    [
        CountVectorizer(),
        TfidfVectorizer(),
        TfidfVectorizer(sublinear_tf=True, norm=None, ngram_range=(1, 2)),
        TfidfVectorizer(use_idf=False),
    ],
    ids=["counts", "tfidf", "sublinear", "tf"],
)
@pytest.mark.parametrize("topics", [("sea", "hill"), ("sea", "hill", "town")], ids=["two", "three"])
def test_with_everything_kept_scores_are_the_models(tmp_path, vectorizer, topics):
    model = fit(vectorizer, topics)
    compress_classifier(vectorizer, model, tmp_path / "c", NEARLY_EXACT)
    known = [t for _, t in texts(topics, 30)]
    expected = model.decision_function(vectorizer.transform(known))
    assert open_classifier(tmp_path / "c").decision_function(known) == pytest.approx(expected, abs=0.02)


def test_predictions_survive_the_default_options(tmp_path):
    vectorizer = TfidfVectorizer(ngram_range=(1, 2))
    model = fit(vectorizer)
    info = compress_classifier(vectorizer, model, tmp_path / "c")
    new = [t for _, t in texts(list(TOPICS), 300, seed=1)]
    same = np.array(open_classifier(tmp_path / "c").predict(new)) == model.predict(vectorizer.transform(new))
    assert same.mean() > 0.95
    strings = sum(len(f) for f in vectorizer.vocabulary_)
    assert info["file_bytes"] == (tmp_path / "c").stat().st_size < (strings + 4 * model.coef_.size) / 4


def test_classes_may_be_numbers_and_texts_may_be_empty(tmp_path):
    vectorizer = CountVectorizer()
    labelled = list(texts(["sea", "hill"]))
    x = vectorizer.fit_transform([t for _, t in labelled])
    model = LogisticRegression().fit(x, [3 if s == "sea" else 7 for s, _ in labelled])
    compress_classifier(vectorizer, model, tmp_path / "c", NEARLY_EXACT)
    opened = open_classifier(tmp_path / "c")
    assert opened.predict(["tide wave harbour", "goat pine peak"]) == [3, 7]
    assert opened.predict([]) == []
    assert opened.decision_function([""]) == pytest.approx(model.intercept_)


def test_bad_questions_are_refused(tmp_path):
    vectorizer = CountVectorizer()
    compress_classifier(vectorizer, fit(vectorizer), tmp_path / "c", NEARLY_EXACT)
    for bad in ("one text", [b"bytes"], [3]):
        with pytest.raises(LowtideError, match="list of texts"):
            open_classifier(tmp_path / "c").predict(bad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_words": "english"}, "stop_words"),
        ({"strip_accents": "unicode"}, "strip_accents"),
        ({"tokenizer": str.split, "token_pattern": None}, "tokenizer"),
        ({"analyzer": str.split}, "analyzer is a function"),
        ({"token_pattern": r"[a-z]+"}, "token_pattern"),
        ({"norm": "l1"}, "norm"),
    ],
)
def test_vectorizers_that_cannot_be_stored_are_refused(tmp_path, settings, message):
    vectorizer = TfidfVectorizer(**settings)
    model = fit(vectorizer)
    with pytest.raises(LowtideError, match=message):
        compress_classifier(vectorizer, model, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_stored_are_refused(tmp_path):
    vectorizer, other = CountVectorizer(), CountVectorizer(ngram_range=(1, 2))
    model = fit(vectorizer)
    fit(other)
    for v, m, message in [
        (CountVectorizer(), model, "no vocabulary_"),
        (vectorizer, LogisticRegression(), "no coef_"),
        (vectorizer, MultinomialNB(), "no coef_"),
        (other, model, "fit them together"),
    ]:
        with pytest.raises(LowtideError, match=message):
            compress_classifier(v, m, tmp_path / "c")
    model.coef_[0, 3] = np.nan
    with pytest.raises(LowtideError, match="not finite"):
        compress_classifier(vectorizer, model, tmp_path / "c")


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 1.1}, {"idf_values": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(LowtideError):
        ClassifierOptions(**options)


@pytest.mark.parametrize(
    "meta",
    [
        {"analyzer": "word"},
        {"analyzer": "x", "shortest": 1, "longest": 1, "lowercase": True, "pattern": r"(?u)\b\w+\b", "binary": False},
        {
            "analyzer": "word",
            "shortest": 0,
            "longest": 1,
            "lowercase": True,
            "pattern": r"(?u)\b\w+\b",
            "binary": False,
        },
        {"analyzer": "word", "shortest": 1, "longest": 1, "lowercase": True, "pattern": "(a+)+$", "binary": False},
        [],
    ],
)
def test_descriptions_of_analysis_that_cannot_be_are_refused(meta):
    with pytest.raises(LowtideError):
        Analysis.from_meta(meta)
