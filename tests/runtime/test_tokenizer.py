"""The tokenizer against the tokenizers library, and the stream against half characters."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import make_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from lowtide.errors import LowtideError
from lowtide.runtime.tokenizer import Tokenizer, byte_level_alphabet

NASTY = "naïve ☃ 😀 日本語\n\ttab  two spaces"


def byte_level() -> bytes:
    """A byte-level tokenizer without merges: every token is one byte, so every character above ASCII is split."""
    vocab = {char: i for i, char in enumerate(byte_level_alphabet())}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return backend.to_str().encode()


def sentencepiece() -> bytes:
    """A SentencePiece-like tokenizer: U+2581 for spaces, <0xNN> where the vocabulary has no letter."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    model = models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(t, special=True) for t in pieces[:3]])
    return backend.to_str().encode()


@pytest.fixture(params=[byte_level, sentencepiece])
def raw(request) -> bytes:
    return request.param()


def test_encode_and_decode_agree_with_the_library(raw):
    ours, backend = Tokenizer(raw), Backend.from_str(raw.decode())
    ids = ours.encode(NASTY)
    assert ids == backend.encode(NASTY).ids
    assert len(ids) > len(NASTY)
    assert ours.decode(ids) == backend.decode(ids) == NASTY


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_a_stream_emits_whole_characters_and_loses_none(text):
    for raw in (byte_level(), sentencepiece()):
        tokenizer = Tokenizer(raw)
        stream = tokenizer.stream()
        pieces = [stream.push(i) for i in tokenizer.encode(text)]
        assert "".join(pieces) == text
        emitted = ""
        for piece in pieces:
            emitted += piece
            assert text.startswith(emitted)


def test_an_unfinished_character_waits_and_never_comes_out_broken():
    tokenizer = Tokenizer(byte_level())
    stream = tokenizer.stream()
    ids = tokenizer.encode("😀")
    assert [stream.push(i) for i in ids[:-1]] == ["", "", ""]
    assert stream.push(ids[-1]) == "😀"


def test_invalid_bytes_become_the_replacement_character():
    tokenizer = Tokenizer(byte_level())
    stream = tokenizer.stream()
    (lone,) = (i for i in range(256) if tokenizer.token_bytes(i) == b"\xe2")
    (letter,) = tokenizer.encode("a")
    assert stream.push(lone) + stream.push(letter) == "\ufffda"


def test_special_and_unknown_ids_are_silent():
    tokenizer = Tokenizer(byte_level())
    end = tokenizer.encode("<|end|>")
    assert len(end) == 1
    assert tokenizer.decode(end) == ""
    assert tokenizer.token_bytes(10**6) == b""


def test_bos_is_prepended_only_where_asked_for():
    raw = make_tokenizer(130)["tokenizer.json"]
    asks = json.dumps({"add_bos_token": True}).encode()
    assert Tokenizer(raw, asks, bos_token_id=1).encode("hi")[0] == 1
    assert Tokenizer(raw, asks, bos_token_id=1).encode("<s>hi").count(1) == 1
    assert 1 not in Tokenizer(raw, asks, bos_token_id=1).encode("hi", special=False)
    assert 1 not in Tokenizer(raw, None, bos_token_id=1).encode("hi")
    assert Tokenizer(raw, None, bos_token_id=1).encode("") == [1]
    assert Tokenizer(raw, None, bos_token_id=None).encode("") == []


@pytest.mark.parametrize("broken", [b"", b"{}", b"not json", b"\xff\xfe", b'{"model": 1}'])
def test_a_broken_tokenizer_is_one_clear_line(broken):
    with pytest.raises(LowtideError, match=r"^tokenizer\.json: .*read it"):
        Tokenizer(broken)


@pytest.mark.parametrize("broken", [b"{", b"[1]", b"3"])
def test_a_broken_config_is_one_clear_line(broken):
    with pytest.raises(LowtideError, match=r"^tokenizer_config\.json: "):
        Tokenizer(byte_level(), broken)


def test_an_unknown_decoder_is_refused_by_name():
    spec = json.loads(byte_level())
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(LowtideError, match="decoder WordPiece is not supported"):
        Tokenizer(json.dumps(spec).encode())
