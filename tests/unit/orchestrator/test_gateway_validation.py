"""Every bad request is refused with the field, its value and what is allowed."""

import math
import pickle
from typing import Any

import pytest

from orchestrator import errors
from orchestrator.errors import InvalidRequest, PhasewiseOrchestratorError, RequestTooLarge, UnknownModel
from orchestrator.gateway.model_texts import ModelTexts
from orchestrator.gateway.validation import CheckedRequest, check_request
from protos import inference_pb2 as pb
from tests.support.fake_worker import EOS, byte_ids, byte_model
from workers.api import (
    CautiousDecoding,
    DecodingMethod,
    Grammar,
    GrammarKind,
    ModelInfo,
    NgramDrafts,
    SamplingParams,
    SuperposedDecoding,
)

MODEL = byte_model()
TEXTS = ModelTexts(MODEL)


def check(request: pb.GenerateRequest, model: ModelInfo = MODEL) -> CheckedRequest:
    return check_request(
        request, model=model, texts=TEXTS, served_name="tiny", draw_seed=lambda: 0xFEEDFACECAFEBEEF
    )


def of_ids(*ids: int, request_id: str = "", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=request_id, token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(**sampling)
    )


def chat(*roles: str) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role=role, content="x") for role in roles]
    return pb.GenerateRequest(chat=pb.ChatMessages(messages=messages))


def drafts(**given: Any) -> pb.GenerateRequest:
    return of_ids(1, ngram_drafts=pb.NgramDrafts(**given))


def cautious(**given: Any) -> pb.GenerateRequest:
    return of_ids(1, cautious=pb.CautiousDecoding(**given))


def superposed(num_drafts: int, **sampling: Any) -> pb.GenerateRequest:
    return of_ids(1, superposed=pb.SuperposedDecoding(num_drafts=num_drafts), **sampling)


def test_defaults_are_greedy_and_what_is_left_of_the_context() -> None:
    checked = check(of_ids(10, 11), byte_model(max_sequence_tokens=1000))
    assert checked == CheckedRequest(
        checked.request_id,
        (10, 11),
        SamplingParams(510, seed=0xFEEDFACECAFEBEEF, stop_token_ids=frozenset({EOS})),
    )
    assert checked.request_id == "req-feedfacecafebeef"


def test_the_default_length_is_also_bounded_by_the_kv_cache() -> None:
    assert check(of_ids(10, 11)).sampling.max_new_tokens == 254


def test_what_is_given_is_used() -> None:
    request = of_ids(
        10,
        request_id="a~!",
        max_tokens=7,
        temperature=100.0,
        top_p=1e-9,
        seed=2**64 - 1,
        stop_token_ids=[5, 5, 258],
        ignore_eos=True,
    )
    request.model = "tiny"
    assert check(request) == CheckedRequest(
        checked_id := check(request).request_id,
        (10,),
        SamplingParams(7, temperature=100.0, top_p=1e-9, seed=2**64 - 1, stop_token_ids=frozenset({5, 258})),
    )
    assert checked_id == "a~!"
    assert check(of_ids(10, seed=0, max_tokens=1)).sampling.seed == 0


def test_the_model_s_end_tokens_are_added_to_those_given() -> None:
    assert check(of_ids(10, stop_token_ids=[5])).sampling.stop_token_ids == {5, EOS}


def test_as_many_stop_tokens_as_a_worker_takes_are_taken() -> None:
    assert len(check(of_ids(10, stop_token_ids=range(64))).sampling.stop_token_ids) == 64
    request = of_ids(10, stop_token_ids=range(3, 67), ignore_eos=True)
    assert len(check(request).sampling.stop_token_ids) == 64


