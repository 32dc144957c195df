"""The controller gives encode another worker as pictures come, and takes it back as text does: real workers, one process."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.control.auto_switch import SwitchMode
from orchestrator.control.controller import ControllerConfig
from orchestrator.control.declared import DeclaredWorker, WorkerResources
from orchestrator.control.observation import ProcessReport
from orchestrator.control.slo import Slo
from orchestrator.control.view import ClusterView, LifecycleState
from orchestrator.runtime.control_loop import ControlLoop
from orchestrator.runtime.view_publisher import GatewayPublisher
from orchestrator.runtime.worker_probe import WorkerProbe
from protos import inference_pb2 as pb
from tests.support.both_shapes import ROOMY, use
from tests.support.both_shapes import view as worker_view
from tests.support.gateway import Gateway, collect, gateway, tokens_of
from tests.support.image_shapes import D, E, P, image_request
from tests.support.pictures import picture
from tests.support.tiny_vision_models import Layout, write_vision_folder
from tests.support.waiting import BOUND_S, until
from tests.support.worker_client import RunningWorker, running_worker, worker_spec
from workers.api import Phase, WorkerId

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")
TICK_S = 0.2
#: Whatever comes meets its targets: only loads make the controller move a worker.
SLO = Slo(600.0, 60.0)
SHAPE = {"encode-0": E, "text-0": P | D, "text-1": P | D}
#: Requests at a time.
CONCURRENCY = 48
#: A move that brought nothing, while the machine had other work say, is not tried again for a minute (PhaseSets.blocked_s).
MOVE_BOUND_S = BOUND_S + 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture is much more work for it than its way to a worker."""
    folder = tmp_path_factory.mktemp("vision")
    write_vision_folder(folder, Layout(hidden_size=192, num_layers=12))
    return folder


