"""Workers that take other phases while the gateway serves: real workers, gateway and controller in this process."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from orchestrator.control.controller import ControllerConfig
from orchestrator.control.declared import DeclaredWorker, WorkerResources
from orchestrator.control.observation import ProcessReport
from orchestrator.control.view import SwitchState, SwitchView
from orchestrator.control.view_wire import switch_from_pb
from orchestrator.runtime.control_loop import ControlLoop
from orchestrator.runtime.view_publisher import GatewayPublisher
from orchestrator.runtime.worker_probe import WorkerProbe
from protos import control_pb2, worker_pb2
from protos import inference_pb2 as pb
from tests.support.both_shapes import ROOMY, random_prompt, request_of
from tests.support.gateway import Gateway, collect, gateway, tokens_of
from tests.support.waiting import until
from tests.support.worker_client import (
    BOTH,
    DECODE,
    PREFILL,
    RunningWorker,
    running_worker,
    standing_still,
    worker_spec,
)
from workers.api import PhaseSet, WorkerId

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")
TICK_S = 0.2
PHASES = {PREFILL: [worker_pb2.PHASE_PREFILL], DECODE: [worker_pb2.PHASE_DECODE]}
PHASES[BOTH] = PHASES[PREFILL] + PHASES[DECODE]


class RunningProcesses:
    """Implements Cluster: workers that somebody else starts and ends."""

    def __init__(self, workers: Sequence[RunningWorker]) -> None:
        self.workers = workers

    async def list_processes(self) -> list[ProcessReport]:
        return [
            ProcessReport(one.worker.spec.worker_id, one.worker.spec.incarnation, one.address)
            for one in self.workers
        ]

    async def start(self, worker: DeclaredWorker, incarnation: int) -> None:
        raise AssertionError(f"nothing is to be started: {worker.worker_id} {incarnation}")

    async def stop(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        raise AssertionError(f"nothing is to be stopped: {worker_id} {incarnation}: {reason}")

    async def request_resources(self, workers: Sequence[WorkerResources]) -> None:
        raise AssertionError("no worker is to be added")


@dataclass(frozen=True)
class Cluster:
    """A gateway, a controller and workers."""

    gateway: Gateway
    workers: dict[str, RunningWorker]

    async def switch(self, worker_id: str, phases: PhaseSet) -> list[SwitchView]:
        """Each state that it comes to."""
        request = control_pb2.SwitchPhasesRequest(worker_id=worker_id, phases=PHASES[phases])
        call = self.gateway.control.SwitchPhases(request)
        return [switch_from_pb(progress.switch) async for progress in call]

    async def answers(self, requests: Sequence[pb.GenerateRequest]) -> list[list[int]]:
        """Tokens of each, asked at once; none of them was computed anew."""
        found = await asyncio.gather(*(collect(self.gateway.client.Generate(one)) for one in requests))
        assert [messages[-1].timings.attempts for messages in found] == [1] * len(found)
        return [tokens_of(messages) for messages in found]

    async def some_tokens_of(self, num_requests: int) -> None:
        """Until so many requests have got some."""
        requests = self.gateway.dispatcher._requests
        await until(
            lambda: (
                sum(len(live.samples[0].machine.delivered) > 3 for live in requests.values()) >= num_requests
            ),
            "some tokens",
        )


@asynccontextmanager
async def cluster(model: Path, **phases: PhaseSet) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        workers = {}
        for name, of in phases.items():
            spec = replace(worker_spec(model, of), worker_id=WorkerId(name))
            workers[name] = await stack.enter_async_context(running_worker(spec))
        it = await stack.enter_async_context(gateway(config=ROOMY))
        declared = tuple(
            DeclaredWorker(
                one.worker.spec.worker_id,
                one.worker.spec.phases,
                str(model),
                WorkerResources(1),
                one.worker.spec.engine,
                one.worker.spec.kv_transfer,
            )
            for one in workers.values()
        )
        stop = asyncio.Event()
        probe, publisher = WorkerProbe(TICK_S / 2), GatewayPublisher(it.control_address)
        loop = ControlLoop(
            RunningProcesses(tuple(workers.values())),
            probe,
            publisher,
            ControllerConfig("test", "tiny", declared),
            tick_s=TICK_S,
            clock=time.monotonic,
            sleep=asyncio.sleep,
            stop=stop,
        )
        running = asyncio.create_task(loop.run())
        try:
            await until(lambda: len(it.linked()) == len(workers), "the links")
            yield Cluster(it, workers)
        finally:
            stop.set()
            await running
            await probe.close()
            await publisher.close()


def requests(num: int = 4, max_tokens: int = 200, temperature: float = 1.0) -> list[pb.GenerateRequest]:
    return [
        request_of(random_prompt(30 + 10 * i), max_tokens, temperature=temperature, seed=5)
        for i in range(num)
    ]


def test_sequences_go_on_elsewhere_and_no_token_changes(model_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(model_path, prefill=PREFILL, d0=DECODE, d1=DECODE) as it:
            expected = await it.answers(requests())
            asked = asyncio.create_task(it.answers(requests()))
            await it.some_tokens_of(4)
            async with standing_still(it.workers["d0"], it.workers["d1"]):
                # None of them ends before the gateway knows.
                switching = asyncio.create_task(it.switch("d1", PREFILL))
                await until(lambda: it.gateway.dispatcher.is_leaving, "the gateway to know")
            states = [switch.state for switch in await switching]
            assert (states[0], states[-1]) == (SwitchState.LEAVING, SwitchState.CHANGED)
            assert await asked == expected
            records = it.gateway.dispatcher.records._ended.values()
            moved = [one for record in records for one in record.samples[0].migrations]
            assert moved
            assert {(one.source, one.target) for one in moved} == {("d1", "d0")}
            assert all(one.pause_s is not None for one in moved)
            # Its source tells of a transfer, maybe after the last token.
            await until(lambda: all(one.transfer is not None for one in moved), "the transfers' reports")
            # It computes all prompts, once the other one has given that up.
            [*_, last] = await it.switch("prefill", DECODE)
            assert last.state is SwitchState.CHANGED, last
            assert await it.answers(requests()) == expected
            status = it.workers["d1"].worker.status()
            assert status.phases == PREFILL
            assert status.first_step_s is not None

    asyncio.run(scenario())


def test_back_and_forth_under_load(model_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(model_path, w0=BOTH, w1=BOTH) as it:
            wanted = requests(8, 120)
            expected = await it.answers(wanted)
            for worker_id, phases in (("w0", PREFILL), ("w0", BOTH), ("w1", DECODE), ("w1", BOTH)):
                asked = asyncio.create_task(it.answers(wanted))
                await it.some_tokens_of(2)
                [*_, last] = await it.switch(worker_id, phases)
                assert last.state is SwitchState.CHANGED, last
                assert await asked == expected

    asyncio.run(scenario())


def test_what_must_not_be_is_refused_and_nothing_changes(model_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(model_path, prefill=PREFILL, d0=DECODE) as it:
            [refused] = await it.switch("d0", PREFILL)
            assert refused.state is SwitchState.UNDONE
            assert refused.reason == "no other worker that is ready serves decode; d0 must keep it"
            assert len((await it.answers(requests(1, 5)))[0]) == 5

    asyncio.run(scenario())
