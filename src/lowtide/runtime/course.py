"""One text on its way from prompt to end, and several of them in rounds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lowtide.errors import LowtideError
from lowtide.kernels.sequences import Step
from lowtide.runtime.budget import BudgetController
from lowtide.runtime.sampling import Sampler

if TYPE_CHECKING:
    from lowtide.kernels.types import DecodeStats
    from lowtide.runtime.tokenizer import Tokenizer

MAX_PARALLEL = 256

_Running: TypeAlias = "tuple[int, Course, Any]"  # its place among the texts, and its sequence in the engine


@dataclass
class GenerationStats:
    """What the last generation did. Times hold engine and sampling, not the consumer of the stream.

    Attributes:
        prompt_tokens: tokens of the whole prompt.
        reused_tokens: of these, tokens still in the cache from the turn before (chat).
        tokens: tokens generated.
        prefill_s, decode_s: seconds; where several texts share a round, each has an equal part of it.
        bits_read_body: mean bits read per weight and decoded token; 0 if none was decoded.
        bytes_read: mean bytes read per decoded token, output head and KV cache included.
        finish: "stop" (end-of-sequence token) or "length" (max_tokens or the context is full).
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    bits_read_body: float = 0.0
    bytes_read: float = 0.0
    finish: str = "length"

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the first one, which prefill gives."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s > 0 else 0.0

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens per second."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_s if self.prefill_s > 0 else 0.0


def total(stats: Sequence[GenerationStats]) -> GenerationStats:
    """Figures of several texts together: sums, and means over the tokens decoded."""
    decoded = [max(s.tokens - (s.finish == "length"), 0) for s in stats]
    whole = max(sum(decoded), 1)
    return GenerationStats(
        prompt_tokens=sum(s.prompt_tokens for s in stats),
        reused_tokens=sum(s.reused_tokens for s in stats),
        tokens=sum(s.tokens for s in stats),
        prefill_s=sum(s.prefill_s for s in stats),
        decode_s=sum(s.decode_s for s in stats),
        bits_read_body=sum(n * s.bits_read_body for n, s in zip(decoded, stats, strict=True)) / whole,
        bytes_read=sum(n * s.bytes_read for n, s in zip(decoded, stats, strict=True)) / whole,
        finish="stop" if all(s.finish == "stop" for s in stats) else "length",
    )


@dataclass(frozen=True)
class Completion:
    """What came of one of several prompts."""

    prompt: str
    text: str
    stats: GenerationStats


class Course:
    """One text: its tokens, its sampler, its budget controller, and what came of it so far.

    Attributes:
        ids: tokens of the prompt.
        finished: no further token is to come.
        stats: figures up to here.
        token: the last one chosen; it is the next to be decoded, at `position`.
        controller: its `params` are those of the next token.
    """

    def __init__(
        self,
        ids: list[int],
        max_tokens: int,
        sampler: Sampler,
        controller: BudgetController,
        tokenizer: Tokenizer,
        ends: Sequence[int],
        room: int,
    ) -> None:
        """
        Args:
            ids, max_tokens: prompt, and tokens to add at most.
            sampler, controller: of this text alone.
            tokenizer: for its streaming decoder.
            ends: ids that end the text.
            room: positions of the context.
        """
        self.ids, self.position, self.token = ids, len(ids), -1
        self.controller, self.finished = controller, False
        self.stats = GenerationStats(prompt_tokens=len(ids))
        self._sampler, self._ends = sampler, ends
        self._most, self._room = max_tokens, room
        self._stream, self._bytes = tokenizer.stream(), 0

    def take(self, logits: np.ndarray) -> str:
        """Choose the next token out of logits f32 [V]; returns the characters that it completes."""
        started = time.perf_counter()
        self.token = self._sampler.sample(logits)
        self.stats.decode_s += time.perf_counter() - started
        if self.token in self._ends:
            self.stats.finish, self.finished = "stop", True
            return ""
        self.stats.tokens += 1
        self.finished = self.stats.tokens == self._most or self.position >= self._room
        return self._stream.push(self.token)

    def account(self, read: DecodeStats, seconds: float) -> None:
        """The last token was decoded: it read this much and took so long."""
        self.position += 1
        self.controller.update(read.body_bits)
        self._bytes += read.bytes_read
        self.stats.decode_s += seconds
        self.stats.bits_read_body = self.controller.mean_bits
        self.stats.bytes_read = self._bytes / self.controller.tokens


def check_parallel(parallel: int) -> None:
    """Raises LowtideError unless 1 to MAX_PARALLEL."""
    if not 1 <= parallel <= MAX_PARALLEL:
        raise LowtideError(f"--parallel {parallel}: must be 1 to {MAX_PARALLEL}")


def run_rounds(
    engine: Any, courses: Sequence[Course], parallel: int, check: Callable[[], None] = lambda: None
) -> Iterator[tuple[Course, str]]:
    """Run texts to their ends, up to `parallel` at a time, each with a KV cache of its own; one that ends makes room.

    Args:
        engine: with `sequence` and `decode_round`.
        courses: texts that have not begun.
        parallel: how many at a time.
        check: called before every round; may raise to end it all.

    Yields:
        each text and what it says, in the order given, as soon as it and all before it have ended.
    """
    waiting, active = deque(enumerate(courses)), list[_Running]()
    texts, free, told = [""] * len(courses), list[Any](), 0
    try:
        while told < len(courses):
            check()
            while waiting and len(active) < parallel:
                index, course = waiting.popleft()
                active.append((index, course, free.pop() if free else engine.sequence()))
                texts[index] = _begin(course, active[-1][2])
            free += [sequence for _, course, sequence in active if course.finished]
            active = [running for running in active if not running[1].finished]
            if active:
                _decode(engine, active, texts)
            while told < len(courses) and courses[told].finished:
                yield courses[told], texts[told]
                told += 1
    finally:
        for sequence in [*free, *(sequence for _, _, sequence in active)]:
            sequence.close()


def _begin(course: Course, sequence: Any) -> str:
    """Read the prompt, choose the first token."""
    started = time.perf_counter()
    logits = sequence.prefill(np.asarray(course.ids, np.int32), 0)
    course.stats.prefill_s = time.perf_counter() - started
    return course.take(logits)


def _decode(engine: Any, active: list[_Running], texts: list[str]) -> None:
    """One round: a token of each."""
    steps = [Step(sequence, c.token, c.position, c.controller.params) for _, c, sequence in active]
    started = time.perf_counter()
    results = engine.decode_round(steps)
    part = (time.perf_counter() - started) / len(steps)
    for (index, course, _), (logits, read) in zip(active, results, strict=True):
        course.account(read, part)
        texts[index] += course.take(logits)