class InThisProcess:
    """Implements Cluster: starts workers here, and ends them."""

    def __init__(self) -> None:
        self.running: dict[tuple[WorkerId, int], tuple[RunningWorker, AsyncExitStack]] = {}

    async def list_processes(self) -> list[ProcessReport]:
        return [ProcessReport(*key, one.address) for key, (one, _) in self.running.items()]

    async def start(self, worker: DeclaredWorker, incarnation: int) -> None:
        stack = AsyncExitStack()
        spec = worker.spec(incarnation, "127.0.0.1")
        running = await stack.enter_async_context(running_worker(spec, is_ready=False))
        self.running[worker.worker_id, incarnation] = running, stack

    async def stop(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        found = self.running.pop((worker_id, incarnation), None)
        if found is not None:
            await found[1].aclose()

    async def request_resources(self, workers: Sequence[WorkerResources]) -> None:
        raise AssertionError("no worker is to be added")

    async def close(self) -> None:
        for _, stack in self.running.values():
            await stack.aclose()


@asynccontextmanager
async def cluster(model: Path) -> AsyncIterator[Gateway]:
    processes = InThisProcess()
    async with gateway(config=ROOMY) as it:
        spec = worker_spec(model)
        declared = tuple(
            DeclaredWorker(
                WorkerId(name), phases, str(model), WorkerResources(1), spec.engine, spec.kv_transfer
            )
            for name, phases in SHAPE.items()
        )
        stop = asyncio.Event()
        probe, publisher = WorkerProbe(TICK_S / 2), GatewayPublisher(it.control_address)
        loop = ControlLoop(
            processes,
            probe,
            publisher,
            ControllerConfig("test", "tiny", declared, slo=SLO, switch_mode=SwitchMode.ON),
            tick_s=TICK_S,
            clock=time.monotonic,
            sleep=asyncio.sleep,
            stop=stop,
        )
        running = asyncio.create_task(loop.run())
        try:
            await until(lambda: len(it.linked()) == len(SHAPE), "the links")
            yield it
        finally:
            stop.set()
            await running
            await probe.close()
            await publisher.close()
            await processes.close()


class Load:
    """Keeps so many requests in flight, each under a salt of its own, so that nothing is cached; checks every answer."""

    def __init__(self, gateway: Gateway, requests: list[pb.GenerateRequest]) -> None:
        self._gateway, self._requests = gateway, requests
        self._salts: Iterator[int] = itertools.count()
        self._expected: list[list[int]] = []
        self.num_answers = 0

    async def ask(self, number: int) -> list[int]:
        request = pb.GenerateRequest()
        request.CopyFrom(self._requests[number])
        request.cache_salt = f"{id(self)}-{next(self._salts)}"
        return tokens_of(await collect(self._gateway.client.Generate(request)))

    async def learn(self) -> None:
        """What is right: each alone, before anything changes."""
        self._expected = [await self.ask(number) for number in range(len(self._requests))]

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        is_over = asyncio.Event()

        async def one(first: int) -> None:
            for number in itertools.count(first):
                if is_over.is_set():
                    return
                number %= len(self._requests)
                assert await self.ask(number) == self._expected[number]
                self.num_answers += 1

        async with asyncio.TaskGroup() as group:
            for first in range(CONCURRENCY):
                group.create_task(one(first))
            yield
            is_over.set()


def serving(view: ClusterView | None, phase: Phase) -> set[str]:
    """Workers that serve it and are ready."""
    workers = view.workers if view is not None else ()
    return {w.worker_id for w in workers if phase in w.phases and w.state is LifecycleState.READY}


def test_pictures_get_another_worker_and_text_gets_it_back(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as it:
            pictures = Load(
                it,
                [
                    image_request(
                        "<image><image> what is it?", picture(seed), picture(seed + 9), max_tokens=2
                    )
                    for seed in range(4)
                ],
            )
            texts = Load(
                it, [image_request(f"{seed} " + "and so on " * 250, max_tokens=2) for seed in range(4)]
            )
            await texts.learn()
            await pictures.learn()

            def encoders() -> set[str]:
                return serving(it.dispatcher.view, Phase.ENCODE)

            async with texts.flowing():
                await until(lambda: texts.num_answers > 0, "answers")
            assert encoders() == {"encode-0"}
            async with pictures.flowing():
                await until(lambda: len(encoders()) == 2, "another encoder", MOVE_BOUND_S)
                num = pictures.num_answers
                await until(lambda: pictures.num_answers > num, "answers with both")
            async with texts.flowing():
                await until(
                    lambda: len(serving(it.dispatcher.view, Phase.PREFILL)) == 2, "its return", MOVE_BOUND_S
                )
                num = texts.num_answers
                await until(lambda: texts.num_answers > num, "answers with both")
            assert len(encoders()) == 1
            view = it.dispatcher.view
            assert view is not None
            done = [one for one in view.switches if one.change_s is not None]
            assert [(one.phases, one.needs_new_process) for one in done[:2]] == [(E, True), (P | D, True)]

    asyncio.run(scenario())


def test_what_a_process_has_loaded_it_takes_up_again(model: Path) -> None:
    """Without another process: also encode alone, and its first batch after that proves it."""

    async def scenario() -> None:
        everything = E | P | D
        async with (
            running_worker(replace(worker_spec(model, everything), worker_id=WorkerId("all"))) as one,
            running_worker(replace(worker_spec(model, P | D), worker_id=WorkerId("text"))) as text,
            gateway(config=ROOMY) as it,
        ):
            await use(it, worker_view(one), worker_view(text))
            assert one.worker.status().loaded == everything
            assert text.worker.status().loaded == P | D
            assert text.worker.status().needs_new_process(E | P | D)
            request = image_request("<image> what is it?", picture(1), max_tokens=3)
            expected = tokens_of(await collect(it.client.Generate(request)))
            for epoch, phases in enumerate((E, P | D, E), start=1):
                assert await one.worker.set_phases(one.worker.spec.incarnation, phases, epoch) is None
            assert one.worker.status().first_step_s is None
            await use(it, worker_view(one), worker_view(text))
            request.cache_salt = "not cached"
            assert tokens_of(await collect(it.client.Generate(request))) == expected
            assert one.worker.status().first_step_s is not None
            refused = await text.worker.set_phases(text.worker.spec.incarnation, E, 1)
            assert refused is not None
            assert refused.needs_new_process

    asyncio.run(scenario())
