"""`phasewise explain`: the life of a request, told."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli import exit_codes, explain
from orchestrator.cli.explain_text import lines
from orchestrator.cli.main import main
from orchestrator.control.request_record import MAX_RECORDS
from orchestrator.runtime.registry import Registry, RunningDeployment
from protos import control_pb2 as pb
from protos import worker_pb2
from tests.support.fake_gateway import FakeGateway, running

RUNNING = RunningDeployment("laptop", "127.0.0.1:8480", "127.0.0.1:8481", "127.0.0.1:6379", None, None)
TEXT = """\
request r-1: a prompt of 37 tokens, arrived 12.34 s ago
  finished after 789 ms, 8 tokens (16 of the prompt cached), TTFT 456 ms, 3.0 ms of it in the worker's queue, 242 ms in prefill, second token 66.0 ms after the first

     0.0 ms  queued
    12.4 ms  prefill
     200 ms  queued    decode-0: its stream ended
     201 ms  prefill
     456 ms  decode
     789 ms  finished

  attempt 1 at 12.4 ms: prefill on prefill-0 (incarnation 1), decode on decode-0 (incarnation 2)
    why          least loaded: prefill-0 with 0 prompt tokens, decode-0 with 1 sequences
    KV transfer  not reported
    ended by     decode-0: its stream ended

  attempt 2 at 201 ms: prefill on prefill-0 (incarnation 1), decode on decode-1 (incarnation 1)
    why          least loaded: prefill-0 with 0 prompt tokens, decode-1 with 0 sequences
    KV transfer  1.63 MiB in 6 chunks, 7.56 MiB/s
                 201 ms (93%) hidden by prefill (-), 14.0 ms exposed (#)
                 by grpc (they are on two hosts), codec int4, 0.41 MiB moved
                 1 chunk sent again, resumed 2 times"""


def test_why_a_prompt_did_not_begin_in_its_turn() -> None:
    record = finished()
    assert not any("began" in line for line in lines(record))
    record.samples[0].order_reason = "before 2 that came earlier, after 0 that came later: slack 0.120 s"
    assert "  began before 2 that came earlier, after 0 that came later: slack 0.120 s" in lines(record)


def finished() -> pb.RequestRecord:
    """A request whose decode worker was lost once."""
    queued, prefill = pb.REQUEST_STATE_QUEUED, pb.REQUEST_STATE_PREFILL
    states = [
        pb.StateRecord(state=queued),
        pb.StateRecord(state=prefill, at_s=0.0124),
        pb.StateRecord(state=queued, at_s=0.2, reason="decode-0: its stream ended"),
        pb.StateRecord(state=prefill, at_s=0.201),
        pb.StateRecord(state=pb.REQUEST_STATE_DECODE, at_s=0.456),
        pb.StateRecord(state=pb.REQUEST_STATE_FINISHED, at_s=0.789),
    ]
    attempts = [
        attempt(11, 0.0124, "decode-0", 2, "decode-0 with 1 sequences"),
        attempt(12, 0.201, "decode-1", 1, "decode-1 with 0 sequences"),
    ]
    attempts[0].problem = "decode-0: its stream ended"
    attempts[1].transfer.CopyFrom(
        worker_pb2.KvTransferred(
            num_bytes=37 * 46080,
            num_chunks=6,
            transfer_s=0.215,
            busy_s=0.215,
            exposed_s=0.014,
            transport="grpc",
            transport_reason="they are on two hosts",
            codec="int4",
            num_wire_bytes=430_000,
            num_resent_chunks=1,
            num_resumes=2,
        )
    )
    sample = pb.SampleRecord(
        states=states,
        attempts=attempts,
        num_tokens=8,
        num_cached_tokens=16,
        first_token_at_s=0.456,
        second_token_at_s=0.522,
        last_token_at_s=0.789,
        worker_queue_s=0.003,
        prefill_s=0.242,
    )
    return pb.RequestRecord(request_id="r-1", age_s=12.34, num_prompt_tokens=37, samples=[sample])


def attempt(number: int, at_s: float, decode: str, incarnation: int, why: str) -> pb.AttemptRecord:
    return pb.AttemptRecord(
        attempt=number,
        at_s=at_s,
        prefill_worker_id="prefill-0",
        prefill_incarnation=1,
        decode_worker_id=decode,
        decode_incarnation=incarnation,
        reason=f"least loaded: prefill-0 with 0 prompt tokens, {why}",
    )


@pytest.fixture(autouse=True)
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGateway]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with running(FakeGateway()) as fake:
        Registry().save(replace(RUNNING, control_address=fake.address))
        fake.record = finished()
        yield fake


def test_a_request_is_told_from_its_arrival_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "r-1"]) == exit_codes.OK
    assert capsys.readouterr() == (f"{TEXT}\n", "")


def test_kv_that_was_not_computed_is_told() -> None:
    record = finished()
    (sample,) = record.samples
    sample.num_fetched_tokens, sample.num_reused_tokens, sample.prefix_fetch_s = 12, 9, 0.002
    summary = lines(record)[1]
    assert (
        "8 tokens (16 of the prompt cached, 12 of them from another worker, 9 reused from other contexts)"
        in summary
    )
    assert (
        "3.0 ms of it in the worker's queue, 2.0 ms of that for KV of other workers, 242 ms in prefill"
        in summary
    )


def add_shards(attempt: pb.AttemptRecord) -> None:
    """One that went well, one that an encoder had already, one that was lost, and one that runs."""
    attempt.encodes.add(
        worker_id="encode-0",
        num_tiles=4,
        at_s=0.02,
        duration_s=0.0312,
        num_cached_tiles=1,
        queue_s=0.001,
        decode_s=0.002,
        encode_s=0.025,
        transfer_s=0.0032,
        num_bytes=2**19,
        transport="shm",
    )
    attempt.encodes.add(worker_id="prefill-0", first_tile=4, num_tiles=1, at_s=0.02, duration_s=0.001)
    attempt.encodes.add(
        worker_id="encode-1",
        first_tile=5,
        num_tiles=2,
        at_s=0.02,
        duration_s=0.01,
        problem="its stream ended",
    )
    attempt.encodes.add(worker_id="encode-0", first_tile=5, num_tiles=2, at_s=0.03)
    attempt.encodes.add(worker_id="encode-0", first_tile=7, num_tiles=1, at_s=0.03, problem="given up")


def test_each_shard_of_pictures_is_told(capsys: pytest.CaptureFixture[str], gateway: FakeGateway) -> None:
    record = finished()
    add_shards(record.samples[0].attempts[0])
    found = lines(record)
    start = next(i for i, line in enumerate(found) if line.startswith("    why "))
    assert found[start + 1 : start + 7] == [
        (
            "    pictures     encode-0: tiles 0-3, 31.2 ms in all: queue 1.0 ms, decode 2.0 ms, encode 25.0 ms, "
            "transfer 3.2 ms, 0.50 MiB by shm, 1 tile cached"
        ),
        "                 prefill-0: tile 4, 1.0 ms in all",
        "                 encode-1: tiles 5-6, failed after 10.0 ms: its stream ended",
        "                 encode-0: tiles 5-6, not reported",
        "                 encode-0: tile 7, given up",
        "    KV transfer  not reported",
    ]
    gateway.record = record
    assert main(["explain", "r-1", "--json"]) == exit_codes.OK
    first, second = json.loads(capsys.readouterr().out)["samples"][0]["attempts"]
    assert [shard["worker_id"] for shard in first["encodes"]][:2] == ["encode-0", "prefill-0"]
    assert first["encodes"][0]["encode_s"] == 0.025
    assert "duration_s" not in first["encodes"][3]
    assert second["encodes"] == []


def test_a_request_that_runs_on_one_worker_is_told_so_far() -> None:
    record = finished()
    (sample,) = record.samples
    del sample.states[2:], sample.attempts[1:]
    sample.attempts[0].decode_worker_id = "prefill-0"
    sample.attempts[0].problem = ""
    sample.num_tokens = sample.num_cached_tokens = 0
    for field in ("first_token_at_s", "second_token_at_s", "last_token_at_s"):
        sample.ClearField(field)  # type: ignore[arg-type]
    record.age_s = 0.5124
    assert lines(record) == [
        "request r-1: a prompt of 37 tokens, arrived 512 ms ago",
        "  prefill for 500 ms now, 0 tokens so far",
        "",
        "     0.0 ms  queued",
        "    12.4 ms  prefill",
        "",
        "  attempt 1 at 12.4 ms: on prefill-0 (incarnation 1)",
        "    why          least loaded: prefill-0 with 0 prompt tokens, decode-0 with 1 sequences",
    ]


def test_samples_are_told_one_by_one() -> None:
    record = finished()
    record.samples.append(record.samples[0])
    found = lines(record)
    assert [line for line in found if line.startswith("[")] == ["[sample 0]", "[sample 1]"]


def test_json_has_names_of_states_and_numbers_that_are_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "r-1", "--json"]) == exit_codes.OK
    found = json.loads(capsys.readouterr().out)
    (sample,) = found["samples"]
    assert found["request_id"] == "r-1"
    assert [one["state"] for one in sample["states"]][-2:] == ["decode", "finished"]
    first, second = sample["attempts"]
    assert (first["transfer"], first["problem"]) == (None, "decode-0: its stream ended")
    assert second["transfer"]["num_bytes"] == 37 * 46080
    assert second["transfer"]["transport_reason"] == "they are on two hosts"
    assert sample["second_token_at_s"] == 0.522


def test_an_unknown_id_is_the_gateways_refusal(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.record = None
    assert main(["explain", "nope"]) == exit_codes.FAILURE
    assert capsys.readouterr().err == "NOT_FOUND: no request 'nope' is remembered\n"


def test_no_deployment_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "r-1", "--name", "other"]) == exit_codes.UNREACHABLE
    assert "no deployment 'other' runs" in capsys.readouterr().err
    assert main(["explain", "r-1", "--control-address", "127.0.0.1:0"]) == exit_codes.UNREACHABLE


def test_the_help_says_how_long_records_are_kept() -> None:
    assert f"the last {MAX_RECORDS} that ended" in explain.EXAMPLES
