"""What `lowtide explain` has to tell: one record for a text and one for each of its tokens, plain enough for JSON.

Legend: n tokens, L layers, K kinds of groups (qkv, o, gate_up, down), S slices.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lowtide.arch import GROUPS

KINDS = tuple(GROUPS)
MATRICES = tuple(name.rpartition(".")[2] for members in GROUPS.values() for name in members)


@dataclass(frozen=True)
class Token:
    """One token and how the model took it.

    Attributes:
        index: place in the text, from 0.
        id: in the vocabulary.
        text: what it stands for; a piece of a character is written as its bytes, \\xE2.
        generated: made by the model, not part of the prompt.
        bits: read per weight of the decoder's linear layers, side data included.
        entropy: nats, of the model's distribution for the next token.
        margin: probability of the likeliest next token less that of the second.
        expects: the likeliest next token.
        expects_p: its probability.
        offset: mean over layers and groups of gain * o, in octaves: how far the rule `ipn` lowered the thresholds.
        drivers: [feature of the residual stream, octaves] that made most of it, largest first.
    """

    index: int
    id: int
    text: str
    generated: bool
    bits: float
    entropy: float
    margin: float
    expects: str
    expects_p: float
    offset: float | None = None
    drivers: list[list[float]] = field(default_factory=list)


@dataclass
class Explanation:
    """Everything that a page shows.

    Attributes:
        artifact, source, policy: names; source is the model the artifact was made of, policy the mask rule.
        budget: bits per weight that the thresholds are for, None for dense.
        mean_bits: mean of the tokens' bits.
        prompt_tokens: the first tokens, the others were generated.
        slices, heads, head_dim: of the model; channel c of `o` is dimension c % head_dim of head c // head_dim.
        kind_weights: weights of one layer's groups, [K].
        exact: exact channels of each group, [L][K] counts.
        gains: of the rule `ipn`, [L][K]; None under other rules.
        chosen: the token whose details are shown first.
        hardest, easiest: indices of tokens by bits read.
        tokens: all of them.
        bits: read per weight, side data included, [n][L][K].
        details: by token index (as text, for JSON): `residual` [[feature, share of all scores]], `layers` (L times
            `levels` [K][S + 1] counts of channels, `channels` [K][[channel, level, score]], `weights` [[matrix, row,
            channel, product, bits]], and under `ipn` `offsets` o [K] and `drivers` [K][[feature, part of o]]).
    """

    artifact: str
    source: str
    policy: str
    budget: float | None
    mean_bits: float
    prompt_tokens: int
    slices: int
    heads: int
    head_dim: int
    kind_weights: list[int]
    exact: list[list[int]]
    gains: list[list[float]] | None
    chosen: int
    hardest: list[int]
    easiest: list[int]
    tokens: list[Token]
    bits: list[list[list[float]]]
    details: dict[str, dict[str, Any]]
    kinds: tuple[str, ...] = KINDS
    matrices: tuple[str, ...] = MATRICES

    def data(self) -> dict[str, Any]:
        """As JSON values."""
        shallow = {f.name: getattr(self, f.name) for f in fields(self)}
        return shallow | {"tokens": [asdict(token) for token in self.tokens]}
