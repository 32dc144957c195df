"""One process of a worker: the real engine, whose steps take the time that a latency model says. Pure."""

import math
import random
from collections.abc import Callable, Generator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Protocol

from kvtransfer.layout import KvLayout
from orchestrator.control.observation import ProcessKey
from orchestrator.sim.leap import Leap, token_of, tokens_of
from orchestrator.sim.network import GATEWAY, SimNetwork, Stream
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
    Migrate,
    Phase,
    PhaseSet,
    PhasesRefused,
    PrefillOrder,
    RequestFailed,
    RequestKey,
    StepBudget,
    Submit,
    WorkerId,
    WorkerSpec,
    WorkerState,
    WorkerStatus,
    is_last,
)
from workers.device.buckets import MAX_MIXED_TOKENS
from workers.engine.engine import Engine
from workers.engine.messages import ImagesNeeded, ImagesReleased, Message, Output, TokensDecoded
from workers.engine.pacing import GPU_LAYER_LAUNCH_S, LayerPacing
from workers.engine.step_plan import StepPlan
from workers.engine.step_records import is_described, shape_of
from workers.engine.step_result import StepResult
from workers.latency_model import LatencyModel
from workers.step_shape import ENOUGH_STEPS, FactorSource, ModelShape, StepCosts

#: Steps that are worth a leap.
MIN_LEAP = 2
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
    #: Steps may be leaps.
    is_leaping: bool = True


class GatewayWay(Protocol):
    """The way of a process to the gateway."""

    def publish(
        self,
        process: "SimWorker",
        events: list[Event],
        kv_events: list[KvEvent],
        decoded: list[TokensDecoded],
    ) -> None:
        """It says this now: of requests, of its cache, and one token more of each of some sequences."""

    def can_wait(self, process: "SimWorker") -> bool:
        """Nobody at the gateway needs to know now which tokens have come from it."""

    def begin_leap(self, process: "SimWorker", leap: Leap) -> None:
        """Tokens of this leap will be told of by `leap_step`."""

    def end_leap(self, process: "SimWorker") -> None:
        """There will be no more of them."""

    def leap_step(self, process: "SimWorker", leap: Leap, kv_events: SequenceOf[KvEvent]) -> None:
        """It sends the tokens of one more step now, and this beside them."""


def layout_of(model: ModelShape, block_size: int) -> KvLayout:
    """A cache of as many bytes as the model's, in float16."""
    head_dim = model.kv_token_bytes // (model.num_layers * 4)
    return KvLayout(model.name, "float16", block_size, model.num_layers, 1, head_dim, "rope:simulated")


