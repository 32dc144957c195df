"""Text to tokens and back, as the served model does it."""

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from orchestrator.errors import InvalidRequest, UnusableModel
from workers.api import ModelInfo


class ModelTexts:
    """Tokenizer and chat template of one model. Its methods may be called from any thread.

    Raises UnusableModel when the tokenizer cannot be read, or is none of bytes.
    """

    def __init__(self, model: ModelInfo) -> None:
        self._tokenizer = _tokenizer(model.tokenizer_json)
        self._bytes = _token_bytes(self._tokenizer)
        self._special_tokens = {"bos_token": model.bos_token, "eos_token": model.eos_token}
        self._template: jinja2.Template | None = None
        self._template_problem = "the model has no chat template"
        if model.chat_template:
            try:
                self._template = _environment().from_string(model.chat_template)
            except jinja2.TemplateError as error:
                self._template_problem = f"the model's chat template cannot be read: {error}"

    @property
    def has_chat_template(self) -> bool:
        """Chat messages can be rendered."""
        return self._template is not None

    def encode(self, text: str, *, is_rendered: bool = False) -> list[int]:
        """Token ids of a text. is_rendered: it comes from the chat template, with all special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=not is_rendered).ids

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt up to where the answer begins; each message has role and content.

        Raises InvalidRequest when there is no template, or it refuses these messages.
        """
        if self._template is None:
            raise InvalidRequest("chat", "given", f"text or token_ids: {self._template_problem}")
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:  # templates come with the model and raise what they like
            problem = f"messages that the model's chat template takes: {error}"
            raise InvalidRequest("chat.messages", f"refused ({len(messages)} of them)", problem) from error

    def detokenizer(self) -> "Detokenizer":
        """For the output of one request."""
        return Detokenizer(self._bytes)


class Detokenizer:
    """Text of a growing token sequence, in pieces that are whole characters. Constant work per token.

    Bytes that cannot be UTF-8 become U+FFFD, as they do when all tokens are decoded at once.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """What these tokens add; bytes of an incomplete character are kept for later."""
        table = self._token_bytes
        # A model's vocabulary may be padded beyond its tokenizer's.
        return self._decoder.decode(b"".join([table[i] for i in token_ids if i < len(table)]))

    def flush(self) -> str:
        """The text is over: what is left of an incomplete character."""
        return self._decoder.decode(b"", final=True)


def _tokenizer(tokenizer_json: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        decoder = json.loads(tokenizer_json).get("decoder") or {}
    except Exception as error:  # the library raises plain Exception
        raise UnusableModel(f"its tokenizer cannot be read: {error}") from error
    if decoder.get("type") != "ByteLevel":
        raise UnusableModel(f"its tokenizer decodes by {decoder.get('type')!r}; supported: 'ByteLevel'")
    return tokenizer


def _token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """What each token stands for, by id; nothing for special tokens."""
    byte_of = _byte_of_character()
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token_id not in special:
            try:
                table[token_id] = bytes([byte_of[character] for character in token])
            except KeyError:
                # An added token, written as the text that it is.
                table[token_id] = token.encode()
    return table


@cache
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable bytes of Latin-1 stand for themselves, others from U+0100 on.

    Source: GPT-2's bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates are written for."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
