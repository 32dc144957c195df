"""One device of a coarse simulation: steps of prompts and pictures one by one, runs of decode steps in closed form. Pure.

At most one `front` step runs at a time: chunks of prompts, with or without the decodes, or tiles of pictures. Beside it, or alone, goes
a `run` of decode steps of one batch. A run ends when its first sequence does, when memory ends, or, cut short, at the end of the step in
which something came that changes it. Sequences join between two steps.
"""

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.control.policies.policy import Order, WorkerLoad
from orchestrator.sim.cluster import WorkerUse
from orchestrator.sim.coarse_batch import DecodeBatch
from orchestrator.sim.coarse_costs import DECODE_ALONE, PREFILL_ALONE, CoarseCosts, at, rates
from orchestrator.sim.coarse_queue import Front, FrontQueue
from orchestrator.sim.coarse_request import Live, PrefixBlocks
from orchestrator.sim.timers import SimTimer
from workers.api import Phase, PhaseSet
from workers.step_choice import Exclusive, Mixed, Split, Step

if TYPE_CHECKING:
    from orchestrator.sim.coarse import CoarseSimulation

#: Part of what running sequences may still grow to that is kept free when one more is admitted: EngineConfig.growth_reserve.
GROWTH_RESERVE = 0.25


@dataclass(slots=True)
class _Run:
    """Steps of decode alone. rate: of the device's speed."""

    began_at_s: float
    num_steps: int
    rate: float
    is_beside: bool
    timer: SimTimer


