"""What NVML says of a GPU, and what a worker makes of it."""

import asyncio
import sys
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fake_nvml import FakeNvml, FakeNvmlError
from tests.support.waiting import until, until_in_thread
from workers.api import EngineConfig, GpuStatus, ModelInfo, Phase, WorkerId, WorkerSpec, WorkerState
from workers.device import gpu_telemetry, nvml
from workers.device.gpu_health import XIDS, Severity, health_of
from workers.device.gpu_telemetry import MAX_XIDS, GpuTelemetry
from workers.device.nvml import NvmlUnavailable
from workers.loading import LoadedModel

WELL = GpuStatus("GPU-1", ecc_uncorrected=0)


def telemetry_of(fake: FakeNvml, told: list[str], **options: Any) -> GpuTelemetry:
    return GpuTelemetry("GPU-1", on_unhealthy=told.append, nvml=fake, **options)


# The table.


@pytest.mark.parametrize("xid", sorted(XIDS))
def test_each_xid_means_what_the_table_says_and_tells_what_to_do(xid: int) -> None:
    health = health_of(WELL, WELL, (xid,))
    rule = XIDS[xid]
    text = f"XID {xid}, {rule.meaning}; {rule.remedy}"
    if rule.severity is Severity.UNHEALTHY:
        assert (health.problem, health.notes) == (text, ())
    else:
        assert (health.problem, health.notes) == ("", (text,))


@given(st.lists(st.integers(0, 200), max_size=8))
def test_a_worker_is_unhealthy_when_any_of_its_xids_is_and_an_unknown_one_is(xids: list[int]) -> None:
    is_bad = any(xid not in XIDS or XIDS[xid].severity is Severity.UNHEALTHY for xid in xids)
    assert bool(health_of(WELL, WELL, tuple(xids)).problem) is is_bad


@given(st.integers(0, 5), st.integers(0, 5))
def test_ecc_errors_count_from_the_workers_beginning(before: int, new: int) -> None:
    health = health_of(
        GpuStatus("g", ecc_uncorrected=before + new), GpuStatus("g", ecc_uncorrected=before), ()
    )
    assert bool(health.problem) is (new > 0)
    if new:
        assert health.problem.startswith(f"{new} uncorrectable ECC errors since")
    assert bool(health.notes) is (before > 0 and new == 0)


def test_memory_that_cannot_be_repaired_ends_it_and_what_waits_for_a_reset_does_not() -> None:
    assert "could not be remapped" in health_of(GpuStatus("g", has_remap_failed=True), WELL, ()).problem
    pending = health_of(GpuStatus("g", is_remap_pending=True), WELL, ())
    assert not pending.problem
    assert "next reset" in pending.notes[0]


def test_slow_clocks_are_noted_but_a_power_cap_is_usual() -> None:
    assert health_of(GpuStatus("g", throttle_reasons=("sw_power_cap",)), WELL, ()) == health_of(
        WELL, WELL, ()
    )
    assert (
        "cooling" in health_of(GpuStatus("g", throttle_reasons=("hw_thermal_slowdown",)), WELL, ()).notes[0]
    )
    assert "90 C" in health_of(GpuStatus("g", temperature_c=90), WELL, ()).notes[0]


def test_the_first_problem_is_told_and_a_lost_gpu_comes_before_all() -> None:
    assert health_of(WELL, WELL, (48, 94)).problem.startswith("XID 48")
    assert health_of(WELL, WELL, (48,), "it does not answer").problem.startswith(
        "the GPU is lost (it does not"
    )


# Samples.


def test_a_sample_has_what_nvml_said() -> None:
    fake, told = FakeNvml(), list[str]()
    fake.reasons, fake.ecc = 0x4 | 0x40, [3, 0]
    telemetry = telemetry_of(fake, told)
    telemetry.sample()
    status = telemetry.status
    assert (status.name, status.memory_used_bytes, status.memory_total_bytes) == (
        "NVIDIA Double",
        2**30,
        80 * 2**30,
    )
    assert (status.utilisation, status.memory_utilisation) == (0.25, 0.1)
    assert (status.sm_clock_mhz, status.max_sm_clock_mhz, status.memory_clock_mhz) == (1755, 1980, 2619)
    assert (status.power_w, status.power_limit_w, status.temperature_c) == (147.005, 700.0, 40)
    assert status.throttle_reasons == ("sw_power_cap", "hw_thermal_slowdown")
    assert (status.ecc_corrected, status.ecc_uncorrected, status.missing) == (3, 0, "")
    assert told == []


def test_what_is_not_answered_is_left_out_and_named() -> None:
    fake = FakeNvml()
    fake.failing = dict.fromkeys(("memory", "power", "ecc", "events"), FakeNvml.NVML_ERROR_NOT_SUPPORTED)
    telemetry = telemetry_of(fake, [])
    telemetry.sample()
    status = telemetry.status
    assert status.memory_used_bytes is status.power_w is status.ecc_uncorrected is None
    assert status.temperature_c == 40
    assert {part.split(":")[0] for part in status.missing.split("; ")} == {
        "memory",
        "power",
        "ECC",
        "XID events",
    }
    assert not status.problem
    assert fake.num_event_sets == 0


def test_a_problem_is_told_once_and_stays() -> None:
    fake, told = FakeNvml(), list[str]()
    telemetry = telemetry_of(fake, told)
    telemetry.sample()
    assert told == []
    fake.xids.extend([45, 94])
    telemetry.sample()
    telemetry.sample()
    assert len(told) == 1
    assert told[0].startswith("XID 94")
    assert telemetry.status.xids == (45, 94)
    assert telemetry.status.problem == told[0]