@pytest.mark.parametrize(
    ("request_", "field", "says"),
    [
        (pb.GenerateRequest(), "prompt", "missing; allowed: one of text, chat and token_ids"),
        (pb.GenerateRequest(text=""), "text", "empty"),
        (of_ids(), "token_ids", "empty"),
        (chat(), "chat.messages", "empty"),
        (chat("user", "tool"), "chat.messages[1].role", "'tool'; allowed: system, user, assistant"),
        (chat("user", "User"), "chat.messages[1].role", "'User'"),
        (of_ids(*[9] * 512), "token_ids", "512 tokens; allowed: at most 511, since the context holds 512"),
        (pb.GenerateRequest(text="a" * 600), "text", "600 tokens; allowed: at most 511"),
        (of_ids(5, -1), "token_ids.ids[1]", "-1; allowed: 0 to 258"),
        (of_ids(259), "token_ids.ids[0]", "259; allowed: 0 to 258"),
        (of_ids(1, max_tokens=0), "sampling.max_tokens", "0; allowed: 1 or more"),
        (of_ids(1, max_tokens=-(2**63)), "sampling.max_tokens", "-9223372036854775808"),
        (
            of_ids(1, 1, max_tokens=2**63 - 1),
            "sampling.max_tokens",
            "9223372036854775807; allowed: 1 to 510, what the prompt of 2 tokens leaves of the context of 512",
        ),
        (of_ids(1, temperature=math.nan), "sampling.temperature", "nan; allowed: 0 to 100"),
        (of_ids(1, temperature=-0.1), "sampling.temperature", "-0.1"),
        (of_ids(1, temperature=100.5), "sampling.temperature", "100.5"),
        (of_ids(1, temperature=math.inf), "sampling.temperature", "inf"),
        (of_ids(1, top_p=0.0), "sampling.top_p", "0; allowed: above 0, up to 1"),
        (of_ids(1, top_p=1.01), "sampling.top_p", "1.01"),
        (of_ids(1, top_p=math.nan), "sampling.top_p", "nan"),
        (of_ids(1, stop_token_ids=range(65)), "sampling.stop_token_ids", "65 ids; allowed: at most 64"),
        (
            of_ids(1, stop_token_ids=range(3, 67)),
            "sampling.stop_token_ids",
            "64 ids; allowed: at most 64, the model's end tokens included: [2]",
        ),
        (of_ids(1, stop_token_ids=[4, 999]), "sampling.stop_token_ids[1]", "999; allowed: 0 to 258"),
        (of_ids(1, top_k=-1), "sampling.top_k", "-1; allowed: 1 or more, or 0 for all tokens"),
        (of_ids(1, min_p=1.5), "sampling.min_p", "1.5; allowed: 0 to 1"),
        (of_ids(1, min_p=math.nan), "sampling.min_p", "nan"),
        (of_ids(1, repetition_penalty=0), "sampling.repetition_penalty", "0; allowed: above 0, up to 10"),
        (of_ids(1, min_tokens=1, regex="a+"), "sampling.min_tokens", "set together with a grammar"),
        (of_ids(1, presence_penalty=2.5), "sampling.presence_penalty", "2.5; allowed: -2 to 2"),
        (of_ids(1, frequency_penalty=math.nan), "sampling.frequency_penalty", "nan; allowed: -2 to 2"),
        (of_ids(1, logit_bias={3: 100.5}), "sampling.logit_bias[3]", "100.5; allowed: -100 to 100"),
        (of_ids(1, logit_bias={3: -math.inf}), "sampling.logit_bias[3]", "-inf"),
        (of_ids(1, logit_bias={259: 1}), "sampling.logit_bias", "for token 259; allowed: tokens 0 to 258"),
        (of_ids(1, logit_bias={-1: 1}), "sampling.logit_bias", "for token -1; allowed: tokens 0 to 258"),
        (
            of_ids(1, logit_bias=dict.fromkeys(range(1025), 1.0)),
            "sampling.logit_bias",
            "of 1025 tokens; allowed: at most 1024",
        ),
        (
            of_ids(1, max_tokens=4, min_tokens=5),
            "sampling.min_tokens",
            "5; allowed: 0 to 4, which is max_tokens",
        ),
        (
            of_ids(1, min_tokens=300),
            "sampling.min_tokens",
            "300; allowed: at most 255, what a prompt of 1 tokens leaves",
        ),
        (of_ids(1, n=0), "sampling.n", "0; allowed: 1 to 16"),
        (of_ids(1, n=17), "sampling.n", "17; allowed: 1 to 16"),
        (of_ids(1, stop=["a"] * 17), "sampling.stop", "17 texts; allowed: at most 16"),
        (of_ids(1, stop=["a", ""]), "sampling.stop[1]", "0 characters long; allowed: 1 to 256 characters"),
        (of_ids(1, stop=["a" * 257]), "sampling.stop[0]", "257 characters long"),
        (of_ids(1, logprobs=21), "sampling.logprobs", "21; allowed: 0 to 20"),
        (of_ids(1, logprobs=-1), "sampling.logprobs", "-1; allowed: 0 to 20"),
        (of_ids(1, prompt_logprobs=21), "sampling.prompt_logprobs", "21; allowed: 0 to 20"),
        (of_ids(1, json_schema=""), "sampling.json_schema", "empty; allowed: a text"),
        (of_ids(1, json_schema="{"), "sampling.json_schema", "'{'; allowed: JSON: Expecting property name"),
        (
            of_ids(1, json_schema="[1]"),
            "sampling.json_schema",
            "'[1]'; allowed: a JSON object, true or false",
        ),
        (of_ids(1, json_schema="[" * 60_000), "sampling.json_schema", "'[["),
        (of_ids(1, regex=" "), "sampling.regex", "empty"),
        (of_ids(1, regex="a" * 65537), "sampling.regex", "65537 characters long; allowed: at most 65536"),
        (of_ids(1, ebnf=""), "sampling.ebnf", "empty"),
        (
            of_ids(1, choice=pb.Choices()),
            "sampling.choice",
            "'[]'; allowed: one or more texts, none of them empty",
        ),
        (
            of_ids(1, choice=pb.Choices(texts=["a", ""])),
            "sampling.choice",
            '\'["a", ""]\'; allowed: one or more',
        ),
        (drafts(max_draft_tokens=0), "sampling.ngram_drafts.max_draft_tokens", "0; allowed: 1 to 63"),
        (cautious(max_branches=1), "sampling.cautious.max_branches", "1; allowed: 2 to 32"),
        (cautious(max_branch_tokens=0), "sampling.cautious.max_branch_tokens", "0; allowed: 1 to 256"),
        (cautious(min_entropy=-1), "sampling.cautious.min_entropy", "-1; allowed: 0 nats or more"),
        (
            cautious(min_entropy=2),
            "sampling.cautious.max_entropy",
            "1.5; allowed: above min_entropy, which is 2",
        ),
        (cautious(max_entropy=math.inf), "sampling.cautious.max_entropy", "inf"),
        (superposed(17), "sampling.superposed.num_drafts", "17; allowed: 1 to 16"),
        (superposed(2, n=2), "sampling.n", "2 together with superposed; allowed: 1"),
        (
            pb.GenerateRequest(text="a", cache_salt="x" * 257),
            "cache_salt",
            "257 characters long; allowed: at most 256",
        ),
        (of_ids(1, request_id="x" * 129), "request_id", "129 characters long"),
        (of_ids(1, request_id="a b"), "request_id", "'a b'; allowed: visible ASCII"),
        (of_ids(1, request_id="ä\n"), "request_id", r"'\xe4\n'"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_what_is_allowed(
    request_: pb.GenerateRequest, field: str, says: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(request_)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} is {says}")


SCHEMA = '{"type": "object"}'
PENALTIES: list[tuple[str, Any]] = [
    ("repetition_penalty", 1.1),
    ("presence_penalty", 0.5),
    ("frequency_penalty", -0.5),
]
CONFLICTS: dict[str, list[tuple[str, Any]]] = {
    "ngram_drafts": [("json_schema", SCHEMA), ("regex", "a"), ("logprobs", 0), *PENALTIES],
    "cautious": [("ebnf", "root ::= 'a'"), ("choice", pb.Choices(texts=["a"])), ("logprobs", 1)],
    "superposed": [
        ("json_schema", SCHEMA),
        ("logprobs", 0),
        ("prompt_logprobs", 0),
        ("stop", ["a"]),
        ("temperature", 0.5),
        ("logit_bias", {1: 1.0}),
        ("min_tokens", 1),
        *PENALTIES,
    ],
}
METHODS = {
    "ngram_drafts": pb.NgramDrafts(),
    "cautious": pb.CautiousDecoding(),
    "superposed": pb.SuperposedDecoding(),
}


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [(method, field, value) for method, pairs in CONFLICTS.items() for field, value in pairs],
)
def test_what_a_decoding_method_cannot_honour_is_refused(method: str, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(of_ids(1, **{method: METHODS[method], field: value}))
    assert str(caught.value) == f"sampling.{field} is set together with {method}; allowed: one of the two"
    check(of_ids(1, **{field: value}))


def test_decoding_methods_go_with_what_they_can_honour() -> None:
    bias = {1: 1.0}
    check(of_ids(1, ngram_drafts=pb.NgramDrafts(), n=4, stop=["a"], temperature=1, logit_bias=bias))
    check(of_ids(1, cautious=pb.CautiousDecoding(), n=4, stop=["a"], temperature=1, presence_penalty=1))
    check(of_ids(1, superposed=pb.SuperposedDecoding(), temperature=0))


def test_every_option_but_grammar_and_method_is_taken_over() -> None:
    request = of_ids(
        10,
        max_tokens=7,
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={9: -100.0, 3: 5.0},
        seed=1,
        min_tokens=2,
        n=3,
        stop=["END", "\n\n"],
        logprobs=0,
        prompt_logprobs=20,
    )
    request.priority = -5
    request.cache_salt = "tenant"
    checked = check(request)
    assert checked.sampling == SamplingParams(
        7,
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        logit_bias=((3, 5.0), (9, -100.0)),
        seed=1,
        min_new_tokens=2,
        stop_token_ids=frozenset({EOS}),
        num_logprobs=0,
        num_prompt_logprobs=20,
    )
    assert (checked.num_samples, checked.stop_strings) == (3, ("END", "\n\n"))
    assert (checked.priority, checked.cache_salt, checked.is_chat) == (-5, "tenant", False)


def test_samples_have_seeds_of_their_own_and_the_prompt_is_scored_once() -> None:
    samplings = check(of_ids(1, n=3, seed=2**64 - 1, prompt_logprobs=2)).samplings()
    assert [sampling.seed for sampling in samplings] == [
        2**64 - 1,
        0x9E3779B97F4A7C14,
        0x3C6EF372FE94F829,
    ]
    assert [sampling.num_prompt_logprobs for sampling in samplings] == [2, None, None]


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ({"json_schema": SCHEMA}, Grammar(GrammarKind.JSON_SCHEMA, SCHEMA)),
        ({"regex": "a+"}, Grammar(GrammarKind.REGEX, "a+")),
        ({"ebnf": "root ::= 'a'"}, Grammar(GrammarKind.EBNF, "root ::= 'a'")),
        ({}, None),
    ],
)
def test_a_grammar_has_its_kind(given: dict[str, str], grammar: Grammar | None) -> None:
    assert check(of_ids(1, **given)).sampling.grammar == grammar


@pytest.mark.parametrize(
    ("request_", "decoding"),
    [
        (drafts(), NgramDrafts()),
        (drafts(max_draft_tokens=3), NgramDrafts(3)),
        (cautious(), CautiousDecoding()),
        (
            cautious(max_branches=4, min_entropy=0, max_entropy=3, max_branch_tokens=9),
            CautiousDecoding(4, 0.0, 3.0, 9),
        ),
        (of_ids(1, superposed=pb.SuperposedDecoding()), SuperposedDecoding()),
        (superposed(5), SuperposedDecoding(5)),
        (of_ids(1), None),
    ],
)
def test_a_decoding_method_has_what_is_given_and_defaults_for_the_rest(
    request_: pb.GenerateRequest, decoding: DecodingMethod | None
) -> None:
    assert check(request_).sampling.decoding == decoding


def test_another_model_is_not_found_and_the_served_one_is_named() -> None:
    request = of_ids(1)
    request.model = "gpt-7"
    with pytest.raises(UnknownModel, match="'gpt-7'; served is 'tiny'"):
        check(request)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "num_tokens"), [(256, None, 257), (300, 1, 301), (250, 7, 257)]
)
def test_what_no_kv_cache_can_hold_is_refused_with_the_numbers(
    num_prompt_tokens: int, max_tokens: int | None, num_tokens: int
) -> None:
    request = of_ids(*[9] * num_prompt_tokens)
    if max_tokens is not None:
        request.sampling.max_tokens = max_tokens
    with pytest.raises(RequestTooLarge) as caught:
        check(request)
    error = caught.value
    assert (error.num_prompt_tokens, error.num_tokens, error.max_sequence_tokens) == (
        num_prompt_tokens,
        num_tokens,
        256,
    )


def test_a_request_that_just_fits_is_taken() -> None:
    assert check(of_ids(*[9] * 250, max_tokens=6)).sampling.max_new_tokens == 6
    assert check(of_ids(*[9] * 255)).sampling.max_new_tokens == 1


def test_tokens_that_are_no_utf_8_are_a_prompt_like_any_other() -> None:
    continuation = byte_ids("世")[1:]
    assert check(of_ids(*continuation)).prompt_ids == tuple(continuation)


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("f", "v", "a"),
        UnknownModel("a", "b"),
        RequestTooLarge(1, 2, 3),
        errors.DuplicateRequest("r"),
        errors.AddressInUse("a:1", "k"),
        errors.AddressUnusable("a:1", "k", "p"),
        errors.GatewayFull(3),
        errors.ImagesFull(1, 2, 3),
        errors.MessageTooLarge(1, 2),
        errors.GatewayStopping(),
        errors.NoModelYet("d"),
        errors.ControllerSuperseded(3),
        errors.UnusableModel("p"),
    ],
)
def test_errors_survive_pickling(error: PhasewiseOrchestratorError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
