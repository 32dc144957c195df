"""A load on a simulated cluster of thousands of workers, by requests and runs of steps. Pure.

Coarser than orchestrator.sim.simulation: no gateway, engine, block or message is simulated, and no token by itself; what a policy
decides is. docs/simulation.md says what is left out and how far the two agree. One seed of the load gives one result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from orchestrator.bench.trace import HASH_BLOCK_TOKENS
from orchestrator.control.policies.policy import (
    ClusterLoad,
    Ended,
    Job,
    Placement,
    Policy,
    Prompt,
    Reject,
    Switch,
    WorkerLoad,
)
from orchestrator.sim.cluster import WorkerUse
from orchestrator.sim.coarse_costs import CoarseCosts
from orchestrator.sim.coarse_device import CoarseDevice
from orchestrator.sim.coarse_request import CoarseRecord, CoarseRequest, Live
from orchestrator.sim.timers import SimTimers
from workers.api import Phase, PhaseSet, WorkerId

#: Simulated seconds after the last arrival in which every request must have its end.
MAX_TAIL_S = 100_000.0


@dataclass(frozen=True, slots=True)
class CoarseConfig:
    """What is simulated beside load and policy. tick_s: between two looks at the phases."""

    costs: CoarseCosts
    kv_tokens: int
    max_sequences: int = 256
    is_prefix_cache_on: bool = True
    tick_s: float = 1.0


@dataclass(frozen=True, slots=True)
class SwitchDone:
    """A change of phases. ended_at_s: when the worker served again."""

    asked_at_s: float
    ended_at_s: float
    switch: Switch


@dataclass(frozen=True, slots=True)
class CoarseResult:
    """What became of the load; records are in order of arrival."""

    records: tuple[CoarseRecord, ...]
    switches: tuple[SwitchDone, ...]
    workers: tuple[WorkerUse, ...]
    num_preempted: int
    num_events: int
    elapsed_s: float

    @property
    def attainment(self) -> float:
        """Share of all requests that met both targets; refused ones have not."""
        return sum(record.is_met for record in self.records) / len(self.records)


@dataclass(slots=True)
class _Switching:
    asked_at_s: float
    switch: Switch
    old: PhaseSet
    is_flipping: bool = field(default=False)


class CoarseSimulation:
    """One run. requests: by time of arrival."""

    def __init__(self, config: CoarseConfig, policy: Policy, requests: Sequence[CoarseRequest]) -> None:
        self.config = config
        self.policy = policy
        self.timers = SimTimers()
        loads = tuple(
            WorkerLoad(WorkerId(f"w{i}"), phases, config.kv_tokens) for i, phases in enumerate(policy.shape)
        )
        self.cluster = ClusterLoad(loads)
        self.devices = {
            load.worker_id: CoarseDevice(load, self, policy.make_order(), config.max_sequences)
            for load in loads
        }
        self.switches: list[SwitchDone] = []
        #: A prompt waits so long for the answers of other workers that may have its prefix.
        is_asking = config.is_prefix_cache_on and len(loads) > 1
        self.asking_s = 2 * config.costs.message_s if is_asking else 0.0
        self._requests = requests
        self._records: dict[int, CoarseRecord] = {}
        self._switching: dict[WorkerId, _Switching] = {}
        self._promised: set[Live] = set()
        self._until_s = (requests[-1].arrival_s if requests else 0.0) + MAX_TAIL_S
        if requests:
            self.timers.call_at(requests[0].arrival_s, self._arrive, 0)
        self.timers.call_later(config.tick_s, self._tick)

    def run(self, on_progress: Callable[[int, int], None] = lambda _done, _all: None) -> CoarseResult:
        """Until every request has its end."""
        while len(self._records) < len(self._requests):
            self._run_next()
            if self.timers.num_events % 4096 == 0:
                on_progress(len(self._records), len(self._requests))
        now_s = self.timers.time()
        devices = self.devices.values()
        return CoarseResult(
            tuple(self._records[i] for i in range(len(self._requests))),
            tuple(self.switches),
            tuple(device.use(now_s) for device in devices),
            sum(device.num_preempted for device in devices),
            self.timers.num_events,
            now_s,
        )

    def reaches(self, attainment: float) -> bool:
        """Whether so many requests of all, 0 to 1, meet their targets; runs no further than until that is known."""
        num, num_met, num_seen = len(self._requests), 0, 0
        while True:
            if num_met >= attainment * num:
                return True
            if num_seen - num_met > (1 - attainment) * num + 1e-9:
                return False
            self._run_next()
            num_met, num_seen = self.cluster.totals.num_met, len(self._records)

    def _run_next(self) -> None:
        if not self.timers.run_next(self._until_s):
            raise AssertionError(f"{len(self._requests) - len(self._records)} requests have no end")

    def check_invariants(self) -> None:
        """Of all devices; at the end that nobody holds anything."""
        for device in self.devices.values():
            device.check_invariants()
        if len(self._records) == len(self._requests):
            assert not self._promised
            assert all(device.is_empty for device in self.devices.values())

    # Arrivals.

    def _arrive(self, index: int) -> None:
        request, now_s = self._requests[index], self.timers.time()
        if index + 1 < len(self._requests):
            self.timers.call_at(self._requests[index + 1].arrival_s, self._arrive, index + 1)
        totals = self.cluster.totals
        totals.num_requests += 1
        totals.tiles += request.num_tiles
        if request.prompt_tokens + request.output_tokens > self.config.kv_tokens:
            self._records[index] = CoarseRecord(request, "REJECTED", "does not fit a worker's KV")
            return
        placed = self._place(request, index)
        if isinstance(placed, Reject):
            message = f"{placed.reason}; earliest in {placed.earliest_s - now_s:.3f} s"
            self._records[index] = CoarseRecord(request, "REJECTED", message)
            return
        prefill, decode = self._device(placed.prefill), self._device(placed.decode)
        deadline_s = request.arrival_s + request.slo.ttft_s
        num_cached, fetch_s = self._num_cached(request, placed)
        prefill.num_cached_tokens += num_cached
        num_left = request.prompt_tokens - num_cached
        totals.prompt_tokens += num_left
        job = Job(index, request.arrival_s, deadline_s, request.tenant, num_left, num_cached)
        live = Live(request, index, job, prefill, decode, request.num_tiles)
        self._promise(live)
        prefill.load.prefill_tokens += num_left
        prefill.load.num_prefills += 1
        for load, num_tiles in _spread(request.num_tiles, placed.encode):
            load.encode_tiles += num_tiles
            self._later(self._device(load).encode, live, num_tiles)
        if not request.num_tiles:
            self.timers.call_later(self.config.costs.message_s + fetch_s, self._enqueue, live)

    def _later(self, callback: Callable[..., Any], *args: Any) -> None:
        """When a message has come."""
        self.timers.call_later(self.config.costs.message_s, callback, *args)

    def _place(self, request: CoarseRequest, index: int) -> Placement | Reject:
        prompt = Prompt(
            index,
            request.arrival_s,
            request.prompt_tokens,
            request.num_tiles,
            request.slo,
            request.tenant,
            partial(self._cached_at, request),
        )
        return self.policy.placing.place(self.timers.time(), prompt, self.cluster)

    def _cached_at(self, request: CoarseRequest, load: WorkerLoad) -> int:
        """Tokens; the last one of a prompt is always computed."""
        if not request.hash_ids or not self.config.is_prefix_cache_on:
            return 0
        num_blocks = self.devices[load.worker_id].cache.num_cached(request.hash_ids)
        return min(num_blocks * HASH_BLOCK_TOKENS, request.prompt_tokens - 1)

    def _num_cached(self, request: CoarseRequest, placed: Placement) -> tuple[int, float]:
        """Tokens that need not be computed, and how long those of another worker take to come."""
        num_here = self._cached_at(request, placed.prefill)
        if placed.fetch_from is None:
            return num_here, 0.0
        num_there = max(num_here, self._cached_at(request, placed.fetch_from))
        return num_there, (num_there - num_here) * self.config.costs.kv_token_s

    def _device(self, load: WorkerLoad) -> CoarseDevice:
        return self.devices[load.worker_id]

    # What devices tell.

    def encoded(self, live: Live, num_tiles: int) -> None:
        """So many tiles of its pictures are."""
        live.num_unencoded -= num_tiles
        if not live.num_unencoded:
            self._later(self._enqueue, live)

    def _enqueue(self, live: Live) -> None:
        """Its prompt is ready; where it was to be computed may serve other phases by now."""
        if live.prefill.load.is_switching or Phase.PREFILL not in live.prefill.load.phases:
            self._place_again(live)
        live.prefill.enqueue(live)

    def prefilled(self, live: Live, device: CoarseDevice) -> None:
        """Its prompt is computed."""
        if live.request.hash_ids:
            free = device.load.kv_capacity - device.load.kv_tokens
            num_blocks = live.request.prompt_tokens // HASH_BLOCK_TOKENS
            device.cache.keep(live.request.hash_ids[:num_blocks], max(0, free) // HASH_BLOCK_TOKENS)
        if not live.num_to_come:
            self.unpromise(live)

    def hand_off(self, live: Live, sender: CoarseDevice) -> None:
        """It is to decode elsewhere."""
        if (
            live.decode is sender
            or live.decode.load.is_switching
            or Phase.DECODE not in live.decode.load.phases
        ):
            self._decode_elsewhere(live, sender)
        live.decode.receive(live, sender)

    def _decode_elsewhere(self, live: Live, sender: CoarseDevice) -> None:
        self.unpromise(live)
        others = [load for load in self.cluster.decode if load is not sender.load] or [sender.load]
        live.decode = self._device(min(others, key=lambda load: load.num_decoding + load.num_promised))
        assert Phase.DECODE in live.decode.load.phases, "no worker serves decode"
        self._promise(live)

    def transfer(
        self,
        sender: CoarseDevice,
        receiver: CoarseDevice,
        num_tokens: int,
        then: Callable[..., Any],
        *args: Any,
    ) -> None:
        """KV goes from one to the other, which move one thing at a time each. All but a prompt's last chunk went before."""
        costs, now_s = self.config.costs, self.timers.time()
        begins_s = max(now_s, sender.kv_link_free_at_s, receiver.kv_link_free_at_s)
        ends_s = begins_s + num_tokens * costs.kv_token_s
        sender.kv_link_free_at_s = receiver.kv_link_free_at_s = ends_s
        self.timers.call_at(ends_s + costs.message_s, then, *args)

    def preempted(self, live: Live) -> None:
        """It begins again, with what it has produced as a part of its prompt."""
        old = live.job
        live.job = Job(
            live.number,
            old.arrived_at_s,
            old.deadline_s,
            old.tenant,
            live.context,
            has_first_token=True,
        )
        self._promise(live)
        load = live.prefill.load
        load.prefill_tokens += live.job.num_left
        load.num_prefills += 1
        self._enqueue(live)

    def finished(self, live: Live, device: CoarseDevice, now_s: float) -> None:
        """It has all its tokens."""
        request = live.request
        assert live.first_at_s is not None
        assert live.num_produced == request.output_tokens
        # The client's message of each token.
        back_s = self.config.costs.message_s - request.arrival_s
        record = CoarseRecord(request, "OK", "", live.first_at_s + back_s, now_s + back_s)
        self._records[live.number] = record
        totals = self.cluster.totals
        totals.num_finished += 1
        totals.output_tokens += request.output_tokens
        totals.num_met += record.is_met
        self.policy.told(
            now_s,
            Ended(
                live.prefill.load.worker_id,
                device.load.worker_id,
                record.first_s,
                record.tpot_s,
                request.slo,
            ),
        )

    def _promise(self, live: Live) -> None:
        live.decode.load.num_promised += 1
        live.decode.load.promised_context += live.request.prompt_tokens
        self._promised.add(live)

    def unpromise(self, live: Live) -> None:
        """It decodes now, or never will there."""
        if live in self._promised:
            self._promised.discard(live)
            live.decode.load.num_promised -= 1
            live.decode.load.promised_context -= live.request.prompt_tokens

    # Phases.

    def _tick(self) -> None:
        now_s = self.timers.time()
        for switch in self.policy.tick(now_s, self.cluster):
            self._begin_switch(switch)
        if len(self._records) < len(self._requests):
            self.timers.call_later(self.config.tick_s, self._tick)

    def _begin_switch(self, switch: Switch) -> None:
        """It takes nothing new, gives away what has not begun, ends or moves the rest, and then serves its new phases."""
        device = self.devices[switch.worker_id]
        load = device.load
        assert switch.phases, switch
        assert not load.is_switching, switch
        old, load.phases, load.is_switching = load.phases, switch.phases, True
        self._switching[switch.worker_id] = _Switching(self.timers.time(), switch, old)
        self.cluster.regroup()
        cluster = self.cluster
        assert cluster.prefill, "a switch left prefill to nobody"
        assert cluster.decode, "a switch left decode to nobody"
        prompts, tiles = device.queue.take_waiting()
        for live in prompts:
            self._place_again(live)
            live.prefill.enqueue(live)
        for live, num_tiles in tiles:
            load.encode_tiles -= num_tiles
            target = min(cluster.encode, key=lambda one: one.encode_tiles)
            target.encode_tiles += num_tiles
            self._device(target).encode(live, num_tiles)
        for live, sender in device.take_incoming():
            self._decode_elsewhere(live, sender)
            live.decode.receive(live, sender)
        if Phase.DECODE not in switch.phases:
            device.migrate()
        self.go_on_switching(device)

    def _place_again(self, live: Live) -> None:
        """Its prompt is to be computed elsewhere. A refusal comes too late for it."""
        job, request = live.job, live.request
        live.prefill.load.prefill_tokens -= job.num_left
        live.prefill.load.num_prefills -= 1
        placed = self._place(request, live.number)
        if isinstance(placed, Reject):
            load = min(self.cluster.prefill, key=lambda one: one.prefill_tokens)
        else:
            load = placed.prefill
            if live.decode is live.prefill:
                self.unpromise(live)
                live.decode = self._device(placed.decode)
                self._promise(live)
        job.num_done = self._cached_at(request, load)
        job.num_left = live.context - job.num_done
        live.prefill = self._device(load)
        load.prefill_tokens += job.num_left
        load.num_prefills += 1

    def go_on_switching(self, device: CoarseDevice) -> None:
        """A worker serves its new phases some time after nothing is left of those that it gives up; the others go on."""
        switching = self._switching.get(device.load.worker_id)
        if switching is None or switching.is_flipping:
            return
        if not device.is_done_with(switching.old - switching.switch.phases):
            return
        switching.is_flipping = True
        costs = self.config.costs
        is_loading = (Phase.ENCODE in switching.old) != (Phase.ENCODE in switching.switch.phases)
        self.timers.call_later(costs.load_s if is_loading else costs.flip_s, self._flipped, device)

    def _flipped(self, device: CoarseDevice) -> None:
        switching = self._switching.pop(device.load.worker_id)
        device.load.is_switching = False
        self.cluster.regroup()
        self.switches.append(SwitchDone(switching.asked_at_s, self.timers.time(), switching.switch))


def _spread(num_tiles: int, loads: Sequence[WorkerLoad]) -> list[tuple[WorkerLoad, int]]:
    """As even as can be."""
    if not loads:
        return []
    each, rest = divmod(num_tiles, len(loads))
    return [(load, each + (i < rest)) for i, load in enumerate(loads) if each + (i < rest)]
