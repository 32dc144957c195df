"""Text under a grammar is in its language, whatever the model wants; the state follows from the tokens."""

import json
import re
from threading import Event
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.grammar_world import EOS, OTHER_STOP, compiler_of, random_text, shared_compiler, text_of
from workers.api import Grammar, GrammarKind
from workers.engine import grammar as grammar_module
from workers.engine.grammar import CLOSING_TOKENS, GrammarState
from workers.errors import InvalidGrammar

KINDS = ("level", "fallback")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", None]}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "ok"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "v": {"type": "number"},
                "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["v", "kids"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


def schema_of(schema: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def regex_of(text: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, text)


def encode(kind: str, text: str) -> list[int]:
    return shared_compiler(kind)[0].encode(text).ids


def start(grammar: Grammar, kind: str = "level", max_new_tokens: int = 1000, **kwargs: Any) -> GrammarState:
    return shared_compiler(kind)[1].compile(grammar).start(max_new_tokens=max_new_tokens, **kwargs)


def allowed(state: GrammarState, kind: str = "level") -> set[int]:
    vocab_size = shared_compiler(kind)[0].get_vocab_size() + 5
    row = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    state.fill(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
                  st.integers(-50, 50), st.integers(0, 100)),
        st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 8)),
        st.builds(lambda texts: {"enum": texts},
                  st.lists(st.text(alphabet="abé\"\\ {", max_size=4), min_size=1, max_size=4, unique=True)),
    )  # fmt: skip

    def grow(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        arrays = st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most},
                           inner, st.integers(0, 2))  # fmt: skip
        return st.one_of(arrays, st.dictionaries(st.text("xyzé", min_size=1, max_size=3), inner, max_size=3).map(
            lambda fields: {"type": "object", "properties": fields, "required": sorted(fields),
                            "additionalProperties": False}))  # fmt: skip

    return st.recursive(leaves, grow, max_leaves=4)


def instance(schema: dict[str, Any], draw: Any) -> Any:
    """A value that the schema allows."""
    if "enum" in schema:
        return draw(st.sampled_from(schema["enum"]))
    match schema["type"]:
        case "boolean":
            return draw(st.booleans())
        case "null":
            return None
        case "integer":
            return draw(st.integers(schema["minimum"], schema["maximum"]))
        case "string":
            return draw(st.text(st.characters(codec="utf-8"), max_size=schema["maxLength"]))
        case "array":
            return [instance(schema["items"], draw) for _ in range(draw(st.integers(0, schema["maxItems"])))]
        case _:
            return {key: instance(value, draw) for key, value in schema["properties"].items()}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(schema=schemas(), data=st.data())
def test_every_instance_of_a_schema_is_accepted(kind: str, schema: dict[str, Any], data: Any) -> None:
    value = instance(schema, data.draw)
    # The library writes characters below 32 as it likes them: short escapes, \u for the rest.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    token_ids = encode(kind, text)
    if text_of(kind, token_ids) != text.encode():
        return  # the tokenizer itself changes this text
    state = start(schema_of(schema), kind)
    assert state.accept(token_ids) == len(token_ids), text
    assert state.is_complete


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(schema=schemas(), seed=st.integers(0, 2**32), eos_bias=st.sampled_from([0.0, 50.0]))
def test_random_logits_under_a_schema_give_an_instance(
    kind: str, schema: dict[str, Any], seed: int, eos_bias: float
) -> None:
    text, state, _tokens = random_text(
        kind, schema_of(schema), seed=seed, max_new_tokens=400, eos_bias=eos_bias
    )
    assert state.is_complete
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pattern",
    [
        r"[A-Z]{2}-\d{3}(?: (?:north|süd))?",
        r"^(?:yes|no|日本)$",
        r"(?:\+\d{2} )?[0-9]{3,5}/x\\y",
        r"é{1,3}😀",
        r"[^\n]{0,20}\nAnswer: -?[0-9]{1,3}",
    ],
)
def test_random_logits_under_a_regex_match_it(kind: str, pattern: str) -> None:
    for seed in range(15):
        text, _state, _tokens = random_text(kind, regex_of(pattern), seed=seed, max_new_tokens=100)
        assert re.fullmatch(pattern, text.decode(), re.ASCII), text