class SimWorker:
    """A process, from its start to its end.

    rng: for the noise of its steps alone.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        address: str,
        world: WorkerWorld,
        gateway: GatewayWay,
        rng: random.Random,
    ) -> None:
        self.spec = spec
        self.address = address
        self.is_alive = True
        self.began_at_s = world.timers.time()
        #: What it serves; that of the spec until the first switch.
        self.phases = spec.phases
        self._phase_epoch = 0
        #: Without those of the present leap.
        self._num_steps = 0
        #: Time in which it computed, in seconds.
        self.busy_s = 0.0
        #: Steps take so many times as long as they should, for each reason that there is now.
        self.slowdowns: list[float] = []
        self.ended_at_s: float | None = None
        self._world = world
        self._latency = world.latency_of.get(spec.worker_id, world.latency)
        self._costs = world.latency.costs()
        self._gateway = gateway
        self._rng, self._noise = rng, world.noise
        #: To the gateway.
        self.way = world.network.way(address, GATEWAY)
        self._carry = world.network.carry
        self._timers = world.timers
        self._ready_at_s = self._timers.now_s + world.load_s
        own = spec.profile
        #: What its latency model begins with; None: the roofline. A profile of what is not simulated says nothing here.
        self._profile = own if own is not None and own.is_of(world.model, self._latency.device) else None
        #: What its engine predicts by: it learns from its own steps.
        self._learnt: LatencyModel | None = None
        if _is_predicting(spec.engine):
            self._learnt = (
                LatencyModel(world.model, self._latency.device)
                if self._profile is None
                else LatencyModel.profiled(self._profile)
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
                layer_launch_s=GPU_LAYER_LAUNCH_S if self._latency.device.is_reading_hidden else 0.0,
                max_graph_tokens=MAX_MIXED_TOKENS,
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
                lambda events: self._tell(events, [], []),
                world.images_at,
            )
        #: The gateway's newest session of which it has not seen the end; None before the first.
        self.stream: Stream | None = None
        #: Requests that have no end, by the session that each came by.
        self._sessions: dict[RequestKey, Stream] = {}
        #: Pictures and steps take turns.
        self._is_encodes_turn = True
        self._mailbox: list[Message] = []
        self._is_busy = False
        self._paused_until_s = 0.0
        self._wake: SimTimer | None = None
        #: The steps that it is in, if they are one; what they take.
        self._leap: Leap | None = None
        self._leap_steps = self._latency.decode_steps(1)
        #: By the number of decodes.
        self._decode_steps = {1: self._leap_steps}

    @property
    def key(self) -> ProcessKey:
        """Names the process."""
        return self.spec.worker_id, self.spec.incarnation

    @property
    def num_steps(self) -> int:
        """That have ended."""
        return self._num_steps + (self._leap.num_done if self._leap is not None else 0)

    @property
    def is_ready(self) -> bool:
        """It has loaded its model."""
        return self.is_alive and self._timers.now_s >= self._ready_at_s

    def status(self) -> WorkerStatus | None:
        """What it answers when it is asked; None when it does not."""
        if not self.is_alive or self._timers.now_s < self._paused_until_s:
            return None
        self._catch_up()
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
            step_costs=self._step_costs() if has_text else None,
            loaded=self._loaded,
            room_tokens=engine.room_tokens() if has_text else None,
        )
        return status if self.images is None else self.images.with_status(status)

    def _step_costs(self) -> StepCosts:
        """As a worker has learnt them that knows how long steps really take."""
        num_steps = self.num_steps
        first = FactorSource.ROOFLINE if self._profile is None else FactorSource.PROFILE
        source = FactorSource.FITTED if num_steps >= ENOUGH_STEPS else first
        return replace(self._costs, num_steps=num_steps, source=source)

    @property
    def _loaded(self) -> PhaseSet:
        """As workers.worker."""
        text = TEXT_PHASES if self.spec.phases & TEXT_PHASES else frozenset()
        if self.images is None:
            return text
        return text - {Phase.PREFILL} | self.spec.phases & {Phase.ENCODE, Phase.PREFILL}

    def set_phases(self, phases: PhaseSet, phase_epoch: int) -> PhasesRefused | None:
        """As workers.worker: between two steps, and at once when it is in one."""
        if not self.is_ready or self._timers.now_s < self._paused_until_s:
            return PhasesRefused("it does not answer", is_busy=True)
        if phase_epoch < self._phase_epoch:
            return PhasesRefused(f"switch {self._phase_epoch} was later than {phase_epoch}")
        if not phases <= self._loaded:
            return PhasesRefused("it would need weights or memory that it has not", needs_new_process=True)
        if self.images is not None and Phase.ENCODE in self.phases - phases and self.images.num_encodes:
            return PhasesRefused(f"{self.images.num_encodes} pictures are encoded here", is_busy=True)
        if phases != self.phases:
            self._catch_up()
            problem = self.engine.set_phases(phases, self._timers.now_s)
            if problem is not None:
                return PhasesRefused(problem, is_busy=True)
        self.phases, self._phase_epoch = phases, phase_epoch
        return None

    # Sessions: as workers.sessions.

    def open_stream(self) -> Stream:
        """A session of the gateway begins."""
        self.stream = Stream()
        return self.stream

    def stream_ended(self, stream: Stream) -> None:
        """It sees that: what came by this session is aborted."""
        if not self.is_alive or self._is_paused(self.stream_ended, stream):
            return
        stream.is_closed = True
        if self.stream is stream:
            self.stream = None
        for key in [key for key, one in self._sessions.items() if one is stream]:
            del self._sessions[key]
            self._abort(Abort(key))

    def command(self, command: Command, stream: Stream) -> None:
        """From the gateway, by this session. A process that has ended hears nothing."""
        if not self.is_alive or stream.is_closed:
            return
        match command:
            case Encode():
                self._sessions[command.key] = stream
                self._encode(command)
            case Submit():
                self._sessions[command.key] = stream
                self.post(command)
            case Abort():
                if self._sessions.pop(command.key, None) is not None:
                    self._abort(command)
            case Migrate():
                if command.key in self._sessions:
                    self.post(command)
            case _:
                self.post(command)

    def _abort(self, abort: Abort) -> None:
        if self.images is None or not self.images.abort(abort.key):
            self.post(abort)

    def _encode(self, encode: Encode) -> None:
        if self.images is None or Phase.ENCODE not in self.phases:
            reason = f"asked for encode; serves {'+'.join(sorted(self.phases))}"
            self._tell([RequestFailed(encode.key, FailureCode.INTERNAL, reason)], [], [])
            return
        self.images.submit(encode)
        self._turn_soon()

    def post(self, message: Message) -> None:
        """Hand a message to the engine; it hears it between two steps."""
        if self.is_alive:
            self._mailbox.append(message)
            self.stop_leap()
            self._turn_soon()

    def pause(self, until_s: float) -> None:
        """It does nothing until then: a machine that is suspended."""
        self._paused_until_s = max(self._paused_until_s, until_s)
        self._look_at_leap()
        self.transfers.pause(self._paused_until_s)

    def die(self) -> None:
        """Its process ends, and all that it holds is gone."""
        self.is_alive = False
        self._look_at_leap()
        self.ended_at_s = self._timers.now_s
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
        at_s = max(self._timers.now_s + delay_s, self._paused_until_s)
        if self._wake is not None:
            self._wake.cancel()
        self._wake = self._timers.call_at(at_s, self._turn)

    def _turn(self) -> None:
        """Drain the mailbox, schedule, run, publish: as workers.engine.step_loop."""
        self._wake = None
        if self._is_busy:
            # What was told before this batch of pictures began asked for this turn; its end brings one.
            return
        if self._timers.now_s < self._paused_until_s:
            self._turn_soon()
            return
        now_s, engine = self._timers.now_s, self.engine
        messages, self._mailbox = self._mailbox, []
        for message in messages:
            engine.handle(message, now_s)
        engine.expire(now_s)
        if self._leap is not None and self._go_on(self._leap):
            return
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
        took_s = predicted_s
        if self._noise:
            took_s *= self._rng.lognormvariate(0.0, self._noise)
        if self.slowdowns:
            took_s *= math.prod(self.slowdowns)
        self.busy_s += took_s
        return took_s

    def _run(self, plan: StepPlan) -> None:
        world, timers = self._world, self._timers
        if self._begin_leap(plan):
            return
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

    # Leaps.

    def _begin_leap(self, plan: StepPlan) -> bool:
        """Do this step, and those after it, as a leap, if that may be."""
        # Who learns from each step, or encodes between two, is not the same for many steps.
        is_disturbed = plan.chunks or self._mailbox or self._learnt is not None or self.images is not None
        if is_disturbed or not self._gateway.can_wait(self):
            return False
        num_steps = self.engine.num_plain_steps(plan)
        if num_steps < MIN_LEAP:
            return False
        until_s = self.engine.next_deadline_s() or math.inf
        self._leap = leap = Leap(plan, num_steps, self.engine.pool.block_size, until_s)
        num = leap.num_sequences
        if num not in self._decode_steps:
            self._decode_steps[num] = self._latency.decode_steps(num)
        self._leap_steps = self._decode_steps[num]
        self._gateway.begin_leap(self, leap)
        self._take_steps(leap)
        return True

    def _go_on(self, leap: Leap) -> bool:
        """Whether it does, after messages; it is over if not."""
        num_steps = self.engine.go_on(leap.plan) if self._gateway.can_wait(self) else 0
        if num_steps == 0:
            self._leave_leap()
            return False
        self._is_busy = True
        leap.go_on(num_steps, self.engine.next_deadline_s() or math.inf)
        self._publish(self.engine.take_outputs())
        self._take_steps(leap)
        return True

    def _take_steps(self, leap: Leap) -> None:
        steps = self._steps(leap)
        self._timers.repeat_at(next(steps), steps.send)

    def stop_leap(self) -> None:
        """If it is in a leap, that goes on after the present step only if the engine says so."""
        if self._leap is not None:
            self._leap.stop()

    def _look_at_leap(self) -> None:
        if self._leap is not None:
            self._leap.look()

    def _steps(self, leap: Leap) -> Generator[float, float, None]:
        """Says, whenever it is told that a step of the leap has ended, when the next one does; infinity: there is none."""
        carry, way, num_bytes, arrived = self._carry, self.way, leap.num_bytes, leap.arrivals_s.append
        takes_s, step_s, num_sequences = self._takes_s, self._leap_steps.step_s, leap.num_sequences
        context = leap.context
        end_s = self._timers.now_s + takes_s(step_s(context))
        while True:
            now_s = yield end_s
            if leap.num_done == leap.num_calm or now_s >= leap.until_s:
                end_s = self._see_to_leap(leap, now_s)
                context = leap.context
                continue
            leap.num_done += 1
            arrived(carry(way, now_s, num_bytes))
            context += num_sequences
            end_s = now_s + takes_s(step_s(context))

    def _see_to_leap(self, leap: Leap, now_s: float) -> float:
        """The same for a step after which there is more to do than to count."""
        if not self.is_alive:
            return math.inf
        if now_s < self._paused_until_s:
            return self._paused_until_s
        full = leap.full()
        is_short = bool(full) and self.engine.pool.num_available < len(full)
        is_heard = leap.is_stopped and not self._gateway.can_wait(self)
        if leap.is_last or now_s >= leap.until_s or is_short or is_heard:
            self._leave_leap()
            self._step_done(leap.plan)
            return math.inf
        leap.end_step()
        if full:
            self._fill_blocks(leap, full)
        else:
            self._gateway.leap_step(self, leap, ())
        if leap.is_stopped:
            # What comes next is the engine's to say.
            self._catch_up()
            self._is_busy = False
            self._turn_soon()
            return math.inf
        return now_s + self._takes_s(self._leap_steps.step_s(leap.context))

    def _leave_leap(self) -> None:
        assert self._leap is not None
        self._catch_up()
        self._gateway.end_leap(self)
        self._num_steps += self._leap.num_done
        self._leap = None

    def _fill_blocks(self, leap: Leap, full: list[int]) -> None:
        """These sequences have filled a block with the step that has just ended, and need another one for the next."""
        engine, decodes = self.engine, leap.plan.decodes
        for index in full:
            engine.extend(decodes[index], leap.missing(index))
        # Nothing else comes of it.
        self._gateway.leap_step(self, leap, engine.pool.take_events())
        if not leap.is_stopped:
            engine.make_room([decodes[index] for index in full])
        if engine.pool.index.news:
            self._publish(engine.take_outputs())

    def _catch_up(self) -> None:
        """The engine gets what the steps of a leap have done so far."""
        leap = self._leap
        if leap is None:
            return
        extend, num_done = self.engine.extend, leap.num_done
        for sequence, start in zip(leap.plan.decodes, leap.starts, strict=True):
            num_known, end = len(sequence.token_ids), start + num_done
            if num_known < end:
                extend(sequence, tokens_of(sequence.key.request_id, num_known, end))

    def _is_paused(self, callback: Callable[..., None], *args: object) -> bool:
        """Whether it does nothing now; this is then called when it goes on."""
        if self._timers.now_s >= self._paused_until_s:
            return False
        self._timers.call_at(self._paused_until_s, callback, *args)
        return True

    def _layers_done(self, plan: StepPlan, layer_lo: int, layer_hi: int) -> None:
        if self.is_alive and not self._is_paused(self._layers_done, plan, layer_lo, layer_hi):
            self._publish([*self.engine.kv_ready(plan, layer_lo, layer_hi)])

    def _step_done(self, plan: StepPlan) -> None:
        if not self.is_alive or self._is_paused(self._step_done, plan):
            return
        yielding = [*plan.decodes, *(part.sequence for part in plan.chunks if part.yields_token)]
        tokens = [token_of(one.key.request_id, len(one.token_ids)) for one in yielding]
        self.engine.complete(plan, StepResult(tokens), self._timers.now_s)
        self._num_steps += 1
        self._is_busy = False
        self._publish(self.engine.take_outputs())
        self._turn_soon()

    def _publish(self, outputs: list[Output]) -> None:
        events: list[Event] = []
        kv_events: list[KvEvent] = []
        decoded: list[TokensDecoded] = []
        for output in outputs:
            if isinstance(output, TokensDecoded):
                decoded.append(output)
            elif isinstance(output, ImagesNeeded | ImagesReleased):
                assert self.images is not None
                self.images.handle(output)
            elif isinstance(output, KvBlocksStored | KvBlocksRemoved):
                kv_events.append(output)
            elif not self.transfers.handle(output):
                events.append(output)  # type: ignore[arg-type]
        if events or kv_events or decoded:
            self._tell(events, kv_events, decoded)

    def _tell(self, events: list[Event], kv_events: list[KvEvent], decoded: list[TokensDecoded]) -> None:
        """The gateway."""
        for event in events:
            if is_last(event):
                self._sessions.pop(event.key, None)
        self._gateway.publish(self, events, kv_events, decoded)


def _is_predicting(engine: EngineConfig) -> bool:
    return engine.step_budget is StepBudget.PREDICTED or engine.prefill_order is PrefillOrder.LEAST_SLACK
