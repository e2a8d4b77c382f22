"""From a GGUF file's tokenizer metadata to Hugging Face's tokenizer.json and its companions.

Two kinds: byte-level BPE (`tokenizer.ggml.model` = gpt2), whose way of splitting text into words is named by
`tokenizer.ggml.pre`, and SentencePiece-like BPE with byte fallback (`llama`), whose merges follow from the scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from lowtide.arch import ModelConfig
from lowtide.errors import LowtideError

Field = Callable[..., Any]
"""`field(key, default)`: a value of the GGUF metadata."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""`tokenizer.ggml.token_type`."""

_WORD_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_QWEN2 = _CONTRACTIONS + r"\p{N}" + _SYMBOLS + _WORD_END
_LLAMA3 = _CONTRACTIONS + r"\p{N}{1,3}" + _SYMBOLS + _WORD_END


def _split(pattern: str) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        _byte_level(use_regex=False),
    ]


def _byte_level(use_regex: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level()],
    "default": [_byte_level()],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level()],
    "qwen2": _split(_QWEN2),
    "llama-bpe": _split(_LLAMA3),
}
"""`tokenizer.ggml.pre` -> steps in tokenizer.json's own terms."""
NORMALIZERS = {"qwen2": {"type": "NFC"}}
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(field: Field, config: ModelConfig, where: str) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json. LowtideError on a kind that is not known."""
    kind = field("tokenizer.ggml.model")
    tokens = field("tokenizer.ggml.tokens")
    if not tokens:
        raise LowtideError(f"{where}: the tokenizer is missing (no GGUF key tokenizer.ggml.tokens)")
    types = field("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if kind == "gpt2":
        spec = _byte_level_bpe(field, tokens, where)
    elif kind == "llama":
        spec = _sentencepiece_bpe(field, tokens, types, where)
    else:
        raise LowtideError(f"{where}: tokenizer of type {kind!r} is not supported; known: gpt2, llama")
    spec["added_tokens"] = _added_tokens(tokens, types)
    dump = {
        "tokenizer.json": {"version": "1.0", "truncation": None, "padding": None} | spec,
        "tokenizer_config.json": _tokenizer_config(field, kind, tokens, config),
        "generation_config.json": {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)},
    }
    return {name: json.dumps(body, ensure_ascii=False).encode() for name, body in dump.items()}


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **plain, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]


def _byte_level_bpe(field: Field, tokens: list[str], where: str) -> dict[str, Any]:
    pre = field("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise LowtideError(f"{where}: pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not supported; known: {known}")
    merges = field("tokenizer.ggml.merges")
    if merges is None:
        raise LowtideError(f"{where}: the tokenizer has no merges (GGUF key tokenizer.ggml.merges)")
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [m.split(" ") for m in merges],
        "ignore_merges": pre == "llama-bpe",
        "byte_fallback": False,
        "fuse_unk": False,
    }
    return {
        "normalizer": NORMALIZERS.get(pre),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": _byte_level(),
        "model": model,
    }


def _sentencepiece_bpe(field: Field, tokens: list[str], types: list[int], where: str) -> dict[str, Any]:
    scores = field("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise LowtideError(f"{where}: the tokenizer has no scores (GGUF key tokenizer.ggml.scores)")
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = field("tokenizer.ggml.unknown_token_id", 0)
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if field("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": merges_from_scores(tokens, scores, types),
        "unk_token": tokens[unknown],
        "byte_fallback": True,
        "fuse_unk": True,
        "ignore_merges": False,
    }
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def merges_from_scores(tokens: list[str], scores: list[float], types: list[int]) -> list[list[str]]:
    """The merges that make SentencePiece's BPE: every split of a token into two tokens, best merged score first."""
    rank = {token: (-score, i) for i, (token, score) in enumerate(zip(tokens, scores, strict=True))}
    ordinary = {token for token, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER_DEFINED, UNUSED)}
    merges = []
    for token in ordinary:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ordinary and right in ordinary:
                merges.append((rank[token], rank[left], rank[right], [left, right]))
    merges.sort(key=lambda m: m[:3])
    return [pair for *_, pair in merges]


def _tokenizer_config(field: Field, kind: str, tokens: list[str], config: ModelConfig) -> dict[str, Any]:
    body: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position,
        "add_bos_token": bool(field("tokenizer.ggml.add_bos_token", kind == "llama" or _starts_with_bos(field))),
        "clean_up_tokenization_spaces": False,
    }
    for role, key in ROLES.items():
        token = field(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            body[role] = tokens[token]
    template = field("tokenizer.chat_template")
    if template:
        body["chat_template"] = template
    return body


def _starts_with_bos(field: Field) -> bool:
    return bool(field("tokenizer.ggml.pre") == "llama-bpe")
