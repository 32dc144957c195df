"""The processes of a simulated cluster, the controller that keeps them, and the links of the gateway to them. Pure."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orchestrator.control.auto_switch import SwitchMode
from orchestrator.control.controller import ControllerConfig, decide, recover
from orchestrator.control.declared import DeclaredWorker
from orchestrator.control.observation import GatewayNews, Observation, ProcessKey, ProcessReport
from orchestrator.control.plan import SetPhases, StartWorker, StopWorker
from orchestrator.control.policies.policy import Totals
from orchestrator.control.role_switch import SwitchRequest
from orchestrator.control.scaling_config import ScalingConfig
from orchestrator.control.slo import NO_SLO, Slo
from orchestrator.control.view import ClusterView, ScaleView, SwitchView
from orchestrator.gateway.links import LinkListener
from orchestrator.sim.breaking import Breaker
from orchestrator.sim.faults import Fault, FaultOutcome
from orchestrator.sim.leap import Leap
from orchestrator.sim.links import SimLinks
from orchestrator.sim.network import CONTROLLER, EVENT_BYTES, GATEWAY
from orchestrator.sim.pictures import SimImages
from orchestrator.sim.transfers import SimTransfers
from orchestrator.sim.unread import Calm
from orchestrator.sim.worker import SimWorker, WorkerWorld
from workers.api import Command, Encode, Event, KvBlocksStored, KvEvent, PhasesRefused
from workers.engine.messages import TokensDecoded

#: Between two ticks, while a worker takes other phases, at most.
SWITCH_TICK_S = 0.02
#: From the end of a process to the end of its connections.
RESET_S = 0.01


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """What one process did. busy_share: of its life."""

    worker_id: str
    incarnation: int
    num_steps: int
    busy_share: float
    #: Of prompts, whose KV was there.
    num_cached_tokens: int

    @classmethod
    def of(cls, process: SimWorker, now_s: float) -> "WorkerUse":
        """Until its end, or now."""
        life_s = (now_s if process.ended_at_s is None else process.ended_at_s) - process.began_at_s
        return cls(
            process.spec.worker_id,
            process.spec.incarnation,
            process.num_steps,
            min(1.0, process.busy_s / life_s) if life_s > 0 else 0.0,
            process.engine.reuse_counts().num_cached_tokens,
        )


class SimCluster:
    """Starts and stops processes as the controller says, and breaks them as the faults say.

    rng: for the noise of all processes. start_s: when the clock of the faults begins. tick_s, heartbeat_timeout_s: the controller's. is_cache_told: workers tell the gateway of their prefix caches. totals: what the gateway has
    served.
    """

    def __init__(
        self,
        declared: Sequence[DeclaredWorker],
        world: WorkerWorld,
        rng: random.Random,
        *,
        faults: Sequence[Fault] = (),
        start_s: float,
        tick_s: float,
        heartbeat_timeout_s: float,
        is_cache_told: bool = True,
        slo: Slo = NO_SLO,
        switch_mode: SwitchMode = SwitchMode.OFF,
        extra: Sequence[DeclaredWorker] = (),
        scaling: ScalingConfig | None = None,
        totals: Callable[[], Totals | None] = lambda: None,
        is_calm: Callable[[], bool] = lambda: True,
    ) -> None:
        self._totals = totals
        self._is_calm = is_calm
        self.is_cache_told = is_cache_told
        #: Those that live, and of each worker the last one that has ended.
        self.processes: dict[ProcessKey, SimWorker] = {}
        #: What became of those before.
        self.uses: list[WorkerUse] = []
        self.links: SimLinks | None = None
        self._world = world
        self.timers = world.timers
        self.network = world.network
        self._rng = rng
        self._config = ControllerConfig(
            "simulated",
            world.model.name,
            tuple(declared),
            slo=slo,
            switch_mode=switch_mode,
            extra=tuple(extra),
            scaling=scaling,
            heartbeat_timeout_s=heartbeat_timeout_s,
        )
        self._tick_s = tick_s
        self._state = recover(None, (), self._config, self.timers.now_s)
        #: What the gateway has, which a new controller asks it for; None before the first.
        self._last_view: ClusterView | None = None
        #: That no view of the gateway tells of yet.
        self._wanted: dict[str, SwitchRequest] = {}
        #: The gateway's answer to the newest view, unless that was lost; then the one before.
        self._news = GatewayNews()
        self._is_news_lost = False
        self._refusals: dict[ProcessKey, PhasesRefused] = {}
        #: All of them as they were last seen, by id; a view forgets the oldest.
        self._switches: dict[str, SwitchView] = {}
        self._scales: dict[str, ScaleView] = {}
        self._by_address: dict[str, SimWorker] = {}
        self._on_view: Callable[[ClusterView], object] = lambda _view: None
        self._breaker = Breaker(self, faults, start_s)

    def make_links(self, listener: LinkListener) -> SimLinks:
        """The gateway's, one time."""
        assert self.links is None
        self.links = SimLinks(self, listener)
        return self.links

    def begin(self, on_view: Callable[[ClusterView], object]) -> None:
        """Let the controller tick from now on. on_view: told of each view, as the gateway gets it."""
        self._on_view = on_view
        self._tick()

    def file_bytes(self, command: Command) -> int:
        """Of the picture that goes with it."""
        pictures = self._world.pictures
        return pictures.file_bytes if pictures is not None and isinstance(command, Encode) else 0

    def images_at(self, address: str) -> SimImages | None:
        """Of the process that listens there, while it lives."""
        process = self._by_address.get(address)
        return process.images if process is not None and process.is_alive else None

    def transfers_at(self, address: str) -> SimTransfers | None:
        """Of the process that listens there, while it lives."""
        process = self._by_address.get(address)
        return process.transfers if process is not None and process.is_alive else None

    def living(self) -> list[SimWorker]:
        """Processes that have not ended."""
        return [process for process in self.processes.values() if process.is_alive]

    @property
    def switches(self) -> tuple[SwitchView, ...]:
        """All that there were, in the order in which they began."""
        return tuple(sorted(self._switches.values(), key=lambda switch: switch.began_at_s))

    @property
    def scales(self) -> tuple[ScaleView, ...]:
        """All decisions about the number of workers, in order."""
        return tuple(self._scales.values())

    @property
    def fault_outcomes(self) -> tuple[FaultOutcome, ...]:
        """Of all faults, in their order, by now."""
        return self._breaker.outcomes()

    def check_invariants(self) -> None:
        """Of every living process, and of the controller."""
        self._state.check_invariants()
        for process in self.living():
            process.check_invariants()

    # The controller.

    def _tick(self) -> None:
        now_s = self.timers.now_s
        reports = self._reports()
        statuses = {
            key: status
            for key, process in self.processes.items()
            if self._is_heard(process) and (status := process.status()) is not None
        }
        observation = Observation(tuple(reports), statuses, self._heard_news(), self._refusals)
        self._refusals = {}
        plan = decide(now_s, observation, self._state, self._config)
        is_switching = self._state.switching.is_under_way
        no_controller_s = self._breaker.controller_ends()
        if no_controller_s is None:
            tick_s = min(self._tick_s, SWITCH_TICK_S) if is_switching else self._tick_s
            self.timers.call_later(tick_s, self._tick)
        self._publish(plan.view)
        self._switches.update((switch.switch_id, switch) for switch in plan.view.switches)
        self._scales.update((scale.scale_id, scale) for scale in plan.view.scales)
        if no_controller_s is not None:
            self.timers.call_later(no_controller_s, self._begin_controller)
            return
        for action in plan.actions:
            match action:
                case StartWorker():
                    self._start(action)
                case StopWorker():
                    self.end(self.processes.get((action.worker_id, action.incarnation)))
                case SetPhases():
                    self._set_phases(action)
        # Of those that have ended the newest is kept, so that its end is seen.
        for key in [key for key, one in self.processes.items() if not one.is_alive]:
            machine = self._state.machines.get(key[0])
            if machine is None or key[1] < machine.incarnation:
                self.uses.append(WorkerUse.of(self.processes.pop(key), self.timers.now_s))

    def _is_heard(self, process: SimWorker) -> bool:
        """It is asked how it is, and its answer comes."""
        network, address = self.network, process.address
        if network.is_cut(GATEWAY, address):
            return False
        return not network.loses(GATEWAY, address) and not network.loses(address, GATEWAY)

    def _heard_news(self) -> GatewayNews:
        """As runtime.control_loop: of an answer that was lost nothing is known but what the one before it said."""
        if self._is_news_lost:
            return replace(self._news, wanted_switches=())
        self._news = GatewayNews(tuple(self._wanted.values()), self._totals(), self._state.version)
        return self._news

    def _publish(self, view: ClusterView) -> None:
        """Tell the gateway, if that comes there."""
        self._is_news_lost = self.network.loses(CONTROLLER, GATEWAY)
        if self._is_news_lost:
            return
        assert self.links is not None
        self._last_view = view
        self._breaker.came(view)
        self.links.read_for(view)
        self._on_view(view)
        if not self._is_calm():
            self.links.read_on_time()
            for process in self.living():
                process.stop_leap()
        for switch in view.switches:
            self._wanted.pop(switch.switch_id, None)
        self._is_news_lost = self.network.loses(GATEWAY, CONTROLLER)

    def _reports(self) -> list[ProcessReport]:
        return [
            ProcessReport(*key, process.address, None if process.is_alive else "killed")
            for key, process in self.processes.items()
        ]

    def _begin_controller(self) -> None:
        if self.network.loses(CONTROLLER, GATEWAY) or self.network.loses(GATEWAY, CONTROLLER):
            # It touches nothing before it knows what the one before it did.
            self.timers.call_later(self._tick_s, self._begin_controller)
            return
        self._is_news_lost = False
        self._breaker.controller_began()
        self._state = recover(self._last_view, self._reports(), self._config, self.timers.now_s)
        self._refusals = {}
        self._tick()

    def want_switch(self, request: SwitchRequest) -> None:
        """Somebody wants a worker to serve other phases; the next tick hears of it."""
        self._wanted[request.switch_id] = request

    def _set_phases(self, action: SetPhases) -> None:
        process = self.processes.get((action.worker_id, action.incarnation))
        network = self.network
        if process is None or not process.is_alive or network.is_cut(GATEWAY, process.address):
            return
        if network.loses(GATEWAY, process.address):
            return
        refused = process.set_phases(action.phases, action.phase_epoch)
        if not network.loses(process.address, GATEWAY) and refused is not None:
            self._refusals[action.worker_id, action.incarnation] = refused

    def _start(self, start: StartWorker) -> None:
        worker_id = start.declared.worker_id
        address = f"{worker_id}:{start.incarnation}"
        spec = start.declared.spec(start.incarnation, "127.0.0.1")
        process = SimWorker(spec, address, self._world, self, random.Random(self._rng.random()))
        self.processes[worker_id, start.incarnation] = process
        self._by_address[address] = process

    # What processes say: see GatewayWay.

    def publish(
        self, process: SimWorker, events: list[Event], kv_events: list[KvEvent], decoded: list[TokensDecoded]
    ) -> None:
        """See GatewayWay."""
        assert self.links is not None
        stream = process.stream
        if stream is not None and stream.is_broken:
            return
        num_events = sum(len(one.keys) for one in decoded) + len(events) + _num_told(kv_events)
        if not self.can_wait(process):
            if stream is not None and self.network.loses(process.address, GATEWAY):
                self.links.lose(process, stream)
                return
            events = [event for one in decoded for event in one.events()] + events
            come, number = self.links.events_came, self.links.next_number()
            num_bytes = EVENT_BYTES * num_events
            self.network.send(
                process.address, GATEWAY, num_bytes, come, process, stream, events, kv_events, number
            )
            return
        arrive_s, unread = self._carry(process, num_events), self.links.unread
        for one in decoded:
            unread.add(process.key, one, arrive_s)
        urgent: list[Event] = []
        for event in events:
            if isinstance(event, Calm) and not urgent:
                unread.say(process.key, event, arrive_s)
            else:
                urgent.append(event)
        if urgent:
            number = self.links.next_number()
            self.timers.call_at(arrive_s, self.links.events_came, process, stream, urgent, kv_events, number)
        elif kv_events:
            self.links.cache_events_come(process, kv_events, arrive_s)

    def can_wait(self, process: SimWorker) -> bool:
        """See GatewayWay."""
        stream = process.stream
        # Without a session what it says is lost, also where the gateway has not seen the end of the last one.
        if not self._world.is_leaping or stream is None or stream.is_broken:
            return False
        return self._is_calm() and self.network.is_sound(process.address, GATEWAY)

    def begin_leap(self, process: SimWorker, leap: Leap) -> None:
        """See GatewayWay."""
        assert self.links is not None
        self.links.unread.begin_leap(process.key, leap)

    def end_leap(self, process: SimWorker) -> None:
        """See GatewayWay."""
        assert self.links is not None
        self.links.unread.end_leap(process.key)

    def leap_step(self, process: SimWorker, leap: Leap, kv_events: Sequence[KvEvent]) -> None:
        """See GatewayWay."""
        assert self.links is not None
        arrive_s = self._carry(process, leap.num_sequences + _num_told(kv_events))
        leap.arrivals_s.append(arrive_s)
        if kv_events:
            self.links.cache_events_come(process, kv_events, arrive_s)

    def _carry(self, process: SimWorker, num_events: int) -> float:
        return self.network.carry(process.way, self.timers.now_s, EVENT_BYTES * num_events)

    def end(self, process: SimWorker | None) -> None:
        """Its process ends, unless it has already, and a moment later its connections."""
        if process is None or not process.is_alive:
            return
        process.die()
        self._by_address.pop(process.address, None)
        self.timers.call_later(RESET_S, self._reset, process)

    def _reset(self, process: SimWorker) -> None:
        assert self.links is not None
        self.links.ended(process)
        for other in self.living():
            other.transfers.lost(process.address)


def _num_told(events: Sequence[KvEvent]) -> int:
    """Each new block counts as an event, and blocks that are gone together as one."""
    num = 0
    for one in events:
        num += len(one.hashes) if isinstance(one, KvBlocksStored) else 1
    return num
