"""Roles that follow a load that shifts: a deployment on Ray whose controller gives prefill, then decode, another worker by itself."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest

from orchestrator.control.slo import Slo
from orchestrator.control.view import ClusterView, LifecycleState, SwitchState, SwitchView
from orchestrator.control.view_wire import switch_from_pb, view_from_pb
from orchestrator.runtime.registry import Registry
from protos import control_pb2, control_pb2_grpc, inference_pb2_grpc
from protos import inference_pb2 as pb
from tests.support.both_shapes import random_prompt, request_of, together
from tests.support.command import User
from tests.support.gateway import collect, tokens_of
from tests.support.tiny_model import write_tiny_gguf
from tests.support.waiting import BOUND_S, until
from workers.api import Phase
from workers.step_cost import StepCost

pytestmark = pytest.mark.integration

MANIFEST = """\
apiVersion: phasewise/v1
kind: Deployment
metadata: {{name: follows}}
spec:
  model: {{source: "{model}"}}
  workers:
    - {{name: prefill, phases: [prefill], resources: {{cpus: 0.5}}, engine: {engine}}}
    - {{name: decode, phases: [decode], replicas: 2, resources: {{cpus: 0.5}}, engine: {engine}}}
  slo: {{ttftMs: {ttft_ms:.3f}, tpotMs: {tpot_ms:.3f}}}
  gateway: {{address: "127.0.0.1:0", controlAddress: "127.0.0.1:0"}}
  controller: {{tickMs: 200, heartbeatTimeoutMs: 20000, roleSwitch: "on"}}
