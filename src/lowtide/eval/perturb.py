"""Perturbed input: typing errors, moved words, noise on embeddings, tokens flipped along the gradient (HotFlip).

Everything is seeded. Text edits leave whitespace and the number of words alone, so losses can be compared per word;
noise and flips leave positions alone, so outputs can be compared token by token. N positions, D hidden size, V
vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lowtide.compress.dense import DenseModel, decoder_block, rms_norm, rope_tables
from lowtide.compress.masked import MaskedModel
from lowtide.compress.sources import Source
from lowtide.errors import LowtideError
from lowtide.rules import Rule

KEY_ROWS = (("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75))
"""The letters of a QWERTY keyboard, row by row, and how far each row is moved to the right, in keys."""
KEY_REACH = 1.3
"""Keys whose centres are nearer than this are neighbours: left, right, and two or three in the rows beside."""
EDITS = ("swap", "drop", "insert", "replace")

FLIPS_PER_ROUND = 4
"""HotFlip takes the gradient anew after so many flips."""
FLIP_TRIES = 3
"""For each flip so many candidates are tried for their true loss."""
FLIP_SHARE = 0.5
"""Share of the positions, drawn by the seed, that HotFlip may change."""


def _neighbours() -> dict[str, str]:
    places = {key: (x + shift, y) for y, (row, shift) in enumerate(KEY_ROWS) for x, key in enumerate(row)}
    return {
        a: "".join(b for b, (u, v) in places.items() if b != a and (x - u) ** 2 + (y - v) ** 2 < KEY_REACH**2)
        for a, (x, y) in places.items()
    }


NEIGHBOURS = _neighbours()
"""Letter -> the letters on the keys around it."""


def typos(text: str, share: float, rng: np.random.Generator) -> str:
    """Typing errors in the share `share` of all letters: two swapped, one dropped, inserted or replaced.

    Inserted and replaced letters come from the keyboard's neighbours of the right one, in its case (the edit model of
    Pruthi et al., arXiv 1905.11268). Every word keeps a letter; whitespace, digits and punctuation stay.
    """
    return re.sub(r"\S+", lambda word: _mistype(word[0], share, rng), text)


def _mistype(word: str, share: float, rng: np.random.Generator) -> str:
    out: list[str] = []
    at, letters = 0, sum(c.isalpha() for c in word)
    while at < len(word):
        c, following = word[at], word[at + 1 : at + 2]
        at += 1
        if not c.isalpha() or rng.random() >= share:
            out.append(c)
            continue
        edit = EDITS[rng.integers(len(EDITS))]
        if edit == "swap" and following.isalpha():
            out += [following, c]
            at += 1
        elif edit == "drop" and letters > 1:
            letters -= 1
        else:  # a swap at a word's end and a drop of its only letter become replacements
            key = _neighbour(c, rng)
            out += [key, c] if edit == "insert" else [key]
    return "".join(out)


def _neighbour(c: str, rng: np.random.Generator) -> str:
    around = NEIGHBOURS.get(c.lower())
    if around is None:  # a letter that the keyboard lacks, such as an accented one: typed twice or kept
        return c
    key = around[rng.integers(len(around))]
    return key.upper() if c.isupper() else key


def swap_words(text: str, share: float, rng: np.random.Generator, reach: int = 1) -> str:
    """Exchange pairs of words until the share `share` of all words has moved.

    The partners are drawn up to `reach` words apart (1: adjacent ones), no word moves twice, whitespace stays where
    it was. Fewer move where no free partner is left.
    """
    parts = re.split(r"(\s+)", text)
    places = [i for i, part in enumerate(parts) if part and not part.isspace()]
    wanted, moved = round(share * len(places) / 2), set[int]()
    for first in rng.permutation(len(places)).tolist():
        second = first + int(rng.integers(1, reach + 1))
        if len(moved) >= 2 * wanted:
            break
        if second < len(places) and not moved & {first, second}:
            a, b = places[first], places[second]
            parts[a], parts[b] = parts[b], parts[a]
            moved |= {first, second}
    return "".join(parts)


class EditableText:
    """Token ids as text that can be edited: special tokens stay, what is between them is decoded and encoded again.

    Raises:
        LowtideError: the source has no readable tokenizer.json.
    """

    def __init__(self, source: Source) -> None:
        from tokenizers import Tokenizer

        files = source.tokenizer_files()
        if "tokenizer.json" not in files:
            raise LowtideError(f"{source.name}: holds no tokenizer.json, so text cannot be perturbed; add one")
        try:
            self._backend: Any = Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises bare Exceptions
            raise LowtideError(f"{source.name}: its tokenizer.json is not readable ({error})") from None
        self._special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        self._size = source.config.vocab_size

    def ordinary(self) -> torch.Tensor:
        """Which ids are tokens of text, neither special nor beyond the tokenizer's vocabulary: bool [V]."""
        ids = torch.arange(self._size)
        known = ids < self._backend.get_vocab_size(with_added_tokens=True)
        return known & ~torch.isin(ids, torch.tensor(sorted(self._special), dtype=torch.int64))

    def decode(self, ids: Sequence[int]) -> str:
        """Text without the special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def edit(self, ids: Sequence[int], change: Callable[[str], str]) -> list[int]:
        """The ids after `change` of every stretch of text between special tokens."""
        out: list[int] = []
        stretch: list[int] = []
        for token in [*ids, -1]:
            if token >= 0 and token not in self._special:
                stretch.append(token)
                continue
            if stretch:
                text = change(self.decode(stretch).strip("\ufffd"))  # half a character where a window begins or ends
                out += self._backend.encode(text, add_special_tokens=False).ids
            stretch = []
            if token >= 0:
                out.append(token)
        return out

    def canonical(self, ids: Sequence[int], limit: int) -> list[int]:
        """The ids as the tokenizer itself cuts their text, at most `limit`: an edit that changes nothing keeps them."""
        now = list(ids)[:limit]
        for _ in range(4):  # a cut at the limit can make another last token, once or twice
            before, now = now, self.edit(now, str)[:limit]
            if now == before:
                break
        return now


def embedding_noise(model: DenseModel, positions: int, strength: float, rng: np.random.Generator) -> torch.Tensor:
    """Gaussian noise f32 [positions, D] whose length is about `strength` times the mean length of an embedding."""
    scale = strength * float(model.embedding.norm(dim=-1).mean()) / model.config.hidden_size**0.5
    return torch.from_numpy(rng.normal(0.0, scale, (positions, model.config.hidden_size)).astype(np.float32))


def dense_logits(model: DenseModel, x: torch.Tensor) -> torch.Tensor:
    """Logits f32 [N, V] of the dense model on embeddings x f32 [N, D]; gradients flow back to x if it wants them."""
    rope = rope_tables(model.config, 0, len(x))
    x = x[None]
    for index in range(model.config.num_layers):
        block = model.block(index)
        x = decoder_block(model.config, (block.input_norm, block.post_norm), x, block.apply, rope)
    return F.linear(rms_norm(x, model.final_norm, model.config.rms_eps)[0], model.head_weight)


def masked_logits(
    model: MaskedModel,
    ids: torch.Tensor,
    rule: Rule,
    params: Mapping[str, Any],
    noise: torch.Tensor | None = None,
    gains: Mapping[str, float] | None = None,
) -> tuple[torch.Tensor, float]:
    """(logits f32 [N, V], bits_read_body) of a masked model on ids i64 [N], noise f32 [N, D] on its embeddings.

    rule, params, gains: see `MaskedModel.logits`.
    """
    if noise is not None:
        # a copy whose embedding table is the window itself, so that every way of masking works on it unchanged
        model, rows = copy.copy(model), model.embedding[ids] + noise
        model.embedding, ids = rows, torch.arange(len(rows))
    logits, bits = model.logits(ids[None], rule, params, gains)
    return logits[0], bits


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats of targets i64 [N], tokens at their own positions, by logits [N, V]."""
    return F.cross_entropy(logits[:-1], targets[1:])


