"""n-gram models: counts and smoothing by hand and by definition, and the stored model close to the exact one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lowtide import keyed
from lowtide.errors import LowtideError
from lowtide.keyed.counts import kneser_ney, stupid_backoff
from lowtide.keyed.ngram import NgramOptions, build_ngram, count_text, open_ngram

WORDS = "the tide is low at the harbour and boats lie on sand until water comes back".split()


def sentences(count=300, seed=0):
    """A text in which the next word depends on the last two."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        line = [int(rng.integers(len(WORDS)))]
        for _ in range(int(rng.integers(3, 9))):
            line.append((line[-1] * 3 + int(rng.integers(4)) + len(line) % 2) % len(WORDS))
        yield " ".join(WORDS[i] for i in line)


def probability(counts, model, words):
    """p of the last word by the definition, looking n-grams up by their words."""
    if not hasattr(counts, "place"):
        counts.place = [{t: i for i, t in enumerate(counts.texts(k + 1))} for k in range(len(counts.orders))]
    place = counts.place
    total = 0.0
    for start in range(len(words)):
        gram, context = words[start:], words[start:-1]
        at = place[len(gram) - 1].get(" ".join(gram))
        if at is not None:
            return math.exp(total + model.log_p[len(gram) - 1][at])
        if context and " ".join(context) in place[len(context) - 1]:
            total += model.log_backoff[len(context) - 1][place[len(context) - 1][" ".join(context)]]
    return math.exp(total + model.unknown)


def test_counts_are_those_of_the_text():
    counts = count_text(["a b a", "", "a b"], 3)
    found = [dict(zip(counts.texts(k + 1), g.count.tolist(), strict=True)) for k, g in enumerate(counts.orders)]
    assert found[0] == {"<s>": 2, "</s>": 2, "a": 3, "b": 2}
    assert found[1] == {"<s> a": 2, "a b": 2, "b a": 1, "a </s>": 1, "b </s>": 1}
    assert found[2] == {"<s> a b": 2, "a b a": 1, "b a </s>": 1, "a b </s>": 1}


def test_kneser_ney_by_hand():
    """Too small to estimate discounts: 0.5, 1, 1.5. Bigrams: p(b|a) = (2-1)/3 + (1+0.5)/3 * p(b).

    Unigrams count different words before: of </s> 2, a 2, b 1 = 5 in all, discounts 1, 1, 0.5 leave 2.5/5 for the
    uniform 1/4 over </s>, a, b and the unknown word.
    """
    counts = count_text(["a b a", "a b"], 2)
    model = kneser_ney(counts)
    p_b = 0.5 / 5 + 0.5 / 4
    assert probability(counts, model, ["b"]) == pytest.approx(p_b)
    assert probability(counts, model, ["a", "b"]) == pytest.approx(1 / 3 + 1.5 / 3 * p_b)
    assert probability(counts, model, ["z"]) == pytest.approx(0.5 / 4)
    assert probability(counts, model, ["z", "b"]) == pytest.approx(p_b)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_kneser_ney_probabilities_add_up_to_one(order):
    counts = count_text(sentences(), order)
    model = kneser_ney(counts)
    vocabulary = [*counts.words[1:], "unheard"]
    for context in ([], ["tide"], ["<s>", "the"], ["the", "tide"], ["unheard", "low"], ["sand", "sand", "sand"]):
        total = sum(probability(counts, model, [*context, w][-order:]) for w in vocabulary)
        assert total == pytest.approx(1, abs=1e-9)


def test_stupid_backoff_is_relative_frequency():
    counts = count_text(["a b a", "a b"], 2)
    model = stupid_backoff(counts)
    assert probability(counts, model, ["a", "b"]) == pytest.approx(2 / 3)
    assert probability(counts, model, ["b", "b"]) == pytest.approx(0.4 * 2 / 7)


