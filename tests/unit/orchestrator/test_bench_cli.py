"""`phasewise bench` against an inference service in this process."""

import argparse
import json
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from orchestrator.cli import bench, exit_codes
from orchestrator.manifest.models import Deployment
from orchestrator.runtime.registry import RunningDeployment
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc

ROOT = Path(__file__).parents[3]
AZURE = ROOT / "tests" / "fixtures" / "traces" / "azure_llm_2023_conv.csv"
LAPTOP = ROOT / "deploy" / "manifests" / "laptop.yaml"


class ThreadedService(pb_grpc.InferenceServiceServicer):
    """Answers at once, from threads: the command has an event loop of its own."""

    def __init__(self) -> None:
        self.on_request: Callable[[], None] = lambda: None
        self.status = grpc.StatusCode.OK

    def GetModelInfo(self, request: Any, context: Any) -> pb.GetModelInfoResponse:  # noqa: N802
        return pb.GetModelInfoResponse(
            model="smol", max_context_tokens=512, vocab_size=100, model_digest="abc"
        )

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Any
    ) -> Iterator[pb.GenerateResponse]:
        self.on_request()
        if self.status is not grpc.StatusCode.OK:
            context.abort(self.status, "refused")
        tokens = range(request.sampling.max_tokens)
        yield pb.GenerateResponse(token_ids=tokens, finish_reason=pb.FINISH_REASON_LENGTH)


@pytest.fixture
def service() -> Iterator[tuple[ThreadedService, str]]:
    server = grpc.server(futures.ThreadPoolExecutor(8))
    threaded = ThreadedService()
    pb_grpc.add_InferenceServiceServicer_to_server(threaded, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield threaded, f"127.0.0.1:{port}"
    server.stop(None).wait()


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="phasewise")
    bench.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["bench", *arguments])
    return int(args.run(args))


LOAD = ("--trace", str(AZURE), "--rate", "200", "--duration", "0.1")
SLOS = ("--slo-ttft-ms", "5000", "--slo-tpot-ms", "1000")


def test_the_command_measures_reports_and_saves(
    service: tuple[ThreadedService, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    assert run("--address", service[1], *LOAD, *SLOS, "--json", str(path)) == exit_codes.OK
    out = capsys.readouterr().out
    assert "rows 1 to 20 of 200" in out
    assert "20 arrived, 20 finished, 0 failed" in out
    assert "clipped    7 prompts and 0 outputs; the context has 512 tokens" in out
    data = json.loads(path.read_text())
    assert len(data["requests"]) == 20
    assert data["model"]["name"] == "smol"
    assert data["machine"]["num_cpus"] >= 1
    assert data["date"].endswith("+00:00")


def test_a_manifest_is_started_and_gives_address_targets_and_deadline(
    service: tuple[ThreadedService, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events: list[str] = []

    @contextmanager
    def local_deployment(deployment: Deployment, _shown: object) -> Iterator[RunningDeployment]:
        events.append(f"start {deployment.metadata.name}")
        yield RunningDeployment(deployment.metadata.name, service[1], "", "", None, None)
        events.append("stop")

    # In place of the module that brings Ray.
    fake = types.ModuleType("orchestrator.runtime.launch")
    fake.local_deployment = local_deployment  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "orchestrator.runtime.launch", fake)
    path = tmp_path / "result.json"
    assert run(str(LAPTOP), *LOAD, "--slo-tpot-ms", "50", "--json", str(path)) == exit_codes.OK
    assert events == ["start laptop", "stop"]
    config = json.loads(path.read_text())["config"]
    assert config["slo"] == {"ttft_s": 2.0, "tpot_s": 0.05}
    assert config["timeout_s"] == 300.0


def test_a_proxy_for_the_web_is_not_asked(
    service: tuple[ThreadedService, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert run("--address", service[1], *LOAD, *SLOS) == exit_codes.OK


def test_without_a_terminal_progress_is_a_few_lines(
    service: tuple[ThreadedService, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--address", service[1], *LOAD, *SLOS) == exit_codes.OK
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{service[1]}: 20 requests in 0.1 s"
    assert said[-1] == "20/20 answered, 20 sent, 0 failed"
    assert len(said) <= 11


def test_nothing_finished_is_a_failure_without_percentiles(
    service: tuple[ThreadedService, str], capsys: pytest.CaptureFixture[str]
) -> None:
    service[0].status = grpc.StatusCode.UNAVAILABLE
    assert run("--address", service[1], *LOAD, *SLOS) == exit_codes.FAILURE
    out = capsys.readouterr().out
    assert "20 arrived, 0 finished, 20 failed: 20 UNAVAILABLE" in out
    assert "p50" not in out


def test_ctrl_c_ends_the_load_and_still_reports(
    service: tuple[ThreadedService, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    service[0].on_request = lambda: os.kill(os.getpid(), signal.SIGINT)
    load = ("--trace", str(AZURE), "--rate", "0.01", "--duration", "10000")
    assert run("--address", service[1], *load, *SLOS) == exit_codes.INTERRUPTED
    assert "requests   " in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_no_gateway_at_the_address_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    # Nothing can listen on port 0.
    assert run("--address", "127.0.0.1:0", *LOAD, *SLOS) == exit_codes.UNREACHABLE
    said = "no gateway answers at 127.0.0.1:0: Connection refused; `phasewise status` shows what runs"
    assert capsys.readouterr().err.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--address", "127.0.0.1:1", *LOAD), "--slo-ttft-ms and --slo-tpot-ms are needed"),
        (("--address", "127.0.0.1:1", *LOAD, *SLOS, "--json", "/no/such/x.json"), "there is no such folder"),
        (("--address", "127.0.0.1:1", *LOAD, *SLOS, "--first-row", "190"), "the trace ends at row 200"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == exit_codes.USAGE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rate", "0"),
        ("--rate", "nan"),
        ("--duration", "-1"),
        ("--first-row", "0"),
        ("--max-in-flight", "1.5"),
        ("--address", "nowhere"),
    ],
)
def test_impossible_numbers_are_refused(
    arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--address", "127.0.0.1:1", *LOAD, *SLOS, *arguments)
    assert caught.value.code == exit_codes.USAGE
    assert f"argument {arguments[0]}: invalid " in capsys.readouterr().err


def test_a_wrong_manifest_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("a: 1\n")
    assert run(str(path), *LOAD) == exit_codes.INVALID_MANIFEST
    assert f"{path}:1: a: unknown key" in capsys.readouterr().err