@pytest.mark.parametrize("kind", KINDS)
def test_random_logits_under_choices_give_one_of_them(kind: str) -> None:
    choices = ["yes", "yes, but", "no (never)", 'q"{}|*\\', "日本\nline", "é"]
    grammar = Grammar(GrammarKind.CHOICE, json.dumps(choices))
    texts = {random_text(kind, grammar, seed=seed, max_new_tokens=60)[0].decode() for seed in range(40)}
    assert texts <= set(choices)
    assert len(texts) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_random_logits_under_a_context_free_grammar_are_in_its_language(kind: str) -> None:
    grammar = Grammar(GrammarKind.EBNF, 'start: sum\nsum: NUM | "(" sum "+" sum ")"\nNUM: /[1-9][0-9]?/')
    for seed in range(15):
        text, state, _tokens = random_text(kind, grammar, seed=seed, max_new_tokens=80)
        assert state.is_complete
        assert re.fullmatch(r"[0-9()+]+", text.decode())
        assert eval(text) > 0


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32), cut=st.floats(0, 1), max_new_tokens=st.sampled_from([70, 300]))
def test_replayed_rolled_back_and_forked_states_are_equal(
    kind: str, seed: int, cut: float, max_new_tokens: int
) -> None:
    grammar = schema_of(PERSON)
    _text, state, token_ids = random_text(kind, grammar, seed=seed, max_new_tokens=max_new_tokens)
    middle = int(cut * len(token_ids))
    replayed = start(grammar, kind, max_new_tokens=max_new_tokens)
    assert replayed.accept(token_ids[:middle]) == middle
    state.rollback(len(token_ids) - middle)
    fork = replayed.fork()
    assert allowed(state, kind) == allowed(replayed, kind) == allowed(fork, kind)
    assert state.num_tokens == replayed.num_tokens == middle
    for token_id in sorted(allowed(state, kind))[:5]:
        assert state.settle(token_id) == replayed.settle(token_id) == fork.settle(token_id)
    assert fork.accept(token_ids[middle:]) == len(token_ids) - middle
    assert replayed.num_tokens == middle
    assert allowed(replayed, kind) == allowed(state, kind)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32), cut=st.floats(0, 1))
def test_a_continuation_elsewhere_writes_the_same_text(seed: int, cut: float) -> None:
    grammar = schema_of(TREE)
    _text, _state, token_ids = random_text("level", grammar, seed=seed, max_new_tokens=90)
    middle = int(cut * len(token_ids))
    there = start(grammar, max_new_tokens=90)
    assert there.accept(token_ids[:middle]) == middle
    for token_id in token_ids[middle:]:
        assert there.settle(token_id) == token_id
        assert there.accept([token_id]) == 1


def test_a_token_that_does_not_fit_is_not_taken() -> None:
    state = start(regex_of("ab{2}c"))
    token_ids = encode("level", "a") + encode("level", "b")
    assert state.accept([*token_ids, *encode("level", "x")]) == 2
    assert state.problem is None
    assert state.accept(encode("level", "b")) == 1
    assert not state.is_complete
    assert state.accept([EOS]) == 0


def test_stop_tokens_are_allowed_where_the_text_is_complete_only() -> None:
    state = start(regex_of("ab?"), stop_token_ids=frozenset({OTHER_STOP}))
    assert not allowed(state) & {EOS, OTHER_STOP}
    state.accept(encode("level", "a"))
    assert allowed(state) & {EOS, OTHER_STOP} == {OTHER_STOP}
    assert not state.must_stop
    assert state.accept([OTHER_STOP]) == 1
    assert state.must_stop
    assert state.accept(encode("level", "b")) == 0
    state.rollback(1)
    assert not state.must_stop
    assert state.accept(encode("level", "b")) == 1
    assert state.must_stop


def test_a_text_token_as_stop_token_ends_complete_text_only() -> None:
    (stop,) = encode("level", "b")
    state = start(regex_of("ab*"), stop_token_ids=frozenset({stop}))
    assert stop not in allowed(state)
    state.accept(encode("level", "a"))
    assert stop in allowed(state)


def test_a_state_with_only_stop_left_must_stop() -> None:
    state = start(Grammar(GrammarKind.CHOICE, '["true", "tr"]'))
    state.accept(encode("level", "tr"))
    assert state.is_complete
    assert not state.must_stop
    state.accept(encode("level", "ue"))
    assert state.must_stop


