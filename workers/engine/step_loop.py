"""The worker's main loop: drain the mailbox, schedule, run, publish."""

import logging
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from workers.api import BlockCounts, KvLedger, KvReuseCounts, Phase, PhaseSet, PhaseWork
from workers.engine.engine import Engine
from workers.engine.idle_check import IdleCheck
from workers.engine.lookahead import entries_of, still_there
from workers.engine.messages import Message, Output
from workers.engine.running import (
    BeginningBrokeError,
    Begun,
    Flight,
    OverlappingRunner,
    Runner,
    SharedStep,
    Splitting,
)
from workers.engine.sides import Acts, Sides
from workers.engine.step_plan import StepPlan
from workers.engine.step_records import is_described, shape_of
from workers.latency_model import LatencyModel
from workers.step_choice import Mixed
from workers.step_shape import StepCosts

logger = logging.getLogger(__name__)

#: The loop looks at its stop flag at least this often, in seconds.
MAX_IDLE_S = 0.5
#: How often it is looked which of two steps has ended, in seconds. The next one of each is begun by then, so that none waits for it.
POLL_S = 1e-4
#: The room for prompts is counted in every step while no more sequences run, else in every so many: it takes 1 us for each.
FEW_SEQUENCES, ROOM_EVERY_STEPS = 32, 8
#: Steps that may break in a row before the worker says that it cannot serve.
MAX_BROKEN_STEPS = 3

#: What `SharingLog` calls steps of both phases.
TOGETHER = "together"

NO_REUSE = KvReuseCounts()
NO_WORK = PhaseWork()

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine's counters at one moment between two steps."""

    num_waiting: int
    num_running: int
    blocks: BlockCounts
    num_leases: int
    num_steps: int
    leaked_blocks: int = 0
    num_invariant_failures: int = 0
    reuse: KvReuseCounts = NO_REUSE
    #: See Engine.
    num_wrong_prefixes: int = 0
    work: PhaseWork = NO_WORK
    first_step_s: float | None = None
    #: None in a loop that was given no latency model.
    step_costs: StepCosts | None = None
    #: See SharingLog.seconds; none in a loop that splits no steps.
    layout_s: tuple[tuple[str, float], ...] = ()
    #: See Engine; up to ROOM_EVERY_STEPS old while many sequences run.
    room_tokens: int = 0


