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
from workers.api import ModelInfo, SamplingParams

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


def test_defaults_are_greedy_and_what_is_left_of_the_context() -> None:
    checked = check(of_ids(10, 11), byte_model(max_sequence_tokens=1000))
    assert checked == CheckedRequest(
        checked.request_id,
        (10, 11),
        SamplingParams(510, 0.0, 1.0, 0xFEEDFACECAFEBEEF, frozenset({EOS})),
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
        SamplingParams(7, 100.0, 1e-9, 2**64 - 1, frozenset({5, 258})),
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
