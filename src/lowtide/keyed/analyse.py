"""Texts to counted features, as scikit-learn's CountVectorizer and TfidfVectorizer do it, without scikit-learn.

Only settings that are listed here are taken: a regular expression or a function from a file is never run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lowtide.errors import LowtideError

PATTERNS = {r"(?u)\b\w\w+\b": re.compile(r"(?u)\b\w\w+\b"), r"(?u)\b\w+\b": re.compile(r"(?u)\b\w+\b")}
"""Token patterns that are taken: scikit-learn's default, and the one that keeps words of one letter."""
ANALYZERS = ("word", "char", "char_wb")
MAX_NGRAM = 12
_SPACES = re.compile(r"\s\s+")


@dataclass(frozen=True)
class Analysis:
    """How a text is cut: analyzer of ANALYZERS, shortest and longest n-grams, lower-casing, token pattern of PATTERNS
    (word only), binary: count every feature once."""

    analyzer: str
    shortest: int
    longest: int
    lowercase: bool
    pattern: str
    binary: bool

    def __post_init__(self) -> None:
        if self.analyzer not in ANALYZERS:
            raise LowtideError(f"analyzer {self.analyzer!r:.40}: must be one of {', '.join(ANALYZERS)}")
        sizes = type(self.shortest) is int and type(self.longest) is int
        if not sizes or not 1 <= self.shortest <= self.longest <= MAX_NGRAM:
            raise LowtideError(f"n-grams of {self.shortest} to {self.longest}: must be 1 to {MAX_NGRAM}")
        if type(self.lowercase) is not bool or type(self.binary) is not bool:
            raise LowtideError("lowercase and binary must be true or false")
        if self.pattern not in PATTERNS:
            raise LowtideError(f"token_pattern {self.pattern!r:.60}: only {' and '.join(PATTERNS)} can be stored")

    @classmethod
    def of_vectorizer(cls, vectorizer: Any) -> Analysis:
        """That of a CountVectorizer or TfidfVectorizer.

        Raises:
            LowtideError: a setting that cannot be stored.
        """
        for name in ("tokenizer", "preprocessor", "strip_accents", "stop_words"):
            if getattr(vectorizer, name, None) is not None:
                raise LowtideError(f"the vectorizer's {name} cannot be stored; fit it with {name}=None")
        if callable(vectorizer.analyzer):
            raise LowtideError("the vectorizer's analyzer is a function, which cannot be stored")
        shortest, longest = (int(n) for n in vectorizer.ngram_range)
        pattern = vectorizer.token_pattern
        return cls(vectorizer.analyzer, shortest, longest, bool(vectorizer.lowercase), pattern, bool(vectorizer.binary))

    @classmethod
    def from_meta(cls, meta: Any) -> Analysis:
        """From the JSON of a file."""
        if not isinstance(meta, dict) or set(meta) != set(cls.__dataclass_fields__):
            raise LowtideError("its description of how texts are cut is damaged")
        return cls(**meta)

    def to_meta(self) -> Mapping[str, Any]:
        """For the JSON of a file."""
        return asdict(self)

    def features(self, text: str) -> Counter[str]:
        """Features of a text and how often they occur."""
        counted = Counter(self._cut(text.lower() if self.lowercase else text))
        return Counter(dict.fromkeys(counted, 1)) if self.binary else counted

    def _cut(self, text: str) -> Iterator[str]:
        if self.analyzer == "word":
            words = PATTERNS[self.pattern].findall(text)
            for n in range(self.shortest, self.longest + 1):
                yield from (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
            return
        text = _SPACES.sub(" ", text)
        if self.analyzer == "char":
            for n in range(self.shortest, self.longest + 1):
                yield from (text[i : i + n] for i in range(len(text) - n + 1))
            return
        for word in text.split():
            padded = f" {word} "
            for n in range(self.shortest, self.longest + 1):
                yield padded[:n]
                yield from (padded[i : i + n] for i in range(1, len(padded) - n + 1))
                if len(padded) <= n:  # a short word counts once
                    break