class StepLoop:
    """Runs an engine in a thread of its own.

    `post`, `call`, `ledger` and `snapshot` may be used from any thread. `publish` is called in the loop's thread with what came out,
    `on_broken` once, when steps keep failing. latency: learns from each step what it took, from its planning until its tokens were
    published, or on the device where the next one was begun meanwhile. overlapping: plans a step while the one before it runs, where
    that can be; None waits for each. splitting: prompts and decodes may be steps at the same time; None has them in one.
    """

    def __init__(
        self,
        engine: Engine,
        runner: Runner,
        publish: Callable[[list[Output]], None],
        on_broken: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        latency: LatencyModel | None = None,
        overlapping: OverlappingRunner | None = None,
        splitting: Splitting | None = None,
    ) -> None:
        self.engine = engine
        self.num_steps = 0
        self._runner = runner
        self._publish = publish
        self._on_broken = on_broken
        self._clock = clock
        self._latency = latency
        self._overlapping = overlapping
        self._flight: Flight | None = None
        self._splitting = splitting
        acts = Acts(self._plan, self._begin_beside, self._broke, self._wait, self._complete)
        self._sides = Sides(engine, acts, clock)
        # Not bounded here: the engine refuses requests past its limits, and a transfer's messages must
        # never be lost. Each is a few hundred bytes.
        self._mailbox: queue.SimpleQueue[Message | Callable[[], None] | None] = queue.SimpleQueue()
        self._is_stopped = False
        self._num_broken_steps = 0
        self._is_broken = False
        self._idle_check = IdleCheck(engine)
        #: As of the last count.
        self._room_tokens = 0
        self._snapshot = self._take_snapshot()

    @property
    def snapshot(self) -> EngineSnapshot:
        """As of the last publication or the last idle turn of the loop. Never torn: replaced as a whole."""
        return self._snapshot

    def post(self, message: Message) -> None:
        """Hand a message to the engine."""
        self._mailbox.put(message)

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run this between two steps, in the loop's thread, while `run` runs; what it returns or raises is the result.

        It is not run when whoever asked has cancelled before.
        """
        result: Future[Result] = Future()

        def act() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                found = function()
            except BaseException as error:  # noqa: BLE001 - handed to whoever asked
                result.set_exception(error)
            else:
                result.set_result(found)

        self._mailbox.put(act)
        return result

    def ledger(self) -> "Future[KvLedger]":
        """Who holds which blocks, between two steps; the snapshot then knows of leaked ones too."""
        return self.call(lambda: self._idle_check.ledger(self._clock()))

    def set_phases(self, phases: PhaseSet) -> "Future[str | None]":
        """See Engine."""

        def change() -> str | None:
            problem = self.engine.set_phases(phases, self._clock())
            self._snapshot = self._take_snapshot()
            return problem

        return self.call(change)

    def stop(self) -> None:
        """Make `run` return after the step it is in."""
        self._is_stopped = True
        self._mailbox.put(None)

    def run(self) -> None:
        """Until `stop`."""
        may_wait = True
        while not self._is_stopped:
            try:
                self._drain_mailbox(self._idle_s() if may_wait else 0.0)
                may_wait = not self.step()
            except Exception:
                # The engine's own bug: say so and leave, never spin.
                logger.exception("engine_broken")
                self._on_broken("the engine failed; see the worker's log")
                return

    def step(self) -> bool:
        """Schedule and run one step; False when there was nothing to compute.

        With an overlapping runner: schedule and begin one, if there is one, and complete the one before it. Of steps beside each other:
        begin what can be begun, and complete the one that ends first.
        """
        if self._splitting is not None:
            return self._step_shared(self._splitting)
        return self._step_whole()

    def _step_shared(self, splitting: Splitting) -> bool:
        now_s = self._clock()
        self.engine.expire(now_s)
        step = None
        if self.engine.may_split:
            step = splitting.sharing.step(now_s, self.engine.load())
        if step is not None and not isinstance(step, Mixed):
            if self._flight is not None:
                # A step of both ends before steps of each begin, and the other way round.
                flight, self._flight = self._flight, None
                self._complete(flight)
                return True
            if self._sides.turn(now_s, step):
                return True
            # Of a phase that is to be alone nothing can begin; the other one may have something.
        elif self._sides.land():
            return True
        is_working = self._step_whole()
        splitting.log.note(self._clock(), TOGETHER if is_working else None)
        return is_working

    def _step_whole(self) -> bool:
        if self._overlapping is not None:
            return self._overlap(self._overlapping)
        now_s = self._clock()
        self.engine.expire(now_s)
        # At the same time: what is admitted still has some of its time left.
        plan = self._plan(now_s)
        if plan is None:
            return False
        # Before it runs: its sequences are longer afterwards.
        shape = shape_of(plan) if self._latency is not None and is_described(plan) else None
        try:
            result = self._runner.run(plan, lambda lo, hi: self._publish_kv(plan, lo, hi))
        except Exception as error:  # noqa: BLE001 - logged there; only this step's requests fail
            shape = None
            self._step_broke(plan, error)
        else:
            self.engine.complete(plan, result, self._clock())
            self._num_broken_steps = 0
        self.num_steps += 1
        self._publish_outputs()
        if shape is not None and self._latency is not None:
            self._latency.observe(shape, self._clock() - now_s)
        return True

    def _plan(self, now_s: float, phase: Phase | None = None) -> StepPlan | None:
        """The next step; what it starts is known to others then."""
        plan = self.engine.schedule(now_s, phase)
        for sequence in plan.preempted if plan is not None else ():
            logger.info(
                "sequence_preempted request_id=%s num_tokens=%d reason=blocks_ran_out",
                sequence.key.request_id,
                len(sequence.token_ids),
            )
        # What the plan starts (a transfer, say) must be known before its KV is.
        self._publish_outputs()
        if plan is not None:
            self._idle_check.busy()
        elif not self._sides and self._idle_check.idle(now_s):
            self._snapshot = self._take_snapshot()
        return plan

    def _overlap(self, runner: OverlappingRunner) -> bool:
        flight, self._flight = self._flight, None
        now_s = self._clock()
        self.engine.expire(now_s)
        if flight is not None and not self.engine.assume(flight.plan):
            self._complete(flight)
            flight = None
            # What is planned now begins now: the time of the step before it is not its own.
            now_s = self._clock()
        broken: tuple[StepPlan, Exception] | None = None
        try:
            plan = self._plan(now_s)
            if plan is not None:
                self._flight = self._begin(runner, plan, flight.begun if flight is not None else None)
        except BeginningBrokeError as error:
            assert plan is not None
            broken = plan, error.reason
        finally:
            if flight is not None:
                self.engine.take_back()
        if flight is not None:
            self._complete(flight)
            if self._flight is not None:
                self._flight.plan.began_s = self._clock()
        if broken is not None:
            self._broke(*broken)
        return flight is not None or plan is not None

    def _begin(self, runner: OverlappingRunner, plan: StepPlan, before: Begun | None) -> Flight:
        """Raises BeginningBrokeError."""
        shape = shape_of(plan) if self._latency is not None and is_described(plan) else None
        try:
            begun = runner.begin(plan, lambda lo, hi: self._publish_kv(plan, lo, hi), before)
        except Exception as error:
            raise BeginningBrokeError(error) from error
        return Flight(plan, begun, entries_of(plan), shape)

    def _begin_beside(self, plan: StepPlan, before: Begun | None, phase: Phase, step: SharedStep) -> Flight:
        assert self._splitting is not None
        runner = self._splitting.runner
        try:
            begun = runner.begin_beside(
                plan, lambda lo, hi: self._publish_kv(plan, lo, hi), before, phase, step
            )
        except Exception as error:
            raise BeginningBrokeError(error) from error
        self._splitting.log.note(self._clock(), runner.layout_name(step))
        # What runs beside others says nothing about a step on the whole device.
        return Flight(plan, begun, entries_of(plan), None)

    def _wait(self, flights: Sequence[Flight]) -> Flight:
        while len(flights) > 1:
            for flight in flights:
                if flight.begun.is_done:
                    return flight
            time.sleep(POLL_S)
        return flights[0]

    def _complete(self, flight: Flight) -> None:
        device_s: float | None = None
        try:
            result = flight.begun.result()
            device_s = result.device_s
        except Exception as error:  # noqa: BLE001 - logged there; only this step's requests fail
            self._step_broke(flight.plan, error)
        else:
            self.engine.complete(*still_there(flight.plan, flight.entries, result), self._clock())
            self._num_broken_steps = 0
        self.num_steps += 1
        self._publish_outputs()
        if flight.shape is not None and self._latency is not None:
            self._latency.observe(
                flight.shape, device_s if device_s is not None else self._clock() - flight.plan.began_s
            )

    def _idle_s(self) -> float:
        deadline_s = self.engine.next_deadline_s()
        if deadline_s is None:
            return MAX_IDLE_S
        return min(MAX_IDLE_S, max(0.0, deadline_s - self._clock()))

    def _drain_mailbox(self, wait_s: float) -> None:
        try:
            message = self._mailbox.get(timeout=wait_s) if wait_s > 0 else self._mailbox.get_nowait()
            while True:
                if callable(message):
                    message()
                elif message is not None:
                    self.engine.handle(message, self._clock())
                message = self._mailbox.get_nowait()
        except queue.Empty:
            return

    def _broke(self, plan: StepPlan, error: Exception) -> None:
        self._step_broke(plan, error)
        self._publish_outputs()

    def _step_broke(self, plan: StepPlan, error: Exception) -> None:
        logger.error(
            "step_failed num_sequences=%d num_tokens=%d", len(plan.slices), plan.num_tokens, exc_info=error
        )
        self.engine.fail_step(plan, f"the step failed: {error}", self._clock())
        self._num_broken_steps += 1
        if self._num_broken_steps == MAX_BROKEN_STEPS and not self._is_broken:
            self._is_broken = True
            self._on_broken(f"{MAX_BROKEN_STEPS} steps in a row failed, the last with: {error}")

    def _publish_kv(self, plan: StepPlan, layer_lo: int, layer_hi: int) -> None:
        ready: list[Output] = [*self.engine.kv_ready(plan, layer_lo, layer_hi)]
        if ready:
            self._publish(ready)

    def _take_snapshot(self) -> EngineSnapshot:
        engine = self.engine
        if engine.num_running <= FEW_SEQUENCES or self.num_steps % ROOM_EVERY_STEPS == 0:
            self._room_tokens = engine.room_tokens()
        return EngineSnapshot(
            engine.num_waiting,
            engine.num_running,
            engine.block_counts(),
            engine.num_leases,
            self.num_steps,
            self._idle_check.leaked_blocks,
            self._idle_check.num_failures,
            engine.reuse_counts(),
            engine.num_wrong_prefixes,
            engine.work(),
            engine.first_step_s,
            self._latency.costs() if self._latency is not None else None,
            tuple(sorted(self._splitting.log.seconds.items())) if self._splitting is not None else (),
            self._room_tokens,
        )

    def _publish_outputs(self) -> None:
        # First: whoever sees an output finds counters that are as new.
        before, self._snapshot = self._snapshot, self._take_snapshot()
        if self._snapshot.num_wrong_prefixes > before.num_wrong_prefixes:
            logger.warning("prefix_of_other_tokens num_so_far=%d", self._snapshot.num_wrong_prefixes)
        outputs = self.engine.take_outputs()
        if outputs:
            self._publish(outputs)
