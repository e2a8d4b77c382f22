"""Load an artifact and generate text from it, one at a time or several in rounds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from lowtide.errors import LowtideError
from lowtide.runtime import chat as chat_template
from lowtide.runtime.budget import BudgetController, body_side_bits, body_weights, policy_params
from lowtide.runtime.course import Completion, Course, GenerationStats, check_parallel, run_rounds, total
from lowtide.runtime.memory import give_back_unused
from lowtide.runtime.sampling import Sampler
from lowtide.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lowtide.format.reader import Artifact
    from lowtide.kernels.native import Engine


def load(
    path: str | Path,
    threads: int | None = None,
    isa: str | None = None,
    context: int | None = None,
    cache_bits: int = 16,
    importance_multiplier: float = 0.0,
    head: tuple[float, float] = (0.0, 0.0),
) -> Model:
    """Open an artifact and make it ready to generate.

    Args:
        path: folder made by `lowtide compress`.
        threads: worker threads; None lets the engine choose.
        isa: instruction set ("avx512", "avx2", "neondot", "neon", "portable"); None takes LOWTIDE_ISA or the best one.
        context: tokens that the KV cache holds; None takes the model's own maximum, at most 4096.
        cache_bits: bits of cached keys and values: 16, or 8 for half the memory.
        importance_multiplier: power of the columns' importance that multiplies the weights (runtime/multiplier.py).
        head: how the output head is read: (0, 0) once, (log2 offset, margin in nats) twice (`PolicyParams`).

    Raises:
        LowtideError: the artifact is broken, has no tokenizer, or an option does not fit this machine.
    """
    from lowtide.format.reader import open_artifact
    from lowtide.kernels.native import Engine
    from lowtide.runtime.multiplier import with_importance

    artifact = with_importance(open_artifact(path), importance_multiplier)
    tokenizer = load_tokenizer(artifact)
    give_back_unused()  # making a tokenizer takes twice the memory that it keeps
    engine = Engine(artifact, threads=threads, isa=isa, max_context=context, cache_bits=cache_bits)
    return Model(artifact, engine, tokenizer, head)


def load_tokenizer(artifact: Artifact) -> Tokenizer:
    """The tokenizer stored in an artifact.

    Raises:
        LowtideError: there is none, or it is broken.
    """
    files = artifact.manifest.files
    if "tokenizer.json" not in files:
        raise LowtideError("the artifact holds no tokenizer.json; compress it again from a source that has one")
    config = artifact.file("tokenizer_config.json") if "tokenizer_config.json" in files else None
    return Tokenizer(artifact.file("tokenizer.json"), config, artifact.config.bos_token_id)


class Model:
    """An open artifact with its engine, tokenizer and KV cache. One generation runs at a time."""

    def __init__(
        self, artifact: Artifact, engine: Engine, tokenizer: Tokenizer, head: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        self.artifact, self.engine, self.tokenizer = artifact, engine, tokenizer
        self._head = head
        self.stats = GenerationStats()
        """Figures of the last generation; complete once its stream has ended."""
        self._weights = body_weights(artifact)
        self._cached: list[int] = []  # ids whose keys and values the engine holds
        self._turn = 0
        self._closed = False
        jinja = artifact.file("chat_template.jinja") if "chat_template.jinja" in artifact.manifest.files else None
        self._template = chat_template.find_template(tokenizer.config, jinja)

    def generate(
        self,
        prompt: str,
        max_tokens: int = 128,
        bits: float | None = 3.0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        policy: str | None = None,
    ) -> Iterator[str]:
        """Stream the continuation of `prompt`, piece by piece; pieces are whole characters.

        The prompt is read with all stored bits, every token after it at the budget.

        Args:
            prompt: text; empty starts from the begin-of-sequence token.
            max_tokens: stop after this many tokens (sooner at end of sequence or of the context).
            bits: bits read per weight of the decoder's linear layers; None reads all that is stored.
            temperature, top_k, top_p, seed: see `Sampler`; temperature 0 is greedy.
            policy: mask rule, one that the artifact stores; None takes its first.

        Raises:
            LowtideError: an option out of range, or a prompt that does not fit the context.
        """
        ids = self.tokenizer.encode(prompt)
        sampler = Sampler(temperature, top_k, top_p, seed)
        return self._start(ids, max_tokens, sampler, self.controller(bits, policy), reuse=False)

    def generate_many(
        self,
        prompts: Sequence[str],
        max_tokens: int = 128,
        bits: float | None = 3.0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None | Sequence[int | None] = None,
        policy: str | None = None,
        parallel: int = 4,
    ) -> Iterator[Completion]:
        """Continue several prompts, up to `parallel` at a time; each says what it says alone, bit for bit.

        Every prompt has a KV cache, a sampler and a budget controller of its own. Decoding is per sequence: each token
        reads what its own mask says. Texts take turns within every group of layers, so what one has read from memory
        the next often finds in the processor's cache. `stats` becomes the sum or mean over all prompts.

        Args:
            prompts: texts, as in `generate`.
            max_tokens, bits, temperature, top_k, top_p, policy: as in `generate`, the same for all.
            seed: of every prompt's own sampler; a list has one for each prompt.
            parallel: prompts at a time.

        Returns:
            an iterator over what came of the prompts, in their order, each as soon as it and all before it are done.

        Raises:
            LowtideError: as in `generate`, naming the prompt.
        """
        check_parallel(parallel)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise LowtideError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each, or one for all")
        courses = []
        for number, (prompt, own) in enumerate(zip(prompts, seeds, strict=True), start=1):
            sampler, controller = Sampler(temperature, top_k, top_p, own), self.controller(bits, policy)
            try:
                courses.append(self._course(self.tokenizer.encode(prompt), max_tokens, sampler, controller))
            except LowtideError as error:
                raise LowtideError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from None
        self._turn += 1
        return self._run_many(prompts, courses, parallel, self._turn)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int = 512,
        bits: float | None = 3.0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        policy: str | None = None,
    ) -> Iterator[str]:
        """Stream the assistant's answer to a conversation, with the artifact's chat template.

        Tokens that the KV cache still holds from the turn before are not read again.

        Args:
            messages: dicts with "role" (system, user, assistant) and "content".
            max_tokens, bits, temperature, top_k, top_p, seed, policy: as in `generate`.

        Raises:
            LowtideError: as in `generate`; no chat template, or one that refuses these messages.
        """
        text = chat_template.render(self._template, messages, self.tokenizer.config)
        ids = self.tokenizer.encode(text, special=False)
        sampler = Sampler(temperature, top_k, top_p, seed)
        return self._start(ids, max_tokens, sampler, self.controller(bits, policy), reuse=True)

    def controller(self, bits: float | None, policy: str | None = None) -> BudgetController:
        """A fresh budget controller for this artifact (see `BudgetController`)."""
        params = policy_params(self.artifact, policy, bits, self._head)
        return BudgetController(params, bits, self._weights, body_side_bits(self.artifact, params.rule))

    def preload(self, bits: float | None = 3.0, policy: str | None = None) -> int:
        """Read into memory what generating at this budget may read of the artifact, and nothing else; returns bytes.

        Prompts are read with all stored bits, so that is every slice (`runtime.preload.readable` says more).

        Raises:
            LowtideError: as `generate` for these options.
        """
        from lowtide.runtime.preload import preload

        return preload(self.artifact, policy_params(self.artifact, policy, bits, self._head))

    def _course(self, ids: list[int], max_tokens: int, sampler: Sampler, controller: BudgetController) -> Course:
        """A text that has not begun.

        Raises:
            LowtideError: it cannot.
        """
        if self._closed:
            raise LowtideError("this model is closed; load it again")
        if max_tokens < 1:
            raise LowtideError(f"-n {max_tokens}: must be 1 or more")
        if not ids:
            raise LowtideError("the prompt is empty and the model has no begin-of-sequence token; give some text")
        room = self.engine.max_context
        if len(ids) > room:
            raise LowtideError(f"the prompt has {len(ids)} tokens, the context holds {room}; shorten it")
        if max(ids) >= self.engine.vocab_size:
            raise LowtideError("tokenizer.json has more tokens than the model; it belongs to another model")
        ends = self.artifact.config.eos_token_ids
        return Course(ids, max_tokens, sampler, controller, self.tokenizer, ends, room)

    def _start(
        self, ids: list[int], max_tokens: int, sampler: Sampler, controller: BudgetController, reuse: bool
    ) -> Iterator[str]:
        """Check everything before the first token is asked for, so that errors come from the call itself."""
        course = self._course(ids, max_tokens, sampler, controller)
        self._turn += 1
        return self._run(course, reuse, self._turn)

    def _run(self, course: Course, reuse: bool, turn: int) -> Iterator[str]:
        self._check_turn(turn)
        stats = self.stats = course.stats
        stats.reused_tokens = _common_prefix(self._cached, course.ids[:-1]) if reuse else 0
        logits = self._prefill(course.ids, stats)
        while True:
            if text := course.take(logits):
                yield text
                self._check_turn(turn)
            if course.finished:
                return
            started = time.perf_counter()
            logits, read = self.engine.decode(course.token, course.position, course.controller.params)
            self._cached.append(course.token)
            course.account(read, time.perf_counter() - started)

    def _run_many(
        self, prompts: Sequence[str], courses: list[Course], parallel: int, turn: int
    ) -> Iterator[Completion]:
        self._check_turn(turn)
        done: list[GenerationStats] = []
        runs = run_rounds(self.engine, courses, parallel, lambda: self._check_turn(turn))
        for prompt, (course, text) in zip(prompts, runs, strict=True):
            done.append(course.stats)
            self.stats = total(done)
            yield Completion(prompt, text, course.stats)

    def _check_turn(self, turn: int) -> None:
        if self._closed or turn != self._turn:
            raise LowtideError("the model was closed or started another generation; this one cannot go on")

    def _prefill(self, ids: list[int], stats: GenerationStats) -> np.ndarray:
        reused = stats.reused_tokens
        self._cached = []  # an interrupted prefill leaves the cache in no known state
        started = time.perf_counter()
        logits = self.engine.prefill(np.asarray(ids[reused:], np.int32), reused)
        stats.prefill_s = time.perf_counter() - started
        self._cached = list(ids)
        return logits

    def close(self) -> None:
        """Free the engine and its cache; closing twice is fine."""
        if not self._closed:
            self._closed = True
            self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
