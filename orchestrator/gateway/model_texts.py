"""Text to tokens and back, as the served model does it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from orchestrator.errors import InvalidRequest, UnusableModel
from orchestrator.gateway.detokeniser import TextStream, TokenTexts
from orchestrator.gateway.stop_strings import StopStrings
from workers.api import ModelInfo
from workers.model.vision.config import read_vision_json


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message: texts in order, with None where there is a picture."""

    role: str
    parts: tuple[str | None, ...]


class ModelTexts:
    """Tokenizer and chat template of one model. Its methods may be called from any thread.

    Raises UnusableModel when the tokenizer cannot be read, or decodes in a way that we do not follow.
    """

    def __init__(self, model: ModelInfo) -> None:
        self._tokenizer = _tokenizer(model.tokenizer_json)
        self._token_texts = TokenTexts(self._tokenizer)
        self._special_tokens = {"bos_token": model.bos_token, "eos_token": model.eos_token}
        self._template: jinja2.Template | None = None
        self._template_problem = "the model has no chat template"
        #: What stands for a picture in a text; empty when the model takes none.
        self._placeholder = read_vision_json(model.vision_json).placeholder if model.vision_json else ""
        #: The template goes through texts and pictures itself.
        self._has_parts = bool(self._placeholder) and "image" in model.chat_template
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

    def render_chat(self, messages: Sequence[ChatTurn]) -> str:
        """The prompt up to where the answer begins, with the model's placeholder for each picture.

        Raises InvalidRequest when there is no template, or it refuses these messages.
        """
        if self._template is None:
            raise InvalidRequest("chat", "given", f"text or token_ids: {self._template_problem}")
        try:
            # A template may tell what is None from what is not there, and expects these to be there.
            return self._template.render(
                messages=[{"role": turn.role, "content": self._content(turn)} for turn in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except Exception as error:  # templates come with the model and raise what they like
            problem = f"messages that the model's chat template takes: {error}"
            raise InvalidRequest("chat.messages", f"refused ({len(messages)} of them)", problem) from error

    def _content(self, turn: ChatTurn) -> str | list[dict[str, str]]:
        """Of one message, as the template expects it."""
        if not self._has_parts:
            return "".join(self._placeholder if part is None else part for part in turn.parts)
        return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts]

    def text_stream(
        self, stops: StopStrings | None = None, *, min_tokens: int = 0, is_continuation: bool = False
    ) -> TextStream:
        """For the output of one sample; see `TextStream` and `TokenTexts.detokenizer`."""
        detokenizer = self._token_texts.detokenizer(is_continuation=is_continuation)
        return TextStream(detokenizer, stops, min_tokens=min_tokens)

    def token_text(self, token_id: int) -> str:
        """What one token alone stands for, with U+FFFD for bytes of an incomplete character."""
        detokenizer = self._token_texts.detokenizer(is_continuation=True)
        return detokenizer.push((token_id,)) + detokenizer.flush()


def _tokenizer(tokenizer_json: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    except Exception as error:  # the library raises plain Exception
        raise UnusableModel(f"its tokenizer cannot be read: {error}") from error
    # What the model was trained with may be there still, and would cut or fill up prompts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class _Generation(Extension):
    """`{% generation %}`, with which templates mark answers for training: what is in it stays as it is."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> list[Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates are written for."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(form: str) -> str:
        return datetime.now().astimezone().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
