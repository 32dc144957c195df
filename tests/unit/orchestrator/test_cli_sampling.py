"""The sampling arguments of `phasewise generate` and `chat`, and how several samples, logprobs and drafts look."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import exit_codes
from orchestrator.cli.main import main
from protos import inference_pb2 as pb
from tests.support.fake_gateway import FakeGateway, messages, running

SCHEMA = '{"type": "object"}'


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with running(FakeGateway()) as fake:
        yield fake


def sample(index: int, *texts: str, finish: pb.FinishReason.ValueType, is_last: bool) -> list[Any]:
    """The messages of one sample of several."""
    found = messages(*texts, finish_reason=finish)
    for message in found:
        message.sample_index = index
    if not is_last:
        found[-1].ClearField("usage")
    return found


def token(token_id: int, text: str, logprob: float, rank: int, *top: tuple[str, float]) -> pb.TokenLogprobs:
    likeliest = [pb.TokenLogprob(token_id=9, text=text, logprob=logprob) for text, logprob in top]
    return pb.TokenLogprobs(token_id=token_id, text=text, logprob=logprob, rank=rank, top=likeliest)


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (["--temperature", "0.8"], {"temperature": 0.8}),
        (["--top-k", "40"], {"top_k": 40}),
        (["--top-p", "0.9"], {"top_p": 0.9}),
        (["--min-p", "0.1"], {"min_p": 0.1}),
        (["--repetition-penalty", "1.1"], {"repetition_penalty": 1.1}),
        (["--presence-penalty", "-0.5"], {"presence_penalty": -0.5}),
        (["--frequency-penalty", "0.5"], {"frequency_penalty": 0.5}),
        (["--logit-bias", "5=-100", "--logit-bias", "7=1.5"], {"logit_bias": {5: -100.0, 7: 1.5}}),
        (["--min-tokens", "3"], {"min_tokens": 3}),
        (["--n", "1"], {"n": 1}),
        (["--stop", "END", "--stop", "\n\n"], {"stop": ["END", "\n\n"]}),
        (["--logprobs", "0", "--prompt-logprobs", "5"], {"logprobs": 0, "prompt_logprobs": 5}),
        (["--json-schema", SCHEMA], {"json_schema": SCHEMA}),
        (["--regex", "[a-z]+"], {"regex": "[a-z]+"}),
        (["--choice", "ja", "--choice", "nein"], {"choice": pb.Choices(texts=["ja", "nein"])}),
        (["--ngram-drafts"], {"ngram_drafts": pb.NgramDrafts()}),
        (["--cautious"], {"cautious": pb.CautiousDecoding()}),
        (["--superposed", "4"], {"superposed": pb.SuperposedDecoding(num_drafts=4)}),
    ],
)
def test_an_option_is_sent_as_it_was_given(
    gateway: FakeGateway, verb: str, given: list[str], sent: dict[str, Any]
) -> None:
    assert main([verb, "x", "--max-tokens", "8", "--address", gateway.address, *given]) == exit_codes.OK
    assert gateway.requests[0].sampling == pb.SamplingParams(max_tokens=8, **sent)


def test_priority_and_salt_are_the_request_s(gateway: FakeGateway) -> None:
    arguments = ["generate", "x", "--priority", "-3", "--cache-salt", "me", "--address", gateway.address]
    assert main(arguments) == exit_codes.OK
    assert (gateway.requests[0].priority, gateway.requests[0].cache_salt) == (-3, "me")


@pytest.mark.parametrize(("flag", "field"), [("--json-schema", "json_schema"), ("--grammar", "ebnf")])
def test_a_schema_or_grammar_may_be_in_a_file(
    gateway: FakeGateway, tmp_path: Path, flag: str, field: str
) -> None:
    file = tmp_path / "form.txt"
    file.write_text('{"title": "ä"}\n')
    assert main(["generate", "x", flag, str(file), "--address", gateway.address]) == exit_codes.OK
    assert getattr(gateway.requests[0].sampling, field) == '{"title": "ä"}\n'


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--top-kk", "3"], "unrecognized arguments: --top-kk"),
        (["--stpo", "x"], "unrecognized arguments: --stpo"),
        (["--top-k", "many"], "argument --top-k: invalid whole number, 0 or more value: 'many'"),
        (["--top-k", "-1"], "argument --top-k: invalid whole number, 0 or more value: '-1'"),
        (["--top-k", str(2**31)], "argument --top-k: invalid whole number, 0 or more"),
        (["--min-p", "low"], "argument --min-p: invalid float value: 'low'"),
        (["--logit-bias", "5"], "argument --logit-bias: invalid ID=BIAS value: '5'"),
        (["--logit-bias", "a=1"], "argument --logit-bias: invalid ID=BIAS value: 'a=1'"),
        (["--min-tokens", "-1"], "argument --min-tokens: invalid whole number, 0 or more value: '-1'"),
        (["--n", "0"], "argument --n: invalid whole number, 1 or more value: '0'"),
        (["--max-tokens", str(10**30)], "argument --max-tokens: invalid whole number, 1 or more"),
        (["--stop", "\udcff"], "argument --stop: invalid UTF-8 text value"),
        (["--logprobs", "x"], "argument --logprobs: invalid whole number, 0 or more value: 'x'"),
        (["--json-schema", "/no/such/file"], "'/no/such/file' cannot be read: No such file or directory"),
        (["--grammar", "/"], "argument --grammar: '/' cannot be read: Is a directory"),
        (["--regex", "a", "--choice", "b"], "argument --choice: not allowed with argument --regex"),
        (["--cautious", "--superposed", "2"], "argument --superposed: not allowed with argument --cautious"),
        (["--superposed", "0"], "argument --superposed: invalid whole number, 1 or more value: '0'"),
        (["--priority", str(2**31)], "argument --priority: invalid whole number of 32 bits value"),
    ],
)
def test_a_wrong_option_is_named(
    verb: str, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "x", *given])
    assert caught.value.code == exit_codes.USAGE
    assert said in capsys.readouterr().err


def test_several_samples_are_printed_one_after_the_other(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sample(0, "Par", "is", finish=pb.FINISH_REASON_STOP, is_last=False)
    second = sample(1, "Ly", "on\n", finish=pb.FINISH_REASON_LENGTH, is_last=True)
    gateway.answer = [first[0], second[0], first[1], second[1]]
    assert main(["generate", "x", "--n", "2", "--address", gateway.address]) == exit_codes.OK
    assert capsys.readouterr() == ("[sample 0]\nParis\n[sample 1]\nLyon\n", "")
    assert main(["generate", "x", "--n", "2", "--timeline", "--address", gateway.address]) == exit_codes.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("[sample 0]") == lines.count("[sample 1]") == 2
    assert "end          by an end token" in lines
    assert "tokens       37 in the prompt, 2 generated; ended by the length limit" in lines


def test_samples_that_break_off_are_a_failure(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.answer = sample(0, "Paris", finish=pb.FINISH_REASON_STOP, is_last=False)
    assert main(["generate", "x", "--n", "2", "--address", gateway.address]) == exit_codes.FAILURE
    out, err = capsys.readouterr()
    assert out == "[sample 0]\nParis\n"
    assert "it is not complete" in err


def test_logprobs_are_a_table_after_the_text(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.answer = messages("Paris", ".")
    gateway.answer[0].prompt_logprobs.append(token(4, " is", -1.0, 2))
    gateway.answer[0].logprobs.append(token(100, " Paris", -0.25, 1, (" Paris", -0.25), (" a", -2.0)))
    gateway.answer[1].logprobs.append(token(101, ".", -0.125, 1))
    assert main(["generate", "x", "--logprobs", "2", "--address", gateway.address]) == exit_codes.OK
    assert capsys.readouterr().out.splitlines() == [
        "Paris.",
        "",
        "prompt        id  logprob    rank",
        "' is'          4   -1.000       2",
        "",
        "generated        id  logprob    rank",
        "' Paris'        100   -0.250       1  ' Paris' -0.250  ' a' -2.000",
        "'.'             101   -0.125       1",
    ]


def test_drafts_are_printed_with_their_logprobs_and_chat_goes_on_from_the_first(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.answer = messages("", finish_reason=pb.FINISH_REASON_LENGTH)
    for text, logprob in (("Paris", -0.5), ("Lyon", -2.25)):
        gateway.answer[0].drafts.add(text=text, token_ids=[1], logprob=logprob)
    assert main(["chat", "x", "--superposed", "2", "--address", gateway.address]) == exit_codes.OK
    assert capsys.readouterr() == ("[draft 0, logprob -0.50]\nParis\n[draft 1, logprob -2.25]\nLyon\n", "")


def test_json_has_everything_of_a_message(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.answer = messages("Paris")
    last = gateway.answer[0]
    last.sample_index = 1
    last.logprobs.append(token(100, "Paris", -0.25, 1, ("Paris", -0.25)))
    last.prompt_logprobs.append(token(4, " is", -1.0, 2))
    last.drafts.add(token_ids=[1, 2], text="ab", logprob=-0.5)
    last.stop_text = "END"
    last.usage.cached_tokens = 16
    last.usage.fetched_tokens, last.usage.reused_tokens = 12, 7
    last.usage.decoding.CopyFrom(pb.DecodingCost(num_steps=3, num_rows=9, num_tokens=6))
    assert main(["generate", "x", "--json", "--address", gateway.address]) == exit_codes.OK
    found = json.loads(capsys.readouterr().out)
    # Every field of the message is there.
    assert set(found) == set(pb.GenerateResponse.DESCRIPTOR.fields_by_name)
    assert found["sample_index"] == 1
    assert found["logprobs"] == [
        {
            "token_id": 100,
            "logprob": -0.25,
            "rank": 1,
            "text": "Paris",
            "top": [{"token_id": 9, "logprob": -0.25, "text": "Paris"}],
        }
    ]
    assert found["prompt_logprobs"] == [{"token_id": 4, "logprob": -1.0, "rank": 2, "text": " is"}]
    assert found["drafts"] == [{"token_ids": [1, 2], "text": "ab", "logprob": -0.5}]
    assert found["stop_text"] == "END"
    assert found["usage"] == {
        "prompt_tokens": 37,
        "completion_tokens": 1,
        "cached_tokens": 16,
        "fetched_tokens": 12,
        "reused_tokens": 7,
        "image_tokens": 0,
        "decoding": {"num_steps": 3, "num_rows": 9, "num_tokens": 6},
    }


def test_the_timeline_says_what_was_cached_what_stopped_it_and_what_decoding_cost(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    last = gateway.answer[-1]
    last.stop_text = "END"
    last.usage.cached_tokens = 16
    last.usage.decoding.CopyFrom(pb.DecodingCost(num_steps=3, num_rows=9, num_tokens=6))
    assert main(["generate", "x", "--timeline", "--address", gateway.address]) == exit_codes.OK
    lines = capsys.readouterr().out.splitlines()
    assert "tokens       37 in the prompt (16 cached), 2 generated; ended by the stop text 'END'" in lines
    assert "decoding     6 tokens in 3 steps, 1.50 rows a token" in lines
