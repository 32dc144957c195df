"""A dispatcher whose workers hear all and say only what a test has them say."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

from orchestrator.control.slo import Slo
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from orchestrator.gateway.dispatcher import Dispatcher
from orchestrator.gateway.links import Link
from orchestrator.gateway.validation import CheckedRequest
from orchestrator.sim.timers import SimTimers
from tests.support.sim import LLAMA_ON_H100
from workers.api import (
    Command,
    Event,
    ModelInfo,
    PhaseSet,
    PhaseWork,
    RequestId,
    SamplingParams,
    WorkerId,
    WorkerState,
    WorkerStatus,
)
from workers.step_shape import FactorSource

COSTS = replace(LLAMA_ON_H100.costs(), source=FactorSource.FITTED)


class OpenLinks:
    """Links to all workers. Implements gateway.links.Links."""

    def use(self, _view: ClusterView) -> list[tuple[WorkerView, str]]:
        return []

    def has(self, _link: Link) -> bool:
        return True

    def is_open(self, _worker: WorkerView) -> bool:
        return True

    def unsent_bytes(self, _worker: WorkerView) -> int:
        return 0

    def send(self, _worker: WorkerView, _command: Command) -> None:
        pass

    async def close(self) -> None:
        pass


class QuietWorkers:
    """phases: of each worker by its name. Each view comes 1 s after the one before."""

    def __init__(
        self,
        phases: Mapping[str, PhaseSet],
        *,
        max_running: int = 100_000,
        growth_reserves: Mapping[WorkerId, float] | None = None,
    ) -> None:
        self.timers = SimTimers()
        self._phases = phases
        self._version = self._num = 0
        self.dispatcher = Dispatcher(
            self.timers,
            lambda _listener: OpenLinks(),
            max_waiting_requests=100_000,
            max_running_requests=max_running,
            learn_model=_no_model,
            slo=Slo(1.0, 0.05),
            growth_reserves=growth_reserves,
        )

    def see(
        self,
        rooms: Mapping[str, int | None],
        *,
        leaving: Mapping[str, PhaseSet] | None = None,
        failed: Sequence[str] = (),
    ) -> None:
        """A view comes, in which workers have room for so many tokens. leaving: phases that they give up."""
        self.timers.now_s += 1.0
        self._version += 1
        views = []
        for name, declared in self._phases.items():
            left = (leaving or {}).get(name, frozenset())
            status = WorkerStatus(
                WorkerId(name),
                1,
                declared - left,
                WorkerState.READY,
                step_costs=COSTS,
                work=PhaseWork(prefill_tokens=1),
                room_tokens=rooms[name],
            )
            state = LifecycleState.FAILED if name in failed else LifecycleState.READY
            views.append(
                WorkerView(
                    WorkerId(name), 1, declared - left, state, f"{name}:1", status=status, leaving=left
                )
            )
        self.dispatcher.update_view(ClusterView("d", 1, self._version, "m", tuple(views)))
        self.dispatcher.check_invariants()

    def submit(self, num: int, num_tokens: int, max_new: int, priority: int = 0) -> None:
        """So many requests of so many tokens each, and that may come to max_new more."""
        for _ in range(num):
            self._num += 1
            # No two have a beginning in common.
            prompt = (self._num, *range(1, num_tokens))
            checked = CheckedRequest(
                RequestId(f"r{self._num}"), prompt, SamplingParams(max_new), priority=priority
            )
            now_s = self.timers.now_s
            self.dispatcher.submit(checked, arrived_at_s=now_s, deadline_s=now_s + 10**6)

    def says(self, name: str, *events: Event) -> None:
        """A worker reports."""
        link = SimpleNamespace(worker=SimpleNamespace(worker_id=WorkerId(name), incarnation=1))
        self.dispatcher.events_came(link, events)  # type: ignore[arg-type]
        self.dispatcher.check_invariants()

    @property
    def num_at(self) -> Counter[tuple[str, str]]:
        """Requests by prefill and decode worker."""
        routes = [one.machine.route for one in self.dispatcher._running.values()]
        return Counter((one.prefill.worker_id, one.decode.worker_id) for one in routes if one is not None)


async def _no_model(_worker: WorkerView, _model: ModelInfo) -> None:
    """No model."""
