"""One process of a worker: the real engine, whose steps take the time that a latency model says. Pure."""

import math
import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from kvtransfer.layout import KvLayout
from orchestrator.sim.network import SimNetwork
from orchestrator.sim.pictures import Batch, Pictures, SimImages
from orchestrator.sim.timers import SimTimer, SimTimers
from orchestrator.sim.transfers import SimTransfers
from workers.api import (
    Abort,
    BlockCounts,
    Command,
    Encode,
    EngineConfig,
    Event,
    FailureCode,
    KvBlocksRemoved,
    KvBlocksStored,
    KvEvent,
    Phase,
    PhaseSet,
    PhasesRefused,
    PrefillOrder,
    RequestFailed,
    StepBudget,
    WorkerId,
    WorkerSpec,
    WorkerState,
    WorkerStatus,
)
from workers.engine.engine import Engine
from workers.engine.messages import ImagesNeeded, ImagesReleased, Message, Output, TokensDecoded
from workers.engine.pacing import LayerPacing
from workers.engine.scheduler import StepPlan
from workers.engine.step_records import is_described, shape_of
from workers.engine.step_result import StepResult
from workers.latency_model import LatencyModel
from workers.step_shape import ModelShape

VOCAB_SIZE = 32_000
TEXT_PHASES = frozenset({Phase.PREFILL, Phase.DECODE})
NO_BLOCKS = BlockCounts(0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class WorkerWorld:
    """What all workers of a simulation share.

    latency: how long steps really take, of workers without one in `latency_of`; a policy that predicts has a model of its own. noise: the standard deviation of the
    logarithm of what a step takes beyond that. load_s: from the start of a process to READY.
    """

    model: ModelShape
    latency: LatencyModel
    timers: SimTimers
    network: SimNetwork
    #: Transfers of the process that listens at an address, while it lives.
    peer: Callable[[str], SimTransfers | None]
    noise: float
    load_s: float
    max_context_tokens: int
    latency_of: Mapping[WorkerId, LatencyModel] = field(default_factory=dict)
    #: None where the model takes none; then images_at is never asked.
    pictures: Pictures | None = None
    #: What the process that listens at an address has of pictures, while it lives.
    images_at: Callable[[str], SimImages | None] = lambda _address: None


def layout_of(model: ModelShape, block_size: int) -> KvLayout:
    """A cache of as many bytes as the model's, in float16."""
    head_dim = model.kv_token_bytes // (model.num_layers * 4)
    return KvLayout(model.name, "float16", block_size, model.num_layers, 1, head_dim, "rope:simulated")


class SimWorker:
    """A process, from its start to its end.

    publish: told what it says of requests, when it says it. rng: for the noise of its steps alone.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        address: str,
        world: WorkerWorld,
        publish: Callable[["SimWorker", list[Event], list[KvEvent]], None],
        rng: random.Random,
    ) -> None:
        self.spec = spec
        self.address = address
        self.is_alive = True
        self.began_at_s = world.timers.time()
        #: What it serves; that of the spec until the first switch.
        self.phases = spec.phases
        self._phase_epoch = 0
        self.num_steps = 0
        #: Time in which it computed, in seconds.
        self.busy_s = 0.0
        #: Steps take so many times as long as they should, for each reason that there is now.
        self.slowdowns: list[float] = []
        self.ended_at_s: float | None = None
        self._world = world
        self._latency = world.latency_of.get(spec.worker_id, world.latency)
        self._publish_events = publish
        self._rng = rng
        self._timers = world.timers
        self._ready_at_s = self._timers.time() + world.load_s
        #: What its engine predicts by: it learns from its own steps, and begins with the roofline.
        self._learnt = (
            LatencyModel(world.model, self._latency.device) if _is_predicting(spec.engine) else None
        )
        layout = layout_of(world.model, spec.engine.block_size)
        self.engine = Engine(
            spec.engine,
            spec.phases,
            num_blocks=spec.engine.kv_cache_bytes // layout.block_bytes,
            max_context_tokens=world.max_context_tokens,
            claim_s=spec.kv_transfer.lease_s,
            attention_tokens=world.model.attention_tokens,
            pacing=LayerPacing(
                num_layers=layout.num_layers,
                token_bytes=layout.token_bytes,
                max_chunk_bytes=spec.kv_transfer.max_chunk_bytes,
                fixed=spec.kv_transfer.layer_group_size,
            ),
            latency=self._learnt,
        )
        self.transfers = SimTransfers(
            address,
            spec.incarnation,
            layout,
            spec.kv_transfer,
            self._timers,
            world.network,
            self.post,
            world.peer,
        )
        self.images: SimImages | None = None
        if world.pictures is not None:
            self.images = SimImages(
                spec,
                address,
                world.pictures,
                self._timers,
                world.network,
                self.post,
                lambda events: self._publish_events(self, events, []),
                world.images_at,
            )
        #: Pictures and steps take turns.
        self._is_encodes_turn = True
        self._mailbox: list[Message] = []
        self._is_busy = False
        self._paused_until_s = 0.0
        self._wake: SimTimer | None = None

    @property
    def is_ready(self) -> bool:
        """It has loaded its model."""
        return self.is_alive and self._timers.time() >= self._ready_at_s

    def status(self) -> WorkerStatus | None:
        """What it answers when it is asked; None when it does not."""
        if not self.is_alive or self._timers.time() < self._paused_until_s:
            return None
        engine, spec = self.engine, self.spec
        has_text = bool(spec.phases & TEXT_PHASES)
        status = WorkerStatus(
            spec.worker_id,
            spec.incarnation,
            self.phases,
            WorkerState.READY if self.is_ready else WorkerState.LOADING,
            num_waiting=engine.num_waiting,
            num_running=engine.num_running,
            blocks=engine.block_counts() if has_text else NO_BLOCKS,
            num_leases=engine.num_leases,
            num_steps=self.num_steps,
            work=engine.work(),
            phase_epoch=self._phase_epoch,
            first_step_s=engine.first_step_s,
            step_costs=replace(self._world.latency.costs(), num_steps=self.num_steps) if has_text else None,
            loaded=self._loaded,
        )
        return status if self.images is None else self.images.with_status(status)

    @property
    def _loaded(self) -> PhaseSet:
        """As workers.worker."""
        text = TEXT_PHASES if self.spec.phases & TEXT_PHASES else frozenset()
        if self.images is None:
            return text
        return text - {Phase.PREFILL} | self.spec.phases & {Phase.ENCODE, Phase.PREFILL}

    def set_phases(self, phases: PhaseSet, phase_epoch: int) -> PhasesRefused | None:
        """As workers.worker: between two steps, and at once when it is in one."""
        if not self.is_ready or self._timers.time() < self._paused_until_s:
            return PhasesRefused("it does not answer", is_busy=True)
        if phase_epoch < self._phase_epoch:
            return PhasesRefused(f"switch {self._phase_epoch} was later than {phase_epoch}")
        if not phases <= self._loaded:
            return PhasesRefused("it would need weights or memory that it has not", needs_new_process=True)
        if self.images is not None and Phase.ENCODE in self.phases - phases and self.images.num_encodes:
            return PhasesRefused(f"{self.images.num_encodes} pictures are encoded here", is_busy=True)
        if phases != self.phases:
            problem = self.engine.set_phases(phases, self._timers.time())
            if problem is not None:
                return PhasesRefused(problem, is_busy=True)
        self.phases, self._phase_epoch = phases, phase_epoch
        return None

    def command(self, command: Command) -> None:
        """From the gateway. A process that has ended hears nothing."""
        if isinstance(command, Encode):
            self._encode(command)
        elif not (isinstance(command, Abort) and self.images is not None and self.images.abort(command.key)):
            self.post(command)

    def _encode(self, encode: Encode) -> None:
        if not self.is_alive:
            return
        if self.images is None or Phase.ENCODE not in self.phases:
            reason = f"asked for encode; serves {'+'.join(sorted(self.phases))}"
            self._publish_events(self, [RequestFailed(encode.key, FailureCode.INTERNAL, reason)], [])
            return
        self.images.submit(encode)
        self._turn_soon()

    def post(self, message: Message) -> None:
        """Hand a message to the engine; it hears it between two steps."""
        if self.is_alive:
            self._mailbox.append(message)
            self._turn_soon()

    def pause(self, until_s: float) -> None:
        """It does nothing until then: a machine that is suspended."""
        self._paused_until_s = max(self._paused_until_s, until_s)
        self.transfers.pause(self._paused_until_s)

    def die(self) -> None:
        """Its process ends, and all that it holds is gone."""
        self.is_alive = False
        self.ended_at_s = self._timers.time()
        self.transfers.die()
        if self._wake is not None:
            self._wake.cancel()

    def check_invariants(self) -> None:
        """The engine's books are right, and those of pictures."""
        if self.images is not None:
            self.images.check_invariants()
        self.engine.check_invariants()
        self.transfers.check_invariants()

    def _turn_soon(self, delay_s: float = 0.0) -> None:
        if self._is_busy or not self.is_alive:
            return
        at_s = max(self._timers.time() + delay_s, self._paused_until_s)
        if self._wake is not None:
            self._wake.cancel()
        self._wake = self._timers.call_at(at_s, self._turn)

    def _turn(self) -> None:
        """Drain the mailbox, schedule, run, publish: as workers.engine.step_loop."""
        self._wake = None
        if self._timers.time() < self._paused_until_s:
            self._turn_soon()
            return
        now_s, engine = self._timers.time(), self.engine
        messages, self._mailbox = self._mailbox, []
        for message in messages:
            engine.handle(message, now_s)
        engine.expire(now_s)
        if self._is_encodes_turn and self._run_batch():
            self._publish(engine.take_outputs())
            return
        plan = engine.schedule(now_s)
        self._is_busy = plan is not None
        self._publish(engine.take_outputs())
        if plan is not None:
            self._is_encodes_turn = True
            self._run(plan)
        elif self._run_batch():
            return
        elif self._mailbox:
            self._turn_soon()
        elif (deadline_s := engine.next_deadline_s()) is not None:
            self._turn_soon(max(0.0, deadline_s - now_s))

    def _run_batch(self) -> bool:
        """Whether pictures are encoded now."""
        batch = self.images.take_batch() if self.images is not None else None
        if batch is None or self.images is None:
            return False
        self._is_busy, self._is_encodes_turn = True, False
        batch_s = self._takes_s(self.images.batch_s(batch))
        self._timers.call_later(batch_s, self._batch_done, batch, batch_s)
        return True

    def _batch_done(self, batch: Batch, batch_s: float) -> None:
        if not self.is_alive or self._is_paused(self._batch_done, batch, batch_s):
            return
        assert self.images is not None
        self._is_busy = False
        self.images.encoded(batch, batch_s)
        self._turn_soon()

    def _takes_s(self, predicted_s: float) -> float:
        """With noise, and as slow as it is now."""
        noise = self._rng.lognormvariate(0.0, self._world.noise) if self._world.noise else 1.0
        took_s = predicted_s * noise * math.prod(self.slowdowns)
        self.busy_s += took_s
        return took_s

    def _run(self, plan: StepPlan) -> None:
        world, timers = self._world, self._timers
        shape = shape_of(plan)
        step_s = self._takes_s(self._latency.step_s(shape))
        if self._learnt is not None and is_described(plan):
            # It hears of the step before it plans the next one.
            self._learnt.observe(shape, step_s)
        num_layers = world.model.num_layers
        if any(part.sequence.is_handed_off for part in plan.chunks):
            size = plan.layer_group_size or num_layers
            for lo in range(0, num_layers, size):
                hi = min(lo + size, num_layers)
                timers.call_later(step_s * hi / num_layers, self._layers_done, plan, lo, hi)
        timers.call_later(step_s, self._step_done, plan)

    def _is_paused(self, callback: Callable[..., None], *args: object) -> bool:
        """Whether it does nothing now; this is then called when it goes on."""
        if self._timers.time() >= self._paused_until_s:
            return False
        self._timers.call_at(self._paused_until_s, callback, *args)
        return True

    def _layers_done(self, plan: StepPlan, layer_lo: int, layer_hi: int) -> None:
        if self.is_alive and not self._is_paused(self._layers_done, plan, layer_lo, layer_hi):
            self._publish([*self.engine.kv_ready(plan, layer_lo, layer_hi)])

    def _step_done(self, plan: StepPlan) -> None:
        if not self.is_alive or self._is_paused(self._step_done, plan):
            return
        tokens = [
            token_of(part.sequence.key.request_id, len(part.sequence.token_ids))
            for part in plan.slices
            if part.yields_token
        ]
        self.engine.complete(plan, StepResult(tokens), self._timers.time())
        self.num_steps += 1
        self._is_busy = False
        self._publish(self.engine.take_outputs())
        self._turn_soon()

    def _publish(self, outputs: list[Output]) -> None:
        events: list[Event] = []
        kv_events: list[KvEvent] = []
        for output in outputs:
            if isinstance(output, TokensDecoded):
                events.extend(output.events())
            elif isinstance(output, ImagesNeeded | ImagesReleased):
                assert self.images is not None
                self.images.handle(output)
            elif isinstance(output, KvBlocksStored | KvBlocksRemoved):
                kv_events.append(output)
            elif not self.transfers.handle(output):
                events.append(output)  # type: ignore[arg-type]
        if events or kv_events:
            self._publish_events(self, events, kv_events)


def _is_predicting(engine: EngineConfig) -> bool:
    return engine.step_budget is StepBudget.PREDICTED or engine.prefill_order is PrefillOrder.LEAST_SLACK


def token_of(request_id: str, position: int) -> int:
    """The token of a request at a position, whoever computes it."""
    return (zlib.crc32(request_id.encode()) + 7919 * position) % VOCAB_SIZE
