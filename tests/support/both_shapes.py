"""Gateways with real workers, in this process: one worker for both phases, or prefill and decode apart."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.control.view import LifecycleState, WorkerView
from protos import inference_pb2 as pb
from tests.support.gateway import CONFIG, Gateway, collect, gateway, text_of, tokens_of
from tests.support.waiting import until
from tests.support.worker_client import (
    BOTH,
    DECODE,
    PREFILL,
    RunningWorker,
    running_pair,
    running_worker,
    worker_spec,
)

#: Room for all that a test asks at once.
ROOMY = replace(CONFIG, max_running_requests=64, max_waiting_requests=256)
Answered = list[pb.GenerateResponse]


def view(worker: RunningWorker) -> WorkerView:
    """What a controller would tell of it."""
    spec = worker.worker.spec
    return WorkerView(spec.worker_id, spec.incarnation, spec.phases, LifecycleState.READY, worker.address)


async def use(it: Gateway, *views: WorkerView) -> None:
    """Publish these workers, and wait until all are linked."""
    await it.publish(*views)
    wanted = {(worker.worker_id, worker.incarnation) for worker in views}
    await until(lambda: it.linked() == wanted, "the links")


@dataclass(frozen=True, slots=True)
class Served:
    """A gateway and the workers behind it: one, or prefill and decode."""

    gateway: Gateway
    workers: tuple[RunningWorker, ...]

    @property
    def shape(self) -> str:
        """For tables of what is expected."""
        return "together" if len(self.workers) == 1 else "apart"

    @property
    def prefill(self) -> RunningWorker:
        """The worker that reads prompts."""
        return self.workers[0]

    @property
    def decode(self) -> RunningWorker:
        """The worker that generates."""
        return self.workers[-1]

    async def ask(self, request: pb.GenerateRequest) -> Answered:
        """All messages of its answer."""
        return await collect(self.gateway.client.Generate(request))

    async def ask_all(self, requests: Sequence[pb.GenerateRequest]) -> list[Answered]:
        """At once."""
        return list(await asyncio.gather(*map(self.ask, requests)))

    async def tokens(self, request: pb.GenerateRequest) -> list[int]:
        """Those of its only sample."""
        return tokens_of(await self.ask(request))

    async def text(self, request: pb.GenerateRequest) -> str:
        """That of its only sample."""
        return text_of(await self.ask(request))


@asynccontextmanager
async def together(model: Path | str, **engine: Any) -> AsyncIterator[Served]:
    """One worker serves both phases."""
    async with running_worker(worker_spec(model, BOTH, **engine)) as both, gateway(config=ROOMY) as it:
        await use(it, view(both))
        yield Served(it, (both,))


@asynccontextmanager
async def apart(model: Path | str, **engine: Any) -> AsyncIterator[Served]:
    """A prefill worker and a decode worker."""
    specs = worker_spec(model, PREFILL, **engine), worker_spec(model, DECODE, **engine)
    async with running_pair(*specs) as pair, gateway(config=ROOMY) as it:
        await use(it, *map(view, pair))
        yield Served(it, pair)


@asynccontextmanager
async def both_shapes(model: Path | str, **engine: Any) -> AsyncIterator[tuple[Served, Served]]:
    """Both, side by side: together, then apart."""
    async with together(model, **engine) as one, apart(model, **engine) as two:
        yield one, two


def random_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Tokens of the tiny model's, none of them special."""
    rng = random.Random(1000 * seed + num_tokens)
    return [rng.randrange(3, 384) for _ in range(num_tokens)]


def request_of(
    prompt: list[int] | str, max_tokens: int = 24, *, ignore_eos: bool = True, **sampling: Any
) -> pb.GenerateRequest:
    """Of token ids, or of a text. sampling: fields of SamplingParams."""
    request = pb.GenerateRequest(
        sampling=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, **sampling)
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request
