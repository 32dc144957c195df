"""Requests with a grammar through the gateway, with real workers: what comes is valid, and what is wrong is said."""

import asyncio
import json
import re
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from protos import inference_pb2 as pb
from tests.support.both_shapes import Served, both_shapes, random_prompt, request_of, together
from tests.support.gateway import error_of, text_of
from tests.support.waiting import until
from workers.api import Grammar
from workers.engine.grammar import CompiledGrammar, GrammarCompiler

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")

PROMPT = random_prompt(40)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
CITIES = ["Paris", "Panama", "Genf", "Zürich, am See"]
SUM = """\
start: sum
sum: NUMBER | "(" sum "+" sum ")"
NUMBER: /[1-9][0-9]{0,3}/
"""


def _is_object(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


def _is_date(text: str) -> None:
    assert re.fullmatch(DATE, text)


def _is_city(text: str) -> None:
    assert text in CITIES


def _is_sum(text: str) -> None:
    while "(" in text:
        shorter = re.sub(r"\(\d+\+\d+\)", "1", text)
        assert shorter != text, text
        text = shorter
    assert re.fullmatch(r"[1-9][0-9]{0,3}", text)


GRAMMARS: dict[str, tuple[dict[str, Any], Any]] = {
    "json_schema": ({"json_schema": json.dumps(SCHEMA)}, _is_object),
    "regex": ({"regex": DATE}, _is_date),
    "choice": ({"choice": pb.Choices(texts=CITIES)}, _is_city),
    "ebnf": ({"ebnf": SUM}, _is_sum),
}
WAYS = [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 1.0, "seed": 6, "repetition_penalty": 1.3}]


def test_text_under_each_grammar_is_valid_and_the_same_on_both_shapes(model_path: Path) -> None:
    cases = [(grammar, check, way) for grammar, check in GRAMMARS.values() for way in WAYS]
    requests = [request_of(PROMPT, 120, ignore_eos=False, **grammar, **way) for grammar, _, way in cases]

    async def scenario() -> None:
        async with both_shapes(model_path) as shapes:
            answers = [await it.ask_all(requests) for it in shapes]
            for (_, check, _), one, two in zip(cases, *answers, strict=True):
                check(text_of(one))
                assert text_of(one) == text_of(two)
                assert one[-1].finish_reason == two[-1].finish_reason == pb.FINISH_REASON_STOP

    asyncio.run(scenario())


def test_text_under_a_grammar_is_complete_when_its_tokens_are_used_up(model_path: Path) -> None:
    grammar, check = GRAMMARS["json_schema"]

    async def scenario() -> None:
        async with both_shapes(model_path) as shapes:
            for it in shapes:
                check(text_of(await it.ask(request_of(PROMPT, 45, ignore_eos=False, **grammar))))

    asyncio.run(scenario())


#: What is sent, and what the message says of it.
WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no JSON": ({"json_schema": "{"}, ("sampling.json_schema", "JSON")),
    "no schema": ({"json_schema": "[1]"}, ("sampling.json_schema", "a JSON object")),
    "unknown type": ({"json_schema": '{"type": "text"}'}, ("json_schema", "text")),
    "unsupported keyword": ({"json_schema": '{"not": {"type": "null"}}'}, ("json_schema", "not")),
    "no regex": ({"regex": "(a"}, ("regex",)),
    "look-ahead": ({"regex": "(?=a)a"}, ("regex",)),
    "no rule": ({"ebnf": 'start: "a" other'}, ("ebnf", "other")),
    "no start": ({"ebnf": 'begin: "a"'}, ("ebnf", "start")),
    "no texts": ({"choice": pb.Choices()}, ("sampling.choice",)),
    "with drafts": ({"regex": "a", "ngram_drafts": pb.NgramDrafts()}, ("sampling.regex", "ngram_drafts")),
}


def test_a_grammar_that_is_wrong_is_an_invalid_argument_that_says_what(model_path: Path) -> None:
    async def check(it: Served, given: dict[str, Any], said: tuple[str, ...]) -> None:
        code, message = await error_of(it.gateway.client.Generate(request_of(PROMPT, **given)))
        assert code == "INVALID_ARGUMENT", message
        for part in said:
            assert part in message

    async def scenario() -> None:
        async with both_shapes(model_path) as shapes:
            for it in shapes:
                for given, said in WRONG.values():
                    await check(it, given, said)
                assert await it.text(request_of(PROMPT, regex="ab")) == "ab"

    asyncio.run(scenario())


class CompileGate:
    """Holds the compilation of every grammar until `open`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_reached = 0
        self._opened = threading.Event()
        compile_ = GrammarCompiler._compile

        def gated(compiler: GrammarCompiler, grammar: Grammar) -> CompiledGrammar:
            self.num_reached += 1
            assert self._opened.wait(30)
            return compile_(compiler, grammar)

        monkeypatch.setattr(GrammarCompiler, "_compile", gated)

    def open(self) -> None:
        self._opened.set()


@pytest.mark.parametrize("ends_by", ["abort", "leaving"])
def test_a_request_may_end_while_its_grammar_is_compiled(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, ends_by: str
) -> None:
    gate = CompileGate(monkeypatch)

    async def check(it: Served) -> None:
        before = gate.num_reached
        request = request_of(PROMPT, regex="ab")
        request.request_id = "held"
        call = it.gateway.client.Generate(request)
        reading = asyncio.create_task(error_of(call)) if ends_by == "abort" else None
        await until(lambda: gate.num_reached > before, "the compiler")
        # Others go on.
        assert len(await it.tokens(request_of(PROMPT, 8))) == 8
        if reading is not None:
            assert (await it.gateway.client.Abort(pb.AbortRequest(request_id="held"))).found
            assert (await reading)[0] == "CANCELLED"
        else:
            call.cancel()
        await until(lambda: not it.gateway.dispatcher._requests, "the end of the request")

    async def scenario() -> None:
        async with together(model_path) as it:
            await check(it)
            gate.open()
            assert await it.text(request_of(PROMPT, regex="ab")) == "ab"

    try:
        asyncio.run(scenario())
    finally:
        gate.open()
