"""Gateways with real workers that take pictures, in this process, in any shape."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from protos import inference_pb2 as pb
from tests.support.both_shapes import ROOMY, use, view
from tests.support.gateway import Gateway, collect, gateway, tokens_of
from tests.support.worker_client import RunningWorker, running_worker, worker_spec
from workers.api import Device, Phase, PhaseSet, WorkerId

E, P, D = (frozenset({phase}) for phase in Phase)
#: One worker for all; each phase apart; several of each; the pairs; and several for all.
SHAPES: dict[str, tuple[PhaseSet, ...]] = {
    "EPD": (E | P | D,),
    "E+P+D": (E, P, D),
    "2E+2P+D": (E, E, P, P, D),
    "EP+D": (E | P, D),
    "E+PD": (E, P | D),
    "EPD+EPD": (E | P | D, E | P | D),
}


@dataclass(frozen=True, slots=True)
class ServedImages:
    """A gateway and the workers behind it."""

    gateway: Gateway
    workers: tuple[RunningWorker, ...]

    async def tokens(self, request: pb.GenerateRequest) -> list[int]:
        """Those of its only sample."""
        return tokens_of(await collect(self.gateway.client.Generate(request)))

    def with_phase(self, phase: Phase) -> list[RunningWorker]:
        """Workers that serve it."""
        return [one for one in self.workers if phase in one.worker.spec.phases]

    async def check_invariants(self) -> None:
        """Of all."""
        for one in self.workers:
            await one.worker.check_invariants()


@asynccontextmanager
async def served(
    model: Path | str, shape: Sequence[PhaseSet], devices: Sequence[Device] = (), **engine: Any
) -> AsyncIterator[ServedImages]:
    """Workers with these phases. devices: of each; all on the CPU without."""
    async with AsyncExitStack() as stack:
        workers = []
        for i, phases in enumerate(shape):
            spec = worker_spec(model, phases, **engine)
            device = devices[i] if devices else Device.CPU
            spec = replace(spec, worker_id=WorkerId(f"{spec.worker_id[:-2]}-{i}"), device=device)
            workers.append(await stack.enter_async_context(running_worker(spec)))
        it = await stack.enter_async_context(gateway(config=ROOMY))
        await use(it, *map(view, workers))
        yield ServedImages(it, tuple(workers))


def image_request(text: str, *images: bytes, max_tokens: int = 12, **fields: Any) -> pb.GenerateRequest:
    """A text with the model's placeholder once for each picture."""
    return pb.GenerateRequest(
        text=text,
        images=[pb.Image(data=image) for image in images],
        sampling=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        **fields,
    )
