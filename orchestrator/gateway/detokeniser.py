"""Tokens to text as they are generated: whole characters only, up to a stop string. Pure.

`TokenTexts` knows what the tokens of a model stand for, a `Detokenizer` turns those of one sample into text, and
a `TextStream` is a detokenizer that also looks for stop strings. The pieces of text make together exactly what
decoding all tokens at once makes, however the tokens are batched. The work per token is constant.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from tokenizers import Tokenizer

from orchestrator.errors import UnusableModel
from orchestrator.gateway.stop_strings import StopSearch, StopStrings

#: Decoders of the `tokenizers` library that we follow, as the names of their steps.
_BYTE_LEVEL = re.compile(r"ByteLevel ")
_SENTENCE_PIECE = re.compile(r"(Replace )*(ByteFallback )?(Fuse (Strip )?)?")
_SUPPORTED = "'ByteLevel', and 'Replace', 'ByteFallback', 'Fuse', 'Strip' in this order"
#: A table has a place for each id; more is damage, and would take gigabytes.
MAX_TOKEN_ID = 2**24
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Delta:
    """What some tokens add to the text of a sample.

    stop: the stop string that ended the text; it is not part of it, nor is anything after it.
    num_tokens: tokens of those pushed that were looked at, the one that completed the stop string included.
    """

    text: str
    stop: str | None = None
    num_tokens: int = 0


class Detokenizer(Protocol):
    """Text of one growing sequence of tokens."""

    def push(self, token_ids: Iterable[int]) -> str:
        """What these tokens add, in whole characters; the rest is kept for later."""

    def flush(self) -> str:
        """The sequence is over: what was kept, with U+FFFD for bytes that are no character."""


class TextStream:
    """The text of one sample, up to its first stop string.

    min_tokens: a stop string that is complete before that many tokens is text like any other.
    Which stop string wins: see `StopSearch`.
    """

    def __init__(
        self, detokenizer: Detokenizer, stops: StopStrings | None = None, *, min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._search = StopSearch(stops) if stops is not None else None
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._is_over = False

    def push(self, token_ids: Sequence[int]) -> Delta:
        """What these tokens add. After a stop string, or `finish`, nothing may be pushed."""
        assert not self._is_over
        if self._search is None:
            return Delta(self._detokenizer.push(token_ids), num_tokens=len(token_ids))
        texts: list[str] = []
        # One by one, to know which token completed the stop string.
        for num_tokens, token_id in enumerate(token_ids, 1):
            self._num_tokens += 1
            piece = self._detokenizer.push((token_id,))
            if piece:
                text, stop = self._search.push(piece, can_stop=self._num_tokens >= self._min_tokens)
                texts.append(text)
                if stop is not None:
                    self._is_over = True
                    return Delta("".join(texts), stop, num_tokens)
        return Delta("".join(texts), num_tokens=len(token_ids))

    def finish(self) -> Delta:
        """No token comes any more: the rest of the text. What was kept may still complete a stop string."""
        assert not self._is_over
        self._is_over = True
        rest = self._detokenizer.flush()
        if self._search is None:
            return Delta(rest)
        text, stop = self._search.push(rest, can_stop=self._num_tokens >= self._min_tokens)
        return Delta(text, stop) if stop is not None else Delta(text + self._search.finish())


class TokenTexts:
    """What each token of one model stands for. May be used from any thread.

    Raises UnusableModel when the tokenizer's decoder is none that we follow.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        steps = _decoder_steps(tokenizer)
        kinds = "".join(f"{step.get('type')} " for step in steps)
        is_byte_level = _BYTE_LEVEL.fullmatch(kinds) is not None
        if not is_byte_level and not (steps and _SENTENCE_PIECE.fullmatch(kinds)):
            raise _unusable(kinds)
        texts = _token_texts(tokenizer)
        self._bytes = _bytes_of(texts) if is_byte_level else None
        self._pieces = [] if is_byte_level else _pieces_of(texts, steps)
        self._strip = _strip_of(steps)

    def detokenizer(self, *, is_continuation: bool = False) -> Detokenizer:
        """For the output of one sample.

        is_continuation: the output goes on from a text, so it keeps the space that begins it; else that goes,
        where the tokenizer says so, as when the output alone is decoded.
        """
        if self._bytes is not None:
            return _ByteLevelDetokenizer(self._bytes)
        return _SentencePieceDetokenizer(self._pieces, *(("", 0) if is_continuation else self._strip))


