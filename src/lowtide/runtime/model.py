"""Load an artifact and generate text from it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from lowtide.errors import LowtideError
from lowtide.runtime import chat as chat_template
from lowtide.runtime.budget import BudgetController, body_side_bits, body_weights, policy_params
from lowtide.runtime.sampling import Sampler
from lowtide.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lowtide.format.reader import Artifact
    from lowtide.kernels.native import Engine


@dataclass
class GenerationStats:
    """What the last generation did. Times hold engine and sampling, not the consumer of the stream.

    Attributes:
        prompt_tokens: tokens of the whole prompt.
        reused_tokens: of these, tokens still in the cache from the turn before (chat).
        tokens: tokens generated.
        prefill_s, decode_s: seconds.
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


def load(
    path: str | Path,
    threads: int | None = None,
    isa: str | None = None,
    context: int | None = None,
    cache_bits: int = 16,
    importance_multiplier: float = 0.0,
) -> Model:
    """Open an artifact and make it ready to generate.

    Args:
        path: folder made by `lowtide compress`.
        threads: worker threads; None lets the engine choose.
        isa: instruction set ("avx512", "avx2", "neondot", "neon", "portable"); None takes LOWTIDE_ISA or the best one.
        context: tokens that the KV cache holds; None takes the model's own maximum, at most 4096.
        cache_bits: bits of cached keys and values: 16, or 8 for half the memory.
        importance_multiplier: power of the columns' importance that multiplies the weights (runtime/multiplier.py).

    Raises:
        LowtideError: the artifact is broken, has no tokenizer, or an option does not fit this machine.
    """
    from lowtide.format.reader import open_artifact
    from lowtide.kernels.native import Engine
    from lowtide.runtime.multiplier import with_importance

    artifact = with_importance(open_artifact(path), importance_multiplier)
    tokenizer = load_tokenizer(artifact)
    engine = Engine(artifact, threads=threads, isa=isa, max_context=context, cache_bits=cache_bits)
    return Model(artifact, engine, tokenizer)


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

    def __init__(self, artifact: Artifact, engine: Engine, tokenizer: Tokenizer) -> None:
        self.artifact, self.engine, self.tokenizer = artifact, engine, tokenizer
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
        params = policy_params(self.artifact, policy, bits)
        return BudgetController(params, bits, self._weights, body_side_bits(self.artifact, params.rule))

    def _start(
        self, ids: list[int], max_tokens: int, sampler: Sampler, controller: BudgetController, reuse: bool
    ) -> Iterator[str]:
        """Check everything before the first token is asked for, so that errors come from the call itself."""
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
        self._turn += 1
        return self._run(ids, max_tokens, sampler, controller, reuse, self._turn)

    def _run(
        self, ids: list[int], max_tokens: int, sampler: Sampler, controller: BudgetController, reuse: bool, turn: int
    ) -> Iterator[str]:
        self._check_turn(turn)
        stream, ends = self.tokenizer.stream(), self.artifact.config.eos_token_ids
        stats = self.stats = GenerationStats(prompt_tokens=len(ids))
        stats.reused_tokens = _common_prefix(self._cached, ids[:-1]) if reuse else 0
        logits = self._prefill(ids, stats)
        bytes_read = 0
        while True:
            started = time.perf_counter()
            token = sampler.sample(logits)
            stats.decode_s += time.perf_counter() - started
            if token in ends:
                stats.finish = "stop"
                return
            stats.tokens += 1
            if text := stream.push(token):
                yield text
                self._check_turn(turn)
            if stats.tokens == max_tokens or len(self._cached) >= self.engine.max_context:
                return
            started = time.perf_counter()
            logits, read = self.engine.decode(token, len(self._cached), controller.params)
            stats.decode_s += time.perf_counter() - started
            self._cached.append(token)
            controller.update(read.body_bits)
            bytes_read += read.bytes_read
            stats.bits_read_body, stats.bytes_read = controller.mean_bits, bytes_read / controller.tokens

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
