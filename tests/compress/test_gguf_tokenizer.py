"""tokenizer.json made from GGUF metadata encodes as the tokenizer it came from."""

from __future__ import annotations

import json

import pytest
from support.tiny import Tiny
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lowtide.compress.sources.gguf_tokenizer import PRE_TOKENIZERS, merges_from_scores, tokenizer_files
from lowtide.errors import LowtideError

TEXT = (
    "The year 12345 wasn't over; it's 7 o'clock, they'll see 3.14 and x_1=42!\r\n\n"
    "  Trailing   spaces  \nÄrger über Öl: 東京 is far, naïve café — “quoted” 😀 e\u0301\t end"
)
CORPUS = [TEXT, "the quick brown fox jumps over the lazy dog " * 3, "year 12345 year 123 they'll wasn't 東京"]
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def original(pre: str) -> Tokenizer:
    """The tokenizer as its maker configured it, written down a second time."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    elif pre in ("qwen2", "llama-bpe"):
        digits = r"\p{N}" if pre == "qwen2" else r"\p{N}{1,3}"
        split = pre_tokenizers.Split(Regex(CONTRACTIONS + digits + REST), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [byte_level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metadata(tokenizer: Tokenizer, pre: str) -> dict:
    spec = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": [" ".join(m) for m in spec["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
    }


def convert(fields: dict) -> dict[str, bytes]:
    return tokenizer_files(lambda key, default=None: fields.get(key, default), Tiny(vocab=420).config(), "x.gguf")


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_byte_level_bpe(pre):
    tokenizer = original(pre)
    ours = Tokenizer.from_buffer(convert(metadata(tokenizer, pre))["tokenizer.json"])
    assert ours.encode(TEXT).tokens == tokenizer.encode(TEXT).tokens
    assert ours.encode("<|end|>123<|end|>").ids[0] == 0
    text = TEXT if pre != "qwen2" else TEXT.replace("e\u0301", "é")  # NFC
    assert ours.decode(ours.encode(TEXT).ids) == text


def test_pre_tokenizers_differ():
    """So that the test above can tell them apart."""
    same = {pre: tuple(original(pre).pre_tokenizer.pre_tokenize_str(TEXT)) for pre in PRE_TOKENIZERS}
    assert len(set(same.values())) == 4  # default is gpt-2


def test_llama3_takes_whole_words_before_merges():
    fields = metadata(original("llama-bpe"), "llama-bpe")
    fields["tokenizer.ggml.tokens"].append("zqzq")  # no merges lead to it
    fields["tokenizer.ggml.token_type"].append(1)
    ours = Tokenizer.from_buffer(convert(fields)["tokenizer.json"])
    assert ours.encode("zqzq").tokens == ["zqzq"]


def test_unknown_pre_tokenizer_is_named():
    fields = metadata(original("gpt-2"), "tekken")
    with pytest.raises(LowtideError, match="x.gguf: pre-tokenizer 'tekken'.*known: gpt-2, default, smollm, qwen2"):
        convert(fields)


def test_unknown_kind_is_named():
    fields = metadata(original("gpt-2"), "gpt-2") | {"tokenizer.ggml.model": "bert"}
    with pytest.raises(LowtideError, match="type 'bert' is not supported; known: gpt2, llama"):
        convert(fields)


@pytest.mark.parametrize("key, message", [("merges", "no merges"), ("tokens", "tokenizer is missing")])
def test_missing_parts(key, message):
    fields = metadata(original("gpt-2"), "gpt-2")
    del fields[f"tokenizer.ggml.{key}"]
    with pytest.raises(LowtideError, match=message):
        convert(fields)


# SentencePiece-like: pieces with scores, highest first merged
PIECES = ["▁the", "the", "he", "th", "▁t", "▁th", "in", "ing", "▁in", "at", "▁c", "▁cat", "cat"]


def sentencepiece_fields() -> dict:
    characters = [*"▁abcdefghijklmnopqrstuvwxyz.,"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES, *characters]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) + len(characters))
    order = ["▁t", "he", "▁th", "in", "▁the", "at", "▁c", "▁cat", "ing", "th", "the", "▁in", "cat"]
    score = {piece: -float(i) for i, piece in enumerate(order)}
    scores = [score.get(token, -1000.0 if kind == 1 else 0.0) for token, kind in zip(tokens, types, strict=True)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def greedy_merge(text: str, fields: dict) -> list[str]:
    """SentencePiece's BPE as llama.cpp does it: of all adjacent pairs merge the best scored, leftmost first."""
    score = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        best = [(score[a + b], -i) for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False)) if a + b in score]
        if not best:
            return [p for piece in pieces for p in ([piece] if piece in score else byte_tokens(piece))]
        i = -max(best)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def byte_tokens(piece: str) -> list[str]:
    return [f"<0x{b:02X}>" for b in piece.encode()]


@pytest.mark.parametrize("text", ["the cat in the thing", "hating  cats", "a 東 b", "that, then.", "é"])
def test_sentencepiece_bpe(text):
    fields = sentencepiece_fields()
    ours = Tokenizer.from_buffer(convert(fields)["tokenizer.json"])
    assert ours.encode(text).tokens == greedy_merge(text, fields)
    assert ours.decode(ours.encode(text).ids) == text


def test_sentencepiece_without_the_added_space():
    fields = sentencepiece_fields() | {"tokenizer.ggml.add_space_prefix": False}
    ours = Tokenizer.from_buffer(convert(fields)["tokenizer.json"])
    assert ours.encode("the").tokens == ["the"]
    assert ours.decode(ours.encode(" the").ids) == " the"


def test_sentencepiece_needs_scores():
    fields = sentencepiece_fields()
    del fields["tokenizer.ggml.scores"]
    with pytest.raises(LowtideError, match="no scores"):
        convert(fields)


def test_merges_leave_out_control_and_byte_tokens():
    merges = merges_from_scores(["<s>", "<", "s>", "a", "b", "ab"], [0.0, -1, -2, -3, -4, -0.5], [3, 1, 1, 1, 1, 1])
    assert merges == [["a", "b"]]


def test_tokenizer_config():
    fields = sentencepiece_fields() | {"tokenizer.chat_template": "{{ x }}"}
    config = json.loads(convert(fields)["tokenizer_config.json"])
    assert config["add_bos_token"] is True  # what llama-type tokenizers do unless told otherwise
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert config["chat_template"] == "{{ x }}"
    fields["tokenizer.ggml.add_bos_token"] = False
    assert json.loads(convert(fields)["tokenizer_config.json"])["add_bos_token"] is False
    byte_level = json.loads(convert(metadata(original("gpt-2"), "gpt-2"))["tokenizer_config.json"])
    assert byte_level["add_bos_token"] is False
    assert byte_level["eos_token"] == "<|end|>"


def test_special_tokens_are_marked():
    spec = json.loads(convert(sentencepiece_fields())["tokenizer.json"])
    assert [(t["content"], t["special"]) for t in spec["added_tokens"]] == [
        ("<unk>", True),
        ("<s>", True),
        ("</s>", True),
    ]
    fields = sentencepiece_fields()
    fields["tokenizer.ggml.token_type"][-1] = 4  # user-defined
    spec = json.loads(convert(fields)["tokenizer.json"])
    assert spec["added_tokens"][-1]["special"] is False
