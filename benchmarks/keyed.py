#!/usr/bin/env python3
"""Keyed models: bytes and perplexity of n-gram models, bytes and accuracy of a text classifier, against exact ones.

    python benchmarks/keyed.py --text wikitext-2/valid.txt wikitext-2/test.txt --enwik8 enwik8 \\
        --packages Packages --descriptions Translation-en

n-gram models: interpolated modified Kneser-Ney of orders 1 to 3, all n-grams of the training text, none cut off. Bytes
are those of the whole file over the n-grams of all orders. The exact model has the same probabilities in float64 and
looks n-grams up by their words. "mass" is the sum of probabilities that false positives were allowed to add, as
expected when the file was made; "sum" is measured, the mean of sum over all words w of p(w | h) for 40 contexts h of
the held-out text (1 for a proper model; false positives add to it and flatter the perplexity); "normalised" is the
ratio of perplexities times the ratio of these sums, at least what a model made proper would have. enwik8 is cleaned (no
markup, lower case, words and punctuation apart); trained on the first --megabytes, measured on the last of 100 MB.

Text classifier: LinearSVC on tf-idf of words and pairs of words (at least 2 documents), one of Debian 12's package
descriptions for each source package, the label being the archive section it is filed in, of 250 packages or more. Four
fifths train, one fifth tests, split at random by each seed. "two classes" tells sections for one programming language's
libraries from all others. The float32 model is counted without idf and without separators: 4 bytes for each weight and
intercept and the bytes of the features; ours is the whole file. scikit-learn is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

from lowtide.keyed.classifier import ClassifierOptions, compress_classifier, open_classifier
from lowtide.keyed.counts import BEGIN, END, Counts, Model
from lowtide.keyed.ngram import (
    SMOOTHINGS,
    NgramModel,
    NgramOptions,
    count_text,
    open_ngram,
    score_stream,
    split,
    write_ngram,
)

NGRAM_COLUMNS = (
    "text",
    "smoothing",
    "n-grams",
    "bits",
    "bytes / n-gram",
    "perplexity",
    "exact",
    "ratio",
    "sum",
    "normalised",
)
CLASS_COLUMNS = ("task", "seed", "classes", "features", "float32 bytes", "file bytes", "smaller", "accuracy", "float32")
LANGUAGES = {
    "perl",
    "python",
    "golang",
    "javascript",
    "rust",
    "ruby",
    "java",
    "gnu-r",
    "haskell",
    "lisp",
    "php",
    "ocaml",
}
SMALLEST_SECTION = 250
KEEP = {"sections": 0.2, "two classes": 0.3}
"""Share of the weights that is kept: two classes have fewer to spare."""
HELD_OUT_BYTES = 1_000_000
CONTEXTS = 40
MARKUP = (
    (re.compile(r"<text[^>]*>|</?[a-z][^<>]*>|&[a-z]+;"), " "),
    (re.compile(r"\{\{[^{}]*\}\}|\{\|.*?\|\}", re.S), " "),
    (re.compile(r"\[\[[^\[\]|]*\||\[https?:\S*|https?:\S*|[\[\]]|'{2,}|={2,}"), " "),
)
WORD = re.compile(r"[^\W\d_]+|\d+|[.,;:!?()\"'-]")


def clean(text: str) -> Iterator[str]:
    """Sentences of Wikipedia's XML: prose lines only, words and punctuation apart."""
    for pattern, other in MARKUP:
        text = pattern.sub(other, text)
    for line in text.split("\n"):
        if len(line) > 80 and line[0] not in "|*#:;!{} ":
            for sentence in re.split(r"(?<=[.!?]) ", line):
                words = WORD.findall(sentence.lower())
                if len(words) > 2:
                    yield " ".join(words)


class Exact:
    """The model without loss: n-grams looked up by their words, float64."""

    def __init__(self, counts: Counts, model: Model) -> None:
        self.unknown, self.model = model.unknown, model
        self.place = [{text: i for i, text in enumerate(counts.texts(k + 1))} for k in range(len(counts.orders))]

    def _grams(self, words: Sequence[str], depth: np.ndarray) -> list[Any]:
        result, texts = [], list(words)
        for k, place in enumerate(self.place):
            if k:
                texts = [f"{a} {b}" for a, b in zip(["", *texts[:-1]], words, strict=True)]
            at = np.array([place.get(t, -1) if d >= k else -1 for t, d in zip(texts, depth.tolist(), strict=True)])
            values = (np.where(at >= 0, v[k][at], 0.0) for v in (self.model.log_p, self.model.log_backoff))
            result.append((at >= 0, *values))
        return result


