"""What was read for a text, token by token, and why: works out the figures behind `lowtide explain`.

Every token is masked by itself under the thresholds that the artifact stores for the budget; the controller that holds
a generation's mean on the budget stands still, so that tokens can be compared. Bits, levels and scores come from the
reference engine (`explain_trace`), logits from the native one; both agree bit for bit.

Legend: n tokens, L layers, K kinds of groups (qkv, o, gate_up, down), V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import LowtideError
from lowtide.runtime.budget import policy_params
from lowtide.runtime.explain_data import KINDS, MATRICES, Explanation, Token
from lowtide.runtime.model import load_tokenizer

if TYPE_CHECKING:
    from lowtide.format.reader import Artifact
    from lowtide.kernels.types import PolicyParams
    from lowtide.runtime.explain_trace import Reading, Tracer

F32 = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

TOP = 5
"""Channels of a group, and features of the residual stream, that are named."""
DRIVERS = 3
"""Features named for the offset of one group."""
DETAILED = 64
"""Tokens whose layers are described; a longer text has only its hardest and easiest, so that a page stays small."""
EXTREMES = 5
"""Easiest and hardest tokens listed."""
CHUNK = 64
"""Tokens that go through the reference engine together."""


def explain(
    path: str | Path,
    prompt: str,
    bits: float | None = 3.0,
    policy: str | None = None,
    token: int | None = None,
    generate: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Explanation:
    """Run a text through an artifact and tell what was read.

    Args:
        path: the artifact's folder.
        prompt: the text.
        bits: budget, bits read per weight; None reads everything.
        policy: mask rule that the artifact stores; None takes its first.
        token: the token to describe first; None takes the one that read most.
        generate: tokens to add, the likeliest each time, fewer at an end of sequence.
        progress: called with (stage, done, total).

    Raises:
        LowtideError: an empty prompt, a token that is not there, a text longer than the context, and what
            `open_artifact` and `policy_params` refuse.
    """
    from lowtide.format.reader import open_artifact
    from lowtide.runtime.explain_trace import Tracer

    if not prompt:
        raise LowtideError("--prompt: the text is empty; give at least one word")
    if generate < 0:
        raise LowtideError(f"--generate {generate}: must be 0 or more")
    artifact = open_artifact(path)
    params = policy_params(artifact, policy, bits)
    ids = load_tokenizer(artifact).encode(prompt)
    given = len(ids)
    _check(artifact, ids, token, generate)
    ids, took = decode(artifact, ids, params, generate)
    if token is not None and token >= len(ids):
        raise LowtideError(f"--token {token}: the text has {len(ids)} tokens; give 0 to {len(ids) - 1}")
    read = [t["body_bits"] for t in took]
    chosen = int(np.argmax(read)) if token is None else token
    watch = _Watch(artifact, params, len(ids), detailed(read, chosen), progress)
    tracer = Tracer(artifact)
    watch.run(tracer, ids, params)
    tracer.close()
    named = "dense" if params.rule == "dense" else policy or artifact.manifest.policies[0]
    budget = bits if params.bits is None else params.bits
    return _assemble(artifact, named, budget, ids, given, took, watch, chosen)


def _check(artifact: Artifact, ids: Sequence[int], token: int | None, generate: int) -> None:
    """Refuse at once what could not be answered."""
    room = min(artifact.config.max_position, 4096)
    if not ids:
        raise LowtideError("--prompt: the tokenizer makes nothing of this text; give at least one word")
    if len(ids) + generate > room:
        longer = f" and --generate {generate}" if generate else ""
        raise LowtideError(f"--prompt has {len(ids)} tokens{longer}, the context holds {room}; shorten it")
    if max(ids) >= artifact.config.vocab_size:
        raise LowtideError("tokenizer.json has more tokens than the model; it belongs to another model")
    if token is not None and not 0 <= token < len(ids) + generate:
        last = len(ids) + generate - 1
        raise LowtideError(f"--token {token}: the text has {len(ids) + generate} tokens; give 0 to {last}")


def decode(
    artifact: Artifact, ids: Sequence[int], params: PolicyParams, generate: int
) -> tuple[list[int], list[dict[str, float]]]:
    """All tokens one by one through the native engine, the likeliest ones added.

    Returns:
        the ids, and for each token body_bits, entropy, margin, expects (an id) and expects_p.
    """
    from lowtide.kernels.native import Engine

    ids, wanted = list(ids), len(ids) + generate
    engine = Engine(artifact, max_context=wanted)
    took: list[dict[str, float]] = []
    try:
        for pos in range(wanted):
            logits, stats = engine.decode(ids[pos], pos, params)
            took.append({"body_bits": stats.body_bits, **confidence(logits)})
            if pos + 1 == len(ids) < wanted:
                likeliest = int(took[-1]["expects"])
                if likeliest in artifact.config.eos_token_ids:
                    break
                ids.append(likeliest)
    finally:
        engine.close()
    return ids, took


def confidence(logits: F32) -> dict[str, float]:
    """Of logits f32 [V]: entropy in nats, margin of the two likeliest, the likeliest and its probability."""
    shifted = logits.astype(np.float64) - float(logits.max())
    p = np.exp(shifted)
    total = float(p.sum())
    first, second = np.sort(np.partition(p, -2)[-2:])[::-1] / total
    entropy = float(np.log(total) - (p @ shifted) / total)
    return {
        "entropy": max(0.0, entropy),
        "margin": float(first - second),
        "expects": int(np.argmax(logits)),
        "expects_p": float(first),
    }


def detailed(read: Sequence[float], chosen: int) -> list[int]:
    """The tokens to describe, ascending: all if they are few, else the chosen one, the hardest and the easiest."""
    if len(read) <= DETAILED:
        return list(range(len(read)))
    order = [int(i) for i in np.argsort(-np.asarray(read), kind="stable") if i != chosen]
    hard = DETAILED // 2
    return sorted({chosen, *order[: hard - 1], *order[-(DETAILED - hard) :]})


class _Watch:
    """Collects what the tracer shows: bits and offsets of every token, details of the chosen ones."""

    def __init__(
        self, artifact: Artifact, params: PolicyParams, tokens: int, chosen: Sequence[int], progress: Progress
    ) -> None:
        layers, hidden = artifact.config.num_layers, artifact.config.hidden_size
        self.weights = [artifact.groups[f"layers.0.{kind}"].weights() for kind in KINDS]
        self.bits = np.zeros((tokens, layers, len(KINDS)))
        self.gains = None if params.gains is None else np.asarray(params.gains[:-1], np.float64).reshape(layers, -1)
        self.offsets = np.zeros(tokens)
        self.drivers = np.zeros((tokens, hidden))
        self.residual = {t: np.zeros(hidden) for t in chosen}
        self.details: dict[int, list[dict[str, Any]]] = {t: [_empty(params) for _ in range(layers)] for t in chosen}
        self._progress, self._total = progress, -(-tokens // CHUNK) * 4 * layers
        self._residuals = 2 * layers  # groups that read the residual stream
        self._done = self._first = 0
        self._peaks: dict[str, F32] = {}

    def run(self, tracer: Tracer, ids: Sequence[int], params: PolicyParams) -> None:
        """All tokens through the tracer."""
        for self._first in range(0, len(ids), CHUNK):
            tracer.trace(ids[self._first : self._first + CHUNK], self._first, params, lambda r: self._see(tracer, r))

    def _see(self, tracer: Tracer, reading: Reading) -> None:
        layer, kind = divmod(reading.index, len(KINDS))
        rows = slice(self._first, self._first + len(reading.x))
        self.bits[rows, layer, kind] = reading.bits / self.weights[kind]
        if self.gains is not None and reading.drivers is not None:
            gain = self.gains[layer, kind] / self.gains.size
            self.offsets[rows] += gain * reading.offset
            self.drivers[rows] += gain * reading.drivers
        here = [t for t in self.details if rows.start <= t < rows.stop]
        if here:
            self._describe(tracer, reading.only([t - self._first for t in here]), here, layer, kind)
        self._done += 1
        self._progress("explain", self._done, self._total)

    def _describe(self, tracer: Tracer, reading: Reading, here: Sequence[int], layer: int, kind: int) -> None:
        """Channels, offset and single weights of one group for the tokens `here`, which are the reading's rows."""
        from lowtide.runtime.explain_trace import Columns, strongest, top

        best = top(reading.score, TOP)
        most = np.maximum.reduce(reading.levels)  # where layers of the group differ
        drive = None if reading.drivers is None else top(np.abs(reading.drivers), DRIVERS)
        for row, t in enumerate(here):
            score = reading.score[row]
            if KINDS[kind] in ("qkv", "gate_up"):
                self.residual[t] += score / max(float(score.sum(dtype=np.float64)), 1e-30) / self._residuals
            into = self.details[t][layer]
            into["levels"][kind] = np.bincount(most[row], minlength=reading.group.slices + 1).tolist()
            into["channels"][kind] = [[int(c), int(most[row, c]), sig(score[c])] for c in best[row]]
            if drive is not None and reading.drivers is not None:
                into["offsets"][kind] = sig(reading.offset[row])
                into["drivers"][kind] = [[int(c), sig(reading.drivers[row, c])] for c in drive[row]]
        for member, linear in enumerate(reading.group.linears):
            columns = Columns(reading.group, linear, tracer.digits(reading.group, linear))
            if linear.name not in self._peaks:
                self._peaks[linear.name] = columns.peaks()
            matrix = MATRICES.index(linear.name.rpartition(".")[2])
            for t, found in zip(here, strongest(columns, self._peaks[linear.name], reading, member, 1), strict=True):
                entries = self.details[t][layer]["weights"]
                entries.extend([matrix, f.row, f.channel, sig(f.product), f.bits] for f in found)