class CoarseDevice:
    """A worker. load: its own books, which policies read."""

    def __init__(self, load: WorkerLoad, world: "CoarseSimulation", order: Order, max_sequences: int) -> None:
        self.load = load
        self.cache = PrefixBlocks()
        self.busy_s = 0.0
        self.num_steps = self.num_cached_tokens = self.num_preempted = 0
        self._world = world
        self._costs: CoarseCosts = world.config.costs
        self._timers = world.timers
        self._stepping = world.policy.stepping
        self._order = order
        self._max_sequences = max_sequences
        self.queue = FrontQueue(order, load, self._costs.attention_tokens, self._may_begin, self._begin)
        #: Prompts that have begun, and sequences whose KV is on its way.
        self._num_begun = self._num_arriving = 0
        #: Sequences whose KV is to come from another worker and has no place yet, with the worker that has it.
        self._incoming: deque[tuple[Live, CoarseDevice]] = deque()
        self._joining: list[Live] = []
        #: Prompts that came during a step, and how many ask for their prefix.
        self._unheard: list[Live] = []
        self._num_asking = 0
        self._batch = DecodeBatch(load)
        #: Tokens that its sequences may still produce.
        self._future = 0
        #: Sequences whose KV is here until another worker has it.
        self._num_held = 0
        self._front: Front | None = None
        self._run: _Run | None = None
        self._share = Split(1.0, 1.0, 0)
        self._bound_share: float | None = None
        #: It is between two steps, and begins with whatever comes when it is done with that.
        self._is_turning = False
        self.kv_link_free_at_s = 0.0

    def use(self, now_s: float) -> WorkerUse:
        """What it did."""
        busy = min(1.0, self.busy_s / now_s) if now_s else 0.0
        return WorkerUse(self.load.worker_id, 1, self.num_steps, busy, self.num_cached_tokens)

    @property
    def is_empty(self) -> bool:
        """Nothing waits, runs, comes or is held."""
        return self.is_done_with(frozenset(Phase)) and not self._num_held

    def is_done_with(self, phases: PhaseSet) -> bool:
        """Nothing of these phases waits, runs or comes."""
        front = self._front
        if Phase.ENCODE in phases and (self.queue.has_tiles or (front and front.tiles)):
            return False
        has_prompts = self.queue.has_prompts or self._unheard or self._num_asking
        if Phase.PREFILL in phases and (has_prompts or (front and front.chunks)):
            return False
        is_decoding = self.load.num_decoding or self._joining or self._incoming or self._num_arriving
        return not (Phase.DECODE in phases and is_decoding)

    # What comes.

    def enqueue(self, live: Live) -> None:
        """A prompt whose pictures are encoded. It is heard between two steps, and asks the other workers for its prefix."""
        self._unheard.append(live)
        if self._front is None or self._front.is_beside:
            if self._run is None:
                self._turn()
            else:
                self._cut()

    def _hear(self) -> None:
        asking_s = self._world.asking_s
        for live in self._unheard:
            if asking_s:
                self._num_asking += 1
                self._timers.call_later(asking_s, self._heard, live)
            else:
                self.queue.add(live)
        self._unheard.clear()

    def _heard(self, live: Live) -> None:
        self._num_asking -= 1
        self.queue.add(live)
        self._wake()

    def encode(self, live: Live, num_tiles: int) -> None:
        """Tiles of a request's pictures."""
        self.queue.add_tiles(live, num_tiles)
        self._wake()

    def receive(self, live: Live, sender: "CoarseDevice") -> None:
        """A sequence whose KV `sender` holds, which may be this one by now."""
        if sender is self:
            self._num_held -= 1
            self._future += live.num_to_come
            self.join(live)
            return
        self._incoming.append((live, sender))
        self._pull()

    def join(self, live: Live) -> None:
        """A sequence whose KV is here; it decodes from the next step on."""
        self._joining.append(live)
        self._wake()

    def _pull(self) -> None:
        """Take the KV that there are place and room for, in order of asking."""
        while self._incoming:
            live, sender = self._incoming[0]
            if not self._has_room(live.context, live.num_to_come):
                return
            self._incoming.popleft()
            self.load.kv_tokens += live.context
            self._future += live.num_to_come
            self._num_arriving += 1
            self._world.transfer(sender, self, live.context, self._arrived, live, sender)

    def _arrived(self, live: Live, sender: "CoarseDevice") -> None:
        sender.release_held(live.context)
        self._num_arriving -= 1
        self.join(live)

    def release_held(self, num_tokens: int) -> None:
        """It has it."""
        self._num_held -= 1
        self.load.kv_tokens -= num_tokens
        self._pull()
        self._wake()

    # Switching.

    def take_incoming(self) -> list[tuple[Live, "CoarseDevice"]]:
        """Give away the sequences whose KV has no place here yet."""
        found = list(self._incoming)
        self._incoming.clear()
        return found

    def migrate(self) -> None:
        """At the next boundary all that decode leave with their KV."""
        if self._run is not None:
            self._cut()
        elif self._front is None:
            self._turn()

    def _leave(self) -> None:
        for live in list(self._batch.sequences):
            self._batch.remove(live)
            self._joining.append(live)
        for live in self._joining:
            self._future -= live.num_to_come
            self._num_held += 1
            self._world.hand_off(live, self)
        self._joining.clear()

    # Turns.

    def _wake(self) -> None:
        """Something came: begin with it if nothing runs, at the end of the step otherwise."""
        front = self._front
        if self._is_turning or (front is not None and not front.is_beside):
            return
        if self._run is None:
            self._turn()
        elif self._joining or front is None:
            self._cut()

    def _turn(self) -> None:
        """Between two steps of the front or of the run: begin what may begin."""
        now_s = self._timers.time()
        self._is_turning = True
        if self._unheard:
            self._hear()
        if self._run is None and (self._front is None or self._front.is_beside):
            if self.load.is_switching and Phase.DECODE not in self.load.phases:
                self._leave()
            for live in self._joining:
                self._world.unpromise(live)
                self._batch.add(live)
            self._joining.clear()
            self._make_room()
        horizon = self._begin_front(now_s) if self._front is None else 0
        front = self._front
        if self._run is not None:
            if self._run.is_beside != (front is not None):
                self._cut()
        elif self.load.num_decoding and (front is None or front.is_beside):
            self._begin_run(now_s, horizon)
        self._is_turning = False
        if self.load.is_switching:
            self._world.go_on_switching(self)

    def _begin_front(self, now_s: float) -> int:
        """Begin a step of prompts or pictures, if there is any; returns for how many steps decodes go first, 0 for no limit."""
        head = self.queue.head(now_s, self.load.encode_tiles)
        if head is None:
            return 0
        step = self._stepping.step(now_s, self.load, head)
        self._bound_share = step.decode_share if isinstance(step, Split) and step.is_binding else None
        if isinstance(step, Exclusive) and step.phase is Phase.DECODE and self.load.num_decoding:
            return 1
        is_beside = isinstance(step, Split)
        if self._run is not None and not is_beside:
            # At the end of its step this is asked again.
            self._cut()
            return 0
        front = self._make_front(step, now_s)
        if not front.chunks and not front.tiles:
            assert self.load.num_decoding, step
            return 1
        self._front = front
        rate = 1.0
        if isinstance(step, Split):
            self._share, shares = step, (step.prefill_share, step.decode_share)
            rate = rates(*shares)[0] if self.load.num_decoding else at(PREFILL_ALONE, step.prefill_share)
        step_s = front.seconds(self._costs, self.load.decode_context) / rate
        self.busy_s += step_s
        self._timers.call_later(step_s, self._front_done)
        return 0

    def _may_begin(self, live: Live) -> bool:
        return self._has_room(live.context, live.num_to_come if live.decode is self else 0)

    def _begin(self, live: Live) -> None:
        self._num_begun += 1
        self.load.kv_tokens += live.context
        if live.decode is self:
            self._future += live.num_to_come

    def _has_room(self, num_tokens: int, num_future: int) -> bool:
        load = self.load
        num_here = load.num_decoding + len(self._joining) + self._num_begun + self._num_arriving
        if num_here >= self._max_sequences:
            return False
        if load.kv_tokens == 0:
            return True
        reserved = GROWTH_RESERVE * (self._future + num_future)
        return load.kv_tokens + num_tokens + reserved <= load.kv_capacity

    def _make_front(self, step: Step, now_s: float) -> Front:
        queue = self.queue
        match step:
            case Mixed():
                num = self.load.num_decoding
                chunks = queue.take_chunks(now_s, step.token_budget - num)
                return Front(chunks, queue.take_tiles(step.num_tiles), num, is_beside=False)
            case Split():
                chunks = queue.take_chunks(now_s, step.budget)
                return Front(chunks, queue.take_tiles(step.num_tiles), 0, is_beside=True)
            case Exclusive(phase=Phase.ENCODE):
                return Front([], queue.take_tiles(step.budget), 0, is_beside=False)
            case Exclusive():
                return Front(queue.take_chunks(now_s, step.budget), [], 0, is_beside=False)

    def _front_done(self) -> None:
        front, self._front = self._front, None
        assert front is not None
        self.num_steps += 1
        now_s = self._timers.time()
        self._is_turning = True
        if front.num_decodes:
            self._advance(1, now_s)
        for live, num_tiles in front.tiles:
            self.load.encode_tiles -= num_tiles
            self._world.encoded(live, num_tiles)
        for live, size in front.chunks:
            self._computed(live, size, now_s)
        self._pull()
        self._turn()

    def _computed(self, live: Live, size: int, now_s: float) -> None:
        job = live.job
        job.num_left -= size
        job.num_done += size
        self.load.prefill_tokens -= size
        self._order.charge(job, size)
        if job.num_left:
            self.queue.add(live)
            return
        self._order.leaves(job)
        self.load.num_prefills -= 1
        self._num_begun -= 1
        live.num_produced += 1
        self.load.kv_tokens += 1
        if live.first_at_s is None:
            live.first_at_s = now_s
        self._world.prefilled(live, self)
        if live.decode is self and Phase.DECODE in self.load.phases:
            self._future -= 1
            if live.num_to_come:
                self._joining.append(live)
        else:
            if live.decode is self:
                self._future -= live.num_to_come + 1
            if live.num_to_come:
                self._num_held += 1
                self._world.hand_off(live, self)
        if not live.num_to_come:
            self.load.kv_tokens -= live.context
            self._world.finished(live, self, now_s)

    # Decode.

    def _begin_run(self, now_s: float, horizon: int) -> None:
        load = self.load
        num, num_steps = load.num_decoding, self._batch.num_steps()
        if horizon:
            num_steps = min(num_steps, horizon)
        is_beside = self._front is not None
        if is_beside:
            rate = rates(self._share.prefill_share, self._share.decode_share)[1]
        else:
            rate = at(DECODE_ALONE, self._bound_share) if self._bound_share is not None else 1.0
        run_s = self._costs.step.run_s(num, load.decode_context, num_steps) / rate
        timer = self._timers.call_later(run_s, self._run_done)
        self._run = _Run(now_s, num_steps, rate, is_beside, timer)

    def _cut(self) -> None:
        """Let the run end with the step that it is in."""
        run, now_s, cost = self._run, self._timers.time(), self._costs.step
        assert run is not None
        num, context = self.load.num_decoding, self.load.decode_context
        num_steps = cost.steps_until(num, context, (now_s - run.began_at_s) * run.rate)
        if num_steps < run.num_steps:
            run.timer.cancel()
            run.num_steps = num_steps
            ends_at_s = run.began_at_s + cost.run_s(num, context, num_steps) / run.rate
            run.timer = self._timers.call_at(max(ends_at_s, now_s), self._run_done)

    def _run_done(self) -> None:
        run, self._run = self._run, None
        assert run is not None
        now_s = self._timers.time()
        self.busy_s += 0.0 if run.is_beside else now_s - run.began_at_s
        self.num_steps += run.num_steps
        self._advance(run.num_steps, now_s)
        self._turn()

    def _advance(self, num_steps: int, now_s: float) -> None:
        """Every sequence that decodes has so many tokens more."""
        self._future -= num_steps * self.load.num_decoding
        for live in self._batch.advance(num_steps):
            self.load.kv_tokens -= live.context
            self._world.finished(live, self, now_s)
        self._pull()

    def _make_room(self) -> None:
        """For one token of each: the newest sequences give up their KV and begin again."""
        while self._batch.is_out_of_memory():
            live = self._batch.newest()
            self._batch.remove(live)
            self._future -= live.num_to_come
            self.load.kv_tokens -= live.context
            self.num_preempted += 1
            self._world.preempted(live)

    def check_invariants(self) -> None:
        """The books are right."""
        load = self.load
        assert load.num_decoding == len(self._batch.sequences)
        assert load.kv_tokens >= 0, load
        assert min(load.encode_tiles, load.prefill_tokens, load.num_prefills, load.num_promised) >= 0, load
        assert self._future >= 0
        assert load.phases
        if self.is_empty:
            assert load.kv_tokens == load.decode_context == self._future == 0, (load, self._future)