def test_ids_past_the_tokenizer_are_never_allowed() -> None:
    vocab_size = shared_compiler("level")[0].get_vocab_size()
    assert max(allowed(start(regex_of(r"(?s:.*)")))) < vocab_size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_new_tokens", [30, 50, CLOSING_TOKENS, 100])
def test_text_is_complete_within_a_short_budget(kind: str, max_new_tokens: int) -> None:
    free_text = {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": {"type": "string"}}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    for seed in range(10):
        text, state, token_ids = random_text(
            kind, schema_of(free_text), seed=seed, max_new_tokens=max_new_tokens
        )
        assert len(token_ids) <= max_new_tokens
        assert state.is_complete
        jsonschema.validate(json.loads(text), free_text)


def test_a_tree_that_would_grow_on_is_closed() -> None:
    for seed in range(5):
        text, _state, _tokens = random_text("level", schema_of(TREE), seed=seed, max_new_tokens=120)
        jsonschema.validate(json.loads(text), TREE)


def test_without_room_for_any_completion_the_text_stays_open() -> None:
    _text, state, token_ids = random_text("level", schema_of(PERSON), seed=1, max_new_tokens=10)
    assert len(token_ids) == 10
    assert not state.is_complete
    assert state.problem is None


def test_far_from_the_end_every_token_is_settled_as_it_is() -> None:
    state = start(schema_of(TREE))
    assert all(state.settle(token_id) == token_id for token_id in allowed(state))


INVALID = [
    (GrammarKind.REGEX, "(abc", "unclosed group"),
    (GrammarKind.REGEX, "a(?=b)", "look-ahead"),
    (GrammarKind.REGEX, "", "no text but the empty one"),
    (GrammarKind.JSON_SCHEMA, '{"type":\n "integer"', "line 2, column 11"),
    (GrammarKind.JSON_SCHEMA, "[]", "is not a JSON object"),
    (GrammarKind.JSON_SCHEMA, "false", "is not a JSON object"),
    (GrammarKind.JSON_SCHEMA, '{"type":"strin"}', "Invalid type: strin"),
    (GrammarKind.JSON_SCHEMA, '{"not":{"type":"string"}}', '"not"'),
    (GrammarKind.JSON_SCHEMA, '{"not":{},"x-guidance":{"lenient":true}}', '"not"'),
    (GrammarKind.JSON_SCHEMA, '{"type":"integer","minimum":5,"maximum":3}', "minimum (5)"),
    (GrammarKind.JSON_SCHEMA, '{"$ref":"#"}', ""),
    (GrammarKind.JSON_SCHEMA, '{"$ref":"http://127.0.0.1:1/s"}', "http://127.0.0.1:1/s"),
    (GrammarKind.EBNF, 'start: "a" foo', 'unknown name: "foo"'),
    (GrammarKind.EBNF, 'root: "a"', "no start rule"),
    (GrammarKind.CHOICE, "[]", "1 to 10000"),
    (GrammarKind.CHOICE, '["a", ""]', "not empty"),
    (GrammarKind.CHOICE, '{"a": 1}', "JSON array"),
    (GrammarKind.CHOICE, "yes", "is not JSON: line 1"),
    (GrammarKind.CHOICE, '["\\ud800"]', "surrogates not allowed"),
    (GrammarKind.REGEX, "a\\", "ends with a backslash"),
    (GrammarKind.JSON_SCHEMA, '{"const":"\\ud800"}', "end of hex escape"),
    (GrammarKind.JSON_SCHEMA, '{"minimum":NaN}', "expected value"),
    (GrammarKind.JSON_SCHEMA, '{"minimum":1e400}', "expected value"),
    (GrammarKind.JSON_SCHEMA, '{"items":' * 400 + "{}" + "}" * 400, "recursion limit"),
]


@pytest.mark.parametrize(("kind", "text", "reason"), INVALID)
def test_an_invalid_grammar_says_what_is_wrong(kind: GrammarKind, text: str, reason: str) -> None:
    with pytest.raises(InvalidGrammar) as caught:
        shared_compiler("level")[1].compile(Grammar(kind, text))
    assert caught.value.kind == kind.value
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def nasty() -> dict[str, Grammar]:
    deep = '{"items":' * 20_000 + "{}" + "}" * 20_000
    enum = {"enum": [f"value {i} " * 2 for i in range(8_000)]}
    return {
        "nested repetition": regex_of("((((a{1,100}){1,100}){1,100}){1,100}){1,100}"),
        "exponential automaton": regex_of("(.*a.{30})+"),
        "many states": regex_of(r"\p{L}{1,3000}\w{1,3000}"),
        "long": regex_of(r"[^\n]{1,100000}"),
        "many alternatives": regex_of("|".join(f"word{i}[a-z]*{i}" for i in range(3000))),
        "deep schema": Grammar(GrammarKind.JSON_SCHEMA, deep),
        "wide schema": schema_of({"type": "object", "properties": {f"p{i}": {} for i in range(2000)}}),
        "product of arrays": schema_of(
            {"type": "array", "maxItems": 1000, "items": {"type": "array", "maxItems": 1000, "items": {}}}
        ),
        "product of alternatives": schema_of(
            {"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {}}} for i in range(6)]} for j in range(8)]}
        ),
        "large enum": schema_of(enum),
        "multiple": schema_of({"type": "integer", "multipleOf": 99991, "minimum": 0, "maximum": 10**12}),
        "mutual": schema_of({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                             "$ref": "#/$defs/a"}),
        "left recursion": Grammar(GrammarKind.EBNF, 'start: start start | "a" | start'),
    }  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", sorted(nasty()))
def test_a_hostile_grammar_is_refused_or_fails_its_own_request(name: str) -> None:
    grammar = nasty()[name]
    compiler = shared_compiler("level")[1]
    try:
        state = compiler.compile(grammar).start(max_new_tokens=80)
    except InvalidGrammar:
        return
    rng = np.random.default_rng(0)
    while state.num_tokens < 80 and not state.must_stop:
        token_ids = allowed(state)
        if state.problem is not None:
            break
        if state.accept([state.settle(int(rng.choice(sorted(token_ids))))]) == 0:
            break
    if state.problem is not None:
        assert state.problem.startswith("grammar: after ")
        assert allowed(state) == set()
        assert not state.is_complete


def test_a_state_that_met_a_limit_allows_nothing_and_has_its_grammar_compiled_anew() -> None:
    compiler = shared_compiler("level")[1]
    grammar = regex_of("[0-9]{1,5}")
    compiled = compiler.compile(grammar)
    state = compiled.start(max_new_tokens=100)
    state._fail("too many states")
    assert allowed(state) == set()
    assert state.accept(encode("level", "0")) == 0
    assert compiler.compile(grammar) is not compiled


def test_grammars_are_compiled_once_and_the_oldest_are_forgotten() -> None:
    compiler = shared_compiler("level")[1]
    first = compiler.compile(regex_of("first"))
    assert compiler.compile_soon(regex_of("first")).result() is first
    for number in range(grammar_module.MAX_CACHED_GRAMMARS):
        compiler.compile(regex_of(f"other{number}"))
    assert compiler.compile(regex_of("first")) is not first
    assert len(compiler._cache) == grammar_module.MAX_CACHED_GRAMMARS


def test_a_grammar_that_is_needed_now_does_not_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = compiler_of(shared_compiler("level")[0])
    began, may_end = Event(), Event()
    real = compiler._compile

    def slow(grammar: Grammar) -> grammar_module.CompiledGrammar:
        if grammar.text == "slow":
            began.set()
            assert may_end.wait(10)
        return real(grammar)

    monkeypatch.setattr(compiler, "_compile", slow)
    waiting = compiler.compile_soon(regex_of("slow"))
    assert began.wait(10)
    behind = compiler.compile_soon(regex_of("now"))
    now = compiler.compile(regex_of("now"))
    assert not waiting.done()
    assert not behind.done()
    assert compiler.compile(regex_of("now")) is now
    may_end.set()
    waiting.result(10)
    compiler.close()


def test_a_tokenizer_that_cannot_be_read_refuses_grammars() -> None:
    compiler = grammar_module.GrammarCompiler(b'{"model": {"type": "WordLevel"}}', 10, [0])
    try:
        with pytest.raises(InvalidGrammar, match="tokenizer"):
            compiler.compile(regex_of("a"))
    finally:
        compiler.close()