def test_a_gpu_that_is_lost_is_a_problem() -> None:
    fake, told = FakeNvml(), list[str]()
    telemetry = telemetry_of(fake, told)
    telemetry.sample()
    fake.failing = {"memory": FakeNvml.NVML_ERROR_GPU_IS_LOST}
    telemetry.sample()
    assert "lost" in told[0]
    assert "restart the machine" in told[0]


def test_a_storm_of_xids_is_bounded() -> None:
    fake = FakeNvml()
    telemetry = telemetry_of(fake, [])
    fake.xids.extend([31] * 10_000)
    telemetry.sample()
    telemetry.sample()
    assert len(telemetry.status.xids) == MAX_XIDS


def test_the_status_says_how_old_it_is() -> None:
    now_s = 5.0
    telemetry = telemetry_of(FakeNvml(), [], clock=lambda: now_s)
    telemetry.sample()
    now_s = 7.5
    assert telemetry.status.age_s == 2.5


def test_the_thread_samples_until_it_is_stopped_and_leaves_nothing() -> None:
    fake = FakeNvml()
    telemetry = telemetry_of(fake, [], period_s=0.001)
    telemetry.start()
    until_in_thread(lambda: fake.num_reads > 3, "samples")
    telemetry.stop()
    assert fake.num_event_sets == 0
    assert "gpu-telemetry" not in [thread.name for thread in threading.enumerate()]


def test_a_bug_of_ours_ends_the_telemetry_and_nothing_else() -> None:
    fake, told = FakeNvml(), list[str]()
    telemetry = telemetry_of(fake, told, period_s=0.001)
    telemetry.start()
    fake.remaps = ()  # type: ignore[assignment]
    fake.nvmlDeviceGetPowerUsage = lambda _: "no number"  # type: ignore[assignment,method-assign,return-value]
    until_in_thread(lambda: "broke" in telemetry.status.missing, "the end")
    telemetry.stop()
    assert told == []


def test_a_call_that_does_not_return_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_telemetry, "STOP_S", 0.05)
    fake, is_called, returns = FakeNvml(), threading.Event(), threading.Event()
    telemetry = telemetry_of(fake, [], period_s=0.001)

    def hang(_: str) -> bool:
        is_called.set()
        return returns.wait(60)

    telemetry.start()
    fake.nvmlDeviceGetPowerUsage = hang  # type: ignore[assignment,method-assign]
    assert is_called.wait(60)
    telemetry.stop()
    assert fake.num_event_sets == 1
    returns.set()


# Without NVML.


def test_without_nvml_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise NvmlUnavailable("nvidia-ml-py is not installed; pip install nvidia-ml-py")

    monkeypatch.setattr(gpu_telemetry, "open_nvml", refuse)
    telemetry = GpuTelemetry("GPU-1", on_unhealthy=lambda _: None)
    telemetry.start()
    assert "pip install" in telemetry.status.missing
    telemetry.stop()


def test_a_gpu_that_nvml_does_not_know_is_named() -> None:
    telemetry = telemetry_of(FakeNvml("GPU-2"), [])
    telemetry.start()
    assert "no GPU GPU-1" in telemetry.status.missing
    telemetry.stop()


def test_a_machine_without_the_driver_or_the_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise FakeNvmlError(12)

    fake = FakeNvml()
    monkeypatch.setattr(fake, "nvmlInit", fails, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with pytest.raises(NvmlUnavailable, match="comes with NVIDIA's driver"):
        nvml.open_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NvmlUnavailable, match="pip install nvidia-ml-py"):
        nvml.open_nvml()


def test_the_library_has_every_name_that_is_used() -> None:
    import pynvml

    used = {name for name in dir(FakeNvml) if name.lower().startswith("nvml")}
    assert {name for name in used if not hasattr(pynvml, name)} == set()
    constants = {name for name in used if isinstance(getattr(FakeNvml, name), int)}
    assert {name: getattr(pynvml, name) for name in constants} == {
        name: getattr(FakeNvml, name) for name in constants
    }


# In a worker.


def test_an_xid_fails_the_worker_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.worker import Worker

    fake = FakeNvml()
    monkeypatch.setattr(gpu_telemetry, "open_nvml", lambda: fake)
    info = ModelInfo(b"", "", "llama", 10, 10, (), "", "", "", 10)
    loaded = LoadedModel(info, None, None, gpu_uuid="GPU-1")
    monkeypatch.setattr("workers.worker.load", lambda _spec, _progress: loaded)
    spec = WorkerSpec(WorkerId("w"), 1, frozenset({Phase.DECODE}), "none", engine=EngineConfig())

    async def scenario() -> None:
        stop, states = asyncio.Event(), list[tuple[WorkerState, str]]()
        worker = Worker(spec, on_state=lambda state, message: states.append((state, message)))
        running = asyncio.create_task(worker.serve(on_bound=lambda _: None, stop=stop))
        await until(lambda: worker.status().state is WorkerState.READY, "the worker")
        gpu = worker.status().gpu
        assert gpu is not None
        assert gpu.temperature_c == 40
        fake.xids.append(79)
        await until(lambda: worker.status().state is WorkerState.FAILED, "the failure")
        assert states[-1][1].startswith("GPU: XID 79, the GPU has fallen off the bus; restart the machine")
        stop.set()
        await running
        assert fake.num_event_sets == 0

    asyncio.run(scenario())
