"""Workers with weights in common, whose GPU is this CPU and whose keeper has a file that they map, from their start to tokens by gRPC."""

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kvtransfer.transports.cuda_mapping import this_process
from tests.support.device_worker import cpu_as_gpu
from tests.support.keeper_members import KeeperPlace
from tests.support.keeper_starts import copy_weights
from tests.support.mps_members import is_running
from tests.support.waiting import until, until_in_thread
from tests.support.worker_client import greedy_submit, running_worker, worker_spec
from workers.api import Device, WeightDtype, WorkerSpec, WorkerState
from workers.device import placing, resident_weights
from workers.device.keeper import Tell
from workers.device.memory import GpuMemory
from workers.device.resident_memory import AttachedMemory
from workers.device.resident_weights import ResidentWeights, map_weights
from workers.limits import MIB
from workers.model.prepare import WEIGHTS, PreparedModel

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")

LENGTHS = (1, 17, 50)
RESIDENT_BYTES = 100 * MIB


class Place(KeeperPlace):
    """With what workers map."""

    def map(self, prepared: PreparedModel, dtype: WeightDtype, uuid: str, progress: Tell) -> ResidentWeights:
        """As `map_weights`."""
        start = partial(copy_weights, prepared.folder / WEIGHTS, self.log, self.gate)
        return map_weights(
            *(prepared, dtype, uuid, progress), start=start, open_memory=open_copy, root=self.root
        )


def open_copy(kept: bytes) -> AttachedMemory:
    """For a file as large as this is made out to be."""
    return AttachedMemory(this_process(), load_file(kept.decode()), RESIDENT_BYTES, lambda: None)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Keepers end at once without members; nothing is left at the end."""
    cpu_as_gpu(monkeypatch)
    found = Place(tmp_path)
    monkeypatch.setattr(placing, "gpu_uuid", lambda: "GPU-1")
    monkeypatch.setattr(placing, "map_weights", found.map)
    monkeypatch.setattr(resident_weights, "GRACE_S", 0.0)
    yield found
    found.gate.touch()
    until_in_thread(lambda: not any(map(is_running, found.pids)), "the end of the keepers")
    assert not list(found.root.iterdir())


def own_spec(model: Path) -> WorkerSpec:
    return replace(worker_spec(model, max_running_sequences=8), device=Device.CUDA)


def resident_spec(model: Path, kv_cache_bytes: int = 2 * MIB) -> WorkerSpec:
    spec = own_spec(model)
    engine = replace(spec.engine, are_weights_resident=True, kv_cache_bytes=kv_cache_bytes)
    return replace(spec, engine=engine)


async def generated(spec: WorkerSpec) -> list[list[int]]:
    async with running_worker(spec) as worker:
        return [await worker.generate(greedy_submit(length)) for length in LENGTHS]


def test_workers_with_one_keeper_generate_what_one_with_its_own_weights_does(
    model_path: Path, place: Place
) -> None:
    expected = asyncio.run(generated(own_spec(model_path)))
    spec = resident_spec(model_path)

    async def scenario() -> None:
        async with running_worker(spec) as first:
            assert await generated(spec) == expected
            assert await generated(spec) == expected
            (pid,) = place.pids
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not is_running(pid), "the end of the keeper")
            # What is mapped stays; who comes now has another keeper.
            assert await first.generate(greedy_submit(LENGTHS[1])) == expected[1]
            assert await generated(spec) == expected
            assert len(place.pids) == 2

    asyncio.run(scenario())


def test_shares_of_the_memory_are_of_what_the_weights_leave(
    model_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def num_blocks(spec: WorkerSpec) -> int:
        async with running_worker(spec) as worker:
            return (await worker.status()).blocks.total

    # Own weights are no more than their share, which a GPU would say.
    cpu_as_gpu(monkeypatch, GpuMemory(4096 * MIB, 4096 * MIB))
    own = own_spec(model_path)
    of_all = asyncio.run(num_blocks(replace(own, engine=replace(own.engine, kv_cache_bytes=0))))
    of_the_rest = asyncio.run(num_blocks(resident_spec(model_path, kv_cache_bytes=0)))
    fraction, block_bytes = own.engine.gpu_memory_fraction, 2 * MIB // asyncio.run(num_blocks(own))
    assert (of_all - of_the_rest) * block_bytes == pytest.approx(fraction * RESIDENT_BYTES, rel=0.01)


def test_a_worker_says_how_far_its_keeper_is_and_can_be_stopped_meanwhile(
    model_path: Path, place: Place
) -> None:
    place.gate.unlink()

    async def scenario() -> None:
        async with running_worker(resident_spec(model_path), is_ready=False) as worker:
            await worker.wait_for_status(
                lambda status: status.message == "loading the weights onto the GPU 50%", "the half"
            )
        # The keeper loads on, and is there for the next one.
        assert is_running(place.pids[0])
        async with running_worker(resident_spec(model_path), is_ready=False) as worker:
            await worker.wait_for_status(lambda status: status.message.endswith("50%"), "the half")
            place.gate.touch()
            await worker.wait_for_state(WorkerState.READY)

    asyncio.run(scenario())