def hotflip(
    model: DenseModel, ids: torch.Tensor, counts: Sequence[int], allowed: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """Replace tokens such that the dense model's loss on the original following tokens rises most.

    HotFlip (Ebrahimi et al., arXiv 1712.06751): to first order a flip at position p to token v raises the loss by
    (E_v - E_p) . dL/dE_p. In rounds of at most FLIPS_PER_ROUND flips the best candidates by this estimate, FLIP_TRIES
    for each flip and one for each position, are tried for their true loss alone; the best are made together.

    Args:
        model: the model attacked.
        ids: i64 [N]. The first position stays, and so does the last, which predicts nothing.
        counts: numbers of flips, ascending; each set of flips contains the one before.
        allowed: bool [V], tokens that may be put in.
        seed: draws the FLIP_SHARE of the positions that may change.

    Returns:
        For each count the changed ids, i64 [N].

    Raises:
        LowtideError: more flips than positions that may change.
    """
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randperm(max(len(ids) - 2, 0), generator=generator) + 1
    left = inner[: max(int(FLIP_SHARE * len(inner)), 1)]
    if max(counts, default=0) > len(left):
        raise LowtideError(
            f"{max(counts)} token flips: a window of {len(ids)} tokens has {len(left)} positions for them; "
            "use a longer --window"
        )
    now, made, out = ids.clone(), 0, []
    for count in counts:
        while made < count:
            flips = _best_flips(model, now, ids, left, allowed, min(FLIPS_PER_ROUND, count - made))
            for position, token in flips:
                now[position] = token
                left = left[left != position]
            made += len(flips)
        out.append(now.clone())
    return out


def _best_flips(
    model: DenseModel,
    now: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor,
    allowed: torch.Tensor,
    count: int,
) -> list[tuple[int, int]]:
    """(position, token) of the `count` flips of one round."""
    gain, tokens = first_order(model, now, targets, positions, allowed)
    tried: list[tuple[float, int, int]] = []
    for i in gain.topk(min(count * FLIP_TRIES, len(positions))).indices.tolist():
        changed = now.clone()
        changed[positions[i]] = tokens[i]
        with torch.no_grad():
            loss = float(next_token_loss(dense_logits(model, model.embedding[changed]), targets))
        tried.append((loss, int(positions[i]), int(tokens[i])))
    return [(position, token) for _, position, token in sorted(tried, reverse=True)[:count]]


def first_order(
    model: DenseModel, now: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best flip of each position to first order: (rise of the loss f32 [P], token i64 [P])."""
    x = model.embedding[now].clone().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(next_token_loss(dense_logits(model, x), targets), x)
    gradient, here = gradient[positions], model.embedding[now[positions]]
    rise = gradient @ model.embedding.T - (gradient * here).sum(-1, keepdim=True)
    rise[:, ~allowed] = -torch.inf
    rise.scatter_(1, now[positions, None], -torch.inf)
    best = rise.max(-1)
    return best.values, best.indices
