"""`phasewise generate` and `phasewise chat` against a gateway in this process."""

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from orchestrator.cli import exit_codes, target
from orchestrator.cli.main import main
from orchestrator.runtime.registry import Registry, RunningDeployment
from protos import inference_pb2 as pb
from tests.support.fake_gateway import FakeGateway, messages, running

WAIT_S = 20.0


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return Registry()


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with running(FakeGateway()) as fake:
        yield fake


def register(registry: Registry, name: str, address: str) -> None:
    registry.save(RunningDeployment(name, address, address, "127.0.0.1:6379", None, None))


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_generate_streams_the_text_of_the_only_deployment(
    gateway: FakeGateway, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    register(registry, "laptop", gateway.address)
    assert main(["generate", "The capital is", "--max-tokens", "16", "--seed", "7"]) == exit_codes.OK
    assert capsys.readouterr() == ("Paris.\n", "")
    sampling = pb.SamplingParams(max_tokens=16, seed=7)
    assert gateway.requests == [pb.GenerateRequest(text="The capital is", sampling=sampling)]


def test_generate_passes_every_sampling_argument(gateway: FakeGateway) -> None:
    numbers = ["--temperature", "0.8", "--top-p", "0.9"]
    ends = ["--stop-token-id", "2", "--stop-token-id", "3", "--ignore-eos"]
    assert main(["generate", "--token-ids", "1,2,3", "--address", gateway.address, *numbers, *ends]) == 0
    sampling = pb.SamplingParams(
        max_tokens=128, temperature=0.8, top_p=0.9, stop_token_ids=[2, 3], ignore_eos=True
    )
    assert gateway.requests == [pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 3]), sampling=sampling)]


def test_generate_reads_its_prompt_from_stdin_as_it_is(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, "two\nlines, é\n".encode())
    assert main(["generate", "-", "--address", gateway.address]) == exit_codes.OK
    assert gateway.requests[0].text == "two\nlines, é\n"


def test_generate_refuses_what_is_no_text(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(monkeypatch, b"\xff")
    assert main(["generate", "-", "--address", gateway.address]) == exit_codes.USAGE
    assert "stdin is not valid UTF-8" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["generate", "\udcff", "--address", gateway.address])
    assert caught.value.code == exit_codes.USAGE
    assert gateway.requests == []


def test_generate_prints_one_json_object_for_each_message(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "x", "--json", "--address", gateway.address]) == exit_codes.OK
    first, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == {
        "request_id": "r-1",
        "sample_index": 0,
        "first_token_index": 0,
        "token_ids": [100],
        "text_delta": "Paris",
    }
    assert last["finish_reason"] == "stop"
    assert last["usage"] == {
        "prompt_tokens": 37,
        "completion_tokens": 2,
        "cached_tokens": 0,
        "fetched_tokens": 0,
        "reused_tokens": 0,
        "image_tokens": 0,
    }
    assert last["timings"]["tpot_s"] == 0.066
    assert last["timings"]["kv_transfer"]["num_bytes"] == 37 * 46080


