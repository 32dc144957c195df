"""A load on a simulated cluster, from its first arrival to its last answer. Pure.

What serves is what serves in production: controller, dispatcher, router, request machines, engines with their schedulers and block
pools, transfers with their leases. What is simulated: time, the forward pass, the network, processes. One seed gives one result.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import ne

from orchestrator.bench.plan import PlannedRequest, prompt_token_ids
from orchestrator.bench.records import OK, GatewayTimings, LoadResult, RequestRecord
from orchestrator.control.admission import Admission
from orchestrator.control.auto_switch import SwitchMode
from orchestrator.control.declared import DeclaredWorker, growth_reserves, token_budgets
from orchestrator.control.request_actions import Fail
from orchestrator.control.request_machine import RequestMachine
from orchestrator.control.role_switch import SwitchRequest
from orchestrator.control.scaling_config import ScalingConfig
from orchestrator.control.slo import NO_SLO, Slo
from orchestrator.control.view import ScaleView, SwitchView
from orchestrator.errors import PhasewiseOrchestratorError
from orchestrator.gateway.dispatcher import Dispatcher
from orchestrator.gateway.live_request import LiveRequest
from orchestrator.gateway.validation import CheckedRequest
from orchestrator.sim.cluster import SimCluster, WorkerUse
from orchestrator.sim.faults import Fault, FaultOutcome
from orchestrator.sim.leap import VOCAB_SIZE, tokens_of
from orchestrator.sim.network import NetworkShape, SimNetwork
from orchestrator.sim.pictures import Pictures
from orchestrator.sim.timers import HeedfulTimers, SimTimers
from orchestrator.sim.worker import WorkerWorld
from workers.api import RequestId, SamplingParams, WorkerId
from workers.block_hash import root_hash
from workers.latency_model import LatencyModel

#: Requests arrive when the workers have loaded.
WARM_S = 1.0
#: Of all prompts, as with engines that have no model.
ROOT = root_hash("", "", "")


@dataclass(frozen=True, slots=True)
class SimConfig:
    """What is simulated, beside the load.

    noise: standard deviation of the logarithm of what a step takes. load_s: from the start of a process to READY. timeout_s: the
    deadline of each request. tick_s: between two looks of the controller. heartbeat_timeout_s: a worker that is silent for so long is lost. check_every: events between two checks of all invariants; 0 checks at the end alone.
    """

    declared: tuple[DeclaredWorker, ...]
    latency: LatencyModel
    seed: int = 0
    noise: float = 0.03
    load_s: float = 5.0
    timeout_s: float = 600.0
    tick_s: float = 0.5
    heartbeat_timeout_s: float = 5.0
    max_context_tokens: int = 131_072
    max_waiting_requests: int = 10_000
    max_running_requests: int = 10_000
    #: Each with its time after the first arrival.
    faults: tuple[Fault, ...] = ()
    #: Changes of phases that somebody asks for, each with its time after the first arrival.
    switches: tuple[tuple[float, SwitchRequest], ...] = ()
    #: Targets of every request, and whether the controller switches phases by them.
    slo: Slo = NO_SLO
    switch_mode: SwitchMode = SwitchMode.OFF
    #: Workers that may be added as the load asks for them: there is a node for each at once.
    extra: tuple[DeclaredWorker, ...] = ()
    scaling: ScalingConfig | None = None
    #: Which requests the gateway takes.
    admission: Admission = Admission.OFF
    check_every: int = 0
    #: Of workers that are slower or faster than `latency` says.
    latency_of: Mapping[WorkerId, LatencyModel] = field(default_factory=dict)
    #: Of a message between two processes, one way.
    message_s: float = 200e-6
    #: Workers tell of their prefix caches, and requests are routed by that.
    is_cache_told: bool = True
    #: Of all requests that have some; None where the model takes none.
    pictures: Pictures | None = None
    #: See orchestrator.sim.leap. Off, engine and gateway get each token at its time; nothing but num_events is another then.
    is_leaping: bool = True


@dataclass(frozen=True, slots=True)
class SimResult:
    """What became of the load, as a benchmark of a real cluster records it, and of the cluster.

    start_s: on the controller's clock, when arrivals began. faults: what came of each, in seconds since then. num_lost: messages.
    """

    load: LoadResult
    workers: tuple[WorkerUse, ...]
    switches: tuple[SwitchView, ...]
    num_events: int
    num_wrong_tokens: int
    start_s: float = 0.0
    scales: tuple[ScaleView, ...] = ()
    faults: tuple[FaultOutcome, ...] = ()
    num_lost: int = 0


class Simulation:
    """One run. plan: by time of arrival, all within `duration_s`."""

    def __init__(self, config: SimConfig, plan: Sequence[PlannedRequest], duration_s: float) -> None:
        rng = random.Random(config.seed)
        self.timers = SimTimers()
        self._config = config
        self._plan = plan
        self._duration_s = duration_s
        shape = NetworkShape(config.latency.device.transfer_bytes_per_s, config.message_s)
        network_rng, cluster_rng = random.Random(rng.random()), random.Random(rng.random())
        network = SimNetwork(self.timers, shape, network_rng, random.Random(rng.random()))
        # The controller has seen by then that all are ready.
        self._start_s = start_s = config.load_s + max(WARM_S, 2 * config.tick_s)
        world = WorkerWorld(
            config.latency.model,
            config.latency,
            self.timers,
            network,
            lambda address: self.cluster.transfers_at(address),
            config.noise,
            config.load_s,
            config.max_context_tokens,
            config.latency_of,
            config.pictures,
            lambda address: self.cluster.images_at(address),
            config.is_leaping,
        )
        self.cluster = SimCluster(
            config.declared,
            world,
            cluster_rng,
            faults=config.faults,
            start_s=start_s,
            tick_s=config.tick_s,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            is_cache_told=config.is_cache_told,
            slo=config.slo,
            switch_mode=config.switch_mode,
            extra=config.extra,
            scaling=config.scaling,
            totals=lambda: self.dispatcher.totals,
            is_calm=lambda: not self.dispatcher.is_leaving,
        )
        self.dispatcher = Dispatcher(
            HeedfulTimers(self.timers, self._read_all),
            self.cluster.make_links,
            max_waiting_requests=config.max_waiting_requests,
            max_running_requests=config.max_running_requests,
            learn_model=_no_model,
            slo=config.slo,
            admission=config.admission,
            token_budgets=token_budgets((*config.declared, *config.extra)),
            growth_reserves=growth_reserves((*config.declared, *config.extra)),
        )
        self._clients: dict[RequestId, _Client] = {}
        self._records: dict[int, RequestRecord] = {}
        self._num_wrong_tokens = 0
        self._num_failed = 0
        assert self.cluster.links is not None
        self.cluster.links.on_events = self._read_answers
        self.cluster.links.may_route_again = self.dispatcher.may_route_again
        for at_s, request in config.switches:
            self.timers.call_at(start_s + at_s, self.cluster.want_switch, request)
        for index, planned in enumerate(plan):
            self.timers.call_at(start_s + planned.arrival_s, self._arrive, index, planned)

    def run(self, on_progress: Callable[[int, int], None] = lambda _done, _all: None) -> SimResult:
        """Until every request has its end. on_progress: told how many have, of how many."""
        self.cluster.begin(self.dispatcher.update_view)
        latest_s = self._start_s + self._duration_s + self._config.timeout_s
        every = self._config.check_every
        timers, dispatcher, num_wanted = self.timers, self.dispatcher, len(self._plan)
        next_check, next_told = every, 4096
        while len(self._records) < num_wanted:
            if not timers.run_next(latest_s + 60.0):
                raise AssertionError(f"{num_wanted - len(self._records)} requests have no end")
            if dispatcher.num_failed > self._num_failed:
                # Not all failures come with an event of a worker.
                self._num_failed = dispatcher.num_failed
                failed = [one for one, client in self._clients.items() if client.request.is_failed]
                self._read_answers(failed, ())
            if every and timers.num_events >= next_check:
                next_check = timers.num_events + every
                self.check_invariants()
            if timers.num_events >= next_told:
                next_told = timers.num_events + 4096
                on_progress(len(self._records), num_wanted)
        self.check_invariants()
        now_s = self.timers.now_s
        records = tuple(self._records[index] for index in range(len(self._plan)))
        uses = [WorkerUse.of(process, now_s) for process in self.cluster.processes.values()]
        load = LoadResult(records, self._duration_s, now_s - self._start_s, was_interrupted=False)
        return SimResult(
            load,
            (*self.cluster.uses, *uses),
            self.cluster.switches,
            self.timers.num_events,
            self._num_wrong_tokens,
            self._start_s,
            self.cluster.scales,
            self.cluster.fault_outcomes,
            self.cluster.network.num_lost,
        )

    def check_invariants(self) -> None:
        """Of all that serves."""
        self._read_all()
        self.dispatcher.check_invariants()
        self.cluster.check_invariants()

    # Clients.

    def _arrive(self, index: int, planned: PlannedRequest) -> None:
        now_s, config = self.timers.now_s, self._config
        request_id = RequestId(f"r{index}")
        prompt = prompt_token_ids(planned.row, planned.prompt_tokens, vocab_size=VOCAB_SIZE, seed=config.seed)
        sampling = SamplingParams(planned.output_tokens)
        pictures = config.pictures
        images = (
            pictures.placed(request_id, planned.prompt_tokens, planned.num_images)
            if pictures is not None
            else None
        )
        checked = CheckedRequest(request_id, tuple(prompt), sampling, prefix_root=ROOT, images=images)
        assert self.cluster.links is not None
        self.cluster.links.read_caches()
        try:
            request = self.dispatcher.submit(checked, arrived_at_s=now_s, deadline_s=now_s + config.timeout_s)
        except PhasewiseOrchestratorError as error:
            self._records[index] = RequestRecord(planned, type(error).__name__, str(error), 0.0)
            return
        self._clients[request_id] = _Client(index, planned, request, now_s)

    def _read_all(self) -> None:
        assert self.cluster.links is not None
        self.cluster.links.read_all()

    def _read_answers(self, request_ids: Sequence[RequestId], times_s: Sequence[float]) -> None:
        for request_id in request_ids:
            client = self._clients.get(request_id)
            if client is not None:
                self._read_answer(client, times_s)

    def _read_answer(self, client: "_Client", times_s: Sequence[float]) -> None:
        """times_s: when each of its new tokens came, if that was before now."""
        now_s = self.timers.now_s
        while (news := client.request.take_now()) is not None:
            if isinstance(news, Fail):
                self._end(client, news.kind.upper(), news.reason)
                return
            num_new, begin = len(news.token_ids), client.planned.prompt_tokens + len(client.times_s)
            expected = tuple(tokens_of(client.request.request_id, begin, begin + num_new))
            if news.token_ids != expected:
                self._num_wrong_tokens += sum(map(ne, news.token_ids, expected))
            came_s = times_s or [now_s] * num_new
            assert len(came_s) == num_new
            arrived_at_s = client.arrived_at_s
            client.times_s += [at_s - arrived_at_s for at_s in came_s]
            if news.finish_reason is not None:
                self._end(client, OK, "")
                return

    def _end(self, client: "_Client", status: str, message: str) -> None:
        request_id = client.request.request_id
        self.dispatcher.release(client.request)
        del self._clients[request_id]
        times_s = tuple(client.times_s)
        total_s = self.timers.now_s - client.arrived_at_s
        gateway = _timings(client.request.samples[0].machine) if status == OK else None
        self._records[client.index] = RequestRecord(
            client.planned, status, message, 0.0, times_s, total_s, gateway
        )


@dataclass(slots=True)
class _Client:
    index: int
    planned: PlannedRequest
    request: LiveRequest
    arrived_at_s: float
    #: Of each token, since it arrived.
    times_s: list[float] = field(default_factory=list)


def _timings(machine: RequestMachine) -> GatewayTimings:
    """Of a finished request, as the gateway's answer has them."""
    times, route = machine.times, machine.route
    assert route is not None
    assert times.submitted_at_s is not None
    assert times.first_token_at_s is not None
    return GatewayTimings(
        ttft_s=times.first_token_at_s - times.arrived_at_s,
        queue_s=times.submitted_at_s - times.arrived_at_s + times.worker_queue_s,
        prefill_s=times.prefill_s,
        kv_exposed_s=times.kv_transfer.exposed_s if times.kv_transfer is not None else None,
        prefill_worker_id=route.prefill.worker_id,
        decode_worker_id=route.decode.worker_id,
        attempts=machine.num_attempts,
    )


async def _no_model(_worker: object, _model: object) -> None:
    """Nothing is loaded."""