class _ByteLevelDetokenizer:
    """Tokens are bytes; those that cannot be UTF-8 become U+FFFD."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        #: Bytes that may begin a character: at most three.
        self._rest = b""

    def push(self, token_ids: Iterable[int]) -> str:
        table = self._token_bytes
        # A model's vocabulary may be padded beyond its tokenizer's.
        raw = self._rest + b"".join([table[i] for i in token_ids if i < len(table)])
        text, num_decoded = codecs.utf_8_decode(raw, "replace", False)
        self._rest = raw[num_decoded:]
        return text

    def flush(self) -> str:
        rest, self._rest = self._rest, b""
        return rest.decode(errors="replace")


class _SentencePieceDetokenizer:
    """Tokens are text, or one byte each; the first characters of all may be cut.

    A run of byte tokens is kept until it ends: when any of it is not UTF-8, each of its bytes is U+FFFD.
    """

    def __init__(self, pieces: Sequence[str | int | None], cut: str, max_cut: int) -> None:
        self._pieces = pieces
        self._cut = cut
        self._num_to_cut = max_cut
        self._run = bytearray()

    def push(self, token_ids: Iterable[int]) -> str:
        table, run = self._pieces, self._run
        texts: list[str] = []
        for token_id in token_ids:
            piece = table[token_id] if token_id < len(table) else None
            if isinstance(piece, int):
                run.append(piece)
            elif piece is not None:
                if run:
                    texts.append(self._end_run())
                texts.append(piece)
        return self._without_cut("".join(texts))

    def flush(self) -> str:
        return self._without_cut(self._end_run())

    def _end_run(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = "\ufffd" * len(self._run)
        self._run.clear()
        return text

    def _without_cut(self, text: str) -> str:
        if not self._num_to_cut or not text:
            return text
        num_cut = 0
        while num_cut < min(self._num_to_cut, len(text)) and text[num_cut] == self._cut:
            num_cut += 1
        # Only what begins the whole text is cut.
        self._num_to_cut = self._num_to_cut - num_cut if num_cut == len(text) else 0
        return text[num_cut:]


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    return steps


def _unusable(kind: str) -> UnusableModel:
    return UnusableModel(f"its tokenizer decodes by {kind.strip()!r}; supported: {_SUPPORTED}")


def _token_texts(tokenizer: Tokenizer) -> list[str | None]:
    """Each token as the vocabulary writes it, by id; None for special tokens and ids that are no token."""
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    highest = max(vocabulary.values(), default=-1)
    if highest > MAX_TOKEN_ID:
        raise UnusableModel(
            f"its tokenizer has a token with id {highest}; at most {MAX_TOKEN_ID} is possible"
        )
    texts: list[str | None] = [None] * (highest + 1)
    for token, token_id in vocabulary.items():
        if token_id not in special:
            texts[token_id] = token
    return texts


def _bytes_of(texts: Iterable[str | None]) -> list[bytes]:
    byte_of = _byte_of_character()
    table: list[bytes] = []
    for text in texts:
        try:
            table.append(bytes([byte_of[character] for character in text or ""]))
        except KeyError:
            # An added token, written as the text that it is.
            table.append((text or "").encode())
    return table


@cache
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable bytes of Latin-1 stand for themselves, others from U+0100 on.

    Source: GPT-2's bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _pieces_of(texts: Iterable[str | None], steps: Iterable[dict[str, Any]]) -> list[str | int | None]:
    """Texts after replacement; a byte token as its byte."""
    replacements: list[tuple[str, str]] = []
    has_byte_tokens = False
    for step in steps:
        if step["type"] == "Replace":
            if "String" not in step["pattern"]:
                raise _unusable("Replace with a regular expression")
            replacements.append((step["pattern"]["String"], step["content"]))
        has_byte_tokens = has_byte_tokens or step["type"] == "ByteFallback"
    pieces: list[str | int | None] = []
    for text in texts:
        piece = text
        if piece is not None:
            for old, new in replacements:
                piece = piece.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(piece) if has_byte_tokens and piece is not None else None
        pieces.append(int(byte[1], 16) if byte else piece)
    return pieces


def _strip_of(steps: Iterable[dict[str, Any]]) -> tuple[str, int]:
    """The character that is cut at the beginning of a text, and how often at most."""
    for step in steps:
        if step["type"] == "Strip":
            if step["stop"]:
                raise _unusable("Strip at the end")
            return step["content"], step["start"]
    return "", 0