def test_the_timeline_follows_the_text(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--timeline", "--address", gateway.address]) == exit_codes.OK
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["Paris.", ""]
    assert out[-1] == "workers      prefill on prefill-0, decode on decode-0"


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize(
    ("status", "exit_code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, exit_codes.FAILURE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, exit_codes.FAILURE),
        (grpc.StatusCode.UNAVAILABLE, exit_codes.UNREACHABLE),
    ],
)
def test_a_refusal_is_one_line_and_an_exit_code(
    gateway: FakeGateway,
    verb: str,
    status: grpc.StatusCode,
    exit_code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gateway.answer = []
    gateway.status = (status, "no worker\nserves it")
    assert main([verb, "x", "--address", gateway.address]) == exit_code
    assert capsys.readouterr() == ("", f"{status.name}: no worker serves it\n")


def test_an_answer_that_breaks_off_is_a_failure(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.answer = messages("Par", "is")[:1]
    assert main(["generate", "x", "--address", gateway.address]) == exit_codes.FAILURE
    assert capsys.readouterr() == (
        "Par\n",
        f"{gateway.address} ended the answer without saying why; it is not complete\n",
    )


def test_the_deadline_of_the_caller_ends_the_request(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.goes_on = True
    arguments = ["generate", "x", "--timeout-s", "0.2", "--address", gateway.address]
    assert main(arguments) == exit_codes.FAILURE
    assert capsys.readouterr().err == "DEADLINE_EXCEEDED: the gateway had not ended its answer in time\n"
    assert gateway.was_cancelled.wait(WAIT_S)


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_ctrl_c_cancels_the_request(
    gateway: FakeGateway, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.goes_on = True
    gateway.on_going_on = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert main([verb, "x", "--address", gateway.address]) == exit_codes.INTERRUPTED
    assert gateway.was_cancelled.wait(WAIT_S)
    out, err = capsys.readouterr()
    assert err == "interrupted\n"
    assert out in ("", "Paris\n", "Paris.\n")  # as much as had come


def test_no_gateway_at_the_address_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    # Nothing can listen on port 0.
    assert main(["generate", "x", "--address", "127.0.0.1:0"]) == exit_codes.UNREACHABLE
    assert capsys.readouterr().err == (
        "no gateway answers at 127.0.0.1:0: Connection refused; `phasewise status` shows what runs\n"
    )


def test_a_gateway_that_goes_in_the_middle_is_not_called_absent() -> None:
    nothing = grpc.aio.Metadata()
    gone = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, nothing, nothing, details="Stream removed (Socket closed)"
    )
    assert target.describe("h:1", gone) == "the connection to the gateway at h:1 was lost: Socket closed"


def test_what_is_no_gateway_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with_nothing = grpc.server(None, handlers=[])  # type: ignore[arg-type]
    port = with_nothing.add_insecure_port("127.0.0.1:0")
    with_nothing.start()
    assert main(["chat", "--address", f"127.0.0.1:{port}"]) == exit_codes.UNREACHABLE
    with_nothing.stop(None).wait()
    assert capsys.readouterr().err.startswith(f"what answers at 127.0.0.1:{port} is no Phasewise gateway: ")


def test_a_deployment_is_needed_and_must_be_clear(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "x"]) == exit_codes.UNREACHABLE
    assert "no deployment runs on this machine; start one with `phasewise up MANIFEST`" in error_line(capsys)
    register(registry, "a", "127.0.0.1:0")
    register(registry, "b", "127.0.0.1:0")
    assert main(["chat", "x"]) == exit_codes.UNREACHABLE
    assert error_line(capsys) == "2 deployments run, a, b: choose one by its name"
    assert main(["generate", "x", "--name", "c"]) == exit_codes.UNREACHABLE
    assert error_line(capsys) == "no deployment 'c' runs on this machine; running: a, b"
    assert main(["generate", "x", "--name", "b"]) == exit_codes.UNREACHABLE
    assert error_line(capsys).startswith("no gateway answers at 127.0.0.1:0: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "x", "--token-ids", "1"],
        ["generate", "--token-ids", "1,,2"],
        ["generate", "--token-ids", str(2**31)],
        ["generate", "x", "--seed", "-1"],
        ["generate", "x", "--max-tokens", "0"],
        ["generate", "x", "--timeout-s", "nan"],
        ["generate", "x", "--json", "--timeline"],
        ["chat", "x", "--address", "nowhere"],
        ["chat", "x", "--address", "a:1", "--name", "b"],
    ],
)
def test_a_wrong_argument_is_a_usage_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == exit_codes.USAGE


def test_chat_sends_one_message_with_the_system_text(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chat", "Where?", "--system", "Be short.", "--address", gateway.address, "--timeline"]
    assert main(arguments) == exit_codes.OK
    assert capsys.readouterr().out.startswith("Paris.\n\n  ")
    assert turns(gateway.requests[0]) == [("system", "Be short."), ("user", "Where?")]
    assert not gateway.requests[0].sampling.HasField("max_tokens")


def test_chat_says_when_the_answer_was_cut(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.answer = messages("Par", finish_reason=pb.FINISH_REASON_LENGTH)
    assert main(["chat", "Where?", "--address", gateway.address]) == exit_codes.OK
    assert capsys.readouterr() == ("Par\n", "(cut at the length limit)\n")


def test_a_conversation_has_a_history_that_can_be_reset(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(monkeypatch, b"one\n\n two \n/frob\n/reset\n/etc is what?\n/exit\nnever\n")
    assert main(["chat", "--system", "Be short.", "--address", gateway.address]) == exit_codes.OK
    system = ("system", "Be short.")
    assert [turns(request) for request in gateway.requests] == [
        [system, ("user", "one")],
        [system, ("user", "one"), ("assistant", "Paris."), ("user", "two")],
        [system, ("user", "/etc is what?")],
    ]
    assert capsys.readouterr() == (
        "Paris.\n" * 3,
        "there is no command /frob; there are /image FILE, /reset and /exit\n(forgotten)\n",
    )


def test_a_conversation_goes_on_after_a_failure_and_forgets_that_message(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.answer = []
    gateway.status = (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
    stdin(monkeypatch, b"one\ntwo\n\xff\n")
    assert main(["chat", "--address", gateway.address]) == exit_codes.OK
    assert [turns(request) for request in gateway.requests] == [[("user", "one")], [("user", "two")]]
    said = "RESOURCE_EXHAUSTED: the queue is full\n"
    assert capsys.readouterr().err == said * 2 + "that is not valid UTF-8\n"


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt_once() -> None:
        gateway.goes_on = False
        os.kill(os.getpid(), signal.SIGINT)

    gateway.goes_on = True
    gateway.on_going_on = interrupt_once
    stdin(monkeypatch, b"one\ntwo\n")
    assert main(["chat", "--address", gateway.address]) == exit_codes.OK
    assert gateway.was_cancelled.wait(WAIT_S)
    out, err = capsys.readouterr()
    assert err == "(stopped)\n"
    assert out.endswith("Paris.\n")
    assert turns(gateway.requests[-1])[-1] == ("user", "two")


def turns(request: pb.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]
