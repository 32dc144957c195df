"""Worker processes of given phases, each on a core of its own, with a gateway in this process; and requests with pictures."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.serving.worker_process import worker_process
from orchestrator.control.view import LifecycleState, WorkerView
from protos import inference_pb2 as pb
from tests.support.gateway import CONFIG, Gateway, gateway
from tests.support.waiting import until
from workers.api import Phase, PhaseSet, WorkerId

E, P, D = (frozenset({phase}) for phase in Phase)
#: Nothing is to be refused: what waits is part of what is measured, until nobody would wait for it.
CONFIG_FOR_LOAD = replace(CONFIG, request_timeout_s=60.0, max_running_requests=256, max_waiting_requests=1024)


@dataclass(frozen=True, slots=True)
class WorkerOption:
    """A worker to start. core: where it runs; None is anywhere."""

    phases: PhaseSet
    core: int | None
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request saw. Times in seconds: sent_s of this process's clock, the others since then."""

    sent_s: float
    token_times_s: tuple[float, ...]
    timings: pb.Timings
    usage: pb.Usage


@dataclass(frozen=True, slots=True)
class Served:
    """A gateway with its workers. pids: of their processes, in the order in which they were asked for."""

    gateway: Gateway
    pids: tuple[int, ...]

    async def ask(self, request: pb.GenerateRequest) -> Answer:
        """Raises grpc.RpcError when it fails."""
        sent_s = time.perf_counter()
        times_s: list[float] = []
        last = pb.GenerateResponse()
        timings = pb.Timings()
        async for last in self.gateway.client.Generate(request):
            times_s += [time.perf_counter() - sent_s] * len(last.token_ids)
            if last.HasField("timings"):
                timings = last.timings
        return Answer(sent_s, tuple(times_s), timings, last.usage)


@asynccontextmanager
async def served(model: str, workers: Sequence[WorkerOption], logs: Path, name: str) -> AsyncIterator[Served]:
    """Start them; all are ready and linked."""
    async with AsyncExitStack() as stack:

        async def start(index: int, worker: WorkerOption) -> tuple[WorkerView, int]:
            worker_id = f"{name}-{'+'.join(sorted(worker.phases))}-{index}"
            options = ("--worker-id", worker_id, "--phases", ",".join(sorted(worker.phases)), *worker.options)
            process = worker_process(model, logs / f"{worker_id}.log", *options)
            address, pid = await stack.enter_async_context(process)
            if worker.core is not None:
                pin(pid, worker.core)
            view = WorkerView(WorkerId(worker_id), 1, worker.phases, LifecycleState.READY, address)
            return view, pid

        async with asyncio.TaskGroup() as group:
            started = [group.create_task(start(i, worker)) for i, worker in enumerate(workers)]
        views, pids = zip(*(task.result() for task in started), strict=True)
        it = await stack.enter_async_context(gateway(config=CONFIG_FOR_LOAD))
        await it.publish(*views)
        wanted = {(view.worker_id, view.incarnation) for view in views}
        await until(lambda: it.linked() == wanted, "the links")
        yield Served(it, pids)


def pin(pid: int, core: int) -> None:
    """Keep all threads of a process on this core; those that it starts later stay there too."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {core})


def two_cores() -> tuple[int, int]:
    """Where two workers are kept. Raises SystemExit on a machine that has one core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this benchmark needs two cores")
    return cores[0], cores[1]


def image_request(text: str, images: Sequence[bytes], max_tokens: int) -> pb.GenerateRequest:
    """Greedy, past any end token."""
    return pb.GenerateRequest(
        text=text,
        images=[pb.Image(data=image) for image in images],
        sampling=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
    )