"""
ENGINE = "{kvCacheMiB: 64, tokenBudget: 128, maxRunningSequences: 64}"
#: Requests at a time.
CONCURRENCY = 32
#: What is asked of decode at the targets, in workers, by all of them with long answers: too much for two.
ASKED = 4.0
#: What a step costs whatever it computes grows as workers share cores: the target has room for that.
OVERHEADS = 3.0
LONG_PROMPT, SHORT_PROMPT, LONG_ANSWER, SHORT_ANSWER = 400, 12, 120, 2
PROMPTS = [request_of(random_prompt(LONG_PROMPT, seed), SHORT_ANSWER) for seed in range(4)]
ANSWERS = [request_of(random_prompt(SHORT_PROMPT, seed), LONG_ANSWER) for seed in range(4)]
#: A move that brought nothing, while the machine had other work say, is not tried again for a minute (PhaseSets.blocked_s).
MOVE_BOUND_S = BOUND_S + 60.0


@dataclass(frozen=True, slots=True)
class Reference:
    """What one worker alone answers, by prompt, and targets by how fast it was."""

    answers: dict[bytes, list[int]]
    slo: Slo


async def refer(model: Path) -> Reference:
    """Each alone; then many at once, so that it learns how long steps take."""
    async with together(model, token_budget=128, kv_cache_bytes=64 * 2**20) as served:
        answers = {
            one.SerializeToString(): await served.tokens(
                request_of(list(one.token_ids.ids), one.sampling.max_tokens)
            )
            for one in (*PROMPTS, *ANSWERS)
        }
        await served.ask_all(ANSWERS * 4)
        costs = served.prefill.worker.status().step_costs
        assert costs is not None
        cost = StepCost.learnt(costs)
    context = SHORT_PROMPT + LONG_ANSWER // 2
    decoding_s = cost.step_s(CONCURRENCY, CONCURRENCY * context) - cost.overhead_s
    return Reference(
        answers, Slo(8 * cost.prompt_s(LONG_PROMPT), OVERHEADS * cost.overhead_s + decoding_s / ASKED)
    )


@dataclass(slots=True)
class Deployed:
    """One deployment, and all that its view has shown."""

    inference: inference_pb2_grpc.InferenceServiceStub
    control: control_pb2_grpc.GatewayControlServiceStub
    answers: dict[bytes, list[int]]
    salts: "itertools.count[int]" = field(default_factory=itertools.count)
    view: ClusterView | None = None
    num_answers: int = 0

    async def watch(self) -> None:
        """Follow the view, in which each phase has a worker that is ready at every moment."""
        while True:
            self.view = view_from_pb((await self.control.GetView(control_pb2.GetViewRequest())).view)
            assert all(self.serving(phase) for phase in (Phase.PREFILL, Phase.DECODE)), self.view
            await asyncio.sleep(0.02)

    def serving(self, phase: Phase) -> set[str]:
        """Workers that may be used for it."""
        workers = self.view.workers if self.view is not None else ()
        return {one.worker_id for one in workers if phase in one.phases and one.state is LifecycleState.READY}

    def made(self) -> list[SwitchView]:
        """Switches whose worker has changed."""
        switches = self.view.switches if self.view is not None else ()
        return [one for one in switches if one.state in (SwitchState.CHANGED, SwitchState.PROVEN)]

    @asynccontextmanager
    async def flowing(self, requests: list[pb.GenerateRequest]) -> AsyncIterator[None]:
        """Keeps requests in flight, each under a salt of its own, so that nothing is cached; checks every answer."""
        is_over = asyncio.Event()

        async def one(first: int) -> None:
            for number in itertools.count(first):
                if is_over.is_set():
                    return
                asked = requests[number % len(requests)]
                request = pb.GenerateRequest()
                request.CopyFrom(asked)
                request.cache_salt = f"{next(self.salts)}"
                answer = tokens_of(await collect(self.inference.Generate(request)))
                assert answer == self.answers[asked.SerializeToString()]
                self.num_answers += 1

        async with asyncio.TaskGroup() as group:
            for first in range(CONCURRENCY):
                group.create_task(one(first))
            yield
            is_over.set()

    async def more_answers(self) -> None:
        """As many as were in flight."""
        wanted = self.num_answers + CONCURRENCY
        await until(lambda: self.num_answers >= wanted, "answers after the switch")

    async def decisions(self) -> list[SwitchView]:
        """All that the gateway remembers."""
        found = await self.control.GetDecisions(control_pb2.GetDecisionsRequest())
        return [switch_from_pb(one.switch) for one in found.decisions if one.HasField("switch")]


@asynccontextmanager
async def deployed(user: User, manifest: Path, answers: dict[bytes, list[int]]) -> AsyncIterator[Deployed]:
    up = await asyncio.to_thread(user.run, "up", str(manifest))
    assert up.returncode == 0, up.stderr
    try:
        known = Registry(user.state / "phasewise" / "deployments").get("follows")
        assert known is not None
        async with AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(grpc.aio.insecure_channel(address))
                for address in (known.address, known.control_address)
            ]
            it = Deployed(
                inference_pb2_grpc.InferenceServiceStub(channels[0]),
                control_pb2_grpc.GatewayControlServiceStub(channels[1]),
                answers,
            )
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(it.watch())
                yield it
                watching.cancel()
    finally:
        down = await asyncio.to_thread(user.run, "down", "follows")
    assert down.returncode == 0, down.stderr


def test_prefill_then_decode_gets_another_worker_as_the_load_asks(tmp_path: Path, cache_home: Path) -> None:
    del cache_home
    # Its steps are much longer than what they cost whatever they compute.
    model = write_tiny_gguf(
        tmp_path / "model.gguf", num_layers=8, hidden=256, intermediate=512, max_context_tokens=1024
    )
    manifest, user = tmp_path / "follows.yaml", User(tmp_path / "state")

    async def scenario() -> None:
        reference = await refer(model)
        slo = reference.slo
        targets = {"ttft_ms": 1000 * slo.ttft_s, "tpot_ms": 1000 * slo.tpot_s}
        manifest.write_text(MANIFEST.format(model=model, engine=ENGINE, **targets))
        async with deployed(user, manifest, reference.answers) as it:

            def serve(phase: Phase, num_workers: int) -> Callable[[], bool]:
                return lambda: len(it.serving(phase)) >= num_workers

            async with it.flowing(PROMPTS):
                await until(serve(Phase.PREFILL, 2), "another worker for prefill", MOVE_BOUND_S)
                await it.more_answers()
            assert it.made()
            async with it.flowing(ANSWERS):
                await until(serve(Phase.DECODE, 3), "all workers for decode", MOVE_BOUND_S)
                await it.more_answers()
                # The second may have been made while the last long prompts were answered.
                await until(lambda: len(it.made()) >= 2, "two switches have been made")
                await until(
                    lambda: any(one.met_after is not None for one in it.made()), "the effect has been seen"
                )
            decisions = await it.decisions()
            made = [one for one in decisions if one.state in (SwitchState.CHANGED, SwitchState.PROVEN)]
            assert len(made) >= 2
            # Nobody asked for them: each names what the policy saw, expected and found.
            assert all(one.digest and one.why and one.predicted is not None for one in made)
            assert made[0].predicted is not None
            assert made[0].predicted > 1.0
            # Not of one whose worker had to change again before it could be seen.
            assert any(one.met_after is not None for one in made)
            assert any(one.first_step_s is not None for one in made)
            answer = await it.control.GetView(control_pb2.GetViewRequest())
            assert (answer.num_failed_requests, answer.num_refused_requests) == (0, 0)

    asyncio.run(scenario())