def stream_of(sentences: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Words with their sentences' ends, and how many words of the sentence lie before each."""
    parts = [[BEGIN, *split(s), END] for s in sentences]
    return [w for p in parts for w in p], np.concatenate([np.arange(len(p)) for p in parts])


def perplexity(model: Exact | NgramModel, sentences: Sequence[str]) -> float:
    """On a text."""
    words, depth = stream_of(sentences)
    log_p, _ = score_stream(model._grams(words, depth), depth, model.unknown)
    return float(np.exp(-log_p.mean()))


def sums(model: Exact | NgramModel, contexts: Sequence[Sequence[str]], vocabulary: list[str]) -> np.ndarray:
    """Sum over all words w of p(w | h) for contexts h; f64 [n]."""
    found = []
    for context in contexts:
        words = [w for v in vocabulary for w in (*context, v)]
        depth = np.tile(np.arange(len(context) + 1), len(vocabulary))
        log_p, _ = score_stream(model._grams(words, depth), depth, model.unknown)
        found.append(np.exp(log_p[depth[depth > 0] == len(context)]).sum())
    return np.array(found)


def ngram_rows(label: str, train: list[str], held_out: list[str], settings: list[dict[str, Any]]) -> Iterator[Any]:
    """A row for each setting."""
    counts = count_text(train, 3)
    common.note(f"{label}: {[len(g.word) for g in counts.orders]} n-grams, {len(held_out)} sentences held out")
    vocabulary = [*counts.words[1:], "\x00unknown\x00"]
    words = [w for s in held_out for w in split(s)]
    contexts = [words[i : i + 2] for i in np.linspace(0, len(words) - 3, CONTEXTS).astype(int)]
    for smoothing in dict.fromkeys(s["smoothing"] for s in settings):
        model = SMOOTHINGS[smoothing](counts)
        exact = Exact(counts, model)
        dense = perplexity(exact, held_out)
        proper = sums(exact, contexts, vocabulary)
        for setting in (s for s in settings if s["smoothing"] == smoothing):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.ltk"
                started = time.process_time()
                options = NgramOptions(order=3, **setting)
                write_ngram(counts, model, path, options)
                seconds = time.process_time() - started
                store = open_ngram(path)
                ours = perplexity(store, held_out)
                whole = sums(store, contexts, vocabulary)
            proper_sum, whole_sum = float(proper.mean()), float(whole.mean())
            yield {
                "text": label,
                "order": 3,
                "smoothing": smoothing,
                "setting": f"{options.bits} bits" if options.bits is not None else f"mass {options.false_mass:g}",
                "words": int(counts.orders[0].count.sum()),
                "held_out_words": len(words),
                "ngrams": store.ngrams,
                "ngrams_of_orders": [s.count for s in store.stores],
                "file_bytes": store.file_bytes,
                "bytes_per_ngram": store.file_bytes / store.ngrams,
                "perplexity": ours,
                "exact_perplexity": dense,
                "ratio": ours / dense,
                "mean_sum": whole_sum,
                "exact_mean_sum": proper_sum,
                "normalised_ratio": ours / dense * whole_sum / proper_sum,
                "build_cpu_s": seconds,
            }
            common.note(f"{label}, {setting}: {store.file_bytes / store.ngrams:.3f} bytes, ratio {ours / dense:.4f}")


def paragraphs(path: Path) -> Iterator[dict[str, str]]:
    """Paragraphs of a Debian control file: field -> text."""
    for text in path.read_text(encoding="utf-8").split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in text.splitlines():
            if line.startswith((" ", "\t")):
                fields[name] += "\n" + line[1:]
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            yield fields


def descriptions(packages: Path, translations: Path) -> list[tuple[str, str]]:
    """(section, description) of the first binary package of each source package, large sections only."""
    text = {(p["Package"], p["Description-md5"]): p.get("Description-en", "") for p in paragraphs(translations)}
    found, seen = [], set()
    for p in paragraphs(packages):
        source = p.get("Source", p["Package"]).split()[0]
        described = text.get((p["Package"], p.get("Description-md5", "")))
        if described and "Section" in p and source not in seen:
            seen.add(source)
            found.append((p["Section"], described))
    size = Counter(section for section, _ in found)
    return [(s, t) for s, t in found if size[s] >= SMALLEST_SECTION]


def classifier_row(task: str, seed: int, labelled: list[tuple[str, str]]) -> dict[str, Any]:
    """Train, compress and compare."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    order = np.random.default_rng(seed).permutation(len(labelled))
    cut = len(order) * 4 // 5
    train, test = ([labelled[i] for i in part] for part in (order[:cut], order[cut:]))
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    model = LinearSVC(C=0.5, random_state=seed)
    model.fit(vectorizer.fit_transform([t for _, t in train]), [s for s, _ in train])
    truth, texts = np.array([s for s, _ in test]), [t for _, t in test]
    dense = float((model.predict(vectorizer.transform(texts)) == truth).mean())
    strings = sum(len(feature.encode()) for feature in vectorizer.vocabulary_)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "classifier.ltk"
        options = ClassifierOptions(keep=KEEP[task])
        info = compress_classifier(vectorizer, model, path, options)
        ours = float((np.array(open_classifier(path).predict(texts)) == truth).mean())
    float_bytes = strings + 4 * model.coef_.size + 4 * model.intercept_.size
    return {
        "task": task,
        "seed": seed,
        "train": len(train),
        "test": len(test),
        "classes": len(model.classes_),
        "features": len(vectorizer.vocabulary_),
        "string_bytes": strings,
        "float32_bytes": float_bytes,
        "file_bytes": info["file_bytes"],
        "times_smaller": float_bytes / info["file_bytes"],
        "accuracy": ours,
        "float32_accuracy": dense,
        "keep": options.keep,
        "table_size": options.table_size,
    }


def table(ngrams: list[dict[str, Any]], classes: list[dict[str, Any]]) -> str:
    """For people."""
    parts = []
    if ngrams and "date" in ngrams[0]:
        parts.append(f"n-gram models measured {ngrams[0]['date']}: `{ngrams[0]['command']}`")
    if ngrams:
        rows = [
            (
                *(r["text"], r["smoothing"], r["ngrams"], r["setting"], f"{r['bytes_per_ngram']:.3f}"),
                *(f"{r['perplexity']:.2f}", f"{r['exact_perplexity']:.2f}", f"{r['ratio']:.4f}"),
                *(f"{r['mean_sum']:.4f}", f"{r['normalised_ratio']:.4f}"),
            )
            for r in ngrams
        ]
        parts.append(common.markdown(NGRAM_COLUMNS, rows))
    if classes:
        rows = [
            (
                *(r["task"], r["seed"], r["classes"], r["features"], r["float32_bytes"], r["file_bytes"]),
                *(f"{r['times_smaller']:.1f}", f"{r['accuracy']:.4f}", f"{r['float32_accuracy']:.4f}"),
            )
            for r in classes
        ]
        parts.append(common.markdown(CLASS_COLUMNS, rows))
        for task in dict.fromkeys(r["task"] for r in classes):
            loss = np.array([100 * (r["float32_accuracy"] - r["accuracy"]) for r in classes if r["task"] == task])
            parts.append(
                f"{task}: {loss.mean():.2f} points of accuracy lost, {loss.std():.2f} standard deviation of seeds."
            )
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", nargs=2, type=Path, metavar=("TRAIN", "TEST"), help="texts, a sentence on each line")
    parser.add_argument("--enwik8", type=Path, help="the first 100 MB of English Wikipedia's XML")
    parser.add_argument("--megabytes", type=float, default=10, help="of enwik8 to train on")
    parser.add_argument("--packages", type=Path, help="Debian's Packages index")
    parser.add_argument("--descriptions", type=Path, help="Debian's Translation-en")
    parser.add_argument("--seeds", type=int, default=3, help="how many splits the classifiers are measured on")
    parser.add_argument("--first-seed", type=int, default=100, help="of the splits; settings were chosen on 0 to 2")
    parser.add_argument("--ngrams-from", type=Path, help="take the n-gram rows of an earlier result, with its date")
    parser.add_argument("--quick", action="store_true", help="2000 sentences, one seed, two classes only")
    parser.add_argument("--json", action="store_true", help="print the figures")
    args = parser.parse_args()
    ngrams: list[dict[str, Any]] = []
    kn: dict[str, Any] = {"smoothing": "kneser-ney"}
    if args.ngrams_from:
        earlier = json.loads(args.ngrams_from.read_text(encoding="utf-8"))
        ngrams = [{"date": earlier["date"], "command": earlier["command"]} | r for r in earlier["ngrams"]]
    plain = [kn] if args.quick else [kn, kn | {"false_mass": 0.1}, kn | {"false_mass": 0.008}, kn | {"bits": 12}]
    if args.text:
        train, test = ([s for s in p.read_text(encoding="utf-8").split("\n") if s.strip()] for p in args.text)
        few = slice(0, 2000 if args.quick else None)
        settings = [*plain, {"smoothing": "stupid-backoff"}]
        ngrams += ngram_rows(args.text[0].name, train[few], test[few], settings)
    if args.enwik8 and not args.quick:
        raw = args.enwik8.read_bytes()
        train, test = (
            list(clean(p.decode("utf-8", "ignore"))) for p in (raw[: int(args.megabytes * 1e6)], raw[-HELD_OUT_BYTES:])
        )
        ngrams += ngram_rows(f"enwik8, {args.megabytes:g} MB", train, test, plain[:1])
    classes = []
    if args.packages and args.descriptions:
        labelled = descriptions(args.packages, args.descriptions)
        two = [("language" if s in LANGUAGES else "other", t) for s, t in labelled]
        for seed in range(args.first_seed, args.first_seed + (1 if args.quick else args.seeds)):
            tasks = [("two classes", two)] if args.quick else [("sections", labelled), ("two classes", two)]
            for task, texts in tasks:
                classes.append(classifier_row(task, seed, texts))
                common.note(f"{task}, seed {seed}: {classes[-1]['times_smaller']:.1f} times smaller")
    model = "n-gram models and linear text classifiers"
    result = common.report({"model": model, "ngrams": ngrams, "classifiers": classes})
    text = table(ngrams, classes)
    common.save("keyed-quick" if args.quick else "keyed", result, text)
    print(json.dumps(result, indent=2) if args.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
