"""Workers whose steps may be split, whose GPU is this CPU and whose streams are stand-ins, from their start to tokens by gRPC."""

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.device_worker import cpu_as_gpu
from tests.support.split_shares import fake_shares
from tests.support.split_worker import (
    burst,
    check_split_worker,
    split_wins,
    splitting_spec,
    target_s,
    tokens_and_layouts,
)
from tests.support.worker_client import WorkerClient, running_worker
from workers.api import Phase, PhaseSharing, WorkerSpec, WorkerState
from workers.device import placing
from workers.device.memory import GpuMemory
from workers.device.sm_share import SmShares
from workers.errors import SharingUnsupported
from workers.limits import MIB

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[SmShares]:
    """Layouts that workers have opened."""
    cpu_as_gpu(monkeypatch)
    found: list[SmShares] = []

    def open_shares(*_arguments: object, **_options: object) -> SmShares:
        found.append(fake_shares())
        return found[-1]

    monkeypatch.setattr(placing, "open_sm_shares", open_shares)
    return found


def are_closed(shares: SmShares) -> bool:
    return not any(live.kept for live in shares.layouts)


def test_a_split_worker_s_tokens_are_those_of_a_mixed_one(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[SmShares]
) -> None:
    check_split_worker(model_path, monkeypatch)
    assert len(opened) == 1
    assert are_closed(opened[0])


def test_without_a_target_nothing_is_split(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split_wins(monkeypatch)
    _, layout_s = asyncio.run(tokens_and_layouts(splitting_spec(model_path), math.inf))
    assert set(layout_s) == {"together"}


def test_a_split_worker_gives_a_phase_up_and_takes_it_back(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And splits its steps as before."""
    split_wins(monkeypatch)

    async def scenario() -> None:
        spec = splitting_spec(model_path)
        async with running_worker(spec) as worker:
            target = await target_s(worker, 4.0)
            await burst(worker, target)
            before_s = await split_s(worker)
            assert before_s > 0
            for epoch, phases in enumerate((frozenset({Phase.DECODE}), spec.phases), 1):
                assert await worker.worker.set_phases(1, phases, epoch) is None
            assert (await worker.status()).phases == spec.phases
            await burst(worker, target, seed=5)
            assert await split_s(worker) > before_s

    asyncio.run(scenario())


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
def test_a_worker_that_starts_again_after_a_switch_is_a_mixed_one(
    model_path: Path, opened: list[SmShares], phase: Phase
) -> None:
    spec = replace(splitting_spec(model_path), phases=frozenset({phase}))
    assert asyncio.run(ended_up(spec)) == (WorkerState.READY, "")
    assert opened == []


def test_a_gpu_that_cannot_be_divided_is_refused_with_what_to_do(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_arguments: object, **_options: object) -> SmShares:
        raise SharingUnsupported(
            "green contexts", "driver 12.2 has no green contexts", "install 12.4 or later"
        )

    monkeypatch.setattr(placing, "open_sm_shares", refused)
    assert asyncio.run(ended_up(splitting_spec(model_path))) == (
        WorkerState.FAILED,
        "engine.phaseSharing predicted: green contexts: driver 12.2 has no green contexts; install 12.4 or later, or set it to mixed",
    )


def test_layouts_leave_less_memory_for_kv(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[SmShares]
) -> None:
    """Enough for a mixed worker is too little for one with four layouts, which then gives them back."""
    cpu_as_gpu(monkeypatch, GpuMemory(1536 * MIB, 1536 * MIB))
    spec = splitting_spec(model_path)
    mixed = replace(spec, engine=replace(spec.engine, phase_sharing=PhaseSharing.MIXED))
    assert asyncio.run(ended_up(mixed)) == (WorkerState.READY, "")
    assert opened == []
    state, why = asyncio.run(ended_up(spec))
    assert state is WorkerState.FAILED
    assert why.startswith("the KV cache on the GPU: needs 2 MiB of memory and 0 MiB are available; ")
    assert are_closed(opened[0])


async def split_s(worker: WorkerClient) -> float:
    """Seconds in which steps were split."""
    layout_s = (await worker.status()).layout_s
    return sum(seconds for name, seconds in layout_s if name.startswith("split: "))


async def ended_up(spec: WorkerSpec) -> tuple[WorkerState, str]:
    """How a start ended, and what the worker says of it."""
    async with running_worker(spec, is_ready=False) as worker:
        await worker.wait_for_status(
            lambda status: status.state is not WorkerState.LOADING, "its start to end"
        )
        status = await worker.status()
        return status.state, status.message