@pytest.mark.parametrize("smoothing", ["kneser-ney", "stupid-backoff"])
def test_a_fine_table_and_long_fingerprints_give_the_exact_model(tmp_path, smoothing):
    text = list(sentences(60))
    options = NgramOptions(smoothing=smoothing, probabilities=64, backoffs=8, bits=28)
    build_ngram(text, tmp_path / "m", options)
    counts = count_text(text, 3)
    model = {"kneser-ney": kneser_ney, "stupid-backoff": stupid_backoff}[smoothing](counts)
    for sentence in [text[0], "the tide is new here", "unheard words", "low"]:
        words = ["<s>", *sentence.split(), "</s>"]
        exact = [probability(counts, model, words[max(0, i - 2) : i + 1]) for i in range(1, len(words))]
        assert np.exp(open_ngram(tmp_path / "m").log_probabilities(sentence)) == pytest.approx(exact, rel=0.12)


def test_default_options_keep_the_perplexity_at_two_bytes(tmp_path):
    text, held_out = list(sentences(3000)), list(sentences(500, seed=9))
    build_ngram(text, tmp_path / "small")
    build_ngram(text, tmp_path / "exact", NgramOptions(probabilities=64, backoffs=8, bits=28))
    small, exact = open_ngram(tmp_path / "small"), open_ngram(tmp_path / "exact")
    assert small.score(held_out).perplexity == pytest.approx(exact.score(held_out).perplexity, rel=0.01)
    assert small.file_bytes < 0.6 * exact.file_bytes
    assert small.info()["ngrams"] == small.ngrams == sum(len(g.word) for g in count_text(text, 3).orders)


def test_false_positives_add_as_much_as_allowed(tmp_path):
    """p(w | h) over thousands of words that never follow h: mostly backed off, and now and then a false n-gram's."""
    text = list(sentences(300)) + [f"word{i} word{i + 1} word{i % 50}" for i in range(3000)]
    counts = count_text(text, 2)
    model = kneser_ney(counts)
    for mass in (0.02, 0.5):
        build_ngram(text, tmp_path / "m", NgramOptions(order=2, false_mass=mass), force=True)
        store = open_ngram(tmp_path / "m")
        extra = []
        for context in ("tide", "harbour", "boats", "sand"):
            lines = [f"{context} {w}" for w in counts.words[2::5]]
            ours = np.exp(store._score(lines)[0].reshape(-1, 3)[:, 1]).sum()
            exact = sum(probability(counts, model, s.split()) for s in lines)
            extra.append(5 * (ours - exact))
        assert (-0.1 < np.mean(extra) < 0.2) if mass == 0.02 else (0.1 < np.mean(extra) < 2)


def test_scores_count_unknown_words_and_ends(tmp_path):
    build_ngram(["a b", "b a"], tmp_path / "m", NgramOptions(order=2, bits=20))
    score = open_ngram(tmp_path / "m").score(["a b z", "z"])
    assert (score.words, score.unknown) == (6, 2)
    assert score.perplexity == pytest.approx(math.exp(-score.log_p / 6))


def test_lower_case_is_remembered(tmp_path):
    build_ngram(["The Tide"], tmp_path / "m", NgramOptions(order=1, lower=True, bits=20))
    assert open_ngram(tmp_path / "m").score(["THE TIDE"]).unknown == 0


@pytest.mark.parametrize(
    ("text", "message"), [([], "no words"), (["", "  "], "no words"), (["a <s> b"], "mark a sentence's ends")]
)
def test_bad_texts_are_refused(tmp_path, text, message):
    with pytest.raises(LowtideError, match=message):
        build_ngram(text, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [{"order": 0}, {"order": 7}, {"smoothing": "none"}, {"bits": 31}, {"probabilities": 0}, {"false_mass": 0}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(LowtideError):
        NgramOptions(**options)


def test_a_map_is_not_a_language_model(tmp_path):
    keyed.build(["a"], [1], tmp_path / "x")
    with pytest.raises(LowtideError, match="holds a map, not a ngram"):
        open_ngram(tmp_path / "x")
    build_ngram(["a b"], tmp_path / "m")
    with pytest.raises(LowtideError, match="holds a ngram, not a map"):
        keyed.open(tmp_path / "m")
    with pytest.raises(LowtideError, match="no words"):
        open_ngram(tmp_path / "m").score([])
