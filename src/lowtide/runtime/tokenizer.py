"""Text to token ids and back, with a streaming decoder that never emits half a character."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

from lowtide.errors import LowtideError

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level vocabulary: printable bytes stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(rest)}


class Tokenizer:
    """A `tokenizer.json` (tokenizers library) with what `tokenizer_config.json` says about special tokens."""

    def __init__(
        self, tokenizer_json: bytes, config_json: bytes | None = None, bos_token_id: int | None = None
    ) -> None:
        """
        Args:
            tokenizer_json: contents of `tokenizer.json`.
            config_json: contents of `tokenizer_config.json`, if there is one.
            bos_token_id: the model's begin-of-sequence token: prepended where the config asks for it,
                and standing in for an empty prompt.

        Raises:
            LowtideError: one of the files is not what it says, or decodes in a way we do not know.
        """
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(tokenizer_json.decode())
            # The file itself is not parsed a second time: its vocabulary is most of it, and of what a start takes.
            added = self._backend.get_added_tokens_decoder()
            decoder = self._backend.decoder
            steps = None if decoder is None else json.loads(decoder.__getstate__())
        except Exception as error:  # the library raises plain Exception for every fault of the file
            raise LowtideError(f"tokenizer.json: the tokenizers library does not read it ({error})") from error
        self.config = _config(config_json)
        self._special = {token for token, entry in added.items() if entry.special}
        self._added = {token: entry.content for token, entry in added.items()}
        self._steps = _decoder_steps(steps)
        self._alphabet = byte_level_alphabet()
        self._bos = bos_token_id

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`.

        With `special` the tokenizer's own template and `add_bos_token` apply, and text without any
        token becomes the begin-of-sequence token. A chat template writes its special tokens
        itself: pass special=False.
        """
        ids = list(self._backend.encode(text, add_special_tokens=special).ids)
        wants_bos = special and (self.config.get("add_bos_token") or not ids)
        if wants_bos and self._bos is not None and ids[:1] != [self._bos]:
            ids.insert(0, self._bos)
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for, possibly part of a character; b"" for special and unknown ids."""
        if token in self._special:
            return b""
        if token in self._added:
            return self._added[token].encode()
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if "ByteLevel" in self._steps:
            if all(c in self._alphabet for c in piece):
                return bytes(self._alphabet[c] for c in piece)
            return piece.encode()
        if "ByteFallback" in self._steps and (byte := _BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        if self._steps & {"Metaspace", "Replace"}:
            piece = piece.replace("\u2581", " ")
        return piece.encode()

    def decode(self, ids: list[int]) -> str:
        """Text of whole sequences of ids; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")

    def stream(self) -> TokenStream:
        """A fresh streaming decoder."""
        return TokenStream(self)


class TokenStream:
    """Decodes one token at a time; the bytes of an unfinished character wait for the next token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Text that this token completes; may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))


def _config(raw: bytes | None) -> dict[str, Any]:
    if raw is None:
        return {}
    try:
        config = json.loads(raw)
    except ValueError as error:
        raise LowtideError(f"tokenizer_config.json: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise LowtideError("tokenizer_config.json: must hold one JSON object")
    return config


def _decoder_steps(decoder: dict[str, Any] | None) -> set[str]:
    """The kinds of steps of `tokenizer.json`'s decoder, all of them known here.

    Two families: tokens that spell bytes (ByteLevel, as GPT-2 has them), and tokens that spell text, with U+2581
    for a space (Metaspace or Replace) and <0xNN> for single bytes (ByteFallback), as SentencePiece has them.
    """
    steps = (decoder or {}).get("decoders", [decoder or {}])
    kinds = {str(step.get("type")) for step in steps}
    if odd := sorted(kinds - {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}):
        raise LowtideError(f"tokenizer.json: decoder {odd[0]} is not supported; use a byte-level or SentencePiece one")
    return kinds