def _empty(params: PolicyParams) -> dict[str, Any]:
    """A layer of which nothing is known yet."""
    blank: dict[str, Any] = {"levels": [[] for _ in KINDS], "channels": [[] for _ in KINDS], "weights": []}
    if params.gains is not None:
        blank |= {"offsets": [0.0 for _ in KINDS], "drivers": [[] for _ in KINDS]}
    return blank


def _assemble(
    artifact: Artifact,
    policy: str,
    budget: float | None,
    ids: Sequence[int],
    prompt_tokens: int,
    took: Sequence[dict[str, float]],
    watch: _Watch,
    chosen: int,
) -> Explanation:
    config, manifest = artifact.config, artifact.manifest
    body = [t["body_bits"] / (sum(watch.weights) * config.num_layers) for t in took]
    order = [int(i) for i in np.argsort(-np.asarray(body), kind="stable")]
    count = min(EXTREMES, max(1, len(ids) // 2))
    shown = watch.details.items()
    groups = [[artifact.groups[f"layers.{n}.{kind}"] for kind in KINDS] for n in range(config.num_layers)]
    return Explanation(
        artifact=artifact.path.name,
        source=str(manifest.stats.get("source", config.architecture)),
        policy=policy,
        budget=budget,
        mean_bits=sig(np.mean(body), 5),
        prompt_tokens=prompt_tokens,
        slices=manifest.slices,
        heads=config.num_heads,
        head_dim=config.head_dim,
        kind_weights=watch.weights,
        exact=[[len(group.exact_channels) for group in layer] for layer in groups],
        gains=None if watch.gains is None else [[sig(g) for g in layer] for layer in watch.gains],
        chosen=chosen,
        hardest=order[:count],
        easiest=order[::-1][:count],
        tokens=_tokens(artifact, ids, prompt_tokens, body, took, watch),
        bits=[[[sig(b, 4) for b in layer] for layer in token] for token in watch.bits],
        details={str(t): {"residual": _largest(watch.residual[t]), "layers": layers} for t, layers in shown},
    )


def _tokens(
    artifact: Artifact,
    ids: Sequence[int],
    prompt_tokens: int,
    body: Sequence[float],
    took: Sequence[dict[str, float]],
    watch: _Watch,
) -> list[Token]:
    text = token_texts(artifact)
    tokens = []
    for i, (token, t) in enumerate(zip(ids, took, strict=True)):
        entropy, margin, expects_p = (sig(t[key]) for key in ("entropy", "margin", "expects_p"))
        expects, made = text(int(t["expects"])), i >= prompt_tokens
        row = Token(i, token, text(token), made, sig(body[i], 4), entropy, margin, expects, expects_p)
        if watch.gains is not None:
            row = replace(row, offset=sig(watch.offsets[i]), drivers=_largest(watch.drivers[i]))
        tokens.append(row)
    return tokens


def token_texts(artifact: Artifact) -> Callable[[int], str]:
    """What to call a token: its text, the name of a special token, or the bytes of a piece of a character."""
    tokenizer = load_tokenizer(artifact)
    added = json.loads(artifact.file("tokenizer.json")).get("added_tokens", [])
    special = {entry["id"]: entry["content"] for entry in added}

    def text(token: int) -> str:
        raw = tokenizer.token_bytes(token)
        if not raw:
            return str(special.get(token, f"<{token}>"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02X}" for byte in raw)

    return text


def sig(value: float | np.floating[Any], digits: int = 3) -> float:
    """Rounded to significant digits: what a person reads, and short as JSON."""
    return float(f"{float(value):.{digits}g}")


def _largest(values: NDArray[np.float64]) -> list[list[float]]:
    """[[index, value]] of the TOP entries of [D] that are largest in magnitude."""
    order = np.argsort(-np.abs(values), kind="stable")[:TOP]
    return [[int(i), sig(values[i])] for i in order]
